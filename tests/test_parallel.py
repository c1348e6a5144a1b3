"""What processes tell each other, the launch files, and training as they say on GPUs. Two processes: tests/test_two.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, is_deepspeed_available

from engine import latents
from engine.backbones.base import add_tokens
from engine.config import ConfigError
from engine.latents import segments_of, stepped
from engine.layout import pack
from engine.methods.coconut import Coconut
from engine.methods.controls import Explicit
from engine.parallel import How, way
from engine.recipe import Training
from engine.training import train
from tests import tiny
from tests.serve import ROOT
from tests.test_latents import layouts_of

LAUNCH = ROOT / "train" / "launch"
COCONUT = Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=3, pad_latent_to_max=False)


@pytest.mark.parametrize(("file", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_the_launch_files(file: str, kind: str) -> None:
    found = load_config_from_file(str(LAUNCH / f"{file}.yaml"))
    assert found.distributed_type.value == kind
    assert found.num_machines == 1


def test_accelerates_plugins_take_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    zero = load_config_from_file(str(LAUNCH / "zero3.yaml")).deepspeed_config
    plugin = DeepSpeedPlugin(hf_ds_config=zero["deepspeed_config_file"], zero3_init_flag=zero["zero3_init_flag"])
    assert plugin.zero_stage == 3
    assert plugin.zero3_save_16bit_model
    assert not plugin.zero3_init_flag
    assert plugin.gradient_accumulation_steps == 1
    assert plugin.is_auto("bf16.enabled")
    fsdp = load_config_from_file(str(LAUNCH / "fsdp2.yaml")).fsdp_config
    assert FullyShardedDataParallelPlugin(**fsdp).fsdp_version == 2


def test_a_model_that_is_shared_needs_several_processes(tmp_path: Path) -> None:
    tiny.tiny_gpt2().save(tmp_path / "start")
    config = Training(init=str(tmp_path / "start"), out=str(tmp_path / "out"), parallel="fsdp2", batch=4, device="cpu")
    with pytest.raises(ConfigError, match="torchrun"):
        train(config, Explicit(), lambda index: tiny.chains(tiny.tiny_gpt2())[2], lambda *_: {"accuracy": 0.0})
    with pytest.raises(ConfigError, match="Muon needs"):
        train(
            Training(init="x", out=str(tmp_path), parallel="fsdp2", optimizer="muon"), Explicit(), lambda _: None, dict
        )


def test_one_process_goes_on_with_what_several_shared(tmp_path: Path) -> None:
    model = tiny.tiny_gpt2()
    model.save(tmp_path / "start")
    values = {"init": str(tmp_path / "start"), "batch": 4, "accumulate": 2, "schedule": "constant", "device": "cpu"}
    values |= {"workers": 0, "log_every": 1, "save_every": 2}

    def losses(out: str, steps: int, how: How) -> list[float]:
        config = Training(**values, out=str(tmp_path / out), steps=steps, parallel=how)
        train(config, Explicit(), lambda index: tiny.chains(model)[index % 3], lambda *_: {"accuracy": 0.0}, True)
        told = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in told if "loss" in line]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        losses("parts", 2, "fsdp2")
        losses("other", 2, "ddp")
        with pytest.raises(ConfigError, match=r"isn't sharded: choose --parallel ddp"):
            losses("other", 4, "fsdp2")
    finally:
        torch.distributed.destroy_process_group()
    assert losses("parts", 4, "auto") == pytest.approx(losses("other", 4, "ddp"), rel=1e-5)


@pytest.mark.parametrize(("kind", "way"), [("FSDP", "fsdp2"), ("DEEPSPEED", "zero3")])
@pytest.mark.parametrize("change", [{"optimizer": "muon"}, {"looped": (1, 2)}], ids=["muon", "looped"])
def test_what_a_launch_file_cannot_share_is_refused(
    kind: str, way: str, change: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = SimpleNamespace(
        device=torch.device("cpu"), distributed_type=DistributedType(kind), process_index=0, num_processes=2,
        is_main_process=True,
    )  # fmt: skip
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: launched)
    config = Training(init="x", out=str(tmp_path / "out"), device="cpu", **change)
    with pytest.raises(ConfigError, match=f"{way} (shards|would divide)"):
        train(config, Explicit(), lambda _: None, dict)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("there", "cpu"), [(("cpu",), True), (("cuda", "cpu"), False)])
def test_processes_find_each_other_on_what_is_meant(
    there: tuple[str, ...], cpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Accelerate lets each process train alone if it isn't told that they are on the CPU."""

    def launched(**asked: object) -> None:
        raise ConfigError(f"cpu={asked['cpu']}")

    monkeypatch.setattr("engine.backbones.load.devices", lambda: there)
    monkeypatch.setattr("accelerate.Accelerator", launched)
    with pytest.raises(ConfigError, match=f"cpu={cpu}"):
        train(Training(init="x", out=str(tmp_path / "out"), device="auto"), Explicit(), lambda _: None, dict)


