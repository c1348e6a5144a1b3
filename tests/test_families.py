"""What holds for every family with eyes that was added to the first two: against transformers' own, on tiny random models.

Each family's own rules (positions, tiles, prompts) are in its own file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import adapters, generate, masks
from engine.adapters import MAIN, Lora
from engine.ask import ask
from engine.backbones.base import SPECIAL_TOKENS, Backbone, add_tokens
from engine.backbones.llama_lite0 import LlamaLite0
from engine.backbones.load import FAMILIES, around, load
from engine.backbones.mllama import Mllama
from engine.backbones.text import TextLM
from engine.data.samples import Sample, context
from engine.insight import attention
from engine.insight import replace as matter
from engine.layout import Frames, Layout, Packed, Visual, pack, slots
from engine.methods.coconut import LATENT, START, STOP, Coconut
from engine.methods.heima import Heima, Interpreters
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.models import PUBLISHED_SAMPLING, Model
from engine.recompute import recompute_layers
from engine.video import Clip
from tests import tiny
from tests.native import has_videos, leak_closed
from tests.near import states_close
from tests.rows import only
from tests.test_generate import paths, uncached

MAKERS: list[Callable[..., Backbone]] = [
    tiny.tiny_qwen3vl, tiny.tiny_mllama, tiny.tiny_llava, tiny.tiny_llava_video, tiny.tiny_lite0
]  # fmt: skip

# Qwen's, without what our prompts don't use; contents are text, or parts.
CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}\
{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


@pytest.fixture(scope="module", params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Backbone]:
    return request.param


@pytest.fixture(scope="module")
def model(make: Callable[..., Backbone]) -> Backbone:
    made = make()
    add_tokens(made.model, made.tokenizer, (START, LATENT, STOP))
    return made


def visual(model: Backbone, seed: int, frames: int = 1, height: int = 56, width: int = 84) -> Visual:
    """A video where the family has them and `frames` is more than 1; else a picture."""
    still = frames == 1 or not has_videos(model)
    return tiny.clip(model, seed, 1 if still else frames, height, width, still=still)


@pytest.fixture(scope="module")
def samples(model: Backbone) -> list[Sample]:
    """A video where the family has them, images of other shapes, nothing: all of different lengths."""
    return [
        Sample(visual(model, 1, 4), "Where is it?", ("left", "right"), ("It starts left. Then right.",), "B"),
        Sample(visual(model, 2, 1, 84, 56), "How many?", (), ("One, two, three.",), "3", "numerical"),
        Sample(visual(model, 3, 5, 28, 28), "What happens?", (), ("A is touched.",), "it moves", "free-form"),
        Sample(None, "What is one and one?", ("1", "2", "3"), ("1 + 1 = 2, and no more than that.",), "B"),
    ]


def prompt(model: Backbone, sample: Sample) -> Packed:
    return pack([Layout({"x": (context(sample),)})], model.encode, model.pad)


# transformers' own


@pytest.mark.parametrize("index", range(4))
def test_the_forward_is_transformers_own(model: Backbone, samples: list[Sample], index: int) -> None:
    sample = samples[index]
    packed = prompt(model, sample)
    with torch.no_grad(), leak_closed(model, packed):
        sight = model.look(packed)
        mask = masks.additive(masks.visible(packed), torch.float32)
        states = model.forward(model.embed(packed, sight), packed.positions, mask, None, sight)
        theirs = model.model(input_ids=packed.ids, output_hidden_states=True, **model.native(packed))
    assert len(states.hidden) == model.layers + 1
    if len(theirs.hidden_states) == len(states.hidden):  # layers that are left out have none there
        for ours, layer in zip(states.hidden, theirs.hidden_states, strict=True):
            states_close(ours, layer, 1e-5)
    states_close(states.last, theirs.hidden_states[-1], 1e-5)
    torch.testing.assert_close(model.logits(states.last), theirs.logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("index", range(4))
def test_greedy_decoding_is_transformers_generate(model: Backbone, samples: list[Sample], index: int) -> None:
    sample, limit = samples[index], 10
    ours = generate.explicit(model, generate.think(model, [sample], ()), limit).ids[0]
    packed = prompt(model, sample)
    with leak_closed(model, packed):
        theirs = model.model.generate(
            packed.ids, attention_mask=torch.ones_like(packed.ids), max_new_tokens=limit, do_sample=False,
            eos_token_id=model.end, pad_token_id=model.pad, **model.native(packed),
        )  # fmt: skip
    assert ours == theirs[0, packed.ids.shape[1] :].tolist()
    assert len(set(ours)) > 2


@pytest.mark.parametrize("older", [tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_gpt2, tiny.tiny_llama])
@pytest.mark.parametrize("template", [None, CHATML])
def test_greedy_decoding_of_the_first_families_is_too(older: Callable[..., Backbone], template: str | None) -> None:
    """Whether the files bring a chat template or not."""
    model, limit = older(), 10
    model.tokenizer.chat_template = template
    seen = [None]
    if not isinstance(model, TextLM):
        seen += [tiny.clip(model, 1), tiny.clip(model, 2, 1, 84, 56, still=True)]
    for each in seen:
        sample = Sample(each, "How many?", (), (), "", "numerical")
        packed = prompt(model, sample)
        ours = generate.explicit(model, generate.think(model, [sample], ()), limit).ids[0]
        theirs = model.model.generate(
            packed.ids, attention_mask=torch.ones_like(packed.ids), max_new_tokens=limit, do_sample=False,
            eos_token_id=model.end, pad_token_id=model.pad, **model.native(packed),
        )  # fmt: skip
        assert ours == theirs[0, packed.ids.shape[1] :].tolist()
        begins = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
        assert model.decode(packed.ids[0].tolist()).startswith(begins)


# Packed = separate, batch = single


def test_one_packed_forward_is_the_separate_passes(model: Backbone, samples: list[Sample]) -> None:
    """Every branch of every sample alone: all layers' states where something is supervised, and the losses."""
    method = PauseDistillation(pauses=(2, 5))
    layouts = [method.layout(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]
    with torch.no_grad():
        together = run(model, pack(layouts, model.encode, model.pad))
        for name in layouts[0].branches:
            rows, losses = together.branch(name).rows, []
            for b, layout in enumerate(layouts):
                alone = run(model, pack([only(layout, name)], model.encode, model.pad))
                own = alone.branch(name)
                mine = rows.row[rows.sample == b]
                for ours, theirs in zip(together.hidden, alone.hidden, strict=True):
                    states_close(ours[b, mine], theirs[0, own.rows.row], 2e-5)
                losses.append(own.cross_entropy())
            torch.testing.assert_close(together.branch(name).cross_entropy(), torch.stack(losses).mean())


def test_all_visuals_at_once_are_each_alone(model: Backbone, samples: list[Sample]) -> None:
    seen = [sample.visual for sample in samples[:3]]
    packs = [prompt(model, replace(samples[0], visual=each)) for each in seen]
    with torch.no_grad():
        alone = [model.encode_patches(p.patches, p.grids) for p in packs]
        grids = [grid for p in packs for grid in p.grids]
        together = model.encode_patches(torch.cat([p.patches for p in packs]), grids)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pauses", [0, 3])
def test_a_batch_answers_as_each_alone(model: Backbone, samples: list[Sample], pauses: int) -> None:
    thought = (slots("<pause>", pauses),)
    together = generate.think(model, samples, thought)
    for i, sample in enumerate(samples):
        alone = generate.think(model, [sample], thought)
        states_close(together.states[:, i], alone.states[:, 0], 1e-5)
        for name in ("answer", "speak", "explicit"):
            many, one = (getattr(generate, name)(model, each, limit=6) for each in (together, alone))
            assert many.ids[i] == one.ids[0]


# Cached = uncached


@pytest.mark.parametrize("name", ["answer", "speak", "explicit"])
def test_cached_generation_equals_running_everything_again(model: Backbone, samples: list[Sample], name: str) -> None:
    written = getattr(generate, name)(model, generate.think(model, samples, (slots("<pause>", 3),)), limit=6)
    for sample, ids in zip(samples, written.ids, strict=True):
        assert ids == uncached(model, paths(sample, 3)[name], 6)


def latent_samples(model: Backbone) -> list[Sample]:
    """One, three and two steps over a picture, a video where the family has them, and nothing."""
    seen = [visual(model, 1), visual(model, 2, 3, 56, 56), None]
    steps = [("one",), ("one", "two and more", "three"), ("one", "two")]
    return [Sample(v, "What?" * (i + 1), (), s, "3", dialect="plain") for i, (v, s) in enumerate(zip(seen, steps))]


def latent_pack(model: Backbone, chosen: list[Sample]) -> Packed:
    method = Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=3)
    layouts = [method.layout(sample, np.random.default_rng(0), epoch=len(sample.steps)) for sample in chosen]
    return pack(layouts, model.encode, model.pad)


