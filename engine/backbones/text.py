"""GPT-2, Llama and Qwen language models through transformers' own classes: text alone, one position axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.backbones.base import Backbone

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class TextLM(Backbone):
    kind = AutoModelForCausalLM
    sighted = False

    def said(self, text: str) -> str:
        return text

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
    def most_positions(self) -> int | None:
        return self.model.config.n_positions if self._gpt2 else None

    @property
    def _gpt2(self) -> bool:
        return self.model.config.model_type == "gpt2"
