"""What transformers' own classes are fed, made by hand from a pack with one sample and one branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.backbones.base import Backbone
from engine.backbones.internvl import InternVL
from engine.backbones.llama_lite0 import LlamaLite0
from engine.backbones.llava_next import LlavaNext, LlavaNextVideo
from engine.backbones.mllama import Mllama
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.backbones.qwen3_vl import Qwen3VL
from engine.layout import Packed, Visual

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def has_videos(model: Backbone) -> bool:
    return isinstance(model, Qwen3VL | LlavaNextVideo | LlamaLite0)


def of_clip(tiles: Tensor) -> Tensor:
    """uint8 tiles [tiles, 3, side, side], normalised as CLIP's."""
    mean, std = (torch.tensor(x)[None, :, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (tiles / 255 - mean) / std


def fed_to_transformers(model: Backbone, packed: Packed, visual: Visual | None) -> dict[str, Any]:
    config = model.model.config
    if isinstance(model, Qwen25VL):  # and Qwen3-VL
        kinds = (packed.ids == config.image_token_id).int() + 2 * (packed.ids == config.video_token_id).int()
        if visual is None:
            return {"mm_token_type_ids": kinds}
        pixels, grid = model.pixels(visual.patches), torch.tensor([visual.grid])
        names = ("pixel_values", "image_grid_thw") if visual.still else ("pixel_values_videos", "video_grid_thw")
        seconds = {} if isinstance(model, Qwen3VL) else {"second_per_grid_ts": torch.tensor([visual.seconds])}
        return {"mm_token_type_ids": kinds, names[0]: pixels, names[1]: grid, **seconds}
    if visual is None:
        return {}
    if isinstance(model, InternVL):
        mean, std = (torch.tensor(x)[None, :, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return {"pixel_values": (visual.patches / 255 - mean) / std}
    if isinstance(model, LlamaLite0):
        return {"pixel_values": model.pixels(visual.patches)}
    pixels = of_clip(visual.patches)[None]
    if isinstance(model, Mllama):
        _, rows, columns = visual.grid
        count, place = rows * columns, int(packed.visual_row[0])
        tiles = torch.zeros(1, 1, 4, *pixels.shape[2:])
        tiles[0, 0, :count] = pixels
        real = (torch.arange(4) < count).long()
        looks = torch.zeros(1, packed.ids.shape[1], 1, 4, dtype=torch.long)
        looks[0, place:, 0] = real
        shape = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]].index([rows, columns]) + 1
        return {
            "pixel_values": tiles, "aspect_ratio_ids": torch.tensor([[shape]]), "aspect_ratio_mask": real[None, None],
            "cross_attention_mask": looks,
        }  # fmt: skip
    assert isinstance(model, LlavaNext)
    if visual.still:
        return {"pixel_values": pixels, "image_sizes": torch.tensor([visual.grid[1:]])}
    return {"pixel_values_videos": pixels}


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
