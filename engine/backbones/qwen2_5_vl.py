"""Qwen2.5-VL through transformers' own class: patches, vision, mRoPE positions, forward. Knows no method.

Positions are always computed here and always passed. They follow the rule that the model was trained with: text after a
video goes on at 1 + the largest position used so far (transformers 5.23 computes start + max(height, width) instead).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as cached
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from engine import masks
from engine.backbones.base import SPECIAL_TOKENS, Backbone, Sight, States, once, without
from engine.backbones.pixels import normalised
from engine.layout import Encoded, Frames, Packed, Segment, Special, Visual, Written
from engine.video import Sampling

if TYPE_CHECKING:
    from typing_extensions import Self

AFTER_VIDEO = (
    "transformers 5 gives the text behind a video other positions than the model was trained with: give `generate` the "
    "position_ids of `inputs` too."
)


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


def joined(grids: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of one height and width as one: vision looks at each slice for itself, whichever visual it belongs to."""
    return [(sum(time for time, *_ in same), *size) for size, same in groupby(grids, lambda grid: grid[1:])]


@dataclass(frozen=True)
class Runs:
    """Patches that see each other and no others: windows, or whole slices."""

    places: tuple[Tensor, ...]  # for each length that runs have, where their patches stand: [runs, length]
    back: Tensor  # [patches]: where each patch stands among all of these, one after another

    @classmethod
    def between(cls, bounds: Tensor, device: torch.device) -> Self:
        """bounds: where each run begins, and the end of the last [runs + 1]."""
        lengths = bounds.diff()
        places = [bounds[:-1][lengths == n, None] + torch.arange(int(n)) for n in lengths.unique()]
        back = torch.cat([place.flatten() for place in places]).argsort()
        return cls(tuple(place.to(device) for place in places), back.to(device))


def runs_attention(module, query, key, value, attention_mask, runs: Mapping[nn.Module, Runs], **kwargs):  # noqa: ANN001, ANN003, ANN201
    """transformers' SDPA over all runs of one length at once, where its own code calls SDPA for one run after another.

    query, key, value: [1, heads, patches, dim]; runs: those of each layer's attention -> [1, patches, heads, dim].
    """
    places, back = runs[module].places, runs[module].back

    def cut(x: Tensor, place: Tensor) -> Tensor:  # [1, heads, patches, dim] -> [runs, heads, length, dim]
        return (x[0][:, place] if len(places) > 1 else x[0].unflatten(1, place.shape)).transpose(0, 1)

    out = []
    for place in places:
        seen = (cut(query, place), cut(key, place), cut(value, place))
        out.append(sdpa_attention_forward(module, *seen, None, **kwargs)[0].flatten(0, 1))
    return (torch.cat(out)[back] if len(out) > 1 else out[0])[None], None


