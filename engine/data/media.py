"""Samples about a clip or images in files. Shared by the readers whose rows name one; none of them opens any."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config import ConfigError
from engine.data.files import FileSource
from engine.data.values import NoFile
from engine.footage import Footage
from engine.video import Sampling


@dataclass(frozen=True)
class MediaSource(FileSource):
    """cache: a folder that decoded frames are kept in, so that a later epoch needn't decode; full, it takes no more."""

    root: str = ""  # the folder that clips and images are looked for in (default: the file's)
    cache: str = ""
    cache_gigabytes: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache and not self.cache_gigabytes >= 1:
            raise ConfigError(f"cache_gigabytes: {self.cache_gigabytes:g} is too little: give at least 1, or no cache.")

    @property
    def folder(self) -> Path:
        return Path(self.root or self.path.parent)

    def footage(self, name: str, field: str, sampling: Sampling, still: bool) -> Footage:
        """Errors: NoFile for a file that isn't there, so that no run ends over it hours later."""
        path = self.folder / name
        if not self._there(path):
            raise NoFile(f"{field} names no file ({path})")
        return Footage(path, sampling, still, self.cache, int(self.cache_gigabytes * 1e9))

    def _there(self, path: Path) -> bool:
        """A folder is listed once: one question a file takes minutes for many of them on a network disk."""
        folder = str(path.parent)
        if folder not in self._listed:
            try:
                with os.scandir(folder) as entries:
                    self._listed[folder] = frozenset(entry.name for entry in entries if entry.is_file())
            except (OSError, ValueError):
                self._listed[folder] = frozenset()
        return path.name in self._listed[folder] or os.path.isfile(path)

    @cached_property
    def _listed(self) -> dict[str, frozenset[str]]:
        return {}


@dataclass(frozen=True)
class FilmedSource(MediaSource):
    """Errors: ConfigError for a sampling that there can't be."""

    fps: float = 2.0
    frames: tuple[int, int] = (4, 16)  # fewest and most
    pixels: int = 128 * 28 * 28  # most of one frame, after resizing

    @cached_property
    def sampling(self) -> Sampling:
        return sampled("fps, frames, pixels", self.fps, None, *self.frames, self.pixels)

    @property
    def looks(self) -> dict[str, Any]:
        """How clips are looked at, and how large images, for the folder of a model that was trained so."""
        return looked(self.fps, self.frames, self.pixels)


@dataclass(frozen=True)
class PicturedSource(MediaSource):
    pixels: int = 1024 * 28 * 28  # most of one image, after resizing; families that cut tiles have sizes of their own

    @property
    def looks(self) -> dict[str, Any]:
        """A clip, of which there is none here, would be looked at like the images, frame by frame."""
        return looked(FilmedSource.fps, FilmedSource.frames, self.pixels)

    def image(self, name: str, field: str) -> Footage:
        """Errors: NoFile."""
        return self.footage(name, field, sampled("pixels", pixels=self.pixels, frames=1), still=True)


def looked(fps: float, frames: tuple[int, int], pixels: int) -> dict[str, Any]:
    """Clips and images of one size, as a source's `looks`."""
    fewest, most = frames
    sampling = {"fps": fps, "min_frames": fewest, "max_frames": most, "pixels": pixels}
    return {"sampling": sampling, "image_pixels": pixels}


def sampled(settings: str, *given: float | None, **named: int) -> Sampling:
    """Errors: ConfigError."""
    try:
        return Sampling(*given, **named)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"{settings}: {error}") from None
