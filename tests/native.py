"""What the tests that hold the engine against transformers' own classes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.backbones.base import Backbone
from engine.backbones.llama_lite0 import LlamaLite0
from engine.backbones.llava_next import LlavaNextVideo
from engine.backbones.mllama import Mllama
from engine.backbones.qwen3_vl import Qwen3VL
from engine.layout import Packed

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def has_videos(model: Backbone) -> bool:
    return isinstance(model, Qwen3VL | LlavaNextVideo | LlamaLite0)


def of_clip(tiles: Tensor) -> Tensor:
    """uint8 tiles [tiles, 3, side, side], normalised as CLIP's."""
    mean, std = (torch.tensor(x)[None, :, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (tiles / 255 - mean) / std


@contextmanager
def leak_closed(model: Backbone, packed: Packed) -> Iterator[None]:
    """Mllama: tokens before the picture get nothing from cross attention, as in Meta's code. transformers masks their
    feed-forward alone, and lets them look at all patches, padding included."""
    hooks = []
    if isinstance(model, Mllama) and len(packed.visual_row):
        first = int(packed.visual_row[0])

        def close(module: Any, given: Any, out: Any) -> Any:
            if out[0].shape[1] > 1:  # not a single token behind a cache
                out[0][:, :first] = 0
            return out

        layers = model.model.model.language_model.layers
        hooks = [layers[i].cross_attn.register_forward_hook(close) for i in range(len(layers)) if model.crossing[i]]
    yield
    for hook in hooks:
        hook.remove()
