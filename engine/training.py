"""One training loop on accelerate: schedule, logs, checkpoints, exact resume. Knows neither methods nor data formats.

A step is decided by (seed, step) alone: which samples, how many pauses, what learning rate. So a run that is killed and
resumed gives the losses of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset

from engine import adapters
from engine.adapters import Lora
from engine.backbones.base import Backbone
from engine.backbones.load import load
from engine.config import ConfigError
from engine.data.samples import Sample
from engine.layout import Packed, pack, packed_length
from engine.methods import described
from engine.methods.method import COMPANIONS, META, Method, run


def setting(default: Any, text: str) -> Any:
    """A field with its line of help."""
    return field(default=default, metadata={"help": text})


Validate = Callable[[Backbone, nn.ModuleDict], dict[str, float]]


@dataclass(frozen=True)
class Training:
    init: str = setting("", "folder or Hub id of the model to start from, and of its companions if it has any")
    adapter: str = setting("", "folder of an adapter of that model: to go on with (under lora), else merged into it")
    out: str = setting("", "folder for checkpoints, logs and the best model")
    steps: int = setting(1000, "optimizer steps")
    batch: int = setting(64, "samples a step and process")
    accumulate: int = setting(4, "forward passes a step; `batch` is divided among them, by length")
    lr: float = setting(1e-3, "highest learning rate")
    final_lr: float = setting(0.0, "learning rate at the end, as a share of the highest")
    warmup: int = setting(50, "steps over which the learning rate rises")
    schedule: Literal["linear", "cosine", "constant", "late"] = setting(
        "cosine", "how it falls; late: in the last fifth"
    )
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: on the matrices inside the layers, AdamW on the rest")
    weight_decay: float = setting(0.01, "the optimizer's, on matrices only")
    epoch: int = setting(0, "samples an epoch, for methods with a curriculum (0: no epochs)")
    clip: float = setting(1.0, "largest gradient norm")
    seed: int = setting(0, "decides samples and pauses")
    precision: Literal["no", "bf16"] = setting("no", "bf16 autocast, or none")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward pass to save memory")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train")
    workers: int = setting(1, "processes that prepare batches")
    log_every: int = setting(10, "steps between two log lines")
    validate_every: int = setting(200, "steps between two validations; the best model is kept by accuracy")
    save_every: int = setting(200, "steps between two checkpoints")
    only_eval: bool = setting(False, "validate the model at `init` and stop")
    keep: int = setting(2, "checkpoints to keep")


def learning_rate(config: Training, step: int) -> float:
    """At this step (from 0): a linear rise, then the schedule, down to `final_lr` x lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    shape = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant": 1.0,
        "late": min(1.0, 5 * (1 - done)),
    }[config.schedule]
    return config.lr * (config.final_lr + (1 - config.final_lr) * shape)


def optimizers(config: Training, modules: nn.Module) -> list[torch.optim.Optimizer]:
    """For every weight that is trained: AdamW, or Muon (arXiv 2502.16982) on the matrices between embeddings and head.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    tables = {module.weight for module in modules.modules() if isinstance(module, nn.Embedding)}
    tables |= {module.weight for name, module in modules.named_modules() if name.endswith("lm_head")}
    inner = {p for p in trained if p.dim() == 2 and p not in tables} if config.optimizer == "muon" else set()
    rest = [p for p in trained if p not in inner]
    matrices, vectors = [p for p in rest if p.dim() >= 2], [p for p in rest if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    chosen: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))]
    if inner:
        ordered = [p for p in trained if p in inner]
        chosen.append(torch.optim.Muon(ordered, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    return chosen


@dataclass(frozen=True)
class Batches(Dataset):
    """The samples of one step, packed into `passes` forwards. Made in worker processes; the same on every machine.

    Samples are sorted by length before they are divided, so that little is padding.
    """

    source: Callable[[int], Sample]
    method: Method
    backbone: Backbone
    size: int
    passes: int
    seed: int
    epoch: int = 0
    rank: int = 0
    ranks: int = 1

    def __getitem__(self, step: int) -> list[Packed]:
        first = (step * self.ranks + self.rank) * self.size
        indices = range(first, first + self.size)
        epoch = epoch_of(step, self.size * self.ranks, self.epoch)
        layouts = [self.method.layout(self.source(i), np.random.default_rng([self.seed, i, 1]), epoch) for i in indices]
        lengths = [packed_length(layout, self.backbone.encode) for layout in layouts]
        order = sorted(range(self.size), key=lengths.__getitem__)
        part = self.size // self.passes
        parts = [order[i : i + part] for i in range(0, self.size, part)]
        return [pack([layouts[i] for i in p], self.backbone.encode, self.backbone.pad) for p in parts]


def epoch_of(step: int, samples: int, epoch: int) -> int:
    """The epoch of a step of `samples` samples, where one has `epoch` of them."""
    return step * samples // epoch if epoch else 0


def _first(items: list[list[Packed]]) -> list[Packed]:
    return items[0]


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def batches(dataset: Batches, start: int, stop: int, workers: int) -> Iterator[list[Packed]]:
    loader = DataLoader(
        dataset,
        batch_size=1,
        sampler=range(start, stop),
        collate_fn=_first,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _replace_folder(made: Path, place: Path) -> None:
    """Moves a finished folder into place; what stood there is removed only once the new one stands."""
    old = place.with_name(place.name + ".old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(made, place)
    shutil.rmtree(old, ignore_errors=True)


def _restore(place: Path) -> None:
    """Puts a folder back that a kill found moved away, and removes what it left of others."""
    old = place.with_name(place.name + ".old")
    if old.exists() and not place.exists():
        os.replace(old, place)
    for left in (old, place.with_name(place.name + ".unfinished")):
        shutil.rmtree(left, ignore_errors=True)


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _note(out: Path, told: dict[str, Any]) -> None:
    """Adds a line to a run's log, in place of one that a kill or a full disk has torn."""
    with (out / "log.jsonl").open("ab+") as log:
        log.seek(0)
        log.truncate(log.read().rfind(b"\n") + 1)
        log.write(json.dumps(told).encode() + b"\n")


