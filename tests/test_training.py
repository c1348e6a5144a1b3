"""The training loop: exact resume, steps decided by (seed, step) alone, safe checkpoints, clear refusals."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import training
from engine.adapters import Lora
from engine.backbones.load import load
from engine.batches import Batches
from engine.config import ConfigError
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource
from engine.folders import Journal, checkpoints
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.controls import Explicit, Silent
from engine.methods.heima import Interpreters
from engine.methods.method import COMPANIONS
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.recipe import ABOVE_NONE, COUNTED, FROM_NONE, Training, learning_rate, optimizers
from engine.resume import start_of
from engine.training import train, without_bf16
from tests.tiny import tiny_backbone, tiny_gpt2
from train.command import HeldOut, evaluated


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("start")
    tiny_backbone().save(folder)
    return str(folder)


SOURCE = WorldsSource(difficulties=(1, 2))


def settings(start: str, out: Path, steps: int, **changes) -> Training:
    values = {
        "init": start, "out": str(out), "steps": steps, "batch": 4, "accumulate": 2, "lr": 3e-3, "warmup": 2,
        "schedule": "constant", "device": "cpu", "workers": 0, "log_every": 1, "validate_every": 2, "save_every": 2,
    }  # fmt: skip
    return Training(**(values | changes))


def accuracy(backbone, companions, epoch) -> dict[str, float]:
    return {"accuracy": 0.5}


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_gives_the_losses_of_one_that_was_not_interrupted(start, tmp_path, optimizer):
    method = PauseDistillation(pauses=(2, 5))
    train(settings(start, tmp_path / "whole", 4, optimizer=optimizer), method, SOURCE, accuracy)
    train(settings(start, tmp_path / "parts", 2, optimizer=optimizer), method, SOURCE, accuracy)
    train(settings(start, tmp_path / "parts", 4, optimizer=optimizer), method, SOURCE, accuracy, resume=True)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole == parts
    assert len(set(whole.values())) == 4
    for name in ("model.safetensors", "optimizer.bin"):
        one, other = (checkpoints(tmp_path / run)[-1] / name for run in ("whole", "parts"))
        assert one.exists()
        assert other.exists()
    one, other = (load_file(checkpoints(tmp_path / run)[-1] / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_muon_moves_the_matrices_inside_the_layers_and_adamw_the_rest(start):
    backbone = load(start)
    rest, inner = optimizers(Training(optimizer="muon"), torch.nn.ModuleList([backbone.model]))
    (turned,) = inner.param_groups
    names = {parameter: name for name, parameter in backbone.model.named_parameters()}
    moved = {names[p] for p in turned["params"]}
    assert all(names[p] not in moved for group in rest.param_groups for p in group["params"])
    assert len(moved) + sum(len(group["params"]) for group in rest.param_groups) == len(names)
    assert any("q_proj" in name for name in moved)
    assert not any("embed" in name or "norm" in name or "bias" in name or "lm_head" in name for name in moved)
    assert len(optimizers(Training(), torch.nn.ModuleList([backbone.model]))) == 1


def test_companions_go_on_from_those_beside_the_model(start, tmp_path):
    taught = PauseDistillation(mode="silent", pauses=(3, 3), steps=StepSupervision(layers=1))
    best = train(settings(start, tmp_path / "first", 2), taught, SOURCE, accuracy)
    still = settings(str(best), tmp_path / "second", 1, lr=1e-300)  # nothing moves
    then = train(still, PauseDistillation(pauses=(3, 3), steps=StepSupervision(layers=1)), SOURCE, accuracy)
    before, after = (load_file(folder / COMPANIONS) for folder in (best, then))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="other settings of the method"):
        train(
            settings(str(best), tmp_path / "third", 1),
            replace(taught, steps=StepSupervision(layers=2)),
            SOURCE,
            accuracy,
        )


def test_a_model_that_is_to_stay_as_it_is_stays_and_its_companions_learn(start, tmp_path):
    method = PauseDistillation(mode="silent", pauses=(3, 3), steps=StepSupervision(layers=1))
    config = settings(start, tmp_path / "run", 2, frozen=True, optimizer="muon")
    best = train(config, method, SOURCE, accuracy)
    before, companions, _ = training.made_ready(Training(init=start), method, None)
    after, learnt, _ = training.made_ready(
        Training(init=str(best)), method, None
    )  # it is whole: a run may start from it
    weights = zip(before.model.parameters(), after.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    still = {name for name, weight in companions.named_parameters() if torch.equal(weight, learnt.get_parameter(name))}
    assert still == {
        "auxiliary.model.language_model.embed_tokens.weight"
    }  # words are embedded by the model's own table
    with pytest.raises(ConfigError, match="nothing would learn"):
        train(replace(config, out=str(tmp_path / "none")), PauseDistillation(), SOURCE, accuracy)
    with pytest.raises(ConfigError, match="choose one of them"):
        train(replace(config, out=str(tmp_path / "lora")), method, SOURCE, accuracy, lora=Lora(r=2))


def test_companions_of_another_method_are_left(start, tmp_path):
    taught = PauseDistillation(mode="silent", pauses=(3, 3), steps=StepSupervision(layers=1))
    best = train(settings(start, tmp_path / "first", 1), taught, SOURCE, accuracy)
    other = Codi(num_latent=2, prj_dim=16, steps=StepSupervision(layers=1))
    _, companions, _ = training.made_ready(Training(init=str(best)), other, None)
    assert set(companions) == {"projector", "auxiliary"}


def test_companions_of_a_hub_id_are_those_in_its_download(start, tmp_path, monkeypatch):
    method = PauseDistillation(pauses=(3, 3), steps=StepSupervision(layers=1))
    taught = train(settings(start, tmp_path / "first", 1), method, SOURCE, accuracy)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(taught))
    monkeypatch.setattr(training, "load", lambda _, tokens: load(taught, tokens=tokens))
    _, companions, _ = training.made_ready(Training(init="someone/taught"), method, None)
    kept, found = load_file(taught / COMPANIONS), companions.state_dict()
    assert all(torch.equal(kept[name], found[name]) for name in kept)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_is_decided_by_seed_and_step_alone(start, workers):
    from engine.backbones.qwen2_5_vl import Qwen25VL
    from engine.batches import batches

    dataset = Batches(SOURCE, PauseDistillation(pauses=(1, 9)), Qwen25VL.load(start), 4, 2, seed=3)
    late = next(iter(batches(dataset, 2, 3, workers)))
    through = list(batches(dataset, 0, 3, workers))[2]
    for one, other in zip(late, through):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.patches, other.patches)
    other_seed = Batches(SOURCE, PauseDistillation(pauses=(1, 9)), dataset.backbone, 4, 2, seed=4)[2]
    assert any(a.ids.shape != b.ids.shape or not torch.equal(a.ids, b.ids) for a, b in zip(late, other_seed))


def test_two_processes_see_what_one_sees(start):
    from engine.backbones.qwen2_5_vl import Qwen25VL

    backbone = Qwen25VL.load(start)
    one = Batches(SOURCE, Explicit(), backbone, 4, 1, seed=0)[1][0]
    two = [Batches(SOURCE, Explicit(), backbone, 2, 1, seed=0, rank=r, ranks=2)[1][0] for r in range(2)]
    rows = sorted(tuple(i for i in row.tolist() if i != backbone.pad) for row in one.ids)
    split = sorted(tuple(i for i in row.tolist() if i != backbone.pad) for part in two for row in part.ids)
    assert rows == split


def test_training_lowers_the_loss(start, tmp_path):
    out = tmp_path / "run"
    train(settings(start, out, 12, batch=8), Silent(pauses=2), SOURCE, accuracy)
    seen = losses(out)
    assert np.mean([seen[i] for i in (10, 11, 12)]) < 0.8 * seen[1]


def test_the_best_model_is_kept_and_loads(start, tmp_path):
    from engine.backbones.qwen2_5_vl import Qwen25VL

    scores = iter([0.2, 0.9, 0.4])
    best = train(settings(start, tmp_path, 6), Explicit(), SOURCE, lambda *_: {"accuracy": next(scores)})
    assert json.loads((best / "scores.json").read_text()) == {"step": 4, "accuracy": 0.9}
    assert Qwen25VL.load(best).token("<pause>") > 0
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000004", "step-0000006"]


def test_a_run_is_not_overwritten(start, tmp_path):
    train(settings(start, tmp_path, 2), Explicit(), SOURCE, accuracy)
    with pytest.raises(ConfigError, match="--resume"):
        train(settings(start, tmp_path, 2), Explicit(), SOURCE, accuracy)


def test_what_a_run_without_checkpoints_has_left_is_not_overwritten(start, tmp_path):
    train(settings(start, tmp_path, 2), Explicit(), SOURCE, accuracy)
    for gone in (tmp_path / "checkpoints", tmp_path / "best"):
        shutil.rmtree(gone)
        with pytest.raises(ConfigError, match="--resume"):
            train(settings(start, tmp_path, 2), Explicit(), SOURCE, accuracy)
    train(settings(start, tmp_path, 2, lr=0.1), Explicit(), SOURCE, accuracy, resume=True)  # it begins anew


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_goes_on_with_its_own_settings_alone(start, tmp_path, steps):
    note = {"WorldsSource": asdict(SOURCE), "validation": {"samples": 2}}
    train(settings(start, tmp_path, 2), Explicit(), SOURCE, accuracy, note=note)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = note | {"WorldsSource": asdict(replace(SOURCE, ramp=9))}
    for changes, method, source, lora, words in (
        (
            {"lr": 0.5},
            Explicit(),
            note,
            None,
            r"was started with lr = 0.003, not 0.5: restore it, or choose another folder",
        ),
        ({"batch": 2}, Explicit(), note, None, r"with samples a step = 4, not 2"),
        ({}, Silent(pauses=2), note, None, r"with method.name = controls.Explicit, not controls.Silent"),
        ({}, Explicit(), data, None, r"with WorldsSource.ramp = 0, not 9"),
        ({}, Explicit(), note, Lora(r=2), r"with lora = none, not one"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(settings(start, tmp_path, steps, **changes), method, SOURCE, accuracy, True, source, lora)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_named(start, tmp_path):
    train(settings(start, tmp_path, 4), Explicit(), SOURCE, accuracy)
    first, last = checkpoints(tmp_path)
    for name in ("optimizer.bin", "model.safetensors", "progress.json"):
        (last / name).write_bytes((last / name).read_bytes()[:9])
        with pytest.raises(ConfigError, match=f"{last} is damaged, or of another model: remove it, .* from {first}"):
            train(settings(start, tmp_path, 6), Explicit(), SOURCE, accuracy, resume=True)
    shutil.rmtree(first)
    with pytest.raises(ConfigError, match="remove it, and --resume begins anew"):
        train(settings(start, tmp_path, 6), Explicit(), SOURCE, accuracy, resume=True)


def test_a_finished_run_is_left_as_it_is(start, tmp_path, capsys):
    best = train(settings(start, tmp_path, 2), Explicit(), SOURCE, accuracy)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    best.rename(tmp_path / "best.old")  # as a kill may leave it
    copy = shutil.copytree(start, tmp_path.parent / "moved")
    for place, steps in ((start, 2), (start, 1), (copy, 2)):
        again = settings(str(place), tmp_path, steps, keep=1, parallel="ddp", validate_every=1)
        assert train(again, Explicit(), SOURCE, accuracy, resume=True) == best
        assert f"its best model is in {best}" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("broken", "words"),
    [(lambda loss: loss * float("nan"), "loss is nan at step 2"), (lambda loss: loss + (loss - loss).sqrt(), "norm is nan at step 2")],
    ids=["loss", "gradient alone"],
)  # fmt: skip
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(start, tmp_path, broken, words, monkeypatch):
    closed, close = [], Journal.close
    monkeypatch.setattr(Journal, "close", lambda self: closed.append(close(self)))

    class Breaking(Explicit):
        def loss(self, out):
            total, terms = super().loss(out)
            return (broken(total) if len(checkpoints(tmp_path)) else total), terms

    with pytest.raises(FloatingPointError, match=words):
        train(settings(start, tmp_path, 4), Breaking(), SOURCE, accuracy)
    assert closed == [None]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000002"]


def test_a_half_written_checkpoint_is_not_taken(start, tmp_path):
    train(settings(start, tmp_path, 2), Explicit(), SOURCE, accuracy)
    (tmp_path / "checkpoints" / "unfinished").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000002"]


def test_adamw_remembers_as_long_as_it_is_told(start):
    model = load(start).model
    for config, remembered in ((Training(), 0.999), (Training(beta2=0.98), 0.98)):
        (adamw,) = optimizers(config, model)
        assert {group["betas"] for group in adamw.param_groups} == {(0.9, remembered)}


def test_a_run_says_how_much_it_sees(start, tmp_path, capsys):
    train(settings(start, tmp_path / "run", 1), Explicit(), SOURCE, accuracy)
    assert "run: 4 samples on 1 process\n" in capsys.readouterr().out  # worlds have no end
    recipe = settings(start, tmp_path, 20_600, batch=2)
    told = training.seen_in_all(recipe, 8, range(164_800))
    assert told == "329,600 samples on 8 processes: 2.0 rounds of the data"


def test_the_learning_rate_rises_and_falls():
    config = Training(steps=100, warmup=10, lr=1.0, schedule="linear", final_lr=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 55) == pytest.approx(0.55)
    assert learning_rate(config, 100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batch": 3}, "divided"),
        ({"init": ""}, "start from"),
        ({"init": "no/such/folder"}, "no folder"),
        *(({"init": name}, f"no folder {name} ") for name in ("/nope", "./nope", "~/nope")),
        ({"lr": float("inf")}, "^lr is inf"),
        *(({name: 0}, f"^{name} is 0: it must be 1 or more") for name in COUNTED),
        *(({name: -1}, f"^{name} is -1: it must be 0 or more") for name in FROM_NONE),
        *(({name: 0}, f"^{name} is 0: it must be above 0") for name in ABOVE_NONE),
        ({"lr": float("nan")}, "^lr is nan"),
        ({"unreadable": 1.5}, "^unreadable is 1.5"),
        ({"unreadable": -0.1}, "^unreadable is -0.1"),
        ({"beta2": 1.0}, "^beta2 is 1"),
    ],
)
def test_impossible_settings_are_refused(start, tmp_path, change, word):
    with pytest.raises(ConfigError, match=word):
        train(replace(settings(start, tmp_path, 2), **change), Explicit(), SOURCE, accuracy)


def test_the_best_model_is_one_of_the_last_stage(start, tmp_path):
    """What an earlier stage scores is another task's: there a part of the chain is still written out."""
    asked = []

    def worse(backbone, companions, epoch) -> dict[str, float]:
        asked.append(epoch)
        return {"accuracy": 0.9 - 0.1 * len(asked)}

    method = Coconut(c_thought=1, epochs_per_stage=1, max_latent_stage=1)
    config = settings(start, tmp_path, 8, epoch=8, validate_every=1, save_every=3)  # two steps an epoch
    train(config, method, SOURCE, worse)
    assert asked == [0, 0, 1, 1, 2, 2, 3, 3]
    assert json.loads((tmp_path / "best" / "scores.json").read_text())["step"] == 5


