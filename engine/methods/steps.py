"""SIM-CoT: every slot must say its own step, through an auxiliary decoder that is thrown away. An objective for any method
with slots; it costs nothing when the model answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from engine import latents
from engine.backbones.base import Backbone
from engine.config import ConfigError, at_least
from engine.curriculum import step_groups
from engine.latents import Feedback
from engine.layout import END, Reading, Readings, Segment, slots, target
from engine.methods.method import Outcome, read

DECODER = "auxiliary"


@dataclass(frozen=True)
class StepSupervision:
    """
    weight: of the step loss beside the method's own.
    mean: samples = each slot's losses are added up over its tokens and divided by the samples, as on Coconut; tokens =
    averaged over its tokens, as on CODI. Both are then averaged over slots.
    missing: what slots beyond the last step say: answer = what follows the slots (as on Coconut), or nothing (as on CODI).
    layers: of the auxiliary decoder: the language model's first ones; 0 = all of them, as published.
    stairs: the first slot is read at this layer, and each later step one layer further up, so that every step has the one
    before it to build on; the last step, and what stands for the answer, at the top. None = all at the top, as published.
    words: of a step that its slot must say, the last ones: what came of it. Else a decoder that reads what happened can work
    out the outcome by itself, and the slot needn't know it. 0 = the whole step, as published. Of several numbers one is drawn
    for each sample: the outcome alone, or what it comes of too.
    first_position: of the auxiliary decoder's tokens: 1 (as on Coconut), or 0 (as on CODI).
    compat: the published CODI code's fault: a slot's texts are cut to the length of the first row's and one token more
    (to one token if the first row has none), so that the loss depends on the order of the rows.
    """

    weight: float = 1.0
    mean: Literal["samples", "tokens"] = "samples"
    missing: Literal["answer", "ignore"] = "answer"
    layers: int = 0
    stairs: int | None = None
    words: tuple[int, ...] = (0,)
    first_position: int = 1
    compat: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, "weight", "layers", "first_position", where="steps.")
        if not self.words or min(self.words) < 0:
            raise ConfigError(f"steps.words is {list(self.words)}: write how many, from 0 (all).")
        if self.stairs is not None and self.stairs < 1:
            raise ConfigError(f"steps.stairs is {self.stairs}: it must be 1 or more, or none.")

    def decoder(self, backbone: Backbone) -> nn.Module:
        """The auxiliary decoder: a copy of the language model, with its own embedding and head."""
        copied = copy.deepcopy(backbone.language_model())
        if self.layers:
            del backbone.blocks(copied)[self.layers :]
        return copied

    def readings(
        self,
        groups: Sequence[Sequence[tuple[Segment, int]]],
        steps: tuple[str, ...],
        answer: str,
        rng: np.random.Generator,
        joint: str = "\n",
    ) -> tuple[Reading, ...]:
        """groups: the states of each slot (c_thought of them) -> what each must say. joint: stands between steps that one slot
        must say together."""
        words = self.words[rng.integers(len(self.words))]
        said = tuple(last_words(step, words) for step in steps) if words else steps
        texts = step_groups(said, len(groups), self.missing, answer, joint)
        return tuple(
            Reading(
                DECODER,
                (slots("<pause>", len(holes)), target(text, END)),
                tuple(holes),
                group,
                self.layer(group, len(steps)),
            )
            for group, (holes, text) in enumerate(zip(groups, texts, strict=True))
            if text is not None
        )

    def layer(self, slot: int, steps: int) -> int | None:
        """Whose states say the step of this slot, in a chain of so many steps."""
        return None if self.stairs is None or slot >= steps - 1 else self.stairs + slot

    def loss(self, out: Outcome, fed: Feedback = latents.unchanged) -> Tensor:
        if DECODER not in out.packed.readings:  # no slot in the whole batch, as at a curriculum's first stage
            return out.hidden[-1].new_zeros(())
        every = self.per_slot(out, fed)
        return every.sum() / (len(every) if out.step is None else sum(kind == DECODER for kind, _ in out.step))

    def per_slot(self, out: Outcome, fed: Feedback = latents.unchanged) -> Tensor:
        """[slots that have a step in this batch]"""
        decoder = replace(out.backbone, model=out.companions[DECODER])
        each, reading, group = read(out, decoder, DECODER, fed, self.first_position, table=out.backbone)
        if self.compat:
            kept = _cut_as_published(out.packed.readings[DECODER])
            each, reading = each[kept], reading[kept]
        slot = group[reading]
        present, index = torch.unique(slot, return_inverse=True)
        total = each.new_zeros(len(present)).index_add(0, index, each)
        if self.mean == "samples":
            return total / len(out.packed.ids)
        if out.step is None or self.compat:
            return total / each.new_zeros(len(present)).index_add(0, index, torch.ones_like(each))
        return total / each.new_tensor([out.step[DECODER, group] for group in present.tolist()])


def last_words(step: str, count: int) -> str:
    """A step's last words with the space before them, as they stand in the chain."""
    words = step.split(" ")
    return step if len(words) <= count else " " + " ".join(words[-count:])


def _cut_as_published(readings: Readings) -> Tensor:
    """bool [rows]: which tokens the published CODI code leaves of the readings."""
    reading, slot = readings.packed.branches["read"].sample, readings.group
    length = torch.bincount(reading, minlength=len(slot))
    place = torch.arange(len(reading), device=reading.device) - (length.cumsum(0) - length)[reading]
    of_sample = torch.zeros_like(slot).index_put((readings.packed.slot_sample,), readings.source_sample)
    first = of_sample == 0
    longest = slot.new_ones(int(slot.max()) + 1).index_put((slot[first],), length[first] + 1)  # a slot
    return place < longest[slot][reading]
