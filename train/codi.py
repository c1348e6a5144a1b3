"""Trains CODI: projected thoughts, taught by the written chain at one position.

python -m train.codi --config train/configs/text/codi.yaml

A file with the published arguments as keys (model_name_or_path, num_latent, distill_loss_factor, use_decoder ...) is
understood too. The data is a file: `icot_train_path`, or `data_name` for CODI's JSON. Its last rows are held out for the
validation, which the published trainer doesn't have; no row is left out for its length.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from engine.config import ConfigError, convert
from engine.data.codi_json import CodiSource
from engine.data.gsm8k_icot import Gsm8kIcotSource
from engine.methods.codi import Codi
from train.command import main, processes

NEEDED = (
    "output_dir", "model_name_or_path", "data_name", "num_train_epochs", "learning_rate",
    "per_device_train_batch_size", "num_latent", "prj_dim",
)  # fmt: skip
ONLY = {  # what this project's CODI can be
    "use_prj": True, "prj_no_ln": False, "remove_eos": True, "distill_loss_div_std": True,
    "distill_loss_type": "smooth_l1", "exp_mode": False, "full_precision": True,
}  # fmt: skip
OPTIONAL = {
    "icot_train_path": "", "gradient_accumulation_steps": 1, "seed": 42, "bf16": False, "max_grad_norm": 1.0,
    "weight_decay": 0.0, "warmup_ratio": 0.0, "lr_scheduler_type": "linear", "logging_steps": 500, "use_lora": True,
    "lora_r": 128, "lora_alpha": 16, "prj_dropout": 0.0, "distill_loss_factor": 1.0, "ref_loss_factor": 1.0,
    "include_last_cot": False, "use_decoder": False, "explain_loss_factor": 1.0,
}  # fmt: skip
WITHOUT_MEANING = {  # here; among them what the published code reads nowhere, and the fault that fix_attn_mask mends
    "expt_name", "logging_dir", "logging_strategy", "save_strategy", "save_safetensors", "save_total_limit", "do_train",
    "report_to", "model_max_length", "max_token_num", "exp_data_num", "print_ref_model_stats", "print_loss", "log_full",
    "lora_init", "lora_dropout", "fix_attn_mask", "greedy", "inf_latent_iterations", "inf_num_iterations", "decoder_path",
}  # fmt: skip


def joined(data: str) -> str:
    """How the published code joins the text of the data that it calls so, as Codi's `text`."""
    if "icot" in data:
        return "icot-full" if "full" in data else "icot"
    return "commonsense" if "commonsense" in data or "strategy" in data else "lines"


def published(values: dict[str, Any]) -> dict[str, Any]:
    """The published flat keys as this project's; a file that has a `method` is ours already.

    Errors: ConfigError for unknown or missing keys, for settings that this CODI doesn't have, and for data that can't be used.
    """
    if "method" in values:
        return values
    if unknown := sorted(set(values) - {*NEEDED, *ONLY, *OPTIONAL, *WITHOUT_MEANING}):
        raise ConfigError(f"Unknown key {unknown[0]!r} (neither CODI's own nor this project's `method:` form).")
    if missing := [key for key in NEEDED if key not in values]:
        raise ConfigError(f"Missing: {', '.join(missing)}.")
    if wrong := [key for key, only in ONLY.items() if values.get(key, only) != only]:
        raise ConfigError(f"{wrong[0]} = {values[wrong[0]]!r}: only {ONLY[wrong[0]]!r} is supported.")
    given = {key: convert(values.get(key, default), type(default), key) for key, default in OPTIONAL.items()}
    epochs, size = (convert(values[key], int, key) for key in ("num_train_epochs", "per_device_train_batch_size"))
    equations = bool(given["icot_train_path"])
    file = given["icot_train_path"] or str(values["data_name"])
    whole = (Gsm8kIcotSource if equations else CodiSource)(file, split="test")
    held_out = min(256, len(whole) // 10)
    batch = size * given["gradient_accumulation_steps"]  # a process
    round_ = math.ceil((len(whole) - held_out) / (batch * processes()))
    steps = round_ * epochs
    decoder = {"mean": "tokens", "missing": "ignore", "first_position": 0, "weight": given["explain_loss_factor"]}
    lora = {"r": given["lora_r"], "alpha": given["lora_alpha"], "dropout": 0.1, "targets": ["attention", "mlp"]}
    return {
        "method": {
            "text": joined(str(values["data_name"])), "num_latent": values["num_latent"], "prj_dim": values["prj_dim"], "prj_dropout": given["prj_dropout"],
            "distill_factor": given["distill_loss_factor"], "ref_factor": given["ref_loss_factor"],
            "answer_token": int(any(name in str(values["model_name_or_path"]).lower() for name in ("llama", "qwen"))),
            "last_step": given["include_last_cot"] or "icot" not in str(values["data_name"]),
            **({"steps": decoder} if given["use_decoder"] else {}),
        },
        "training": {
            "init": values["model_name_or_path"], "out": values["output_dir"], "steps": steps, "batch": batch,
            "accumulate": given["gradient_accumulation_steps"], "lr": values["learning_rate"],
            "warmup": math.ceil(steps * given["warmup_ratio"]), "schedule": given["lr_scheduler_type"],
            "weight_decay": given["weight_decay"], "clip": given["max_grad_norm"], "seed": given["seed"],
            "precision": "bf16" if given["bf16"] else "no", "log_every": given["logging_steps"],
            "validate_every": round_, "save_every": round_,
        },
        **({"lora": lora} if given["use_lora"] else {}),
        "gsm8k_icot" if equations else "codi_json": {"file": file, "held_out": held_out},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(__doc__, Codi, translate=published))