class WholePatches(nn.Conv3d):
    """A convolution that takes each patch whole, its kernel as large as the patch: one matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        """[patches, channels, frames, height, width] -> [patches, dim, 1, 1, 1]"""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


ROWS = 64  # a block of queries
LONG = 2048  # rows from which on a GPU's training goes by flex attention: there the half of the square that it skips is large


@cached
def compiled_attention() -> Any:
    """Flex attention as kernels, built where it is first called.

    Lengths differ from step to step: with dynamic shapes one kernel serves them all, where one for each padded length
    would soon reach the number of times that torch compiles a function.
    """
    return torch.compile(flex_attention, dynamic=True)


def blocks_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, flex: Any) -> Tensor:
    """Attention to the blocks that the mask names, by `flex`: flex_attention, compiled or not.

    query [batch, heads, rows, dim], key and value [batch, key heads, rows, dim] -> [batch, rows, heads, dim]. Under
    autocast rotary positions leave queries and keys in another type than the values, and flex attention takes one.

    The scale is what flex attention has by itself, dim ** -0.5, times what is multiplied in here, for most models 1: one
    that is handed over becomes an unknown of the compiled kernel where shapes are dynamic.
    """
    query = (query * (scaling * query.shape[-1] ** 0.5)).to(value.dtype)
    out = flex(query, key.to(value.dtype), value, block_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def rows_attention(module, query, key, value, attention_mask, **kwargs):  # noqa: ANN001, ANN003, ANN201
    """Attention on a CPU: nobody sees what comes later, so each block of rows needs the keys up to its own end only.

    Under autocast it stays in float32, where the backward pass of torch's bfloat16 kernel takes 1.3 times as long.
    On a GPU it is transformers' SDPA, or flex attention where the mask is a BlockMask.
    query [batch, heads, rows, dim], key and value [batch, key heads, past + rows, dim], attention_mask: additive, lower
    triangular -> [batch, rows, heads, dim].
    """
    if isinstance(attention_mask, BlockMask):
        return blocks_attention(query, key, value, attention_mask, kwargs["scaling"], compiled_attention()), None
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


def register_attention() -> None:
    """Makes the attention functions of this file known to transformers, before a model is made that names them."""
    AttentionInterface.register("runs", runs_attention)
    AttentionInterface.register("rows", rows_attention)


def whole_patches(model: Any) -> None:
    """The patch embedding becomes one matrix product, in place: same weights, same names."""
    model.model.visual.patch_embed.proj.__class__ = WholePatches


@dataclass(frozen=True)
class Qwen25VL(Backbone):
    axes = 3  # time, height, width

    kind: ClassVar[Any] = Qwen2_5_VLForConditionalGeneration
    attention: ClassVar[str | Mapping[str, str]] = MappingProxyType({"text_config": "rows", "vision_config": "runs"})

    @classmethod
    def load(
        cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
        tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> Self:  # fmt: skip
        register_attention()
        backbone = super().load(path, device, dtype, tokens)
        whole_patches(backbone.model)
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
        grid = torch.tensor(joined(grids))  # on the CPU: what is counted from it then waits for no device
        more = self.runs(grid, pixels.device) if self.vision_config._attn_implementation == "runs" else {}
        return visual(pixels.to(visual.dtype), grid_thw=grid.to(pixels.device), **more).pooler_output

    def runs(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """What the vision encoder is told besides, so that its attention is called once a layer, with the runs of each."""
        vision, merge = self.vision_config, self.vision_config.spatial_merge_size
        index, windows = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
        bounds = get_vision_cu_seqlens(grid)
        each = {True: Runs.between(bounds, device), False: Runs.between(windows, device)}
        blocks = enumerate(self.model.model.visual.blocks)
        return {
            "position_ids": get_vision_position_ids(grid, merge).to(device),
            "window_index": index.to(device),
            "cu_seqlens": bounds[[0, -1]],
            "cu_window_seqlens": bounds[[0, -1]],
            "runs": {block.attn: each[place in vision.fullatt_block_indexes] for place, block in blocks},
        }

    def native(self, packed: Packed) -> dict[str, Tensor]:
        config = self.model.config
        image, video = packed.ids == config.image_token_id, packed.ids == config.video_token_id
        kinds = {"mm_token_type_ids": image.long() + 2 * video.long()}
        if not packed.grids:
            return kinds
        pixels, grid = ("pixel_values_videos", "video_grid_thw") if video.any() else ("pixel_values", "image_grid_thw")
        return {**kinds, pixels: self.pixels(packed.patches), grid: torch.tensor(packed.grids)}

    def looks(self, packed: Packed) -> list[tuple[int, int]]:
        """Layers whose windows are smaller than a slice compute a little less."""
        return [(time, height * width) for time, height, width in packed.grids]

    def costliest(self, pixels: int, still: bool) -> tuple[int, int]:
        return largest_frame(pixels, self.patch_side)

    def language_model(self) -> Any:
        return without(self.model, "visual")

    # Text

    def written(self, visual: Visual) -> tuple[Written, ...]:
        return Special("<|vision_start|>"), visual, Special("<|vision_end|>")

    def for_processor(self, text: str) -> str:
        return once(text, "<|image_pad|>", "<|video_pad|>")

    def to_mind(self, still: bool) -> tuple[str, ...]:
        return () if still else (AFTER_VIDEO,)

    def processor_sizes(self, sampling: Sampling, image_pixels: int) -> dict[str, dict[str, Any]]:
        least = self.patch_side**2
        frames = {"fps": sampling.fps, "min_frames": sampling.min_frames, "max_frames": sampling.max_frames}
        return {
            "image_processor": {"size": {"shortest_edge": least, "longest_edge": image_pixels}},
            "video_processor": {"size": {"shortest_edge": least, "longest_edge": sampling.pixels}, **frames},
        }

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
        return States(out.hidden_states, out.attentions)

    def whole(self, embeds: Tensor, packed: Packed, cache: Cache | None = None, sight: Sight | None = None) -> States:
        """As every family's; a long pack that is trained on a GPU under a BlockMask, which only "rows" understands."""
        config, trained = self.text_config, torch.is_grad_enabled() and cache is None
        blockwise = config._attn_implementation == "rows" and not config.attention_dropout  # which flex doesn't have
        if not (blockwise and trained and embeds.is_cuda and embeds.shape[1] >= LONG):
            return super().whole(embeds, packed, cache, sight)
        out = self.decoded(embeds, packed.positions, {"full_attention": masks.blocks(packed)}, None)
        return States(out.hidden_states, out.attentions)


def largest_frame(pixels: int, side: int) -> tuple[int, int]:
    """Height and width of the largest frame of at most so many pixels, both multiples of `side`, no more than 2 to 1."""
    most = max(1, math.isqrt(pixels * 2) // side)
    sizes = [(h, w) for h in range(1, most + 1) for w in range(h, 2 * h + 1) if h * w * side**2 <= pixels]
    height, width = max(sizes, key=lambda size: size[0] * size[1], default=(1, 1))
    return height * side, width * side


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
