"""LLaVA-NeXT and LLaVA-NeXT-Video: prompt, Vicuna's tokenizer, tiles, tokens. The rest is in test_families.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from engine.backbones.llava_next import (
    VICUNA,
    LlavaNext,
    LlavaNextVideo,
    best_resolution,
    cut_frames,
    cut_tiles,
    image_tokens,
)
from engine.backbones.load import load
from engine.data.samples import Sample, context, ending
from engine.layout import Frames, Opening, Segment, Visual
from tests import tiny
from tests.native import CLIP_MEAN, CLIP_STD, of_clip

PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SMALL = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]

# As published with llava-v1.6-vicuna-7b-hf and LLaVA-NeXT-Video-7B-hf.
TEMPLATE = """{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}\
{% else %}{{ message['role'].upper() + ': '}}{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}\
{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


@pytest.fixture(scope="module")
def model() -> LlavaNextVideo:
    return tiny.tiny_llava_video()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random, and smooth enough that a resize has something to keep."""
    coarse = np.random.default_rng(seed).integers(0, 256, (1, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def sample(visual: Visual | None, question: str = "What is it?") -> Sample:
    return Sample(visual, question, (), (), "", "as asked")


def vicuna_tokenizer() -> PreTrainedTokenizerFast:
    """Of Vicuna's kind: a space before every text, spaces as ▁, unknown characters as bytes, <s> before everything."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{i:02X}>" for i in range(256)],
        "▁",
        *"abcdefghijklmnopqrstuvwxyzUSERAITN:?.",
    ]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = []
    for left, right in [
        ("▁", "U"),
        ("▁U", "S"),
        ("▁", "W"),
        ("▁", "i"),
        ("▁i", "s"),
        ("U", "S"),
        ("i", "s"),
        ("E", "R"),
        ("▁", "▁"),
    ]:
        if left in vocabulary and right in vocabulary:
            vocabulary.setdefault(left + right, len(vocabulary))
            merges.append((left, right))
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    fast.add_tokens(["<image>", "<video>", "<pause>"], special_tokens=True)
    return fast


# Prompt


def test_plain_text_begins_as_the_tokenizer_begins_it() -> None:
    """With its beginning token where it sets one, before an image too; with nothing where it sets none."""
    made = tiny.tiny_llava()
    begun, bare = LlavaNext(made.model, vicuna_tokenizer()), made
    asked = Sample(None, "is it", (), (), "", "free-form", "plain")
    assert begun.encode(context(asked)).ids == [begun.tokenizer.bos_token_id, *begun.text_ids("is it\n")]
    seen = begun.encode(context(replace(asked, visual=tiny.clip(made, 0, 1, 56, 84, still=True))))
    assert seen.ids[0] == begun.tokenizer.bos_token_id
    assert seen.visual[0][1][0] == 1
    for model in (bare, tiny.tiny_gpt2(), tiny.tiny_llama()):
        assert model.encode(context(asked)).ids == model.text_ids("is it\n")


@pytest.mark.parametrize("frames", [1, 3])
def test_the_prompt_is_the_chat_template(model: LlavaNextVideo, frames: int) -> None:
    templated = tiny.tiny_llava_video()
    templated.tokenizer.chat_template = TEMPLATE
    visual = tiny.clip(model, 0, frames, 56, 84, still=frames == 1)
    kind = "image" if frames == 1 else "video"
    user = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What is it?"}]}
    text = templated.tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert text == f"USER: <{kind}>\nWhat is it? ASSISTANT:"
    count = 12 if frames == 3 else image_tokens(56, 84, 28, 4, SMALL)
    whole = text.replace(f"<{kind}>", f"<{kind}>" * count)
    for each, before in ((templated, ""), (model, f"<s>{VICUNA}")):  # without a template, Vicuna's published form
        ids = each.encode(context(sample(visual))).ids
        assert ids == each.tokenizer.encode(before + whole, add_special_tokens=False)
        assert each.decode(each.encode(ending(sample(visual))).ids) == "</s>"


