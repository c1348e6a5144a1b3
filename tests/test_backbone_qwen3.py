"""Qwen3-VL: its prompt, patches, positions and DeepStack. What holds for every family is in test_families.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from engine import masks
from engine.backbones.qwen3_vl import Qwen3VL
from engine.data.samples import Sample, context
from engine.layout import Frames, Layout, Packed, Segment, Special, Visual, pack
from engine.video import Sampling
from tests import tiny

# Of the published template, what a user's turn with pictures needs.
TEMPLATE = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' }}\
{%- if messages[0].content is string %}{{- messages[0].content }}{%- else %}{%- for content in messages[0].content %}\
{%- if 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}\
{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|im_start|>' + message.role + '\\n' }}\
{%- for content in message.content %}{%- if content.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{%- elif content.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{%- elif 'text' in content %}\
{{- content.text }}{%- endif %}{%- endfor %}{{- '<|im_end|>\\n' }}{%- elif message.role == 'assistant' %}\
{{- '<|im_start|>' + message.role + '\\n' }}{%- for content in message.content %}{{- content.text }}{%- endfor %}\
{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    return tiny.tiny_qwen3vl()


def prompt(model: Qwen3VL, visual: Visual | None) -> Packed:
    return pack([Layout({"x": (context(Sample(visual, "What?", (), (), "", "free-form")),)})], model.encode, model.pad)


# Prompt


def test_the_prompt_is_the_chat_template(model: Qwen3VL) -> None:
    templated = tiny.tiny_qwen3vl()
    templated.tokenizer.chat_template = TEMPLATE
    image = tiny.clip(model, 0, 1, 56, 84, still=True)
    question = "What?\nPlease provide your text answer within the <answer> </answer> tags."
    system = {"role": "system", "content": "You are a helpful assistant"}
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = templated.tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 6)
    whole = templated.tokenizer.encode(text, add_special_tokens=False)
    for each in (model, templated):  # without a template of its own, the published one
        assert prompt(each, image).ids[0].tolist() == whole
    for each in (model, templated):
        assert each.chat(context(Sample(None, "", (), (), "")).pieces[0])[1:] == (
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>\n",
        )


def test_a_slice_stands_behind_its_moment(model: Qwen3VL) -> None:
    """Five frames half a second apart: pairs at 0 and 0.5, 1 and 1.5, and the last one twice, at 2."""
    visual = tiny.clip(model, 0, 5, 28, 56)
    assert visual.moments == (0.25, 1.25, 2.0)
    seen = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    text = model.decode(model.encode(Segment("context", (visual, "So?"))).ids)
    assert text == f"<0.2 seconds>{seen}<1.2 seconds>{seen}<2.0 seconds>{seen}So?"


# Patches


@pytest.mark.parametrize(("height", "width"), [(56, 84), (28, 28)])
def test_an_images_patches_are_the_processors(model: Qwen3VL, height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 14}
    theirs = Qwen2VLImageProcessorPil(**mean)(images=[image[0]], do_resize=False, return_tensors="pt")
    ours = model.cut(Frames(image, 0.0, still=True))
    assert [list(ours.grid)] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(model.pixels(ours.patches), theirs["pixel_values"], rtol=0, atol=2e-6)


def test_other_sides_are_brought_to_the_nearest_multiple(model: Qwen3VL) -> None:
    """As the processor does where it neither has to shrink nor to enlarge; Pillow rounds a few pixels otherwise."""
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 10, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 14, "size": {"shortest_edge": 28 * 28, "longest_edge": 10**6}}  # fmt: skip
    theirs = Qwen2VLImageProcessorPil(**mean)(images=[image[0]], return_tensors="pt")
    ours = model.cut(Frames(image, 0.0, still=True))  # 64 x 80 -> 56 x 84
    assert [list(ours.grid)] == theirs["image_grid_thw"].tolist() == [[1, 4, 6]]
    off = (model.pixels(ours.patches) - theirs["pixel_values"]).abs()
    assert off.max() < 1.01 * 2 / 255
    assert (off > 1e-4).float().mean() < 0.02
    assert model.cut(Frames(image[:, :9, :20], 0.0, still=True)).grid == (1, 2, 4)  # 9 x 20
    assert model.sampled(Sampling(), still=False).factor == 28


def test_a_videos_patches_are_its_frames_in_pairs(model: Qwen3VL) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    visual = model.cut(Frames(frames, 0.5))
    assert visual.grid == (2, 2, 2)
    first = visual.patches.reshape(2, 4, 3, 2, 14, 14)[1, 3]  # second slice, lower right: channel, frame, y, x
    assert torch.equal(first[:, 0], first[:, 1])  # the last frame twice
    assert torch.equal(first[:, 0], torch.from_numpy(frames[2, 14:, 14:]).permute(2, 0, 1))


# Positions


def mixed(model: Qwen3VL) -> Packed:
    """Two words, an image of 1 x 2 tokens, a word, a clip of two slices of 2 x 1 tokens, a word."""
    image, clip = tiny.clip(model, 0, 1, 28, 56, still=True), tiny.clip(model, 1, 4, 56, 28, 0.5)
    word = Special("<pause>")
    return pack([Layout({"x": (Segment("context", (word, word, image, word, clip, word)),)})], model.encode, model.pad)


def test_positions_by_hand(model: Qwen3VL) -> None:
    packed = mixed(model)
    ids, row = packed.ids[0].tolist(), packed.visual_row.tolist()
    assert packed.grids == ((1, 2, 4), (1, 4, 2), (1, 4, 2))
    video = model.model.config.video_token_id
    assert [i for i, token in enumerate(ids) if token == video] == row[2:]
    axes = packed.positions[:, 0]
    assert axes[:, :6].tolist() == [[0, 1, 2, 3, 3, 5], [0, 1, 2, 3, 3, 5], [0, 1, 2, 3, 4, 5]]
    start = row[2]
    at = axes[:, start - 1].tolist()[0]  # <|vision_start|>
    assert axes[:, start : start + 3].tolist() == [
        [at + 1, at + 1, at + 3],
        [at + 1, at + 2, at + 3],
        [at + 1, at + 1, at + 3],
    ]
    gap = row[4] - row[3] - 1  # <|vision_end|>, the moment in words, <|vision_start|>
    assert axes[:, row[4]].tolist() == [at + 3 + gap] * 3  # both slices are 2 positions long, as high as they are


def test_positions_are_transformers_own(model: Qwen3VL) -> None:
    shapes = [(1, 56, 84, True), (4, 56, 84, False), (5, 28, 56, False)]
    for seed, (frames, height, width, still) in enumerate(shapes):
        visual = tiny.clip(model, seed, frames, height, width, still=still)
        packed = prompt(model, visual)
        given = model.native(packed)
        kinds = given.pop("mm_token_type_ids")
        grids = {name: grid for name, grid in given.items() if name.endswith("grid_thw")}
        assert torch.equal(packed.positions, model.model.model.get_rope_index(packed.ids, kinds, **grids)[0])


# DeepStack


def test_early_features_reach_the_first_layers(model: Qwen3VL) -> None:
    """A forward in pieces, cut within a picture too, is the whole; without the sight it is another."""
    packed = prompt(model, tiny.clip(model, 5, 4, 56, 84))
    rows = packed.visual_row.tolist()
    cuts = [0, 3, rows[0] + 2, rows[-1], packed.ids.shape[1] - 2, packed.ids.shape[1]]
    with torch.no_grad():
        sight = model.look(packed)
        embeds, mask = model.embed(packed, sight), masks.additive(masks.visible(packed), torch.float32)

        def pieces(seen: object) -> Tensor:
            cache, parts = model.new_cache(), []
            for start, stop in itertools.pairwise(cuts):
                part = mask[:, :, start:stop, :stop]
                parts.append(
                    model.forward(embeds[:, start:stop], packed.positions[..., start:stop], part, cache, seen).last
                )
            return torch.cat(parts, 1)

        whole = model.forward(embeds, packed.positions, mask, None, sight).last
        torch.testing.assert_close(pieces(sight), whole, rtol=1e-5, atol=1e-5)
        assert (pieces(None) - whole).abs().max() > 0.1
