"""Figures over clips, each with its 95 % interval."""

from __future__ import annotations

import numpy as np

from engine.evaluation import wilson

RESAMPLES = 1000
Estimate = dict[str, float]  # value, low, high, n


def share(right: np.ndarray) -> Estimate:
    """Of yes and no [clips]: the share of yes, with Wilson's interval."""
    low, high = wilson(int(right.sum()), len(right))
    return {"value": float(right.mean()) if len(right) else 0.0, "low": low, "high": high, "n": len(right)}


def average(values: np.ndarray, seed: int = 0) -> Estimate:
    """Of numbers [clips]: the mean, with the interval of a bootstrap over clips."""
    if not len(values):
        return {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}
