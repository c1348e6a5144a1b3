"""Methods with a curriculum or with companions through the training loop: resume at a stage's edge, what is saved, published keys."""

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import ask, models
from engine.adapters import Lora
from engine.backbones.base import add_tokens
from engine.config import ConfigError, build
from engine.data.jsonl import JsonlSource
from engine.data.samples import Sample, chain, context
from engine.data.text_worlds import TextWorldsSource
from engine.data.text_worlds import sample as problem
from engine.data.worlds import HEIGHT, WIDTH, WorldsSource
from engine.evaluation import evaluate
from engine.folders import checkpoints
from engine.layout import BEGIN, END, pack
from engine.methods import described
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.controls import Explicit, Silent
from engine.methods.diversity import Diversity
from engine.methods.heima import Heima
from engine.methods.lookup import Lookup
from engine.methods.method import COMPANIONS, META, Method, run
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.recipe import Training
from engine.training import made_ready, train
from engine.video import Sampling
from tests.tiny import tiny_backbone, tiny_gpt2, tiny_llama
from train import codi, lookup
from train.__main__ import run as by_name
from train.coconut import published
from train.command import HeldOut, Run, held_out, main, trained, validation

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


def accuracy(backbone, companions, epoch) -> dict[str, float]:
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


def test_a_model_without_the_methods_companions_is_not_scored(start, tmp_path, capsys):
    words = [
        "--init",
        start,
        "--out",
        str(tmp_path),
        "--only-eval",
        "true",
        "--device",
        "cpu",
        "--set",
        "validation.samples=1",
    ]
    assert main(None, Codi, ["--config", "train/configs/text/codi.yaml", *words]) == 2
    assert f"{start} holds no companions.safetensors with the method's projector" in capsys.readouterr().err


def test_a_model_is_asked_as_it_was_taught(start, tmp_path):
    """In plain text, by its own name for the answer, whatever was said before it."""
    run = {
        "training": asdict(settings(start, tmp_path, 1)),
        "method": {},
        "text_worlds": {},
        "validation": {"samples": 1},
    }
    trained(build(Run, run), Explicit(), HeldOut((), lambda *_: {"accuracy": 0.5}), False)
    model = models.load(tmp_path / "best", device="cpu")
    assert model.dialect == "plain"
    sample = ask.posed(model, None, "What is 1 + 2?", ["3", "4"], "multiple choice")
    assert context(sample).pieces == (
        BEGIN,
        "What is 1 + 2? Options:\nA. 3\nB. 4\n",
    )


def test_a_model_looks_as_it_was_trained_to(tmp_path):
    looks = JsonlSource(fps=1.0, frames=(2, 8), pixels=6272, image_pixels=12544).looks
    tiny_backbone().save(tmp_path)
    meta = {"method": described(Silent(2)), "pauses": [2, 2], **looks}
    (tmp_path / META).write_text(json.dumps(meta))
    model = models.load(tmp_path, device="cpu")
    assert model.sampling == Sampling(fps=1.0, min_frames=2, max_frames=8, pixels=6272)
    assert model.sampling_of(still=True).pixels == 12544
    assert WorldsSource().looks["sampling"]["pixels"] == HEIGHT * WIDTH


def test_a_companion_learns_from_its_first_step_as_later(start):
    """It is copied from a model at rest, whose dropout and recomputing are off."""
    config = Training(init=start, out="x", device="cpu")
    for method in (Coconut(steps=StepSupervision()), Codi(prj_dim=8)):
        _, companions, _ = made_ready(config, method, None)
        assert len(companions)
        assert all(module.training for module in companions.modules())


def test_a_curriculum_needs_epochs(start, tmp_path):
    with pytest.raises(ConfigError, match="how many samples one has"):
        train(replace(settings(start, tmp_path, 1), epoch=0), Coconut(), SOURCE, accuracy)
    assert not tmp_path.joinpath("checkpoints").exists()


