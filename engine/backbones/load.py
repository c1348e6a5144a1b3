"""A folder or Hub id, or a model in memory -> the backbone of its family, told by its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from engine.backbones import text
from engine.backbones.base import SPECIAL_TOKENS, Backbone
from engine.backbones.internvl import InternVL
from engine.backbones.llama_lite0 import LlamaLite0
from engine.backbones.llava_next import LlavaNext, LlavaNextVideo
from engine.backbones.mllama import Mllama
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.backbones.qwen3_vl import Qwen3VL
from engine.backbones.text import TextLM
from engine.config import ConfigError

FAMILIES: dict[str, type[Backbone]] = {
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "internvl": InternVL,
    "mllama": Mllama,
    "llava_next": LlavaNext,
    "llava_next_video": LlavaNextVideo,
    "llama_lite0": LlamaLite0,
    **dict.fromkeys(text.FAMILIES, TextLM),
}


# What a config calls a token, and what tokenizers do: it must have one id.
NAMED = {
    "image_token_id": ("<|image_pad|>", "<IMG_CONTEXT>"),
    "video_token_id": ("<|video_pad|>",),
    "vision_start_token_id": ("<|vision_start|>",),
    "vision_end_token_id": ("<|vision_end|>",),
    "image_token_index": ("<|image|>", "<image>"),
    "video_token_index": ("<video>",),
}


def devices() -> list[str]:
    """The kinds of device that are here, the quickest first: what "auto" takes is the first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, there in found.items() if there]


def here(device: str) -> str:
    """The device that is meant: of auto, the quickest that is here. Errors: ConfigError for one that isn't."""
    if device == "auto":
        return devices()[0]
    if device.partition(":")[0] not in devices():
        raise ConfigError(f"There is no device {device} here that torch can use: choose among {', '.join(devices())}.")
    return device


def load(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, tokens: Sequence[str] = SPECIAL_TOKENS
) -> Backbone:
    """Errors: ConfigError for a folder that isn't there or is broken, a family that isn't supported, with the list of those
    that are, and for weights or a tokenizer that aren't this model's.
    """
    try:
        backbone = family_of(path).load(path, device, dtype, tokens)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"Can't load {path}: {' '.join(str(error).split())[:300]}") from None
    if strange := misplaced(backbone):
        raise ConfigError(
            f"Can't load {path}: the tokenizer is another model's: {strange[0]!r} isn't where this one expects it."
        )
    return backbone


def only_a_folder(path: str | Path) -> bool:
    """Whether it can name nothing else: a Hub id has one slash at most, and doesn't begin like a path."""
    return Path(path).is_absolute() or str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1


def family_of(path: str | Path) -> type[Backbone]:
    """By a folder's or a Hub id's config. Errors: as `family`; ConfigError for a run's folder, whose model is in `best`."""
    whole, best = (Path(path) / "config.json").is_file(), Path(path) / "best"
    if not whole and any((best / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"{path} is a run's folder: name {best}.")
    return family(path, PreTrainedConfig.get_config_dict(path)[0].get("model_type", "nameless"))


def family(name: str | Path, kind: str) -> type[Backbone]:
    """The family of a model whose config says that it is of this kind. Errors: ConfigError with the list of those supported."""
    if kind == "internvl_chat":
        raise ConfigError(f"{name} brings its own code, which isn't run: take the same model's -hf version.")
    if kind not in FAMILIES:
        raise ConfigError(f"{name} is a {kind} model. Supported: {', '.join(FAMILIES)}.")
    return FAMILIES[kind]


def misplaced(backbone: Backbone) -> list[str]:
    """Tokens that the model has no row for, that its config has at another id, or that the tokenizer hasn't at all."""
    vocabulary, config = backbone.tokenizer.get_vocab(), backbone.model.config.to_dict()
    rows = backbone.model.get_input_embeddings().num_embeddings
    wrong = [token for token, place in vocabulary.items() if place >= rows]
    for name, tokens in NAMED.items():
        if name in config and config[name] not in map(vocabulary.get, tokens):
            wrong += tokens
    return wrong if backbone.text_ids("a") else ["a", *wrong]


def around(model: Any, tokenizer: Any) -> Backbone:
    """The backbone of a transformers model that is in memory already: a companion that is a language model."""
    return FAMILIES[model.config.model_type](model, tokenizer)