def test_a_device_that_the_launch_keeps_away_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched = SimpleNamespace(
        device=torch.device("cpu"), distributed_type=DistributedType.NO, process_index=0, num_processes=1,
        is_main_process=True,
    )  # fmt: skip
    monkeypatch.setattr("engine.backbones.load.devices", lambda: ("cuda", "cpu"))
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: launched)
    with pytest.raises(ConfigError, match="cuda can't be used here, only cpu"):
        train(Training(init="x", out=str(tmp_path / "out"), device="cuda"), Explicit(), lambda _: None, dict)


@pytest.mark.parametrize(("kind", "how"), [("FSDP", "ddp"), ("DEEPSPEED", "ddp"), ("DEEPSPEED", "fsdp2")])
def test_another_way_than_the_launch_files_is_refused(kind: str, how: How) -> None:
    launched = SimpleNamespace(distributed_type=DistributedType(kind))
    with pytest.raises(ConfigError, match=f"parallel: {how}, but the launch file says {kind}"):
        way(launched, how)


def test_what_accelerate_leaves_out_on_a_cpu_is_done_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch file's FSDP or DeepSpeed becomes plain replicas there, without a word."""
    launched = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    assert way(launched, "auto") == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert way(launched, "auto") == "fsdp2"
    with pytest.raises(ConfigError, match="the launch file says FSDP"):
        way(launched, "ddp")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed, which needs a GPU"):
        way(launched, "auto")


@pytest.mark.parametrize("epoch", [0, 4])
def test_more_segments_change_no_result(epoch: int) -> None:
    model = tiny.tiny_gpt2()
    add_tokens(model.model, model.tokenizer, COCONUT.tokens)
    packed = pack(layouts_of(COCONUT, tiny.chains(model), epoch), model.encode, model.pad)
    needed, length = segments_of(packed), packed.ids.shape[1]
    assert (needed == 1) == (epoch == 0)
    calls: list[int] = []
    model.model.transformer.h[0].register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[1]))
    with torch.no_grad():
        once = latents.forward(model, packed)
        assert len(calls) == needed
        for wanted in (needed + 1, needed + 5, length):
            calls.clear()
            again = latents.forward(model, packed, segments=wanted)
            assert len(calls) == wanted
            assert sum(calls) == length
            for ours, theirs in zip(again, once, strict=True):
                torch.testing.assert_close(ours[packed.node >= 0], theirs[packed.node >= 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="segments"):
        stepped([], length, length + 1)


SCRIPT = """
import json, sys
from engine.methods.pause import PauseDistillation
from engine.training import train
from engine.recipe import Training
from tests.two import CASES
case = next(case for case in CASES if case.name == "pause")
train(Training(**json.loads(sys.argv[1])), case.method, case.source, lambda *_: {"accuracy": 0.5}, True)
"""


def trained_on_gpu(tmp_path: Path, launch: list[str], out: str, processes: int, **changes: object) -> dict[int, float]:
    values = {
        "init": str(tmp_path / "start"), "out": str(tmp_path / out), "steps": 4, "batch": 4 // processes, "accumulate": 2,
        "warmup": 2, "schedule": "constant", "workers": 0, "log_every": 1, "validate_every": 2, "save_every": 2, "gradient_checkpointing": True,
    }  # fmt: skip
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*launch, str(tmp_path / "script.py"), json.dumps(values | changes)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU computes needs one: no CUDA here")
@pytest.mark.parametrize("file", ["ddp", "fsdp2", "zero3"])
def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path, file: str) -> None:
    """As many GPUs as there are, up to two; resumed half-way."""
    if file == "zero3" and not is_deepspeed_available():
        pytest.skip("ZeRO-3 is deepspeed's, an extra that isn't installed here")
    tiny.tiny_backbone().save(tmp_path / "start")
    processes = min(2, torch.cuda.device_count())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    accelerate = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{file}.yaml"),
        "--num_processes", str(processes),
    ]  # fmt: skip
    launch = accelerate if file == "zero3" else torchrun
    changes = {} if file == "zero3" else {"parallel": file}
    expected = trained_on_gpu(tmp_path, [sys.executable], "cpu", 1, device="cpu")
    trained_on_gpu(tmp_path, launch, file, processes, steps=2, **changes)
    got = trained_on_gpu(tmp_path, launch, file, processes, **changes)
    assert got == pytest.approx(expected, rel=2e-3)
