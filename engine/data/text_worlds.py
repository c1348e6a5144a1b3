"""The worlds in words as samples. A sample is decided by (seed, index) alone. Knows no method and no model."""

from __future__ import annotations

from dataclasses import dataclass

from engine.data.samples import Sample
from engine.data.worlds import drawn
from engine.worlds import text


@dataclass(frozen=True)
class TextWorldsSource:
    """Problems made on the fly."""

    split: str = "train"
    families: tuple[str, ...] = text.FAMILIES
    difficulties: tuple[int, int] = (1, 6)  # fewest and most steps
    seed: int = 0
    ramp: int = 0  # samples over which the most steps grow from the fewest to their full number

    def record(self, index: int) -> text.TextRecord:
        return text.make(*drawn(self.families, self.difficulties, self.ramp, self.seed, index), self.split)

    def __call__(self, index: int) -> Sample:
        return sample(self.record(index))


def sample(record: text.TextRecord) -> Sample:
    kind = "numerical" if record.family == "arithmetic" else "free-form"
    return Sample(None, record.question, (), record.steps, record.answer, kind, "plain")


def texts(count: int = 3000) -> list[str]:
    """Everything written in these worlds, for the tokenizer's merges: training records only."""
    records = (TextWorldsSource().record(index) for index in range(count))
    return ["\n".join([record.question, *record.steps, f"### {record.answer}"]) for record in records]
