"""Publishing: a model whose thoughts need companions is scored with them, and takes the place of an old one whole."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import adapters
from engine.backbones.load import load
from engine.data.worlds import WorldsSource
from engine.insight import lens
from engine.methods import described
from engine.methods.codi import Codi
from engine.methods.controls import Silent
from engine.methods.method import COMPANIONS, META, Method
from tests.tiny import tiny_backbone
from train import publish

CODI = Codi(num_latent=2, prj_dim=16)


class Known:
    """What is familiar takes long to learn."""

    def save(self, folder: Path) -> None:
        (folder / "familiarity.json").write_text("{}")


def finished(run: Path, method: Method) -> Path:
    """A run's folder as training leaves it."""
    backbone = tiny_backbone()
    backbone.save(run / "start")
    backbone = load(run / "start", tokens=method.tokens)
    adapters.save(run / "best", backbone, method.companions(backbone), {}, frozen=False)
    training = {"init": "fresh", "out": str(run), "batch": 4, "optimizer": "adamw", "lr": 1e-3, "schedule": "cosine", "precision": "no"}  # fmt: skip
    settings = {"training": training, "processes": 1, "hardware": "CPU", "method": described(method), "WorldsSource": asdict(WorldsSource())}  # fmt: skip
    (run / "settings.json").write_text(json.dumps(settings, default=str))
    (run / "log.jsonl").write_text(json.dumps({"step": 2, "samples_per_second": 4.0}))
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "fit", lambda *_: Known())


def test_a_model_is_scored_with_the_companions_that_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, used, evaluate = tmp_path / "codi", [], publish.evaluate

    def watched(backbone, samples, method, how, slots, companions, speak):
        used.append(companions.state_dict())
        return evaluate(backbone, samples[:1], method, how, slots, companions, speak=speak)

    monkeypatch.setattr(publish, "evaluate", watched)
    publish.publish(finished(tmp_path / "run", CODI), out, 1)
    shipped = load_file(out / COMPANIONS)
    assert len(used) == 2
    for companions in used:
        assert {tensor.dtype for tensor in companions.values()} == {torch.float32}
        assert all(torch.equal(companions[name], tensor.float()) for name, tensor in shipped.items())
    assert "Sotto small: codi" in (out / "README.md").read_text()
    assert json.loads((out / META).read_text())["name"] == "small codi"


def test_an_old_model_gives_way_to_the_new_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    out.mkdir()
    for name in (lens.FILE, COMPANIONS, "model.safetensors"):
        (out / name).write_bytes(b"old")
    run = finished(tmp_path / "run", Silent(pauses=2))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(publish, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            publish.publish(run, out, 1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == dict.fromkeys(
        (lens.FILE, COMPANIONS, "model.safetensors"), b"old"
    )
    publish.publish(run, out, 1)
    assert load(out)
    assert not {lens.FILE, COMPANIONS} & {path.name for path in out.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"}
