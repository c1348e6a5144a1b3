"""Tiny random models of the real classes, their tokenizer, clips and samples. Quick to build, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from engine import adapters
from engine.backbones import small
from engine.backbones.base import Backbone, add_tokens
from engine.backbones.internvl import InternVL
from engine.backbones.llama_lite0 import LlamaLite0, LlamaLite0Config, LlamaLite0ForCausalLM
from engine.backbones.llava_next import LlavaNext, LlavaNextVideo
from engine.backbones.mllama import Mllama
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.backbones.qwen3_vl import Qwen3VL
from engine.backbones.text import TextLM
from engine.data.samples import Sample
from engine.layout import Frames, Visual
from engine.methods import described
from engine.methods.codi import Codi
from engine.methods.method import META
from engine.methods.steps import StepSupervision

# Implicit-Video-Reasoning's own example of a prompt, with one <|image_pad|> standing for all of the picture.
QUESTION = "Does the necks with name tags lie behind the curtains with a large window?"
OPTIONS = ("Yes", "No")
EXAMPLE = """<|im_start|>system
You are a helpful assistant<|im_end|>
<|im_start|>user
<|vision_start|><|image_pad|><|vision_end|>\
Does the necks with name tags lie behind the curtains with a large window? Options:
A. Yes
B. No
Please provide only the single option letter (e.g., A, B, C, D, etc.) within the <answer> </answer> tags.<|im_end|>
<|im_start|>assistant
<pause><pause><pause><pause><pause><pause><pause><pause><ANS>"""


LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def words(size: int = 400) -> PreTrainedTokenizerFast:
    """A few hundred byte-level tokens: the example is a quarter as long in them, and a blank line is one token."""
    return small.tokenizer([EXAMPLE, "Why?\n\n  What\n\nso \n\n"] * 4, size)


def tiny_backbone(seed: int = 0, layers: int = 3) -> Qwen25VL:
    """Grouped keys, windowed (2 x 2 tokens) and full vision layers; lively weights and biases; every id is a token."""
    tokens = words()
    ids = tokens.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "out_hidden_size": 64,
            "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen25VL(lively(Qwen2_5_VLForConditionalGeneration(config)), tokens)


def tiny_internvl(seed: int = 0, layers: int = 3) -> InternVL:
    """Tiles of 28 x 28 pixels, 2 x 2 tokens each."""
    tokens = words()
    tokens.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
    ids = tokens.get_vocab()
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"], "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7, "attention_bias": True,
        },
        image_token_id=ids["<IMG_CONTEXT>"], image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return InternVL(lively(InternVLForConditionalGeneration(config)), tokens)


def tiny_qwen3vl(seed: int = 0, layers: int = 4) -> Qwen3VL:
    """Patches of 14 pixels, so that the same clips fit; features of two vision layers go to the first two layers."""
    tokens = words()
    ids = tokens.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True
            },
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3VL(lively(Qwen3VLForConditionalGeneration(config)), tokens)


def tiny_mllama(seed: int = 0, layers: int = 4) -> Mllama:
    """Tiles of 28 x 28 pixels; cross attention in the second and the fourth layer of five; gates half open.

    As in the published files, `<|image|>` is the last token, embedded and never predicted.
    """
    tokens = words()
    tokens.add_tokens([*LLAMA_TOKENS, "<|image|>"], special_tokens=True)
    ids = tokens.get_vocab()
    tokens.bos_token, tokens.eos_token = "<|begin_of_text|>", "<|eot_id|>"
    config = MllamaConfig(
        text_config={
            "vocab_size": len(tokens) - 1, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers + 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "cross_attention_layers": [1, 3], "bos_token_id": ids["<|begin_of_text|>"],
            "eos_token_id": ids["<|eot_id|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 7, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "max_num_tiles": 4,
        },
        image_token_index=ids["<|image|>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = lively(MllamaForConditionalGeneration(config))
    for name, weight in model.named_parameters():
        if "gate" in name and weight.numel() == 1:
            nn.init.constant_(weight, 0.5)
    return Mllama(model, tokens)


def llava_settings(tokens: PreTrainedTokenizerFast, layers: int) -> dict[str, Any]:
    """Tiles of 28 x 28 pixels, 4 x 4 tokens each; Vicuna's kind of language model."""
    ids = tokens.get_vocab()
    return {
        "text_config": {
            "model_type": "llama", "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 1024,
            "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<|endoftext|>"],
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "projection_dim": 32,
        },
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        "image_token_index": ids["<image>"],
    }  # fmt: skip


def vicuna_words() -> PreTrainedTokenizerFast:
    tokens = words()
    tokens.add_tokens(["<s>", "</s>", "<image>", "<video>"], special_tokens=True)
    tokens.bos_token, tokens.eos_token = "<s>", "</s>"
    return tokens


