"""Gradient checkpointing that leaves a cache alone: layers are computed again in the backward pass instead of being kept.

transformers takes the cache away from a layer that it checkpoints, since a layer that is computed again would add its keys
a second time. Here a forward in segments gives each segment a `Past` of its own, which may be asked again: it answers as it
did the first time. Knows no method, no training loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

Keys = tuple[Tensor, Tensor]  # a segment's keys and values in one layer [batch, heads, rows, head dim]


def recompute_layers(model: nn.Module) -> None:
    """From now on, in training, the layers of the model (and of its vision encoder) keep their inputs alone."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _checkpointed(layer)  # its hooks stay outside, so that they run once


def _checkpointed(layer: nn.Module) -> Any:
    forward = layer.forward

    @wraps(forward)
    def run(*given: Any, **named: Any) -> Any:
        if layer.training and torch.is_grad_enabled():
            return checkpoint(forward, *given, use_reentrant=False, **named)
        return forward(*given, **named)

    return run


class _PastLayer(DynamicLayer):
    """One layer's keys and values of the segments before, and of its own segment once they are computed."""

    def __init__(self, before: tuple[Keys, ...]) -> None:
        super().__init__()
        self.before = before
        self.own: Keys | None = None
        if len(before) == 1:  # a layer that looks at a picture computes its keys once, and later reads them here
            self.keys, self.values = before[0]

    def update(self, key_states: Tensor, value_states: Tensor, *given: Any, **named: Any) -> Keys:
        self.own = self.own or (key_states, value_states)  # not those of a second time, which no loss goes through
        every = (*self.before, (key_states, value_states))
        return torch.cat([keys for keys, _ in every], dim=-2), torch.cat([values for _, values in every], dim=-2)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.before)


class Past(Cache):
    """The cache of one segment of a forward. The pieces are kept once, and joined where a layer reads them."""

    def __init__(self, layers: Sequence[_PastLayer]) -> None:
        super().__init__(layers=list(layers))
        self.kept = layers

    @classmethod
    def empty(cls, layers: int) -> Past:
        return cls([_PastLayer(()) for _ in range(layers)])

    def then(self) -> Past:
        """The cache of the segment after this one, which must have been computed."""
        return Past(
            [_PastLayer(layer.before if layer.own is None else (*layer.before, layer.own)) for layer in self.kept]
        )
