"""A plan against a tiny model's true counts, and published sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine import adapters
from engine.adapters import Lora
from engine.backbones import qwen2_5_vl
from engine.backbones.base import Backbone
from engine.backbones.load import load
from engine.backbones.qwen2_5_vl import Qwen25VL, largest_frame
from engine.config import ConfigError
from engine.data.samples import Sample
from engine.layout import Frames, Layout, Segment, pack
from engine.loop import looped
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.method import Method, run
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.plan import CARDS, SHAPES, Plan, outline, outlined_companions, plan, shape
from engine.recipe import Training, optimizers
from engine.recompute import recompute_layers
from tests import tiny
from tests.serve import ROOT
from train.command import main
from train.planned import stages

PUBLISHED = {  # parameters, by their authors or the hub
    "openai-community/gpt2": 124_439_808,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "OpenGVLab/InternVL3-1B-hf": 938_193_024,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10_670_220_835,
}


class Untouched(Method):
    tokens = ()


def test_known_shapes_have_the_published_sizes() -> None:
    others = {"Xkev/Llama-3.2V-11B-cot", "llava-hf/llava-v1.6-vicuna-7b-hf"}
    assert set(json.loads(SHAPES.read_text())) == {*PUBLISHED, *others}
    for name, count in PUBLISHED.items():
        assert sum(parameter.numel() for parameter in outline(name, Untouched()).model.parameters()) == count, name


def test_an_unknown_shape_is_refused_and_a_file_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="openai-community/gpt2"):
        shape("nobody/nothing")
    (tmp_path / "mine.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    assert shape(str(tmp_path / "mine.json")).n_layer == 2


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", r"mine\.json can't be read as JSON"),
        ("[]", r"mine\.json names no model_type"),
        ('{"n_layer": 2}', r"mine\.json names no model_type"),
        ('{"model_type": "fish"}', r"is a fish model\. Supported: qwen2_5_vl"),
        ('{"model_type": "gpt2", "n_layer": "two"}', "doesn't describe a gpt2 model: .*n_layer"),
    ],
)
def test_a_shapes_file_that_holds_none_is_refused(tmp_path: Path, written: str, said: str) -> None:
    (tmp_path / "mine.json").write_text(written)
    with pytest.raises(ConfigError, match=said):
        shape(str(tmp_path / "mine.json"))


def test_what_an_earlier_run_will_leave_is_planned_by_the_shape_that_it_has() -> None:
    with pytest.raises(ConfigError, match="or name a model whose shape it has with --shape"):
        shape("runs/earlier/best")


COSTLIEST = {  # tokens of a clip's frame in the tiny models, and of an image
    tiny.tiny_backbone: (2 * 4, 2 * 4),
    tiny.tiny_internvl: (4, 13 * 4),
    tiny.tiny_llava: (None, 16 + 8 * 9),
    tiny.tiny_llava_video: (4, 16 + 8 * 9),
    tiny.tiny_lite0: (4, 4),  # a slice's
}


@pytest.mark.parametrize("made", COSTLIEST)
def test_the_costliest_picture_is_as_many_tokens_as_any(made: Callable[[], Backbone]) -> None:
    model, pixels = made(), 8 * 28 * 28
    for still, tokens in zip((False, True), COSTLIEST[made], strict=True):
        if tokens is None:
            continue
        sizes = [
            model.costliest(pixels, still),
            (28, 28),
            (56, 112),
            (84, 84),
            (112, 84),
            (168, 28),
            (28, 140),
            (480, 640),
        ]
        frames = [Frames(np.zeros((1, *size, 3), np.uint8), 0.5, still) for size in sizes]
        if isinstance(model, Qwen25VL):
            frames = [each for each in frames if each.pixels[0, :, :, 0].size <= pixels]
        seen = [len(pack([one(each)], model.encode, model.pad).visual_row) for each in frames]
        assert seen[0] == max(seen) == tokens


def one(visual: Frames) -> Layout:
    return Layout({"line": (Segment("context", (visual,)),)})


def test_what_vision_computes_is_counted_by_its_tiles() -> None:
    """A thumbnail is one of them, and Mllama fills a picture up to four, which see each other."""
    picture = Frames(np.zeros((1, 84, 112, 3), np.uint8), 0.5, still=True)
    for made, looks in (
        (tiny.tiny_internvl, [(13, 16)]), (tiny.tiny_llava, [(5, 16)]), (tiny.tiny_mllama, [(1, 4 * 16)]),
        (tiny.tiny_backbone, [(1, 6 * 8)]),
    ):  # fmt: skip
        model = made()
        assert model.looks(pack([one(picture)], model.encode, model.pad)) == looks, made.__name__


def test_a_curriculums_stages_are_all_counted() -> None:
    """Twelve steps in epochs of three: the run's third stage has the steps of all later epochs."""
    config = Training(init="x", batch=2, accumulate=1, steps=12, epoch=6)
    method = Coconut(max_latent_stage=1, epochs_per_stage=1)
    assert stages(config, method) == [(0, 3), (1, 3), (2, 6)]
    assert stages(replace(config, steps=5), method) == [(0, 3), (1, 2)]
    assert stages(replace(config, epoch=0), PauseDistillation()) == [(0, 12)]


