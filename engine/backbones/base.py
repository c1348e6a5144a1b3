"""What every backbone has in common: a transformers model with its tokenizer, seen as segments in, states out.

A family's file adds only what differs: embedding, positions, vision, how its language model is called.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from engine.layout import END, Encoded, Frames, Packed, Segment, Special, Visual, Written

NO_VISION = "This is a language model without vision: ask without a clip, or choose another model."
SPECIAL_TOKENS = ("<pause>", "<think>", "</think>", "<answer>", "</answer>", "<COT>", "<ANS>")


@dataclass(frozen=True)
class States:
    """What one forward leaves behind."""

    hidden: tuple[Tensor, ...]  # layers + 1 of [batch, length, dim]; the last is after the final norm
    cache: Cache | None
    attentions: tuple[Tensor, ...] | None = None  # a [batch, heads, length, past + length] a layer, where config asks

    @property
    def last(self) -> Tensor:
        return self.hidden[-1]


@dataclass(frozen=True)
class Backbone:
    """The model with its tokenizer. One instance serves every caller: nothing is written to it between calls."""

    axes: ClassVar[int] = 1  # of a position

    model: Any  # a transformers model class; the families' own types say less than Any
    tokenizer: Any

    def save(self, path: str | Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def end(self) -> int:
        """The token that ends a turn."""
        return self.tokenizer.eos_token_id

    def token(self, name: str) -> int:
        """The id of a special token. Errors: KeyError if the tokenizer lacks it."""
        found = self.tokenizer.convert_tokens_to_ids(name)
        if found is None or found == self.tokenizer.unk_token_id:
            raise KeyError(f"The tokenizer has no token {name}.")
        return found

    def text_ids(self, text: str) -> list[int]:
        """Plain text -> ids. What looks like a special token in it stays text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def piece_ids(self, piece: str | Special) -> list[int]:
        if isinstance(piece, str):
            return self.text_ids(piece)
        return [self.end if piece == END else self.token(piece.name)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def embed_ids(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def logits(self, rows: Tensor) -> Tensor:
        """Rows after the final norm [..., dim] -> logits [..., vocabulary]."""
        return self.model.lm_head(rows)

    def fed(self, states: Tensor, positions: Tensor) -> Tensor:
        """Input embeddings, from the states that entered the first layer [batch, rows, dim] at `positions` [batch, rows]."""
        return states

    def final_norm(self, rows: Tensor) -> Tensor:
        """States between two layers [..., dim] -> as the head takes them; those of the last layer are so already."""
        return self.model.get_decoder().norm(rows)

    def moved(self, keys: Tensor, by: Tensor) -> Tensor:
        """Cached keys of text [batch, heads, rows, head dim], as they would stand `by` [batch, rows] positions further on."""
        angle = by[:, None, :, None] * self.model.get_decoder().rotary_emb.inv_freq.float()
        cos, sin = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
        first, second = keys.float().chunk(2, dim=-1)
        return (keys.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(keys.dtype)

    def language_model(self) -> Any:
        """The model without its vision: a language model that `forward` and `logits` can be called on."""
        return self.model

    def blocks(self, model: Any) -> Any:
        """The layers of a language model of this family, as their ModuleList."""
        return model.get_decoder().layers

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.text_config)

    def written_out(self, segment: Segment) -> list[Written]:
        """A segment's pieces, its frames cut and its visuals among the tokens that belong around them.

        Texts that stand beside each other become one, so that it falls into the tokens of the whole.
        """
        whole: list[Written] = []
        for given in segment.pieces:
            seen = self.cut(given) if isinstance(given, Frames) else given
            for piece in self.written(seen) if isinstance(seen, Visual) else (seen,):
                if whole and isinstance(piece, str) and isinstance(whole[-1], str):
                    whole[-1] += piece
                else:
                    whole.append(piece)
        return whole

    def embed(self, packed: Packed) -> Tensor:
        """Token embeddings with the visual features in their places, vision run once: [batch, length, dim]."""
        embeds = self.embed_ids(packed.ids)
        if not packed.grids:
            return embeds
        features = self.encode_patches(packed.patches, packed.grids).to(embeds.dtype)
        return embeds.index_put((packed.visual_sample, packed.visual_row), features)

    # What a family's file says

    def cut(self, frames: Frames) -> Visual:
        """Decoded frames -> what the vision encoder reads."""
        raise ValueError(NO_VISION)

    def written(self, visual: Visual) -> tuple[Written, ...]:
        """A visual as it stands in a prompt, among the tokens and words that the family puts around it."""
        return (visual,)

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """The patches of all visuals of a batch, in one vision pass -> [visual tokens, dim]."""
        raise ValueError(NO_VISION)

    def encode(self, segment: Segment) -> Encoded:
        """One segment -> ids, positions from 0, and where its visuals' tokens stand."""
        raise NotImplementedError

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None) -> States:
        """The language model.

        embeds [batch, length, dim], positions [axes, batch, length], mask: additive [batch, 1, length, past + length].
        With a cache, its entries come first and the new ones are added to it.
        """
        raise NotImplementedError


def pretrained(kind: Any, path: str | Path, **settings: Any) -> Any:
    """transformers' `from_pretrained`, which would take pickles too, and make up weights that a checkpoint lacks.

    Errors: ValueError for weights that are missing or of another shape; what transformers raises for a broken file.
    """
    safe = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, told = kind.from_pretrained(path, **safe, **settings)
    if wrong := sorted(told["missing_keys"]) or sorted(f"{name} (shape)" for name, *_ in told["mismatched_keys"]):
        raise ValueError(f"{len(wrong)} weights are missing or of another model: {', '.join(wrong[:2])}.")
    return model


def without(model: Any, *parts: str) -> Any:
    """The same model, weights shared, whose `model` lacks these parts."""
    whole, inner = copy.copy(model), copy.copy(model.model)
    inner._modules = {name: module for name, module in inner._modules.items() if name not in parts}
    whole._modules = whole._modules | {"model": inner}
    return whole


def double(model: Any) -> Any:
    """The same model, every weight shared, whose modules and configuration are its own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Adds a method's tokens where the tokenizer lacks them; the embedding grows only where it is too small."""
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            with torch.random.fork_rng(devices=[]):  # the same rows each time, so that an adapter finds what it knew
                torch.manual_seed(0)
                model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
