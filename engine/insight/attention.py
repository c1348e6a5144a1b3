"""Where it looked: how much each slot, and what reads the answer, attends to every earlier token, frame and patch.

transformers gives attention weights under its eager implementation alone. So the slots' rows, and only those, run once more
behind the cached context, on a copy of the model that shares every weight and has its own configuration: nothing changes
for others who use the model at the same time. Weights say where information could come from, not what was used of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from engine import masks
from engine.backbones.base import Backbone, double
from engine.data.samples import Sample, context
from engine.generate import Thoughts


@dataclass(frozen=True)
class Looked:
    """One sample's attention to its clip; every row's weights over all tokens add up to 1, so these add up to less."""

    patches: Tensor  # [layers, heads, rows, slices, height, width]: a row a slot, then a row a marker behind them
    slots: Tensor  # [layers, heads, rows, slots]: the attention to slots
    seconds: float  # a slice's length

    @property
    def frames(self) -> Tensor:
        """[layers, heads, rows, slices]"""
        return self.patches.sum((-2, -1))


def watched(backbone: Backbone) -> Backbone:
    """The same model, every weight shared, whose forward leaves its attention weights behind."""
    twin = double(backbone.model)
    twin.set_attn_implementation("eager")
    twin.config.get_text_config().output_attentions = True
    return replace(backbone, model=twin)


@torch.no_grad()
def weights(backbone: Backbone, thoughts: Thoughts, marks: Sequence[str] = ()) -> Tensor:
    """Attention of every slot, and of the tokens `marks` fed behind the thought, to what stands before them and to
    themselves: [layers, batch, heads, slots + marks, length + marks], a column each row of the cache, then the marks."""
    (batch, length), count, device = thoughts.context.shape, thoughts.count, thoughts.slots.device
    ids = torch.tensor([backbone.token(name) for name in marks], dtype=torch.long, device=device).expand(batch, -1)
    fed = backbone.fed(thoughts.states[0], thoughts.positions)
    embeds = torch.cat([fed, backbone.embed_ids(ids).to(fed.dtype)], dim=1)
    after = thoughts.after[:, None] + torch.arange(len(marks), device=device)
    positions = torch.cat([thoughts.positions, after], dim=1).expand(backbone.axes, -1, -1)
    column = torch.arange(length, device=device)
    end = torch.full((batch, len(marks)), length, device=device)
    earlier = column < torch.cat([thoughts.slots, end], dim=1)[..., None]  # [batch, slots + marks, length]
    kept = (thoughts.context | thoughts.thought).scatter(1, thoughts.slots, False)  # the slots come anew, as rows
    own = torch.ones(count + len(marks), count + len(marks), dtype=torch.bool, device=device).tril()
    allowed = torch.cat([kept[:, None] & earlier, own.expand(batch, -1, -1)], dim=2)
    cache = DynamicCache(list(thoughts.layers))
    states = watched(backbone).forward(embeds, positions, masks.additive(allowed, embeds.dtype), cache, thoughts.sight)
    assert states.attentions is not None
    found = torch.stack(states.attentions)  # [layers, batch, heads, rows, length + rows]
    columns = thoughts.slots[:, None, None].expand(*found.shape[:-1], -1)
    whole = found[..., :length].scatter(-1, columns, found[..., length : length + count])
    return torch.cat([whole, found[..., length + count :]], dim=-1)


def looked(
    backbone: Backbone, thoughts: Thoughts, samples: Sequence[Sample], marks: Sequence[str] = ()
) -> list[Looked]:
    """What `weights` says of every sample's clip.

    Errors: ValueError for a sample without a clip, or a picture whose tiles are no grid.
    """
    every = weights(backbone, thoughts, marks)
    found = []
    for index, sample in enumerate(samples):
        rows, (height, width), seconds = seen_rows(backbone, sample)
        first = int(thoughts.context[index].int().argmax())
        mine = every[:, index]
        patches = mine[..., (rows + first).to(mine.device)].unflatten(-1, (height, width))
        found.append(Looked(patches, mine[..., thoughts.slots[index]], seconds))
    return found


def seen_rows(backbone: Backbone, sample: Sample) -> tuple[Tensor, tuple[int, int], float]:
    """Where a sample's clip stands in its context: -> (rows [slices, patches], patches down and across, seconds a slice)."""
    visuals = backbone.encode(context(sample)).visual
    if not visuals:
        raise ValueError("This sample has no clip that could be looked at.")
    rows = torch.cat([torch.tensor(rows).reshape(visual.grid[0], -1) for visual, rows in visuals])
    _, down, across = visuals[0][0].grid
    height = round((rows.shape[1] * down / across) ** 0.5)
    width = rows.shape[1] // max(height, 1)
    if (height * width, height * across) != (rows.shape[1], width * down):
        raise ValueError("This picture was cut into tiles that overlap: choose a video, or a picture of one tile.")
    return rows, (height, width), visuals[0][0].seconds


def over_moments(frames: Tensor, seconds: float, moments: Sequence[tuple[float, float]]) -> Tensor:
    """How much of the attention to frames falls on each moment of the clip.

    frames: [..., slices], each `seconds` long; moments: (start, end), in seconds. A slice's attention counts by the share of
    the slice that lies in the moment. -> [..., moments]
    """
    starts = np.arange(frames.shape[-1]) * seconds
    shares = [np.clip(np.minimum(starts + seconds, end) - np.maximum(starts, start), 0, None) for start, end in moments]
    return frames @ torch.tensor(np.stack(shares, axis=-1) / seconds, dtype=frames.dtype, device=frames.device)
