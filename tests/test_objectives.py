"""Losses against loops that follow the formulas word for word."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from engine.objectives import (
    EPSILON,
    hidden_distance,
    sample_mean,
    token_loss,
    token_loss_from_states,
)  # fmt: skip

BATCH, LAYERS, DIM, VOCABULARY = 4, 3, 7, 11
SAMPLE = torch.tensor([0, 0, 0, 2, 0, 3, 3])  # ragged, one out of order, and nothing of sample 1


def states(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Layers of different scale and place, so that a mix-up of layers shows."""
    torch.manual_seed(seed)
    return [(torch.randn(len(SAMPLE), DIM) * (layer + 1) + layer).to(dtype) for layer in range(LAYERS)]


def rows_of(sample: int) -> list[int]:
    return [row for row, owner in enumerate(SAMPLE.tolist()) if owner == sample]


def unbiased_std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def paper_loop(student: list[Tensor], teacher: list[Tensor]) -> float:
    per_sample = []
    for sample in sorted(set(SAMPLE.tolist())):
        per_layer = []
        for s, t in zip(student, teacher, strict=True):
            ours, theirs = s[rows_of(sample)].flatten().tolist(), t[rows_of(sample)].flatten().tolist()
            distance = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
            per_layer.append(distance / (unbiased_std(theirs) + EPSILON))
        per_sample.append(sum(per_layer) / LAYERS)
    return sum(per_sample) / len(per_sample)


def coded_loop(student: list[Tensor], teacher: list[Tensor]) -> float:
    per_sample = []
    for sample in sorted(set(SAMPLE.tolist())):
        terms = []
        for s, t in zip(student, teacher, strict=True):
            for row in rows_of(sample):
                ours, theirs = s[row].tolist(), t[row].tolist()
                off = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
                smooth = [0.5 * x**2 if x < 1 else x - 0.5 for x in off]
                terms.append(sum(smooth) / DIM / (unbiased_std(theirs) + EPSILON))
        per_sample.append(sum(terms) / len(terms))
    return sum(per_sample) / len(per_sample)


LOOPS = {"paper": paper_loop, "coded": coded_loop}


def test_sample_mean() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 6.0, 5.0, 7.0])
    assert sample_mean(values, SAMPLE, BATCH).tolist() == [3.0, 0.0, 10.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_samples(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(len(SAMPLE), VOCABULARY)).to(dtype)
    target = torch.randint(VOCABULARY, (len(SAMPLE),))
    expected = [0.0] * BATCH
    for sample in set(SAMPLE.tolist()):
        losses = []
        for row in rows_of(sample):
            scores = logits[row].tolist()
            losses.append(math.log(sum(math.exp(x) for x in scores)) - scores[target[row]])
        expected[sample] = sum(losses) / len(losses)
    torch.testing.assert_close(
        sample_mean(token_loss(logits, target), SAMPLE, BATCH), torch.tensor(expected), rtol=0, atol=1e-5
    )


def test_every_sample_counts_the_same_however_long() -> None:
    logits, target = torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
    logits[4, 1] = 3.0
    short_wrong = sample_mean(token_loss(logits, target), torch.tensor([0, 0, 0, 0, 1]), 2)
    torch.testing.assert_close(short_wrong, torch.tensor([math.log(2), math.log(1 + math.exp(3))]))


@pytest.mark.parametrize("form", LOOPS)
def test_hidden_distance(form: str) -> None:
    student, teacher = states(0), states(1)
    got = hidden_distance(student, teacher, SAMPLE, BATCH, form)
    assert got.shape == ()
    assert got.item() == pytest.approx(LOOPS[form](student, teacher), rel=1e-5)


@pytest.mark.parametrize("form", LOOPS)
def test_hidden_distance_is_computed_in_single_precision(form: str) -> None:
    student, teacher = states(0, torch.bfloat16), states(1, torch.bfloat16)
    got = hidden_distance(student, teacher, SAMPLE, BATCH, form)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(LOOPS[form](student, teacher), rel=1e-5)


def test_hidden_distance_by_hand() -> None:
    student, teacher = [torch.tensor([[1.0, 2.0]])], [torch.tensor([[0.0, 4.0]])]
    first = torch.tensor([0])
    std = math.sqrt(8)  # of 0 and 4
    assert hidden_distance(student, teacher, first, 1).item() == pytest.approx(1.5 / std, rel=1e-5)
    assert hidden_distance(student, teacher, first, 1, "coded").item() == pytest.approx((0.5 + 1.5) / 2 / std, rel=1e-5)


@pytest.mark.parametrize("form", LOOPS)
def test_only_the_student_is_trained(form: str) -> None:
    student = [x.requires_grad_() for x in states(0)]
    teacher = [x.requires_grad_() for x in states(1)]
    hidden_distance(student, teacher, SAMPLE, BATCH, form).backward()
    assert all(x.grad is None for x in teacher)
    assert all((x.grad.abs().sum(1) > 0).all() for x in student)


@pytest.mark.parametrize("form", LOOPS)
def test_without_rows_the_distance_is_zero(form: str) -> None:
    empty = [torch.zeros(0, DIM, requires_grad=True) for _ in range(LAYERS)]
    loss = hidden_distance(empty, empty, torch.zeros(0, dtype=torch.long), BATCH, form)
    loss.backward()
    assert loss.item() == 0


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match="'l2': use 'paper' or 'coded'"):
        hidden_distance(states(0), states(1), SAMPLE, BATCH, "l2")


class Head(nn.Linear):
    """Notes how many logits it makes at a time."""

    def forward(self, rows: Tensor) -> Tensor:
        logits = super().forward(rows)
        self.most = max(getattr(self, "most", 0), logits.numel())
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_through_the_head_in_parts_are_as_all_at_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = Head(DIM, VOCABULARY).to(dtype)
    states, target = torch.randn(10, DIM, dtype=dtype, requires_grad=True), torch.randint(VOCABULARY, (10,))
    weight = torch.rand(10)

    def gradients(loss: Tensor) -> list[Tensor]:
        states.grad = None
        head.zero_grad()
        (loss * weight).sum().backward()
        return [states.grad, head.weight.grad, head.bias.grad]

    whole = token_loss(head(states), target)
    expected = gradients(whole)
    head.most = 0
    parts = token_loss_from_states(states, head, target, VOCABULARY, chunk=3 * VOCABULARY)
    got = gradients(parts)
    assert head.most == 3 * VOCABULARY
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_no_more_is_kept_than_the_states() -> None:
    head, kept = Head(DIM, 1000), []
    states = torch.randn(64, DIM, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        token_loss_from_states(states, head, torch.zeros(64, dtype=torch.long), 1000, chunk=4000)
    assert max(kept) <= states.numel()
