"""Gradient checkpointing changes nothing but memory: the same losses and gradients, with a latent loop on a cache too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import latents
from engine.backbones.base import Backbone, add_tokens
from engine.backbones.mllama import Mllama
from engine.batches import Batches, batches
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource
from engine.layout import pack
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.controls import Explicit
from engine.methods.method import Method, run
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.recompute import recompute_layers
from tests import tiny

STEPS = StepSupervision(layers=1)
COCONUT = Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=3, pad_latent_to_max=False, steps=STEPS)
METHODS = [COCONUT, Codi(num_latent=3, prj_dim=16, prj_dropout=0.2), PauseDistillation(pauses=(2, 3), steps=STEPS)]


@pytest.fixture(scope="module", params=[tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_gpt2, tiny.tiny_mllama])
def model(request: pytest.FixtureRequest) -> Backbone:
    made = request.param()
    add_tokens(made.model, made.tokenizer, Coconut.tokens)
    made.model.train()
    return made


def samples(model: Backbone) -> list[Sample]:
    """Some with pictures where the model has eyes."""
    if not isinstance(model, Mllama):  # which sees no videos
        return tiny.chains(model)
    still = tiny.clip(model, 2, 1, 84, 56, still=True)
    first, *others = tiny.chains(tiny.tiny_gpt2())
    return [replace(first, visual=still), *others]


def learnt(model: Backbone, companions: nn.ModuleDict, method: Method) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and every gradient."""
    torch.manual_seed(5)  # dropout's
    layouts = [method.layout(sample, np.random.default_rng(0), 4) for sample in samples(model)]
    packed = pack(layouts, model.encode, model.pad)
    loss, _ = method.loss(run(model, packed, method.feedback(companions), companions))
    whole = nn.ModuleList([model.model, companions])
    whole.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def calls_of(layer: nn.Module) -> list[int]:
    """How many rows the layer computes in each of its forwards, those of the backward pass included."""
    seen: list[int] = []
    layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    return seen


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_the_same_losses_and_gradients_as_without(model: Backbone, method: Method) -> None:
    torch.manual_seed(0)
    companions = method.companions(model).train()
    again, readers = replace(model, model=copy.deepcopy(model.model)), copy.deepcopy(companions)
    recompute_layers(again.model)
    recompute_layers(readers)
    loss, expected = learnt(model, companions, method)
    seen = calls_of(again.blocks(again.model)[1])
    same, got = learnt(again, readers, method)
    assert seen == [*seen[: len(seen) // 2], *seen[: len(seen) // 2][::-1]]  # every segment twice, the last one first
    assert torch.equal(same, loss)
    assert got.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(got[name], theirs, rtol=1e-5, atol=1e-6 * max(1.0, float(theirs.abs().max())))


def kept_bytes(work: Callable[[], object]) -> int:
    """What autograd keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = work()
    assert kept is not None
    return sum(storages.values())


def test_less_is_kept(model: Backbone) -> None:
    layouts = [COCONUT.layout(sample, np.random.default_rng(0), 4) for sample in samples(model)]
    packed = pack(layouts, model.encode, model.pad)
    again = replace(model, model=copy.deepcopy(model.model))
    recompute_layers(again.model)
    assert kept_bytes(lambda: latents.forward(again, packed)) < 0.6 * kept_bytes(lambda: latents.forward(model, packed))


def test_workers_that_are_not_forked_are_sent_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawned(dataset: object, **settings: object) -> list:
        """A loader whose worker is sent a pickled copy of all that it needs."""
        sent = pickle.dumps((dataset, settings))
        assert len(sent) < size
        return [pickle.loads(sent)[0][0]]

    model = tiny.tiny_backbone(layers=1)
    size = sum(weight.nbytes for weight in model.model.parameters())
    recompute_layers(model.model)
    dataset = Batches(WorldsSource(), Explicit(), model, 2, 1, seed=0)
    monkeypatch.setattr("engine.batches.DataLoader", spawned)
    ((packed,),) = batches(dataset, 0, 1, workers=1)
    assert torch.equal(packed.ids, dataset[0][0].ids)
    assert torch.equal(packed.patches, dataset[0][0].patches)


def test_a_cache_that_is_given_is_filled_all_the_same(model: Backbone) -> None:
    again = replace(model, model=copy.deepcopy(model.model).eval())
    recompute_layers(again.model)
    packed = pack([COCONUT.layout(samples(model)[2], np.random.default_rng(0), 4)], model.encode, model.pad)
    cache = again.new_cache()
    with torch.no_grad():
        latents.forward(again, packed, cache=cache)
    assert cache.get_seq_length() == packed.ids.shape[1]
