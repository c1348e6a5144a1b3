"""The controls that a gain is held against: the same data and steps, without what a latent method adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from engine.config import at_least
from engine.data.samples import Sample, chain, context, ending, solution
from engine.layout import Layout, Segment, marker, slots
from engine.methods.method import Method, Outcome, weighted


@dataclass(frozen=True)
class Explicit(Method):
    """The chain is written out, then the answer."""

    @property
    def silent(self) -> bool:
        return False

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        return Layout({"teacher": (context(sample), chain(sample), *solution(sample), ending(sample))})

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted({"teacher": (1.0, out.branch("teacher").cross_entropy())})


@dataclass(frozen=True)
class Silent(Method):
    """Answer loss only, after `pauses` slots: a filler control; with no slots, the answer-only control."""

    marks: ClassVar[tuple[str, ...]] = ("<ANS>",)

    pauses: int = 8

    def __post_init__(self) -> None:
        at_least(0, self, "pauses")

    @property
    def writes(self) -> bool:
        return False

    @property
    def slot_range(self) -> tuple[int, int]:
        return self.pauses, self.pauses

    def thinking(self, count: int) -> tuple[Segment, ...]:
        return (slots("<pause>", count),)

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        think = self.thinking(self.pauses)
        return Layout({"answer": (context(sample), *think, marker("<ANS>"), *solution(sample), ending(sample))})

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted({"answer": (1.0, out.branch("answer").cross_entropy())})
