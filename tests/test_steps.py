"""SIM-CoT: which thought must say which step, from which states, at what loss; and what of it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from engine.backbones.base import Backbone, add_tokens
from engine.data.samples import Sample
from engine.layout import Layout, Reading, pack
from engine.methods.coconut import Coconut
from engine.methods.codi import PROJECTOR, Codi
from engine.methods.method import Method, Outcome, run
from engine.methods.pause import PauseDistillation
from engine.methods.steps import DECODER, StepSupervision
from tests import tiny
from tests.rows import only

ON_CODI = StepSupervision(mean="tokens", missing="ignore", first_position=0)
METHODS: dict[str, Any] = {
    "coconut": Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=3, steps=StepSupervision()),
    "codi": Codi(num_latent=2, prj_dim=48, steps=ON_CODI),
    "pause": PauseDistillation(pauses=(3, 3), steps=StepSupervision(weight=0.5)),
    "stairs": PauseDistillation(pauses=(3, 3), steps=StepSupervision(stairs=1, layers=2)),
}
EPOCH = 4  # past Coconut's last stage: three thoughts for every chain


@pytest.fixture(scope="module", params=[tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_gpt2, tiny.tiny_llama])
def model(request: pytest.FixtureRequest) -> Backbone:
    made = request.param()
    add_tokens(made.model, made.tokenizer, Coconut.tokens)
    return made


def companions_of(method: Method, model: Backbone) -> nn.ModuleDict:
    """With a decoder that is no longer the model's double."""
    torch.manual_seed(7)
    made = method.companions(model)
    with torch.no_grad():
        for parameter in made[DECODER].parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return made


def samples_of(method: Method, model: Backbone) -> list[Sample]:
    """Chains of 2, 0, 5 and 1 steps."""
    chosen = tiny.chains(model)
    return [replace(sample, dialect="chat") for sample in chosen] if isinstance(method, PauseDistillation) else chosen


def layouts_of(method: Method, samples: Sequence[Sample]) -> list[Layout]:
    return [method.layout(sample, np.random.default_rng(0), EPOCH) for sample in samples]


def through(method: Method, model: Backbone, samples: Sequence[Sample], companions: nn.ModuleDict) -> Outcome:
    packed = pack(layouts_of(method, samples), model.encode, model.pad)
    return run(model, packed, method.feedback(companions), companions)


def said(model: Backbone, reading: Reading) -> list[int]:
    """The tokens of one reading."""
    return pack([Layout({"read": reading.path})], model.encode, model.pad).branches["read"].target.tolist()


def test_every_thought_says_its_step(model: Backbone) -> None:
    """Steps fewer than thoughts, as many, and more. The end token closes each."""
    two, none, five, one = tiny.chains(model)
    three = replace(two, steps=("x", "y", "z"))
    end = model.tokenizer.eos_token

    def words(method: Method, sample: Sample, epoch: int = EPOCH, seed: int = 0) -> list[str]:
        layout = method.layout(sample, np.random.default_rng(seed), epoch)
        texts = [model.decode(said(model, reading)) for reading in layout.readings]
        assert all(text.endswith(end) for text in texts)
        assert [reading.group for reading in layout.readings] == list(range(len(texts)))
        return [text.removesuffix(end) for text in texts]

    coconut, codi = METHODS["coconut"], METHODS["codi"]
    merged = "3 + 1 = 4\n4 + 1 = 5\n5"
    assert words(coconut, two) == ["it goes left", "then right", "### B"]
    assert words(coconut, none) == ["### 3"] * 3
    assert words(coconut, three) == ["x", "y", "z"]
    assert words(coconut, five) == ["1 + 1 = 2", "2 + 1 = 3", merged]
    assert words(coconut, one) == ["no name", "### no", "### no"]
    assert words(coconut, five, epoch=0) == []
    assert words(coconut, five, epoch=1) == ["1 + 1 = 2"]
    assert words(coconut, five, epoch=3) == ["1 + 1 = 2", "2 + 1 = 3", "3 + 1 = 4"]  # later steps are still written
    assert words(coconut, none, epoch=2) == ["### 3"] * 2
    assert words(replace(coconut, pad_latent_to_max=False), two) == ["it goes left", "then right"]
    constant = replace(coconut, schedule="constant")
    assert words(constant, three, epoch=1) == ["x", "y\nz\n### B", "y\nz\n### B"]  # all that follows the thoughts
    assert words(codi, two) == ["it goes left", "then right"]
    assert words(codi, none) == []
    assert words(codi, three) == ["x", "y", "z"]
    assert words(codi, five) == ["1 + 1 = 2", "2 + 1 = 3", merged]
    assert words(codi, one) == ["no name"]
    assert words(METHODS["pause"], replace(one, dialect="chat")) == ["no name", "no", "no"]
    outcomes = replace(codi, steps=replace(codi.steps, words=(1,)))
    assert words(outcomes, two) == [" left", " right"]
    assert words(outcomes, three) == ["x", "y", "z"]  # of one word, the whole
    assert words(outcomes, five) == [" 2", " 3", " 4\n 5\n5"]
    drawn = replace(codi, steps=replace(codi.steps, words=(1, 2)))  # for a sample, all of whose slots say as many
    assert {tuple(words(drawn, two, seed=seed)) for seed in range(20)} == {
        (" left", " right"),
        (" goes left", "then right"),
    }


