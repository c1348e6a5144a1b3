"""Qwen3-VL through transformers' own class: what differs from Qwen2.5-VL.

A video is a slice at a time, each behind its moment in words, so that positions tell no time. The first layers of the
language model take features of earlier vision layers besides (DeepStack, arXiv 2406.04334): added to what they give, where
the visuals stand. Knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.cache_utils import Cache

from engine.backbones.base import Sight, States
from engine.backbones.pixels import normalised
from engine.backbones.qwen2_5_vl import Qwen25VL, cut_patches
from engine.layout import Frames, Packed, Visual, Written
from engine.video import Sampling, resize, smart_size

MEAN = STD = (0.5, 0.5, 0.5)
SLICES = re.compile(
    r"(?:<[\d.]+ seconds><\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>)+"
)  # a video in a prompt


@dataclass(frozen=True)
class DeepSight(Sight):
    deeper: tuple[Tensor, ...]  # a [visual tokens, dim] for each of the first layers
    stop: int  # the row behind the last visual token; from there on nothing is added, and the device isn't waited for


@dataclass(frozen=True)
class Qwen3VL(Qwen25VL):
    kind = Qwen3VLForConditionalGeneration
    attention = "sdpa"

    # Vision

    def cut(self, frames: Frames) -> Visual:
        """Sides that aren't multiples of `patch_side` are brought to the nearest ones."""
        vision, (_, height, width, _) = self.vision_config, frames.pixels.shape
        size = smart_size(height, width, self.patch_side, (height + self.patch_side) * (width + self.patch_side))
        pixels = resize(frames.pixels, *size)
        temporal = vision.temporal_patch_size
        visual = cut_patches(replace(frames, pixels=pixels), vision.patch_size, vision.spatial_merge_size, temporal)
        last = len(pixels) - 1  # repeated where a slice isn't full
        slices = [[min(start + i, last) for i in (0, temporal - 1)] for start in range(0, len(pixels), temporal)]
        return replace(visual, moments=tuple((first + end) / 2 * frames.seconds for first, end in slices))

    def pixels(self, patches: Tensor) -> Tensor:
        return normalised(patches, MEAN, STD)

    def encode_pixels(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        return self.seen(pixels, grids).pooler_output

    def seen(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Any:
        """Normalised patches [patches, columns] -> what the vision encoder gives, early layers' features included."""
        visual = self.model.model.visual
        return visual(pixels.to(visual.dtype), grid_thw=torch.tensor(grids, device=pixels.device))

    def look(self, packed: Packed) -> Sight | None:
        if not packed.grids:
            return None
        out = self.seen(self.pixels(packed.patches), packed.grids)
        row, deeper = packed.visual_row, tuple(out.deepstack_features)
        return DeepSight(packed.visual_sample, row, out.pooler_output, deeper, int(row.max()) + 1)

    # Text

    def written(self, visual: Visual) -> tuple[Written, ...]:
        """An image as in Qwen2.5-VL; a video's slices each behind `<1.5 seconds>`, the mean of its frames' moments."""
        if visual.still:
            return super().written(visual)
        _, height, width = visual.grid
        pieces: list[Written] = []
        for moment, patches in zip(visual.moments, visual.patches.split(height * width), strict=True):
            one = replace(visual, patches=patches, grid=(1, height, width), moments=(moment,))
            pieces += [f"<{moment:.1f} seconds>", *super().written(one)]
        return tuple(pieces)

    def for_processor(self, text: str) -> str:
        """Of a video its processor writes the moments and the tokens around each slice too."""
        return super().for_processor(SLICES.sub("<|video_pad|>", text))

    def to_mind(self, still: bool) -> tuple[str, ...]:
        return ()

    def processor_sizes(self, sampling: Sampling, image_pixels: int) -> dict[str, dict[str, Any]]:
        """Its video processor's bounds are those of all frames together, which a card can say and a setting can't."""
        sizes = super().processor_sizes(sampling, image_pixels)
        del sizes["video_processor"]["size"]
        return sizes

    def interval(self, visual: Visual) -> float:
        return 1

    # Forward

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None, sight: Sight | None = None
    ) -> States:
        deep: dict[str, Any] = {}
        batch, length, _ = embeds.shape
        past = mask.shape[-1] - length
        if isinstance(sight, DeepSight) and past < sight.stop:
            here = (sight.row >= past) & (sight.row < past + length)
            where = torch.zeros(batch, length, dtype=torch.bool, device=embeds.device)
            where[sight.sample[here], sight.row[here] - past] = True
            if bool(here.any()):
                deep = {"visual_pos_masks": where, "deepstack_visual_embeds": [level[here] for level in sight.deeper]}
        out = self.decoded(embeds, positions, mask, cache, **deep)
        return States(out.hidden_states, out.attentions)
