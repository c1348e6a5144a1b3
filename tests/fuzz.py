"""Damaged files by the thousand: each is read, read in part, or refused in a sentence, in time and without a leak.

python -m tests.fuzz --minutes 5 --seed 0           # prints figures as JSON; files that broke something go to --keep
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from engine.container import VideoError
from engine.sandbox import Sandbox
from engine.video import Sampling
from tests import media

SECONDS = 5.0  # for one file
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass
class Outcome:
    """What became of the files."""

    files: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # what must not be
    slowest: float = 0.0
    memory: list[float] = field(default_factory=list)  # MB of this process after each file

    def told(self) -> dict:
        memory = {"first": self.memory[0], "last": self.memory[-1]} if self.memory else None
        told = {"files": self.files, **self.counts, "faults": self.faults}
        return told | {"slowest_seconds": round(self.slowest, 2), "memory_mb": memory}


def originals(folder: Path) -> list[Path]:
    """Whole files of every kind that is read: made here, and real ones that ship with Gradio and with this project."""
    kinds = [
        ("a.mp4", "libx264", "yuv420p"), ("b.mp4", "libx265", "yuv420p10le"), ("c.mkv", "libx264", "yuv420p"),
        ("d.webm", "libvpx-vp9", "yuva420p"), ("e.webm", "libvpx", "yuv420p"), ("f.avi", "mpeg4", "yuv420p"),
        ("g.avi", "mjpeg", "yuvj420p"), ("h.gif", "gif", "rgb8"), ("i.mov", "png", "rgba"), ("j.mkv", "ffv1", "yuv444p12le"),
    ]  # fmt: skip
    made = [
        media.write(folder / name, codec, 24, 12, pixels=pixels)
        for name, codec, pixels in kinds
        if media.encoder(codec)
    ]
    made.append(media.turn(made[0], folder / "turned.mp4", 90))
    made.append(media.remux(made[0], folder / "parts.mp4", movflags="frag_keyframe+empty_moov"))
    made.append(media.sound(folder / "song.mp4", cover=True))
    for name in ("k.png", "l.jpg", "m.webp", "n.bmp"):
        Image.fromarray(media.numbered(5)).save(folder / name)
        made.append(folder / name)
    gradio = Path(str(files("gradio"))) / "media_assets"
    real = [gradio / "videos" / name for name in ("b.mp4", "b.avi")] + [gradio / "images" / "screenshot.gif"]
    shipped = sorted((Path(__file__).parents[1] / "assets" / "examples").glob("*.mp4"))[:2]
    return made + [path for path in real + shipped if path.is_file()]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The same file, hurt in one to four ways."""
    hurt = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        size = len(hurt)
        # Headers and indexes are at the ends, and break more than pictures do.
        place = min(
            int(size * chance.choice((chance.random(), chance.random() ** 6, 1 - chance.random() ** 6))), size - 1
        )
        length = min(1 << chance.randint(0, 12), size - place)
        way = chance.choice(("bits", "bytes", "number", "cut", "drop", "double", "swap", "zero", "name"))
        if way == "bits":
            for _ in range(chance.randint(1, 16)):
                hurt[chance.randrange(size)] ^= 1 << chance.randrange(8)
        elif way == "bytes":
            hurt[place : place + length] = chance.randbytes(length)
        elif way == "number":
            form = chance.choice(("<I", ">I", "<H", ">H", "<Q", ">Q"))
            number = struct.pack(form, chance.choice(EXTREMES) & (256 ** struct.calcsize(form) - 1))
            hurt[place : place + len(number)] = number
        elif way == "cut":
            del hurt[max(place, 1) :]
        elif way == "drop" and size > length:
            del hurt[place : place + length]
        elif way == "double":
            hurt[place:place] = hurt[place : place + length]
        elif way == "swap":
            other = chance.randrange(size)
            hurt[place : place + length], hurt[other : other + length] = (
                hurt[other : other + length],
                hurt[place : place + length],
            )
        elif way == "zero":
            hurt[place : place + length] = bytes(length)
        elif (
            way == "name"
            and (found := hurt.find(chance.choice((b"moov", b"stbl", b"stsz", b"stts", b"mdat", b"trak", b"tkhd"))))
            >= 0
        ):
            hurt[found : found + 4] = chance.choice((b"free", b"moov", b"trak", b"stco", b"dref", b"cmov"))
    return bytes(hurt)


