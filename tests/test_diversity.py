"""Answer-only latents that are kept apart: the loss by hand, what reaches the first slot, that it learns what it says."""

import json

import numpy as np
import pytest
import torch

from engine.backbones.base import add_tokens
from engine.config import ConfigError
from engine.data.samples import Sample
from engine.layout import pack
from engine.methods.diversity import Diversity, likeness
from engine.methods.method import run
from tests.tiny import chains, tiny_llama
from train.__main__ import run as command


def small():
    backbone = tiny_llama()
    add_tokens(backbone.model, backbone.tokenizer, Diversity.tokens)
    return backbone


SAMPLES = [sample for sample in chains(tiny_llama()) if sample.visual is None]


def outcome(backbone, method, samples):
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples]
    return run(backbone, pack(layouts, backbone.encode, backbone.pad))


def test_likeness_by_hand():
    right = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]])
    assert likeness(right[None]) == 0
    same = torch.tensor([[1.0, 1, 0], [-2, -2, 0], [5, 5, 0]])
    assert likeness(same[None]) == pytest.approx(1)
    half = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0]])  # cosines 1, and twice 1 over the root of 2
    assert likeness(half[None]) == pytest.approx(2 / 3)
    assert likeness(torch.stack([right, half])) == pytest.approx(1 / 3)


def test_the_loss_is_that_of_the_thoughts_as_fed():
    backbone, method = small(), Diversity(num_latent=3, diversity=0.5)
    out = outcome(backbone, method, SAMPLES)
    total, terms = method.loss(out)
    assert total.item() == pytest.approx(float(terms["answer"] + 0.5 * terms["diversity"]))
    rows = out.packed.slot_row.unflatten(0, (len(SAMPLES), 3))
    thoughts = torch.stack([out.hidden[0][sample, own] for sample, own in enumerate(rows)])
    assert terms["diversity"] == pytest.approx(float(likeness(thoughts)), abs=1e-6)  # the inputs are the states before
    backbone.model.zero_grad()
    likeness(thoughts).backward()
    assert backbone.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_no_step_is_read():
    backbone, method = small(), Diversity()
    without = [Sample(None, s.question, (), (), s.answer, dialect="plain") for s in SAMPLES]
    one, other = (method.loss(outcome(backbone, method, samples))[0] for samples in (SAMPLES, without))
    assert one == other


def test_training_sets_the_thoughts_apart():
    def after(weight: float) -> float:
        backbone, method = small(), Diversity(num_latent=3, diversity=weight)
        optimizer = torch.optim.AdamW(backbone.model.parameters(), lr=1e-3)
        for _ in range(12):
            total, _ = method.loss(outcome(backbone, method, SAMPLES))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return float(method.loss(outcome(backbone, method, SAMPLES))[1]["diversity"])

    assert after(5.0) < 0.5 * after(0.0)


def test_one_slot_can_not_be_kept_apart():
    with pytest.raises(ConfigError, match="at least two"):
        Diversity(num_latent=1)


def test_it_is_trained_by_name_on_data_without_steps(tmp_path):
    tiny_llama().save(tmp_path / "start")
    rows = [{"question": f"What is {i} and 1?", "steps": [], "answer": str(i + 1)} for i in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    training = {"init": str(tmp_path / "start"), "out": str(tmp_path / "run"), "steps": 2, "batch": 2, "accumulate": 1, "device": "cpu", "workers": 0}  # fmt: skip
    data = {"file": str(tmp_path / "data.json"), "held_out": 2, "without_steps": True}
    config = {"method": {"num_latent": 2}, "training": training, "validation": {"samples": 2}, "coconut_json": data}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert command(["diversity", "--config", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
