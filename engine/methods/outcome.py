"""What a method's loss reads: the packed forward seen branch by branch. Knows no method and no model family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import masks, objectives
from engine.backbones.base import Backbone
from engine.layout import Packed, Rows


@dataclass(frozen=True)
class Branch:
    """One branch's supervised rows with the states that predict them."""

    rows: Rows
    hidden: tuple[Tensor, ...]  # a [batch, length, dim] a layer, embeddings first
    backbone: Backbone
    batch: int

    def logits(self) -> Tensor:
        """[rows, vocabulary]: only supervised rows go through the head."""
        return self.backbone.logits(self.hidden[-1][self.rows.sample, self.rows.row])

    def cross_entropy(self) -> Tensor:
        logits = self.logits()
        return objectives.cross_entropy(logits, self.rows.target, self.rows.sample, self.batch).mean()

    def predicting(self, name: str) -> tuple[list[Tensor], Tensor]:
        """The states that predict the target called `name`: (a [rows, dim] a layer 1..L, sample [rows])."""
        chosen = self.rows.name == self.rows.names.index(name)
        sample, row = self.rows.sample[chosen], self.rows.row[chosen]
        return [layer[sample, row] for layer in self.hidden[1:]], sample


@dataclass(frozen=True)
class Outcome:
    """One packed forward."""

    packed: Packed
    hidden: tuple[Tensor, ...]
    backbone: Backbone

    def branch(self, name: str) -> Branch:
        return Branch(self.packed.branches[name], self.hidden, self.backbone, self.packed.ids.shape[0])


def run(backbone: Backbone, packed: Packed) -> Outcome:
    """One forward over a packed batch: vision once, every branch under one mask."""
    embeds = backbone.embed(packed)
    mask = masks.additive(masks.visible(packed), embeds.dtype)
    return Outcome(packed, backbone.forward(embeds, packed.positions, mask).hidden, backbone)


def weighted(terms: dict[str, tuple[float, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """{name: (weight, loss)} -> (total, the unweighted terms for the log)."""
    total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
    return total, {name: loss.detach() for name, (_, loss) in terms.items()}
