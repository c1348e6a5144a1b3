"""A folder or Hub id -> the backbone of its family, told by its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from engine.backbones import text
from engine.backbones.base import SPECIAL_TOKENS, Backbone
from engine.backbones.internvl import InternVL
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.backbones.text import TextLM


def load(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, tokens: Sequence[str] = SPECIAL_TOKENS
) -> Backbone:
    """Errors: ValueError for a family that isn't supported, with the list of those that are."""
    kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type", "nameless")
    if kind == "qwen2_5_vl":
        return Qwen25VL.load(path, device, dtype, tokens)
    if kind == "internvl":
        return InternVL.load(path, device, dtype, tokens)
    if kind == "internvl_chat":
        raise ValueError(f"{path} brings its own code, which isn't run: take the same model's -hf version.")
    if kind in text.FAMILIES:
        return TextLM.load(path, device, dtype, tokens)
    raise ValueError(f"{path} is a {kind} model. Supported: qwen2_5_vl, internvl, {', '.join(text.FAMILIES)}.")
