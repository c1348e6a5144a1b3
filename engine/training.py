"""One training loop on accelerate, its logs, validations and exact resume. Knows neither methods nor data formats.

A step is decided by (seed, step) alone: which samples, how many pauses, what learning rate. So a run that is killed and
resumed gives the losses of one that was not.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from engine import adapters
from engine.adapters import Lora
from engine.backbones.base import Backbone
from engine.backbones.load import here, load, only_a_folder
from engine.batches import SPARES, Batches, Unread, batches, epoch_of, expect_held_out, unread_before
from engine.config import ConfigError
from engine.container import VideoError
from engine.curriculum import LAST
from engine.data.samples import Sample
from engine.folders import SETTINGS, Journal, as_a_whole, checkpoints, end_told, jot, restore, save, write_whole
from engine.latents import segments_of
from engine.layout import Packed
from engine.loop import looped, unrolled
from engine.methods import described
from engine.methods.method import META, Method, Tokens, run, shared, tokens_of
from engine.parallel import Learnt, Replicas, Together, gathered, spread, way
from engine.recipe import (
    Training,
    companions_alone,
    expect_fitting,
    expect_sound,
    freeze_vision,
    learning_rate,
    optimizers,
)
from engine.recompute import recompute_layers
from engine.resume import begun, expect_same, progress, start_of, take_up

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


Validate = Callable[[Backbone, nn.ModuleDict, int], dict[str, float]]  # in an epoch


def hardware(device: torch.device) -> str:
    """What trains, for those who read a run's settings later."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def without_bf16(told: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor says what it can do, and bfloat16 arithmetic isn't among it."""
    return told.is_file() and not re.search(r"\b(avx512_|amx_|)bf16\b", told.read_text())


def seen_in_all(config: Training, processes: int, source: object) -> str:
    """How much a run sees, in words; of data with an end, how often it goes round."""
    samples = config.steps * config.batch * processes
    told = f"{samples:,} samples on {processes} process{'es' if processes > 1 else ''}"
    return f"{told}: {samples / len(source):.1f} rounds of the data" if isinstance(source, Sized) else told


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Learner:
    """What learns, by what, in how many processes."""

    method: Method
    backbone: Backbone
    companions: nn.ModuleDict
    added: dict[str, PeftModel]  # adapters that learn, by companion; the model's own under adapters.MAIN
    team: Replicas


def train(
    config: Training,
    method: Method,
    source: Callable[[int], Sample],
    validate: Validate,
    resume: bool = False,
    note: dict[str, Any] | None = None,
    lora: Lora | None = None,
    told: Mapping[str, Any] | None = None,
    held_out: Sequence[Sample] = (),
) -> Path:
    """Trains and returns the folder of the best model (by `validate`'s "accuracy", of a curriculum in its last stage); with
    `lora`, of its best adapter.

    note: more for the run's settings. told: what the model's folder says of itself beside its method, such as how its clips
    are looked at. held_out: the samples that `validate` asks, whose lengths are checked before the first step.

    Resuming a finished run changes nothing. The first log line after a resume averages the steps since the resume alone, which
    are fewer than `log_every` where `save_every` is no multiple of it.

    Errors: ConfigError for settings that can't work, or aren't those that the run was begun with; VideoError for more clips
    that can't be read than `unreadable` allows; FloatingPointError when the loss is no number (the last good checkpoint stays).
    """
    out = _checked(config, resume)
    expect_fitting(config, method, lora)
    seed_everything(config.seed)
    accelerator = _accelerator(config)
    leads = accelerator.is_main_process
    settings = {"training": asdict(config), "processes": accelerator.num_processes}
    settings |= {"hardware": hardware(accelerator.device), "method": described(method), **(note or {})}
    settings |= {"lora": asdict(lora)} if lora else {}
    found = checkpoints(out) if resume else []
    if found or (out / "best").exists():
        expect_same(out, json.loads(json.dumps(settings, default=str)))
    start, best = progress(found) if found else (0, -1.0)
    if start >= config.steps:
        if leads:
            restore(out)
            print(f"{out} is finished, and there is nothing to do: its best model is in {out / 'best'}.")
        return out / "best"
    _possible(config, accelerator, bool(method.renewed(LAST)))
    settings["start"] = start_of(config.init, config.adapter)
    backbone, companions, added = made_ready(config, method, lora)
    if companions_alone(config, method) and not len(companions):
        raise ConfigError("frozen: nothing would learn, since the method has no companions beside the model.")
    expect_held_out(backbone, method, held_out)
    if (
        leads
        and adapters.MAIN in added
        and lora
        and not lora.train_embeddings
        and adapters.alike(backbone, method.tokens)
    ):
        print(
            "The method's tokens are new to this model, with nearly the same embeddings, which the adapter leaves as they are: "
            "set lora.train_embeddings to true, or it can hardly tell them apart."
        )
    together = Together(backbone.model, companions)
    team = spread(accelerator, together, partial(optimizers, config), config.parallel, config.clip)

    learner = Learner(method, backbone, companions, added, team)
    with end_told(out):
        if leads:
            restore(out)
        if found:
            take_up(team, found)
            if leads:
                jot(out, {"resumed": start})
        out.mkdir(parents=True, exist_ok=True)
        if leads:
            write_whole(out / SETTINGS, json.dumps(settings, indent=1, default=str))
        _take_steps(config, learner, source, validate, start, best, told or {})
    return out / "best"


def _accelerator(config: Training) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state.get("_mixed_precision", config.precision) != config.precision:
        AcceleratorState._reset_state()  # an earlier run's in this process, a table's row or a stage, which would be refused
    return Accelerator(cpu=here(config.device) == "cpu", mixed_precision=config.precision)


def _take_steps(
    config: Training, learner: Learner, source: Callable[[int], Sample], validate: Validate, start: int, best: float,
    told: Mapping[str, Any],
) -> None:  # fmt: skip
    """From `start` on, with logs, validations, the best model and checkpoints. best: the highest accuracy so far. told: as in
    `train`."""
    from tqdm import tqdm

    method, team, out = learner.method, learner.team, Path(config.out)
    rank, ranks = team.accelerator.process_index, team.accelerator.num_processes
    leads = team.accelerator.is_main_process
    spares = SPARES if config.unreadable else 0
    dataset = Batches(
        source,
        method,
        learner.backbone,
        config.batch,
        config.accumulate,
        config.seed,
        config.epoch,
        rank,
        ranks,
        spares,
    )
    drawn = tqdm(total=config.steps, initial=start, desc=out.name, dynamic_ncols=True, disable=None if leads else True)
    with drawn as bar, closing(Journal(out, rank)) as journal:
        missed = unread_before(journal.path, start)

        def left_out(step: int, unread: list[Unread]) -> None:
            for each in unread:
                missed.add((step + 1, each))
                journal.write({"step": step + 1, "unreadable": each.why, "sample": each.sample})
                bar.write(f"{out.name} step {step + 1}: another takes the place of {each.why}")
            if len(missed) > config.unreadable * config.steps * config.batch:
                raise VideoError(
                    f"{len(missed)} clips couldn't be read, more than the allowed share {config.unreadable:g} "
                    f"(unreadable). The last: {unread[-1].why}"
                )

        feed = batches(dataset, start, config.steps, config.workers, left_out)
        if leads:
            bar.write(f"{out.name}: {seen_in_all(config, ranks, source)}")
        if leads and team.accelerator.device.type == "cpu" and config.precision == "bf16" and without_bf16():
            bar.write("This processor has no bfloat16 arithmetic: with --precision no, small models train about three times faster.")  # fmt: skip
        began = time.perf_counter()
        window: list[dict[str, float]] = []  # the losses since the last log line
        for step in range(start, config.steps):
            before, epoch = (epoch_of(max(s, 0), config.batch * ranks, config.epoch) for s in (step - 1, step))
            if method.renewed(epoch) != method.renewed(before):
                team.forget()
            if method.stage(epoch) != method.stage(before):
                best = -1.0
            terms, norm = _step(config, learner, feed, step)
            window.append(terms)
            bar.update()
            done, last = step + 1, step + 1 == config.steps
            if done % config.log_every == 0 or last:
                rate = (done - start) * config.batch * ranks / (time.perf_counter() - began)
                logged = {name: sum(each[name] for each in window) / len(window) for name in terms}
                window.clear()
                bar.set_postfix({name: f"{value:.3g}" for name, value in logged.items()})
                logged |= {"lr": learning_rate(config, step), "gradient_norm": norm, "samples_per_second": rate}
                logged |= {"unreadable_clips": len(missed)} if missed else {}
                journal.record(done, logged)
            if done % config.validate_every == 0 or last:
                scores = _validated(learner, validate, epoch)
                journal.record(done, {f"validation_{name}": value for name, value in scores.items()})
                if leads:
                    bar.write(f"{out.name} step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
                if scores["accuracy"] >= best:  # of equals the last, which has learnt longest
                    best = scores["accuracy"]
                    _keep_best(out, learner, told, {"step": done, **scores})
            if done % config.save_every == 0 or last:
                save(out, {"step": done, "best": best}, config.keep, team)


def _step(
    config: Training, learner: Learner, feed: Iterator[list[Packed]], step: int
) -> tuple[dict[str, float], float]:
    """One step of the optimizers -> the loss and its terms, and the gradient's norm. Errors: FloatingPointError."""
    team, accelerator = learner.team, learner.team.accelerator
    for group in (group for optimizer in team.optimizers for group in optimizer.param_groups):
        group["lr"] = learning_rate(config, step)
    passes = next(feed)  # the first of which draws from torch's generator
    dropped = step * accelerator.num_processes + accelerator.process_index
    torch.manual_seed(config.seed + 1_000_003 * dropped)  # dropout is decided by the step too
    terms = _learn(passes, learner)
    if not math.isfinite(terms["loss"]):
        raise FloatingPointError(_lost("loss", terms["loss"], step, Path(config.out)))
    norm = team.update(config.clip)
    if not math.isfinite(norm):  # it has spoilt the weights, so nothing is saved of them
        raise FloatingPointError(_lost("gradient's norm", norm, step, Path(config.out)))
    return terms, norm


def _lost(what: str, value: float, step: int, out: Path) -> str:
    return f"The {what} is {value} at step {step}; the last checkpoint is {next(reversed(checkpoints(out)), 'none')}."


def _checked(config: Training, resume: bool) -> Path:
    """The folder to write to. Errors: ConfigError for settings that can't work."""
    if not config.init or not config.out:
        raise ConfigError("Say what to start from (init) and where to write (out).")
    expect_sound(config)
    if only_a_folder(config.init) and not Path(config.init).is_dir():
        raise ConfigError(f"There is no folder {config.init} to start from (init).")
    out = Path(config.out)
    if begun(out) and not resume:
        raise ConfigError(f"{out} holds a run already: add --resume to go on with it, or choose another folder.")
    return out


def _possible(config: Training, accelerator: Accelerator, staged: bool) -> None:
    """staged: a curriculum's stages each start with a new optimizer. Errors: ConfigError for settings that can't work on this
    machine, or as this run was launched."""
    if config.device not in ("auto", accelerator.device.type):
        raise ConfigError(
            f"device: {config.device} can't be used here, only {accelerator.device.type}: choose device: auto."
        )
    if (chosen := way(accelerator, config.parallel)) == "ddp":
        return
    if chosen == "zero3" and staged:
        raise ConfigError("Under ZeRO-3 the optimizer can't start anew at a curriculum's stages: use --parallel fsdp2.")
    if config.optimizer == "muon":
        raise ConfigError(f"Muon needs whole matrices, but {chosen} shards them: choose adamw, or train with ddp.")
    if config.looped != (0, 0):
        raise ConfigError(f"looped layers share weights that {chosen} would divide layer by layer: train with ddp.")


def made_ready(
    config: Training, method: Method, lora: Lora | None
) -> tuple[Backbone, nn.ModuleDict, dict[str, PeftModel]]:
    """The model, its companions, and their adapters by companion, each as it is to be trained. Companions go on from those
    beside the adapter or else the model, if the same method taught them."""
    from engine.models import local, told_by

    backbone, frozen = load(config.init, tokens=method.tokens), companions_alone(config, method)
    if config.adapter and (lora is None or method.frozen):
        adapters.merge(backbone.model, config.adapter)
    companions = method.companions(backbone)
    own = described(method)["name"]
    places = [local(place) for place in (config.adapter, config.init) if place and len(companions)]
    place = next((each for each in places if adapters.hold_companions(each, companions)), None)
    if place and told_by(place).get("method", {}).get("name", own) == own:
        adapters.load_companions(place, companions)
    companions.train()
    if config.looped != (0, 0):
        looped(backbone, *config.looped)
    if config.gradient_checkpointing:
        recompute_layers(companions)
        if not frozen:
            recompute_layers(backbone.model)
    added = adapters.for_training(backbone, companions, lora, frozen, config.adapter, method.tokens)
    freeze_vision(config, backbone)
    backbone.model.train(not frozen)
    return backbone, companions, added


def _learn(passes: list[Packed], learner: Learner) -> dict[str, float]:
    """The gradients of one step -> its loss and terms: means over all its passes, in all processes."""
    method, companions, team = learner.method, learner.companions, learner.team
    tokens, segments = agreed(passes, team)
    accelerator = team.accelerator
    summed, names = torch.zeros(1, device=accelerator.device), ["loss"]
    for index, packed in enumerate(passes):
        placed = packed.to(accelerator.device)

        def compute(packed: Packed = placed, calls: int = segments[index]) -> Learnt:
            with accelerator.autocast():
                return method.loss(
                    run(learner.backbone, packed, method.feedback(companions), companions, tokens, calls)
                )

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


def _validated(learner: Learner, validate: Validate, epoch: int) -> dict[str, float]:
    """The first process's scores, so that all agree on what is best."""
    backbone, companions, team = learner.backbone, learner.companions, learner.team
    learns = backbone.model.training
    backbone.model.eval()
    companions.eval()
    scores = team.look(lambda: validate(backbone, companions, epoch))
    backbone.model.train(learns)
    companions.train()
    return gathered(scores, team.accelerator)[0]


def _keep_best(out: Path, learner: Learner, told: Mapping[str, Any], scores: dict[str, float]) -> None:
    method, weights = learner.method, learner.team.weights()  # which every process takes part in
    if not learner.team.accelerator.is_main_process:
        return
    pauses = list(method.slot_range) if method.silent else None
    with as_a_whole(out / "best") as made:
        adapters.save(made, unrolled(learner.backbone), learner.companions, learner.added, method.frozen, weights)
        (made / META).write_text(json.dumps({"method": described(method), "pauses": pauses, **told}))
        (made / "scores.json").write_text(json.dumps(scores, indent=1))
