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
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

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
from engine.data.samples import Sample, looked_at
from engine.latents import segments_of
from engine.layout import Packed, pack, packed_length
from engine.methods import described
from engine.methods.method import COMPANIONS, META, Method, Tokens, run, shared, tokens_of
from engine.parallel import Learnt, Replicas, Together, gathered, spread
from engine.recompute import recompute_layers
from engine.video import VideoError

if TYPE_CHECKING:
    from peft import PeftModel


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
    parallel: Literal["auto", "ddp", "fsdp2"] = setting(
        "auto", "several processes: a model each (ddp), or one that they share (fsdp2); auto: as the launch file says"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train")
    workers: int = setting(1, "processes that prepare batches")
    unreadable: float = setting(
        0.0, "share of the samples whose clip may be unreadable: each is logged and another drawn"
    )
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


SPARES = 7  # clips that are tried in the place of one
BEYOND = 2**40  # the first index of those: further than any run comes


@dataclass(frozen=True)
class Unread:
    """A clip that couldn't be read, whose place in the round another has taken."""

    sample: int  # index
    why: str


@dataclass(frozen=True)
class Batches(Dataset):
    """The samples of one step, packed into `passes` forwards. Made in worker processes; the same on every machine.

    Samples are sorted by length before they are divided, so that little is padding. `spares`: where a clip can't be read,
    so many others are tried, and which they are is decided by the sample's index: a step has as many samples as any other.
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
    spares: int = 0

    def __getitem__(self, step: int) -> list[Packed]:
        return self.made(step)[0]

    def made(self, step: int) -> tuple[list[Packed], list[Unread]]:
        """The passes, and which samples others stand in for. Errors: VideoError for a clip, and its spares, that can't be read."""
        first = (step * self.ranks + self.rank) * self.size
        indices = range(first, first + self.size)
        epoch = epoch_of(step, self.size * self.ranks, self.epoch)
        unread: list[Unread] = []
        samples = [self.readable(i, unread) for i in indices]
        layouts = [
            self.method.layout(sample, np.random.default_rng([self.seed, i, 1]), epoch)
            for i, sample in zip(indices, samples, strict=True)
        ]
        lengths = [packed_length(layout, self.backbone.encode) for layout in layouts]
        order = sorted(range(self.size), key=lengths.__getitem__)
        part = self.size // self.passes
        parts = [order[i : i + part] for i in range(0, self.size, part)]
        return [pack([layouts[i] for i in p], self.backbone.encode, self.backbone.pad) for p in parts], unread

    def readable(self, index: int, unread: list[Unread]) -> Sample:
        """A sample with its clip cut for the model; to `unread` is added what couldn't be read before it."""
        for place in (index, *range(BEYOND + index * self.spares, BEYOND + (index + 1) * self.spares)):
            try:
                return looked_at(self.source(place), self.backbone.see)
            except VideoError as error:
                if not self.spares:
                    raise
                unread.append(Unread(index, str(error)))
        raise VideoError(f"{self.spares + 1} clips in a row can't be read, which is more than chance. {unread[-1].why}")


def epoch_of(step: int, samples: int, epoch: int) -> int:
    """The epoch of a step of `samples` samples, where one has `epoch` of them."""
    return step * samples // epoch if epoch else 0


@dataclass(frozen=True)
class _Made(Dataset):
    """What a worker hands over. Sentences for the user come back as they are: raised there, they'd bring a traceback."""

    batches: Batches

    def __getitem__(self, step: int) -> tuple[list[Packed], list[Unread]] | ConfigError | VideoError:
        try:
            return self.batches.made(step)
        except (ConfigError, VideoError) as error:
            return error


def _first(items: list[Any]) -> Any:
    return items[0]


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def batches(
    dataset: Batches, start: int, stop: int, workers: int, report: Callable[[int, list[Unread]], None] | None = None
) -> Iterator[list[Packed]]:
    """The steps' passes. report: is told the step, and what couldn't be read for it, when the step's turn comes."""
    loader = DataLoader(
        _Made(dataset),
        batch_size=1,
        sampler=range(start, stop),
        collate_fn=_first,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
    )
    for step, made in enumerate(loader, start):
        if isinstance(made, Exception):
            raise made
        passes, unread = made
        if unread and report:
            report(step, unread)
        yield passes


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


def unread_before(log: Path, step: int) -> set[tuple[int, Unread]]:
    """What a run's log says couldn't be read up to a step. Steps that a kill undid are taken again, and stand there twice."""
    found = set()
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # torn by a kill
            told = json.loads(line)
            if "unreadable" in told and told["step"] <= step:
                found.add((told["step"], Unread(told["sample"], told["unreadable"])))
    return found


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

    Errors: ConfigError for settings that can't work; VideoError for more clips that can't be read than `unreadable` allows;
    FloatingPointError when the loss is no number (the last good checkpoint stays).
    """
    from accelerate import Accelerator
    from tqdm import tqdm

    out = _checked(config, resume)
    seed_everything(config.seed)
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.precision)
    rank, ranks, leads = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    backbone, companions, added = made_ready(config, method, lora)
    together = Together(backbone.model, companions)
    team = spread(accelerator, together, partial(optimizers, config), config.parallel, config.clip)

    start, best = 0, -1.0
    if leads:
        _restore(out / "best")
    if resume and (found := checkpoints(out)):
        team.load(found[-1])
        state = json.loads((found[-1] / "progress.json").read_text())
        start, best = state["step"], state["best"]
        if leads:
            _note(out, {"resumed": start})
    out.mkdir(parents=True, exist_ok=True)
    journal = _Journal(out, rank)
    if leads:
        settings = {"training": asdict(config), "processes": ranks, "method": described(method), **(note or {})}
        settings |= {"lora": asdict(lora)} if lora else {}
        (out / "settings.json").write_text(json.dumps(settings, indent=1, default=str))

    spares = SPARES if config.unreadable else 0
    dataset = Batches(
        source, method, backbone, config.batch, config.accumulate, config.seed, config.epoch, rank, ranks, spares
    )
    missed = unread_before(journal.path, start)

    def left_out(step: int, unread: list[Unread]) -> None:
        for each in unread:
            missed.add((step + 1, each))
            journal.write({"step": step + 1, "unreadable": each.why, "sample": each.sample})
            bar.write(f"{out.name} step {step + 1}: another takes the place of {each.why}")
        if len(missed) > config.unreadable * config.steps * config.batch:
            raise VideoError(
                f"{len(missed)} clips couldn't be read, more than the {config.unreadable:g} of all samples that may be "
                f"(unreadable). The last: {unread[-1].why}"
            )

    feed = batches(dataset, start, config.steps, config.workers, left_out)
    bar = tqdm(total=config.steps, initial=start, desc=out.name, dynamic_ncols=True, disable=None if leads else True)
    began, seen = time.perf_counter(), 0
    window: list[dict[str, float]] = []  # the losses since the last log line
    stage = method.stage(epoch_of(max(start - 1, 0), config.batch * ranks, config.epoch))
    for step in range(start, config.steps):
        entered = method.stage(epoch_of(step, config.batch * ranks, config.epoch))
        if entered != stage:
            stage = entered
            team.forget()
        for group in (group for optimizer in team.optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(config, step)
        passes = next(feed)  # the first of which draws from torch's generator
        torch.manual_seed(config.seed + 1_000_003 * (step * ranks + rank))  # dropout is decided by the step too
        terms = _learn(passes, method, backbone, companions, team)
        if not math.isfinite(terms["loss"]):
            raise FloatingPointError(
                f"The loss is {terms['loss']} at step {step}; the last checkpoint is {checkpoints(out)[-1:] or 'none'}."
            )
        norm = team.update(config.clip)
        seen += config.batch * ranks
        bar.update()
        done = step + 1
        window.append(terms)
        if done % config.log_every == 0 or done == config.steps:
            rate = seen / (time.perf_counter() - began)
            logged = {name: sum(each[name] for each in window) / len(window) for name in terms}
            window.clear()
            logged |= {"lr": learning_rate(config, step), "gradient_norm": norm, "samples_per_second": rate}
            if missed:
                logged["unreadable_clips"] = len(missed)
            journal.record(done, logged)
            bar.set_postfix({name: f"{value:.3g}" for name, value in logged.items() if name in terms})
        if done % config.validate_every == 0 or done == config.steps:
            scores = _validated(method, backbone, companions, validate, team)
            journal.record(done, {f"validation_{name}": value for name, value in scores.items()})
            bar.write(f"{out.name} step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            if scores["accuracy"] >= best:  # of equals the last, which has learnt longest
                best = scores["accuracy"]
                weights = team.weights()
                if leads:
                    _keep_best(out, method, {"step": done, **scores}, backbone, companions, added, weights)
        if done % config.save_every == 0 or done == config.steps:
            _save(out, {"step": done, "best": best}, config.keep, team)
    journal.close()
    return out / "best"


def _checked(config: Training, resume: bool) -> Path:
    """The folder to write to. Errors: ConfigError for settings that can't work."""
    if not config.init or not config.out:
        raise ConfigError("Say what to start from (init) and where to write (out).")
    if config.batch % config.accumulate:
        raise ConfigError(f"batch {config.batch} can't be divided among {config.accumulate} passes.")
    if config.optimizer == "muon" and config.parallel == "fsdp2":
        raise ConfigError("muon turns whole matrices, which fsdp2 divides: choose adamw, or parallel: ddp.")
    out = Path(config.out)
    if checkpoints(out) and not resume:
        raise ConfigError(f"{out} holds a run already: add --resume to go on with it, or choose another folder.")
    return out


def made_ready(
    config: Training, method: Method, lora: Lora | None
) -> tuple[Backbone, nn.ModuleDict, dict[str, PeftModel]]:
    """The model, its companions, and their adapters by companion, each as it is to be trained."""
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
        recompute_layers(companions)
        if not method.frozen:
            recompute_layers(backbone.model)
    added = adapters.for_training(backbone, companions, lora, method.frozen, config.adapter, method.tokens)
    backbone.model.train(not method.frozen)
    return backbone, companions, added


def _learn(
    passes: list[Packed], method: Method, backbone: Backbone, companions: nn.ModuleDict, team: Replicas
) -> dict[str, float]:
    """The gradients of one step -> its loss and terms: means over all its passes, in all processes."""
    tokens, segments = agreed(passes, team)
    accelerator = team.accelerator
    summed, names = torch.zeros(1, device=accelerator.device), ["loss"]
    for index, packed in enumerate(passes):
        placed = packed.to(accelerator.device)

        def compute(packed: Packed = placed, calls: int = segments[index]) -> Learnt:
            with accelerator.autocast():
                return method.loss(run(backbone, packed, method.feedback(companions), companions, tokens, calls))

        total, terms = team.learn(compute, 1 / len(passes), last=index == len(passes) - 1)
        names = ["loss", *terms]
        summed = summed + torch.stack([total, *terms.values()]).float() / len(passes)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(summed)
    return dict(zip(names, (summed / accelerator.num_processes).tolist(), strict=True))


def agreed(passes: list[Packed], team: Replicas) -> tuple[Tokens, list[int]]:
    """What the processes tell each other before a step: the tokens of an average pass, and how often each pass calls the
    language model, where they share one.

    Errors: ConfigError for passes that would call different parts of a model that is shared.
    """
    told = [(tokens_of(packed), segments_of(packed), bool(packed.grids), set(packed.readings)) for packed in passes]
    every = gathered(told, team.accelerator)
    tokens = shared([each for process in every for each, *_ in process])
    if not team.sharded:
        return tokens, [0] * len(passes)
    for index in range(len(passes)):
        if any(process[index][2:] != told[index][2:] for process in every):
            raise ConfigError(
                "One process's samples have pictures or slots and another's have none: where processes share one model, "
                "all must have them. Train with parallel: ddp."
            )
    return tokens, [max(process[index][1] for process in every) for index in range(len(passes))]


def _validated(
    method: Method, backbone: Backbone, companions: nn.ModuleDict, validate: Validate, team: Replicas
) -> dict[str, float]:
    """The first process's scores, so that all agree on what is best."""
    backbone.model.eval()
    companions.eval()
    scores = team.look(lambda: validate(backbone, companions))
    backbone.model.train(not method.frozen)
    companions.train()
    return gathered(scores, team.accelerator)[0]


def _keep_best(
    out: Path, method: Method, scores: dict[str, float], backbone: Backbone, companions: nn.ModuleDict,
    added: dict[str, PeftModel], weights: dict[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    made = out / "best.unfinished"
    shutil.rmtree(made, ignore_errors=True)
    adapters.save(made, backbone, companions, added, method.frozen, weights)
    pauses = list(method.slot_range) if method.silent else None
    (made / META).write_text(json.dumps({"method": described(method), "pauses": pauses}))
    (made / "scores.json").write_text(json.dumps(scores, indent=1))
    _replace_folder(made, out / "best")


def _save(out: Path, progress: dict[str, float], keep: int, team: Replicas) -> None:
    """A checkpoint, which every process writes its part of; older ones than the last `keep` go."""
    place = out / "checkpoints" / f"step-{progress['step']:07d}"
    made = place.with_name("unfinished")
    wait, leads = team.accelerator.wait_for_everyone, team.accelerator.is_main_process
    if leads:
        shutil.rmtree(made, ignore_errors=True)
    wait()
    team.save(made)
    wait()
    if leads:
        (made / "progress.json").write_text(json.dumps(progress))
        _replace_folder(made, place)
        for old in checkpoints(out)[:-keep]:
            os.replace(old, made)  # half removed, it would pass for whole under its own name
            shutil.rmtree(made)
    wait()


class _Journal:
    """A run's log: a line of JSON each, and what is drawn of it. The first process's, whose numbers are everybody's; the
    others write down their own mishaps."""

    def __init__(self, out: Path, rank: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / (f"log-{rank}.jsonl" if rank else "log.jsonl")
        self.file = self.path.open("a", encoding="utf-8")
        self.board = None if rank else SummaryWriter(str(out / "tensorboard"))

    def write(self, told: dict[str, Any]) -> None:
        self.file.write(json.dumps(told) + "\n")
        self.file.flush()

    def record(self, step: int, values: dict[str, float]) -> None:
        if self.board is None:
            return
        self.write({"step": step, **values})
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
