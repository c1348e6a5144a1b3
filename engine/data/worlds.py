"""The embedded worlds as samples. A sample is decided by (seed, index) alone. Knows no method and no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from engine import worlds
from engine.backbones.qwen2_5_vl import cut_patches
from engine.data.samples import Sample, letter
from engine.layout import Visual

FRAMES_PER_SECOND = 4.0
SIDE, MERGE, TEMPORAL = 14, 2, 2
HEIGHT, WIDTH = 56, 84

Corruption = Literal["none", "blind", "last", "single", "shuffled"]


@dataclass(frozen=True)
class WorldsSource:
    """Clips made on the fly, drawn straight at the model's size.

    corrupt: what the model is shown instead of the clip, for the baselines that prove the benchmark: nothing, the last
    frame, one frame at random, the frames in random order.
    sections: the chain as three named steps, as Heima reads it.
    """

    split: str = "train"
    families: tuple[str, ...] = worlds.FAMILIES
    difficulties: tuple[int, int] = (1, 6)  # fewest and most steps
    seed: int = 0
    corrupt: Corruption = "none"
    ramp: int = 0  # samples over which the most steps grow from the fewest to their full number
    sections: bool = False

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index])

    def record(self, index: int) -> worlds.Record:
        return worlds.make(*drawn(self.families, self.difficulties, self.ramp, self.seed, index), self.split)

    def __call__(self, index: int) -> Sample:
        record = self.record(index)
        clip = None if self.corrupt == "blind" else corrupted(visual(record), self.corrupt, self.rng(index))
        made = sample(record, clip)
        return sectioned(made) if self.sections else made


def drawn(
    families: tuple[str, ...], difficulties: tuple[int, int], ramp: int, seed: int, index: int
) -> tuple[str, int, int]:
    """Families in turn, difficulty uniform, the record's own seed = (the source's seed, index)."""
    low, high = difficulties
    if ramp:
        high = min(high, low + (high - low + 1) * index // ramp)
    difficulty = int(np.random.default_rng([seed, index]).integers(low, high + 1))
    return families[index % len(families)], difficulty, seed * 10_000_000 + index


def frame_times(record: worlds.Record) -> np.ndarray:
    """The moments that reach the model, seconds."""
    return np.arange(0, record.duration - 1e-9, 1 / FRAMES_PER_SECOND)


def visual(record: worlds.Record) -> Visual:
    frames = worlds.draw(record, frame_times(record), HEIGHT, WIDTH)
    return cut_patches(frames, 1 / FRAMES_PER_SECOND, SIDE, MERGE, TEMPORAL)


def corrupted(clip: Visual, how: Corruption, rng: np.random.Generator) -> Visual:
    """What a baseline is shown in place of the clip. Slices (pairs of frames) are the unit, as the model reads them."""
    if how == "none":
        return clip
    slices = clip.patches.reshape(clip.grid[0], -1, clip.patches.shape[1])
    order = {
        "last": np.array([len(slices) - 1]),
        "single": rng.integers(len(slices), size=1),
        "shuffled": rng.permutation(len(slices)),
    }[how]
    kept = slices[order]
    return replace(clip, patches=kept.flatten(0, 1), grid=(len(kept), *clip.grid[1:]))


def sample(record: worlds.Record, clip: Visual | None) -> Sample:
    steps = tuple(step.text for step in record.steps)
    return Sample(clip, record.question, record.options, steps, record.letter)


def sectioned(whole: Sample) -> Sample:
    """The same chain in three sections: how the clip starts, what happens, and the line that names the option."""
    start, *events, option = whole.steps
    return replace(whole, steps=(start, "\n".join(events), option), sections=("SUMMARY", "CAPTION", "REASONING"))


def texts(count: int = 3000) -> list[str]:
    """Everything written in the worlds, for the tokenizer's merges: training records only."""
    from engine.data.samples import user_turn

    lines = []
    for index in range(count):
        record = WorldsSource().record(index)
        turn = "".join(piece for piece in user_turn(record.question, record.options) if isinstance(piece, str))
        chain = "\n".join(step.text for step in record.steps)
        lines.append(f"system\nYou are a helpful assistant\nuser\n{turn}\nassistant\n{chain}\n{letter(index % 6)}")
    return lines
