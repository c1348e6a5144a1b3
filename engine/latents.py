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
from engine.backbones.base import Backbone, Sight
from engine.layout import Packed
from engine.recompute import Past

# Last hidden states after the final norm [rows, dim] -> input embeddings [rows, dim].
Feedback = Callable[[Tensor], Tensor]


def unchanged(states: Tensor) -> Tensor:
    """Coconut's feedback: the hidden state itself."""
    return states


def forward(
    backbone: Backbone, packed: Packed, feedback: Feedback = unchanged, cache: Cache | None = None, segments: int = 0,
    sight: Sight | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One packed forward, its latents filled: -> a [batch, length, dim] a layer, embeddings (as fed) first.

    A latent's input is made from the last hidden state one row before it. Rows are aligned by `pack`, so that the
    samples' latents are filled side by side; a sample with fewer of them goes on with its own tokens meanwhile. An empty
    `cache`, if one is given, is filled on the way.

    segments: so many calls of the language model, or more, where processes that share one model must call it alike:
    further columns are then computed one by one, which changes no result. sight: where the backbone has looked already.
    """
    sight = sight or backbone.look(packed)
    embeds = backbone.embed(packed, sight)
    columns = packed.latents.any(0).nonzero()[:, 0].tolist()
    if not columns and segments < 2:
        return backbone.whole(embeds, packed, cache, sight).hidden
    mask = masks.additive(masks.visible(packed), embeds.dtype)
    first, after = stepped(columns, embeds.shape[1], segments)
    past = Past.empty(backbone.kept_layers)
    hidden: list[tuple[Tensor, ...]] = []

    def run(part: Tensor, start: int) -> Tensor:
        nonlocal past
        stop = start + part.shape[1]
        kept = past if cache is None else cache
        states = backbone.forward(part, packed.positions[..., start:stop], mask[:, :, start:stop, :stop], kept, sight)
        if cache is None:
            past = past.then()
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


def stepped(columns: list[int], length: int, segments: int) -> tuple[int, int]:
    """The columns that are computed one by one, first to after: all latents, and as many more as `segments` asks for.

    One segment is what stands before them, and one what comes after, if anything does.
    """
    first, after = (columns[0], columns[-1] + 1) if columns else (length - 1, length)
    while 1 + after - first + (after < length) < segments:
        if after < length - 1:
            after += 1
        elif first > 1:
            first -= 1
        else:
            raise ValueError(f"{length} tokens don't make {segments} segments.")
    return first, after


def segments_of(packed: Packed) -> int:
    """How many calls of the language model `forward` makes."""
    columns = packed.latents.any(0).nonzero()[:, 0].tolist()
    return 1 + columns[-1] + 1 - columns[0] + (columns[-1] + 1 < packed.ids.shape[1]) if columns else 1