@pytest.mark.parametrize("question", ["What is it?", " is it", "\nis", "it  is é <image>?"])
@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_vicunas_tokenizer_reads_pieces_as_it_reads_the_whole(question: str, template: str | None) -> None:
    """It sets a space before a text: before the whole prompt, and not before each piece of it."""
    model = tiny.tiny_llava()
    words = vicuna_tokenizer()
    words.chat_template = template
    backbone = LlavaNext(model.model, words)
    assert backbone.spaced
    assert not model.spaced
    image = tiny.clip(model, 0, 1, 56, 84, still=True)
    ids = backbone.encode(context(sample(image, question))).ids
    places = ids.count(model.model.config.image_token_index)
    seen, rest = ids.index(model.model.config.image_token_index), question.replace("<image>", "")
    plain = [i for i in backbone.encode(context(sample(image, rest))).ids if i != model.model.config.image_token_index]
    start = "" if template else VICUNA
    whole = words(f"{start}USER: <video>\n{rest} ASSISTANT:").input_ids
    assert places == image_tokens(56, 84, 28, 4, SMALL)
    assert [i for i in whole if i != words.convert_tokens_to_ids("<video>")] == plain
    assert whole[0] == ids[0] == words.bos_token_id
    assert words.convert_tokens_to_ids("<video>") not in ids
    assert seen == whole.index(words.convert_tokens_to_ids("<video>"))


def test_a_template_that_is_the_processors_alone_is_found(tmp_path: Path) -> None:
    """As in LLaVA-NeXT's Mistral, whose format is another than Vicuna's."""
    tiny.tiny_llava().save(tmp_path)
    mistral = """{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% for content in message['content'] %}\
{{ content['text'] }}{% endfor %} [/INST]{% else %} {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"""
    assert load(tmp_path).chat(Opening())[0] == f"<s>{VICUNA}USER: "
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": mistral}))
    assert load(tmp_path).chat(Opening("Be brief.", sees=True)) == ("[INST] ", " [/INST]", "</s>")


def test_an_image_model_refuses_a_video() -> None:
    model = tiny.tiny_llava()
    with pytest.raises(ValueError, match="images, not at videos"):
        model.cut(Frames(picture(28, 28).repeat(2, axis=0), 0.5))


def test_rows_and_positions(model: LlavaNextVideo) -> None:
    """An image of 28 x 84 pixels: 4 x 4 tokens of the whole, then 4 rows of 12 and one that ends the row."""
    image, clip = tiny.clip(model, 0, 1, 28, 84, still=True), tiny.clip(model, 1, 3)
    encoded = model.encode(Segment("context", (image, "So", clip)))
    config = model.model.config
    rows = [rows for _, rows in encoded.visual]
    assert [len(each) for each in rows] == [16 + 4 * 13, 3 * 2 * 2]
    assert [encoded.ids[row] for row in rows[0]] == [config.image_token_index] * 68
    assert [encoded.ids[row] for row in rows[1]] == [config.video_token_index] * 12
    assert encoded.positions.tolist() == [list(range(len(encoded.ids)))]
    assert (image.grid, clip.grid) == ((1, 28, 84), (3, 2, 2))
    assert (
        model.decode([i for i in encoded.ids if i not in (config.image_token_index, config.video_token_index)])
        == "\nSo\n"
    )


# Tiles


SIZES = [(28, 84), (56, 56), (90, 170), (40, 100), (301, 97), (10, 200), (56, 41), (33, 57), (20, 20)]


