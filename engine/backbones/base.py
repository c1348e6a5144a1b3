"""What every backbone has in common: a transformers model with its tokenizer, seen as segments in, states out.

A family's file adds only what differs: embedding, positions, vision, how its language model is called.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.hub import cached_file

from engine import masks
from engine.config import ConfigError
from engine.footage import Footage
from engine.layout import (
    BEGIN,
    CLOSE,
    END,
    REPLY,
    Encoded,
    Frames,
    Opening,
    Packed,
    Seen,
    Segment,
    Special,
    Visual,
    Written,
)
from engine.video import Sampling

if TYPE_CHECKING:
    from typing_extensions import Self

NO_VISION = "This is a language model without vision: ask without a clip, or choose another model."
DATE = "26 Jul 2024"  # for templates that would write today's: what Llama's own falls back on
WORDS = "\u241f"  # stands for somebody's words while a chat template is written out
SPECIAL_TOKENS = ("<pause>", "<think>", "</think>", "<answer>", "</answer>", "<COT>", "<ANS>")


@dataclass(frozen=True)
class States:
    """What one forward leaves behind."""

    hidden: tuple[Tensor, ...]  # layers + 1 of [batch, length, dim]; the last is after the final norm
    attentions: tuple[Tensor, ...] | None = None  # a [batch, heads, length, past + length] a layer, where config asks

    @property
    def last(self) -> Tensor:
        return self.hidden[-1]


@dataclass(frozen=True)
class Sight:
    """What vision made of a batch's visuals, and where in the pack it goes. Families whose deeper layers look again add to it."""

    sample: Tensor  # [visual tokens]
    row: Tensor  # [visual tokens]
    features: Tensor  # [visual tokens, dim]


