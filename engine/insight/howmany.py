"""How many thoughts are enough? What fewer of them would have cost and saved: pure functions on arrays, clip by clip.

Confidence is the probability of the likeliest option. Slots that ride the prefill cost almost nothing each, so to leave
early saves time only where slots are fed back, one step each; to think aloud always costs the chain's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)  # of confidence; the last is never reached


@dataclass(frozen=True)
class Choice:
    """What one threshold gives, clip by clip."""

    threshold: float
    right: np.ndarray  # bool [clips]
    cost: np.ndarray  # [clips]: slots used, or tokens written
    went_on: np.ndarray  # bool [clips]: not sure enough before the end; thought aloud


def early_exit(confidence: np.ndarray, right: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> list[Choice]:
    """Stop at the first number of slots, from 0, at which the confidence reaches the threshold; else use them all.

    confidence, right: [clips, slots + 1].
    """
    clips, last = np.arange(len(confidence)), confidence.shape[1] - 1
    made = []
    for threshold in thresholds:
        enough = confidence >= threshold
        used = np.where(enough.any(1), enough.argmax(1), last)
        made.append(Choice(threshold, right[clips, used], used, np.asarray(~enough.any(1))))
    return made


def think_aloud(
    confidence: np.ndarray, right: np.ndarray, tokens: np.ndarray, written_right: np.ndarray,
    written_tokens: np.ndarray, thresholds: Sequence[float] = THRESHOLDS,
) -> list[Choice]:  # fmt: skip
    """Keep the silent answer where it is sure enough, else write the chain, whose tokens come on top. All are [clips]."""
    made = []
    for threshold in thresholds:
        aloud: np.ndarray = confidence < threshold
        made.append(Choice(threshold, np.where(aloud, written_right, right), tokens + aloud * written_tokens, aloud))
    return made
