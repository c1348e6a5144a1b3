"""Llama-3.2-Vision (Mllama) through transformers' own class: tiles, vision, cross attention.

A patch of its visuals is one square tile, uint8 [3, side, side]; `grid` counts rows and columns of them, 4 at most. In the
prompt a picture is one token, `<|image|>`. A few layers of the language model have no self-attention: their rows look at
all patches of the picture whose token they may see, by the mask that says what they see of the prompt; the latest picture
of several. A row that may see no picture passes these layers unchanged, as in Meta's code (transformers 5.23 masks its
feed-forward alone, and lets it look at every patch evenly: the few tokens before the picture differ there). Knows no method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from engine import masks
from engine.backbones.base import WORDS, Backbone, Sight, States, without
from engine.backbones.pixels import normalised, tiles
from engine.config import ConfigError
from engine.layout import Frames, Opening, Packed, Visual
from engine.video import Sampling, resize

IMAGE = "<|image|>"
BEFORE_PICTURE = (
    "transformers 5 lets the few tokens before a picture look at it, which the model wasn't trained with: its answer may "
    "differ from the engine's."
)


class KeptOnce(DynamicLayer):
    """What a cross-attention layer keeps of the pictures: the first keys and values, however often it is asked."""

    def update(self, key_states: Tensor, value_states: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


@dataclass(frozen=True)
class Crossing(Sight):
    """The pictures as cross attention reads them. Every sample has as many places for pictures as the fullest one."""

    states: Tensor  # [batch, 1 + pictures x patches, dim]: first a row of zeros, for those who see no picture
    real: Tensor  # bool [batch, pictures x patches]: not the padding
    tokens: Tensor  # [batch, pictures]: where each picture's token stands in the pack, -1 for none
    layers: list[KeptOnce] = field(default_factory=list)


@dataclass(frozen=True)
class Mllama(Backbone):
    kind = MllamaForConditionalGeneration

    @property
    def crossing(self) -> tuple[bool, ...]:
        """For each layer, whether it is one of cross attention."""
        language = self.model.model.language_model
        return tuple(index in language.cross_attention_layers for index in range(len(language.layers)))

    @property
    def kept_layers(self) -> int:
        return self.crossing.count(False)

    def new_cache(self) -> DynamicCache:
        """Of the layers with self-attention alone: what cross attention keeps is the sight's."""
        return DynamicCache()

    # Vision

    def sampled(self, sampling: Sampling, still: bool) -> Sampling:
        return replace(sampling, size="stored")

    def cut(self, frames: Frames) -> Visual:
        if not frames.still:
            raise ConfigError(
                "Llama 3.2 Vision looks at images, not at videos: give it one picture, or choose another model."
            )
        vision = self.model.config.vision_config
        return cut_tiles(frames, vision.image_size, vision.max_num_tiles)

    def costliest(self, pixels: int, still: bool) -> tuple[int, int]:
        """One that fills as many tiles as there are."""
        vision = self.model.config.vision_config
        return vision.image_size, vision.image_size * vision.max_num_tiles

    def looks(self, packed: Packed) -> list[tuple[int, int]]:
        """All tiles of a picture see each other, those that fill it up too."""
        vision = self.model.config.vision_config
        return [(len(packed.grids), vision.max_num_tiles * (vision.image_size // vision.patch_size) ** 2)]

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """uint8 tiles of all visuals of a batch [tiles, 3, side, side], in one vision pass -> [visual tokens, dim]: those
        of the padding to the largest number of tiles too."""
        return self.encode_pixels(normalised(patches), grids).flatten(0, 1)

    def encode_pixels(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Normalised tiles [tiles, 3, side, side] -> [visuals, patches, dim]."""
        given = {name: each[:, None] for name, each in self.filled_up(pixels, grids).items()}
        out = self.model.model.vision_model(**given)
        return self.model.model.multi_modal_projector(out.last_hidden_state).flatten(1, 3)

    def filled_up(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        """Each picture with as many tiles as one can have, as transformers' vision takes them: [visuals, ...]."""
        config = self.model.config.vision_config
        counts = [rows * columns for _, rows, columns in grids]
        padded = pixels.new_zeros(len(grids), config.max_num_tiles, *pixels.shape[1:])
        for picture, own in zip(padded, pixels.split(counts), strict=True):
            picture[: len(own)] = own
        shapes = [1 + config.supported_aspect_ratios.index([rows, columns]) for _, rows, columns in grids]
        return {
            "pixel_values": padded,
            "aspect_ratio_ids": torch.tensor(shapes, device=pixels.device),
            "aspect_ratio_mask": self.tiles(counts, pixels.device).long(),
        }

    def native(self, packed: Packed) -> dict[str, Tensor]:
        """Several pictures too, and which of them each token sees, as the family's processor says it."""
        if not packed.grids:
            return {}
        seen = {name: each[None] for name, each in self.filled_up(normalised(packed.patches), packed.grids).items()}
        ids, most = packed.ids[0].tolist(), self.model.config.vision_config.max_num_tiles
        counts = [rows * columns for _, rows, columns in packed.grids]
        spans = get_cross_attention_token_mask(ids, self.model.config.image_token_index)
        looks = convert_sparse_cross_attention_mask_to_dense([spans], [counts], most, len(ids))
        return {**seen, "cross_attention_mask": torch.from_numpy(looks)}

    def to_mind(self, still: bool) -> tuple[str, ...]:
        return (BEFORE_PICTURE,)

    def tiles(self, counts: Sequence[int], device: torch.device) -> Tensor:
        """bool [visuals, most tiles]: those that aren't padding."""
        places = torch.arange(self.model.config.vision_config.max_num_tiles, device=device)
        return places < torch.tensor(counts, device=device)[:, None]

    def look(self, packed: Packed) -> Sight | None:
        if not packed.grids:
            return None
        sample, row = packed.visual_sample, packed.visual_row
        features = self.encode_patches(packed.patches, packed.grids).unflatten(0, (len(packed.grids), -1))
        _, patches, dim = features.shape
        count = torch.bincount(sample, minlength=len(packed.ids))
        batch, most = len(packed.ids), int(count.max())
        place = torch.arange(len(sample), device=sample.device) - (count.cumsum(0) - count)[sample]
        states = features.new_zeros(batch, most, patches, dim).index_put((sample, place), features).flatten(1, 2)
        real = self.tiles([rows * columns for _, rows, columns in packed.grids], sample.device)
        real = real.repeat_interleave(self.model.model.vision_model.num_patches, 1)
        return Crossing(
            sample,
            row,
            features.flatten(0, 1),
            states=torch.cat([states.new_zeros(batch, 1, dim), states], dim=1),
            real=real.new_zeros(batch, most, patches).index_put((sample, place), real).flatten(1, 2),
            tokens=row.new_full((batch, most), -1).index_put((sample, place), row),
            layers=[KeptOnce() for crosses in self.crossing if crosses],
        )

    def embed(self, packed: Packed, sight: Sight | None = None) -> Tensor:
        return self.embed_ids(packed.ids)

    def language_model(self) -> Any:
        return without(self.model, "vision_model", "multi_modal_projector")

    # Text

    def chat(self, opening: Opening) -> tuple[str, str, str]:
        """Without a system prompt, which the model wasn't taught to take together with pictures."""
        if self.tokenizer.chat_template is None:
            return self.published_chat(opening)
        seen = [{"type": "image"}] if opening.sees else []
        turns = [
            {"role": "user", "content": [*seen, *self.said(WORDS)]},
            {"role": "assistant", "content": self.said(WORDS)},
        ]
        before, between, behind = self.rendered(turns)
        return before.replace(IMAGE, ""), between, behind

    def published_chat(self, opening: Opening) -> tuple[str, str, str]:
        def header(role: str) -> str:
            return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

        return f"<|begin_of_text|>{header('user')}", f"<|eot_id|>{header('assistant')}", "<|eot_id|>"

    def places(self, visual: Visual) -> list[int]:
        return [self.model.config.image_token_index]

    # Forward

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None, sight: Sight | None = None
    ) -> States:
        crosses, given = self.crossing, {}
        kept = [KeptOnce() for each in crosses if each]  # empty: without pictures these layers are left out
        if isinstance(sight, Crossing):
            given = crossed(sight, mask)
            kept = sight.layers
            if cache is None or not kept[0].is_initialized:
                given["cross_attention_states"] = sight.states
        every = None
        if cache is not None:
            cache.layers.extend(DynamicLayer() for _ in range(self.kept_layers - len(cache.layers)))
            own, others = iter(cache.layers), iter(kept)
            every = Cache(layers=[next(others) if each else next(own) for each in crosses])
        out = self.decoded(embeds, positions[0], mask, every, **given)
        hidden, attentions = out.hidden_states, out.attentions
        if not given:  # a layer that was left out gives what it got
            told = iter(hidden)
            filled = [next(told)]
            for each in crosses:
                filled.append(filled[-1] if each else next(told))
            hidden = tuple(filled)
        elif attentions is not None:
            attentions = tuple(weights for each, weights in zip(crosses, attentions, strict=True) if not each)
        return States(hidden, attentions)


def crossed(sight: Crossing, mask: Tensor) -> dict[str, Tensor]:
    """Which patches each row looks at, by the additive mask [batch, 1, length, past + length] of what it sees.

    The published rule: a picture is seen from its token on, until another picture comes; pictures side by side are seen
    together.
    """
    tokens = sight.tokens
    there = (tokens >= 0) & (tokens < mask.shape[-1])
    columns = tokens.clamp(0, mask.shape[-1] - 1)[:, None].expand(-1, mask.shape[2], -1)
    sees = (mask[:, 0].gather(2, columns) == 0) & there[:, None]  # [batch, length, pictures]
    beside = torch.nn.functional.pad(tokens[:, 1:] != tokens[:, :-1] + 1, (1, 0))
    run = 1 + beside.cumsum(1)[:, None]  # [batch, 1, pictures]
    sees &= run == (sees * run).amax(2, keepdim=True)
    one = sees.any(2, keepdim=True)
    patches = sight.real.shape[1] // tokens.shape[1]
    allowed = torch.cat([~one, sees.repeat_interleave(patches, 2) & sight.real[:, None]], dim=2)
    return {
        "cross_attention_mask": masks.additive(allowed, mask.dtype),
        "full_text_row_masked_out_mask": one[:, None].to(mask.dtype),
    }


def tile_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """(rows, columns) of tiles, `most` at most: those in which the picture fits with the least enlargement; if it fits in
    none, with the least reduction. Of several the fewest tiles."""
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    scale = {(rows, columns): min(rows * side / height, columns * side / width) for rows, columns in grids}
    enough = [each for each in scale.values() if each >= 1]
    best = min(enough) if enough else max(scale.values())
    return min((grid for grid in grids if scale[grid] == best), key=lambda grid: grid[0] * grid[1])


def cut_tiles(frames: Frames, side: int, most: int) -> Visual:
    """The first frame -> square tiles, row by row. It keeps its shape, in the upper left; the rest is black."""
    height, width = frames.pixels.shape[1:3]
    rows, columns = tile_grid(height, width, side, most)
    tall, wide = min(max(height, side), rows * side), min(max(width, side), columns * side)
    if wide / width < tall / height:
        tall = min(math.floor(height * (wide / width)) or 1, tall)
    else:
        wide = min(math.floor(width * (tall / height)) or 1, wide)
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas[:tall, :wide] = resize(frames.pixels[:1], tall, wide, "bilinear")[0]
    return Visual(tiles(canvas[None], side), (1, rows, columns), frames.seconds, still=True)
