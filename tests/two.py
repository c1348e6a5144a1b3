"""Training in two processes: the same losses as in one, however the model is shared, and after a kill.

python -m tests.two --seed 0            # prints figures as JSON, exit 1 if anything differs. Needs fork, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from engine.adapters import Lora
from engine.backbones.base import Backbone, add_tokens
from engine.backbones.load import load
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource
from engine.folders import checkpoints
from engine.methods.coconut import Coconut
from engine.methods.heima import Interpreters
from engine.methods.method import Method
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.recipe import Training
from engine.training import train
from tests.kill import ended, forked
from tests.tiny import chains, tiny_backbone, tiny_gpt2, tiny_llama

STEPS, SAVE, BATCH = 6, 2, 4
DECODER = StepSupervision(layers=1)


@dataclass(frozen=True)
class Chains:
    """Chains of different lengths, without pictures."""

    def __call__(self, index: int) -> Sample:
        return chains(tiny_gpt2())[(0, 2, 3, 2)[index % 4]]


@dataclass(frozen=True)
class Sections:
    """Chains in sections, of which whole batches lack the last."""

    def __call__(self, index: int) -> Sample:
        full = chains(tiny_llama())[2]
        kept = 1 if index // BATCH % 2 else 2
        return replace(full, steps=full.steps[:kept], sections=("A", "B")[:kept])


def undropped_gpt2() -> Backbone:
    """Two processes drop other states than one."""
    made = tiny_gpt2()
    for module in made.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    made.model.config.update(dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))
    return made


@dataclass(frozen=True)
class Case:
    name: str
    method: Method
    source: Any
    model: Callable[[], Backbone] = tiny_backbone
    lora: Lora | None = None
    hows: tuple[str, ...] = ("ddp", "fsdp2")


CASES = (
    # Different numbers of latents and of tokens in every pass and process, some without any.
    Case("coconut", Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=3, steps=DECODER), Chains(), tiny_llama),
    Case("tied", Coconut(c_thought=1, epochs_per_stage=1, max_latent_stage=2), Chains(), undropped_gpt2),
    Case("interpreters", Interpreters(compressed=2, sections=("A", "B")), Sections(), tiny_llama),
    Case("pause", PauseDistillation(pauses=(2, 4), steps=DECODER), WorldsSource(difficulties=(1, 2))),
    Case("lora", PauseDistillation(pauses=(2, 4)), WorldsSource(difficulties=(1, 2)), tiny_backbone, Lora(r=2, train_embeddings=True), ("fsdp2",)),
)  # fmt: skip


def run(case: Case, folder: Path, out: str, processes: int, stop: int = STEPS, **changes: Any) -> None:
    """One process's part of a run up to the step `stop`, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    values = {
        "init": str(folder / f"{case.name}-start"), "out": str(folder / out), "steps": stop, "batch": BATCH // processes,
        "accumulate": 2, "lr": 3e-3, "warmup": 2, "schedule": "constant", "epoch": 8, "device": "cpu", "workers": 0,
        "log_every": 1, "validate_every": SAVE, "save_every": SAVE, "gradient_checkpointing": True,
    }  # fmt: skip
    always = {"accuracy": 1.0}  # of equals the last is the best, in a resumed run too
    train(Training(**(values | changes)), case.method, case.source, lambda *_: always, True, lora=case.lora)


def started(work: Any, log: Path, processes: int) -> list[int]:
    """Starts the processes of one run -> their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        if processes > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            }  # fmt: skip
        work()
        if processes > 1:
            torch.distributed.destroy_process_group()

    return [forked(partial(one, rank), log) for rank in range(processes)]


def losses(out: Path) -> dict[int, float]:
    """By step; of steps that were taken again, the last."""
    lines = (out / "log.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return {line["step"]: line["loss"] for line in told if "loss" in line}


def apart(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference, as a share of the loss; infinite if steps are missing."""
    if one.keys() != other.keys():
        return float("inf")
    return max(abs(one[step] - other[step]) / max(1.0, abs(one[step])) for step in one)


def unlike(one: Path, other: Path) -> float:
    """How far two folders' weights are apart, as a share of their norm; infinite if one has others. A single weight may
    differ by Adam's step, which makes a direction even of rounding."""
    apart = norm = 0.0
    for place in sorted(one.glob("**/*.safetensors")):
        ours, theirs = load_file(place), load_file(other / place.relative_to(one))
        if ours.keys() != theirs.keys():
            return float("inf")
        apart += sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
        norm += sum(float(tensor.square().sum()) for tensor in ours.values())
    return (apart / norm) ** 0.5


def compare(folder: Path, chance: random.Random, cases: list[str]) -> dict[str, Any]:
    """Every case in one process, and in two: replicas and shards, killed at a random moment and resumed."""
    log, told = folder / "printed", {}
    for case in (case for case in CASES if case.name in cases):
        model = case.model()
        add_tokens(model.model, model.tokenizer, case.method.tokens)
        model.save(folder / f"{case.name}-start")
        whole = f"{case.name}-one"
        began = time.monotonic()
        (alone,) = started(partial(run, case, folder, whole, 1), log, 1)
        assert ended(alone) == 0, log.read_text()
        took = time.monotonic() - began
        for how in case.hows:
            out = f"{case.name}-{how}"
            work = partial(run, case, folder, out, 2, parallel=how)
            pids = started(work, log, 2)
            time.sleep(chance.uniform(0.5, 2.0) * took)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            kills = sum(ended(pid) == -signal.SIGKILL for pid in pids)
            stood = len(checkpoints(folder / out))
            pids = started(work, log, 2)
            codes = [ended(pid) for pid in pids]
            assert codes == [0, 0], (out, log.read_text()[-3000:])
            told[out] = {
                "loss": apart(losses(folder / whole), losses(folder / out)),
                "best": unlike(folder / whole / "best", folder / out / "best"),
                "killed": kills,
                "told": log.read_text().count(f"{out} step {STEPS}: "),
                "checkpoints then": stood,
                "files": sorted(path.name for path in checkpoints(folder / out)[-1].iterdir()),
            }
            if case.lora is None and not case.method.frozen:
                load(folder / out / "best")
    return told


def main() -> int:
    known = argparse.ArgumentParser(prog="python -m tests.two", description=__doc__)
    known.add_argument("--seed", type=int, default=0)
    known.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    options = known.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = compare(Path(folder), random.Random(options.seed), options.cases)
    print(json.dumps(told, indent=1))
    return int(any(run["loss"] > 1e-5 for run in told.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)  # forks don't inherit the threads of OpenMP
    sys.exit(main())