def test_a_curriculums_plan_shows_the_stage_of_most_memory_and_the_time_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The last stage of three, which writes no chain, is the cheapest."""
    (tmp_path / "run.yaml").write_text(
        "method: {max_latent_stage: 1, c_thought: 1, epochs_per_stage: 1}\n"
        "training: {init: openai-community/gpt2, out: x, batch: 2, accumulate: 1, steps: 12000, epoch: 6000}\n"
        f"jsonl: {{file: {tmp_path / 'rows.jsonl'}}}"
    )
    assert main("", Coconut, ["--config", str(tmp_path / "run.yaml"), "--plan", "--peak-share", "0.001"]) == 0
    told = capsys.readouterr().out
    assert "3 stages, of which the one that needs most memory is below: stage 0" in told
    hours = float(re.search(r"steps take ([\d.]+) h", told)[1])
    shown = float(re.search(r"time a step +([\d.]+) s", told)[1])
    assert 0.1 < hours / (12000 * shown / 3600) < 0.9


def test_every_family_of_a_folder_has_an_outline(tmp_path: Path) -> None:
    """Also this project's own, which transformers' Auto classes don't know; a stranger's is refused with the list."""
    for made in (tiny.tiny_lite0(), tiny.tiny_llama(), tiny.tiny_qwen3vl()):
        place = tmp_path / type(made).__name__
        made.save(place)
        outlined = outline(str(place), Untouched()).model
        assert type(outlined) is type(made.model)
        assert [p.shape for p in outlined.parameters()] == [p.shape for p in made.model.parameters()]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fish"}))
    with pytest.raises(ConfigError, match=r"is a fish model\. Supported: qwen2_5_vl"):
        outline(str(tmp_path), Untouched())


CASES = {
    "pause": (PauseDistillation(pauses=(2, 2), steps=StepSupervision(layers=1)), tiny.tiny_backbone, None),
    "lora": (PauseDistillation(pauses=(2, 2)), tiny.tiny_backbone, Lora(r=2)),
    "codi": (Codi(num_latent=3, prj_dim=16), tiny.tiny_gpt2, None),
    "looped": (PauseDistillation(pauses=(2, 2)), tiny.tiny_llama, None),
}


@pytest.fixture(scope="module", params=CASES)
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Method, Lora]:
    method, made, lora = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    made().save(folder)
    shared = (2, 3) if request.param == "looped" else (0, 0)
    config = Training(init=str(folder), batch=2, accumulate=1, looped=shared)
    backbone = outline(str(folder), method)
    assert all(parameter.device.type == "meta" for parameter in backbone.model.parameters())
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in tiny.chains(made())[2:4]]
    companions = outlined_companions(backbone, method)
    return plan(config, method, lora, backbone, companions, pack(layouts, backbone.encode, backbone.pad)), method, lora


def real(planned: tuple[Plan, Method, Lora]) -> tuple[Plan, Method]:
    """The same with weights."""
    made, method, lora = planned
    backbone = load(made.config.init, tokens=method.tokens)
    companions = method.companions(backbone)
    if made.config.looped != (0, 0):
        looped(backbone, *made.config.looped)
    adapters.for_training(backbone, companions, lora, method.frozen, "", method.tokens)
    backbone.model.train()
    return replace(made, backbone=backbone, companions=companions.train()), method


def loss(made: Plan, method: Method) -> Tensor:
    return method.loss(run(made.backbone, made.passed, method.feedback(made.companions), made.companions))[0]


def test_parameters_and_optimizer_are_the_true_ones(planned: tuple[Plan, Method, Lora]) -> None:
    made, (true, method) = planned[0], real(planned)
    assert made.total == true.total
    assert made.trained == true.trained
    chosen = optimizers(made.config, true.modules)
    loss(true, method).backward()
    for optimizer in chosen:
        optimizer.step()
    held = sum(t.nbytes for o in chosen for s in o.state.values() for t in s.values() if t.dim())
    stepped = sum(p.numel() for p in true.modules.parameters() if p.grad is not None)
    assert held == 8 * stepped
    assert made.optimizer_bytes == 8 * made.trained


def test_flops_are_those_that_are_computed(planned: tuple[Plan, Method, Lora], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention for every pair of rows, as on a GPU, and by matrix products, which can be counted."""
    monkeypatch.setattr(qwen2_5_vl, "ROWS", 10**6)
    for again in (False, True):
        true, method = real(planned)
        made = replace(planned[0], config=replace(planned[0].config, gradient_checkpointing=again))
        if again:
            recompute_layers(true.modules)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            loss(true, method).backward()
        assert made.flops == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_activations_are_about_what_is_kept(planned: tuple[Plan, Method, Lora]) -> None:
    made, (true, method) = planned[0], real(planned)
    weights = {parameter.untyped_storage().data_ptr() for parameter in true.modules.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = loss(true, method)
    assert total.requires_grad
    assert 0.5 < made.activations(False) / sum(kept.values()) < 1.6
    assert made.activations(True) < 0.7 * made.activations(False)


def test_shared_models_need_less_of_each_gpu() -> None:
    method = PauseDistillation()
    backbone = outline("Qwen/Qwen2.5-VL-7B-Instruct", method)
    clip = Frames(np.zeros((16, 308, 308, 3), np.uint8), 0.5)
    sample = Sample(backbone.see(clip), "w" * 200, (), ("w" * 800,), "B", "free-form")
    packed = pack([method.layout(sample, np.random.default_rng(0))], backbone.encode, backbone.pad)
    config = Training(init="x", batch=2, accumulate=2, precision="bf16", gradient_checkpointing=True)
    made = plan(config, method, None, backbone, torch.nn.ModuleDict(), packed)
    assert made.tokens["seen"] == 8 * 11 * 11
    assert made.tokens["slots"] == 8
    whole = made.memory(1, False)
    assert whole["weights"] == 4 * made.total
    assert whole["optimizer"] == 2 * whole["gradients"] == 8 * made.total
    for gpus in (4, 8):
        assert made.memory(gpus, True)["optimizer"] == whole["optimizer"] / gpus
        assert made.memory(gpus, False) == whole
    assert sum(made.memory(4, True).values()) < 80e9 < sum(whole.values())
    # Six FLOPs a weight and token, and two more for what is computed again.
    assert made.flops == pytest.approx(8 * 7.0e9 * made.computed, rel=0.35)
    assert made.seconds(CARDS["H100"], 0.4) < made.seconds(CARDS["A100"], 0.4) < made.seconds(CARDS["A100"], 0.2)


def test_the_largest_frame_of_so_many_pixels() -> None:
    assert largest_frame(128 * 28 * 28, 28) == (8 * 28, 16 * 28)
    assert largest_frame(28 * 28, 28) == (28, 28)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture) -> None:
    """Without data and weights."""
    config = ["--config", str(ROOT / "train/configs/qwen2_5_vl_7b_video_r1.yaml"), "--plan"]
    assert main("", PauseDistillation, config) == 0
    told = capsys.readouterr().out
    assert "8,292,166,656" in told
    assert all(f"{gpus} x H100" in told for gpus in (1, 4, 8))
    assert main("", PauseDistillation, [*config, "--card", "abacus"]) == 2
    assert "H200" in capsys.readouterr().err
    assert main("", PauseDistillation, [*config, "--shape", "nobody/nothing"]) == 2
    assert main("", PauseDistillation, [*config, "--peak-share", "40"]) == 2


