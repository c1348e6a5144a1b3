"""CODI: one model is teacher (the chain written out) and student (a fixed number of projected thoughts) at once.

teacher: question, chain, answer        student: question <|start-latent|> z_0 .. z_{n-1} <|end-latent|> answer

z_0 = projector(state at <|start-latent|>), z_{i+1} = projector(state at z_i). The student's states where the answer's
first token is predicted are drawn to the teacher's, in every layer. Positions and visibility are each sample's own, so
that a result depends on no neighbour (the published code's latents attend to padding).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from engine.backbones.base import SPECIAL_TOKENS, Backbone
from engine.config import at_least
from engine.data.samples import Sample, chain, context, ending, solution
from engine.latents import Feedback
from engine.layout import Layout, Reading, Segment
from engine.methods.coconut import LATENT, START, STOP, thinking
from engine.methods.method import Method, Outcome, weighted
from engine.methods.steps import DECODER, StepSupervision
from engine.objectives import position_distance

PROJECTOR = "projector"
PROMPT = "The answer is:"
JOINTS = {  # what stands behind the question, between two steps, and behind the last
    "lines": ("\n", "\n", "\n"),
    "icot": ("", " ", ""),
    "icot-full": ("", " ", "\n"),
    "commonsense": ("\n", " ", "\n"),
}


@dataclass(frozen=True)
class Codi(Method):
    """
    text: how plain text is joined. lines: a line break behind the question and each step, as Coconut's. Others as CODI joins the
    data of that name: icot = GSM8k-Aug, no line breaks, and a space between two steps; icot-full = GSM8k-Aug-NL, the same with
    a line break behind the chain; commonsense = CommonsenseQA and StrategyQA, and with one behind the question too.
    last_step: the teacher writes it too; the published recipes leave it out, since it says the answer.
    answer_token: the states are drawn together where this token of the answer is predicted, 0 being its first; 1 where a
    tokenizer writes the space before a number apart, as published for Llama and Qwen.
    """

    tokens: ClassVar[tuple[str, ...]] = (*SPECIAL_TOKENS, START, LATENT, STOP)

    text: Literal["lines", "icot", "icot-full", "commonsense"] = "lines"
    num_latent: int = 6
    prj_dim: int = 768
    prj_dropout: float = 0.0
    distill_factor: float = 1.0
    ref_factor: float = 1.0
    last_step: bool = True
    answer_token: int = 0
    steps: StepSupervision | None = None  # SIM-CoT; its published form here: tokens, ignore, first_position 0

    def __post_init__(self) -> None:
        at_least(1, self, "num_latent", "prj_dim")
        at_least(0, self, "prj_dropout", "distill_factor", "ref_factor", "answer_token")

    @property
    def slot_range(self) -> tuple[int, int]:
        return self.num_latent, self.num_latent

    @property
    def supervision(self) -> StepSupervision | None:
        return self.steps

    def context(self, sample: Sample) -> Segment:
        return context(sample, JOINTS[self.text][0])

    def thinking(self, count: int) -> tuple[Segment, ...]:
        return thinking(count)

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        written = sample if self.last_step else replace(sample, steps=sample.steps[:-1])
        _, between, behind = JOINTS[self.text]
        trunk, think, answered = self.context(sample), thinking(self.num_latent), solution(sample, PROMPT)
        readings: tuple[Reading, ...] = ()
        if self.steps:  # z_n too, which is never fed
            groups = [[(think[1], i - 1)] for i in range(self.num_latent + 1)]
            steps, joint = sample.steps, between
            # The published decoder reads the chain's own tokens, in which the space begins the next step.
            if between == " ":
                steps, joint = (*steps[:1], *(f" {step}" for step in steps[1:])), ""
            readings = self.steps.readings(groups, steps, sample.answer, rng, joint)
        branches = {
            "answer": (trunk, *think, *answered, ending(sample)),
            "teacher": (trunk, chain(written, 0, between, behind), *answered, ending(sample)),
        }
        return Layout(branches, readings=readings)

    def companions(self, backbone: Backbone) -> nn.ModuleDict:
        made: dict[str, nn.Module] = {
            PROJECTOR: projector(backbone.text_config.hidden_size, self.prj_dim, self.prj_dropout)
        }
        if self.steps:
            made[DECODER] = self.steps.decoder(backbone)
        return nn.ModuleDict(made)

    def feedback(self, companions: nn.ModuleDict) -> Feedback:
        return companions[PROJECTOR]

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = out.branch("answer"), out.branch("teacher")
        states = [branch.before("answer", self.answer_token) for branch in (student, teacher)]
        terms = {
            "answer": (1.0, student.cross_entropy("tokens")),
            "distil": (self.distill_factor, position_distance(*states)),
            "teacher": (self.ref_factor, teacher.cross_entropy("tokens")),
        }
        if self.steps:
            terms["steps"] = (self.steps.weight, self.steps.loss(out, out.companions[PROJECTOR]))
        return weighted(terms)


def projector(dim: int, inner: int, dropout: float) -> nn.Module:
    """Hidden state -> input embedding [.., dim]."""
    return nn.Sequential(
        OrderedDict(
            dropout=nn.Dropout(dropout),
            up=nn.Linear(dim, inner),
            gelu=nn.GELU(),
            down=nn.Linear(inner, dim),
            norm=nn.LayerNorm(dim),
        )
    )
