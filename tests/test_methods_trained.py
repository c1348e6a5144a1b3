"""Methods with a curriculum or with companions through the training loop: resume at a stage's edge, what is saved, published keys."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import ConfigError
from engine.data.text_worlds import TextWorldsSource
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.method import COMPANIONS
from engine.methods.steps import StepSupervision
from engine.training import Training, checkpoints, train
from tests.tiny import tiny_llama
from train.coconut import published
from train.command import main

SOURCE = TextWorldsSource(difficulties=(1, 3))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("start")
    tiny_llama().save(folder)
    return str(folder)


def settings(start: str, out: Path, steps: int) -> Training:
    return Training(
        init=start, out=str(out), steps=steps, batch=4, accumulate=2, lr=3e-3, warmup=0, schedule="constant",
        epoch=4, device="cpu", workers=0, log_every=1, validate_every=100, save_every=2,
    )  # fmt: skip


def accuracy(backbone, companions) -> dict[str, float]:
    return {"accuracy": 0.5}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (out / "log.jsonl").open()) if "loss" in row]


@pytest.mark.parametrize(
    "method",
    [
        Coconut(c_thought=1, epochs_per_stage=2, max_latent_stage=2, uniform_prob=0.3, steps=StepSupervision()),
        Codi(num_latent=2, prj_dim=16, steps=StepSupervision(mean="tokens", missing="ignore", first_position=0)),
    ],
    ids=["coconut", "codi"],
)
def test_a_run_resumed_at_the_edge_of_a_stage_gives_the_losses_of_a_whole_one(start, tmp_path, method):
    train(settings(start, tmp_path / "whole", 4), method, SOURCE, accuracy)
    train(settings(start, tmp_path / "parts", 2), method, SOURCE, accuracy)
    train(settings(start, tmp_path / "parts", 4), method, SOURCE, accuracy, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, other = (load_file(checkpoints(tmp_path / run)[-1] / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_new_stage_starts_a_new_optimizer(start, tmp_path):
    """With the stage's optimizer kept, the third step would be another: its momentum would still be the second's."""
    staged = Coconut(c_thought=1, epochs_per_stage=2, max_latent_stage=0)
    train(settings(start, tmp_path / "staged", 4), staged, SOURCE, accuracy)
    flat = Coconut(mode="cot")  # the same texts without markers would differ; so only the count of steps is looked at
    train(settings(start, tmp_path / "flat", 4), flat, SOURCE, accuracy)
    taken = [max(int(s["step"]) for s in optimizer_state(tmp_path / run).values()) for run in ("staged", "flat")]
    assert taken == [2, 4]


def optimizer_state(out: Path) -> dict:
    return torch.load(checkpoints(out)[-1] / "optimizer.bin", weights_only=True)["state"]


def test_the_companions_are_saved_beside_the_model(start, tmp_path):
    best = train(settings(start, tmp_path, 2), Codi(num_latent=2, prj_dim=16), SOURCE, accuracy)
    names = set(load_file(best / COMPANIONS))
    assert names == {f"projector.{part}" for part in (
        "up.weight", "up.bias", "down.weight", "down.bias", "norm.weight", "norm.bias",
    )}  # fmt: skip
    assert not any("projector" in name for name in load_file(best / "model.safetensors"))


def flat_file(tmp_path: Path, **changes) -> dict:
    rows = [{"question": "1 + 1?", "steps": ["<<1+1=2>>"], "answer": "2"}] * 8
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = str(tmp_path / "data.json")
    keys = {
        "project": "x", "save_path": str(tmp_path), "name": "run", "coconut": True, "cot": False, "no_cot": False,
        "no_thoughts": False, "c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 1, "pad_latent_to_max": True,
        "uniform_prob": 0.0, "model_id": "gpt2", "load_model_path": "None", "seed": 3, "resume": 0, "bf16": False,
        "train_path": data, "val_path": data, "reset_optimizer": True, "batch_size_training": 2, "debug": False,
        "gradient_accumulation_steps": 2, "num_epochs": 3, "lr": 1e-4, "weight_decay": 0.01, "only_eval": False,
        "save_only_improve": False,
    }  # fmt: skip
    return keys | changes


def test_published_keys_are_understood(start, tmp_path, capsys):
    ours = published(flat_file(tmp_path, load_model_path=start))
    assert ours["method"] == {
        "mode": "coconut", "c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 1, "pad_latent_to_max": True,
        "uniform_prob": 0.0,
    }  # fmt: skip
    assert (ours["training"]["steps"], ours["training"]["batch"], ours["training"]["epoch"]) == (6, 4, 8)
    assert ours["training"]["init"] == start
    keys = flat_file(tmp_path, load_model_path=start, num_epochs=1)
    (tmp_path / "run.yaml").write_text(json.dumps(keys))
    words = ["--config", str(tmp_path / "run.yaml"), "--device", "cpu", "--workers", "0"]
    assert main(None, Coconut, words, published) == 0
    (tmp_path / "eval.yaml").write_text(
        json.dumps(keys | {"load_model_path": f"{tmp_path}/run/best", "only_eval": True})
    )
    capsys.readouterr()
    assert main(None, Coconut, ["--config", str(tmp_path / "eval.yaml")], published) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coconut": False}, "0 of them"),
        ({"cot": True}, "2 of them"),
        ({"c_thoughts": 2}, "'c_thoughts'"),
    ],
)
def test_published_keys_that_can_not_be_meant(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        published(flat_file(tmp_path, **changes))
    short = flat_file(tmp_path)
    del short["lr"]
    with pytest.raises(ConfigError, match="Missing: lr"):
        published(short)
