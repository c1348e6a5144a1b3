"""Answer-only latents that are kept apart: for data without a written chain, from which no slot could learn its step.

question <|start-latent|> <|latent|> x n <|end-latent|> answer

    total = answer + diversity x the mean squared cosine between two thoughts of a sample

A thought is the state that its latent is fed. This project's own method. Knows nothing of backbones, batches or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from engine.backbones.base import SPECIAL_TOKENS
from engine.config import ConfigError, at_least
from engine.data.samples import Sample, context, ending, solution
from engine.layout import Layout, Segment
from engine.methods.coconut import LATENT, START, STOP, thinking
from engine.methods.method import Method, Outcome, weighted


@dataclass(frozen=True)
class Diversity(Method):
    tokens: ClassVar[tuple[str, ...]] = (*SPECIAL_TOKENS, START, LATENT, STOP)

    num_latent: int = 4
    diversity: float = 0.1

    def __post_init__(self) -> None:
        if self.num_latent < 2:
            raise ConfigError(f"num_latent = {self.num_latent}: to be kept apart, there must be at least two.")
        at_least(0, self, "diversity")

    @property
    def writes(self) -> bool:
        return False

    @property
    def slot_range(self) -> tuple[int, int]:
        return self.num_latent, self.num_latent

    def thinking(self, count: int) -> tuple[Segment, ...]:
        return thinking(count)

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        think = self.thinking(self.num_latent)
        return Layout({"answer": (context(sample), *think, *solution(sample), ending(sample))})

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        thoughts = out.hidden[-1][out.packed.slot_sample, out.packed.slot_row - 1]
        terms = {
            "answer": (1.0, out.branch("answer").cross_entropy()),
            "diversity": (self.diversity, likeness(thoughts.unflatten(0, (-1, self.num_latent)))),
        }
        return weighted(terms)


def likeness(thoughts: Tensor) -> Tensor:
    """Mean squared cosine between two of a sample's thoughts, [samples, slots, dim] -> []: 0 if all are at right angles."""
    unit = normalize(thoughts.float(), dim=-1)
    one, other = torch.triu_indices(unit.shape[1], unit.shape[1], offset=1)
    return (unit @ unit.mT)[:, one, other].square().mean()
