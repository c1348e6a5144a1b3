"""Qwen2.5-VL through transformers' own class: patches, vision, mRoPE positions, forward. Knows no method.

Positions are always computed here and always passed. They follow the rule that the model was trained with: text after a
video goes on at 1 + the largest position used so far (transformers 5.23 computes start + max(height, width) instead).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engine.backbones.base import SPECIAL_TOKENS, Backbone, Sight, States, without
from engine.backbones.pixels import normalised
from engine.layout import Encoded, Frames, Segment, Special, Visual, Written
from engine.video import Sampling

if TYPE_CHECKING:
    from typing_extensions import Self


def rotary_positions(grid: tuple[int, int, int], merge: int, interval: float) -> tuple[Tensor, int]:
    """mRoPE positions of one visual's tokens, relative to its first.

    grid: patches in time, height, width; interval: temporal positions between two slices (seconds x tokens a second).
    -> ([3, tokens] time, height, width), and the extent: 1 + the largest position.
    """
    time, height, width = grid[0], grid[1] // merge, grid[2] // merge
    t = (torch.arange(time, dtype=torch.float64) * interval).long()
    axes = torch.meshgrid(t, torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack(axes).reshape(3, -1)
    return positions, int(positions.max()) + 1


def slices_attention(module, query, key, value, attention_mask, slice_length: int = 0, **kwargs):  # noqa: ANN001, ANN003, ANN201
    """transformers' SDPA over equally long slices at once, where its own code calls SDPA for one slice after another.

    query, key, value: [1, heads, patches, dim]; slice_length 0 = one slice.
    """
    if not slice_length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length = query.shape[2]

    def cut(x: Tensor) -> Tensor:  # -> [slices, heads, slice length, dim]
        return x[0].unflatten(1, (-1, slice_length)).transpose(0, 1)

    out, weights = sdpa_attention_forward(module, cut(query), cut(key), cut(value), None, **kwargs)
    return out.reshape(1, length, *out.shape[2:]), weights


class WholePatches(nn.Conv3d):
    """A convolution that takes each patch whole, its kernel as large as the patch: one matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        """[patches, channels, frames, height, width] -> [patches, dim, 1, 1, 1]"""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


ROWS = 64  # a block of queries


def rows_attention(module, query, key, value, attention_mask, **kwargs):  # noqa: ANN001, ANN003, ANN201
    """Attention on a CPU: nobody sees what comes later, so each block of rows needs the keys up to its own end only.

    Under autocast it stays in float32, where the backward pass of torch's bfloat16 kernel takes 1.3 times as long.
    query [batch, heads, rows, dim], key and value [batch, key heads, past + rows, dim], attention_mask: additive, lower
    triangular -> [batch, rows, heads, dim].
    """
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length, stop, dtype = key.shape[2], key.shape[2] - query.shape[2], value.dtype
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attention_mask = query.float(), key.float(), value.float(), attention_mask.float()
    blocks = []
    with torch.autocast("cpu", enabled=False):
        for rows, mask in zip(query.split(ROWS, dim=2), attention_mask.split(ROWS, dim=2), strict=True):
            stop += rows.shape[2]
            seen = (key, value, mask)
            if stop < length:  # a part's gradient is copied into one of the whole's size
                seen = (key[:, :, :stop], value[:, :, :stop], mask[..., :stop])
            blocks.append(sdpa_attention_forward(module, rows, *seen, **kwargs)[0])
    return torch.cat(blocks, dim=1).to(dtype), None


