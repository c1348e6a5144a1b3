"""What a run is told: its settings and what they may be, the schedule, the optimizers, what stays as it is. Trains nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from engine.adapters import Lora
from engine.backbones.base import Backbone
from engine.config import ConfigError, at_least
from engine.curriculum import LAST
from engine.methods.method import Method
from engine.muon import Muon


def setting(default: Any, text: str) -> Any:
    """A field with its line of help."""
    return field(default=default, metadata={"help": text})


COUNTED = ("steps", "batch", "accumulate", "log_every", "validate_every", "save_every", "keep")  # 1 or more
FROM_NONE = ("warmup", "epoch", "seed", "workers", "final_lr", "weight_decay")  # 0 or more
ABOVE_NONE = ("lr", "clip")  # more than 0
FINITE = ("lr", "final_lr", "weight_decay")


@dataclass(frozen=True)
class Training:
    init: str = setting("", "folder or Hub id of the model to start from, and of its companions if it has any")
    adapter: str = setting("", "folder of an adapter of that model: to go on with (under lora), else merged into it")
    out: str = setting("", "folder for checkpoints, logs and the best model")
    steps: int = setting(1000, "optimizer steps")
    batch: int = setting(64, "samples a step and process")
    accumulate: int = setting(4, "forward passes a step; `batch` is divided among them, by length")
    frozen: bool = setting(
        False, "the model stays as it is: its companions alone learn, such as a new auxiliary decoder"
    )
    vision: bool = setting(True, "false: the vision encoder stays as it is, and the language model learns")
    lr: float = setting(1e-3, "highest learning rate")
    final_lr: float = setting(0.0, "learning rate at the end, as a share of the highest")
    warmup: int = setting(50, "steps over which the learning rate rises")
    schedule: Literal["linear", "cosine", "constant", "late"] = setting(
        "cosine", "how it falls; late: in the last fifth"
    )
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: on the matrices inside the layers, AdamW on the rest")
    beta2: float = setting(
        0.999, "AdamW's memory of squared gradients; shorter, such as 0.98, suits runs of some thousand steps"
    )
    weight_decay: float = setting(0.01, "the optimizer's, on matrices only")
    epoch: int = setting(0, "samples an epoch, for methods with a curriculum (0: no epochs)")
    clip: float = setting(1.0, "largest gradient norm")
    seed: int = setting(0, "decides samples and pauses")
    precision: Literal["no", "bf16"] = setting("no", "bf16 autocast, or none")
    looped: tuple[int, int] = setting(
        (0, 0), "first and last of the layers that share one set of weights while they learn, from 1 (0, 0: none do)"
    )
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
    chosen: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))]
    if inner:
        ordered = [p for p in trained if p in inner]
        chosen.append(Muon(ordered, lr=config.lr, weight_decay=config.weight_decay))
    return chosen


def expect_sound(config: Training) -> None:
    """Errors: ConfigError for invalid counts, rates and shares."""
    at_least(1, config, *COUNTED)
    at_least(0, config, *FROM_NONE)
    if wrong := [name for name in ABOVE_NONE if not getattr(config, name) > 0]:
        raise ConfigError(f"{wrong[0]} is {getattr(config, wrong[0])}: it must be above 0.")
    if endless := [name for name in FINITE if math.isinf(getattr(config, name))]:
        raise ConfigError(f"{endless[0]} is {getattr(config, endless[0])}: it must be a finite number.")
    if not 0 <= config.unreadable <= 1:
        raise ConfigError(f"unreadable is {config.unreadable}: it is a share, from 0 to 1.")
    if not 0 <= config.beta2 < 1:
        raise ConfigError(f"beta2 is {config.beta2}: it must be 0 or more, and below 1.")
    if config.batch % config.accumulate:
        raise ConfigError(f"batch {config.batch} can't be divided among {config.accumulate} passes.")


def expect_fitting(config: Training, method: Method, lora: Lora | None) -> None:
    """Errors: ConfigError for settings that can't go together, or not with this method."""
    if not config.epoch and method.renewed(LAST):
        raise ConfigError("The method has a curriculum of epochs: say how many samples one has (epoch).")
    if config.frozen and lora:
        raise ConfigError("frozen: the model stays as it is, and lora trains an adapter of it: choose one of them.")
    if not config.vision and lora and lora.vision:
        raise ConfigError(
            "vision: false keeps the vision encoder as it is, but lora.vision trains an adapter of it: choose one."
        )
    if config.frozen and method.renewed(LAST) and not method.slots_at(0):
        raise ConfigError(
            "frozen: nothing would learn while the curriculum has no slots yet: start after that stage (method.first_epoch)."
        )
    if config.looped != (0, 0) and (lora or companions_alone(config, method)):
        raise ConfigError("looped needs trainable layers, but this run freezes the model.")


def companions_alone(config: Training, method: Method) -> bool:
    """Whether the model stays as it is."""
    return config.frozen or method.frozen


def freeze_vision(config: Training, backbone: Backbone) -> None:
    """What isn't the language model stays as it is, where that is asked for. Errors: ConfigError for a model without eyes."""
    if config.vision:
        return
    if not backbone.sighted:
        raise ConfigError("vision: false, but this model has no vision encoder: leave the setting out.")
    language = {id(parameter) for parameter in backbone.language_model().parameters()}
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in language)
