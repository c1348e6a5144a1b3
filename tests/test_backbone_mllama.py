"""Llama-3.2-Vision: its prompt, tiles, what cross attention sees, its two tables. The rest is in test_families.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil, get_optimal_tiled_canvas
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from engine import masks
from engine.backbones.base import Sight
from engine.backbones.mllama import Crossing, Mllama, crossed, cut_tiles, tile_grid
from engine.data.samples import Sample, context, ending
from engine.layout import Frames, Layout, Packed, Segment, Special, Visual, marker, pack, slots
from engine.methods.method import run
from tests import tiny
from tests.native import CLIP_MEAN, CLIP_STD, of_clip

# Of the published template: pictures and words of a turn, and what it writes before text alone.
TEMPLATE = """{{- bos_token }}{%- set image_ns = namespace(has_images=false) %}{%- for message in messages %}\
{%- for content in message['content'] %}{%- if content['type'] == 'image' %}{%- set image_ns.has_images = true %}\
{%- endif %}{%- endfor %}{%- endfor %}{%- if messages[0]['role'] == 'system' and image_ns.has_images %}\
{{- raise_exception("Prompting with images is incompatible with system messages.") }}{%- endif %}\
{%- if not image_ns.has_images %}{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "<|eot_id|>" }}\
{%- endif %}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\
{%- for content in message['content'] %}{%- if content['type'] == 'image' %}{{- '<|image|>' }}\
{%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}{%- endfor %}{{- '<|eot_id|>' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def model() -> Mllama:
    return tiny.tiny_mllama()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random, and smooth enough that a resize has something to keep."""
    coarse = np.random.default_rng(seed).integers(0, 256, (1, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def sample(visual: Visual | None, question: str = "What?") -> Sample:
    return Sample(visual, question, (), (), "", "as asked")


# Prompt


def test_the_prompt_is_the_chat_template(model: Mllama) -> None:
    templated = tiny.tiny_mllama()
    templated.tokenizer.chat_template = TEMPLATE
    image = tiny.clip(model, 0, 1, 56, 84, still=True)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = templated.tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert text.count("<|image|>") == 1
    for each in (model, templated):
        ids = each.encode(context(sample(image))).ids
        assert ids == each.tokenizer.encode(text, add_special_tokens=False)
        assert each.decode(each.encode(ending(sample(image))).ids) == "<|eot_id|>"
    alone = templated.decode(templated.encode(context(sample(None))).ids)
    assert alone.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024<|eot_id|>"
    )
    assert not alone.count("<|image|>")


def test_a_video_is_refused(model: Mllama) -> None:
    with pytest.raises(ValueError, match="images, not at videos"):
        model.cut(Frames(picture(28, 28).repeat(2, axis=0), 0.5))


# Tiles


def test_the_grid_of_tiles_by_hand() -> None:
    grids = {
        (560, 560): (1, 1),
        (300, 200): (1, 1),
        (561, 560): (2, 1),  # rather a second tile than a pixel less
        (600, 900): (2, 2),
        (400, 1200): (1, 3),
        (3000, 3000): (2, 2),  # fits nowhere: reduced the least
        (4000, 500): (4, 1),
    }
    assert {size: tile_grid(*size, 560, 4) for size in grids} == grids


@pytest.mark.parametrize(("side", "most"), [(560, 4), (28, 4), (28, 6)])
def test_the_grid_of_tiles_is_transformers_own(side: int, most: int) -> None:
    sizes = np.random.default_rng(0).integers(side // 4, side * 6, (400, 2)).tolist()
    sizes += [(side * a, side * b) for a in range(1, 7) for b in range(1, 7)]
    for height, width in sizes:
        canvas = get_optimal_tiled_canvas(height, width, most, side)
        assert tile_grid(height, width, side, most) == (canvas[0] // side, canvas[1] // side), (height, width)


@pytest.mark.parametrize(
    ("height", "width"), [(56, 56), (28, 84), (20, 20), (90, 170), (40, 100), (301, 97), (10, 200), (56, 41)]
)
def test_tiles_are_the_processors(height: int, width: int) -> None:
    """Pillow rounds a few pixels to the other side: no more than one level of 255, and few of them."""
    image = picture(height, width)
    size = {"height": 28, "width": 28}
    processor = MllamaImageProcessorPil(
        size=size, max_image_tiles=4, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    theirs = processor(image[0], return_tensors="pt")
    ours = cut_tiles(Frames(image, 0.0, still=True), 28, 4)
    count = len(ours.patches)
    assert ours.grid[1] * ours.grid[2] == count == theirs["num_tiles"][0][0]
    off = (of_clip(ours.patches) - theirs["pixel_values"][0, 0, :count]).abs()
    assert off.max() < 1.01 / 255 / min(CLIP_STD)
    assert (off > 1e-4).float().mean() < 0.02


def test_the_processors_shapes_are_those_that_the_model_is_fed(model: Mllama) -> None:
    for height, width in [(28, 84), (56, 56), (112, 28)]:
        theirs = MllamaImageProcessorPil(size={"height": 28, "width": 28})(
            picture(height, width)[0], return_tensors="pt"
        )
        visual = model.cut(Frames(picture(height, width), 0.0, still=True))
        packed = pack([Layout({"x": (context(sample(visual)),)})], model.encode, model.pad)
        fed = model.native(packed)
        assert torch.equal(fed["aspect_ratio_ids"], theirs["aspect_ratio_ids"])
        assert torch.equal(fed["aspect_ratio_mask"], theirs["aspect_ratio_mask"])


# What cross attention sees


def several(model: Mllama, *runs: int) -> Packed:
    """A word, then so many pictures side by side and two words, again and again."""
    word, pieces = Special("<pause>"), [Special("<pause>")]
    seed = 0
    for count in runs:
        for _ in range(count):
            pieces.append(tiny.clip(model, seed, 1, 28, 28 * (1 + seed % 3), still=True))
            seed += 1
        pieces += [word, word]
    return pack([Layout({"x": (Segment("context", tuple(pieces)),)})], model.encode, model.pad)


@pytest.mark.parametrize("runs", [(1,), (1, 1), (2, 1), (1, 2), (3,), (1, 2, 1)])
def test_pictures_are_seen_by_the_published_rule(model: Mllama, runs: tuple[int, ...]) -> None:
    packed = several(model, *runs)
    sight = model.look(packed)
    assert isinstance(sight, Crossing)
    mask = masks.additive(masks.visible(packed), torch.float32)
    found = crossed(sight, mask)
    counts = [rows * columns for _, rows, columns in packed.grids]
    ids = packed.ids[0].tolist()
    spans = get_cross_attention_token_mask(ids, model.model.config.image_token_index)
    dense = torch.from_numpy(convert_sparse_cross_attention_mask_to_dense([spans], [counts], 4, len(ids)))
    seen = found["cross_attention_mask"][0, 0] == 0  # [length, 1 + pictures x tiles x patches]
    tiles = seen[:, 1:].reshape(len(ids), len(counts), 4, 17)
    assert torch.equal(tiles, dense[0].bool()[..., None].expand_as(tiles))
    none = ~dense[0].flatten(1).any(1)
    assert torch.equal(seen[:, 0], none)
    assert torch.equal(found["full_text_row_masked_out_mask"][0, 0, :, 0], (~none).float())


def test_several_pictures_at_once_are_transformers_own(model: Mllama) -> None:
    """From the first picture's token on; nothing stands before it here, as in a base model's prompt."""
    one, two = (tiny.clip(model, i, 1, 28 * (1 + i), 56, still=True) for i in range(2))
    line = Segment("context", (one, "What? ", two, "And this?"))
    packed = pack([Layout({"x": (line,)})], model.encode, model.pad)
    ids, rows = packed.ids[0].tolist(), packed.visual_row.tolist()
    given = model.native(packed)
    looks = torch.zeros(1, len(ids), 2, 4, dtype=torch.long)
    looks[0, rows[0] : rows[1], 0, : len(one.patches)] = 1
    looks[0, rows[1] :, 1, : len(two.patches)] = 1
    with torch.no_grad():
        ours = run(model, packed).hidden
        theirs = model.model(input_ids=packed.ids, output_hidden_states=True, **given)
    assert rows[0] == 0
    assert torch.equal(given["cross_attention_mask"], looks)
    for mine, layer in zip(ours, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, layer, rtol=1e-5, atol=2e-5)


def blind_states(model: Mllama, visual: Visual) -> Tensor:
    """The last states of a marker and a target that see the slots alone, whose own states are put in from elsewhere."""
    think = slots("<pause>", 2)
    speak = (marker("<COT>", sees=()), Segment("target", ("It was so.",)))
    packed = pack([Layout({"x": (context(sample(visual)), think, *speak)})], model.encode, model.pad)
    with torch.no_grad():
        hidden = run(model, packed).hidden
    rows = packed.branches["x"].row
    return torch.stack([layer[0, rows] for layer in hidden])


def test_a_row_that_may_not_see_the_picture_does_not(model: Mllama) -> None:
    """Behind a marker that sees nothing, every picture gives the same, which is what the text alone gives."""
    pictures = [tiny.clip(model, i, 1, 56, 84, still=True) for i in range(2)]
    one, other = (blind_states(model, each) for each in pictures)
    assert torch.equal(one, other)
    seen = [pack([Layout({"x": (context(sample(each)),)})], model.encode, model.pad) for each in pictures]
    with torch.no_grad():
        last = [run(model, each).hidden[-1][0, -1] for each in seen]
    assert (last[0] - last[1]).abs().max() > 0.1


def test_tokens_before_the_picture_are_those_of_text_alone(model: Mllama) -> None:
    """Meta's rule: cross attention gives a row nothing that sees no picture."""
    packed = pack([Layout({"x": (context(sample(tiny.clip(model, 0, 1, still=True))),)})], model.encode, model.pad)
    first = int(packed.visual_row[0])
    with torch.no_grad():
        ours = run(model, packed).hidden[-1][:, :first]
        theirs = model.model(input_ids=packed.ids[:, :first], output_hidden_states=True).hidden_states[-1]
    assert first > 3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_pictures_a_layer_that_is_left_out_gives_what_it_got(model: Mllama) -> None:
    packed = pack([Layout({"x": (context(sample(None)),)})], model.encode, model.pad)
    assert model.look(packed) is None
    hidden = run(model, packed).hidden
    assert len(hidden) == model.layers + 1
    for index, crosses in enumerate(model.crossing[:-1]):
        assert torch.equal(hidden[index], hidden[index + 1]) == crosses


def test_what_cross_attention_keeps_is_computed_once(model: Mllama) -> None:
    """Behind a cache the pictures' keys are those of the first call; another pack has its own."""
    packed = pack([Layout({"x": (context(sample(tiny.clip(model, 0, 1, still=True))),)})], model.encode, model.pad)
    sight: Sight | None = model.look(packed)
    assert isinstance(sight, Crossing)
    embeds, mask = model.embed(packed, sight), masks.additive(masks.visible(packed), torch.float32)
    cache, half = model.new_cache(), 10
    with torch.no_grad():
        model.forward(embeds[:, :half], packed.positions[..., :half], mask[:, :, :half, :half], cache, sight)
        kept = [layer.keys for layer in sight.layers]
        model.forward(embeds[:, half:], packed.positions[..., half:], mask[:, :, half:], cache, sight)
    assert len(kept) == 2
    assert all(layer.keys is keys for layer, keys in zip(sight.layers, kept, strict=True))
    assert [layer.keys.shape[2] for layer in cache.layers] == [packed.ids.shape[1]] * 3
    assert not model.look(packed).layers[0].is_initialized


# Tables


def test_the_picture_is_embedded_and_never_predicted(model: Mllama) -> None:
    config = model.model.config
    assert config.image_token_index == len(model.tokenizer) - 1 == config.text_config.vocab_size
    assert model.logits(torch.zeros(1, 64)).shape[-1] == config.text_config.vocab_size
    assert model.embed_ids(torch.tensor([config.image_token_index])).shape == (1, 64)
