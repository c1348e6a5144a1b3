"""Latents filled from a cache are those of a loop that computes everything anew for each; samples don't depend on their
neighbours; packed branches are separate passes; gradients reach the first latent; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import latents, masks
from engine.backbones.base import Backbone, States, add_tokens
from engine.data.samples import Sample
from engine.latents import Feedback
from engine.layout import Layout, pack
from engine.methods.coconut import Coconut
from engine.methods.codi import PROJECTOR, Codi
from engine.methods.method import Method, run
from tests import tiny
from tests.near import close
from tests.rows import branch_rows, only

COCONUT = Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=3, pad_latent_to_max=False)
LAST_STAGE = 4  # past the last one: as many thoughts as a sample has steps, at most 3
COUNTS = [4, 0, 6, 2]  # latents of each of tiny.chains


@pytest.fixture(scope="module", params=[tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_gpt2, tiny.tiny_llama])
def model(request: pytest.FixtureRequest) -> Backbone:
    made = request.param()
    add_tokens(made.model, made.tokenizer, Coconut.tokens)
    return made


@pytest.fixture(scope="module")
def samples(model: Backbone) -> list[Sample]:
    return tiny.chains(model)


def layouts_of(method: Method, samples: Sequence[Sample], epoch: int = LAST_STAGE) -> list[Layout]:
    return [method.layout(sample, np.random.default_rng(0), epoch) for sample in samples]


def recomputed(model: Backbone, layout: Layout, feedback: Feedback = latents.unchanged) -> tuple[Tensor, ...]:
    """One sample with one branch: the prefix is computed anew for every latent, without a cache. [length, dim] a layer."""
    (name,) = layout.branches
    packed = pack([layout], model.encode, model.pad)
    embeds, length = model.embed(packed), packed.ids.shape[1]
    assert branch_rows(layout, model.encode)[name] == list(range(length))
    seen = torch.ones(length, length).tril().bool()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    for row in packed.latents[0].nonzero()[:, 0].tolist():
        states = model.forward(embeds[:, :row], packed.positions[..., :row], mask[:, :, :row, :row])
        embeds = torch.cat([embeds[:, :row], feedback(states.last[:, -1:]), embeds[:, row + 1 :]], dim=1)
    return tuple(layer[0] for layer in model.forward(embeds, packed.positions, mask).hidden)


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    for module in modules:
        module.zero_grad(set_to_none=True)
    loss.backward()
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def same_gradients(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    rounding = 1e-7 * max(float(theirs.norm()) for theirs in expected)  # a key's bias moves nothing
    for ours, theirs in zip(got, expected, strict=True):
        assert float((ours - theirs).norm()) <= 2e-4 * float(theirs.norm()) + rounding


def test_cached_is_recomputed(model: Backbone, samples: list[Sample]) -> None:
    """In a batch of samples with different numbers of latents, with gradients."""
    layouts = layouts_of(COCONUT, samples)
    packed = pack(layouts, model.encode, model.pad)
    assert packed.latents.sum(1).tolist() == COUNTS
    real = packed.node >= 0
    weights = torch.randn(model.text_config.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = latents.forward(model, packed)
    alone = [recomputed(model, layout) for layout in layouts]
    for layer, ours in enumerate(hidden):
        for b, theirs in enumerate(alone):
            close(ours[b, real[b]], theirs[layer])
    got = gradients((hidden[-1][real] @ weights).sum(), model.model)
    same_gradients(got, gradients(torch.cat([x[-1] for x in alone]).matmul(weights).sum(), model.model))


def test_a_latent_is_fed_the_state_before_it(model: Backbone, samples: list[Sample]) -> None:
    layout = layouts_of(COCONUT, samples)[0]
    packed = pack([layout], model.encode, model.pad)
    made: list[Tensor] = []

    def noted(states: Tensor) -> Tensor:
        made.append(states)
        return 0.5 * states

    with torch.no_grad():
        hidden = latents.forward(model, packed, noted)
        expected = recomputed(model, layout, lambda states: 0.5 * states)
        unscaled = latents.forward(model, packed)
    rows = packed.slot_row.tolist()
    assert len(made) == len(rows) == COUNTS[0]
    for row, states in zip(rows, made, strict=True):
        assert torch.equal(states, hidden[-1][:, row - 1])
    close(hidden[-1][0], expected[-1])
    assert not torch.allclose(hidden[-1], unscaled[-1], atol=1e-2)


def test_batch_is_single(model: Backbone, samples: list[Sample]) -> None:
    layouts = layouts_of(COCONUT, samples)
    with torch.no_grad():
        packs = [pack(chosen, model.encode, model.pad) for chosen in (layouts, layouts[::-1])]
        together, backwards = (latents.forward(model, packed) for packed in packs)
        singles = [latents.forward(model, pack([layout], model.encode, model.pad)) for layout in layouts]
    lengths = [single[-1].shape[1] for single in singles]
    assert len(set(lengths)) == len(lengths)
    for b, single in enumerate(singles):
        real, real_backwards = packs[0].node[b] >= 0, packs[1].node[-1 - b] >= 0
        for ours, reverse, theirs in zip(together, backwards, single, strict=True):
            close(ours[b, real], theirs[0])
            close(reverse[-1 - b, real_backwards], theirs[0])


def test_losses_of_a_batch_are_means_over_its_tokens(model: Backbone, samples: list[Sample]) -> None:
    with torch.no_grad():
        out = run(model, pack(layouts_of(COCONUT, samples), model.encode, model.pad))
        total, _ = COCONUT.loss(out)
        alone = [run(model, pack([layout], model.encode, model.pad)) for layout in layouts_of(COCONUT, samples)]
        counts = torch.tensor([len(one.packed.branches["answer"].row) for one in alone])
        losses = torch.stack([COCONUT.loss(one)[0] for one in alone])
    close(total, (counts * losses).sum() / counts.sum())


def codi(model: Backbone) -> tuple[Codi, nn.ModuleDict]:
    torch.manual_seed(5)
    method = Codi(num_latent=3, prj_dim=48, distill_factor=2.0)
    return method, method.companions(model)


def test_two_packed_branches_are_separate_passes(model: Backbone, samples: list[Sample]) -> None:
    """CODI: states, loss and gradients; the projector's too."""
    method, companions = codi(model)
    layouts = layouts_of(method, samples, 0)
    packed = pack(layouts, model.encode, model.pad)
    out = run(model, packed, method.feedback(companions), companions)
    total, terms = method.loss(out)
    losses: dict[str, list[Tensor]] = {"answer": [], "teacher": []}
    before: dict[str, list[Tensor]] = {"answer": [], "teacher": []}
    for b, layout in enumerate(layouts):
        shift = int((packed.node[b] >= 0).int().argmax())
        rows = branch_rows(layout, model.encode)
        for branch in layout.branches:
            hidden = recomputed(model, only(layout, branch), companions[PROJECTOR])
            for ours, theirs in zip(out.hidden, hidden, strict=True):
                close(ours[b, [shift + row for row in rows[branch]]], theirs)
            told = pack([only(layout, branch)], model.encode, model.pad).branches[branch]
            losses[branch].append(F.cross_entropy(model.logits(hidden[-1][told.row]), told.target, reduction="none"))
            first = told.row[told.name == told.names.index("answer")][0]
            before[branch].append(torch.stack(hidden)[:, first])
    student, teacher = (torch.stack(before[branch], dim=1) for branch in ("answer", "teacher"))
    teacher = teacher.detach()
    distance = torch.stack([F.smooth_l1_loss(s, t) / t.std() for s, t in zip(student, teacher, strict=True)]).mean()
    expected = torch.cat(losses["answer"]).mean() + 2.0 * distance + torch.cat(losses["teacher"]).mean()
    close(terms["distil"], distance)
    close(total, expected)
    got = gradients(total, model.model, companions)
    same_gradients(got, gradients(expected, model.model, companions))


