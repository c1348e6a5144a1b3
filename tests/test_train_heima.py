"""Heima's stages, one run after another: what each starts from, what is there at the end, and what it scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from engine.backbones.load import load
from engine.config import ConfigError, read_yaml
from engine.data.worlds import WorldsSource
from engine.folders import checkpoints
from engine.insight import reconstruction
from engine.methods.heima import Heima, Interpreters
from engine.methods.scorers import Scorers
from tests import tiny
from train.heima import main, plan

CONFIGS = Path(__file__).parent.parent / "train" / "configs"
COMPRESSED = {"compressed": 3}
STAGES: list[dict[str, Any]] = [
    {"name": "summary", "method": {"compressed": 1}},
    {"name": "reasoning", "method": COMPRESSED},
    {"name": "recovering", "method": COMPRESSED, "training": {"lr": 1.0e-4}},
    {"name": "interpreters", "kind": "interpreters"},
    {"name": "scorers", "kind": "scorers"},
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never ends its turn."""
    monkeypatch.setattr(Heima, "longest", 6)
    monkeypatch.setattr("engine.insight.reconstruction.LONGEST", 6)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("start")
    tiny.tiny_backbone(layers=2).save(folder)
    return str(folder)


def config(start: str, out: Path, **changes: Any) -> dict[str, Any]:
    training = {
        "init": start, "out": str(out), "steps": 2, "batch": 2, "accumulate": 1, "lr": 3e-3, "warmup": 0, "device": "cpu",
        "workers": 0, "log_every": 1, "validate_every": 2, "save_every": 2,
    }  # fmt: skip
    worlds = {"sections": True, "difficulties": [1, 2]}
    values = {
        "method": {"tags": "tokens"},
        "training": training,
        "worlds": worlds,
        "validation": {"samples": 3, "batch": 2},
    }
    return {**values, "stages": STAGES, **changes}


