"""Clips that can't be read while training: the run stops with a sentence, or goes on in a way that (seed, step) decides."""

import json
from pathlib import Path

import pytest
import torch

from engine.batches import Batches, Unread, batches, unread_before
from engine.config import ConfigError, build
from engine.container import VideoError
from engine.data.jsonl import JsonlSource
from engine.methods.controls import Explicit
from engine.recipe import Training
from engine.training import train
from tests.media import write
from tests.tiny import tiny_backbone, tiny_gpt2
from train.command import Run, held_out, main, validation

CLIPS, BROKEN = 6, (1, 4)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("start")
    tiny_backbone(layers=1).save(folder)
    return str(folder)


def data(folder: Path, broken: tuple[int, ...], count: int = CLIPS) -> str:
    rows = []
    for place in range(count):
        clip = folder / f"{place}.mp4"
        if place in broken:
            clip.write_bytes(b"no clip")
        else:
            write(clip, count=6 + place, fps=6)
        rows.append({"video": clip.name, "question": f"Where is {place}?", "steps": ["It moves."], "answer": "left"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "data.jsonl")


@pytest.fixture(scope="module")
def partly(tmp_path_factory) -> str:
    return data(tmp_path_factory.mktemp("partly"), BROKEN)


def source(file: str, **more) -> JsonlSource:
    return JsonlSource(file, fps=2.0, frames=(2, 4), pixels=28 * 56, **more)


def settings(start: str, out: Path, steps: int, **changes) -> Training:
    values = {
        "init": start, "out": str(out), "steps": steps, "batch": 2, "accumulate": 2, "lr": 1e-3, "warmup": 1,
        "schedule": "constant", "device": "cpu", "workers": 0, "log_every": 1, "validate_every": 99, "save_every": 2,
    }  # fmt: skip
    return Training(**(values | changes))


def score(backbone, companions, epoch) -> dict[str, float]:
    return {"accuracy": 0.5}


def logged(out: Path) -> tuple[dict[int, float], set[tuple[int, int]]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    missed = {(line["step"], line["sample"]) for line in lines if "unreadable" in line}
    return {line["step"]: line["loss"] for line in lines if "loss" in line}, missed


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_with_one_sentence(start, partly, tmp_path, workers):
    with pytest.raises(VideoError, match=r"data\.jsonl, line (2|5): (1|4)\.mp4 can't be read") as error:
        train(settings(start, tmp_path, 9, workers=workers), Explicit(), source(partly), score)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert "can't be read" in last["stopped"]


def test_another_is_drawn_and_said_and_a_resumed_run_is_the_same(start, partly, tmp_path, capsys):
    given, allowed = source(partly), {"unreadable": 0.9}
    train(settings(start, tmp_path / "whole", 6, **allowed), Explicit(), given, score)
    assert ".mp4 can't be read" in capsys.readouterr().out
    train(settings(start, tmp_path / "parts", 2, **allowed), Explicit(), given, score)
    train(settings(start, tmp_path / "parts", 6, workers=1, **allowed), Explicit(), given, score, resume=True)
    (whole, missed), (parts, missed_too) = (logged(tmp_path / run) for run in ("whole", "parts"))
    assert whole == parts
    assert missed == missed_too
    bad = {f"{place}.mp4" for place in BROKEN}
    assert {sample for _, sample in missed} == {i for i in range(12) if given(i).visual.path.name in bad}
    ends = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in ("whole", "parts")]
    assert ends[0].get("step") == ends[1].get("step") == 6


def test_a_step_has_as_many_samples_as_any_other(partly):
    model = tiny_backbone(layers=1)
    made = Batches(source(partly), Explicit(), model, 3, 3, seed=5, spares=7)
    for step in range(4):
        passes, unread = made.made(step)
        assert [len(packed.ids) for packed in passes] == [1, 1, 1]
        again, unread_again = Batches(source(partly), Explicit(), model, 3, 3, seed=5, spares=7).made(step)
        assert all(torch.equal(a.ids, b.ids) and torch.equal(a.patches, b.patches) for a, b in zip(passes, again))
        assert unread == unread_again
    told: list[tuple[int, list[Unread]]] = []
    list(batches(made, 1, 4, 0, lambda step, unread: told.append((step, unread))))
    assert told == [(step, made.made(step)[1]) for step in range(1, 4) if made.made(step)[1]]
    assert told


def test_a_clip_for_a_model_without_eyes_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 1: This is a language model without vision"):
        Batches(source(data(tmp_path, (), 1)), Explicit(), tiny_gpt2(), 1, 1, seed=0)[0]


def test_more_than_the_share_stops_the_run(start, partly, tmp_path):
    with pytest.raises(VideoError, match=r"more than the allowed share 0\.05 \(unreadable\)"):
        train(settings(start, tmp_path, 6, unreadable=0.05), Explicit(), source(partly), score)


def test_nothing_but_broken_clips_stops_at_once(start, tmp_path):
    file = data(tmp_path, (0, 1, 2), 3)
    with pytest.raises(VideoError, match="8 consecutive clips are unreadable"):
        train(settings(start, tmp_path / "out", 6, unreadable=1.0), Explicit(), source(file), score)


def test_what_was_missed_before_a_step_is_known_again(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0}, {"step": 2, "unreadable": "a", "sample": 3}, {"step": 5, "unreadable": "b", "sample": 9},
        {"step": 2, "unreadable": "a", "sample": 3}, {"step": 2, "unreadable": "c", "sample": 3},
    ]  # fmt: skip
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 1, "unreada')
    assert unread_before(log, 2) == {(2, Unread(3, "a")), (2, Unread(3, "c"))}


def test_cached_frames_change_no_loss(start, tmp_path):
    file = data(tmp_path, ())
    plain, cached = source(file), source(file, cache=str(tmp_path / "cache"))
    for name, given in (("plain", plain), ("first", cached), ("again", cached)):
        train(settings(start, tmp_path / name, 3), Explicit(), given, score)
    assert logged(tmp_path / "plain") == logged(tmp_path / "first") == logged(tmp_path / "again")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6


def test_a_validation_clip_that_does_not_open_is_said_before_training(partly):
    run = build(Run, {"method": {}, "jsonl": {"file": partly, "held_out": 3}, "validation": {"samples": 3}})
    with pytest.raises(VideoError, match=r"data\.jsonl, line 5: 4\.mp4 can't be read"):
        held_out(run)


def test_validation_reads_its_clips_once(tmp_path, monkeypatch):
    file = data(tmp_path, ())
    run = build(Run, {"method": {}, "jsonl": {"file": file, "held_out": 2, "fps": 2, "frames": [2, 4], "pixels": 1568},
                      "validation": {"samples": 2, "batch": 2}})  # fmt: skip
    model = tiny_backbone(layers=1)
    validate = validation(run, Explicit()).score
    first = validate(model, torch.nn.ModuleDict(), 0)
    for clip in tmp_path.glob("*.mp4"):
        clip.unlink()
    assert validate(model, torch.nn.ModuleDict(), 0) == first


def test_a_bad_row_is_refused_before_anything_is_written(start, tmp_path, capsys):
    file = Path(data(tmp_path, ()))
    file.write_text(file.read_text() + '{"question": "Why?", "steps": [], "answer": "so"}\n')
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({
        "method": {}, "training": {"init": start, "out": str(tmp_path / "out"), "steps": 1},
        "jsonl": {"file": str(file), "validation_file": str(file)}, "validation": {"samples": 1},
    }))  # fmt: skip
    assert main("", Explicit, ["--config", str(config)]) == 2
    told = capsys.readouterr().err
    assert f"{file}, line 7: steps holds no steps" in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
