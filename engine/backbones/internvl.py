"""InternVL3 through transformers' own class (the checkpoints whose names end in -hf): tiles, vision, prompt.

A patch of its visuals is one square tile, uint8 [3, side, side]. An image is cut into up to 12 of them and a thumbnail;
a video is a tile a frame; `grid` counts frames, rows and columns, without the thumbnail. Positions are plain. Knows no
method.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from engine.backbones.base import Backbone, without
from engine.backbones.pixels import normalised, tiles
from engine.layout import Frames, Packed, Special, Visual, Written
from engine.video import Sampling, resize

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SIDE = 448  # of a published model's tile
MOST_TILES = 12
TILE = "<img>(<IMG_CONTEXT>)+</img>"  # or several, in a prompt


@dataclass(frozen=True)
class InternVL(Backbone):
    kind = InternVLForConditionalGeneration

    # Vision

    @property
    def tile_side(self) -> int:
        """Pixels of a tile's side."""
        return self.model.config.vision_config.image_size[0]

    @property
    def tile_tokens(self) -> int:
        config = self.model.config
        return int(self.tile_side // config.vision_config.patch_size[0] * config.downsample_ratio) ** 2

    def sampled(self, sampling: Sampling, still: bool) -> Sampling:
        """A video's frames are a tile each; an image's tiles are cut from the picture as it is."""
        return replace(sampling, size="stored" if still else (self.tile_side, self.tile_side))

    def cut(self, frames: Frames) -> Visual:
        return cut_tiles(frames, self.tile_side)

    def costliest(self, pixels: int, still: bool) -> tuple[int, int]:
        """An image's tiles follow from its shape: 3 to 4, as most photographs are, takes as many as there can be."""
        return (3 * self.tile_side, 4 * self.tile_side) if still else (self.tile_side, self.tile_side)

    def native(self, packed: Packed) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels(packed.patches)} if packed.grids else {}

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """uint8 tiles of all visuals of a batch [tiles, 3, side, side], in one vision pass -> [visual tokens, dim]."""
        return self.encode_pixels(self.pixels(patches))

    def pixels(self, patches: Tensor) -> Tensor:
        """Normalised tiles."""
        return normalised(patches, MEAN, STD)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised tiles [tiles, 3, side, side] -> [visual tokens, dim]."""
        return self.model.model.get_image_features(pixel_values=pixels).pooler_output.flatten(0, 1)

    def language_model(self) -> Any:
        return without(self.model, "vision_tower", "multi_modal_projector")

    # Text

    def written(self, visual: Visual) -> tuple[Written, ...]:
        """An image on a line of its own, a video as a numbered line a frame."""
        start, end = Special("<img>"), Special("</img>")
        if visual.still:
            return start, visual, end, "\n"
        frames = (replace(visual, patches=tile, grid=(1, 1, 1)) for tile in visual.patches.split(1))
        lines = ((f"Frame{number}: ", start, frame, end, "\n") for number, frame in enumerate(frames, 1))
        return tuple(piece for line in lines for piece in line)

    def for_processor(self, text: str) -> str:
        """Its processor writes the tokens around a tile, and the lines of a video's frames but for the end of the last."""
        return re.sub(TILE, r"\1", re.sub(f"(?:Frame\\d+: {TILE}\n)+", "<video>\n", text))

    def places(self, visual: Visual) -> list[int]:
        return [self.model.config.image_token_id] * (len(visual.patches) * self.tile_tokens)


def tile_grid(height: int, width: int, side: int = SIDE, most: int = MOST_TILES) -> tuple[int, int]:
    """(rows, columns) of tiles, `most` at most, whose shape comes closest to the picture's.

    Where several come as close, as 1 x 1 and 2 x 2, the largest that holds less than twice the picture's pixels.
    """
    grids = [(rows, columns) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    best, nearest = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        off = abs(width / height - columns / rows)
        if off < nearest or (off == nearest and rows * columns * side**2 < 2 * height * width):
            best, nearest = (rows, columns), off
    return best


def cut_tiles(frames: Frames, side: int = SIDE, most: int = MOST_TILES) -> Visual:
    """Frames of any size -> square tiles. Needs no model.

    A video's frames are a tile each. A still's tiles go row by row; where they are more than one, a thumbnail of the
    whole comes last.
    """
    rows, columns, pixels = 1, 1, frames.pixels
    if frames.still:
        pixels = pixels[:1]
        rows, columns = tile_grid(pixels.shape[1], pixels.shape[2], side, most)
    pictures = resize(pixels, rows * side, columns * side)
    cut = tiles(pictures, side)
    if rows * columns > 1:
        cut = torch.cat([cut, tiles(resize(pixels, side, side), side)])
    return Visual(cut, (len(pixels), rows, columns), frames.seconds, frames.still)
