"""How alike hidden states are, layer by layer, and whether the slots have collapsed: pure functions on captured states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

PART = 8192  # rows of a table at a time


def between_slots(states: Tensor) -> Tensor:
    """Cosine of every slot's state with every other's in the same layer.

    states: [layers + 1, slots, dim] -> [layers + 1, slots, slots], symmetric, 1 on the diagonal (0 for a zero state).
    """
    return between(states, states)


def between(states: Tensor, others: Tensor) -> Tensor:
    """Cosine of every slot's state with every other state of the same layer, such as those at the steps of a written chain.

    states: [layers + 1, slots, dim], others: [layers + 1, steps, dim] -> [layers + 1, slots, steps].
    """
    return (directions(states) @ directions(others).transpose(-1, -2)).clamp(-1, 1)


def with_state(states: Tensor, state: Tensor) -> Tensor:
    """Cosine of every slot's state with one state of the same layer.

    states: [layers + 1, slots, dim], state: [layers + 1, dim] -> [layers + 1, slots].
    """
    return between(states, state[:, None])[..., 0]


def directions(states: Tensor) -> Tensor:
    """States at length 1, in float64; a zero state stays."""
    return normalize(states.double(), dim=-1)


@dataclass(frozen=True)
class Vocabulary:
    """What slots are measured against."""

    norm: float  # mean length of an embedding
    centre: Tensor  # [dim], float64 on the CPU


@torch.no_grad()
def vocabulary(table: Tensor) -> Vocabulary:
    """Of embeddings [tokens, dim], a part at a time: in float64, a large model's would take several times its own room."""
    norm, total = 0.0, torch.zeros(table.shape[1], dtype=torch.float64)
    for part in table.split(PART):
        norm += float(part.float().norm(dim=-1).sum())
        total += part.float().sum(0).cpu().double()
    return Vocabulary(norm / len(table), total / len(table))


def collapse(states: Tensor, among: Vocabulary) -> dict[str, Tensor]:
    """What tells diverse slots from collapsed ones, layer by layer; the last two as in SIM-CoT (arXiv 2509.20317).

    states: [layers + 1, ..., slots, dim] -> a [layers + 1, ...] each, on the CPU:

    cosine: mean over pairs of slots. effective_rank: e to the entropy of the singular values (Roy and Vetterli 2007), 1 for
    slots on one line, their number for orthogonal ones of one length. norm: mean length, in lengths of a mean embedding.
    distance: mean Euclidean distance between two slots. centre: mean distance to the middle of the vocabulary. One slot has
    neither cosine nor distance.
    """
    states = states.cpu().double()
    count = states.shape[-2]
    values = torch.linalg.svdvals(states)
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    measured = {
        "effective_rank": torch.special.entr(shares).sum(-1).exp(),
        "norm": states.norm(dim=-1).mean(-1) / among.norm,
        "centre": (states - among.centre).norm(dim=-1).mean(-1),
    }
    if count > 1:
        one, other = torch.triu_indices(count, count, offset=1)
        measured["cosine"] = between_slots(states)[..., one, other].mean(-1)
        measured["distance"] = torch.cdist(states, states)[..., one, other].mean(-1)
    return measured


def path(states: Tensor) -> tuple[Tensor, Tensor]:
    """The slots' way through the layers in the plane that shows most of it (principal components over all of them).

    states: [layers + 1, slots, dim] -> (points [layers + 1, slots, 2], the share of the variance on each axis [2]).
    """
    flat = states.double().flatten(0, 1)
    flat = flat - flat.mean(0)
    left, values, _ = torch.linalg.svd(flat, full_matrices=False)
    points = torch.zeros(len(flat), 2, dtype=flat.dtype, device=flat.device)
    shown = min(2, len(values))
    points[:, :shown] = left[:, :shown] * values[:shown]
    shares = torch.zeros(2, dtype=flat.dtype, device=flat.device)
    shares[:shown] = (values**2 / (values**2).sum().clamp(min=1e-30))[:shown]
    return points.unflatten(0, states.shape[:2]), shares
