"""Video-R1's format as samples: a JSON list of {problem, options, problem_type, data_type, path, process, solution}."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.backbones.qwen2_5_vl import cut_patches
from engine.config import ConfigError
from engine.data.samples import TYPE_HINTS, Sample
from engine.data.worlds import MERGE, SIDE, TEMPORAL
from engine.generate import ANSWER, THOUGHTS
from engine.video import Sampling, read

KEYS = ("problem", "problem_type", "data_type", "path", "process", "solution")


@dataclass(frozen=True)
class VideoR1Source:
    """A sample is decided by (seed, index): each epoch is one shuffled round through the file, less what is held out."""

    file: str = ""  # Video-R1-COT-165k.json
    root: str = ""  # the folder that its paths start from (default: the file's)
    seed: int = 0
    held_out: int = 256  # samples at the file's end, for validation
    split: str = "train"
    fps: float = 2.0
    frames: tuple[int, int] = (4, 16)
    pixels: int = 128 * 28 * 28

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Errors: ConfigError naming the file and the first row that can't be used."""
        try:
            rows = json.loads(Path(self.file).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"Can't read {self.file or 'the data (set video_r1.file)'}: {error}.") from None
        if not isinstance(rows, list) or len(rows) <= self.held_out:
            raise ConfigError(f"{self.file} must be a JSON list of more than {self.held_out} samples (held_out).")
        for number, row in enumerate(rows):
            missing = [key for key in KEYS if key not in row]
            if missing:
                raise ConfigError(f"{self.file}, sample {number}: {', '.join(missing)} missing.")
            if row["problem_type"] not in TYPE_HINTS:
                raise ConfigError(f"{self.file}, sample {number}: unknown problem_type {row['problem_type']!r}.")
        return rows[-self.held_out :] if self.split == "validation" else rows[: len(rows) - self.held_out]

    def __call__(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self.rows))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)) if self.split == "train" else None
        return self.sample(self.rows[place if order is None else int(order[place])])

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
