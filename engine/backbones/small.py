"""The embedded default: a small Qwen2.5-VL with a byte-level tokenizer of its own. Any text can be typed; none is unknown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from engine.backbones.base import SPECIAL_TOKENS
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.backbones.text import TextLM

CHAT_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# Qwen2's own rule for where words end: digits one by one, a leading space belongs to its word.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer(texts: Iterable[str], size: int = 1024, phrases: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges come from `texts`, with the chat tokens and the method's tokens.

    phrases: what every prompt repeats word for word; each is one token, so that no time is spent on reading it.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_tokens([*CHAT_TOKENS, *SPECIAL_TOKENS], special_tokens=True)
    fast.add_tokens(list(phrases))
    return fast


def config(
    words: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 12, heads: int = 4, vision_hidden: int = 96,
    vision_layers: int = 2,
) -> Qwen2_5_VLConfig:  # fmt: skip
    """The small model's shape. A head's width is divided among time, height and width as in Qwen2.5-VL (2 : 3 : 3).

    A slice is four frames, a second of the worlds, in which one thing happens: vision attends within slices only.
    """
    ids = words.get_vocab()
    pairs = hidden // heads // 2
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(words) // 64) * 64, "hidden_size": hidden, "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0,
                "mrope_section": [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8],
            },
        },
        vision_config={
            "depth": vision_layers, "hidden_size": vision_hidden, "intermediate_size": 2 * vision_hidden,
            "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 4, "in_channels": 3,
            "out_hidden_size": hidden, "window_size": 112, "fullatt_block_indexes": list(range(vision_layers)),
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip


def fresh_text(
    words: PreTrainedTokenizerFast, family: Literal["gpt2", "llama"] = "gpt2", seed: int = 0, hidden: int = 128,
    layers: int = 4, heads: int = 4,
) -> TextLM:  # fmt: skip
    """An untrained language model for the text worlds, of a real class; Llama's attention begins as the small Qwen's."""
    torch.manual_seed(seed)
    ids = words.get_vocab()
    size, end = -(-len(words) // 64) * 64, ids["<|im_end|>"]
    model: Any
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=size, n_positions=1024, n_embd=hidden, n_layer=layers, n_head=heads, bos_token_id=end,
            eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ))  # fmt: skip
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=1024, bos_token_id=end, eos_token_id=end,
            tie_word_embeddings=True, attention_bias=True,
        ))  # fmt: skip
    spread(model)
    if family == "llama":
        look_around(model.model)
    return TextLM(model, words)


def fresh(words: PreTrainedTokenizerFast, seed: int = 0, **shape: int) -> Qwen25VL:
    """An untrained model. Xavier on every matrix: transformers' small normal start doesn't learn at this size."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config(words, **shape))
    spread(model)
    look_around(model.model.language_model)
    return Qwen25VL(model, words)


@torch.no_grad()
def spread(model: Any) -> None:
    """Xavier on every matrix, and lively embeddings."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for weight in model.parameters():
        if weight.dim() >= 2 and not any(weight is table for table in tables):
            nn.init.xavier_uniform_(weight.view(len(weight), -1))
    for table in tables:
        nn.init.normal_(table, std=0.3)


def look_around(language: Any) -> None:
    """In every layer, two heads begin by looking for tokens like the present one, two by looking at the last two tokens."""
    for layer in language.layers:
        look_alike(layer.self_attn, heads=2)
        for head, back in ((2, 1), (3, 2)):
            look_back(layer.self_attn, head, back, language.rotary_emb.inv_freq)


@torch.no_grad()
def look_alike(attention: Any, heads: int) -> None:
    """The first heads start by attending to earlier tokens like the present one: their keys begin equal to their queries."""
    rows = heads * attention.head_dim
    attention.k_proj.weight[:rows] = attention.q_proj.weight[:rows]


@torch.no_grad()
def look_back(attention: Any, head: int, back: int, frequencies: torch.Tensor, strength: float = 1.5) -> None:
    """This head starts by attending `back` tokens back.

    Rotary positions turn a constant query and key into a function of distance; a key turned by `back` positions has its
    peak there.
    """
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    angle = frequencies * back
    attention.q_proj.bias[rows] = strength * torch.cat([torch.ones_like(angle), torch.zeros_like(angle)])
    attention.k_proj.bias[rows] = strength * torch.cat([angle.cos(), angle.sin()])
    attention.q_proj.weight[rows] *= 0.1
    attention.k_proj.weight[rows] *= 0.1