def states_fed(method: Any, out: Outcome, b: int, group: int) -> Tensor:
    """What thought `group` of sample `b` is, worked out from where the slots stand."""
    rows = out.packed.slot_row[out.packed.slot_sample == b]
    last = out.hidden[-1][b]
    if isinstance(method, Coconut):
        return last[rows[2 * group : 2 * group + 2] - 1]
    if isinstance(method, Codi):
        return out.companions[PROJECTOR](last[rows[0] - 1 + group])[None]
    climbs = method.steps.stairs is not None  # chains of 2, 0, 5 and 1 steps, three slots, three layers
    layer = {(0, 0): 1, (2, 0): 1, (2, 1): 2}.get((b, group)) if climbs else None
    states = last if layer is None else out.backbone.final_norm(out.hidden[layer][b])
    return states[rows[group]][None]


def read_alone(method: Any, out: Outcome, b: int, group: int, target: Sequence[int]) -> Tensor:
    """The losses of one thought's tokens, in an unpadded pass of its own."""
    model, steps = out.backbone, method.steps
    fed = states_fed(method, out, b, group)
    embeds = torch.cat([fed, model.embed_ids(torch.tensor(target))])[None]
    length = embeds.shape[1]
    positions = steps.first_position + torch.arange(length).expand(model.axes, 1, -1)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    reader = replace(model, model=out.companions[DECODER])
    logits = reader.logits(reader.forward(embeds, positions, mask).last[0, len(fed) - 1 : -1])
    return F.cross_entropy(logits, torch.tensor(target), reduction="none")


def by_hand(method: Any, out: Outcome, samples: Sequence[Sample]) -> Tensor:
    """The step loss, a thought at a time."""
    slots: dict[int, list[Tensor]] = {}
    for b, layout in enumerate(layouts_of(method, samples)):
        for reading in layout.readings:
            alone = read_alone(method, out, b, reading.group, said(out.backbone, reading))
            slots.setdefault(reading.group, []).append(alone)
    tokens = [torch.cat(each) for each in slots.values()]
    by_tokens = method.steps.mean == "tokens"
    return torch.stack([x.mean() if by_tokens else x.sum() / len(samples) for x in tokens]).mean()


@pytest.mark.parametrize("name", METHODS)
def test_thoughts_are_read_from_their_own_states(name: str, model: Backbone) -> None:
    """Packed readings give the loss and the gradients of one pass a thought: in the model, decoder and projector."""
    method = METHODS[name]
    companions, samples = companions_of(method, model), samples_of(method, model)
    out = through(method, model, samples, companions)
    total, terms = method.loss(out)
    expected = by_hand(method, out, samples)
    torch.testing.assert_close(terms["steps"], expected.detach(), rtol=1e-5, atol=1e-5)
    plain, _ = replace(method, steps=None).loss(out)
    torch.testing.assert_close(total, plain + method.steps.weight * expected, rtol=1e-5, atol=1e-5)
    parameters = [*model.model.parameters(), *companions.parameters()]
    fed = method.steps.loss(out, method.feedback(companions))
    ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (fed, expected))
    rounding = 1e-7 * max(float(x.norm()) for x in theirs if x is not None)
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert float((got - wanted).norm()) <= 2e-4 * float(wanted.norm()) + rounding


@pytest.mark.parametrize("name", METHODS)
def test_the_step_loss_trains_the_thoughts_and_the_decoder(name: str, model: Backbone) -> None:
    method = METHODS[name]
    companions = companions_of(method, model)
    out = through(method, model, samples_of(method, model), companions)
    for module in (model.model, companions):
        module.zero_grad(set_to_none=True)
    method.steps.loss(out, method.feedback(companions)).backward()
    first = next(p for n, p in model.model.named_parameters() if "layers.0" in n or "h.0" in n)
    decoder: Any = companions[DECODER]
    head, table = decoder.lm_head.weight, decoder.get_input_embeddings().weight
    assert first.grad is not None
    assert float(first.grad.norm()) > 0
    assert float(head.grad.norm()) > 0
    assert table is head or table.grad is None  # the tokens are embedded by the model's own table


