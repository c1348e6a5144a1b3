"""InternVL: prompt, tiles, vision, forward and latents, against transformers' own and hand-written values."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from engine import generate, masks
from engine.ask import ask
from engine.backbones.base import SPECIAL_TOKENS, Backbone
from engine.backbones.internvl import MOST_TILES, SIDE, InternVL, cut_tiles, tile_grid
from engine.backbones.load import load
from engine.backbones.text import TextLM
from engine.data.samples import Sample, context
from engine.layout import Frames, Layout, Packed, Visual, pack, slots
from engine.methods.coconut import LATENT, START, STOP, Coconut
from engine.methods.method import Outcome, run
from engine.models import PUBLISHED_SAMPLING, Model
from engine.video import Clip
from tests import tiny
from tests.test_generate import paths, uncached

QUESTION = "What?"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as published with the weights


@pytest.fixture(scope="module")
def model() -> InternVL:
    made = tiny.tiny_internvl()
    made.tokenizer.add_tokens([START, LATENT, STOP], special_tokens=True)
    made.model.resize_token_embeddings(len(made.tokenizer), mean_resizing=True)
    return made


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random, and smooth enough that a resize has something to keep."""
    coarse = np.random.default_rng(seed).integers(0, 256, (1, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def normalised(visual: Visual) -> Tensor:
    mean, std = (torch.tensor(x)[None, :, None, None] for x in (MEAN, STD))
    return (visual.patches / 255 - mean) / std


# Prompt


def words(model: InternVL, sample: Sample) -> str:
    """The prompt, and whether it falls into the tokens of the whole."""
    ids = model.encode(context(sample)).ids
    text = model.decode(ids)
    assert ids == model.tokenizer.encode(text, add_special_tokens=False)
    return text


@pytest.mark.parametrize("question", [QUESTION, "\nA line first", "  spaces"])
def test_an_image_stands_on_a_line_of_its_own(model: InternVL, question: str) -> None:
    image = model.cut(Frames(picture(56, 84), 0.0, still=True))  # 2 x 3 tiles and a thumbnail
    seen = f"<img>{'<IMG_CONTEXT>' * 4 * 7}</img>\n"
    assert words(model, Sample(image, question, (), (), "", dialect="plain")) == f"{seen}{question}\n"
    chat = words(model, Sample(image, question, (), (), "", "free-form"))
    start = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
    assert chat.startswith(f"{start}{seen}{question}\nPlease")
    assert chat.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_video_is_a_numbered_line_a_frame(model: InternVL) -> None:
    frame = f"<img>{'<IMG_CONTEXT>' * 4}</img>\n"
    clip = tiny.clip(model, 0, 3)
    sample = Sample(clip, QUESTION, (), (), "", dialect="plain")
    assert words(model, sample) == f"Frame1: {frame}Frame2: {frame}Frame3: {frame}What?\n"
    encoded = model.encode(context(sample))
    context_id = model.model.config.image_token_id
    rows = [row for _, held in encoded.visual for row in held]
    assert rows == [row for row, token in enumerate(encoded.ids) if token == context_id]
    assert torch.equal(torch.cat([frame.patches for frame, _ in encoded.visual]), clip.patches)
    assert encoded.positions.tolist() == [list(range(len(encoded.ids)))]
    assert encoded.extent == len(encoded.ids)


def test_what_looks_like_an_image_in_text_stays_text(model: InternVL) -> None:
    special = {model.token(token) for token in ("<img>", "</img>", "<IMG_CONTEXT>")}
    ids = model.text_ids("<img><IMG_CONTEXT></img>")
    assert not special & set(ids)
    assert model.decode(ids) == "<img><IMG_CONTEXT></img>"


# Tiles


def test_the_grid_of_tiles_by_hand() -> None:
    """(height, width) -> (rows, columns)."""
    grids = {
        (448, 448): (1, 1),
        (640, 640): (2, 2),  # as square as one tile, and no more than twice as large as the picture
        (630, 630): (1, 1),
        (1200, 1200): (3, 3),
        (600, 800): (3, 4),
        (1080, 1920): (2, 4),  # 2 : 1 is nearest to 16 : 9 with at most 12
        (270, 480): (1, 2),
        (2000, 100): (12, 1),
    }
    assert {size: tile_grid(*size) for size in grids} == grids


@pytest.mark.parametrize(("side", "most"), [(SIDE, MOST_TILES), (28, 12), (28, 5), (448, 1)])
def test_the_grid_of_tiles_is_transformers_own(side: int, most: int) -> None:
    sizes = np.random.default_rng(0).integers(side // 4, side * 6, (400, 2)).tolist()
    sizes += [(side * a, side * b) for a in range(1, 7) for b in range(1, 7)]
    for height, width in sizes:
        columns, rows = get_optimal_tiled_canvas((height, width), (side, side), 1, most)
        assert tile_grid(height, width, side, most) == (rows, columns), (height, width)


@pytest.mark.parametrize(("height", "width"), [(90, 170), (56, 56), (28, 28), (20, 200), (301, 97)])
def test_an_images_tiles_are_the_processors(height: int, width: int) -> None:
    """Pillow rounds a few pixels to the other side: no more than one level of 255, and few of them."""
    image = picture(height, width)
    size = {"height": 28, "width": 28}
    processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, image_mean=list(MEAN), image_std=list(STD))
    theirs = processor(image[0], return_tensors="pt")
    ours = cut_tiles(Frames(image, 0.0, still=True), 28)
    assert ours.patches.dtype == torch.uint8
    assert len(ours.patches) == int(theirs["num_patches"][0])
    off = (normalised(ours) - theirs["pixel_values"]).abs()
    assert off.max() < 1.01 / 255 / min(STD)
    assert (off > 1e-4).float().mean() < 0.02


def test_tiles_come_row_by_row_and_the_thumbnail_last() -> None:
    image = np.zeros((1, 56, 84, 3), np.uint8)
    for row in range(2):
        for column in range(3):
            image[0, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28] = (10 * row, 20 * column, 99)
    visual = cut_tiles(Frames(image, 0.0, still=True), 28)
    assert (visual.grid, visual.still, visual.patches.shape) == ((1, 2, 3), True, (7, 3, 28, 28))
    for number, tile in enumerate(visual.patches[:6]):
        for channel, value in enumerate((10 * (number // 3), 20 * (number % 3), 99)):
            assert (tile[channel] == value).all()
    thumbnail = visual.patches[6]
    assert [thumbnail[:, y, x].tolist() for y, x in ((2, 2), (2, 26), (26, 2))] == [
        [0, 0, 99],
        [0, 40, 99],
        [10, 0, 99],
    ]


def test_a_video_has_a_tile_a_frame_and_a_still_is_the_first() -> None:
    frames = np.concatenate([np.full((1, 28, 56, 3), 9 * i, np.uint8) for i in range(4)])
    video = cut_tiles(Frames(frames, 0.5), 28)
    assert (video.grid, video.seconds, video.still, video.patches.shape) == ((4, 1, 1), 0.5, False, (4, 3, 28, 28))
    assert video.patches.float().mean((1, 2, 3)).tolist() == [0, 9, 18, 27]
    still = cut_tiles(Frames(frames[1:], 0.5, still=True), 28)
    assert still.patches.shape == (3, 3, 28, 28)
    assert (still.patches == 9).all()


# Vision


def test_all_visuals_at_once_are_each_alone(model: InternVL) -> None:
    visuals = [
        tiny.clip(model, 0),
        tiny.clip(model, 1, 1, 84, 56, still=True),
        tiny.clip(model, 2, 1, 28, 28, still=True),
    ]
    with torch.no_grad():
        together = model.encode_patches(torch.cat([v.patches for v in visuals]), [v.grid for v in visuals])
        alone = [model.encode_patches(v.patches, [v.grid]) for v in visuals]
        theirs = [model.model.get_image_features(pixel_values=normalised(v)).pooler_output for v in visuals]
    assert [len(features) for features in alone] == [16, 28, 4]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, torch.cat(theirs).flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_published_sizes() -> None:
    """A tile of 448 pixels is 256 tokens, without building the published model."""

    class Published:
        config = copy.deepcopy(tiny.tiny_internvl(layers=1).model.config)

    Published.config.vision_config.image_size, Published.config.vision_config.patch_size = (448, 448), (14, 14)
    backbone = InternVL(Published, None)
    assert (backbone.tile_side, backbone.tile_tokens) == (448, 256)
    assert backbone.cut(Frames(picture(600, 800), 0.0, still=True)).patches.shape == (13, 3, 448, 448)


# Forward


def prompt(model: Backbone, sample: Sample) -> Packed:
    return pack([Layout({"x": (context(sample),)})], model.encode, model.pad)


@pytest.mark.parametrize("still", [True, False])
def test_the_forward_is_transformers_own(model: InternVL, still: bool) -> None:
    visual = tiny.clip(model, 5, 1 if still else 3, 84, 56, still=still)
    packed = prompt(model, Sample(visual, QUESTION, (), (), ""))
    with torch.no_grad():
        mask = masks.additive(masks.visible(packed), torch.float32)
        states = model.forward(model.embed(packed), packed.positions, mask)
        theirs = model.model(input_ids=packed.ids, pixel_values=normalised(visual), output_hidden_states=True)
    assert len(states.hidden) == model.layers + 1
    for ours, layer in zip(states.hidden, theirs.hidden_states, strict=True):
        torch.testing.assert_close(ours, layer, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.logits(states.last), theirs.logits, rtol=1e-5, atol=1e-5)


def test_the_language_model_alone(model: InternVL) -> None:
    """Text goes through it as through the whole, with the same weights; vision is gone, and nothing of the whole is."""
    alone = InternVL(model.language_model(), model.tokenizer)
    packed = prompt(model, Sample(None, QUESTION, (), (), ""))
    with torch.no_grad():
        outs = [run(each, packed) for each in (model, alone)]
    assert torch.equal(outs[0].hidden[-1], outs[1].hidden[-1])
    assert torch.equal(*(each.backbone.logits(each.hidden[-1]) for each in outs))
    names = {name for name, _ in model.model.named_parameters()}
    kept = {name for name, _ in alone.model.named_parameters()}
    assert names - kept == {name for name in names if "vision_tower" in name or "multi_modal_projector" in name}
    copied = dict(copy.deepcopy(alone.model).named_parameters())
    assert copied.keys() == kept


# Latents


def samples(model: InternVL) -> list[Sample]:
    """One, three and two steps over an image, a video and nothing, so that prompts and chains differ in length."""
    seen = [tiny.clip(model, 1, 1, 56, 84, still=True), tiny.clip(model, 2, 2), None]
    steps = [("one",), ("one", "two and more", "three"), ("one", "two")]
    return [Sample(v, QUESTION * (i + 1), (), s, "3", dialect="plain") for i, (v, s) in enumerate(zip(seen, steps))]


def latent_run(model: InternVL, chosen: Sequence[Sample]) -> Outcome:
    """As many thoughts as a sample has steps, two a step."""
    method = Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=3)
    layouts = [method.layout(sample, np.random.default_rng(0), epoch=len(sample.steps)) for sample in chosen]
    return run(model, pack(layouts, model.encode, model.pad))


def test_cached_thoughts_are_those_of_running_everything_again(model: InternVL) -> None:
    for sample in samples(model):
        out = latent_run(model, [sample])
        packed, latents = out.packed, out.packed.slot_row.tolist()
        assert len(latents) == 2 * len(sample.steps)
        with torch.no_grad():
            embeds = model.embed(packed)
            for row in latents:
                mask = masks.additive(masks.visible(packed), embeds.dtype)
                embeds[:, row] = model.forward(embeds, packed.positions, mask).last[:, row - 1]
            hidden = model.forward(embeds, packed.positions, mask).hidden
        for ours, theirs in zip(out.hidden, hidden, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_batch_of_thoughts_gives_each_sample_what_it_gets_alone(model: InternVL) -> None:
    chosen = samples(model)
    together = latent_run(model, chosen)
    real = together.packed.node >= 0
    assert len(set(real.float().argmax(1).tolist())) > 1  # brought into line from the left
    for b, sample in enumerate(chosen):
        alone = latent_run(model, [sample])
        for ours, theirs in zip(together.hidden, alone.hidden, strict=True):
            torch.testing.assert_close(ours[b, real[b]], theirs[0], rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_picture_through_the_first_thought(model: InternVL) -> None:
    out = latent_run(model, samples(model)[:1])
    model.model.zero_grad(set_to_none=True)
    Coconut().loss(out)[0].backward()
    vision = model.model.model.vision_tower
    assert float(vision.embeddings.patch_embeddings.projection.weight.grad.norm()) > 1e-4


# The whole path


@pytest.mark.parametrize("name", ["answer", "speak", "explicit"])
def test_cached_generation_equals_running_everything_again(model: InternVL, name: str) -> None:
    chosen = tiny.samples(model)
    written = getattr(generate, name)(model, generate.think(model, chosen, (slots("<pause>", 3),)), limit=6)
    for sample, ids in zip(chosen, written.ids, strict=True):
        assert ids == uncached(model, paths(sample, 3)[name], 6)


def test_a_clip_and_an_image_are_answered(model: InternVL) -> None:
    whole = Model(model, "tiny", None, PUBLISHED_SAMPLING, None)
    for count in (3, 1):
        frames = picture(56, 84).repeat(count, axis=0)
        clip = Clip(frames, np.arange(count) / 2, count / 2, 2.0, (84, 56), "none", count)
        reply = ask(whole, clip, "Where?", ["left", "right"], pauses=2)
        assert reply.answer in ("left", "right")
        assert reply.states.shape == (model.layers + 1, 2, 64)


# Files


def test_saved_and_loaded_it_is_the_same(model: InternVL, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = load(tmp_path, tokens=(*SPECIAL_TOKENS, START))
    assert isinstance(loaded, InternVL)
    mine, theirs = model.model.state_dict(), loaded.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert loaded.text_ids(tiny.EXAMPLE) == model.text_ids(tiny.EXAMPLE)
    assert loaded.token(START) == model.token(START)
    assert (loaded.pad, loaded.end) == (model.pad, model.end)
    assert not loaded.model.training


def test_tokens_beyond_the_embedding_make_it_grow(model: InternVL, tmp_path: Path) -> None:
    model.save(tmp_path)
    grown = InternVL.load(tmp_path, tokens=("<new>",))
    count = len(model.tokenizer)
    there, rows = (m.model.get_input_embeddings().weight for m in (model, grown))
    assert grown.token("<new>") == count == len(there)
    assert len(rows) == len(grown.model.lm_head.weight) == grown.text_config.vocab_size == count + 1
    assert torch.equal(rows[:count], there)
    assert grown.model.config.image_token_id == grown.token("<IMG_CONTEXT>")


def test_checkpoints_with_their_own_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "internvl_chat", "auto_map": {"AutoConfig": "x.Y"}})
    )
    with pytest.raises(ValueError, match="-hf version"):
        load(tmp_path)


def test_a_language_model_sees_nothing(model: InternVL) -> None:
    blind = TextLM(model.language_model(), model.tokenizer)
    with pytest.raises(ValueError, match="without vision"):
        blind.cut(Frames(picture(28, 28), 0.0))
    with pytest.raises(ValueError, match="without vision"):
        blind.encode(context(Sample(tiny.clip(model), QUESTION, (), (), "")))
