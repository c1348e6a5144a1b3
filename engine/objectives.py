"""Losses as pure functions on gathered rows. What they are averaged over, samples or tokens, is each method's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

EPSILON = 1e-6
CHUNK = 2**25  # most logits at a time: 128 MiB in float32, 220 rows of Qwen's vocabulary


def sample_mean(values: Tensor, sample: Tensor, batch: int) -> Tensor:
    """values [rows], sample [rows] -> each sample's mean [batch]; 0 for a sample without rows."""
    total = values.new_zeros(batch).index_add(0, sample, values)
    count = values.new_zeros(batch).index_add(0, sample, torch.ones_like(values))
    return total / count.clamp(min=1)


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood a token [rows], from logits [rows, vocabulary] and target [rows]."""
    return F.cross_entropy(logits.float(), target, reduction="none")


def token_loss_from_states(
    states: Tensor, head: Callable[[Tensor], Tensor], target: Tensor, vocabulary: int, chunk: int = CHUNK
) -> Tensor:
    """`token_loss` [rows] of head(states [rows, dim]), without ever holding all rows' logits.

    The rows go through the head in parts of at most `chunk` logits; where there are several parts, each one's logits are
    computed again in the backward pass.
    """
    rows = max(1, chunk // vocabulary)
    if len(states) <= rows:
        return token_loss(head(states), target)

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        return token_loss(head(some), wanted)

    parts = zip(states.split(rows), target.split(rows), strict=True)
    return torch.cat([checkpoint(part, some, wanted, use_reentrant=False) for some, wanted in parts])


def hidden_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], sample: Tensor, batch: int,
    form: Literal["paper", "coded"] = "paper",
) -> Tensor:  # fmt: skip
    """How far the student's states are from the teacher's, in units of the teacher's spread: mean over layers, [].

    student, teacher: a [rows, dim] a layer, row for row the same tokens; sample [rows].
    paper: |S - T| averaged over a sample's rows and features, over the std of T there (one std a layer and sample).
    coded: SmoothL1 (beta 1) averaged over features, over the std of that one token's T, as Implicit-Video-Reasoning's
    released trainer computes it.
    Samples without rows are left out. The teacher is not trained by this.
    """
    if form not in ("paper", "coded"):
        raise ValueError(f"unknown form of distillation {form!r}: use 'paper' or 'coded'")
    s = torch.stack(list(student)).float()  # [layers, rows, dim]
    t = torch.stack(list(teacher)).float().detach()
    if s.shape[1] == 0:
        return s.sum()
    if form == "coded":
        distance = F.smooth_l1_loss(s, t, reduction="none").mean(-1) / (t.std(-1) + EPSILON)  # [layers, rows]
        per_row = distance.mean(0)
        return _mean_present(sample_mean(per_row, sample, batch), sample)
    layers, _, dim = s.shape

    def total(rows: Tensor) -> Tensor:  # [layers, rows] -> [layers, batch]
        return rows.new_zeros(layers, batch).index_add(1, sample, rows)

    count = total(torch.ones_like(t[..., 0])) * dim
    mean = total(t.sum(-1)) / count.clamp(min=1)
    squares = total(((t - mean[:, sample, None]) ** 2).sum(-1))
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    distance = total((s - t).abs().sum(-1)) / count.clamp(min=1) / (std + EPSILON)
    return _mean_present(distance.mean(0), sample)


def _mean_present(per_sample: Tensor, sample: Tensor) -> Tensor:
    """Mean over the samples that have rows."""
    return per_sample[torch.unique(sample)].mean()


def position_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """CODI's distillation at one position: [layers + 1, samples, dim] twice -> [].

    SmoothL1 (beta 1) averaged over samples and features, over the standard deviation of the teacher's block there, mean
    over layers, embeddings included. The teacher is not trained by this.
    """
    s, t = student.float(), teacher.float().detach()
    distance = F.smooth_l1_loss(s, t, reduction="none").mean((1, 2))
    return (distance / t.flatten(1).std(1)).mean()
