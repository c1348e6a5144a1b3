"""A given number, array or list beside what the engine made of it. Knows no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of max(1, largest |expected|)
GRADIENT_TOLERANCE = 2e-4  # of |expected|


@dataclass(frozen=True)
class Quantity:
    """`used`: the deviation over the one allowed, so up to 1 is a hit; infinite where there is nothing to measure."""

    name: str
    expected: str
    got: str
    used: float

    @property
    def ok(self) -> bool:
        return self.used <= 1  # False for NaN


def number(name: str, expected: float, got: float) -> Quantity:
    return Quantity(name, f"{expected:.8g}", f"{got:.8g}", abs(got - expected) / (TOLERANCE * max(1.0, abs(expected))))


def gradient(name: str, expected: float, got: float) -> Quantity:
    allowed = max(GRADIENT_TOLERANCE * abs(expected), 1e-30)
    return Quantity(name, f"{expected:.8g}", f"{got:.8g}", abs(got - expected) / allowed)


def array(name: str, expected: Tensor, got: Tensor) -> Quantity:
    """Floating-point arrays of the same shape."""
    shape = f"{list(expected.shape)}"
    if expected.shape != got.shape:
        return Quantity(name, shape, f"{list(got.shape)}", float("inf"))
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    off = float((got.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    return Quantity(name, f"{shape} up to {largest:.6g}", f"off by {off:.2g}", off / (TOLERANCE * max(1.0, largest)))


def same(name: str, expected: Any, got: Any) -> Quantity:
    """Integers, truths and lists of them: equal or not. Tensors are compared as nested lists."""
    expected, got = (x.tolist() if isinstance(x, Tensor) else x for x in (expected, got))
    equal = expected == got
    return Quantity(name, _short(expected), "the same" if equal else _short(got), 0.0 if equal else float("inf"))


def unchecked(name: str) -> Quantity:
    """A quantity that is given and that nothing here computes: a miss, so that no number is passed over in silence."""
    return Quantity(name, "given", "not checked", float("inf"))


def ungiven(name: str) -> Quantity:
    """A quantity that a folder must give and doesn't: a miss, so that nothing is right for want of numbers."""
    return Quantity(name, "not given", "", float("inf"))


def _short(value: Any) -> str:
    text = str(value)
    if not isinstance(value, list) or len(text) <= 40:
        return text
    return f"{list(torch.tensor(value).shape)} {text[:24]}..."
