"""The exact prompt behind which a model answers, so that others can serve it: transformers' own `generate`, vLLM.

A model whose slots ride the prefill (pauses), or which writes its thinking tokens itself (Heima), needs nothing of this
project once it is trained: it is a plain checkpoint, and its silent answer is what greedy decoding writes behind this prompt.
Slots that are fed back (Coconut, CODI) need the engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.ask import posed
from engine.backbones.base import Backbone
from engine.backbones.internvl import InternVL
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.layout import Frames, Layout, Packed, marker, pack
from engine.models import Model

How = Literal["silent", "explicit"]
SERVED = (
    "Give the ids as they are, or the text without special tokens added; decode greedily, and without repetition penalty, "
    "until `stop`; keep special tokens in what is written, for its tags may be tokens."
)
AFTER_VIDEO = (
    "transformers 5 gives the text behind a video other positions than the model was trained with: give `generate` the "
    "position_ids of `inputs` too."
)
NOT_TEXT = "The question holds words that are tokens of this model: give the ids, for the text would be read otherwise."


@dataclass(frozen=True)
class Prompt:
    """
    text: as a serving library takes it beside the clip, with one placeholder for a visual where the family's processor
    puts in the rest. ids: with a token for each visual token. stop: the id that ends the answer. notices: what to mind.
    inputs: what transformers' `generate` takes.
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
    if backbone.model.config.model_type == "qwen2_5_vl" and visual is not None and not visual.still:
        notices.append(AFTER_VIDEO)
    return Prompt(placed(backbone, whole), ids, backbone.end, inputs(backbone, packed), tuple(notices))


def placed(backbone: Backbone, whole: str) -> str:
    """Qwen2.5-VL's processor repeats one placeholder a visual by itself; other families' prompts are given as they are."""
    if backbone.model.config.model_type != "qwen2_5_vl":
        return whole
    return re.sub(r"(<\|(?:image|video)_pad\|>)\1+", r"\1", whole)


def inputs(backbone: Backbone, packed: Packed) -> dict[str, Tensor]:
    """One sample as `generate` takes it. Of families with other vision than Qwen2.5-VL's and InternVL's, the text's part."""
    given = {"input_ids": packed.ids, "attention_mask": torch.ones_like(packed.ids)}
    seen: dict[str, Tensor] = {}
    if isinstance(backbone, Qwen25VL):
        given["position_ids"] = packed.positions
        config: Any = backbone.model.config
        image, video = packed.ids == config.image_token_id, packed.ids == config.video_token_id
        given["mm_token_type_ids"] = image.long() + 2 * video.long()
        if packed.grids:
            pixels, grid = backbone.pixels(packed.patches), torch.tensor(packed.grids)
            names = ("pixel_values_videos", "video_grid_thw") if video.any() else ("pixel_values", "image_grid_thw")
            seen = dict(zip(names, (pixels, grid), strict=True))
    elif isinstance(backbone, InternVL) and packed.grids:
        seen = {"pixel_values": backbone.pixels(packed.patches)}
    return {name: each.to(backbone.device) for name, each in (given | seen).items()}