def test_gradients_reach_the_first_latent_through_the_whole_chain(model: Backbone, samples: list[Sample]) -> None:
    layout = layouts_of(COCONUT, samples)[2]
    packed = pack([layout], model.encode, model.pad)
    fed: list[Tensor] = []

    def noted(states: Tensor) -> Tensor:
        fed.append(states)
        return states

    loss, _ = COCONUT.loss(run(model, packed, noted))
    assert len(fed) == COUNTS[2]
    for earlier, later in pairwise(fed):
        (through,) = torch.autograd.grad(later[..., :5].sum(), earlier, retain_graph=True)
        assert float(through.norm()) > 1e-4
    (reached,) = torch.autograd.grad(loss, fed[0])
    assert float(reached.norm()) > 1e-4
    whole = gradients(COCONUT.loss(run(model, packed))[0], model.model)
    cut = gradients(COCONUT.loss(run(model, packed, torch.detach))[0], model.model)
    assert any(float((a - b).norm()) > 1e-2 * float(a.norm()) for a, b in zip(whole, cut, strict=True))


def counted(model: Backbone) -> tuple[Backbone, list[tuple[int, int]]]:
    """The same model, and for each call to come how many columns it computes, and how many it sees."""
    calls: list[tuple[int, int]] = []
    family: type[Backbone] = type(model)

    class Counted(family):  # type: ignore[valid-type, misc]
        def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor, *cache: object) -> States:
            calls.append((embeds.shape[1], mask.shape[-1]))
            assert positions.shape[-1] == embeds.shape[1] == mask.shape[2]
            return super().forward(embeds, positions, mask, *cache)

    return Counted(model.model, model.tokenizer), calls


