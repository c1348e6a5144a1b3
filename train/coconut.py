"""Trains Coconut, and Multimodal CoCoNuT over clips and images: a curriculum of thoughts that are fed back.

python -m train.coconut --config train/configs/text/coconut.yaml

A file with the published flat keys (coconut, cot, c_thought, load_model_path, train_path ...) is understood too. Without
reset_optimizer the published trainer keeps one optimizer through all stages; here each stage has its own.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Any

from engine.config import ConfigError, at_least, build
from engine.data.coconut_json import CoconutSource
from engine.methods.coconut import Coconut
from train.command import main, processes

MODES = ("coconut", "cot", "no_cot", "no_thoughts")
SAME = ("epochs_per_stage", "max_latent_stage", "pad_latent_to_max", "uniform_prob")  # in both formats


@dataclass(frozen=True)
class Published:
    """The published flat keys. project, debug, save_only_improve: of its trainer's bookkeeping, without meaning here."""

    save_path: str
    name: str
    model_id: str
    train_path: str
    val_path: str
    batch_size_training: int
    num_epochs: int
    lr: float
    coconut: bool = False
    cot: bool = False
    no_cot: bool = False
    no_thoughts: bool = False
    c_thought: int = Coconut.c_thought
    epochs_per_stage: int = Coconut.epochs_per_stage
    max_latent_stage: int = Coconut.max_latent_stage
    pad_latent_to_max: bool = Coconut.pad_latent_to_max
    uniform_prob: float = Coconut.uniform_prob
    load_model_path: str | None = None
    only_eval: bool = False
    seed: int = 0
    resume: int = 0
    bf16: bool = False
    reset_optimizer: bool = False
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.01
    project: str | None = None
    debug: bool = False
    save_only_improve: bool = False

    def __post_init__(self) -> None:
        needed = ("save_path", "name", "model_id", "train_path", "val_path")
        if empty := [name for name in needed if not getattr(self, name)]:
            raise ConfigError(f"{empty[0]} is empty.")
        at_least(1, self, "batch_size_training", "num_epochs", "gradient_accumulation_steps")
        if not 0 <= self.resume < self.num_epochs:
            raise ConfigError(f"resume is {self.resume}: it must be 0 or more, and less than num_epochs.")

    @property
    def mode(self) -> str:
        """Errors: ConfigError for more or less than one."""
        chosen = [mode for mode in MODES if getattr(self, mode)]
        if len(chosen) != 1:
            raise ConfigError(f"Set one of {', '.join(MODES)} to true; {len(chosen)} of them are.")
        return chosen[0]


def published(values: dict[str, Any]) -> dict[str, Any]:
    """The published flat keys as this project's; a file that has a `method` is ours already.

    Errors: ConfigError for unknown or missing keys, for values that can't be, for more or less than one mode, and for data
    that can't be used.
    """
    if "method" in values:
        return values
    if unknown := [key for key in values if key not in {each.name for each in fields(Published)}]:
        raise ConfigError(f"Unknown key {unknown[0]!r} (neither Coconut's own nor this project's `method:` form).")
    given = build(Published, values)
    # The trainer of a chain has no thoughts, and its published file says so (c_thought: 0).
    thoughts = {"c_thought": given.c_thought} if given.mode == "coconut" else {}
    samples = len(CoconutSource(given.train_path, given.val_path))
    batch = given.batch_size_training * given.gradient_accumulation_steps  # a process
    round_ = math.ceil(samples / (batch * processes()))
    return {
        "method": {
            "mode": given.mode, **thoughts, **{key: getattr(given, key) for key in SAME}, "first_epoch": given.resume,
            "compat": given.reset_optimizer,
        },
        "training": {
            "init": given.load_model_path or given.model_id, "out": f"{given.save_path}/{given.name}",
            "steps": (given.num_epochs - given.resume) * round_, "epoch": samples, "batch": batch,
            "accumulate": given.gradient_accumulation_steps, "lr": given.lr, "warmup": 0, "clip": 1e9,
            "schedule": "constant", "weight_decay": given.weight_decay, "seed": given.seed,
            "precision": "bf16" if given.bf16 else "no", "only_eval": given.only_eval, "validate_every": round_,
            "save_every": round_,
        },
        "coconut_json": {"file": given.train_path, "validation_file": given.val_path},
        "validation": {"samples": len(CoconutSource(given.val_path, split="test"))},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(__doc__, Coconut, translate=published))