P = ParamSpec("P")


def _tells_its_end(run: Callable[Concatenate[Training, P], Path]) -> Callable[Concatenate[Training, P], Path]:
    """Why a run ended early stands in its log."""

    @wraps(run)
    def told(config: Training, *given: P.args, **named: P.kwargs) -> Path:
        try:
            return run(config, *given, **named)
        except ConfigError:
            raise
        except BaseException as error:
            with suppress(OSError):
                free = shutil.disk_usage(config.out).free >> 20
                _note(Path(config.out), {"stopped": f"{type(error).__name__}: {error}", "free_megabytes": free})
            raise

    return told


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@_tells_its_end
def train(
    config: Training,
    method: Method,
    source: Callable[[int], Sample],
    validate: Validate,
    resume: bool = False,
    note: dict[str, Any] | None = None,
    lora: Lora | None = None,
) -> Path:
    """Trains and returns the folder of the best model (by `validate`'s "accuracy"); with `lora`, of its best adapter.

    Errors: ConfigError for settings that can't work; FloatingPointError when the loss is no number (the last good
    checkpoint stays).
    """
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    if not config.init or not config.out:
        raise ConfigError("Say what to start from (init) and where to write (out).")
    if config.batch % config.accumulate:
        raise ConfigError(f"batch {config.batch} can't be divided among {config.accumulate} passes.")
    out = Path(config.out)
    if checkpoints(out) and not resume:
        raise ConfigError(f"{out} holds a run already: add --resume to go on with it, or choose another folder.")
    seed_everything(config.seed)
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.precision)
    backbone = load(config.init, tokens=method.tokens)
    if config.adapter and (lora is None or method.frozen):
        adapters.merge(backbone.model, config.adapter)
    companions = method.companions(backbone)
    if len(companions) and (Path(config.init) / COMPANIONS).is_file():
        try:
            adapters.load_companions(Path(config.init), companions)
        except (RuntimeError, SafetensorError):
            raise ConfigError(
                f"{Path(config.init) / COMPANIONS} belongs to another method: remove it to start anew."
            ) from None
        companions.train()
    if config.gradient_checkpointing:
        deep: list[Any] = [*companions.values()] if method.frozen else [backbone.model]
        for module in deep:
            module.gradient_checkpointing_enable({"use_reentrant": False})
    added = adapters.for_training(backbone, companions, lora, method.frozen, config.adapter, method.tokens)
    backbone.model.train(not method.frozen)
    everything = [*backbone.model.parameters(), *companions.parameters()]
    trained = [parameter for parameter in everything if parameter.requires_grad]
    # Not wrapped for distribution: the engine calls the model's parts, so gradients are averaged by hand below.
    model = accelerator.prepare_model(backbone.model, evaluation_mode=True)
    if len(companions):
        companions = accelerator.prepare_model(companions, evaluation_mode=True)
    chosen = optimizers(config, nn.ModuleList([backbone.model, companions]))
    prepared = [accelerator.prepare_optimizer(optimizer) for optimizer in chosen]
    backbone = replace(backbone, model=model)
    partly = len(trained) < len(everything)  # then checkpoints hold what is trained alone
    if partly:
        accelerator.register_save_state_pre_hook(adapters.only_trained)
    rank, ranks, leads = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process

    start, best = 0, -1.0
    if leads:
        _restore(out / "best")
    if resume and (found := checkpoints(out)):
        accelerator.load_state(str(found[-1]), strict=not partly)
        state = json.loads((found[-1] / "progress.json").read_text())
        start, best = state["step"], state["best"]
        if leads:
            _note(out, {"resumed": start})
    out.mkdir(parents=True, exist_ok=True)
    log, board = (out / ("log.jsonl" if leads else f"log-{rank}.jsonl")).open("a", encoding="utf-8"), None
    settings = {"training": asdict(config), "processes": ranks, "method": described(method), **(note or {})}
    if lora:
        settings["lora"] = asdict(lora)
    if leads:
        (out / "settings.json").write_text(json.dumps(settings, indent=1, default=str))
        board = SummaryWriter(str(out / "tensorboard"))

    def record(step: int, values: dict[str, float]) -> None:
        log.write(json.dumps({"step": step, **values}) + "\n")
        log.flush()
        for name, value in values.items():
            if board:
                board.add_scalar(name, value, step)

    def save(step: int) -> None:
        place = out / "checkpoints" / f"step-{step:07d}"
        made = place.with_name("unfinished")
        if leads:
            shutil.rmtree(made, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(made))
        accelerator.wait_for_everyone()
        if leads:
            (made / "progress.json").write_text(json.dumps({"step": step, "best": best}))
            _replace_folder(made, place)
            for old in checkpoints(out)[: -config.keep]:
                os.replace(old, made)  # half removed, it would pass for whole under its own name
                shutil.rmtree(made)
        accelerator.wait_for_everyone()

    dataset = Batches(source, method, backbone, config.batch, config.accumulate, config.seed, config.epoch, rank, ranks)
    feed = batches(dataset, start, config.steps, config.workers)
    bar = tqdm(total=config.steps, initial=start, desc=out.name, dynamic_ncols=True, disable=None if leads else True)
    began, seen = time.perf_counter(), 0
    window: list[dict[str, float]] = []  # the losses since the last log line
    stage = method.stage(epoch_of(max(start - 1, 0), config.batch * ranks, config.epoch))
    for step in range(start, config.steps):
        entered = method.stage(epoch_of(step, config.batch * ranks, config.epoch))
        if entered != stage:
            stage = entered
            for optimizer in prepared:
                optimizer.optimizer.state.clear()
        for group in (group for optimizer in prepared for group in optimizer.param_groups):
            group["lr"] = learning_rate(config, step)
        torch.manual_seed(config.seed + 1_000_003 * (step * ranks + rank))  # dropout is decided by the step too
        step_terms: dict[str, float] = {}
        for packed in (part.to(accelerator.device) for part in next(feed)):
            with accelerator.autocast():
                total, terms = method.loss(run(backbone, packed, method.feedback(companions), companions))
            accelerator.backward(total / config.accumulate)
            for name, value in {"loss": total.detach(), **terms}.items():
                step_terms[name] = step_terms.get(name, 0.0) + float(value) / config.accumulate
        if not math.isfinite(step_terms["loss"]):
            raise FloatingPointError(
                f"The loss is {step_terms['loss']} at step {step}; the last checkpoint is {checkpoints(out)[-1:] or 'none'}."
            )
        if ranks > 1:
            for parameter in trained:
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= ranks
        norm = accelerator.clip_grad_norm_(trained, config.clip)
        for optimizer in prepared:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += config.batch * accelerator.num_processes
        bar.update()
        step_now = step + 1
        window.append(step_terms)
        if step_now % config.log_every == 0 or step_now == config.steps:
            rate = seen / (time.perf_counter() - began)
            logged = {name: sum(terms[name] for terms in window) / len(window) for name in step_terms}
            window.clear()
            logged |= {"lr": learning_rate(config, step), "gradient_norm": float(norm), "samples_per_second": rate}
            record(step_now, logged)
            bar.set_postfix({name: f"{value:.3g}" for name, value in logged.items() if name in step_terms})
        if step_now % config.validate_every == 0 or step_now == config.steps:
            backbone.model.eval()
            companions.eval()
            scores = validate(backbone, companions)
            backbone.model.train(not method.frozen)
            companions.train()
            record(step_now, {f"validation_{name}": value for name, value in scores.items()})
            bar.write(f"{out.name} step {step_now}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            better = scores["accuracy"] >= best  # of equals the last, which has learnt longest
            best = max(best, scores["accuracy"])
            if better and leads:
                made = out / "best.unfinished"
                shutil.rmtree(made, ignore_errors=True)
                adapters.save(made, backbone, companions, added, method.frozen)
                pauses = list(method.slot_range) if method.silent else None
                (made / META).write_text(json.dumps({"method": described(method), "pauses": pauses}))
                (made / "scores.json").write_text(json.dumps({"step": step_now, **scores}, indent=1))
                _replace_folder(made, out / "best")
        if step_now % config.save_every == 0 or step_now == config.steps:
            save(step_now)
    log.close()
    if board:
        board.close()
    return out / "best"