@pytest.mark.parametrize("chosen", [[0], [2], [0, 1, 2, 3]])
def test_one_column_a_latent_and_no_prefix_twice(chosen: list[int], model: Backbone, samples: list[Sample]) -> None:
    packed = pack(layouts_of(COCONUT, [samples[i] for i in chosen]), model.encode, model.pad)
    watched, calls = counted(model)
    with torch.no_grad():
        latents.forward(watched, packed)
    serial = max(COUNTS[i] for i in chosen)
    first = int(packed.latents.any(0).int().argmax())
    length = packed.ids.shape[1]
    assert [columns for columns, _ in calls] == [first, *[1] * serial, length - first - serial]
    assert [seen for _, seen in calls] == [first, *range(first + 1, first + serial + 1), length]


def test_without_latents_there_is_one_call(model: Backbone, samples: list[Sample]) -> None:
    watched, calls = counted(model)
    filler = replace(COCONUT, thoughts="filler")
    for method, epoch in ((COCONUT, 0), (filler, LAST_STAGE)):
        packed = pack(layouts_of(method, samples, epoch), model.encode, model.pad)
        calls.clear()
        with torch.no_grad():
            hidden = latents.forward(watched, packed)
            embeds = model.embed(packed)
            plain = model.forward(embeds, packed.positions, masks.additive(masks.visible(packed), embeds.dtype))
        length = packed.ids.shape[1]
        assert calls == [(length, length)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(hidden, plain.hidden, strict=True))


def test_the_filler_control_has_the_same_tokens(model: Backbone, samples: list[Sample]) -> None:
    for epoch in range(LAST_STAGE + 1):
        methods = COCONUT, replace(COCONUT, thoughts="filler")
        ours, filler = (pack(layouts_of(m, samples, epoch)[2:3], model.encode, model.pad) for m in methods)
        assert torch.equal(ours.ids, filler.ids)
        assert torch.equal(ours.branches["answer"].row, filler.branches["answer"].row)
        assert not filler.latents.any()
        assert len(filler.slot_row) == int(ours.latents.sum())


def test_the_first_latents_share_a_column(model: Backbone, samples: list[Sample]) -> None:
    packed = pack(layouts_of(COCONUT, samples), model.encode, model.pad)
    firsts = {int(row.int().argmax()) for row in packed.latents if row.any()}
    assert len(firsts) == 1
    assert packed.latents.any(0).sum() == max(COUNTS)
    assert int((packed.node[1] >= 0).int().argmax()) == 0  # a sample without latents stays where it is
    assert packed.positions[:, packed.node < 0].eq(0).all()