def test_cached_thoughts_are_those_of_running_everything_again(model: Backbone) -> None:
    """And a batch's are each one's alone."""
    chosen = latent_samples(model)
    with torch.no_grad():
        together = run(model, latent_pack(model, chosen))
        real = together.packed.node >= 0
        for b, sample in enumerate(chosen):
            packed = latent_pack(model, [sample])
            latents, sight = packed.slot_row.tolist(), model.look(packed)
            assert len(latents) == 2 * len(sample.steps)
            embeds, mask = model.embed(packed, sight), masks.additive(masks.visible(packed), torch.float32)
            for row in latents:
                embeds[:, row] = model.forward(embeds, packed.positions, mask, None, sight).last[:, row - 1]
            again = model.forward(embeds, packed.positions, mask, None, sight).hidden
            for ours, theirs in zip(together.hidden, again, strict=True):
                states_close(ours[b, real[b]], theirs[0], 2e-5)


# Training


def layers_of(model: Backbone) -> str:
    """What the names of the language model's layers begin with."""
    return "model.layers" if isinstance(model, LlamaLite0) else "language_model"


def gradients(model: Backbone, packed: Packed) -> dict[str, Tensor]:
    model.model.zero_grad(set_to_none=True)
    Coconut().loss(run(model, packed))[0].backward()
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


