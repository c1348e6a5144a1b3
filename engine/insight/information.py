"""What thoughts are worth for the answer, in nats: Heima's theorem, from answers' log-likelihoods. Knows no model.

Four scorers, trained alike, predict the answer Y from X (what is asked), and with the slots, the written chain (CoT), or
both beside it. A conditional mutual information is the drop of the answer's negative log-likelihood when its condition is
joined by what it is about:

    I(Y; slots | X) = NLL(X) - NLL(X, slots)          I(Y; CoT | X) = NLL(X) - NLL(X, CoT)
    I(Y; CoT | X, slots) = NLL(X, slots) - NLL(X, slots, CoT)

The theorem: where slots are made from X and CoT, 0 <= I(Y; slots | X) <= I(Y; CoT | X), and the difference of the two is
I(Y; CoT | X, slots), the loss by compression. Then I(Y; slots | X, CoT), by which the estimates miss that, is 0.

The scorers' limits are in the figures: what they can't read counts as absent (usable information), and slots that are
made from X alone tell an unlimited reader of X nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

SCORERS = ("nothing", "slots", "chain", "both")
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """Nats, with the 95 % interval of a bootstrap over samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Information:
    slots: Estimate  # I(Y; slots | X)
    chain: Estimate  # I(Y; CoT | X)
    gap: Estimate  # I(Y; CoT | X, slots)
    beyond: Estimate  # I(Y; slots | X, CoT): 0 where the slots hold nothing but what X and the chain do
    kept: Estimate  # slots / chain: the share that the slots keep
    samples: int


def information(nats: Mapping[str, np.ndarray], seed: int = 0) -> Information:
    """nats: the negative log-likelihood of every sample's answer [samples], from the scorers "nothing" (but X), "slots",
    "chain" and "both".

    Samples are drawn anew together for all four, so that a difference is one between the same samples.
    Errors: ValueError for arrays of different or no length.
    """
    table = [np.asarray(array, dtype=np.float64) for array in (nats[scorer] for scorer in SCORERS)]
    count = len(table[0])
    if not count or any(array.shape != (count,) for array in table):
        raise ValueError("The four scorers must have scored the same samples, at least one.")
    rng = np.random.default_rng(seed)
    whole = [array.mean() for array in table]
    picked = (rng.integers(count, size=count) for _ in range(RESAMPLES))
    drawn = np.array([[array[samples].mean() for array in table] for samples in picked]).T  # [scorers, resamples]

    def estimate(of: Callable[..., np.ndarray]) -> Estimate:
        low, high = np.nanquantile(of(*drawn), (0.025, 0.975))
        return Estimate(float(of(*whole)), float(low), float(high))

    with np.errstate(divide="ignore", invalid="ignore"):
        return Information(
            estimate(lambda x, s, c, b: x - s),
            estimate(lambda x, s, c, b: x - c),
            estimate(lambda x, s, c, b: s - b),
            estimate(lambda x, s, c, b: c - b),
            estimate(lambda x, s, c, b: (x - s) / (x - c)),
            count,
        )
