"""Four copies of a model that learn alike to predict the answer, from more or less of a thought: what its worth is read from.

nothing: video and question; slots: and the states of Heima's thinking tokens; chain: and the written sections; both.
Heima is frozen. What they are good for stands in engine/insight/information.py. Knows nothing of devices.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.backbones.base import Backbone
from engine.backbones.load import around
from engine.data.samples import Sample, context
from engine.layout import END, Reading, Segment, pack, target
from engine.methods.heima import CONCLUSION, Heima, before_each
from engine.methods.method import Outcome, read, run, weighted

GIVEN = {"nothing": (False, False), "slots": (True, False), "chain": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Scorers(Heima):
    frozen: ClassVar[bool] = True

    def readings(self, sample: Sample, thoughts: Sequence[Segment], rng: np.random.Generator) -> tuple[Reading, ...]:
        seen = context(sample)
        holes = [Segment("context", thought.pieces, hole=True) for thought in thoughts]
        chain = Segment("context", (f"{sample.thoughts}\n",))
        told = (Segment("context", (self.tag(CONCLUSION),)), target(sample.answer, END))
        states = tuple(hole for thought in thoughts for hole in before_each(thought))
        return tuple(
            Reading(
                kind, (seen, *(holes if slots else ()), *([chain] if written else ()), *told), states if slots else ()
            )
            for kind, (slots, written) in GIVEN.items()
        )

    def companions(self, backbone: Backbone) -> nn.ModuleDict:
        return nn.ModuleDict({kind: copy.deepcopy(backbone.model) for kind in GIVEN})

    def likelihoods(self, out: Outcome) -> dict[str, Tensor]:
        """Negative log-likelihood of each sample's answer, in nats: a [samples] a scorer."""
        found = {}
        for kind in GIVEN:
            each, reading, group = read(out, around(out.companions[kind], out.backbone.tokenizer), kind)
            found[kind] = each.new_zeros(len(group)).index_add(0, reading, each)
        return found

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted({kind: (1.0, each.mean()) for kind, each in self.likelihoods(out).items()})


@torch.no_grad()
def scored(
    backbone: Backbone, companions: nn.ModuleDict, method: Scorers, samples: Sequence[Sample], batch: int = 16
) -> dict[str, np.ndarray]:
    """Negative log-likelihood of every sample's answer, in nats: a [samples] a scorer, as `information` takes them."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in GIVEN}
    for first in range(0, len(samples), batch):
        layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples[first : first + batch]]
        packed = pack(layouts, backbone.encode, backbone.pad).to(backbone.device)
        for kind, each in method.likelihoods(run(backbone, packed, companions=companions)).items():
            found[kind].append(each.float().cpu())
    return {kind: torch.cat(each).numpy() for kind, each in found.items()}
