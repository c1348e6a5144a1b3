"""Video-R1's format as samples: a JSON list of {problem, options, problem_type, data_type, path, process, solution}."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.data.files import BadRow, Entry, FileSource, json_rows, said, text
from engine.data.samples import TYPE_HINTS, Sample
from engine.generate import ANSWER, THOUGHTS
from engine.layout import Frames
from engine.video import Sampling, read


@dataclass(frozen=True)
class Filmed:
    """A sample that waits for its clip or image."""

    sample: Sample
    path: Path
    still: bool


@dataclass(frozen=True)
class VideoR1Source(FileSource[Filmed]):
    """`file` is Video-R1-COT-165k.json."""

    held_out: int = 256
    root: str = ""  # the folder that its paths start from (default: the file's)
    fps: float = 2.0
    frames: tuple[int, int] = (4, 16)
    pixels: int = 128 * 28 * 28

    def entries(self, path: Path) -> list[Entry]:
        return json_rows(path)

    def parse(self, raw: Any) -> Filmed:
        kind, data, name = (text(raw, key) for key in ("problem_type", "data_type", "path"))
        path = Path(self.root or Path(self.file).parent) / name
        if kind not in TYPE_HINTS:
            raise BadRow(f"unknown problem_type {kind!r}")
        if data not in ("image", "video"):
            raise BadRow(f"data_type must be image or video, not {data!r:.40}")
        if not path.is_file():
            raise BadRow(f"path names no file ({path})")
        given = raw.get("options") or []
        if not isinstance(given, list) or (kind == "multiple choice" and not 2 <= len(given) <= 26):
            raise BadRow(f"options must be a list, of 2 to 26 for a multiple choice, not {given!r:.40}")
        told = [(said(each, f"options[{place}]"), f"options[{place}]") for place, each in enumerate(given)]
        options = [said(re.sub(r"^[A-Z][.:)]\s*", "", each), name) for each, name in told]
        thoughts, answer = between(THOUGHTS, raw, "process", "think"), between(ANSWER, raw, "solution", "answer")
        steps = self.needed((thoughts,) if thoughts else (), "process")
        sample = Sample(None, text(raw, "problem"), tuple(options), steps, said(answer, "solution"), kind)
        return Filmed(sample, path, data == "image")

    def sample(self, row: Filmed) -> Sample:
        """Errors: VideoError for a clip that can't be read."""
        sampling = Sampling(self.fps, min_frames=self.frames[0], max_frames=self.frames[1], pixels=self.pixels)
        clip = read(row.path, sampling)
        return replace(row.sample, visual=Frames(clip.frames, clip.seconds_per_frame, row.still))


def between(tags: re.Pattern[str], raw: Any, name: str, tag: str) -> str:
    """What stands between a field's tags, and nothing may stand outside. Errors: BadRow."""
    found = tags.fullmatch(text(raw, name))
    if not found:
        raise BadRow(f"{name} must be <{tag}>...</{tag}>, not {raw[name]!r:.40}")
    return found[1]
