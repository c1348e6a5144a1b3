"""The exact prompt behind which a model answers, so that others can serve it: transformers' own `generate`, vLLM.

A model whose slots ride the prefill (pauses), or which writes its thinking tokens itself (Heima), needs nothing of this
project once it is trained: it is a plain checkpoint, and its silent answer is what greedy decoding writes behind this prompt.
Slots that are fed back (Coconut, CODI) need the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.ask import posed
from engine.backbones.base import Backbone
from engine.layout import Frames, Layout, Packed, marker, pack
from engine.models import Model

How = Literal["silent", "explicit"]
SERVED = (
    "Give the ids as they are, or the text without special tokens added; decode greedily, and without repetition penalty, "
    "until `stop`; keep special tokens in what is written, for its tags may be tokens."
)
LOOKED_AT = (
    "The ids stand for the picture or the frames as they were looked at here: a processor that is given the text must be given "
    "the same frames, and set to the same sizes."
)
NOT_TEXT = "The question holds words that are tokens of this model: give the ids, for the text would be read otherwise."


@dataclass(frozen=True)
class Prompt:
    """
    text: as the family's processor takes it beside the clip, with what that puts in left out. ids: with a token for each
    visual token. stop: the id that ends the answer. notices: what to mind. inputs: what transformers' `generate` takes.
    """

    text: str
    ids: list[int]
    stop: int
    inputs: dict[str, Tensor]
    notices: tuple[str, ...]


def prompt(
    model: Model, visual: Frames | None, question: str, options: Sequence[str] = (), pauses: int | None = None,
    how: How = "silent",
) -> Prompt:  # fmt: skip
    """What `ask` feeds before the answer (silent) or the written chain (explicit).

    Errors: ValueError for an answer that the model hasn't learnt to give, for slots that are fed back, or whose input an own
    module makes.
    """
    model.method.expect(how)
    backbone, kind = model.backbone, "multiple choice" if options else "free-form"
    sample = posed(model, visual, question, options, kind, how == "explicit")
    count = model.usual_pauses if pauses is None else pauses
    behind = (*model.method.thinking(count), *map(marker, model.method.marks)) if how == "silent" else ()
    if any(segment.role == "latents" for segment in behind):
        raise ValueError(
            "This model's slots are fed back, one after another: only this engine can answer silently with it."
        )
    packed = pack([Layout({"line": (model.method.context(sample), *behind)})], backbone.encode, backbone.pad)
    ids = packed.ids[0].tolist()
    whole = backbone.decode(ids)
    notices = [SERVED]
    if backbone.tokenizer.encode(whole, add_special_tokens=False) != ids:
        notices.append(NOT_TEXT)
    if visual is not None:
        notices += [LOOKED_AT, *backbone.to_mind(visual.still)]
    return Prompt(backbone.for_processor(whole), ids, backbone.end, inputs(backbone, packed), tuple(notices))


def inputs(backbone: Backbone, packed: Packed) -> dict[str, Tensor]:
    """One sample as `generate` takes it."""
    given = {"input_ids": packed.ids, "attention_mask": torch.ones_like(packed.ids), **backbone.native(packed)}
    if backbone.axes > 1:  # others' are counted alike everywhere
        given["position_ids"] = packed.positions
    return {name: each.to(backbone.device) for name, each in given.items()}
