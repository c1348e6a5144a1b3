"""A video file -> resized RGB frames with their exact moments, or one clear sentence about why not.

engine/container.py lists the packets first. Moments are then chosen, and one of the readers in engine/decoders.py decodes the
frames shown at them.

Knows nothing of models: frames leave as uint8, and normalising or pairing them is the backbone's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import numpy as np

from engine.container import MAX_ASPECT, Source, VideoError, inspect
from engine.decoders import Broken, ahead, readers

MAX_RESULT_BYTES = 8 * 2**30  # of the frames handed back
BUDGET_SECONDS = 60.0  # for one file; frames decoded until then are kept

Decoded = Generator["Asked | tuple[str, int, np.ndarray]"]  # first what is asked of a file; then reader, index, picture


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip, and how large.

    `frames` takes exactly that many, at i * duration / frames. Otherwise `fps` takes the moments 0, 1/fps, 2/fps ...
    below the duration; a count outside min_frames..max_frames is held to that bound and spread evenly. With neither,
    max_frames are spread evenly, or fewer where the clip has fewer. Each moment gets the frame shown at it.
    `pixels` bounds one resized frame, whose sides are multiples of `factor`; `size` instead says (height, width) outright,
    or leaves frames as they are stored. Raises ValueError.
    """

    fps: float | None = 4.0
    frames: int | None = None
    min_frames: int = 4
    max_frames: int = 64
    pixels: int = 84 * 56
    factor: int = 28
    size: tuple[int, int] | Literal["stored"] | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "min_frames", "max_frames", "pixels", "factor"):
            value = getattr(self, name)
            if not ((isinstance(value, Integral) and int(value) >= 1) or (name == "frames" and value is None)):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if self.fps is not None and not (isinstance(self.fps, Real) and 1e-6 <= self.fps <= 1000):
            raise ValueError(f"fps must be a number above 0 and at most 1000, not {self.fps!r}.")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must not exceed max_frames ({self.max_frames}).")
        if self.pixels < self.factor**2:
            raise ValueError(f"pixels must be at least factor squared ({self.factor**2}), not {self.pixels}.")
        if (self.frames or self.max_frames) * self.pixels * 3 > MAX_RESULT_BYTES:
            raise ValueError("So many frames of so many pixels would fill the memory: ask for fewer of either.")

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames stored in this size get."""
        if self.size == "stored":
            return height, width
        return self.size or smart_size(height, width, self.factor, self.pixels)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one file, and how they were obtained. `asked` frames were wanted; fewer means `notices` says why."""

    frames: np.ndarray  # uint8 [frames, height, width, 3], RGB, upright, resized
    times: np.ndarray  # float64 [frames], seconds at which each of them starts, from the start of the file's first
    duration: float  # seconds, of the pictures that the file holds
    fps: float  # of the source, on average
    size: tuple[int, int]  # (width, height) of the source, upright
    reader: str
    asked: int
    notices: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    spacing: float | None = None  # seconds between two asked moments; None: as `times` has it

    @property
    def seconds_per_frame(self) -> float:
        """Seconds between two frames: what was asked for, where that is known; times follow it to within a frame."""
        if self.spacing is not None:
            return self.spacing
        return float(self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else self.duration


@dataclass(frozen=True)
class Asked:
    """What is asked of one file, and what it says of itself. In JSON's own types, so that a process can tell another."""

    name: str
    width: int  # upright
    height: int
    duration: float
    fps: float
    moments: tuple[float, ...]  # seconds, one an asked frame
    shown: tuple[int, ...]  # index of the frame shown at each, in the order of showing
    times: tuple[float, ...]  # seconds at which each of those starts
    spacing: float | None
    notices: tuple[str, ...]
    still: bool | None  # a picture rather than a film; None: either


def decode(path: str | Path, sampling: Sampling, seconds: float = BUDGET_SECONDS) -> Decoded:
    """What is asked of the file at `path`, then its pictures as they are stored, for `seconds` at most.

    Where a reader fails, the next one begins again. Raises VideoError.
    """
    deadline = time.monotonic() + seconds
    source = inspect(path, deadline, seconds)
    moments, spacing, notices = _moments(source, sampling)
    shown = np.searchsorted(source.times, moments + source.slack, side="right") - 1  # [asked] index of each frame
    yield Asked(
        source.path.name, source.width, source.height, source.duration, source.fps, tuple(moments.tolist()),
        tuple(shown.tolist()), tuple(source.times[shown].tolist()), spacing, source.notices + notices,
        source.still,
    )  # fmt: skip
    wanted = np.unique(shown).tolist()
    for name, reader in readers(source):
        count = 0
        try:
            for index, picture in ahead(reader(source, wanted), deadline):
                yield name, index, picture
                count += 1
        except Broken:
            pass
        if count == len(wanted) or time.monotonic() >= deadline:
            return


def read(
    path: str | Path,
    sampling: Sampling = Sampling(),
    seconds: float = BUDGET_SECONDS,
    decode: Callable[[str | Path, Sampling, float], Decoded] = decode,
) -> Clip:
    """Frames of the file at `path`, chosen by `sampling`. Frames decoded within `seconds` are kept.

    decode: who decodes; `engine.sandbox` has one for files of strangers.
    Raises VideoError, whose message is meant for users.
    """
    deadline = time.monotonic() + seconds
    with closing(decode(path, sampling, seconds)) as decoded:
        asked = next(decoded)
        assert isinstance(asked, Asked)
        height, width = sampling.fit(asked.height, asked.width)
        frames: dict[int, np.ndarray] = {}
        used = ""
        for name, index, picture in decoded:  # type: ignore[misc]
            if name != used:  # PyAV comes last and leaves damaged frames out, so its frames replace those of another
                frames, used = {}, name
            frames[index] = resize(picture[None], height, width)[0]

    late = time.monotonic() >= deadline
    if not frames:
        why = f"takes longer than {seconds:g} s to read" if late else "is damaged: none of it could be decoded"
        raise VideoError(f"{asked.name} {why}; give another file.")
    kept = np.isin(asked.shown, list(frames))  # [asked]
    notices = asked.notices
    if not kept.all():
        lost = np.array(asked.moments)[~kept]
        damage = f"the file is damaged between {lost[0]:.2f} s and {lost[-1]:.2f} s"
        why = f"reading was stopped after {seconds:g} s" if late else damage
        notices += (f"{kept.sum()} of the {len(kept)} frames asked for could be read: {why}.",)
    return Clip(
        np.stack([frames[index] for index in asked.shown if index in frames]), np.array(asked.times)[kept],
        asked.duration, asked.fps, (asked.width, asked.height), used, len(kept), notices, sampling, asked.spacing,
    )  # fmt: skip


def resize(frames: np.ndarray, height: int, width: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> np.ndarray:
    """uint8 [frames, H, W, 3] -> uint8 [frames, height, width, 3]: antialiased and rounded to uint8, as the image
    processors of transformers do it."""
    import torch
    import torch.nn.functional as F

    if frames.shape[1:3] == (height, width):
        return frames
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # [frames, 3, H, W]
    pictures = F.interpolate(pictures, (height, width), mode=mode, antialias=True)
    return np.ascontiguousarray(pictures.permute(0, 2, 3, 1).numpy())


def smart_size(height: int, width: int, factor: int, pixels: int) -> tuple[int, int]:
    """Qwen's smart_resize: (height, width) in multiples of `factor` with about the same shape, at least factor**2 and
    at most `pixels` pixels; only very long pictures get more, because no side goes below `factor`."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"A picture of {width} x {height} is too long: one side may be {MAX_ASPECT} times the other.")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > pixels:
        shrink = math.sqrt(height * width / pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < factor**2:
        grow = math.sqrt(factor**2 / (height * width))
        tall, wide = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return tall, wide


def _moments(source: Source, sampling: Sampling) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Moments to look at in seconds, the distance between two of them, and what the user should know about them."""
    duration, stored = source.duration, len(source.times)
    notices: tuple[str, ...] = ()
    if stored == 1:
        spacing = duration if sampling.fps is None else 1 / sampling.fps
        return np.zeros(1), spacing, ("A single picture is read, so nothing moves in it.",)
    if sampling.frames is not None:
        count = sampling.frames
        if count > stored:
            notices = (f"The clip has only {stored} frames, so some of the {count} asked for are repeats.",)
    elif sampling.fps is None:
        count = min(sampling.max_frames, stored)
    else:
        natural = max(1, math.ceil((duration - source.slack) * sampling.fps))
        count = min(max(natural, sampling.min_frames), sampling.max_frames)
        if count == natural:
            return np.arange(count) / sampling.fps, 1 / sampling.fps, ()
        asked = f"{sampling.fps:g} frames a second of a clip of {duration:.2f} s would be {natural}"
        notices = (f"{asked}; {count} spread evenly over it were taken instead.",)
    return np.arange(count) * (duration / count), duration / count, notices
