"""The replacement test: exact where it can be held against another way, and the answer follows a planted cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import generate
from engine.backbones.base import Backbone, add_tokens
from engine.data.samples import Sample
from engine.insight import replace as matter
from engine.layout import Layout, Special, pack
from engine.methods.coconut import LATENT, Coconut
from engine.methods.codi import Codi
from engine.methods.controls import Silent
from engine.methods.diversity import Diversity
from engine.methods.method import Method
from engine.methods.pause import PauseDistillation
from tests import tiny

LETTERS = ("A", "B", "C")
SLOTS = 4


def asked(backbone: Backbone) -> list[Sample]:
    """Clips (where the model has eyes) and questions of different lengths, so that slots stand at different positions."""
    return [replace(sample, dialect="chat") for sample in tiny.chains(backbone)]


@pytest.fixture(scope="module", params=[tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_llama, tiny.tiny_gpt2])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    made = request.param()
    add_tokens(made.model, made.tokenizer, Coconut.tokens)
    return made


@pytest.fixture(params=[Silent(SLOTS), Coconut()], ids=["rides the prefill", "fed back"])
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def varied(shares: torch.Tensor) -> torch.Tensor:
    """Total variation between each change's probabilities and the first's: [changes, batch]."""
    return (shares - shares[:1]).abs().sum(-1) / 2


def think(backbone: Backbone, method: Method, count: int = SLOTS) -> generate.Thoughts:
    return generate.think(backbone, asked(backbone), method.thinking(count))


@pytest.mark.parametrize(
    "kind", [PauseDistillation(), Silent(SLOTS), Coconut(), Codi(num_latent=SLOTS, prj_dim=8), Diversity()]
)
def test_a_letter_is_read_where_training_put_it(kind: Method) -> None:
    """Behind the thinking of a whole trained answer stands the lead, and then the letter."""
    model = tiny.tiny_llama()
    add_tokens(model.model, model.tokenizer, kind.tokens)
    sample = Sample(None, "Where?", ("left", "right"), ("a", "b"), "B")
    whole = kind.layout(sample, np.random.default_rng(0), 10**6).branches["answer"]
    ids = pack([Layout({"answer": whole})], model.encode, model.pad).ids[0].tolist()
    lead = [model.token(name) for name in matter.marks(kind)]
    letter = model.text_ids("B")
    places = [i for i in range(len(ids)) if ids[i : i + len(lead) + len(letter)] == [*lead, *letter]]
    thought = {model.token(name) for name in ("<pause>", LATENT) if name in kind.tokens}
    slots = [i for i, token in enumerate(ids) if token in thought]
    assert places == [max(slots) + 1]


def test_no_change_changes_nothing(backbone: Backbone, method: Method) -> None:
    thoughts = think(backbone, method)
    before = [(k.clone(), v.clone()) for k, v in thoughts.layers]
    wanted = generate.option_probabilities(backbone, thoughts, LETTERS, [*map(Special, method.lead)])
    own = matter.held(backbone, thoughts)
    changed = matter.changes(own, {"another's": own.flip(2)})
    found = matter.probabilities(backbone, thoughts, changed, LETTERS, matter.marks(method))
    assert [change.name for change in changed].count("another's") == 1
    assert found.shape == (len(changed), thoughts.batch, len(LETTERS))
    assert torch.allclose(found[0], wanted, atol=1e-5)
    shift = dict(zip([change.name for change in changed], varied(found).amax(1).tolist(), strict=True))
    if backbone.model.config.model_type == "gpt2":  # its keys know no places, so that their order is nothing
        assert shift.pop("shuffled") < 1e-5
    assert shift.pop("as they are") == 0
    assert min(shift.values()) > 1e-4
    assert all(torch.equal(k, a) and torch.equal(v, b) for (k, v), (a, b) in zip(thoughts.layers, before))


def test_fewer_slots_are_what_thinking_with_fewer_gives(backbone: Backbone, method: Method) -> None:
    """One prefill serves every number of slots, none included: those are the markers alone."""
    thoughts = think(backbone, method)
    changed = matter.first_ones(SLOTS)
    found = matter.probabilities(backbone, thoughts, changed, LETTERS, matter.marks(method))
    for count in range(SLOTS + 1):
        fewer = think(backbone, method, count)
        wanted = generate.option_probabilities(backbone, fewer, LETTERS, [*map(Special, method.lead)])
        assert torch.allclose(found[count], wanted, atol=1e-5)
    own = matter.held(backbone, thoughts)
    markers = next(change for change in matter.changes(own) if change.name == "markers only")
    alone = matter.probabilities(backbone, thoughts, [markers], LETTERS, matter.marks(method))
    assert torch.allclose(alone[0], found[0], atol=1e-6)


@pytest.mark.parametrize("made", [tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_llama])
def test_the_answer_follows_the_slots_where_they_are_its_only_cause(
    made: Callable[[], Backbone], method: Method
) -> None:
    """Planted: the answer sees the slots alone. Then another clip's slots give that clip's answer, wherever they stood."""
    backbone = made()
    add_tokens(backbone.model, backbone.tokenizer, Coconut.tokens)
    thoughts = think(backbone, method)
    assert len(set(thoughts.positions[:, 0].tolist())) > 1
    slots_only = torch.zeros_like(thoughts.thought).scatter(1, thoughts.slots, True)
    blind = replace(thoughts, context=torch.zeros_like(thoughts.context), thought=slots_only)
    patch = matter.Change("the next clip's", matter.held(backbone, thoughts).roll(-1, 2))
    own = matter.Change("as they are")
    as_is, patched = matter.probabilities(backbone, blind, [own, patch], LETTERS, matter.marks(method))
    assert (as_is - patched).abs().amax(1).min() > 1e-3
    assert torch.allclose(patched, as_is.roll(-1, 0), atol=1e-5)


def test_a_slot_that_nobody_sees_changes_nothing(backbone: Backbone, method: Method) -> None:
    thoughts = think(backbone, method)
    own = matter.held(backbone, thoughts)
    seen = torch.tensor([True, False, True, True])
    other = own.clone()
    other[..., 1, :] += 5
    changed = [matter.Change("without", seen=seen), matter.Change("other, unseen", other, seen)]
    changed += [matter.Change("other, seen", other)]
    found = matter.probabilities(backbone, thoughts, changed, LETTERS, matter.marks(method))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert varied(found)[2].min() > 1e-4


def test_what_stands_in_the_slots_has_the_statistics_that_its_name_says() -> None:
    torch.manual_seed(0)
    own = torch.randn(2, 3, 1, 2, 400, 5) * 3 + 7
    by_name = {change.name: change for change in matter.changes(own)}
    contents = {name: change.contents for name, change in by_name.items() if change.contents is not None}
    assert contents["zeros"].abs().max() == 0
    assert torch.allclose(contents["mean"], own.mean(-2, keepdim=True).expand_as(own))
    assert torch.allclose(contents["noise"].mean(-2), own.mean(-2), atol=0.8)
    assert torch.allclose(contents["noise"].std(-2), own.std(-2), rtol=0.2)
    assert torch.equal(contents["first repeated"][..., 17, :], own[..., 0, :])
    moved = (contents["shuffled"] != own).all(-1)
    assert moved.all()
    assert torch.equal(contents["shuffled"].sort(-2).values, own.sort(-2).values)
    assert [int(by_name[f"without slot {i}"].seen.sum()) for i in (1, 400)] == [399, 399]
    assert not by_name["hidden"].seen.any()
    one = {change.name: change for change in matter.changes(own[..., :1, :])}
    assert torch.equal(one["noise"].contents, own[..., :1, :])


def test_without_slots_there_is_nothing_to_replace(backbone: Backbone) -> None:
    thoughts = think(backbone, Silent(0), 0)
    with pytest.raises(ValueError, match="no slots"):
        matter.replaced(backbone, thoughts, matter.first_ones(0))
