"""The embedded worlds as samples. A sample is decided by (seed, index) alone. Knows no method and no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from engine import worlds
from engine.config import ConfigError, at_least
from engine.data.samples import SYSTEM, TYPE_HINTS, Sample, letter, user_turn
from engine.layout import Frames
from engine.worlds import tally
from engine.worlds.record import LONGEST

FRAMES_PER_SECOND = 4.0
HEIGHT, WIDTH = 56, 84

Corruption = Literal["none", "blind", "last", "single", "shuffled", "told"]
WITHOUT_CLIP = ("blind", "told")  # text alone


@dataclass(frozen=True)
class WorldsSource:
    """Clips made on the fly, drawn straight at the model's size.

    corrupt: what the model is shown instead of the clip, for the baselines that prove the benchmark: nothing, the last
    frame, one frame at random, the frames in random order; or it is told what happens, and shown nothing.
    sections: the chain as three named steps, as Heima reads it.
    Errors: ConfigError for a world, a split, a number of steps or a seed that there isn't.
    """

    split: str = "train"
    families: tuple[str, ...] = worlds.FAMILIES
    difficulties: tuple[int, int] = (1, 6)  # fewest and most steps
    seed: int = 0
    corrupt: Corruption = "none"
    ramp: int = 0  # samples over which the most steps grow from the fewest to their full number, in training
    digits_ramp: int = 0  # samples over which tally's digits grow from 0 and 1 to all ten, in training
    colours_ramp: int = 0  # and its orange ones from a tenth to a half
    sections: bool = False

    def __post_init__(self) -> None:
        """No clip is made for it: the first of tally's takes seconds."""
        fewest, most = self.difficulties
        if not self.families or not 1 <= fewest <= most <= LONGEST:
            raise ConfigError(f"worlds: name a world, and the fewest and the most steps, from 1 to {LONGEST}.")
        if strange := [family for family in self.families if family not in worlds.FAMILIES]:
            raise ConfigError(f"worlds: there is no world {strange[0]!r}; choose among {', '.join(worlds.FAMILIES)}.")
        if self.split not in worlds.SPLITS:
            raise ConfigError(f"worlds: there is no split {self.split!r}; choose one of {', '.join(worlds.SPLITS)}.")
        if self.seed < 0:
            raise ConfigError(f"worlds: a seed is a whole number from 0, not {self.seed}.")
        at_least(0, self, "ramp", "digits_ramp", "colours_ramp", where="worlds: ")

    @property
    def looks(self) -> dict[str, Any]:
        """How clips are looked at, for the folder of a model that was trained so."""
        pixels = HEIGHT * WIDTH
        return {"sampling": {"fps": FRAMES_PER_SECOND, "min_frames": 4, "max_frames": 64, "pixels": pixels}}

    def record(self, index: int) -> worlds.Record:
        training = self.split == "train"
        family, steps, seed = drawn(self.families, self.difficulties, self.ramp if training else 0, self.seed, index)
        practice = practice_at(self.digits_ramp, self.colours_ramp, self.seed, index) if training else tally.WHOLE
        return worlds.make(family, steps, seed, self.split, practice)

    def __call__(self, index: int) -> Sample:
        record = self.record(index)
        rng = np.random.default_rng([self.seed, index, 2])  # the number of steps has been drawn with [seed, index]
        made = shown(record, self.corrupt, rng)
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


def practice_at(digits_ramp: int, colours_ramp: int, seed: int, index: int) -> tally.Practice:
    """Tally's digits grow one at a time from 0 and 1, orange from a tenth to a half. Of ten clips three keep to fewer digits, lest
    they be forgotten, and two have all digits or even colours from the start on, so that they can be read."""
    digits, orange = 10, 0.5
    if digits_ramp:
        most = min(10, 2 + 9 * index // digits_ramp)
        share = np.random.default_rng([seed, index, 3]).random()
        digits = 10 if share < 0.2 else 2 + int((share - 0.2) / 0.3 * (most - 1)) if share < 0.5 else most
    if colours_ramp and np.random.default_rng([seed, index, 4]).random() >= 0.2:
        orange = min(0.5, 0.1 + 0.4 * index / colours_ramp)
    return tally.Practice(digits, orange)


def frame_times(record: worlds.Record) -> np.ndarray:
    """The moments that reach the model, seconds."""
    return np.arange(0, record.duration - 1e-9, 1 / FRAMES_PER_SECOND)


def frames(record: worlds.Record) -> Frames:
    return Frames(worlds.draw(record, frame_times(record), HEIGHT, WIDTH), 1 / FRAMES_PER_SECOND)


def shown(record: worlds.Record, how: Corruption, rng: np.random.Generator) -> Sample:
    """A record with what a model is shown of it: its clip, what stands in its place, or nothing, which isn't drawn at all."""
    made = sample(record, None if how in WITHOUT_CLIP else corrupted(frames(record), how, rng))
    return replace(made, question=f"{told(record)}\n{made.question}") if how == "told" else made


def corrupted(clip: Frames, how: Corruption, rng: np.random.Generator) -> Frames:
    """What a baseline is shown in place of the clip."""
    if how == "none":
        return clip
    count = len(clip.pixels)
    kept = {"last": np.array([count - 1]), "single": rng.integers(count, size=1), "shuffled": rng.permutation(count)}
    return replace(clip, pixels=clip.pixels[kept[how]])


def sample(record: worlds.Record, clip: Frames | None) -> Sample:
    steps = tuple(step.text for step in record.steps)
    return Sample(clip, record.question, record.options, steps, record.letter)


def told(record: worlds.Record) -> str:
    """How a clip starts and what happens in it, in the words of the chain, without what comes of it."""
    start, *events, _ = (step.text for step in record.steps)
    happens = [event.rpartition(" is ")[0] or event.rpartition(", ")[0] for event in events]
    return "\n".join((start, *happens))


def sectioned(whole: Sample) -> Sample:
    """The same chain in three sections: how the clip starts, what happens, and the line that names the option."""
    start, *events, option = whole.steps
    return replace(whole, steps=(start, "\n".join(events), option), sections=("SUMMARY", "CAPTION", "REASONING"))


def phrases() -> list[str]:
    """What every prompt about the worlds repeats."""
    questions = {WorldsSource().record(index).question for index in range(len(worlds.FAMILIES))}
    return [f"system\n{SYSTEM}", f"{TYPE_HINTS['multiple choice']} within the ", *sorted(questions)]


def texts(count: int = 3000) -> list[str]:
    """Everything written in the worlds, for the tokenizer's merges: training records only."""
    lines = []
    for index in range(count):
        record = WorldsSource().record(index)
        turn = "".join(piece for piece in user_turn(record.question, record.options) if isinstance(piece, str))
        chain = "\n".join(step.text for step in record.steps)
        lines.append(f"system\n{SYSTEM}\nuser\n{turn}\nassistant\n{chain}\n{letter(index % 6)}")
    return lines
