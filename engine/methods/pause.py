"""Implicit-Video-Reasoning: pauses taught by a written chain. Knows nothing of backbones, batches or devices.

Three branches behind one video and question: `speak` says the thoughts from the pauses alone (it sees neither video nor
question), `answer` answers silently after the pauses, `teacher` writes the chain and the answer. The states that predict
the answer in `answer` are drawn to those in `teacher`:

    total = 0.5 decode + 0.5 answer + teacher + 10 distil

A mode keeps some of the branches: student = the first two, teacher = the last, silent = `answer` alone, which with
`steps` is SIM-CoT on pauses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from engine.backbones.base import Backbone
from engine.config import ConfigError, at_least
from engine.data.samples import Sample, chain, context, ending, solution
from engine.layout import Layout, Reading, Segment, marker, slots
from engine.methods.method import Method, Outcome, weighted
from engine.methods.steps import DECODER, StepSupervision
from engine.objectives import hidden_distance

Mode = Literal["distilling", "student", "silent", "teacher"]
BRANCHES: dict[Mode, tuple[str, ...]] = {
    "distilling": ("speak", "answer", "teacher"),
    "student": ("speak", "answer"),
    "silent": ("answer",),
    "teacher": ("teacher",),
}


@dataclass(frozen=True)
class PauseDistillation(Method):
    marks: ClassVar[tuple[str, ...]] = ("<ANS>",)

    mode: Mode = "distilling"
    pauses: tuple[int, int] = (8, 8)  # fewest and most; drawn per sample, so that one model serves a range
    decode: float = 0.5
    answer: float = 0.5
    teacher: float = 1.0
    distil: float = 10.0
    form: Literal["paper", "coded"] = "paper"
    steps: StepSupervision | None = None  # SIM-CoT: each pause must say its own step
    compat: bool = False  # the published trainer's fault: plain 1-D positions in the decoder pass

    def __post_init__(self) -> None:
        if not 0 <= self.pauses[0] <= self.pauses[1]:
            raise ConfigError(f"pauses {list(self.pauses)}: write the fewest and the most, from 0.")
        at_least(0, self, "decode", "answer", "teacher", "distil")

    @classmethod
    def as_published(cls) -> PauseDistillation:
        """What the released code computes, faults included."""
        return cls(form="coded", compat=True)

    @property
    def silent(self) -> bool:
        return "answer" in BRANCHES[self.mode]

    @property
    def writes(self) -> bool:
        return "teacher" in BRANCHES[self.mode]

    @property
    def speaks(self) -> bool:
        return "speak" in BRANCHES[self.mode]

    @property
    def slot_range(self) -> tuple[int, int]:
        return self.pauses

    @property
    def supervision(self) -> StepSupervision | None:
        return self.steps

    def thinking(self, count: int) -> tuple[Segment, ...]:
        return (slots("<pause>", count),)

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        trunk = context(sample)
        think = slots("<pause>", int(rng.integers(self.pauses[0], self.pauses[1] + 1)))
        branches: dict[str, tuple[Segment, ...]] = {
            "speak": (trunk, think, marker("<COT>", sees=(think,)), chain(sample), ending(sample)),
            "answer": (trunk, think, marker("<ANS>"), *solution(sample), ending(sample)),
            "teacher": (trunk, chain(sample), *solution(sample), ending(sample)),
        }
        kept = {name: branches[name] for name in BRANCHES[self.mode]}
        readings: tuple[Reading, ...] = ()
        if self.steps and self.mode != "teacher":
            groups = [[(think, place)] for place in range(len(think.pieces))]
            readings = self.steps.readings(groups, sample.steps, sample.answer, rng)
        return Layout(kept, frozenset({"speak"} & kept.keys() if self.compat else ()), readings)

    def companions(self, backbone: Backbone) -> nn.ModuleDict:
        return nn.ModuleDict({DECODER: self.steps.decoder(backbone)} if self.steps else {})

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        kept = BRANCHES[self.mode]
        weights = {
            "speak": ("decode", self.decode),
            "answer": ("answer", self.answer),
            "teacher": ("teacher", self.teacher),
        }
        terms = {
            term: (weight, out.branch(name).cross_entropy()) for name, (term, weight) in weights.items() if name in kept
        }
        if self.mode == "distilling":
            student, sample = out.branch("answer").predicting("answer")
            teacher, _ = out.branch("teacher").predicting("answer")
            terms["distil"] = (self.distil, hidden_distance(student, teacher, sample, len(out.packed.ids), self.form))
        if self.steps and self.mode != "teacher":
            terms["steps"] = (self.steps.weight, self.steps.loss(out))
        return weighted(terms)
