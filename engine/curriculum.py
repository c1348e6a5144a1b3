"""Schedules as pure functions of (epoch, sample, rng). Knows no tokens and no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Replaced:
    """How much of a written chain gives way to latents."""

    latents: int
    skipped: int  # steps at the chain's beginning


LAST = 10**6  # an epoch of any curriculum's last stage


def stage(epoch: int, epochs_per_stage: int) -> int:
    """Coconut's stage of an epoch, both from 0."""
    return epoch // epochs_per_stage


def replaced(
    stage: int, steps: int, rng: np.random.Generator, *, c_thought: int, max_latent_stage: int,
    pad_latent_to_max: bool = False, uniform_prob: float = 0.0,
) -> Replaced:  # fmt: skip
    """Coconut's rule: at stage s, s x c_thought latents stand for the first s steps, even of a chain with fewer.

    Past `max_latent_stage` every step gives way, and the latents number the most there are (`pad_latent_to_max`), or as
    many as the chain has steps. With probability `uniform_prob` the stage is drawn from 0..steps instead.
    """
    if uniform_prob and rng.random() < uniform_prob:
        stage = int(rng.integers(steps + 1))
    if stage > max_latent_stage:
        count = max_latent_stage if pad_latent_to_max else min(steps, max_latent_stage)
        return Replaced(count * c_thought, steps)
    return Replaced(stage * c_thought, stage)


def constant(stage: int, steps: int, *, c_thought: int, max_latent_stage: int) -> Replaced:
    """SIM-CoT's maintainers' own recipe: all latents from the start, steps leave one a stage."""
    return Replaced(max_latent_stage * c_thought, steps if stage > max_latent_stage else stage)


def step_groups(
    steps: tuple[str, ...], slots: int, missing: Literal["ignore", "answer"], answer: str, joint: str = "\n"
) -> tuple[str | None, ...]:
    """Which step each of `slots` latents must say: one each, the last one all that remain, with `joint` between them.

    Slots without a step say the answer, or nothing (None).
    """
    if slots < 1:
        return ()
    own = list(steps[: slots - 1]) + ([joint.join(steps[slots - 1 :])] if len(steps) >= slots else [])
    fill = answer if missing == "answer" else None
    return (*own, *([fill] * (slots - len(own))))
