"""Schedules: how many latents, how many steps give way, which step a latent must say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from engine import curriculum
from engine.curriculum import Replaced, step_groups
from engine.data.samples import Sample
from engine.methods import described, from_description
from engine.methods.coconut import Coconut


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_stages_from_epochs() -> None:
    assert [curriculum.stage(epoch, 3) for epoch in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [curriculum.stage(epoch, 1) for epoch in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("stage", "steps", "pad", "expected"),
    [
        (0, 4, True, Replaced(0, 0)),
        (0, 0, True, Replaced(0, 0)),
        (1, 4, True, Replaced(2, 1)),
        (3, 4, True, Replaced(6, 3)),
        (3, 1, True, Replaced(6, 3)),  # as many latents as the stage has, even for a chain with fewer steps
        (3, 1, False, Replaced(6, 3)),
        (2, 0, False, Replaced(4, 2)),
        (4, 5, True, Replaced(6, 5)),  # past the last stage no step is left
        (4, 5, False, Replaced(6, 5)),
        (4, 2, True, Replaced(6, 2)),
        (4, 2, False, Replaced(4, 2)),  # as many latents as steps
        (4, 0, False, Replaced(0, 0)),
        (99, 2, False, Replaced(4, 2)),
    ],
)
def test_latents_take_the_place_of_steps(stage: int, steps: int, pad: bool, expected: Replaced) -> None:
    got = curriculum.replaced(stage, steps, rng(), c_thought=2, max_latent_stage=3, pad_latent_to_max=pad)
    assert got == expected


def test_a_curriculum_may_start_at_a_later_epoch() -> None:
    sample = Sample(None, "?", (), ("a", "b", "c", "d"), "e", "free-form", "plain")
    for schedule in ("replace", "constant"):
        whole = Coconut(epochs_per_stage=2, schedule=schedule, uniform_prob=0.5)
        later = replace(whole, first_epoch=3)
        for epoch in range(8):
            assert later.stage(epoch) == whole.stage(epoch + 3)
            assert later.replaced(sample, rng(epoch), epoch) == whole.replaced(sample, rng(epoch), epoch + 3)
    assert described(later)["first_epoch"] == 3
    assert from_description(described(later)) == later


def test_no_latents_at_all() -> None:
    """max_latent_stage 0: from stage 1 on, the answer alone."""
    for pad in (True, False):
        got = [
            curriculum.replaced(stage, 3, rng(), c_thought=2, max_latent_stage=0, pad_latent_to_max=pad)
            for stage in range(2)
        ]
        assert got == [Replaced(0, 0), Replaced(0, 3)]


def test_some_samples_draw_their_stage() -> None:
    def drawn(probability: float, seed: int = 0, steps: int = 4) -> list[Replaced]:
        given = rng(seed)
        return [
            curriculum.replaced(2, steps, given, c_thought=1, max_latent_stage=3, uniform_prob=probability)
            for _ in range(4000)
        ]

    assert set(drawn(0.0)) == {Replaced(2, 2)}
    always = Counter(drawn(1.0))
    # 0 .. steps, each as likely; 4 is past the last stage
    assert set(always) == {Replaced(0, 0), Replaced(1, 1), Replaced(2, 2), Replaced(3, 3), Replaced(3, 4)}
    assert all(700 < count < 900 for count in always.values())
    some = Counter(drawn(0.5))
    assert 2300 < some[Replaced(2, 2)] < 2500  # half of them, and a fifth of the other half
    assert drawn(0.5) == drawn(0.5) != drawn(0.5, seed=1)
    assert set(drawn(1.0, steps=0)) == {Replaced(0, 0)}


def test_nothing_is_drawn_where_nothing_depends_on_it() -> None:
    given = rng(3)
    curriculum.replaced(2, 4, given, c_thought=1, max_latent_stage=3)
    assert given.random() == rng(3).random()


def test_all_latents_from_the_start() -> None:
    def at(stage: int, steps: int) -> Replaced:
        return curriculum.constant(stage, steps, c_thought=2, max_latent_stage=3)

    assert [at(stage, 5) for stage in range(5)] == [Replaced(6, skipped) for skipped in (0, 1, 2, 3, 5)]
    assert at(4, 1) == Replaced(6, 1)
    assert at(0, 0) == Replaced(6, 0)


@pytest.mark.parametrize(
    ("steps", "slots", "answer", "nothing"),
    [
        ("", 2, ("?", "?"), (None, None)),
        ("a", 3, ("a", "?", "?"), ("a", None, None)),
        ("ab", 2, ("a", "b"), ("a", "b")),
        ("abcd", 2, ("a", "b\nc\nd"), ("a", "b\nc\nd")),
        ("abc", 1, ("a\nb\nc",), ("a\nb\nc",)),
        ("", 1, ("?",), (None,)),
        ("abc", 0, (), ()),
    ],
)
def test_every_latent_has_its_step(steps: str, slots: int, answer: tuple, nothing: tuple) -> None:
    assert step_groups(tuple(steps), slots, "answer", "?") == answer
    assert step_groups(tuple(steps), slots, "ignore", "?") == nothing


def test_coconut_follows_its_curriculum() -> None:
    sample = Sample(None, "Q", (), ("a", "b", "c"), "d", dialect="plain")
    method = Coconut(c_thought=2, epochs_per_stage=2, max_latent_stage=2)

    def written(chosen: Coconut, epoch: int) -> tuple[int, str]:
        _, _, slots, _, *targets = chosen.layout(sample, rng(), epoch).branches["answer"]
        return len(slots.pieces), "".join(str(p) for t in targets[:-1] for p in t.pieces)

    expected = [(0, "a\nb\nc\n### d"), (2, "b\nc\n### d"), (4, "c\n### d"), (4, "### d")]
    assert [written(method, epoch) for epoch in range(8)] == [e for e in expected for _ in range(2)]
    constant = replace(method, schedule="constant")
    assert [written(constant, epoch) for epoch in range(0, 8, 2)] == [(4, text) for _, text in expected]
    assert [method.stage(epoch) for epoch in range(0, 12, 2)] == [0, 1, 2, 3, 3, 3]
    assert [method.renewed(epoch) for epoch in range(5)] == [0, 0, 1, 1, 2]
    assert [replace(method, compat=True).renewed(epoch) for epoch in range(5)] == [0, 1, 2, 3, 4]
    for chosen in (method, constant):  # what is validated thinks as what is trained
        assert [chosen.slots_at(epoch) for epoch in range(8)] == [written(chosen, epoch)[0] for epoch in range(8)]
    assert (replace(method, mode="cot").stage(9), replace(method, mode="cot").slots_at(9)) == (0, 0)
