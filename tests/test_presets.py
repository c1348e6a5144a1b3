"""Every preset of a published recipe says what can be run, with the papers' settings, and what it would cost."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from engine.config import build, read_yaml
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.heima import Heima
from engine.methods.method import Method
from engine.methods.pause import PauseDistillation
from tests.serve import ROOT
from train import heima, planned
from train.command import Asked, Run

CONFIGS = ROOT / "train" / "configs"
METHODS: dict[str, type[Method]] = {
    **{file: Codi for file in (
        "text/gsm8k_codi", "text/gsm8k_codi_llama", "text/gsm8k_codi_simcot", "text/gsm8k_codi_simcot_llama_1b",
        "text/gsm8k_codi_simcot_llama_3b", "text/gsm8k_codi_simcot_llama_8b", "text/gsm8k_nl_codi",
        "text/gsm8k_nl_codi_llama", "text/commonsense_codi", "text/commonsense_codi_llama",
    )},
    **{file: Coconut for file in (
        "text/gsm8k_cot", "text/gsm8k_coconut", "text/gsm8k_coconut_simcot", "text/prosqa_coconut",
        "text/prontoqa_coconut", "aokvqa/cot", "aokvqa/coconut",
    )},
    **{file: Heima for file in (
        "heima/llava_cot", "heima/llama_vision", "heima/llava_next_vicuna", "heima/without_progressive",
        "heima/without_recovering",
    )},
    "qwen2_5_vl_7b_video_r1": PauseDistillation,
}  # fmt: skip
PROBLEMS = 385_620  # of GSM8k-Aug
SHAPES = {"runs/aokvqa-cot/best": "OpenGVLab/InternVL3-1B-hf"}  # what earlier stages leave


def runs(file: str) -> list[tuple[Run, Method]]:
    values = read_yaml(CONFIGS / f"{file}.yaml")
    if METHODS[file] is Heima:
        return [(stage.run, stage.method) for stage in heima.plan(values)]
    run = build(Run, values)
    return [(run, build(METHODS[file], run.method, "method."))]


def number(told: str, pattern: str) -> float:
    return float(re.search(pattern.replace("NUMBER", r"([\d,.]+)"), told)[1].replace(",", ""))


def test_no_preset_is_forgotten() -> None:
    named = [path for path in CONFIGS.glob("**/*.yaml") if path.parent.name in ("heima", "aokvqa", "configs")]
    on_text = ("gsm8k", "prosqa", "prontoqa", "commonsense")
    named += [path for path in (CONFIGS / "text").glob("*.yaml") if path.name.startswith(on_text)]
    assert {str(path.relative_to(CONFIGS).with_suffix("")) for path in named} == set(METHODS)


@pytest.mark.parametrize("file", METHODS)
def test_a_preset_can_be_planned(file: str) -> None:
    assert (CONFIGS / f"{file}.yaml").read_text().startswith("# ")
    for run, method in runs(file):
        config = run.training
        init = "openai-community/gpt2" if config.init.startswith("runs/gsm8k") else SHAPES.get(config.init, "")
        said: list[str] = []
        planned.show(run, method, Asked({}, {}, False, True, "H100", 0.4, init), said.append)
        assert "8 x H100" in said[-1]
        total, taught = number(said[-1], r"parameters +NUMBER"), number(said[-1], r"of which NUMBER are")
        assert (taught < total) == bool(run.lora)
        # Two to eight a parameter and token are the language model's; vision, and modules that read, move it from there.
        flops, tokens = 1e12 * number(said[-1], "NUMBER TFLOP"), number(said[-1], "NUMBER tokens with")
        assert 0.5 < flops / (total * tokens) < 20
        assert 0.02 < number(said[-1], r"time a step +NUMBER s") < 20


@pytest.mark.parametrize(
    ("file", "problems", "epochs", "batch", "passes", "lr", "width"),
    [
        ("text/gsm8k_codi_simcot", PROBLEMS, 40, 128, 4, 3e-3, 768),
        ("text/gsm8k_codi_simcot_llama_1b", PROBLEMS, 10, 128, 4, 8e-4, 2048),
        ("text/gsm8k_codi_simcot_llama_3b", PROBLEMS, 8, 128, 4, 3e-4, 3072),
        ("text/gsm8k_codi_simcot_llama_8b", PROBLEMS, 6, 128, 16, 1e-4, 4096),
        ("text/gsm8k_codi_llama", PROBLEMS, 10, 128, 4, 8e-4, 2048),
        ("text/gsm8k_nl_codi", 384_625, 40, 128, 4, 3e-3, 768),
        ("text/gsm8k_nl_codi_llama", 384_625, 3, 128, 4, 8e-4, 2048),
        ("text/commonsense_codi", 8_096, 50, 128, 4, 3e-3, 768),
        ("text/commonsense_codi_llama", 8_096, 3, 64, 2, 8e-4, 2048),
    ],
)
def test_codis_published_settings(
    file: str, problems: int, epochs: int, batch: int, passes: int, lr: float, width: int
) -> None:
    ((run, method),) = runs(file)
    config = run.training
    assert (config.batch, config.accumulate, config.lr) == (batch, passes, lr)
    assert (method.num_latent, method.prj_dim) == (6, width)
    assert method.last_step == ("commonsense" in file)  # a sum's last step says its answer
    assert config.steps == epochs * math.ceil(problems / batch)
    assert (run.lora.r, run.lora.alpha, run.lora.dropout) == (128, 32, 0.1)
    assert (config.weight_decay, config.clip, config.schedule) == (0.1, 2.0, "cosine")
    assert config.warmup == math.ceil(0.03 * config.steps)


@pytest.mark.parametrize("file", ["text/gsm8k_coconut", "text/gsm8k_coconut_simcot"])
def test_coconuts_published_settings(file: str) -> None:
    """22 epochs of the 25, from the model that stands for the first three: stage 1 to the last, which is written out no more."""
    ((run, method),) = runs(file)
    config = run.training
    assert run.training.init == f"{runs('text/gsm8k_cot')[0][0].training.out}/best"
    assert (config.epoch, config.batch, config.steps) == (PROBLEMS, 128, 22 * (PROBLEMS // 128))
    assert [method.stage(epoch) for epoch in (0, 2, 3, 21)] == [1, 1, 2, 4]


@pytest.mark.parametrize(("file", "problems"), [("text/prosqa_coconut", 17_886), ("text/prontoqa_coconut", 9_000)])
def test_coconuts_published_settings_on_logic(file: str, problems: int) -> None:
    ((run, method),) = runs(file)
    config = run.training
    assert (config.epoch, config.batch, config.steps, config.lr) == (problems, 128, 50 * (problems // 128), 1e-4)
    assert [method.stage(epoch) for epoch in (0, 4, 5, 30, 49)] == [0, 0, 1, 6, 7]
    assert (method.c_thought, method.max_latent_stage) == (1, 6)


def test_heimas_published_stages() -> None:
    stages = runs("heima/llama_vision")
    assert [method.compressed for _, method in stages] == [1, 2, 3, 3, 3]
    assert [run.training.lr for run, _ in stages] == [1e-4, 1e-4, 1e-4, 1e-5, 5e-4]
    assert [run.training.batch for run, _ in stages] == [6, 6, 6, 8, 6]
    assert stages[-1][1].interpreter == "meta-llama/Llama-3.1-8B-Instruct"
    assert all((run.lora.r, run.lora.alpha, run.lora.vision) == (16, 32, False) for run, _ in stages)


def test_multimodal_coconuts_published_settings() -> None:
    ((cot, plain),) = runs("aokvqa/cot")
    ((run, method),) = runs("aokvqa/coconut")
    assert plain.mode == "cot"
    assert run.training.init == f"{cot.training.out}/best"
    assert (method.c_thought, method.max_latent_stage, method.epochs_per_stage, method.uniform_prob) == (2, 4, 5, 0.1)
    for config, epochs, batch in ((cot.training, 20, 16), (run.training, 40, 8)):
        assert (config.batch, config.lr, config.weight_decay) == (batch, 1e-5, 0.01)
        assert config.steps * config.batch == pytest.approx(epochs * config.epoch, rel=1e-3)
    assert Path(run.training.out).name == "aokvqa-coconut"
