"""Visibility -> attention masks. Knows nodes and rows, not methods or models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from engine.layout import Packed


def visible(packed: Packed) -> Tensor:
    """Who may see whom: bool [batch, length (looking), length (seen)].

    A token sees an earlier row if that row's segment is visible to its own segment. Padding sees and is seen by nobody.
    """
    batch, length = packed.node.shape
    node = packed.node.clamp(min=0)
    samples = torch.arange(batch, device=node.device)[:, None, None]
    allowed = packed.sees[samples, node[:, :, None], node[:, None, :]]  # [batch, length, length]
    causal = torch.ones(length, length, dtype=torch.bool, device=node.device).tril()
    real = packed.node >= 0
    return allowed & causal & real[:, :, None] & real[:, None, :]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [batch, looking, seen] -> [batch, 1, looking, seen], 0 where seen and the lowest finite number elsewhere.

    Finite rather than -inf, and never bool: rows that see nothing stay finite under every attention implementation. Finite
    in bfloat16 too, which autocast turns a float32 mask into.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    return mask.masked_fill_(~allowed, lowest)[:, None]


BLOCK = 128  # rows and columns of a block, flex attention's own default


def blocks(packed: Packed) -> BlockMask:
    """`visible` as flex attention takes it: [batch, 1, length, length], of which only whole blocks are ever stored.

    A block that nobody sees is left out, one that is seen whole needs no look at its tokens. Rows that see nothing get
    zeros from flex attention, and give none but zero gradients.
    """
    (batch, length), nodes = packed.node.shape, packed.sees.shape[1]
    node = packed.node.where(packed.node >= 0, nodes)  # padding is one node more, that sees and is seen by nobody
    sees = F.pad(packed.sees, (0, 1, 0, 1))

    def allowed(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & sees[sample, node[sample, row], node[sample, column]]

    count = -(-length // BLOCK)
    padded = F.pad(node, (0, count * BLOCK - length), value=nodes).view(batch, count, BLOCK)
    held = torch.zeros(batch, count, nodes + 1, device=node.device).scatter_(2, padded, 1.0)  # a block's nodes
    some = held @ sees.float() @ held.mT > 0  # [batch, blocks (looking), blocks (seen)]
    every = held @ (~sees).float() @ held.mT == 0
    earlier = torch.ones(count, count, dtype=torch.bool, device=node.device).tril(-1)
    whole = every & earlier
    part = some & ~whole & (earlier | torch.eye(count, dtype=torch.bool, device=node.device))
    lists = (*_listed(part), *_listed(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [batch, blocks, blocks] -> how many each row has [batch, 1, blocks], and which, these first [batch, 1, blocks, blocks]."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
