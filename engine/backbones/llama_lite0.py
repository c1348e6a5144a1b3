"""A Llama that sees: transformers' own class with EfficientNet-lite0 before it, which stays as it is, and a projector between.

Small enough for a CPU. A frame is one square tile, uint8 [3, side, side], and one map of the tower's. Four frames that follow
each other are a slice, and the projector makes a few tokens of each slice's maps, a line of the prompt; a picture is a slice of
four like frames. `grid` counts slices, 1, and the tokens of one. Positions are plain. Knows no method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from engine.backbones.base import Backbone, without
from engine.backbones.efficientnet import CHANNELS, MEAN, STD, STRIDE, EfficientNetLite0
from engine.backbones.pixels import normalised, tiles
from engine.layout import Frames, Packed, Visual, Written
from engine.video import Sampling, resize

NO_PROCESSOR = (
    "transformers has neither this class nor a processor for it: give the ids and `inputs` to the engine's own."
)
VISION = ("vision_tower", "vision_projector")


class LlamaLite0Config(LlamaConfig):
    """Llama's, and what vision adds to it."""

    model_type = "llama_lite0"

    side: int = 224  # pixels of a frame's
    slice_frames: int = 4
    slice_tokens: int = 4
    cell_width: int = 32  # numbers that are kept of a map's cell
    projector_width: int = 768
    video_token_id: int = 0  # stands for a visual token


class Projector(nn.Module):
    """Every token of a slice is made of all its frames' cells, so that each can tell the whole."""

    def __init__(self, config: LlamaLite0Config) -> None:
        super().__init__()
        cells = config.slice_frames * (config.side // STRIDE) ** 2
        self.tokens = config.slice_tokens
        self.cells = nn.Linear(CHANNELS, config.cell_width)
        self.norm = nn.LayerNorm(cells * config.cell_width)  # else a step too large leaves nothing but the bias
        self.whole = nn.Linear(cells * config.cell_width, config.projector_width)
        self.words = nn.Linear(config.projector_width, self.tokens * config.hidden_size)

    def forward(self, maps: Tensor) -> Tensor:
        """[frames, CHANNELS, height, width] -> [slices x tokens, dim]"""
        cells = F.gelu(self.cells(maps.flatten(2).mT)).reshape(-1, self.whole.in_features)
        return self.words(F.gelu(self.whole(self.norm(cells)))).unflatten(-1, (self.tokens, -1)).flatten(0, 1)


class LlamaLite0ForCausalLM(LlamaForCausalLM):
    """`generate` takes it as it takes Llama, with normalised frames as pixel_values."""

    config_class = LlamaLite0Config
    config: LlamaLite0Config
    model: Any  # Llama's, with the two parts of vision in it

    def __init__(self, config: LlamaLite0Config) -> None:
        super().__init__(config)
        self.model.vision_tower = EfficientNetLite0().requires_grad_(False)
        self.model.vision_projector = Projector(config)

    def maps(self, pixels: Tensor) -> Tensor:
        """The tower's, of normalised frames [frames, 3, side, side]."""
        with torch.no_grad():
            return self.model.vision_tower(pixels.contiguous(memory_format=torch.channels_last))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None, inputs_embeds: Tensor | None = None, **given: Any,
    ) -> Any:  # fmt: skip
        if input_ids is not None and pixel_values is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            here = input_ids == self.config.video_token_id
            if here.any():  # else what was seen is in the cache
                seen = self.model.vision_projector(self.maps(pixel_values))
                inputs_embeds = inputs_embeds.masked_scatter(here[..., None], seen.to(inputs_embeds.dtype))
            input_ids = None
        return super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **given)


@dataclass(frozen=True)
class LlamaLite0(Backbone):
    kind = LlamaLite0ForCausalLM

    def shorten(self) -> None:
        """Weights in bfloat16, but the tower's, which stay what they were published as."""
        for name, weight in self.model.named_parameters():
            if not name.startswith("model.vision_tower."):
                weight.data = weight.data.bfloat16()

    # Vision

    def sampled(self, sampling: Sampling, still: bool) -> Sampling:
        side = self.model.config.side
        return replace(sampling, size=(side, side))

    def cut(self, frames: Frames) -> Visual:
        config = self.model.config
        pixels, length = frames.pixels, config.slice_frames
        if frames.still:
            pixels = np.repeat(pixels[:1], length, axis=0)
        elif short := -len(pixels) % length:
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], short, axis=0)])
        cut = tiles(resize(pixels, config.side, config.side), config.side)
        return Visual(cut, (len(cut) // length, 1, config.slice_tokens), frames.seconds * length, frames.still)

    def costliest(self, pixels: int, still: bool) -> tuple[int, int]:
        """Every frame becomes as many."""
        return self.model.config.side, self.model.config.side

    def native(self, packed: Packed) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels(packed.patches)} if packed.grids else {}

    def to_mind(self, still: bool) -> tuple[str, ...]:
        return (NO_PROCESSOR,)

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """uint8 frames of all visuals of a batch [frames, 3, side, side] -> [visual tokens, dim]. Those that are alike are
        looked at once: in a clip where little moves, and in a batch of such clips, they are many."""
        different, place = patches.unique(dim=0, return_inverse=True)
        return self.model.model.vision_projector(self.model.maps(self.pixels(different))[place])

    def pixels(self, patches: Tensor) -> Tensor:
        """Normalised frames."""
        return normalised(patches, MEAN, STD).to(self.model.dtype)

    def language_model(self) -> Any:
        return without(self.model, *VISION)

    # Text

    def said(self, text: str) -> str:
        return text

    def written(self, visual: Visual) -> tuple[Written, ...]:
        """A line a slice."""
        slices = visual.patches.split(self.model.config.slice_frames)
        lines = ((replace(visual, patches=each, grid=(1, *visual.grid[1:])), "\n") for each in slices)
        return tuple(piece for line in lines for piece in line)

    def places(self, visual: Visual) -> list[int]:
        return [self.model.config.video_token_id] * math.prod(visual.grid)