@pytest.mark.parametrize(("known", "top"), [(PUBLISHED, 3000), (SMALL, 200), ([[56, 84], [112, 28]], 200)])
def test_the_best_resolution_is_transformers_own(known: list[list[int]], top: int) -> None:
    sizes = [*SIZES, *np.random.default_rng(0).integers(10, top, (300, 2)).tolist(), (2, 2)]
    for height, width in sizes:
        assert best_resolution(height, width, known) == select_best_resolution((height, width), known), (height, width)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_images_tiles_are_the_processors(height: int, width: int) -> None:
    """Pillow rounds a few pixels to the other side: no more than one level of 255, and few of them."""
    image = picture(height, width)
    crop = {"height": 28, "width": 28}
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop, image_grid_pinpoints=SMALL)
    theirs = processor(image[0], return_tensors="pt")
    ours = cut_tiles(Frames(image, 0.0, still=True), 28, SMALL)
    assert theirs["image_sizes"].tolist() == [list(ours.grid[1:])]
    assert ours.patches.shape == theirs["pixel_values"][0].shape
    off = (of_clip(ours.patches) - theirs["pixel_values"][0]).abs()
    assert off.max() < 1.01 / 255 / min(CLIP_STD)
    assert (off > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize(("height", "width"), [(28, 28), (56, 84), (90, 41), (31, 57)])
def test_a_frame_is_resized_and_cropped_as_by_the_processor(height: int, width: int) -> None:
    """CLIP's, whose settings the video processor has."""
    frames = np.concatenate([picture(height, width, seed) for seed in range(2)])
    crop = {"height": 28, "width": 28}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=crop, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    theirs = processor(list(frames), return_tensors="pt")["pixel_values"]
    off = (of_clip(cut_frames(frames, 28)) - theirs).abs()
    assert off.max() < 1.01 / 255 / min(CLIP_STD)
    assert (off > 1e-4).float().mean() < 0.02


def test_tokens_by_hand() -> None:
    """Published shapes: 24 x 24 tokens a tile, then the rows that the picture fills, each with its end."""
    assert image_tokens(672, 672, 336, 24, PUBLISHED) == 576 + 48 * 49
    assert image_tokens(336, 672, 336, 24, PUBLISHED) == 576 + 24 * 49
    assert image_tokens(500, 1000, 336, 24, PUBLISHED) == 576 + 24 * 49
    assert image_tokens(600, 800, 336, 24, PUBLISHED) == 576 + 36 * 49  # 48 columns, three quarters as many rows


@pytest.mark.parametrize("known", [PUBLISHED, SMALL])
def test_tokens_are_counted_as_by_the_processor(model: LlavaNextVideo, known: list[list[int]]) -> None:
    side = 336 if known is PUBLISHED else 28
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=known)
    patch = 14 if known is PUBLISHED else 7
    processor = LlavaNextProcessor(images, model.tokenizer, patch, "default", num_additional_image_tokens=1)
    sizes = [*SIZES, *np.random.default_rng(1).integers(20, 4 * side, (200, 2)).tolist()]
    theirs = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    assert [image_tokens(height, width, side, side // patch, known) for height, width in sizes] == theirs


@pytest.mark.parametrize(("height", "width"), [*SIZES, (2, 2)])
def test_features_are_as_many_as_tokens(model: LlavaNextVideo, height: int, width: int) -> None:
    """For a picture of as many pixels as a frame has tokens too, which is enlarged."""
    visual = model.cut(Frames(picture(height, width), 0.0, still=True))
    with torch.no_grad():
        assert len(model.encode_patches(visual.patches, [visual.grid])) == len(model.places(visual))


def test_pictures_and_videos_at_once_come_in_their_order(model: LlavaNextVideo) -> None:
    visuals = [tiny.clip(model, 0, 2), tiny.clip(model, 1, 1, still=True), tiny.clip(model, 2, 1), tiny.clip(model, 3, 1, 84, 28, still=True)]  # fmt: skip
    with torch.no_grad():
        alone = [model.encode_patches(v.patches, [v.grid]) for v in visuals]
        together = model.encode_patches(torch.cat([v.patches for v in visuals]), [v.grid for v in visuals])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert [len(each) for each in alone] == [len(model.places(v)) for v in visuals]