def test_published_runs_count_what_all_processes_see(start, tmp_path, monkeypatch):
    alone = published(flat_file(tmp_path, load_model_path=start))["training"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = published(flat_file(tmp_path, load_model_path=start))["training"]
    assert (both["batch"], both["steps"] * 2, both["validate_every"] * 2) == (
        alone["batch"],
        alone["steps"],
        alone["validate_every"],
    )


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
        "uniform_prob": 0.0, "first_epoch": 0, "compat": True,
    }  # fmt: skip
    assert ours["validation"] == {"samples": 8}  # all there are
    assert (ours["training"]["steps"], ours["training"]["batch"], ours["training"]["epoch"]) == (6, 4, 8)
    assert ours["training"]["clip"] == 1e9  # it clips nothing
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


def test_published_runs_leave_out_the_epochs_that_stand_behind_them(tmp_path):
    ours = published(flat_file(tmp_path, resume=1, reset_optimizer=False))
    assert (ours["method"]["first_epoch"], ours["method"]["compat"]) == (1, False)
    assert ours["training"]["steps"] == 4  # two epochs of the three


def test_the_published_trainer_of_a_chain_has_no_thoughts(tmp_path):
    ours = published(
        flat_file(tmp_path, coconut=False, cot=True, c_thought=0, max_latent_stage=0, load_model_path=None)
    )
    assert build(Coconut, ours["method"]).mode == "cot"
    assert ours["training"]["init"] == "gpt2"


