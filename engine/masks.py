"""Visibility -> attention masks. Knows nodes and rows, not methods or models."""

from __future__ import annotations

import torch
from torch import Tensor

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

    Finite rather than -inf, and never bool: rows that see nothing stay finite under every attention implementation.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
