"""Heima: each section of a chain becomes one thinking token, which the model predicts and reads like any other token.

<SUMMARY> <THINKING_OF_SUMMARY> </SUMMARY> .. <CONCLUSION> answer </CONCLUSION>

Progressive distillation is a sequence of runs: `compressed` = 1, 2, .. sections, each from the adapter of the one before,
then a recovering run on the data of the last at a lower learning rate. A sample with fewer sections has all of them
compressed sooner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.backbones.base import SPECIAL_TOKENS
from engine.data.samples import Sample, context, ending
from engine.layout import Layout, Segment, Special, target
from engine.methods.method import Method, Outcome, weighted

CONCLUSION = "CONCLUSION"


@dataclass(frozen=True)
class Heima(Method):
    compressed: int = (
        3  # how many sections, from the first, are thinking tokens; 0: the plain chain, section by section
    )
    per_section: int = 1  # thinking tokens a section
    sections: tuple[str, ...] = ("SUMMARY", "CAPTION", "REASONING")  # every name that the data has

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*SPECIAL_TOKENS, *(thinking_token(name) for name in self.sections))

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        return Layout({"answer": (context(sample), *self.sectioned(sample), ending(sample))})

    def sectioned(self, sample: Sample) -> list[Segment]:
        """The sections with their tags, then the conclusion. A thinking token's segment is named by its section.

        Errors: ValueError for a sample whose steps aren't named, or a section that isn't among `sections`.
        """
        if len(sample.sections) != len(sample.steps) or not set(sample.sections) <= set(self.sections):
            raise ValueError(
                f"Heima needs chains in the sections {', '.join(self.sections)}; this sample has "
                f"{', '.join(sample.sections) or 'unnamed steps'}."
            )
        parts: list[Segment] = []
        text = ""
        for index, (name, step) in enumerate(zip(sample.sections, sample.steps, strict=True)):
            if index < self.compressed:
                opened = target(f"{text}<{name}> ")
                parts += [opened, target(*(Special(thinking_token(name)),) * self.per_section, name=name)]
                text = f" </{name}>\n\n"
            else:
                text += f"<{name}> {step} </{name}>\n\n"
        parts += [target(f"{text}<{CONCLUSION}>"), target(f" {sample.answer}", name="answer")]
        return [*parts, target(f" </{CONCLUSION}>")]

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted({"answer": (1.0, out.branch("answer").cross_entropy("tokens"))})


def thinking_token(section: str) -> str:
    return f"<THINKING_OF_{section}>"
