"""The one command that retrains the small models: what it runs, in which order, from which weights to which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.benchmark import Benchmark
from engine.config import build, read_yaml
from train import baselines, small
from train.command import Run


@pytest.fixture(params=["cpu", "cuda"])
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> list[list[str]]:
    """The commands of a retraining whose runs all succeed at once, each from its own module on, without torchrun's."""
    commands: list[list[str]] = []

    def pretend(words: list[str], check: bool, **_: Any) -> None:
        assert words[0] == sys.executable
        assert check
        last = max(place for place, word in enumerate(words) if word == "-m")
        commands.append(words[last + 1 :])
        if "--out" in words:
            (after(words, "--out") / "best").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(subprocess, "run", pretend)
    small.retrain(small.Workshop(tmp_path, request.param, "no", 2), [*small.METHODS, *small.MODELS], small.START)
    return commands


def after(words: list[str], flag: str) -> Path:
    return Path(words[words.index(flag) + 1])


def stages(ran: list[list[str]]) -> list[list[str]]:
    """What is learnt in stages."""
    own = [f"train.{name}" for name in ("lookup", *small.METHODS)]
    return [words for words in ran if "--device" in words and words[0] not in own]


def test_every_model_goes_through_its_stages_from_the_same_start(ran: list[list[str]], tmp_path: Path) -> None:
    for name, (_, wanted) in small.MODELS.items():
        commands = [words for words in stages(ran) if after(words, "--out").parent.name == name]
        ends = [after(words, "--out") / "best" for words in commands]
        assert [after(words, "--init") for words in commands] == [small.START, *ends[:-1]]
        assert [end.parent.name for end in ends] == list(wanted)
        assert [stage for stage in small.STAGES if stage in wanted] == list(wanted)


def test_a_control_sees_the_stages_clips_and_steps(ran: list[list[str]]) -> None:
    """Its file changes the method alone. On a CPU, two processes share the stage's batch and passes."""
    for words in stages(ran):
        files = words[words.index("--config") + 1 : words.index("--init")]
        stage, values = read_yaml(files[0]), {}
        for file in files:
            values |= read_yaml(file)
        assert {key: values[key] for key in ("worlds", "training")} == {
            key: stage[key] for key in ("worlds", "training")
        }
        flags = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
        run = build(Run, values | {"training": values["training"] | flags})
        processes = 1 if after(words, "--device") == Path("cuda") else 2
        assert processes * run.training.batch == stage["training"]["batch"]
        assert run.training.accumulate == 1


def test_what_is_shipped_is_each_ones_last_stage(ran: list[list[str]], tmp_path: Path) -> None:
    published = [words[1:] for words in ran if words[0] == "train.publish"]
    shelf = small.EXPECTED.parent
    assert published == [
        *[[str(tmp_path / name / stages[-1]), str(shelf / name)] for name, (_, stages) in small.MODELS.items()],
        [str(tmp_path / "coconut"), str(shelf / "coconut")],
        [str(tmp_path / "codi"), str(shelf / "codi")],
        [str(tmp_path / "heima" / "interpreters"), str(shelf / "heima")],
    ]


def test_the_other_methods_start_from_the_pause_model(ran: list[list[str]], tmp_path: Path) -> None:
    """Begun when that is there, one preset after another, as each says. What is published is what the last one's stages leave."""
    commands = [words for words in ran if words[0].removeprefix("train.") in small.METHODS]
    assert all(ran.index(words) > [each[-1] for each in ran].index(str(small.PAUSE)) for words in commands)
    assert all("--resume" in words for words in commands)
    for name, (presets, last) in small.METHODS.items():
        own = [words for words in commands if words[0] == f"train.{name}"]
        assert [after(words, "--config") for words in own] == [small.CONFIGS / f"{preset}.yaml" for preset in presets]
        said = [read_yaml(after(words, "--config"))["training"] for words in own]
        places = [after(words, "--out") for words in own]
        assert places == [tmp_path / Path(each["out"]).name for each in said]
        assert [after(words, "--init") for words in own] == [small.PAUSE, *(place / "best" for place in places[:-1])]
        assert Path(said[0]["init"]).resolve() == small.PAUSE
        assert [each["init"] for each in said[1:]] == [f"{each['out']}/best" for each in said[:-1]]
        stages = [stage["name"] for stage in read_yaml(after(own[-1], "--config")).get("stages", [])]
        assert last in (stages or [""])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["explicit", "heima"])
def test_one_model_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, device: str) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words))
    small.retrain(small.Workshop(tmp_path, device, "no", 2), [name], small.START)
    assert [words[-1] for words in commands if "train.publish" in words] == [str(small.EXPECTED.parent / name)]


def test_the_lens_is_the_new_weights_own(ran: list[list[str]]) -> None:
    """It comes after they are shipped."""
    shipped = [words[-1] for words in ran if words[0] == "train.publish"].index(str(small.PAUSE))
    assert ran.index(["train.lens", str(small.PAUSE)]) > shipped
    assert [words[0] for words in ran].count("train.lens") == 1


def test_baselines_are_the_explicit_control_on_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words))
    asked: list[tuple[str, str]] = []

    def measured(benchmark: Benchmark, names: list[str], *_: Any) -> dict[str, Any]:
        asked.append((benchmark.corrupt, names[0]))
        return {"methods": {names[0]: {"accuracy": 0.25}}}

    monkeypatch.setattr(baselines, "measure", measured)
    monkeypatch.setattr(sys, "argv", ["baselines", "--out", str(tmp_path), "--shown", "blind", "single"])
    assert baselines.main() == 0
    assert asked == [(shown, f"{tmp_path}/{shown}/best-explicit") for shown in ("blind", "single")]
    assert [after(words, "--set") for words in commands] == [
        Path("worlds.corrupt=blind"),
        Path("worlds.corrupt=single"),
    ]
    assert {after(words, "--init") for words in commands} == {baselines.EXPLICIT}


def test_scores_are_kept_and_held_against_later_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """The first time there is nothing to hold them against."""
    figures = {"explicit": {"accuracy": 0.9, "interval": [0.85, 0.93]}}
    monkeypatch.setattr(small, "EXPECTED", tmp_path / "scores.json")
    monkeypatch.setattr(small, "measure", lambda *_: {"methods": figures})

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["small", "--check", "--models", "explicit", *words])
        return small.main()

    assert run() == 0
    assert "--write keeps it" in capsys.readouterr().out
    assert run("--write") == 0
    assert run() == 0
    figures = {"explicit": {"accuracy": 0.84, "interval": [0.8, 0.88]}}
    assert run() == 1
    assert "WORSE" in capsys.readouterr().out
