"""GPT-2, Llama and Qwen language models through transformers' own classes: text alone, one position axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache

from engine.backbones.base import NO_VISION, SPECIAL_TOKENS, Backbone, States, add_tokens
from engine.layout import Encoded, Segment, Visual

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class TextLM(Backbone):
    @classmethod
    def load(
        cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
        tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> TextLM:  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.pad_token_id is None:  # GPT-2 and Llama pad with what ends a text
            tokenizer.pad_token = tokenizer.eos_token
        add_tokens(model, tokenizer, tokens)
        model.eval().to(torch.device(device))
        return cls(model, tokenizer)

    def encode(self, segment: Segment) -> Encoded:
        ids: list[int] = []
        for piece in self.written_out(segment):
            if isinstance(piece, Visual):
                raise ValueError(NO_VISION)
            ids += self.piece_ids(piece)
        return Encoded(ids, torch.arange(len(ids))[None], len(ids))

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None) -> States:
        language: Any = self.model.base_model
        out = language(
            inputs_embeds=embeds,
            position_ids=positions[0],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        return States(out.hidden_states, cache)
