"""The worlds in words as samples. A sample is decided by (seed, index) alone. Knows no method and no model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

from engine.config import ConfigError, at_least
from engine.data.samples import Sample
from engine.data.worlds import drawn
from engine.worlds import text


@dataclass(frozen=True)
class TextWorldsSource:
    """Problems made on the fly. Errors: ConfigError for a world, a split, a number of steps or a seed that there isn't."""

    split: str = "train"
    families: tuple[str, ...] = text.FAMILIES
    difficulties: tuple[int, int] = (1, 6)  # fewest and most steps
    seed: int = 0
    ramp: int = 0  # samples over which the most steps grow from the fewest to their full number, in training

    def __post_init__(self) -> None:
        fewest, most = self.difficulties
        if self.seed < 0:
            raise ConfigError(f"text_worlds: a seed is a whole number from 0, not {self.seed}.")
        at_least(0, self, "ramp", where="text_worlds: ")
        if not self.families or fewest > most:
            raise ConfigError("text_worlds: name a world, and of two numbers of steps the fewer first.")
        try:
            for family, steps in product(self.families, self.difficulties):
                text.make(family, steps, 0, self.split)
        except ValueError as error:
            raise ConfigError(f"text_worlds: {error}") from None

    @property
    def looks(self) -> dict[str, Any]:
        """There is nothing to look at."""
        return {}

    def record(self, index: int) -> text.TextRecord:
        ramp = self.ramp if self.split == "train" else 0
        return text.make(*drawn(self.families, self.difficulties, ramp, self.seed, index), self.split)

    def __call__(self, index: int) -> Sample:
        return sample(self.record(index))


def sample(record: text.TextRecord) -> Sample:
    kind = "numerical" if record.family == "arithmetic" else "free-form"
    return Sample(None, record.question, (), record.steps, record.answer, kind, "plain")


def texts(count: int = 3000) -> list[str]:
    """Everything written in these worlds, for the tokenizer's merges: training records only."""
    records = (TextWorldsSource().record(index) for index in range(count))
    return ["\n".join([record.question, *record.steps, f"### {record.answer}"]) for record in records]


def phrases() -> list[str]:
    """What the worlds say word for word, a sentence with the space before it, and the names, words and numbers between."""
    told = [sentence for scene in text.SCENES for sentence in scene.sentences]
    told += [*text.COMPARED.values(), text.ASKED]
    parts = [part for sentence in told for part in re.split(r"\{\w+\}", f" {sentence}")]
    parts += [
        *(scene.opening.partition("{")[0] for scene in text.SCENES),
        "Every ",
        ". Every ",
        " is a ",
        " a ",
        " or a ",
    ]
    parts += [*text.TIMES.values(), *text.PARTS.values(), *text.THINGS, *text.NAMES, *text.NOUNS]
    numbers = map(str, range(10, text.LARGEST + 1))  # whole, as in GPT-2's and Llama 3's vocabularies
    return [*dict.fromkeys(part for part in parts if re.search("[a-z]", part)), *numbers]
