"""Video-R1's format as samples: a JSON list of {problem, options, problem_type, data_type, path, process, solution}."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backbones.qwen2_5_vl import cut_patches
from engine.data.files import BadRow, Entry, FileSource, json_rows
from engine.data.samples import TYPE_HINTS, Sample
from engine.data.worlds import MERGE, SIDE, TEMPORAL
from engine.generate import ANSWER, THOUGHTS
from engine.video import Sampling, read

KEYS = ("problem", "problem_type", "data_type", "path", "process", "solution")


@dataclass(frozen=True)
class VideoR1Source(FileSource[dict[str, Any]]):
    """`file` is Video-R1-COT-165k.json."""

    held_out: int = 256
    root: str = ""  # the folder that its paths start from (default: the file's)
    fps: float = 2.0
    frames: tuple[int, int] = (4, 16)
    pixels: int = 128 * 28 * 28

    def entries(self, path: Path) -> list[Entry]:
        return json_rows(path)

    def parse(self, raw: Any) -> dict[str, Any]:
        missing = [key for key in KEYS if not isinstance(raw, dict) or key not in raw]
        if missing:
            raise BadRow(f"{', '.join(missing)} missing")
        if raw["problem_type"] not in TYPE_HINTS:
            raise BadRow(f"unknown problem_type {raw['problem_type']!r}")
        return raw

    def sample(self, row: dict[str, Any]) -> Sample:
        path = Path(self.root or Path(self.file).parent) / row["path"]
        sampling = Sampling(self.fps, min_frames=self.frames[0], max_frames=self.frames[1], pixels=self.pixels)
        clip = read(path, sampling)
        still = row["data_type"] == "image"
        visual = cut_patches(clip.frames, clip.seconds_per_frame, SIDE, MERGE, TEMPORAL, still)
        options = tuple(re.sub(r"^[A-Z][.:)]\s*", "", option) for option in row.get("options") or ())
        thoughts, answer = THOUGHTS.search(row["process"]), ANSWER.search(row["solution"])
        return Sample(
            visual, row["problem"], options, (thoughts[1] if thoughts else row["process"],),
            answer[1] if answer else row["solution"], row["problem_type"],
        )  # fmt: skip