def damaged(folder: Path, seed: int) -> Iterator[Path]:
    """Damaged files without end, the same ones for the same seed; each lies where the one before lay."""
    chance, whole = random.Random(seed), originals(folder)
    contents = [(path, path.read_bytes()) for path in whole]
    while True:
        path, data = chance.choice(contents)
        hurt = folder / f"hurt{path.suffix}"
        hurt.write_bytes(mutated(data, chance))
        yield hurt


def fuzz(folder: Path, seed: int, count: int = 10**9, seconds: float = 1e9, keep: Path | None = None) -> Outcome:
    """Reads so many damaged files, or for so many seconds, in the page's own way."""
    outcome, box, own = Outcome(), Sandbox(), psutil.Process()
    sampling = Sampling(fps=4.0, max_frames=16)
    box.read(originals(folder)[0], sampling)  # libraries are loaded by now
    until = float("inf")
    for number, path in enumerate(damaged(folder, seed)):
        until = until if number else time.monotonic() + seconds  # the whole files are made by now
        if number >= count or time.monotonic() > until:
            break
        worker = box.idle[0] if box.idle else None
        begin, before = time.monotonic(), len(outcome.faults)
        try:
            clip = box.read(path, sampling, SECONDS)
            outcome.counts["whole" if len(clip.frames) == clip.asked else "in part"] += 1
            if clip.frames.dtype != np.uint8 or len(clip.frames) != len(clip.times) or not len(clip.frames):
                outcome.faults.append(f"{number} {path.suffix}: frames {clip.frames.shape}, {len(clip.times)} times")
            if not np.isfinite(clip.times).all() or (np.diff(clip.times) < 0).any() or not clip.duration > 0:
                outcome.faults.append(f"{number} {path.suffix}: times {clip.times}, duration {clip.duration}")
            if len(clip.frames) < clip.asked and not any("could be read" in notice for notice in clip.notices):
                outcome.faults.append(f"{number} {path.suffix}: frames are missing and nobody says so")
        except VideoError as error:
            outcome.counts["refused"] += 1
            if not 10 < len(str(error)) < 250 or "\n" in str(error):
                outcome.faults.append(f"{number} {path.suffix}: {error}")
        except Exception as error:
            outcome.faults.append(f"{number} {path.suffix}: {type(error).__name__} {error}")
        taken = time.monotonic() - begin
        outcome.slowest = max(outcome.slowest, taken)
        if taken > SECONDS + 5:
            outcome.faults.append(f"{number} {path.suffix}: {taken:.1f} s")
        if worker and worker.process.returncode not in (None, -9):  # we kill with 9
            outcome.counts["workers crashed"] += 1
            if keep:
                shutil.copy(path, keep / f"crash-{seed}-{number}{path.suffix}")
        elif worker and worker.process.returncode:
            outcome.counts["workers let go"] += 1
        if keep and len(outcome.faults) > before:
            shutil.copy(path, keep / f"fault-{seed}-{number}{path.suffix}")
        outcome.files += 1
        outcome.memory.append(round(own.memory_info().rss / 2**20, 1))
    box.close()
    return outcome


def main() -> int:
    known = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    known.add_argument("--files", type=int, default=10**9)
    known.add_argument("--minutes", type=float, default=5)
    known.add_argument("--seed", type=int, default=0)
    known.add_argument("--keep", type=Path, help="folder for files that crashed a worker or broke a rule")
    options = known.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(Path(folder), options.seed, options.files, 60 * options.minutes, options.keep)
    print(json.dumps(outcome.told(), indent=1))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
