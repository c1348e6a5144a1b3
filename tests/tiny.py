"""A tiny random model of the real class, its tokenizer, clips and samples. Quick to build, the same every time."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from engine.backbones import small
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample
from engine.layout import Visual

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
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            nn.init.xavier_uniform_(weight.view(len(weight), -1), gain=3.0 if "embed" in name else 1.0)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    return Qwen25VL(model.eval(), tokens)


def clip(
    model: Qwen25VL, seed: int = 0, frames: int = 4, height: int = 56, width: int = 84, seconds: float = 0.5,
    still: bool = False,
) -> Visual:  # fmt: skip
    """Random pixels. `seconds`: between two frames."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return model.visual(pixels, seconds, still)


def samples(model: Qwen25VL) -> list[Sample]:
    """A video, an image, a long video with an odd number of frames, and no picture at all; all of different lengths."""
    return [
        Sample(clip(model, 1), "Where is it?", ("left", "right"), ("It starts left. Then right.",), "B"),
        Sample(clip(model, 2, 1, 84, 56, still=True), "How many?", (), ("One, two, three.",), "3", "numerical"),
        Sample(
            clip(model, 3, 11, 28, 28, 1.0), "What happens in the clip?", (), ("A is touched.",), "it moves", "free-form"
        ),
        Sample(None, "What is one and one?", ("1", "2", "3"), ("1 + 1 = 2, and no more than that.",), "B"),
    ]
