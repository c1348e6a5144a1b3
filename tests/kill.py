"""Kills a training run again and again, at random moments and between any two writes of a save, and resumes it.

python -m tests.kill --kills 30 --seed 0            # prints figures as JSON, exit 1 if anything was lost

The disk is full in it too, a worker dies, a sample is corrupt, and a loss is no number. After each of these, what stands
under its final name must be whole; in the end, every loss and the last weights must be those of a run that nobody
disturbed. Needs fork.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from engine.backbones.base import Backbone
from engine.backbones.load import load
from engine.container import VideoError
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource
from engine.folders import checkpoints
from engine.methods.method import Outcome
from engine.methods.pause import PauseDistillation
from engine.recipe import Training
from engine.training import train
from tests.tiny import tiny_backbone

STEPS, SAVE = 8, 2
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")  # events of Python's audit, besides open


def settings(start: Path, out: Path, **changes: Any) -> Training:
    values = {
        "init": str(start), "out": str(out), "steps": STEPS, "batch": 2, "accumulate": 1, "lr": 3e-3, "warmup": 2,
        "device": "cpu", "workers": 0, "log_every": 1, "validate_every": SAVE, "save_every": SAVE,
    }  # fmt: skip
    return Training(**(values | changes))


@dataclass(frozen=True)
class Source(WorldsSource):
    """Small clips; `trouble` comes with one of them."""

    difficulties: tuple[int, int] = (1, 1)
    trouble: Callable[[], None] | None = None

    def __call__(self, index: int) -> Sample:
        if self.trouble and index == 15:  # of the last step, and prepared four steps before
            self.trouble()
        return super().__call__(index)


METHOD = PauseDistillation(pauses=(2, 3))


def run(
    start: Path, out: Path, source: Source = Source(), at_validation: Callable[[], None] = int, **changes: Any,
) -> None:  # fmt: skip
    """The run that is disturbed: each validation is better than the one before, so that every save moves the best too."""
    scores = iter(range(1, 100))

    def validate(backbone: Backbone, companions: nn.ModuleDict, epoch: int) -> dict[str, float]:
        at_validation()
        return {"accuracy": float(next(scores))}

    train(settings(start, out, **changes), METHOD, source, validate, resume=True)


def forked(work: Callable[[], None], log: Path) -> int:
    """Starts the work in a process of its own -> its id. What it prints goes to the file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    tqdm.set_lock(RLock())  # else forks share one, which the killed one may hold
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Waits -> its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def counting(out: Path, limit: int, reached: Callable[[], None]) -> None:
    """Calls `reached` before the limit-th change to a file or folder under `out` that Python's audit hears of."""
    seen = 0

    def hear(event: str, given: tuple) -> None:
        nonlocal seen
        writes = event in WRITES or (event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+"))
        if writes and str(given[0]).startswith(str(out)):
            seen += 1
            if seen == limit:
                reached()

    sys.addaudithook(hear)


def losses(out: Path) -> dict[int, set[float]]:
    """Every loss that was logged, by step; a line that a kill has torn is left out."""
    found: dict[int, set[float]] = {}
    for line in (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if "loss" in told:
            found.setdefault(told["step"], set()).add(told["loss"])
    return found


def saved(out: Path) -> int:
    """The step of the last checkpoint."""
    return int(checkpoints(out)[-1].name.removeprefix("step-")) if checkpoints(out) else 0


def broken(out: Path, had_best: bool) -> list[str]:
    """What stands under a final name and isn't whole."""
    faults = []
    for place in checkpoints(out):
        try:
            load_file(place / "model.safetensors")
            torch.load(place / "optimizer.bin", weights_only=True)
            step = json.loads((place / "progress.json").read_text())["step"]
            if place.name != f"step-{step:07d}":
                faults.append(f"{place.name} holds step {step}")
        except Exception as error:
            faults.append(f"{place.name}: {type(error).__name__} {error}")
    kept = [folder for folder in (out / "best", out / "best.old") if folder.exists()]
    if had_best and not kept:
        faults.append("the best model is gone")
    for folder in kept[:1]:
        try:
            load(folder)
            json.loads((folder / "scores.json").read_text())
        except Exception as error:
            faults.append(f"{folder.name}: {type(error).__name__} {error}")
    return faults


def unlike(whole: Path, out: Path, start: Path, log: Path) -> list[str]:
    """How a run that was disturbed, resumed once more, differs from the one that wasn't."""
    if ended(forked(lambda: run(start, out), log)):
        return [f"{out.name} doesn't resume: {log.read_text()[-800:]}"]
    faults = broken(out, True)
    if losses(out) != losses(whole):
        faults.append(f"{out.name} has other losses: {losses(out)} for {losses(whole)}")
    one, other = (load_file(checkpoints(place)[-1] / "model.safetensors") for place in (whole, out))
    if not all(torch.equal(one[name], other[name]) for name in one):
        faults.append(f"{out.name} has other weights")
    left = [path.name for path in (*out.iterdir(), *(out / "checkpoints").iterdir())]
    if strange := [name for name in left if name.endswith((".old", "unfinished"))]:
        faults.append(f"{out.name} leaves {strange} behind")
    return faults


def fill(start: Path, out: Path, share: float) -> None:
    """From the second validation on, no file may be larger than this share of the weights."""
    if checkpoints(out):
        most = int(share * (start / "model.safetensors").stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def die() -> None:
    if parent_process():  # a worker of the loader
        os.kill(os.getpid(), signal.SIGKILL)


def complain() -> None:
    raise VideoError("clip 15 is damaged")


def no_number(start: Path, out: Path) -> None:
    """A run whose loss is none once `out` holds a checkpoint."""
    known = PauseDistillation.loss

    def loss(self: PauseDistillation, made: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = known(self, made)
        return total * (math.nan if checkpoints(out) else 1), terms

    PauseDistillation.loss = loss  # in this fork alone
    run(start, out)


def kill(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills and resumes until so many kills have been survived, in as many runs as it takes -> the figures."""
    chance, start, log = random.Random(seed), folder / "start", folder / "printed"
    tiny_backbone().save(start)
    begin = time.monotonic()
    assert ended(forked(lambda: run(start, folder / "whole"), log)) == 0, log.read_text()
    took = time.monotonic() - begin
    told: dict[str, Any] = {"kills": 0, "at_a_write": 0, "runs": 0, "steps_lost_beyond_the_last_save": 0, "faults": []}
    while told["kills"] < kills:
        out = folder / f"run{told['runs']}"
        told["runs"] += 1
        for _ in range(12):  # then it may end in peace
            if told["kills"] == kills:
                break
            had_best, before = (out / "best").exists(), saved(out)
            at_write, limit = chance.random() < 0.7, chance.randint(1, 60)

            def work(out: Path = out, limit: int = limit if at_write else 0) -> None:
                counting(out, limit, lambda: os.kill(os.getpid(), signal.SIGKILL))
                run(start, out)

            pid = forked(work, log)
            if not at_write:
                time.sleep(chance.uniform(0, 1.2 * took))
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                told["faults"].append(f"kill {told['kills']}: exit {code}: {log.read_text()[-800:]}")
            told["kills"] += 1
            told["at_a_write"] += at_write
            told["faults"] += [f"kill {told['kills']}: {fault}" for fault in broken(out, had_best)]
            lost = max(before - saved(out), max(losses(out), default=0) - saved(out) - SAVE)
            told["steps_lost_beyond_the_last_save"] = max(told["steps_lost_beyond_the_last_save"], lost)
        told["faults"] += unlike(folder / "whole", out, start, log)
    for name, told_why, disturbed in (
        (
            "full disk, best model",
            "SafetensorError",
            lambda out: run(start, out, at_validation=partial(fill, start, out, 0.5)),
        ),
        ("full disk, checkpoint", ": ", lambda out: run(start, out, at_validation=partial(fill, start, out, 1.5))),
        ("dead worker", "worker", lambda out: run(start, out, Source(trouble=die), workers=1)),
        ("corrupt sample", "VideoError: clip 15 is damaged", lambda out: run(start, out, Source(trouble=complain))),
        (
            "no number",
            "FloatingPointError: The loss is nan",
            partial(no_number, start),
        ),
    ):
        out = folder / name.replace(" ", "-")
        code = ended(forked(partial(disturbed, out), log))
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        if code != 1 or told_why not in lines[-1].get("stopped", "nothing"):
            told["faults"].append(f"{name}: exit {code}, the log ends with {lines[-1]}")
        told[name] = lines[-1].get("stopped", "")[:120]
        told["faults"] += [
            f"{name}: {fault}" for fault in (*broken(out, saved(out) > 0), *unlike(folder / "whole", out, start, log))
        ]
    return told


def main() -> int:
    known = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    known.add_argument("--kills", type=int, default=30)
    known.add_argument("--seed", type=int, default=0)
    options = known.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = kill(Path(folder), options.kills, options.seed)
    print(json.dumps(told, indent=1))
    return 1 if told["faults"] or told["steps_lost_beyond_the_last_save"] else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # forks don't inherit the threads of OpenMP
    sys.exit(main())