def tiny_llava(seed: int = 0, layers: int = 3) -> LlavaNext:
    tokens = vicuna_words()
    torch.manual_seed(seed)
    made = LlavaNextForConditionalGeneration(LlavaNextConfig(**llava_settings(tokens, layers)))
    return LlavaNext(lively(made), tokens)


def tiny_llava_video(seed: int = 0, layers: int = 3) -> LlavaNextVideo:
    """A frame is 2 x 2 tokens."""
    tokens = vicuna_words()
    torch.manual_seed(seed)
    config = LlavaNextVideoConfig(**llava_settings(tokens, layers), video_token_index=tokens.get_vocab()["<video>"])
    return LlavaNextVideo(lively(LlavaNextVideoForConditionalGeneration(config)), tokens)


def tiny_lite0(seed: int = 0, layers: int = 3) -> LlamaLite0:
    """Frames of 64 x 64 pixels, 2 x 2 cells each, four of them a slice of four tokens; the tower in its full size."""
    tokens = words()
    ids = tokens.get_vocab()
    config = LlamaLite0Config(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"], video_token_id=ids["<|video_pad|>"], side=64, slice_frames=4, slice_tokens=4,
        cell_width=8, projector_width=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = lively(LlamaLite0ForCausalLM(config))
    for weight in model.model.vision_tower.parameters():  # so that fifty layers hand on what they are shown
        if weight.dim() == 4:
            nn.init.kaiming_normal_(weight)
    return LlamaLite0(model, tokens)


def tiny_gpt2(seed: int = 0, layers: int = 3) -> TextLM:
    """Learned positions, head tied to the embedding."""
    tokens = words()
    end = tokens.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokens), n_positions=256, n_embd=64, n_layer=layers, n_head=4, bos_token_id=end, eos_token_id=end
    )  # fmt: skip
    torch.manual_seed(seed)
    return TextLM(lively(GPT2LMHeadModel(config)), tokens)


def tiny_llama(seed: int = 0, layers: int = 3) -> TextLM:
    """Grouped keys, rotary positions, a head of its own."""
    tokens = words()
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return TextLM(lively(LlamaForCausalLM(config)), tokens)


def untrained_codi(folder: Path, thoughts: int) -> str:
    """A folder as training leaves it: CODI with a step decoder, on words, which has learnt nothing."""
    method, backbone = Codi(num_latent=thoughts, prj_dim=16, steps=StepSupervision(layers=1)), tiny_llama()
    add_tokens(backbone.model, backbone.tokenizer, method.tokens)
    adapters.save(folder, backbone, method.companions(backbone), {}, method.frozen)
    meta = {"method": described(method), "pauses": [thoughts, thoughts], "dialect": "plain"}
    (folder / META).write_text(json.dumps(meta))
    return str(folder)


def lively(model: Any) -> Any:
    """Weights and biases large enough that every part of the model counts."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            nn.init.xavier_uniform_(weight.view(len(weight), -1), gain=3.0 if "embed" in name else 1.0)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    return model.eval()


def clip(
    model: Backbone, seed: int = 0, frames: int = 4, height: int = 56, width: int = 84, seconds: float = 0.5,
    still: bool = False,
) -> Visual:  # fmt: skip
    """Random pixels. `seconds`: between two frames."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return model.cut(Frames(pixels, seconds, still))


def samples(model: Backbone) -> list[Sample]:
    """A video, an image, a long video with an odd number of frames, and no picture at all; all of different lengths."""
    return [
        Sample(clip(model, 1), "Where is it?", ("left", "right"), ("It starts left. Then right.",), "B"),
        Sample(clip(model, 2, 1, 84, 56, still=True), "How many?", (), ("One, two, three.",), "3", "numerical"),
        Sample(
            clip(model, 3, 11, 28, 28, 1.0),
            "What happens in the clip?",
            (),
            ("A is touched.",),
            "it moves",
            "free-form",
        ),
        Sample(None, "What is one and one?", ("1", "2", "3"), ("1 + 1 = 2, and no more than that.",), "B"),
    ]


def chains(model: Backbone) -> list[Sample]:
    """Plain questions whose chains have 2, 0, 5 and 1 steps, of different lengths; the first two with a picture where
    the model has eyes."""
    sees = not isinstance(model, TextLM)
    seen = (clip(model, 1), clip(model, 2, 1, 84, 56, still=True)) if sees else (None, None)
    steps = ("it goes left", "then right"), (), ("1 + 1 = 2", "2 + 1 = 3", "3 + 1 = 4", "4 + 1 = 5", "5"), ("no name",)
    questions = "Where is it in the end?", "How many?", "What is one and one and one and one and one?", "Does it lie?"
    return [
        Sample(visual, question, (), chain, answer, dialect="plain")
        for visual, question, chain, answer in zip((*seen, None, None), questions, steps, ("B", "3", "5", "no"))
    ]
