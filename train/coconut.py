"""Trains Coconut, and Multimodal CoCoNuT over clips and images: a curriculum of thoughts that are fed back.

python -m train.coconut --config train/configs/text/coconut.yaml

A file with the published flat keys (coconut, cot, c_thought, load_model_path, train_path ...) is understood too.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from engine.config import ConfigError
from engine.data.coconut_json import CoconutSource
from engine.methods.coconut import Coconut
from train.command import main, processes

MODES = ("coconut", "cot", "no_cot", "no_thoughts")
SAME = ("c_thought", "epochs_per_stage", "max_latent_stage", "pad_latent_to_max", "uniform_prob")  # in both formats
WITHOUT_MEANING = ("project", "debug", "save_only_improve")  # of the published trainer's bookkeeping
NEEDED = ("save_path", "name", "model_id", "train_path", "val_path", "batch_size_training", "num_epochs", "lr")


def published(values: dict[str, Any]) -> dict[str, Any]:
    """The published flat keys as this project's; a file that has a `method` is ours already.

    Errors: ConfigError for unknown or missing keys, and for more or less than one mode.
    """
    if "method" in values:
        return values
    known = {*MODES, *SAME, *WITHOUT_MEANING, *NEEDED, "load_model_path", "only_eval", "seed", "resume", "bf16",
             "reset_optimizer", "gradient_accumulation_steps", "weight_decay"}  # fmt: skip
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"Unknown key {unknown[0]!r} (neither Coconut's own nor this project's `method:` form).")
    if missing := [key for key in NEEDED if key not in values]:
        raise ConfigError(f"Missing: {', '.join(missing)}.")
    chosen = [mode for mode in MODES if values.get(mode)]
    if len(chosen) != 1:
        raise ConfigError(f"Set one of {', '.join(MODES)} to true; {len(chosen)} of them are.")
    samples = len(CoconutSource(values["train_path"], values["val_path"]))
    accumulate = int(values.get("gradient_accumulation_steps", 1))
    batch = int(values["batch_size_training"]) * accumulate  # a process
    round_ = math.ceil(samples / (batch * processes()))
    loaded = values.get("load_model_path")
    return {
        "method": {"mode": chosen[0], **{key: values[key] for key in SAME if key in values}},
        "training": {
            "init": values["model_id"] if loaded in (None, "None") else loaded,
            "out": f"{values['save_path']}/{values['name']}", "steps": int(values["num_epochs"]) * round_,
            "epoch": samples, "batch": batch, "accumulate": accumulate, "lr": values["lr"], "warmup": 0, "clip": 1e9,
            "schedule": "constant", "weight_decay": values.get("weight_decay", 0.01), "seed": values.get("seed", 0),
            "precision": "bf16" if values.get("bf16") else "no", "only_eval": bool(values.get("only_eval")),
            "validate_every": round_, "save_every": round_,
        },
        "coconut_json": {"file": values["train_path"], "validation_file": values["val_path"]},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(__doc__, Coconut, translate=published))
