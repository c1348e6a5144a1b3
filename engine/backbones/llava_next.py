"""LLaVA-NeXT and LLaVA-NeXT-Video through transformers' own classes: tiles, vision, prompt.

A patch of their visuals is one square tile, uint8 [3, side, side]. An image is a tile of the whole, then those of the
resolution that suits it best, without the tokens of what was added to fill that; every row of tokens ends in one that marks
it. Of a video each frame is a tile whose tokens are pooled. `grid` of an image is 1 and its height and width in pixels,
from which its tokens are counted; of a video, frames and tokens down and across. Positions are plain. Knows no method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaNextVideoForConditionalGeneration

from engine.backbones.base import Backbone, once, without
from engine.backbones.pixels import normalised, tiles
from engine.config import ConfigError
from engine.layout import Frames, Opening, Packed, Visual, Written
from engine.video import Sampling, resize

VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


@dataclass(frozen=True)
class LlavaNext(Backbone):
    kind: ClassVar[Any] = LlavaNextForConditionalGeneration

    # Vision

    @property
    def tile_side(self) -> int:
        """Pixels of a tile's side."""
        return self.model.config.vision_config.image_size

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile's side."""
        return self.tile_side // self.model.config.vision_config.patch_size

    def sampled(self, sampling: Sampling, still: bool) -> Sampling:
        return replace(sampling, size="stored")

    def cut(self, frames: Frames) -> Visual:
        if not frames.still:
            raise ConfigError(
                "LLaVA-NeXT looks at images, not at videos: give it one picture, or take LLaVA-NeXT-Video."
            )
        return cut_tiles(frames, self.tile_side, self.model.config.image_grid_pinpoints)

    def costliest(self, pixels: int, still: bool) -> tuple[int, int]:
        """One that fills the resolution of the most tokens."""
        known = self.model.config.image_grid_pinpoints

        def tokens(size: Sequence[int]) -> int:
            return image_tokens(size[0], size[1], self.tile_side, self.tile_tokens, known)

        tall, wide = max(known, key=tokens)
        return tall, wide

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """uint8 tiles of all visuals of a batch [tiles, 3, side, side] -> [visual tokens, dim]."""
        return torch.cat(self.encode_images(self.pixels(patches), [grid[1:] for grid in grids]))

    def pixels(self, patches: Tensor) -> Tensor:
        """Normalised tiles."""
        return normalised(patches).to(self.model.dtype)

    def native(self, packed: Packed) -> dict[str, Tensor]:
        if not packed.grids:
            return {}
        return {"pixel_values": self.pixels(packed.patches)[None], "image_sizes": torch.tensor(packed.grids)[:, 1:]}

    def encode_images(self, pixels: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Normalised tiles [tiles, 3, side, side] of pictures of these (height, width) -> a [visual tokens, dim] each."""
        return self.model.model.get_image_features(pixels, torch.tensor(sizes)).pooler_output

    def language_model(self) -> Any:
        return without(self.model, "vision_tower", "multi_modal_projector")

    # Text

    @property
    def spaced(self) -> bool:
        """Whether the tokenizer sets a space before every text that it is given, as Vicuna's does."""
        return len(self.tokenizer.encode("\n", add_special_tokens=False)) > 1

    def text_ids(self, text: str) -> list[int]:
        """Without that space: pieces are parts of a text."""
        return super().text_ids(f"\n{text}")[2:] if self.spaced else super().text_ids(text)

    def chat(self, opening: Opening) -> tuple[str, str, str]:
        """With the system prompt of the model's own format, if it has one."""
        before, between, behind = super().chat(Opening())
        if self.spaced:
            before = before.replace(self.tokenizer.bos_token, f"{self.tokenizer.bos_token} ", 1)
        return before, between, behind

    def published_chat(self, opening: Opening) -> tuple[str, str, str]:
        """Vicuna's."""
        return f"{self.tokenizer.bos_token}{VICUNA}USER: ", " ASSISTANT:", self.tokenizer.eos_token

    def written(self, visual: Visual) -> tuple[Written, ...]:
        return visual, "\n"

    def for_processor(self, text: str) -> str:
        return once(text, "<image>", "<video>")

    def places(self, visual: Visual) -> list[int]:
        _, height, width = visual.grid
        count = image_tokens(height, width, self.tile_side, self.tile_tokens, self.model.config.image_grid_pinpoints)
        return [self.model.config.image_token_index] * count


@dataclass(frozen=True)
class LlavaNextVideo(LlavaNext):
    kind = LlavaNextVideoForConditionalGeneration

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame's side."""
        return self.tile_tokens // self.model.config.spatial_pool_stride

    def cut(self, frames: Frames) -> Visual:
        if not frames.still:
            tiles = cut_frames(frames.pixels, self.tile_side)
            return Visual(tiles, (len(tiles), self.frame_tokens, self.frame_tokens), frames.seconds)
        if frames.pixels.shape[1:3] == (self.frame_tokens, self.frame_tokens):  # its grid would be that of a frame
            frames = replace(frames, pixels=resize(frames.pixels, self.tile_side, self.tile_side))
        return super().cut(frames)

    def tiles(self, grid: tuple[int, int, int]) -> int:
        if self.is_video(grid):
            return grid[0]
        tall, wide = best_resolution(*grid[1:], self.model.config.image_grid_pinpoints)
        return 1 + (tall // self.tile_side) * (wide // self.tile_side)

    def native(self, packed: Packed) -> dict[str, Tensor]:
        if not packed.grids or not self.is_video(packed.grids[0]):
            return super().native(packed)
        return {"pixel_values_videos": self.pixels(packed.patches)[None]}

    def is_video(self, grid: tuple[int, int, int]) -> bool:
        return grid[1:] == (self.frame_tokens, self.frame_tokens)

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        pixels = self.pixels(patches).split([self.tiles(grid) for grid in grids])
        moving = [self.is_video(grid) for grid in grids]
        found: dict[int, Tensor] = {}
        if stills := [index for index, moves in enumerate(moving) if not moves]:
            sizes = [grids[index][1:] for index in stills]
            found |= zip(stills, self.encode_images(torch.cat([pixels[index] for index in stills]), sizes), strict=True)
        if videos := [index for index, moves in enumerate(moving) if moves]:
            frames = torch.cat([pixels[index] for index in videos])[None]  # each frame is pooled by itself
            features = self.model.model.get_video_features(frames).pooler_output[0]
            found |= zip(videos, features.split([math.prod(grids[index]) for index in videos]), strict=True)
        return torch.cat([found[index] for index in range(len(grids))])

    def language_model(self) -> Any:
        return without(self.model, "vision_tower", "multi_modal_projector", "vision_resampler")

    def places(self, visual: Visual) -> list[int]:
        if visual.still:
            return super().places(visual)
        return [self.model.config.video_token_index] * math.prod(visual.grid)


def best_resolution(height: int, width: int, known: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (height, width) of those known in which most of the picture's pixels are kept; of several the least empty."""

    def kept(tall: int, wide: int) -> int:
        scale = min(wide / width, tall / height)
        return min(int(width * scale) * int(height * scale), height * width)

    tall, wide = max(known, key=lambda size: (kept(*size), kept(*size) - size[0] * size[1]))
    return tall, wide


def image_tokens(height: int, width: int, side: int, tokens: int, known: Sequence[Sequence[int]]) -> int:
    """How many tokens a picture becomes. side, tokens: of a tile's side, in pixels and in tokens."""
    tall, wide = best_resolution(height, width, known)
    rows, columns = tall // side * tokens, wide // side * tokens
    # What fills the resolution is left out, evenly at both sides: it is counted as transformers counts it.
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return tokens**2 + rows * (columns + 1)


def cut_tiles(frames: Frames, side: int, known: Sequence[Sequence[int]]) -> Visual:
    """The first frame -> a tile of the whole, squeezed, then those of the best resolution, row by row, where it keeps its
    shape in the middle and the rest is black."""
    picture = frames.pixels[:1]
    height, width = picture.shape[1:3]
    tall, wide = best_resolution(height, width, known)
    if wide / width < tall / height:
        inner = min(math.ceil(height * (wide / width)), tall), wide
    else:
        inner = tall, min(math.ceil(width * (tall / height)), wide)
    top, left = (tall - inner[0]) // 2, (wide - inner[1]) // 2
    canvas = np.zeros((tall, wide, 3), np.uint8)
    canvas[top : top + inner[0], left : left + inner[1]] = resize(picture, *inner)[0]
    cut = torch.cat([tiles(resize(picture, side, side), side), tiles(canvas[None], side)])
    return Visual(cut, (1, height, width), frames.seconds, still=True)


def cut_frames(pixels: np.ndarray, side: int) -> Tensor:
    """Frames -> a tile each: the shorter side fills it, the longer one is cut off evenly. uint8 [frames, 3, side, side]."""
    _, height, width, _ = pixels.shape
    shorter = min(height, width)
    tall, wide = int(side * height / shorter), int(side * width / shorter)
    top, left = (tall - side) // 2, (wide - side) // 2
    frames = resize(pixels, tall, wide)[:, top : top + side, left : left + side]
    return tiles(np.ascontiguousarray(frames), side)
