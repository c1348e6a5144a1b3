"""Coconut, and Multimodal CoCoNuT: a curriculum replaces the chain's first steps by thoughts that are fed back.

question <|start-latent|> <|latent|> x n <|end-latent|> remaining steps, answer

A latent's input is the last hidden state one position before it. Knows nothing of backbones, batches or devices: over a
clip it is Multimodal CoCoNuT, over text it is Coconut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from engine import curriculum
from engine.backbones.base import SPECIAL_TOKENS, Backbone
from engine.config import ConfigError, at_least
from engine.curriculum import Replaced
from engine.data.samples import Sample, chain, context, ending, solution
from engine.layout import Layout, Reading, Segment, latents, marker, slots
from engine.methods.method import Method, Outcome, weighted
from engine.methods.steps import DECODER, StepSupervision

START, LATENT, STOP = "<|start-latent|>", "<|latent|>", "<|end-latent|>"


@dataclass(frozen=True)
class Coconut(Method):
    """
    mode: coconut; cot = the whole chain written out (stage 0 training); no_cot = the answer alone; no_thoughts = steps
    leave stage by stage, and nothing takes their place. Only coconut has the markers.
    thoughts: continuous = fed back; filler = the same slots without feedback, the control with the same curriculum.
    schedule: replace = Coconut's, latents take the place of steps; constant = all latents from the first stage on, while
    steps leave one a stage.
    first_epoch: of the curriculum, where training starts; a model that was taught the chain leaves stage 0 out.
    """

    tokens: ClassVar[tuple[str, ...]] = (*SPECIAL_TOKENS, START, LATENT, STOP)
    longest: ClassVar[int] = 128  # before the last stage, steps are still written out

    c_thought: int = 2
    epochs_per_stage: int = 3
    max_latent_stage: int = 3
    pad_latent_to_max: bool = True
    uniform_prob: float = 0.0
    thoughts: Literal["continuous", "filler"] = "continuous"
    schedule: Literal["replace", "constant"] = "replace"
    mode: Literal["coconut", "cot", "no_cot", "no_thoughts"] = "coconut"
    steps: StepSupervision | None = None  # SIM-CoT
    first_epoch: int = 0
    compat: bool = False  # the published trainer's fault: a new optimizer every epoch, not every stage

    def __post_init__(self) -> None:
        at_least(1, self, "c_thought", "epochs_per_stage")
        at_least(0, self, "first_epoch", "max_latent_stage")
        if not 0 <= self.uniform_prob <= 1:
            raise ConfigError(f"uniform_prob is {self.uniform_prob}: it is a share, from 0 to 1.")

    @property
    def lead(self) -> tuple[str, ...]:
        """Behind the latents stands what is left of the chain, nothing in the end, between its tags."""
        return "<think>", "</think>", "<answer>"

    @property
    def silent(self) -> bool:
        return self.mode != "cot"

    @property
    def writes(self) -> bool:
        """It starts from a model that does, and unlearns it: no stage trains a chain that no thoughts stand before."""
        return self.mode == "cot"

    @property
    def slot_range(self) -> tuple[int, int]:
        if self.mode != "coconut":
            return 0, 0
        most = self.c_thought * self.max_latent_stage
        whole = self.pad_latent_to_max or self.schedule == "constant"
        return (most if whole else min(self.c_thought, most)), most

    @property
    def trained_slots(self) -> int:
        return self.slot_range[1]

    @property
    def slots_a_step(self) -> int:
        return self.c_thought

    @property
    def supervision(self) -> StepSupervision | None:
        """Fillers' steps are read one row before them, where no thought stands."""
        return None if self.thoughts == "filler" else self.steps

    def thinking(self, count: int) -> tuple[Segment, ...]:
        return thinking(count, self.thoughts) if self.mode == "coconut" else ()

    def stage(self, epoch: int) -> int:
        """Past `max_latent_stage` there is one more, the last."""
        if self.mode in ("cot", "no_cot"):
            return 0
        return min(curriculum.stage(self.first_epoch + epoch, self.epochs_per_stage), self.max_latent_stage + 1)

    def renewed(self, epoch: int) -> int:
        return epoch if self.compat else self.stage(epoch)

    def slots_at(self, epoch: int) -> int:
        if self.schedule == "constant":
            return self.trained_slots
        return min(self.stage(epoch) * self.c_thought, self.trained_slots)

    def replaced(self, sample: Sample, rng: np.random.Generator, epoch: int) -> Replaced:
        stage, steps = self.stage(epoch), len(sample.steps)
        if self.mode in ("cot", "no_cot"):
            return Replaced(0, steps if self.mode == "no_cot" else 0)
        if self.schedule == "constant":
            return curriculum.constant(stage, steps, c_thought=self.c_thought, max_latent_stage=self.max_latent_stage)
        return curriculum.replaced(
            stage, steps, rng, c_thought=self.c_thought, max_latent_stage=self.max_latent_stage,
            pad_latent_to_max=self.pad_latent_to_max, uniform_prob=self.uniform_prob,
        )  # fmt: skip

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        part = self.replaced(sample, rng, epoch)
        think = self.thinking(part.latents)
        rest = (chain(sample, part.skipped), *solution(sample), ending(sample))
        readings: tuple[Reading, ...] = ()
        if self.steps and part.latents and think:
            slot = think[1]
            groups = [
                [(slot, c * self.c_thought + i - 1) for i in range(self.c_thought)]
                for c in range(part.latents // self.c_thought)
            ]
            answer = f"### {sample.answer}" if sample.dialect == "plain" else sample.answer
            after = "\n".join((*sample.steps[part.skipped :], answer))  # what follows the latents
            readings = self.steps.readings(groups, sample.steps[: part.skipped], after, rng)
        return Layout({"answer": (context(sample), *think, *rest)}, readings=readings)

    def companions(self, backbone: Backbone) -> nn.ModuleDict:
        return nn.ModuleDict({DECODER: self.steps.decoder(backbone)} if self.steps else {})

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {"answer": (1.0, out.branch("answer").cross_entropy("tokens"))}
        if self.steps:
            terms["steps"] = (self.steps.weight, self.steps.loss(out))
        return weighted(terms)


def thinking(count: int, thoughts: Literal["continuous", "filler"] = "continuous") -> tuple[Segment, Segment, Segment]:
    """The latents between their markers."""
    middle = latents(LATENT, count) if thoughts == "continuous" else slots(LATENT, count)
    return marker(START), middle, marker(STOP)