@dataclass(frozen=True)
class Backbone:
    """The model with its tokenizer. One instance serves every caller: nothing is written to it between calls."""

    kind: ClassVar[Any]  # transformers' class of the family
    attention: ClassVar[str | Mapping[str, str]] = "sdpa"
    axes: ClassVar[int] = 1  # of a position
    sighted: ClassVar[bool] = True  # it takes clips or images, not words alone

    model: Any  # a transformers model class; the families' own types say less than Any
    tokenizer: Any

    @classmethod
    def load(
        cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
        tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> Self:  # fmt: skip
        """Loads a folder or Hub id; adds the method's special tokens where the tokenizer lacks them."""
        attention = cls.attention if isinstance(cls.attention, str) else dict(cls.attention)
        model = pretrained(cls.kind, path, dtype=dtype, attn_implementation=attention)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.pad_token_id is None:  # GPT-2 and Llama pad with what ends a text
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.chat_template is None:
            tokenizer.chat_template = processors_template(path)
        add_tokens(model, tokenizer, tokens)
        model.eval().to(torch.device(device))
        return cls(model, tokenizer)

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
    def most_positions(self) -> int | None:
        """As many as it has learnt, where those are rows of a table: beyond them there is nothing to look up."""
        return None

    @property
    def kept_layers(self) -> int:
        """Layers that keep keys and values of every token."""
        return self.layers

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def end(self) -> int:
        """The token that ends a turn."""
        return self.tokenizer.eos_token_id

    @property
    def waits(self) -> bool:
        """Whether a step of the language model waits for its device, so that no CUDA graph can hold it.

        Positions that are stretched with a text's length, as InternVL3's are, depend on the largest one so far, for which
        transformers asks the device.
        """
        rotary = self.text_config.to_dict().get("rope_parameters") or {}  # GPT-2 has none
        return rotary.get("rope_type") in ("dynamic", "longrope")

    @property
    def begins(self) -> str:
        """The token that the tokenizer sets before every text; "" where it sets none."""
        start = self.tokenizer.bos_token
        return start if start and self.tokenizer.encode("") == [self.tokenizer.bos_token_id] else ""

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
            seen = self.see(given) if isinstance(given, Footage | Frames) else given
            pieces: Sequence[Written]
            if isinstance(seen, Visual):
                pieces = self.written(seen)
            elif isinstance(seen, Opening):
                pieces = self.structure(self.chat(seen)[0])
            elif seen == BEGIN:
                pieces = [Special(self.begins)] if self.begins else []
            elif seen in (REPLY, CLOSE):
                pieces = self.structure(self.chat(Opening())[1 if seen == REPLY else 2])
            else:
                pieces = (seen,)
            for piece in pieces:
                if whole and isinstance(piece, str) and isinstance(whole[-1], str):
                    whole[-1] += piece
                else:
                    whole.append(piece)
        return whole

    def structure(self, text: str) -> list[str | Special]:
        """A format's own text, in which the tokenizer's added tokens are structure."""
        names = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return [Special(part) if number % 2 else part for number, part in enumerate(parts) if part]

    def chat(self, opening: Opening) -> tuple[str, str, str]:
        """The model's chat format as text: (before the user's words, between theirs and the reply, behind the reply).

        As its own chat template has it; where its files hold none, in the family's published form.
        """
        if self.tokenizer.chat_template is None:
            return self.published_chat(opening)
        turns = [{"role": "system", "content": self.said(opening.system)}] if opening.system else []
        turns.append({"role": "user", "content": self.said(WORDS)})
        return self.rendered([*turns, {"role": "assistant", "content": self.said(WORDS)}])

    def rendered(self, turns: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
        """`chat` by the template, of a conversation whose last two turns are the user's WORDS and the assistant's."""

        def written(*given: dict[str, Any], **settings: Any) -> str:
            return self.tokenizer.apply_chat_template(given, tokenize=False, date_string=DATE, **settings)

        before, between = written(*turns[:-1], add_generation_prompt=True).split(WORDS)
        behind = written(*turns).rpartition(WORDS)[2]
        end = self.tokenizer.decode([self.end])
        if self.begins not in before:
            before = self.begins + before
        return before, between, end + behind.partition(end)[2]

    def said(self, text: str) -> Any:
        """A turn's words as the family's chat templates take them."""
        return [{"type": "text", "text": text}]

    def published_chat(self, opening: Opening) -> tuple[str, str, str]:
        """ChatML, unless the family says otherwise."""
        system = f"<|im_start|>system\n{opening.system}<|im_end|>\n" if opening.system else ""
        return f"{system}<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"

    def look(self, packed: Packed) -> Sight | None:
        """Vision, run once for all visuals of the batch."""
        if not packed.grids:
            return None
        return Sight(packed.visual_sample, packed.visual_row, self.encode_patches(packed.patches, packed.grids))

    def embed(self, packed: Packed, sight: Sight | None = None) -> Tensor:
        """Token embeddings with the visual features in their places: [batch, length, dim]. Looks if nobody has."""
        embeds = self.embed_ids(packed.ids)
        sight = sight or self.look(packed)
        if sight is None:
            return embeds
        return embeds.index_put((sight.sample, sight.row), sight.features.to(embeds.dtype))

    def see(self, given: Seen) -> Visual:
        """Footage is read here, at the size that the family wants. Errors: VideoError for footage that can't be read."""
        if isinstance(given, Footage):
            given = Frames(*given.frames(self.sampled(given.sampling, given.still)), given.still)
        return self.cut(given) if isinstance(given, Frames) else given

    # What a family's file says

    def sampled(self, sampling: Sampling, still: bool) -> Sampling:
        """The sampling with the size of frames that `cut` wants, so that pictures are resized once."""
        return sampling

    def cut(self, frames: Frames) -> Visual:
        """Decoded frames -> what the vision encoder reads."""
        raise ConfigError(NO_VISION)

    def written(self, visual: Visual) -> tuple[Written, ...]:
        """A visual as it stands in a prompt, among the tokens and words that the family puts around it."""
        return (visual,)

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """The patches of all visuals of a batch, in one vision pass -> [visual tokens, dim]."""
        raise ConfigError(NO_VISION)

    def places(self, visual: Visual) -> list[int]:
        """The ids that stand for a visual: one a visual token."""
        raise ConfigError(NO_VISION)

    def native(self, packed: Packed) -> dict[str, Tensor]:
        """What transformers' own class takes beside the ids of a pack with one sample: what it sees, one visual at most."""
        return {}

    def for_processor(self, text: str) -> str:
        """A prompt as the family's own transformers processor takes it: with what that makes the tokens of a visual of."""
        return text

    def to_mind(self, still: bool) -> tuple[str, ...]:
        """Where transformers' own code treats a visual otherwise: sentences for who serves the model with it."""
        return ()

    def processor_sizes(self, sampling: Sampling, image_pixels: int) -> dict[str, dict[str, Any]]:
        """What the family's own image and video processors are set to, so that they look as training did; empty where a
        model's shape alone decides it."""
        return {}

    def costliest(self, pixels: int, still: bool) -> tuple[int, int]:
        """(height, width) of a frame, or image, that becomes as many tokens as one can, where a source allows so many pixels."""
        raise ConfigError(NO_VISION)

    def looks(self, packed: Packed) -> list[tuple[int, int]]:
        """What vision computes for a pack: how many slices of clips, or tiles, of how many patches each, which see each other."""
        patch = self.model.config.vision_config.patch_size
        side = packed.patches.shape[-1] // (patch if isinstance(patch, int) else patch[0])
        return [(len(packed.patches), side**2)]

    def encode(self, segment: Segment) -> Encoded:
        """One segment -> ids, positions from 0, and where its visuals' tokens stand."""
        ids: list[int] = []
        visuals: list[tuple[Visual, list[int]]] = []
        for piece in self.written_out(segment):
            new = self.places(piece) if isinstance(piece, Visual) else self.piece_ids(piece)
            if isinstance(piece, Visual):
                visuals.append((piece, list(range(len(ids), len(ids) + len(new)))))
            ids += new
        return Encoded(ids, torch.arange(len(ids))[None], len(ids), visuals)

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None, sight: Sight | None = None
    ) -> States:
        """The language model.

        embeds [batch, length, dim], positions [axes, batch, length], mask: additive [batch, 1, length, past + length].
        With a cache, its entries come first and the new ones are added to it. sight: for families whose deeper layers
        look too; its rows are those of past + length.
        """
        out = self.decoded(embeds, positions[0], mask, cache)
        return States(out.hidden_states, out.attentions)

    def whole(self, embeds: Tensor, packed: Packed, cache: Cache | None = None, sight: Sight | None = None) -> States:
        """`forward` over all of a pack at once, under the pack's own mask. embeds [batch, length, dim], cache: empty."""
        mask = masks.additive(masks.visible(packed), embeds.dtype)
        return self.forward(embeds, packed.positions, mask, cache, sight)

    def decoded(self, embeds: Tensor, positions: Tensor, mask: Any, cache: Cache | None, **more: Any) -> Any:
        """What transformers' decoder gives for inputs of its own form, with every layer's states."""
        return self.model.get_decoder()(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            cache=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
            **more,
        )


def once(text: str, *tokens: str) -> str:
    """The text with one of each of these tokens where it has several in a row."""
    return re.sub(f"({'|'.join(map(re.escape, tokens))})\\1+", r"\1", text)


def pretrained(kind: Any, path: str | Path, **settings: Any) -> Any:
    """transformers' `from_pretrained`, which would take pickles too, and make up weights that a checkpoint lacks.

    Errors: ValueError for weights that are missing or of another shape; what transformers raises for a broken file.
    """
    safe = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, told = kind.from_pretrained(path, **safe, **settings)
    if wrong := sorted(told["missing_keys"]) or sorted(f"{name} (shape)" for name, *_ in told["mismatched_keys"]):
        raise ValueError(f"{len(wrong)} weights are missing or of another model: {', '.join(wrong[:2])}.")
    return model


def processors_template(path: str | Path) -> str | None:
    """The chat template where a checkpoint keeps it for its processor alone, as the first files of LLaVA-NeXT do."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(str(path), "chat_template.json", **quiet)
    return json.loads(Path(found).read_text(encoding="utf-8"))["chat_template"] if found else None


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
    missing, known = [token for token in tokens if token not in tokenizer.get_vocab()], len(tokenizer)
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            with torch.random.fork_rng(devices=[]):  # the same rows each time, so that an adapter finds what it knew
                torch.manual_seed(0)
                grow(model, known, len(tokenizer))


def grow(model: Any, known: int, tokens: int) -> None:
    """Rows for `tokens` tokens, of which the first `known` are there: the new ones are drawn around the mean of the others.

    Mllama embeds more tokens than it predicts, by as many as its class says: they stay as many.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    spare = table.num_embeddings - head.weight.shape[0]
    if spare:
        model.resize_token_embeddings(known)  # spare rows were never trained
    model.resize_token_embeddings(tokens + spare, mean_resizing=True)
    if spare:
        head = model.get_output_embeddings()
        head.weight, head.out_features = nn.Parameter(head.weight.detach()[:tokens].clone()), tokens
        model.config.get_text_config().vocab_size = model.vocab_size = tokens
