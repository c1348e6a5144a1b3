"""A run's folder: its log, its checkpoints, its best model, each whole at any moment, whenever the run is killed.

What is written stands beside its place until it is finished, and is then moved there. Knows nothing of losses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from engine.config import ConfigError
from engine.parallel import Replicas

EDGE = 2**16  # bytes
SETTINGS = "settings.json"  # in a run's folder: what made it
UNFINISHED, OLD = ".unfinished", ".old"  # behind the name of what is being written, and of what gives way to it
# Weights whose files' names begin so; others, such as a lens, only look on.
ANSWERING = ("model", "adapter_model", "companions", "*/adapter_model")


def replace_folder(made: Path, place: Path) -> None:
    """Moves a finished folder into place; what stood there is removed only once the new one stands.

    Errors: FileNotFoundError where nothing was made; then what stood there still does.
    """
    if not made.is_dir():
        raise FileNotFoundError(f"Nothing was written to take the place of {place}.")
    old = place.with_name(place.name + OLD)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(made, place)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def as_a_whole(place: Path) -> Iterator[Path]:
    """A folder to write into, beside `place`, which it takes once all is written; whatever stood there stays until then."""
    made = place.with_name(place.name + UNFINISHED)
    shutil.rmtree(made, ignore_errors=True)
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    replace_folder(made, place)


def write_whole(place: Path, text: str) -> None:
    """A file in the place of an old one, which whoever reads it meanwhile still finds."""
    made = place.with_name(f"{place.name}.{os.getpid()}{UNFINISHED}")
    try:
        made.write_text(text, encoding="utf-8")
        os.replace(made, place)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def restore(out: Path) -> None:
    """Puts a run's best model back if a kill found it moved away, and removes what the kill left half written or half removed."""
    place, old = out / "best", out / f"best{OLD}"
    if old.exists() and not place.exists():
        os.replace(old, place)
    for left in (old, out / f"best{UNFINISHED}", out / "checkpoints" / "unfinished"):
        shutil.rmtree(left, ignore_errors=True)
    for torn in out.glob(f"{SETTINGS}.*{UNFINISHED}"):
        torn.unlink()


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def mended(path: Path) -> BinaryIO:
    """A log, open for further lines: the first comes in place of one that a kill or a full disk has torn."""
    log = path.open("ab+")
    log.seek(0)
    log.truncate(log.read().rfind(b"\n") + 1)
    return log


def jot(out: Path, told: dict[str, Any]) -> None:
    """Adds a line to a run's log."""
    with mended(out / "log.jsonl") as log:
        log.write(json.dumps(told).encode() + b"\n")


@contextmanager
def end_told(out: Path) -> Iterator[None]:
    """Why a run that is under way ends early stands in its log."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            free = shutil.disk_usage(out).free >> 20
            jot(out, {"stopped": f"{type(error).__name__}: {error}", "free_megabytes": free})
        raise


def save(out: Path, progress: dict[str, float], keep: int, team: Replicas) -> None:
    """A checkpoint, which every process writes its part of; older ones than the last `keep` go."""
    place = out / "checkpoints" / f"step-{progress['step']:07d}"
    made = place.with_name("unfinished")
    wait, leads = team.accelerator.wait_for_everyone, team.accelerator.is_main_process
    if leads:
        shutil.rmtree(made, ignore_errors=True)
    wait()
    team.save(made)
    wait()
    if leads:
        (made / "progress.json").write_text(json.dumps(progress))
        replace_folder(made, place)
        for old in checkpoints(out)[:-keep]:
            os.replace(old, made)  # half removed, it would pass for whole under its own name
            shutil.rmtree(made)
    wait()


class Journal:
    """A run's log: a line of JSON each, and what is drawn of it. The first process's, whose numbers are everybody's; the
    others write down their own mishaps."""

    def __init__(self, out: Path, rank: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / (f"log-{rank}.jsonl" if rank else "log.jsonl")
        self.file = mended(self.path)
        self.board = None if rank else SummaryWriter(str(out / "tensorboard"))

    def write(self, told: dict[str, Any]) -> None:
        self.file.write(json.dumps(told).encode() + b"\n")
        self.file.flush()

    def record(self, step: int, values: dict[str, float]) -> None:
        if self.board is None:
            return
        self.write({"step": step, **values})
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def header(stored: BinaryIO) -> bytes:
    """A safetensors file's header, JSON of its tensors' shapes and places; of another file, whatever stands there."""
    length = int.from_bytes(stored.read(8), "little")
    return stored.read(min(length, os.fstat(stored.fileno()).st_size))


def fingerprint(*folders: Path) -> str:
    """What tells the weights that answer in these folders, models' and adapters' and their companions', from others: the files'
    names, headers, and every tensor's first and last 64 KiB, hashed. Errors: ConfigError for a file that holds no such weights."""
    read = hashlib.sha256()
    found = (file for folder in folders for kind in ANSWERING for file in folder.glob(f"{kind}*.safetensors"))
    for file in sorted(found):
        size = file.stat().st_size
        read.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stored:
            try:
                head = header(stored)
                told, start = json.loads(head), stored.tell()
                spans = sorted(told[name]["data_offsets"] for name in told if name != "__metadata__")
                read.update(head)
                for begin, end in spans:
                    for first in (begin, max(begin, end - EDGE)):
                        stored.seek(start + first)
                        read.update(stored.read(min(EDGE, end - first)))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{file} is damaged: it holds no weights.") from None
    return read.hexdigest()[:16]
