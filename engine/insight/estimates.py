"""Figures over clips, each with its 95 % interval."""

from __future__ import annotations

import math

import numpy as np

from engine.evaluation import Z, wilson

RESAMPLES = 1000
Estimate = dict[str, float]  # value, low, high, n; of a gain, p too


def share(right: np.ndarray) -> Estimate:
    """Of yes and no [clips]: the share of yes, with Wilson's interval."""
    low, high = wilson(int(right.sum()), len(right))
    return {"value": float(right.mean()) if len(right) else 0.0, "low": low, "high": high, "n": len(right)}


def average(values: np.ndarray, seed: int = 0) -> Estimate:
    """Of numbers [clips]: the mean, with the interval of a bootstrap over clips, which has no width where all are equal: no
    claim may rest on it alone."""
    if not len(values):
        return {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def gain(after: np.ndarray, before: np.ndarray) -> Estimate:
    """Of yes and no [clips], twice: the share of yes after less that before, with Bonett and Price's interval for paired
    shares (2012), which has a width whatever the clips say, and p: how often chance alone would give as much."""
    won, lost, count = int((after & ~before).sum()), int((before & ~after).sum()), len(after)
    more, less = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    middle, spread = more - less, Z * math.sqrt((more + less - (more - less) ** 2) / (count + 2))
    value, low, high = (won - lost) / max(count, 1), max(-1.0, middle - spread), min(1.0, middle + spread)
    return {"value": value, "low": low, "high": high, "n": count, "p": mcnemar(won, lost)}


def mcnemar(won: int, lost: int) -> float:
    """The exact test, two-sided: how often as many fair coins as clips that changed would fall at least as unevenly."""
    changed = won + lost
    return min(1.0, 2 * sum(math.comb(changed, i) for i in range(min(won, lost) + 1)) / 2**changed)