def test_layers_that_stay_as_they_are_are_not_looped(start, tmp_path):
    """Their weights would be shared in memory, and saved apart."""
    looped = settings(start, tmp_path, 2, looped=(1, 2))
    with pytest.raises(ConfigError, match="looped needs trainable layers"):
        train(looped, Explicit(), SOURCE, accuracy, lora=Lora(r=2))
    with pytest.raises(ConfigError, match="looped needs trainable layers"):
        train(looped, Interpreters(tags="tokens"), SOURCE, accuracy)
    with pytest.raises(ConfigError, match="looped needs trainable layers"):
        train(replace(looped, frozen=True), PauseDistillation(steps=StepSupervision()), SOURCE, accuracy)


def test_nothing_learns_in_epochs_without_slots_beside_a_frozen_model(start, tmp_path):
    taught = Coconut(steps=StepSupervision())
    with pytest.raises(ConfigError, match=r"start after that stage \(method.first_epoch\)"):
        train(settings(start, tmp_path, 2, frozen=True, epoch=4), taught, SOURCE, accuracy)


def test_a_curriculum_is_refused_under_zero3_before_it_starts(start, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "way", lambda *_: "zero3")
    staged = Coconut(c_thought=1, epochs_per_stage=1, max_latent_stage=1)
    with pytest.raises(ConfigError, match="curriculum's stages"):
        train(settings(start, tmp_path / "out", 2, epoch=4), staged, SOURCE, accuracy)
    assert not (tmp_path / "out").exists()