def test_data_that_is_not_there_is_assumed_and_a_faulty_row_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A language model's without a clip; clips may be downloaded later, too."""
    (tmp_path / "run.yaml").write_text(
        "method: {}\ntraining: {init: meta-llama/Llama-3.2-1B-Instruct, out: x, batch: 1, accumulate: 1}"
    )
    config = ["--config", str(tmp_path / "run.yaml"), "--plan", "--set", f"jsonl.file={tmp_path / 'rows.jsonl'}"]
    row = {"question": "Which?", "answer": "3", "steps": ["1 + 2 = 3"]}
    for rows, code, told in (
        (None, 0, "4 of answer\n"),
        ([row | {"video": "later.mp4"}], 0, "4 of answer\n"),
        ([row], 0, "1 of the data"),
        ([row | {"answer": ""}, row | {"video": "later.mp4"}], 2, "line 1: answer is empty"),
        ([], 2, "holds no rows"),
    ):
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        assert main("", PauseDistillation, config) == code
        said = capsys.readouterr()
        assert told in (said.err if code else said.out)


def test_a_vision_encoder_that_stays_as_it_is_is_not_counted_as_trained() -> None:
    trained = {}
    for vision in (True, False):
        model, method = tiny.tiny_backbone(), PauseDistillation()
        sample = Sample(tiny.clip(model, 1), "What?", (), ("a",), "b", "free-form")
        passed = pack([method.layout(sample, np.random.default_rng(0))], model.encode, model.pad)
        made = plan(Training(vision=vision), method, None, model, torch.nn.ModuleDict(), passed)
        trained[vision] = made.trained
    language = {id(parameter) for parameter in model.language_model().parameters()}
    eyes = sum(p.numel() for p in model.model.parameters() if id(p) not in language)
    assert trained[True] - trained[False] == eyes > 0
