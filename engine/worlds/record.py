"""What every world shares: a clip's record, its timing, its split, and swap sequences that end where they should.

Knows nothing of pixels or of any one family.
"""

from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import Protocol

import numpy as np

INTRO, STEP, OUTRO = 1.0, 1.0, 0.5  # seconds
LETTERS = "ABCD"
SPLITS = ("train", "validation", "test", "fresh")
LONGEST = 10  # most steps of a clip


@dataclass(frozen=True)
class Step:
    """One written step of thought and its moment in the clip, in seconds."""

    text: str
    start: float
    end: float


class Scene(Protocol):
    """What a family needs to draw its clip; the trajectory is its start and its events, hashable."""

    @property
    def trajectory(self) -> tuple: ...


@dataclass(frozen=True)
class Record:
    """One clip: its question, its exact steps (the start, `difficulty` events, the option), its answer, its scene."""

    family: str
    split: str
    seed: int
    difficulty: int
    question: str
    options: tuple[str, ...]
    steps: tuple[Step, ...]
    answer: str
    letter: str
    duration: float
    scene: Scene

    @property
    def trajectory(self) -> tuple:
        """What happens, without its looks: no trajectory is in two of train, validation and test."""
        return (self.family, *self.scene.trajectory)


def phase(time: float, steps: int) -> tuple[int, float]:
    """The event going on at `time` and how far it is, 0 to 1; (-1, 0) in the intro, (steps, 0) in the outro."""
    since = (time - INTRO) / STEP
    if since < 0:
        return -1, 0.0
    event = min(int(since), steps)
    return event, since - event if event < steps else 0.0


def timed(texts: list[str]) -> tuple[Step, ...]:
    """Written steps with their moments: the intro, one event a step, the outro."""
    ends = [INTRO + STEP * i for i in range(len(texts) - 1)]
    ends.append(ends[-1] + OUTRO)
    return tuple(Step(text, start, end) for text, start, end in zip(texts, [0.0, *ends], ends, strict=False))


def bucket(trajectory: tuple) -> str:
    """The one part that a trajectory belongs to, by a stable hash: 70 % train, 10 % validation, 20 % test."""
    share = int.from_bytes(blake2b(repr(trajectory).encode(), digest_size=8).digest(), "big") % 10
    return "test" if share < 2 else "validation" if share == 2 else "train"


def carry(rng: np.random.Generator, things: int, start: int, goal: int, steps: int) -> list[tuple[int, int]]:
    """Swaps (lower, higher) of `things` places that bring a token from `start` to `goal`.

    The caller draws the goal evenly, and swaps are drawn evenly too, so that neither the start nor any one swap tells
    the end. No pair swaps twice in a row, save in the one case that has no other way.
    """
    pairs = list(combinations(range(things), 2))
    undo = things == 3 and steps == 2 and goal == start
    while True:
        token, chosen = start, list[tuple[int, int]]()
        for pick in rng.random(steps).tolist():
            free = [pair for pair in pairs if undo or not chosen or pair != chosen[-1]]
            pair = free[int(pick * len(free))]
            token = sum(pair) - token if token in pair else token
            chosen.append(pair)
        if token == goal:
            return chosen
