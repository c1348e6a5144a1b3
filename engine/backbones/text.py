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

from engine.backbones.base import NO_VISION, SPECIAL_TOKENS, Backbone, States, add_tokens, pretrained
from engine.layout import Encoded, Segment, Visual

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class TextLM(Backbone):
    @classmethod
    def load(
        cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
        tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> TextLM:  # fmt: skip
        model = pretrained(AutoModelForCausalLM, path, dtype=dtype, attn_implementation="sdpa")
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

    # GPT-2 adds its positions to its input, where the others turn their keys; and its norm has another name.

    def fed(self, states: Tensor, positions: Tensor) -> Tensor:
        return states - self.model.base_model.wpe(positions) if self._gpt2 else states

    def final_norm(self, rows: Tensor) -> Tensor:
        return self.model.base_model.ln_f(rows) if self._gpt2 else super().final_norm(rows)

    def blocks(self, model: Any) -> Any:
        return model.base_model.h if self._gpt2 else super().blocks(model)

    def moved(self, keys: Tensor, by: Tensor) -> Tensor:
        return keys if self._gpt2 else super().moved(keys, by)

    @property
    def _gpt2(self) -> bool:
        return self.model.config.model_type == "gpt2"

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
        return States(out.hidden_states, cache, out.attentions)