def test_runs_of_two_precisions_share_a_process(start, tmp_path):
    for precision in ("no", "bf16", "no"):
        train(settings(start, tmp_path / precision, 1, precision=precision), Explicit(), SOURCE, accuracy, resume=True)
    one, other = losses(tmp_path / "no")[1], losses(tmp_path / "bf16")[1]
    assert one != other
    assert one == pytest.approx(other, rel=0.05)


def test_a_sample_longer_than_the_positions_is_named():
    gpt2 = tiny_gpt2()
    steps = tuple(f"<<{i}+1={i + 1}>>" for i in range(60))
    source = {0: Sample(None, "How many?", (), ("<<1+1=2>>",), "2", "numerical", "plain", where="row 1")}
    source |= {1: replace(source[0], steps=steps, where="row 2")}
    with pytest.raises(ConfigError, match=r"^row 2 needs [\d,]+ positions, but this model has 256: remove"):
        Batches(source.__getitem__, Explicit(), gpt2, 2, 1, seed=0)[0]
    assert Batches(lambda _: source[0], Explicit(), gpt2, 2, 1, seed=0)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that isn't there is asked for")
def test_a_device_that_is_not_there_is_refused(start, tmp_path):
    elsewhere = settings(start, tmp_path / "out", 2, device="cuda")
    with pytest.raises(ConfigError, match="no device cuda here"):
        train(elsewhere, Explicit(), SOURCE, accuracy)
    with pytest.raises(ConfigError, match="no device cuda here"):
        evaluated(elsewhere, Explicit(), HeldOut((), accuracy))
    assert not (tmp_path / "out").exists()


