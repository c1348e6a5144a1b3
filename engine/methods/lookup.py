"""A warm-up in text alone: which letter stands before an option? A small model doesn't learn that on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.data.samples import Sample, context, ending, letter, option_lines
from engine.layout import Layout, Segment, Special, target
from engine.methods.outcome import Outcome, weighted


@dataclass(frozen=True)
class Lookup:
    """Options are named with their letters, as a chain names its last one: "so middle B"; `lines` of them, drawn with
    replacement, so that no letter follows from those that are taken.

    bare: the share of samples that show the option lines without the prompt around them; among few tokens the matching
    one is found sooner, and then among many.
    """

    bare: float = 0.5
    lines: int = 5

    def layout(self, sample: Sample, rng: np.random.Generator) -> Layout:
        lines = option_lines(sample.options)
        trunk = Segment("context", (lines, "\n")) if rng.random() < self.bare else context(sample)
        named = [f"so {sample.options[i]} {letter(i)}" for i in rng.integers(len(sample.options), size=self.lines)]
        return Layout(
            {"look": (trunk, target(Special("<think>"), "\n".join(named), Special("</think>")), ending(sample))}
        )

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted({"look": (1.0, out.branch("look").cross_entropy())})
