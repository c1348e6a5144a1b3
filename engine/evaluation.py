"""Accuracy, tokens, seconds and step accuracy of a method on samples with known answers. Always decodes; knows no files."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from engine import generate
from engine.backbones.base import Backbone
from engine.data.samples import Sample, answer_of, thoughts_of
from engine.insight import spoken
from engine.methods.method import Method

How = Literal["silent", "explicit"]


@dataclass(frozen=True)
class Outcome:
    """One sample's result. `said` and `true`: the thoughts, spoken or written out, and what they should have been."""

    correct: bool
    answer: str
    said: str | None
    true: str
    generated_tokens: int
    slots: int
    seconds: float

    @property
    def steps(self) -> tuple[bool, ...] | None:
        """Which of the true steps were said exactly."""
        return None if self.said is None else steps_right(self.said, self.true)


Z = 1.959964  # standard deviations to each end of a 95 % interval


def steps_right(said: str, true: str) -> tuple[bool, ...]:
    """Line by line: is the true step said exactly, in its place?"""
    lines = said.split("\n")
    if not true:
        return ()
    return tuple(i < len(lines) and lines[i].strip() == step for i, step in enumerate(true.split("\n")))


@dataclass(frozen=True)
class Response:
    """What a model wrote to one sample: the whole text, the thoughts that were spoken or written, and what it took."""

    text: str
    thoughts: str | None
    generated_tokens: int
    slots: int
    seconds: float


def respond(
    backbone: Backbone, part: Sequence[Sample], method: Method, how: How, slots: int,
    companions: nn.ModuleDict | None = None, speak: bool = False, longest: int | None = None,
) -> list[Response]:  # fmt: skip
    """Answers a batch by greedy decoding.

    silent: the method's thinking with `slots` slots, then the answer; with `speak`, the thoughts are said too where anyone
    has learnt to (not counted in tokens or seconds). explicit: the chain is written out. `seconds` is the batch's time from
    patches to answer, divided by its samples. Slots that are fed back count as generated tokens, those that ride the prefill
    don't. `longest`: most tokens of what is written (default: the method's for silence, generate's for a chain).
    """
    companions = companions or nn.ModuleDict()
    began = time.perf_counter()
    if how == "silent":
        thoughts = generate.think(backbone, part, method.thinking(slots), method.feedback(companions), method.context)
        written = generate.answer(backbone, thoughts, method.marks, longest or method.longest, keep=False)
    else:
        thoughts = generate.think(backbone, part, (), asked=method.context)
        written = generate.explicit(backbone, thoughts, longest or generate.LONGEST_CHAIN, keep=False)
    seconds = (time.perf_counter() - began) / len(part)
    said: list[str | None] = [None] * len(part)
    if how == "explicit":
        said = [thoughts_of(text, s.dialect) for text, s in zip(written.text, part, strict=True)]
    elif speak and thoughts.count and spoken.speaks(method, companions):
        said = list(spoken.aloud(backbone, method, companions, thoughts))
    return [
        Response(text, thought, count + thoughts.serial, thoughts.count, seconds)
        for text, thought, count in zip(written.text, said, written.tokens, strict=True)
    ]


def evaluate(
    backbone: Backbone, samples: Sequence[Sample], method: Method, how: How, slots: int,
    companions: nn.ModuleDict | None = None, batch: int = 32, speak: bool = False,
) -> list[Outcome]:  # fmt: skip
    """Every sample's answer, as `respond` gives it, held against the true one. Each may write twice as much as is true."""
    results: list[Outcome] = []
    longest = generate.LONGEST_CHAIN if how == "explicit" else method.longest
    for sample in samples:
        true = f"{sample.thoughts}\n{sample.answer}" if how == "explicit" else sample.answer
        longest = max(longest, 2 * len(backbone.text_ids(true)))
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        told_each = respond(backbone, part, method, how, slots, companions, speak, longest)
        for sample, told in zip(part, told_each, strict=True):
            found = answer_of(told.text, sample.dialect)
            right = found == answer_of(sample.answer, sample.dialect)
            results.append(Outcome(
                right, found, told.thoughts, sample.thoughts, told.generated_tokens, told.slots, told.seconds
            ))  # fmt: skip
    return results


def wilson(right: int, count: int, z: float = Z) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    if not count:
        return 0.0, 1.0
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def neighbours(families: Sequence[str], difficulties: Sequence[int]) -> list[tuple[int, int]]:
    """Each sample with the next one of its family and difficulty, the last with the first; none for one alone."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, key in enumerate(zip(families, difficulties, strict=True)):
        groups.setdefault(key, []).append(index)
    return [
        pair for group in groups.values() if len(group) > 1 for pair in zip(group, group[1:] + group[:1], strict=True)
    ]


def summary(results: Sequence[Outcome], families: Sequence[str], difficulties: Sequence[int]) -> dict[str, Any]:
    """The figures of one method; families and difficulties are those of the samples, in order.

    swapped_step_accuracy: what was said from the slots of another clip of the same family and difficulty is held against
    this clip's steps (speaking sees the slots alone, so that is what swapped slots say).
    """
    right = sum(r.correct for r in results)

    def share(chosen: list[Outcome]) -> dict[str, Any]:
        low, high = wilson(sum(r.correct for r in chosen), len(chosen))
        return {"accuracy": mean([r.correct for r in chosen]), "n": len(chosen), "interval": [low, high]}

    steps = [right for r in results for right in r.steps or ()]
    swapped = [
        right
        for a, b in neighbours(families, difficulties)
        for right in steps_right(results[b].said or "", results[a].true)
    ]
    return {
        "accuracy": mean([r.correct for r in results]),
        "interval": list(wilson(right, len(results))),
        "n": len(results),
        "generated_tokens": mean([r.generated_tokens for r in results]),
        "slots": mean([r.slots for r in results]),
        "seconds": mean([r.seconds for r in results]),
        "by_family": {f: share([r for r, g in zip(results, families, strict=True) if g == f]) for f in dict.fromkeys(families)},
        "by_steps": {str(k): share([r for r, d in zip(results, difficulties, strict=True) if d == k]) for k in sorted(set(difficulties))},
        "step_accuracy": mean(steps) if steps else None,
        "swapped_step_accuracy": mean(swapped) if steps and swapped else None,
    }  # fmt: skip
