"""Who is studied, and on what: a model with its slots, and clips whose options, steps and moments are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from engine import generate
from engine.backbones.base import Backbone, double
from engine.data.samples import Sample
from engine.insight.lens import TunedLens
from engine.insight.probe import world_states
from engine.layout import Special
from engine.methods.method import Method
from engine.worlds import Record


@dataclass(frozen=True)
class Subject:
    """A model as it is studied: with how many slots, and its tuned lens if it has one."""

    backbone: Backbone
    method: Method
    slots: int
    companions: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    tuned: TunedLens | None = None

    def think(self, samples: Sequence[Sample]) -> generate.Thoughts:
        feedback = self.method.feedback(self.companions)
        return generate.think(self.backbone, samples, self.method.thinking(self.slots), feedback, self.method.context)


@dataclass(frozen=True)
class Clips:
    """Samples with options, the family of each, and when its steps happen, in seconds.

    donors: for each sample, others whose slots take the place of its own, by name; None where it has none.
    words: what the hidden state can be, by family.
    """

    samples: Sequence[Sample]
    families: Sequence[str]
    moments: Sequence[Sequence[tuple[float, float]]]
    donors: Mapping[str, Sequence[Sample | None]]
    words: Mapping[str, Sequence[str]]

    def part(self, first: int, size: int) -> Clips:
        kept = slice(first, first + size)
        donors = {name: given[kept] for name, given in self.donors.items()}
        return Clips(self.samples[kept], self.families[kept], self.moments[kept], donors, self.words)


def words_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """The states that each family's written steps tell."""
    found: dict[str, set[str]] = {}
    for record in records:
        found.setdefault(record.family, set()).update(world_states([step.text for step in record.steps]))
    return {family: sorted(words) for family, words in found.items()}


def untrained(subject: Subject, seed: int = 0) -> Subject:
    """The same model, weights shared, with slots that it never met: a random direction, of an embedding's usual length."""
    pieces = [p for s in subject.method.thinking(1) if s.role == "slots" for p in s.pieces if isinstance(p, Special)]
    weight = subject.backbone.model.get_input_embeddings().weight.detach().clone()
    drawn = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight)
    for piece in pieces:
        weight[subject.backbone.token(piece.name)] = drawn / drawn.norm() * weight.norm(dim=-1).mean()
    model = double(subject.backbone.model)
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    return replace(subject, backbone=replace(subject.backbone, model=model))
