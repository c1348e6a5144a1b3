"""A clip or an image in a file, read when a model looks at it, and a folder that keeps what was decoded.

Frames are kept under what decides them: the file's absolute path, size and time of change, and the sampling. Hashing the
content instead would read the whole file each time, which costs what decoding costs on a network disk; this way a file
that is exchanged or repaired is decoded anew, and one that is moved is too.

An entry is written beside its place and moved into it, and its checksum is held against it, so that several processes may
share a folder and a kill leaves nothing that could be read. When the folder is full, no more is added and nothing is
removed: rounds are shuffled, so an old entry is as likely to be wanted as a new one. Knows no model and no format of data.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zlib
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.container import VideoError
from engine.video import BUDGET_SECONDS, Asked, Decoded, Sampling, decode, read

BUCKETS = 16  # folders, each with its share of the bound: it is kept without a count that processes would have to share
FORM = 1  # of an entry; one more whenever the same settings give other frames
LEFT_SECONDS = 3600.0  # after which an unfinished entry is a killed process's


@dataclass(frozen=True)
class Footage:
    """`cache`: a folder for its frames ("": none), which may hold `cache_bytes` altogether."""

    path: Path
    sampling: Sampling
    still: bool = False  # an image rather than a video
    cache: str = ""
    cache_bytes: int = 0

    def frames(self, sampling: Sampling) -> tuple[np.ndarray, float]:
        """Whole, or not at all: -> (uint8 [frames, height, width, 3], seconds from one frame to the next).

        sampling: its own, as a model's family wants it. Errors: VideoError for a file that can't be read, or not all
        that was asked for, or that isn't what it is called.
        """
        small = sampling.size != "stored"  # else kept frames would take many times the file's own room
        place = self._place(sampling) if self.cache and small else None
        if place and (kept := _kept(place)):
            return kept
        clip = read(self.path, sampling, decode=self._decoded)
        if len(clip.frames) < clip.asked:
            raise VideoError(clip.notices[-1])
        if place:
            _keep(place, clip.frames, clip.seconds_per_frame, self.cache_bytes // BUCKETS)
        return clip.frames, clip.seconds_per_frame

    def opened(self) -> Footage:
        """The same, once what the file says of itself, and one picture, were read. Errors: VideoError."""
        with closing(self._decoded(self.path, self.sampling)) as told:
            next(told)
        return self

    def _decoded(self, path: str | Path, sampling: Sampling, seconds: float = BUDGET_SECONDS) -> Decoded:
        """As `video.decode`. Raises VideoError for a picture that is called a video too, and for a film called an image."""
        decoded = decode(path, sampling, seconds)
        told = next(decoded)
        assert isinstance(told, Asked)
        if told.still not in (None, self.still):
            called, what, right = ("video", "a single picture", "image") if told.still else ("image", "a film", "video")
            raise VideoError(f"{called} names {what} ({told.name}): give it as {right}.")
        yield told
        yield from decoded

    def _place(self, sampling: Sampling) -> Path | None:
        """Where its frames are kept; none for a file that isn't there, of which reading knows what to say."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        decides = [FORM, str(self.path.absolute()), found.st_size, found.st_mtime_ns, asdict(sampling)]
        name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        return Path(self.cache) / f"{int(name[:8], 16) % BUCKETS:02d}" / f"{name}.safetensors"


def _kept(place: Path) -> tuple[np.ndarray, float] | None:
    try:
        with safe_open(place, "numpy") as entry:
            frames, told = entry.get_tensor("frames"), entry.metadata()
    except (OSError, SafetensorError):
        return None
    return (frames, float(told["seconds"])) if zlib.crc32(frames.data) == int(told["crc32"]) else None


def _keep(place: Path, frames: np.ndarray, seconds: float, most: int) -> None:
    """Adds an entry where the bucket has room. A disk that is full, or no longer there, keeps nothing."""
    made = ""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if _held(place.parent) + frames.nbytes > most:
            return
        handle, made = tempfile.mkstemp(".unfinished", dir=place.parent)
        os.close(handle)
        save_file({"frames": frames}, made, {"seconds": repr(seconds), "crc32": str(zlib.crc32(frames.data))})
        os.replace(made, place)
    except (OSError, SafetensorError):
        with suppress(OSError):
            os.remove(made)


def _held(bucket: Path) -> int:
    """Bytes in a bucket, without what killed processes left, which is removed."""
    held = 0
    with os.scandir(bucket) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process finished or removed it
                found = entry.stat()
                if entry.name.endswith(".unfinished") and time.time() - found.st_mtime > LEFT_SECONDS:
                    os.remove(entry.path)
                else:
                    held += found.st_size
    return held