def test_a_model_is_scored_where_it_is_asked_to_be(start, tmp_path, monkeypatch):
    """auto: on a GPU, if there is one."""
    asked = []

    def loaded(path, device="cpu", tokens=()):
        asked.append(device)
        return load(path, tokens=tokens)

    monkeypatch.setattr("train.command.load", loaded)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        for device in ("auto", "cpu"):
            evaluated(settings(start, tmp_path, 2, device=device), Explicit(), HeldOut((), accuracy))
    assert asked == ["cpu", "cpu", "cuda", "cpu"]


def test_a_processor_without_bf16_is_known_by_what_it_says(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    assert not without_bf16(told)  # it says nothing
    for flags, lacking in (("avx2 avx512f avx512vl", True), ("avx512f avx512_bf16", False), ("asimd bf16 i8mm", False)):
        told.write_text(f"processor : 0\nflags : {flags}\n")
        assert without_bf16(told) == lacking


def test_a_run_goes_on_from_the_weights_that_it_was_started_from(start, tmp_path):
    """Wherever they lie; another model under the same name is another."""
    place = tmp_path / "place"
    shutil.copytree(start, place)
    train(settings(str(place), tmp_path / "run", 2), Explicit(), SOURCE, accuracy)
    train(settings(start, tmp_path / "run", 4), Explicit(), SOURCE, accuracy, resume=True)
    tiny_backbone(seed=1).save(place)
    with pytest.raises(ConfigError, match=f"was started from other weights than {place} hold now: restore them"):
        train(settings(str(place), tmp_path / "run", 6), Explicit(), SOURCE, accuracy, resume=True)


def test_a_hub_id_is_told_by_what_is_downloaded(start, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: start)
    assert start_of("someone/model", "") == start_of(start, "")

    def missing(*_, **__):
        raise FileNotFoundError("no such model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ConfigError, match=r"^Can't load someone/model: no such model"):
        start_of("someone/model", "")


def test_the_log_says_why_a_run_was_refused_on_the_way(start, tmp_path):
    def source(index):
        if index >= 8:
            raise ConfigError("row 8 can't be used: remove it.")
        return SOURCE(index)

    with pytest.raises(ConfigError, match="row 8"):
        train(settings(start, tmp_path, 4), Explicit(), source, accuracy)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["stopped"] == "ConfigError: row 8 can't be used: remove it."


def test_the_vision_encoder_may_stay_as_it_is(start, tmp_path):
    best = train(settings(start, tmp_path / "run", 2, vision=False), Explicit(), SOURCE, accuracy)
    before, after = (load(place).model.state_dict() for place in (start, best))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("visual" in name for name in changed)
    held = load_file(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert held
    assert not any("visual" in name for name in held)
    train(settings(start, tmp_path / "run", 4, vision=False), Explicit(), SOURCE, accuracy, resume=True)
    with pytest.raises(ConfigError, match=r"^vision: false .* lora.vision"):
        train(settings(start, tmp_path / "x", 2, vision=False), Explicit(), SOURCE, accuracy, lora=Lora(vision=True))
    tiny_gpt2().save(tmp_path / "blind")
    with pytest.raises(ConfigError, match="this model has no vision encoder: leave the setting out"):
        train(settings(str(tmp_path / "blind"), tmp_path / "x", 2, vision=False), Explicit(), SOURCE, accuracy)
    assert not (tmp_path / "x").exists()
