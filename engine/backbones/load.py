"""A folder or Hub id, or a model in memory -> the backbone of its family, told by its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from engine.backbones import text
from engine.backbones.base import SPECIAL_TOKENS, Backbone
from engine.backbones.internvl import InternVL
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.backbones.text import TextLM

FAMILIES: dict[str, type[Qwen25VL] | type[InternVL] | type[TextLM]] = {
    "qwen2_5_vl": Qwen25VL,
    "internvl": InternVL,
    **dict.fromkeys(text.FAMILIES, TextLM),
}


def load(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, tokens: Sequence[str] = SPECIAL_TOKENS
) -> Backbone:
    """Errors: ValueError for a family that isn't supported, with the list of those that are."""
    kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type", "nameless")
    if kind == "internvl_chat":
        raise ValueError(f"{path} brings its own code, which isn't run: take the same model's -hf version.")
    if kind not in FAMILIES:
        raise ValueError(f"{path} is a {kind} model. Supported: {', '.join(FAMILIES)}.")
    return FAMILIES[kind].load(path, device, dtype, tokens)


def around(model: Any, tokenizer: Any) -> Backbone:
    """The backbone of a transformers model that is in memory already: a companion that is a language model."""
    return FAMILIES[model.config.model_type](model, tokenizer)