def test_gradients_reach_the_picture_through_the_thoughts_recomputed_or_not(make: Callable[..., Backbone]) -> None:
    model = make()
    add_tokens(model.model, model.tokenizer, (START, LATENT, STOP))
    packed = latent_pack(model, latent_samples(model)[:2])
    kept = gradients(model, packed)
    eyes = [grad for name, grad in kept.items() if "vis" in name and grad.dim() > 1]
    assert max(float(grad.norm()) for grad in eyes) > 1e-4
    recompute_layers(model.model.train())
    again = gradients(model, packed)
    assert kept.keys() == again.keys()
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-5 + 1e-4 * float(grad.abs().max()), msg=name)


def test_it_learns_a_batch(make: Callable[..., Backbone], samples: list[Sample]) -> None:
    """A few steps of the pause method, with step supervision on a copy of the language model, on everything that there is."""
    model = make()
    method = PauseDistillation(pauses=(2, 2), steps=StepSupervision(layers=2))
    companions = method.companions(model)
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples]
    packed = pack(layouts, model.encode, model.pad)
    before = copy.deepcopy(model.model.state_dict())
    optimizer = torch.optim.AdamW([*model.model.parameters(), *companions.parameters()], lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss, terms = method.loss(run(model, packed, companions=companions))
        loss.backward()
        optimizer.step()
        losses.append(sum(float(terms[name]) for name in ("decode", "answer", "teacher", "steps")))
    assert losses[-1] < 0.8 * losses[0]
    after = model.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("visual" in name or "vision" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)


def test_interpreters_read_its_thoughts(make: Callable[..., Backbone]) -> None:
    """Copies of the language model, without eyes; the prompt in the family's own format."""
    model, method = make(), Interpreters(sections=("SUMMARY",), compressed=1)
    add_tokens(model.model, model.tokenizer, method.tokens)
    companions = method.companions(model)
    names = [name for name, _ in companions.named_parameters()]
    assert names
    assert not any("vis" in name or "projector" in name for name in names)
    sample = Sample(visual(model, 1), "What?", (), ("A dog.",), "yes", sections=("SUMMARY",))
    packed = pack([method.layout(sample, np.random.default_rng(0))], model.encode, model.pad)
    method.loss(run(model, packed, companions=companions))[0].backward()
    reader = around(companions["SUMMARY"], model.tokenizer)
    assert type(reader) is type(model)
    assert reader.model.lm_head.weight.grad.norm() > 0


# Adapters


@pytest.mark.parametrize("lora", [Lora(r=4), Lora(r=4, train_embeddings=True, targets=("attention",), vision=True)])
def test_an_adapter_comes_back_as_it_was(
    make: Callable[..., Backbone], samples: list[Sample], lora: Lora, tmp_path: Path
) -> None:
    def fresh() -> Backbone:
        made = make()
        add_tokens(made.model, made.tokenizer, Heima(tags="tokens").tokens)
        return made

    def logits(model: Backbone) -> Tensor:
        with torch.no_grad():
            return model.logits(run(model, prompt(model, samples[1])).hidden[-1])

    model = fresh()
    if lora.vision and isinstance(model, LlamaLite0):  # eyes without attention
        lora = replace(lora, targets=("attention", "vision_projector.words"))
    untouched = logits(model)
    adapter = adapters.attach(model, lora, Heima(tags="tokens").tokens)
    torch.testing.assert_close(logits(model), untouched, rtol=0, atol=0)
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    assert any("vis" in name for name in trained) == lora.vision
    assert any(layers_of(model) in name for name in trained)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = logits(model)
    assert (expected - untouched).abs().max() > 0.1
    adapters.save(tmp_path / "saved", model, nn.ModuleDict(), {MAIN: adapter}, frozen=False)
    again, merged = fresh(), fresh()
    adapters.attach_saved(again.model, tmp_path / "saved")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    adapters.merge(merged.model, tmp_path / "saved")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save(tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole")), expected, rtol=1e-4, atol=1e-4)


def test_targets_by_name(model: Backbone) -> None:
    """Four matrices of attention a layer, cross attention's too; three of the feed-forward."""
    found = adapters.modules(model, Lora())
    assert len(found) == 7 * model.layers + 1
    assert not any("vis" in name for name in found)
    eyes = set(adapters.modules(model, Lora(vision=True))) - set(found)
    assert bool(eyes) != isinstance(model, LlamaLite0)  # whose eyes are convolutions
    assert not any(layers_of(model) in name for name in eyes)


# Files


def test_saved_and_loaded_it_is_the_same(model: Backbone, samples: list[Sample], tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = load(tmp_path, tokens=(*SPECIAL_TOKENS, START))
    assert type(loaded) is type(model) is FAMILIES[model.model.config.model_type]
    mine, theirs = model.model.state_dict(), loaded.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [loaded.token(t) for t in (START, *SPECIAL_TOKENS)] == [model.token(t) for t in (START, *SPECIAL_TOKENS)]
    assert (loaded.pad, loaded.end) == (model.pad, model.end)
    assert not loaded.model.training
    for sample in samples:
        packed, other = prompt(model, sample), prompt(loaded, sample)
        assert torch.equal(packed.ids, other.ids)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_rows_near_the_others_mean(
    make: Callable[..., Backbone], samples: list[Sample], tied: bool, tmp_path: Path
) -> None:
    """Rows that were there stay; only what is needed is added; the grown model is saved and found again."""
    model = make()
    if tied:
        if isinstance(model, Mllama):
            pytest.skip("Mllama's embedding has rows for the image's token that its head lacks: they can't be tied.")
        config = model.model.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
        model.model.tie_weights()
    model.save(tmp_path / "small")
    known = len(model.tokenizer)
    grown = load(tmp_path / "small", tokens=("<one>", "<two>"))
    table, head = (m.weight.detach() for m in (grown.model.get_input_embeddings(), grown.model.get_output_embeddings()))
    old = model.model.get_input_embeddings().weight.detach()[:known]
    spare = 8 if isinstance(model, Mllama) else 0
    assert [grown.token("<one>"), grown.token("<two>")] == [known, known + 1]
    assert (len(table), len(head), grown.text_config.vocab_size) == (known + 2 + spare, known + 2, known + 2)
    assert torch.equal(table[:known], old)
    kept = model.model.get_output_embeddings().weight.detach()
    assert torch.equal(head[: len(kept)], kept)
    assert (table[known:] - old.mean(0)).norm(dim=1).max() < 0.05 * old.norm(dim=1).mean()
    assert (table.data_ptr() == head.data_ptr()) == tied
    grown.save(tmp_path / "grown")
    again = load(tmp_path / "grown", tokens=("<one>", "<two>"))
    packed = prompt(grown, samples[1])
    with torch.no_grad():
        both = [each.logits(run(each, packed).hidden[-1]) for each in (grown, again)]
    assert torch.equal(*both)


# The page


def test_it_is_asked_and_looked_into(model: Backbone) -> None:
    whole = Model(model, "tiny", None, PUBLISHED_SAMPLING, None)
    frames = np.random.default_rng(0).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    clip = Clip(frames, np.arange(4) / 2, 2.0, 2.0, (84, 56), "none", 4)
    if not has_videos(model):
        with pytest.raises(ValueError, match="images, not at videos"):
            ask(whole, clip, "Where?", ["left", "right"], pauses=2)
        clip = Clip(frames[:1], np.zeros(1), 1.0, 1.0, (84, 56), "none", 1)
    reply = ask(whole, clip, "Where?", ["left", "right"], pauses=2, write_chain=False)
    assert reply.answer in ("left", "right")
    assert reply.states.shape == (model.layers + 1, 2, 64)


def test_attention_and_replacements(model: Backbone, samples: list[Sample]) -> None:
    """Of the layers with self-attention: rows add up to 1, and what the slots held put back changes nothing."""
    thoughts = generate.think(model, samples, (slots("<pause>", 2),))
    weights = attention.weights(model, thoughts, ("<ANS>",))
    assert weights.shape[:2] == (model.kept_layers, len(samples))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-4, atol=1e-4)
    own = matter.held(model, thoughts)
    same, gone = matter.Change("same"), matter.Change("put back", own)
    shares = matter.probabilities(model, thoughts, [same, gone], ["A", "B"], ("<ANS>", "<answer>"))
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-4, atol=1e-5)
    marked = generate.option_probabilities(model, thoughts, ["A", "B"])
    torch.testing.assert_close(shares[0], marked, rtol=1e-4, atol=1e-5)


def test_a_still_of_frames_is_its_first(model: Backbone) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    one, many = model.cut(Frames(pixels[:1], 0.0, True)), model.cut(Frames(pixels, 0.5, True))
    assert torch.equal(one.patches, many.patches)
    assert one.grid == many.grid
