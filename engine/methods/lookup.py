"""A warm-up in text alone: which letter stands before an option? A small model doesn't learn that on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ConfigError, at_least
from engine.data.samples import Sample, context, ending, hint, letter, option_lines, solution
from engine.layout import Layout, Segment, Special, marker, slots, target
from engine.methods.method import Method, Outcome, weighted


@dataclass(frozen=True)
class Lookup(Method):
    """Options are named with their letters, as a chain names its last one: "so middle B"; `lines` of them, drawn with
    replacement, so that no letter follows from those that are taken. Then each of them again in silence: a chain that
    has come to "ball middle", the slots, and the letter as the answer.

    Errors: ConfigError for a sample without options, or whose chain has no step before the one that names the letter.

    bare: the share of samples that show the option lines without the prompt around them; among few tokens the matching
    one is found sooner, and then among many.
    """

    bare: float = 0.5
    lines: int = 5
    pauses: int = 8

    def __post_init__(self) -> None:
        at_least(1, self, "lines")
        at_least(0, self, "pauses")
        if not 0 <= self.bare <= 1:
            raise ConfigError(f"bare is {self.bare}: it is a share, from 0 to 1.")

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        if not sample.options:
            raise ConfigError("The look-up needs questions with options, as the worlds have them.")
        if len(sample.steps) < 2:
            raise ConfigError("The look-up needs chains of two steps or more, whose last one names the letter.")
        lines = option_lines(sample.options)
        trunk = Segment("context", (lines, "\n")) if rng.random() < self.bare else context(sample)
        drawn = rng.integers(len(sample.options), size=self.lines).tolist()
        named = [f"so {sample.options[i]} {letter(i)}" for i in drawn]
        written = target(Special("<think>"), "\n".join(named), Special("</think>"))
        branches: dict[str, tuple[Segment, ...]] = {"look": (trunk, written, ending(sample))}
        state = sample.steps[-2].rpartition(" ")[0]
        for place, i in enumerate(drawn):
            told = hint(f"{state} {sample.options[i]}")
            think = slots("<pause>", self.pauses)
            answered = solution(Sample(None, "", (), (), letter(i)))
            branches[f"silent{place}"] = (trunk, told, think, marker("<ANS>"), *answered, ending(sample))
        return Layout(branches)

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        silent = torch.stack([out.branch(f"silent{place}").cross_entropy() for place in range(self.lines)]).mean()
        return weighted({"look": (1.0, out.branch("look").cross_entropy()), "silent": (1.0, silent)})
