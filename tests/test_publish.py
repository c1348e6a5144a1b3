"""Publishing: a model whose thoughts need companions is scored with them, and takes the place of an old one whole."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine import adapters, benchmark, models
from engine.adapters import Lora
from engine.backbones.load import load
from engine.data.worlds import WorldsSource
from engine.exchange.export import export
from engine.familiarity import Asked, Familiarity
from engine.insight import lens
from engine.methods import described
from engine.methods.codi import Codi
from engine.methods.controls import Silent
from engine.methods.heima import Heima, Interpreters
from engine.methods.method import COMPANIONS, META, Method
from tests.tiny import tiny_backbone
from train import publish

CODI = Codi(num_latent=2, prj_dim=16)
LORA = Lora(r=4)


class Known(Familiarity):
    """What is familiar takes long to learn."""

    def __init__(self) -> None:
        super().__init__(
            torch.zeros(2), torch.zeros(1, 2), torch.eye(2), 1.0, (Asked("Where is it?", ("here", "there")),), 7.5
        )


def finished(run: Path, method: Method, base: str = "fresh", lora: Lora | None = None, adapter: str = "") -> Path:
    """A run's folder as training leaves it. With `lora`, trained on the model in the folder `base`."""
    if not lora:
        tiny_backbone().save(run / "start")
    backbone = load(base if lora else run / "start", tokens=method.tokens)
    if adapter:
        adapters.merge(backbone.model, adapter)
    companions = method.companions(backbone)
    trained = adapters.for_training(backbone, companions, lora, method.frozen, "", method.tokens)
    for name, tensor in [part for each in trained.values() for part in each.named_parameters()]:
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.02)  # which starts at 0
    adapters.save(run / "best", backbone, companions, trained, method.frozen)
    training = {"init": base, "adapter": adapter, "out": str(run), "batch": 4, "optimizer": "adamw", "lr": 1e-3, "schedule": "cosine", "precision": "no"}  # fmt: skip
    settings = {"training": training, "processes": 1, "hardware": "CPU", "method": described(method), "WorldsSource": asdict(WorldsSource())}  # fmt: skip
    settings |= {"lora": asdict(lora)} if lora else {}
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


def test_an_adapter_ships_beside_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder alone is loaded: the model, its thoughts' adapter, and what reads them, all as the runs left them."""
    evaluate = publish.evaluate
    monkeypatch.setattr(publish, "evaluate", lambda backbone, samples, *rest, **named: evaluate(backbone, samples[:1], *rest, **named))  # fmt: skip
    base, out, thinks = tmp_path / "shelf" / "explicit", tmp_path / "shelf" / "heima", Heima(tags="tokens")
    publish.publish(finished(tmp_path / "first", Silent(pauses=2)), base, 1)
    first = finished(tmp_path / "thinks", thinks, str(base), LORA)
    reads = Interpreters(tags="tokens", interpreted=("CAPTION",))
    publish.publish(finished(tmp_path / "reads", reads, str(base), LORA, str(first / "best")), out, 1)

    shipped = models.load(out, device="cpu")
    assert shipped.folders == (base, out)
    assert shipped.familiarity is not None  # its model's
    assert (shipped.name, shipped.method) == ("small heima", reads)
    wanted = load(base, tokens=thinks.tokens)
    start = {name: tensor.clone() for name, tensor in wanted.model.state_dict().items()}
    adapters.merge(wanted.model, first / "best")
    moved = 0
    for name, tensor in shipped.backbone.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted.model.state_dict()[name], atol=5e-4, rtol=0)  # kept in bf16
        moved += name in start and not torch.equal(tensor, start[name])
    assert moved >= 4
    companions = reads.companions(wanted)
    adapters.load_companions(tmp_path / "reads" / "best", companions)
    for name, tensor in shipped.companions.state_dict().items():
        torch.testing.assert_close(tensor, companions.state_dict()[name], atol=5e-4, rtol=0)
    history = json.loads((out / publish.HISTORY).read_text())
    assert [stage[0]["training"]["out"] for stage in history] == [
        str(tmp_path / run) for run in ("first", "thinks", "reads")
    ]
    assert "LoRA of rank 4" in (out / "README.md").read_text()
    assert sum(file.stat().st_size for file in out.rglob("*.safetensors")) < sum(file.stat().st_size for file in base.glob("*.safetensors"))  # fmt: skip

    merged = export(out, tmp_path / "merged", "merged", scores=())
    heads = [
        each.backbone.model.get_output_embeddings().weight for each in (models.load(merged, device="cpu"), shipped)
    ]
    torch.testing.assert_close(*heads, atol=1e-3, rtol=1e-2)  # its base is kept in bf16
    alone = export(out, tmp_path / "alone")
    assert json.loads((alone / adapters.CONFIG).read_text())["base_model_name_or_path"] == base.name
    assert models.load(base, alone, "cpu").method == reads

    weights = base / "model.safetensors"
    kept = weights.read_bytes()
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="adapter was trained on other weights than"):
        models.load(out)
    weights.write_bytes(kept)
    for elsewhere in ("some/model", "../../shelf/explicit", str(base), "../.."):
        (out / adapters.CONFIG).write_text(
            (alone / adapters.CONFIG).read_text().replace(f'"{base.name}"', f'"{elsewhere}"')
        )
        with pytest.raises(ValueError, match=f"holds an adapter for {elsewhere}: name that with --model"):
            models.load(out)


def test_an_adapter_ships_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tiny_backbone().save(tmp_path / "start")
    run = finished(tmp_path / "run", Silent(pauses=2), str(tmp_path / "start"), LORA)
    monkeypatch.setattr(sys, "argv", ["publish", str(run), str(tmp_path / "shelf" / "silent")])
    assert publish.main() == 2
    assert f"publish into {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "shelf" / "silent").exists()


def test_what_is_being_published_is_not_shipped_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SMALL", tmp_path)
    for name in ("pause", "explicit.unfinished", "heima.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / META).write_text("{}")
    assert benchmark.shipped() == ["pause"]


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


def test_a_card_says_what_of_a_model_learnt() -> None:
    training = {"out": "runs/decoder", "optimizer": "muon", "lr": 1e-3, "schedule": "late", "precision": "no"}
    settings: dict[str, Any] = {"training": training, "WorldsSource": asdict(WorldsSource())}
    assert ", muon at 0.001, late, float32" in publish.stage(settings, 32, 60)
    assert "LoRA of rank 4, muon" in publish.stage(settings | {"lora": asdict(LORA)}, 32, 60)
    assert "its companions alone, muon" in publish.stage(settings | {"training": training | {"frozen": True}}, 32, 60)
