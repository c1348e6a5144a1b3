"""Looped layers: one set of weights while they learn, a plain model when saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.backbones.load import load
from engine.config import ConfigError
from engine.data.worlds import WorldsSource
from engine.loop import looped, unrolled
from engine.methods.controls import Silent
from engine.recipe import Training
from engine.training import train
from tests.test_training import losses
from tests.tiny import tiny_backbone


def accuracy(*_) -> dict[str, float]:
    return {"accuracy": 0.5}


def settings(start: Path, out: Path, **changes) -> Training:
    values = {
        "init": str(start), "out": str(out), "steps": 4, "batch": 4, "accumulate": 2, "lr": 3e-3, "warmup": 2, "device": "cpu",
        "workers": 0, "log_every": 1, "validate_every": 2, "save_every": 2, "optimizer": "muon", "schedule": "constant", "looped": (2, 3),
    }  # fmt: skip
    return Training(**(values | changes))


def test_what_one_layer_learns_all_of_the_loop_have_and_the_saved_model_is_plain(tmp_path: Path) -> None:
    start, source = tmp_path / "start", WorldsSource(difficulties=(1, 2))
    tiny_backbone().save(start)
    best = train(settings(start, tmp_path / "whole"), Silent(pauses=2), source, accuracy)
    before, after = load_file(start / "model.safetensors"), load_file(best / "model.safetensors")
    assert before.keys() == after.keys()
    rest = "self_attn.q_proj.weight"
    first, second, third = (f"model.layers.{layer}.{rest}" for layer in range(3))
    assert torch.equal(after[second], after[third])
    assert not torch.equal(after[second], before[second])
    assert not torch.equal(after[first], after[second])

    train(settings(start, tmp_path / "parts", steps=2), Silent(pauses=2), source, accuracy)
    train(settings(start, tmp_path / "parts"), Silent(pauses=2), source, accuracy, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    saved = load(best)
    looped(saved, 2, 3)
    assert len(list(saved.model.parameters())) < len(list(load(best).model.parameters()))
    assert unrolled(saved) is not saved


def test_a_model_without_a_loop_is_its_own_unrolled_form() -> None:
    backbone = tiny_backbone()
    assert unrolled(backbone) is backbone


def test_a_loop_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers are 1 to 3"):
        looped(tiny_backbone(), 2, 4)
    with pytest.raises(ConfigError, match="fsdp2"):
        train(
            settings(tmp_path, tmp_path / "out", optimizer="adamw", parallel="fsdp2"),
            Silent(),
            WorldsSource(),
            accuracy,
        )