def test_no_thought_no_loss(model: Backbone) -> None:
    method = METHODS["coconut"]
    companions = companions_of(method, model)
    layouts = [method.layout(sample, np.random.default_rng(0), 0) for sample in tiny.chains(model)]
    total, terms = method.loss(run(model, pack(layouts, model.encode, model.pad), companions=companions))
    assert terms["steps"] == 0
    assert total == terms["answer"]


def test_losses_do_not_depend_on_the_order_of_samples(model: Backbone) -> None:
    """By default; the published CODI code's do, and `compat` gives them."""
    method = METHODS["codi"]
    companions, samples = companions_of(method, model), tiny.chains(model)

    def per_slot(steps: StepSupervision, chosen: Sequence[Sample]) -> Tensor:
        with torch.no_grad():
            return steps.per_slot(through(method, model, chosen, companions), companions[PROJECTOR])

    assert len(per_slot(ON_CODI, samples)) == 3
    torch.testing.assert_close(per_slot(ON_CODI, samples), per_slot(ON_CODI, samples[::-1]), rtol=1e-5, atol=1e-5)
    faulty = replace(ON_CODI, compat=True)
    longest_first = [samples[2], samples[0], samples[1], samples[3]]
    shortened = per_slot(faulty, samples[::-1])
    assert not torch.allclose(shortened, per_slot(faulty, longest_first), atol=1e-2)

    with torch.no_grad():
        out = through(method, model, samples[::-1], companions)
        slots: dict[int, list[Tensor]] = {}
        first: dict[int, int] = {}  # the tokens of the first sample's text, a thought
        for b, layout in enumerate(layouts_of(method, samples[::-1])):
            for r in layout.readings:
                told = said(model, r)
                if b == 0:
                    first[r.group] = len(told)
                kept = first.get(r.group, 0) + 1
                slots.setdefault(r.group, []).append(read_alone(method, out, b, r.group, told)[:kept])
    expected = torch.stack([torch.cat(each).mean() for each in slots.values()])
    torch.testing.assert_close(shortened, expected, rtol=1e-5, atol=1e-5)


def test_a_branch_alone_keeps_what_is_read_off_it(model: Backbone) -> None:
    layout = METHODS["codi"].layout(tiny.chains(model)[0], np.random.default_rng(0))
    assert len(layout.readings) == 2
    assert only(layout, "answer").readings == layout.readings
    assert only(layout, "teacher").readings == ()


@pytest.mark.parametrize("name", ["coconut", "codi", "pause"])
def test_what_is_saved_is_the_model_alone(name: str, model: Backbone, tmp_path: Path) -> None:
    method = METHODS[name]
    model.save(tmp_path / "before")
    companions = companions_of(method, model)
    before, kept = (
        load_file(tmp_path / "before" / "model.safetensors"),
        {n: p for n, p in model.model.named_parameters()},
    )
    owned = {p.data_ptr() for p in model.model.parameters()}
    assert not owned & {p.data_ptr() for p in companions.parameters()}
    total, _ = method.loss(through(method, model, samples_of(method, model), companions))
    total.backward()
    model.save(tmp_path / "after")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert sum(x.numel() for x in after.values()) == sum(p.numel() for p in kept.values())
    without = replace(method, steps=None).companions(model)
    assert DECODER not in without
    assert set(companions.state_dict()) - set(without.state_dict()) == {
        f"{DECODER}.{key}" for key in model.language_model().state_dict()
    }


def test_the_decoder_has_no_eyes(model: Backbone) -> None:
    made: Any = METHODS["pause"].companions(model)[DECODER]
    assert not any("visual" in name or "vision" in name for name, _ in made.named_parameters())
    embedding = model.embed_ids(torch.tensor([1]))
    assert torch.equal(made.get_input_embeddings()(torch.tensor([1])), embedding)


def test_a_decoder_of_fewer_layers(model: Backbone) -> None:
    whole, short = (METHODS[name].companions(model)[DECODER] for name in ("pause", "stairs"))
    kept = short.state_dict()
    assert (len(model.blocks(whole)), len(model.blocks(short))) == (3, 2)
    assert kept.keys() < whole.state_dict().keys()
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in kept.items())