def half(said: str, true: str) -> float:
    """A judge."""
    assert isinstance(said, str)
    assert true
    return 0.5


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("lora", [None, {"r": 4, "train_embeddings": True}])
def test_all_stages_run_and_are_scored(
    lora: dict | None, start: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    monkeypatch.setattr(reconstruction, "_bertscore", lambda pairs, encoder, layer: 0.25 * (encoder == Path(start)))
    out = tmp_path / "runs"
    file = tmp_path / "heima.yaml"
    given = {"samples": 3, "batch": 2, "encoder": start, "judge": f"{__name__}:half"}
    file.write_text(yaml.safe_dump(config(start, out, validation=given, **({"lora": lora} if lora else {}))))
    assert main(["--config", str(file)]) == 0
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    kept = [load_file(out / name / "best" / weights) for name in ("summary", "reasoning", "recovering")]
    assert kept[0].keys() == kept[1].keys() == kept[2].keys()
    told = {
        name: json.loads((out / name / "settings.json").read_text())["training"]
        for name in ("reasoning", "interpreters")
    }
    place = "adapter" if lora else "init"
    assert told["reasoning"][place] == str(out / "summary" / "best")
    assert told["interpreters"][place] == str(out / "recovering" / "best")
    assert not (out / "interpreters" / "best" / "model.safetensors").exists()
    moved = max(float((kept[1][key] - kept[2][key]).abs().max()) for key in kept[0])
    assert 0 < moved < 1e-3  # recovering goes slowly
    capsys.readouterr()
    assert main(["--config", str(file), "--only-eval", "true"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == [stage["name"] for stage in STAGES]
    assert scores["recovering"].keys() == {"silent", "accuracy"}
    assert scores["interpreters"].keys() == {"SUMMARY", "CAPTION", "REASONING"}
    assert scores["interpreters"]["CAPTION"]["pairs"] == 3
    assert (scores["interpreters"]["CAPTION"]["bertscore"], scores["interpreters"]["CAPTION"]["judged"]) == (0.25, 0.5)
    assert scores["scorers"].keys() == {"slots", "chain", "gap", "beyond", "kept", "samples"}
    assert (
        scores["scorers"]["slots"]["low"] <= scores["scorers"]["slots"]["value"] <= scores["scorers"]["slots"]["high"]
    )
    # What validation found while training is what the finished folder gives.
    best = json.loads((out / "scorers" / "best" / "scores.json").read_text())
    assert scores["scorers"]["gap"]["value"] == pytest.approx(best["gap"], abs=1e-3)


def test_a_run_that_was_stopped_goes_on_at_its_stage(start: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The stages after it start from the same, and give the same losses."""
    stages = STAGES[:3]
    for name, chosen in (("whole", stages), ("parts", stages[:1])):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config(start, tmp_path / name, stages=chosen)))
        assert main(["--config", str(tmp_path / f"{name}.yaml")]) == 0
    (tmp_path / "parts.yaml").write_text(yaml.safe_dump(config(start, tmp_path / "parts", stages=stages)))
    assert main(["--config", str(tmp_path / "parts.yaml")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "parts.yaml"), "--resume"]) == 0
    for stage in ("summary", "reasoning", "recovering"):
        assert losses(tmp_path / "whole" / stage) == losses(tmp_path / "parts" / stage)
        one, other = (
            load_file(checkpoints(tmp_path / run / stage)[-1] / "model.safetensors") for run in ("whole", "parts")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_presets_are_the_published_stages() -> None:
    """M = the sections + 1, the last at a lower rate; what is left out of each ablation is left out."""

    def stages(name: str) -> list[tuple[str, int, float]]:
        found = plan(read_yaml(CONFIGS / f"{name}.yaml"))
        return [(p.name, p.method.compressed, p.run.training.lr) for p in found if type(p.method) is Heima]

    for place, rate, recovering in (("heima/llava_cot", 1e-4, 1e-5), ("small/heima", 2e-3, 2e-4)):
        chain = [("chain", 0, rate)] if place == "heima/llava_cot" else []
        steps = [("summary", 1, rate), ("caption", 2, rate), ("reasoning", 3, rate)]
        assert stages(place) == [*chain, *steps, ("recovering", 3, recovering)]
        without = "heima/without_" if place == "heima/llava_cot" else "small/heima_without_"
        assert stages(f"{without}progressive") == [("reasoning", 3, rate), ("recovering", 3, recovering)]
        assert stages(f"{without}recovering") == steps
    published = plan(read_yaml(CONFIGS / "heima" / "llava_cot.yaml"))
    assert (published[0].run.lora.r, published[0].run.lora.alpha, published[0].run.lora.vision) == (16, 32, False)
    assert isinstance(published[-1].method, Interpreters)
    assert published[-1].run.training.lr == 5e-4
    small = plan(read_yaml(CONFIGS / "small" / "heima.yaml"))
    assert isinstance(small[-1].method, Scorers)
    for ablation in ("without_progressive", "without_recovering"):  # as many steps as their controls
        found = plan(read_yaml(CONFIGS / "small" / f"heima_{ablation}.yaml"))
        assert sum(p.run.training.steps for p in found if type(p.method) is Heima) == 1200


def test_an_empty_section_is_one_without_settings(start: str, tmp_path: Path) -> None:
    (stage,) = plan({**config(start, tmp_path, stages=[{"name": "a"}]), "method": None})
    assert stage.method == Heima()


def test_a_stage_may_have_clips_of_its_own(start: str, tmp_path: Path) -> None:
    shared = {"worlds": {"difficulties": [1, 2], "sections": True}}
    first, second = plan(
        {**config(start, tmp_path, stages=[{"name": "a"}, {"name": "b", "worlds": {"ramp": 9}}]), **shared}
    )
    assert first.run.source == WorldsSource(difficulties=(1, 2), sections=True)
    assert second.run.source == WorldsSource(difficulties=(1, 2), sections=True, ramp=9)


def test_how_likely_a_text_is_doesnt_depend_on_the_batch(start: str, tmp_path: Path) -> None:
    """Every token counts the same, whatever stands beside it."""
    stages, found = [{"name": "a", "kind": "interpreters"}], []
    for batch in (1, 3):
        values = config(start, tmp_path, stages=stages, validation={"samples": 3, "batch": batch})
        (stage,) = plan(values | {"worlds": {"sections": True, "difficulties": [1, 5]}})
        backbone = load(start, tokens=stage.method.tokens)
        found.append(stage.held_out.score(backbone, stage.method.companions(backbone), 0))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_is_given_holds_for_every_stage(start: str, tmp_path: Path) -> None:
    given = {"training": {"steps": 7, "lr": 0.5, "init": "elsewhere", "out": "elsewhere"}, "method": {"per_section": 2}}
    given["worlds"] = {"ramp": 0}
    stages = [STAGES[0] | {"worlds": {"ramp": 9}}, *STAGES[1:]]
    for stage in plan(config(start, tmp_path, stages=stages), given):
        assert (stage.run.training.steps, stage.run.training.lr, stage.method.per_section) == (7, 0.5, 2)
        assert stage.run.source.ramp == 0
        assert Path(stage.run.training.out).parent == tmp_path


def test_all_stages_can_be_planned_before_any_is_trained(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "heima.yaml").write_text(yaml.safe_dump(config(start, tmp_path / "runs")))
    assert main(["--config", str(tmp_path / "heima.yaml"), "--plan"]) == 0
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line in {stage["name"] for stage in STAGES}] == [
        s["name"] for s in STAGES
    ]


def test_only_finished_stages_are_scored(start: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for stages, words in ((STAGES[:1], []), (STAGES[:2], ["--only-eval", "true"])):
        (tmp_path / "heima.yaml").write_text(yaml.safe_dump(config(start, tmp_path / "runs", stages=stages)))
        capsys.readouterr()
        assert main(["--config", str(tmp_path / "heima.yaml"), *words]) == 0
    told = capsys.readouterr()
    assert list(json.loads(told.out)) == ["summary"]
    assert "reasoning isn't trained yet" in told.err


@pytest.mark.parametrize(
    ("setting", "words", "says"),
    [
        ({"judge": "no.such:thing"}, ["--only-eval", "true"], "validation.judge no.such:thing: "),
        (
            {"encoder": "no/such/place"},
            [],
            "BERTScore's encoder must be a folder with a model in it; no/such/place is none.",
        ),
    ],
)
def test_who_cannot_score_is_refused_first(
    setting: dict, words: list[str], says: str, start: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    values = config(start, tmp_path / "runs", validation={"samples": 1, **setting})
    (tmp_path / "heima.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "heima.yaml"), *words]) == 2
    assert capsys.readouterr().err.startswith(says)
    assert not (tmp_path / "runs").exists()


def test_a_file_without_good_stages_is_refused(start: str, tmp_path: Path) -> None:
    for stages in ([], [{"name": "a"}, {"name": "a"}]):
        with pytest.raises(ConfigError, match="a name of its own"):
            plan(config(start, tmp_path, stages=stages))
    with pytest.raises(ConfigError, match="Did you mean 'method'"):
        plan(config(start, tmp_path, stages=[{"name": "a", "methods": {}}]))
    with pytest.raises(ConfigError, match="a name of its own"):
        plan({key: value for key, value in config(start, tmp_path).items() if key != "stages"})
