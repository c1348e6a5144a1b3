"""How near two tensors must be. A number that is a sum is as exact as the largest of what was summed with it."""

from __future__ import annotations

import torch
from torch import Tensor


def close(got: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the tensor's largest number, or of 1."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.detach().abs().max())))


def states_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """[..., dim] twice, each state within `tolerance` of its own largest feature, or of 1; of no states, their number."""
    assert got.shape == expected.shape
    allowed = tolerance * expected.abs().amax(-1, keepdim=True).clamp(min=1)
    worst = float(((got - expected).abs() / allowed).max()) if got.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} times what is allowed"