@dataclass(frozen=True)
class Qwen25VL(Backbone):
    axes = 3  # time, height, width

    kind: ClassVar[Any] = Qwen2_5_VLForConditionalGeneration
    attention: ClassVar[str | Mapping[str, str]] = MappingProxyType({"text_config": "rows", "vision_config": "slices"})

    @classmethod
    def load(
        cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
        tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> Self:  # fmt: skip
        AttentionInterface.register("slices", slices_attention)
        AttentionInterface.register("rows", rows_attention)
        backbone = super().load(path, device, dtype, tokens)
        backbone.model.model.visual.patch_embed.proj.__class__ = WholePatches  # same weights, same names
        return backbone

    # Vision

    @property
    def vision_config(self) -> Any:
        return self.model.config.vision_config

    @property
    def patch_side(self) -> int:
        """A frame's sides must be multiples of this many pixels."""
        vision = self.vision_config
        return vision.patch_size * vision.spatial_merge_size

    def sampled(self, sampling: Sampling, still: bool) -> Sampling:
        return replace(sampling, factor=self.patch_side)

    def cut(self, frames: Frames) -> Visual:
        vision = self.vision_config
        return cut_patches(frames, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """uint8 patches of all visuals of a batch, in one vision pass -> [visual tokens, dim]."""
        return self.encode_pixels(self.pixels(patches), grids)

    def pixels(self, patches: Tensor) -> Tensor:
        """Normalised patches."""
        return normalised(patches)

    def encode_pixels(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Normalised patches [patches, columns] -> [visual tokens, dim]."""
        visual = self.model.model.visual
        vision = self.vision_config
        window = vision.window_size // vision.patch_size
        kwargs: dict[str, Any] = {}
        if vision._attn_implementation == "slices" and len({g[1:] for g in grids}) == 1 and max(grids[0][1:]) <= window:
            # Every slice is one window of the same length: attention runs over all of them at once.
            whole = torch.tensor([0, len(pixels)], dtype=torch.int32, device=pixels.device)
            index = torch.arange(len(pixels) // vision.spatial_merge_size**2, device=pixels.device)
            kwargs = {"cu_seqlens": whole, "cu_window_seqlens": whole, "window_index": index}
            kwargs["slice_length"] = grids[0][1] * grids[0][2]
        grid_thw = torch.tensor(grids, device=pixels.device)
        return visual(pixels.to(visual.dtype), grid_thw=grid_thw, **kwargs).pooler_output

    def language_model(self) -> Any:
        return without(self.model, "visual")

    # Text

    def written(self, visual: Visual) -> tuple[Written, ...]:
        return Special("<|vision_start|>"), visual, Special("<|vision_end|>")

    def interval(self, visual: Visual) -> float:
        """Temporal positions between two slices."""
        return 1 if visual.still else visual.seconds * self.vision_config.tokens_per_second

    def encode(self, segment: Segment) -> Encoded:
        config, merge = self.model.config, self.vision_config.spatial_merge_size
        ids: list[int] = []
        positions: list[Tensor] = []
        visuals: list[tuple[Visual, list[int]]] = []
        start = told = 0  # the next position; the tokens that have theirs

        def text() -> None:
            """Positions for the words since the last visual: 0, 1, 2 ... on all axes."""
            nonlocal start, told
            stop = start + len(ids) - told
            positions.append(torch.arange(start, stop).expand(3, -1))
            start, told = stop, len(ids)

        for piece in self.written_out(segment):
            if isinstance(piece, Visual):
                text()
                relative, extent = rotary_positions(piece.grid, merge, self.interval(piece))
                visuals.append((piece, list(range(told, told + relative.shape[1]))))
                ids += [config.image_token_id if piece.still else config.video_token_id] * relative.shape[1]
                positions.append(relative + start)
                start, told = start + extent, len(ids)
            else:
                ids += self.piece_ids(piece)
        text()
        return Encoded(ids, torch.cat(positions, dim=1), start, visuals)

    # Forward

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None, sight: Sight | None = None
    ) -> States:
        out = self.decoded(embeds, positions, {"full_attention": mask}, cache)
        return States(out.hidden_states, cache, out.attentions)


def cut_patches(frames: Frames, side: int, merge: int, temporal: int) -> Visual:
    """Frames -> patches in the order of transformers' own processor. Needs no model.

    Sides must be multiples of `side * merge`; the last frame is repeated until the count fills the last temporal slice.
    """
    pixels = frames.pixels
    _, height, width, _ = pixels.shape
    if height % (side * merge) or width % (side * merge):
        raise ValueError(f"Frames of {width}x{height} pixels: both sides must be multiples of {side * merge}.")
    if frames.still:
        pixels = np.repeat(pixels[:1], temporal, axis=0)
    elif short := -len(pixels) % temporal:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], short, axis=0)])
    time, rows, columns = len(pixels) // temporal, height // side, width // side
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    # A patch's row of one colour lies together there, and moves as one: [channel, time, frame in slice, block row, row in
    # block, y, block column, column in block] -> [time, block row, block column, row, column, channel, frame, y]
    runs = planes.view(np.dtype((np.void, side))).reshape(
        3, time, temporal, rows // merge, merge, side, columns // merge, merge
    )
    ordered = np.ascontiguousarray(runs.transpose(1, 3, 6, 4, 7, 0, 2, 5)).view(np.uint8)
    patches = torch.from_numpy(ordered.reshape(time * rows * columns, 3 * temporal * side * side))
    return Visual(patches, (time, rows, columns), frames.seconds * temporal, frames.still)
