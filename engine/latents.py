"""Feedback: fills latent slots whose input is what the model thought just before. Knows no method and no model family.

Everything before the first latent is one forward, each latent one cached step, everything after the last one forward:
serial only where a slot depends on the one before, and no prefix is ever computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from engine import masks
from engine.backbones.base import Backbone
from engine.layout import Packed

# Last hidden states after the final norm [rows, dim] -> input embeddings [rows, dim].
Feedback = Callable[[Tensor], Tensor]


def unchanged(states: Tensor) -> Tensor:
    """Coconut's feedback: the hidden state itself."""
    return states


def forward(
    backbone: Backbone, packed: Packed, feedback: Feedback = unchanged, cache: Cache | None = None
) -> tuple[Tensor, ...]:
    """One packed forward, its latents filled: -> a [batch, length, dim] a layer, embeddings (as fed) first.

    A latent's input is made from the last hidden state one row before it. Rows are aligned by `pack`, so that the
    samples' latents are filled side by side; a sample with fewer of them goes on with its own tokens meanwhile. An empty
    `cache`, if one is given, is filled on the way.

    Errors: ValueError for latents under gradient checkpointing, which takes the cache away.
    """
    embeds = backbone.embed(packed)
    mask = masks.additive(masks.visible(packed), embeds.dtype)
    columns = packed.latents.any(0).nonzero()[:, 0].tolist()
    if not columns:
        return backbone.forward(embeds, packed.positions, mask, cache).hidden
    if backbone.model.training and backbone.model.is_gradient_checkpointing:
        raise ValueError("Latents that are fed back need the cache: train them without gradient_checkpointing.")
    first, after = columns[0], columns[-1] + 1
    cache = backbone.new_cache() if cache is None else cache
    hidden: list[tuple[Tensor, ...]] = []

    def run(part: Tensor, start: int) -> Tensor:
        stop = start + part.shape[1]
        states = backbone.forward(part, packed.positions[..., start:stop], mask[:, :, start:stop, :stop], cache)
        hidden.append(states.hidden)
        return states.last[:, -1]

    last = run(embeds[:, :first], 0)
    for column in range(first, after):
        is_latent = packed.latents[:, column, None]
        fed = torch.where(is_latent, feedback(last).to(embeds.dtype), embeds[:, column])[:, None]
        last = run(fed, column)
    if after < embeds.shape[1]:
        run(embeds[:, after:], after)
    return tuple(torch.cat(parts, dim=1) for parts in zip(*hidden, strict=True))