def test_validation_asks_for_each_row_of_a_file_once(tmp_path):
    rows = [{"question": f"{i}?", "steps": ["a"], "answer": "b"} for i in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = {"file": str(tmp_path / "data.json"), "held_out": 3}
    for wanted, questions in ((180, ["3?", "4?", "5?"]), (2, ["3?", "4?"])):
        run = build(Run, {"method": {}, "coconut_json": data, "validation": {"samples": wanted}})
        assert [sample.question for sample in held_out(run)] == questions


def test_a_method_of_which_nothing_can_be_decoded_is_refused_before_training():
    class Odd(Silent):
        def layout(self, *given):
            return replace(super().layout(*given), branches={"line": super().layout(*given).branches["answer"]})

    config = build(Run, {"method": {}, "text_worlds": {}, "validation": {"samples": 1}})
    with pytest.raises(ConfigError, match="branches are line: for validation call one answer"):
        validation(config, Odd())


def test_a_folder_that_can_not_be_made_is_one_sentence(start, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    training = {"init": start, "out": str(tmp_path / "file" / "run"), "steps": 1, "device": "cpu", "workers": 0}
    config = {"method": {}, "training": training, "text_worlds": {}, "validation": {"samples": 1}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(None, Explicit, ["--config", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Not a directory" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (Coconut, {"first_epoch": -1}, "^first_epoch is -1"),
        (Heima, {"compressed": -1}, "^compressed is -1"),
        (Heima, {"compressed": 3, "sections": ("A", "B")}, "^compressed is 3: it must be 0 to 2"),
        (Heima, {"per_section": 0}, "^per_section is 0"),
        (StepSupervision, {"layers": -1}, r"^steps\.layers is -1"),
        (StepSupervision, {"words": (1, -1)}, r"^steps\.words is \[1, -1\]"),
        (StepSupervision, {"stairs": 0}, r"^steps\.stairs is 0"),
        (Lora, {"r": 0}, r"^lora\.r is 0"),
        (Lora, {"alpha": 0}, r"^lora\.alpha is 0"),
        (Lora, {"dropout": 1.0}, r"^lora\.dropout is 1"),
        (Lora, {"targets": ()}, r"^lora\.targets"),
        (Coconut, {"c_thought": 0}, "^c_thought is 0"),
        (Coconut, {"epochs_per_stage": 0}, "^epochs_per_stage is 0"),
        (Coconut, {"max_latent_stage": -1}, "max_latent_stage"),
        (Coconut, {"uniform_prob": 1.5}, "uniform_prob"),
        (Codi, {"num_latent": 0}, "num_latent"),
        (Silent, {"pauses": -1}, "^pauses is -1"),
        (Lookup, {"lines": 0}, "^lines is 0"),
        (Lookup, {"pauses": -1}, "^pauses is -1"),
        (Lookup, {"bare": 2.0}, "^bare is 2.0"),
        (Diversity, {"diversity": float("nan")}, "^diversity is nan"),
    ],
)
def test_settings_that_can_not_be_meant(method, settings, words):
    with pytest.raises(ConfigError, match=words):
        method(**settings)


def test_the_slots_of_a_constant_schedule_are_all_there_are():
    few = {"c_thought": 2, "max_latent_stage": 3, "pad_latent_to_max": False}
    assert Coconut(**few).slot_range == (2, 6)
    assert Coconut(**few, schedule="constant").slot_range == (6, 6)
    assert Coconut(**few | {"max_latent_stage": 0}).slot_range == (0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coconut": False}, "0 of them"),
        ({"cot": True}, "2 of them"),
        ({"c_thoughts": 2}, "'c_thoughts'"),
        ({"batch_size_training": "big"}, "batch_size_training = 'big': expected int"),
        ({"batch_size_training": 0}, "batch_size_training is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"resume": 3}, "resume is 3: it must be 0 or more, and less than num_epochs"),
        ({"resume": -1}, "resume is -1"),
        ({"train_path": ""}, "train_path is empty"),
        ({"val_path": None}, "val_path = None: expected str"),
        ({"val_path": "none.json"}, "Can't read none.json"),
        ({"lr": "fast"}, "lr = 'fast'"),
        ({"coconut": "perhaps"}, "coconut = 'perhaps'"),
    ],
)
def test_published_keys_that_can_not_be_meant(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        published(flat_file(tmp_path, **changes))
    short = flat_file(tmp_path)
    del short["lr"]
    with pytest.raises(ConfigError, match="Missing: lr"):
        published(short)


def codi_file(tmp_path: Path, **changes) -> dict:
    data = tmp_path / "gsm.txt"
    data.write_text("".join(f"What is {i} and 1, doubled?||<<{i}+1={i + 1}>> <<{i + 1}*2={2 * i + 2}>> #### {2 * i + 2}\n" for i in range(12)))  # fmt: skip
    keys = {
        "output_dir": str(tmp_path / "codi"), "expt_name": "x", "logging_steps": 10, "model_name_or_path": "gpt2",
        "data_name": "icot", "icot_train_path": str(data), "seed": 11, "model_max_length": 512,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False, "num_train_epochs": 2,
        "learning_rate": 3e-3, "max_grad_norm": 2.0, "use_lora": True, "lora_r": 4, "lora_alpha": 32, "lora_init": True,
        "save_strategy": "no", "weight_decay": 0.1, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine",
        "do_train": True, "report_to": "tensorboard", "num_latent": 2, "use_prj": True, "prj_dim": 16,
        "prj_dropout": 0.0, "distill_loss_div_std": True, "exp_mode": False, "remove_eos": True, "max_token_num": 200,
        "print_ref_model_stats": True,
    }  # fmt: skip
    return keys | changes


def test_codis_published_keys_are_understood(start, tmp_path, capsys):
    ours = codi.published(codi_file(tmp_path))
    method, training = build(Codi, ours["method"]), ours["training"]
    assert method == Codi(text="icot", num_latent=2, prj_dim=16, last_step=False)
    assert (training["steps"], training["batch"], training["accumulate"], training["warmup"]) == (6, 4, 2, 1)
    assert (training["clip"], training["schedule"], training["seed"], training["precision"]) == (
        2.0,
        "cosine",
        11,
        "no",
    )
    assert ours["lora"] == {"r": 4, "alpha": 32, "dropout": 0.1, "targets": ["attention", "mlp"]}
    assert ours["gsm8k_icot"] == {"file": str(tmp_path / "gsm.txt"), "held_out": 1}

    named = {"icot-full": "icot-full", "commonsense": "commonsense", "strategy": "commonsense", "my.json": "lines"}
    assert {name: codi.joined(name) for name in named} == named

    simcot = codi.published(codi_file(tmp_path, use_decoder=True, explain_loss_factor=0.5, model_name_or_path="my-Llama", include_last_cot=True, use_lora=False))  # fmt: skip
    assert build(Codi, simcot["method"]) == Codi(
        text="icot",
        num_latent=2, prj_dim=16, answer_token=1,
        steps=StepSupervision(weight=0.5, mean="tokens", missing="ignore", first_position=0),
    )  # fmt: skip
    assert "lora" not in simcot

    (tmp_path / "run.yaml").write_text(json.dumps(codi_file(tmp_path, model_name_or_path=start, num_train_epochs=1)))
    words = ["codi", "--config", str(tmp_path / "run.yaml"), "--device", "cpu", "--workers", "0"]
    with pytest.raises(SystemExit) as ended:
        by_name(words)
    assert ended.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "codi" / "best" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_latents": 2}, "'num_latents'"),
        ({"use_prj": False}, "use_prj = False: only True is supported"),
        ({"distill_loss_type": "l2"}, "distill_loss_type = 'l2': only 'smooth_l1'"),
        ({"icot_train_path": "none.txt"}, "Can't read none.txt"),
        ({"icot_train_path": "", "data_name": "zen-E/GSM8k-Aug"}, "Can't read zen-E/GSM8k-Aug"),
        ({"num_train_epochs": "two"}, "num_train_epochs = 'two'"),
    ],
)
def test_codis_keys_that_can_not_be_meant(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        codi.published(codi_file(tmp_path, **changes))
    short = codi_file(tmp_path)
    del short["prj_dim"]
    with pytest.raises(ConfigError, match="Missing: prj_dim"):
        codi.published(short)


def test_codis_teacher_may_leave_the_last_step_out():
    sample = SOURCE.record(4)
    written = Codi(last_step=False).layout(problem(sample), None).branches["teacher"]
    whole = Codi().layout(problem(sample), None).branches["teacher"]
    assert whole[1].pieces == ("".join(f"{step}\n" for step in sample.steps),)
    assert written[1].pieces == ("".join(f"{step}\n" for step in sample.steps[:-1]),)


def test_where_codis_states_are_drawn_together():
    """A token further on is another state; past the answer's end it is its last token's."""
    backbone = tiny_llama()
    add_tokens(backbone.model, backbone.tokenizer, Codi.tokens)
    layouts = [Codi(num_latent=2, prj_dim=16).layout(SOURCE(i), None) for i in range(0, 6, 2)]
    packed = pack(layouts, backbone.encode, backbone.pad)
    teacher = run(backbone, packed).branch("teacher")
    rows = teacher.rows
    for token in (0, 1, 99):
        states = teacher.before("answer", token)
        for sample in range(3):
            of_answer = (rows.sample == sample) & (rows.name == rows.names.index("answer"))
            own = rows.row[of_answer].tolist()
            row = own[min(token, len(own) - 1)]
            assert torch.equal(states[:, sample], torch.stack([layer[sample, row] for layer in teacher.hidden]))


def test_bad_data_is_named_before_anything_is_written(start, tmp_path, capsys):
    """Though the rows for validation are good."""
    rows = [{"question": f"{i}?", "steps": ["a"], "answer": "b"} for i in range(6)]
    rows[2]["answer"] = ""
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = {
        "method": {}, "training": {"init": start, "out": str(tmp_path / "run"), "device": "cpu"},
        "coconut_json": {"file": str(tmp_path / "data.json"), "held_out": 2}, "validation": {"samples": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    for name in ("controls.Explicit", "pause"):
        try:
            code = by_name([name, "--config", str(tmp_path / "run.yaml")])
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        assert f"{tmp_path / 'data.json'}, sample 2: answer is empty." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_chains_without_sections_are_refused_before_anything_is_written(start, tmp_path, capsys):
    training = {"init": start, "out": str(tmp_path / "run"), "steps": 1, "device": "cpu"}
    stages = [{"name": "summary", "method": {"compressed": 1}}]
    config = {"training": training, "stages": stages, "text_worlds": {}, "validation": {"samples": 2}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        by_name(["heima", "--config", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2
    assert "this sample has unnamed steps." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_method_is_trained_by_its_name(start, tmp_path, capsys):
    """Scripts by theirs, which know published keys and stages; other methods by their file's."""
    for name in ("coconut", "codi", "heima", "explicit", "silent", "pause", "lookup", "small", "table"):
        with pytest.raises(SystemExit) as ended:
            by_name([name, "--help"])
        assert ended.value.code == 0
        assert "usage: " in capsys.readouterr().out
    for words in (["nothing"], ["command", "--config", "x"], ["--config", "x"], []):  # command is what scripts share
        assert by_name(words) == 2
        assert "codi, explicit, fresh, heima, lens" in capsys.readouterr().err
    assert by_name(["--help"]) == 0
    method = {"c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 1}
    training = {"init": start, "steps": 1, "batch": 2, "accumulate": 1, "epoch": 2, "device": "cpu", "workers": 0}
    file = tmp_path / "run.yaml"
    for name, own in {"controls.Silent": {"pauses": 2}, "diversity": {}, "coconut": method}.items():
        config = {"method": own, "training": training | {"out": str(tmp_path / name)}, "text_worlds": {"difficulties": [1, 2]}, "validation": {"samples": 2}}  # fmt: skip
        file.write_text(json.dumps(config))
        try:
            code = by_name([name, "--config", str(file)])
        except SystemExit as ended:
            code = ended.code
        assert code == 0
        assert (tmp_path / name / "best").is_dir()


@pytest.mark.parametrize("mean", ["samples", "tokens"])
def test_every_token_of_a_step_counts_the_same_in_any_number_of_passes(start, tmp_path, mean):
    """The passes have different numbers of tokens, of steps and of slots."""
    steps = StepSupervision(layers=1, mean=mean, missing="ignore")
    method = Coconut(c_thought=1, epochs_per_stage=1, max_latent_stage=3, pad_latent_to_max=False, steps=steps)
    found = []
    for passes in (1, 2, 4):
        config = replace(settings(start, tmp_path / str(passes), 4), accumulate=passes)
        train(config, method, SOURCE, accuracy)
        found.append(losses(Path(config.out)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "silent", "writes", "speaks"),
    [
        (PauseDistillation(), True, True, True),
        (PauseDistillation(mode="silent"), True, False, False),
        (PauseDistillation(mode="teacher"), False, True, False),
        (Explicit(), False, True, False),
        (Silent(8), True, False, False),
        (Coconut(), True, False, False),
        (Coconut(mode="cot"), False, True, False),
        (Coconut(mode="no_cot"), True, False, False),
        (Diversity(), True, False, False),
        (Codi(), True, True, False),
        (Heima(compressed=0), False, True, False),
        (Heima(compressed=1), True, False, False),
    ],
)
def test_nobody_is_asked_for_what_they_have_not_learnt(
    method: Method, silent: bool, writes: bool, speaks: bool
) -> None:
    assert (method.silent, method.writes, method.speaks) == (silent, writes, speaks)
    with pytest.raises(ConfigError, match="This model") if not silent else nullcontext():
        method.expect("silent")
    with pytest.raises(ConfigError, match="This model") if not writes else nullcontext():
        method.expect("explicit")


@pytest.mark.parametrize("words", [[], ["--only-eval", "true"]])
def test_a_held_out_row_longer_than_the_positions_is_named_before_training(tmp_path, capsys, words):
    tiny_gpt2().save(tmp_path / "gpt2")
    rows = [{"question": f"{i}?", "steps": ["a"], "answer": "b"} for i in range(5)]
    rows.append({"question": "7 + " * 300 + "7?", "steps": ["a"], "answer": "b"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = {
        "init": str(tmp_path / "gpt2"),
        "out": str(tmp_path / "run"),
        "steps": 2,
        "batch": 2,
        "accumulate": 1,
        "device": "cpu",
        "workers": 0,
    }
    data = {"file": str(tmp_path / "data.jsonl"), "held_out": 1, "dialect": "plain"}
    config = {"method": {}, "training": training, "jsonl": data, "validation": {"samples": 1}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(None, Explicit, ["--config", str(tmp_path / "run.yaml"), *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"data\.jsonl, line 6 needs [\d,]+ positions, but this model has 256: remove the row", told)
    assert not (tmp_path / "run").exists()


def test_the_look_up_is_scored_by_its_own_script():
    config = build(Run, {"method": {}, "worlds": {"difficulties": [1, 2]}, "validation": {"samples": 2}})
    scores = lookup.validation(config, Lookup(lines=2)).score(tiny_backbone(layers=1), torch.nn.ModuleDict(), 0)
    assert scores.keys() == {"letters", "silent", "accuracy"}
    with pytest.raises(ConfigError, match="for validation call one"):
        validation(config, Lookup(lines=2))


def test_the_look_up_needs_a_step_before_the_last():
    with pytest.raises(ConfigError, match="two steps or more"):
        Lookup().layout(Sample(None, "?", ("a", "b"), ("one",), "A"), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "question", "teacher", "slots"),
    [
        ("lines", "How many?\n", "a b.\nc d.\n", ("a b.", "c d.\ne f.")),
        ("icot", "How many?", "a b. c d.", ("a b.", " c d. e f.")),
        ("icot-full", "How many?", "a b. c d.\n", ("a b.", " c d. e f.")),
        ("commonsense", "How many?\n", "a b. c d.\n", ("a b.", " c d. e f.")),
    ],
)
def test_codi_joins_its_text_as_published(text, question, teacher, slots):
    """Trained and asked alike."""
    sample = Sample(None, "How many?", (), ("a b.", "c d.", "e f."), "7", "free-form", "plain")
    method = Codi(num_latent=1, text=text, last_step=False, steps=StepSupervision(mean="tokens", missing="ignore"))
    laid = method.layout(sample, np.random.default_rng(0))
    assert [segment.pieces for segment in laid.branches["teacher"]] == [
        (BEGIN, question),
        (teacher,),
        ("The answer is:",),
        (" 7",),
        (END,),
    ]
    assert laid.branches["answer"][0].pieces == method.context(sample).pieces == (BEGIN, question)
    assert tuple(reading.path[1].pieces[0] for reading in laid.readings) == slots
    model, asked = tiny_gpt2(), []

    class Seen(Codi):
        def context(self, given):
            asked.append(given)
            return super().context(given)

    add_tokens(model.model, model.tokenizer, Codi.tokens)
    companions = Seen(num_latent=1, prj_dim=8).companions(model)
    evaluate(model, [sample], Seen(num_latent=1, prj_dim=8), "silent", 1, companions)
    assert asked == [sample]


def test_a_chain_without_steps_is_nothing():
    sample = Sample(None, "?", (), (), "7", "free-form", "plain")
    assert chain(sample, 0, " ", "\n").pieces == ("",)


def test_bertscore_and_judges_are_heimas_alone(tmp_path, capsys):
    config = {"method": {}, "text_worlds": {}, "validation": {"samples": 1, "judge": "a:b"}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(None, Explicit, ["--config", str(tmp_path / "run.yaml")]) == 2
    assert "Unknown key 'validation.judge'" in capsys.readouterr().err
