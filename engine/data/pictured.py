"""Samples about an image file, which is opened only when its turn comes. Shared by the readers of image data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine.data.files import BadRow, FileSource
from engine.data.samples import Sample
from engine.layout import Frames
from engine.video import Sampling, read


@dataclass(frozen=True)
class Pictured:
    """A sample that waits for its image."""

    sample: Sample
    image: Path


@dataclass(frozen=True)
class PicturedSource(FileSource[Pictured]):
    root: str = ""  # the folder that images are looked for in (default: the file's)
    pixels: int = 1024 * 28 * 28  # most of one image, after resizing

    @property
    def folder(self) -> Path:
        return Path(self.root or Path(self.file).parent)

    def image(self, name: str, field: str) -> Path:
        """Errors: BadRow for a file that isn't there, so that no run ends over it hours later."""
        path = self.folder / name
        if not path.is_file():
            raise BadRow(f"{field} names no file ({path})")
        return path

    def sample(self, row: Pictured) -> Sample:
        """Errors: VideoError for an image that can't be read."""
        clip = read(row.image, Sampling(pixels=self.pixels))
        return replace(row.sample, visual=Frames(clip.frames, clip.seconds_per_frame, still=True))
