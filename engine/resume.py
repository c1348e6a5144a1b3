"""Whether a run may go on, and from where: the settings that it was begun with, and its last checkpoint. Trains nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from engine.backbones.load import only_a_folder
from engine.config import ConfigError
from engine.folders import SETTINGS, checkpoints, fingerprint
from engine.parallel import Replicas, gathered

INDIFFERENT = ("device", "workers", "log_every", "save_every", "keep", "only_eval", "out")  # of no effect on a run
# What else may be changed where a run goes on: it has no effect on what is learnt from a sample, or more steps are wanted. Of
# `batch`, only how many processes share the samples of a step.
MAY_CHANGE = (
    *INDIFFERENT, "steps", "batch", "accumulate", "gradient_checkpointing", "parallel", "unreadable", "validate_every",
)  # fmt: skip
# Sections that don't count, or are looked at by themselves.
UNCOMPARED = ("processes", "hardware", "validation", "start")
# What reading a damaged checkpoint raises, one of other shapes, or of other parts.
UNREADABLE = (
    OSError, RuntimeError, ValueError, LookupError, EOFError, UnpicklingError, SafetensorError, CheckpointException,
)  # fmt: skip


def begun(out: Path) -> bool:
    """Whether a folder holds a run, or what one has left, which another would overwrite."""
    log = out / "log.jsonl"
    held = bool(checkpoints(out)) or any((out / name).exists() for name in ("best", SETTINGS))
    return held or (log.is_file() and b'"step"' in log.read_bytes())


def first_difference(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], indifferent: Collection[str]
) -> tuple[str, Any, Any] | None:
    """Of two runs' settings by section, the first that both know and that isn't the same: (SECTION.KEY, the one, the other);
    for data or an adapter that only one has, its section. indifferent: such names that don't count."""
    if sections := sorted(_chosen(saved) ^ _chosen(wanted)):
        was, asked = ("one" if sections[0] in _chosen(each) else "none" for each in (saved, wanted))
        return sections[0], was, asked
    for section, settings in wanted.items():
        for key, value in saved.get(section, {}).items():
            if key in settings and value != settings[key] and f"{section}.{key}" not in indifferent:
                return f"{section}.{key}", value, settings[key]
    return None


def _chosen(settings: Mapping[str, Any]) -> set[str]:
    """The sections that a run may have or not: its data, and an adapter."""
    return {name for name, held in settings.items() if held and (name.endswith("Source") or name == "lora")}


def start_of(init: str, adapter: str) -> dict[str, str]:
    """What tells the weights that a run starts from, by setting; those of a Hub id are downloaded, as for training.

    Errors: ConfigError for weights that can't be had, or are damaged.
    """
    from engine.models import local

    found = {}
    for name, place in (("init", init), ("adapter", adapter)):
        if not place:
            continue
        try:
            folder = Path(place) if only_a_folder(place) else local(place)
        except (OSError, ValueError) as error:
            raise ConfigError(f"Can't load {place}: {' '.join(str(error).split())[:300]}") from None
        found[name] = fingerprint(folder)
    return found


def expect_same(out: Path, wanted: Mapping[str, Any]) -> None:
    """wanted: the settings of a run that goes on, as JSON holds them. Errors: ConfigError for the first that isn't as it was
    begun."""
    if not (out / SETTINGS).exists():
        return
    try:
        saved = json.loads((out / SETTINGS).read_text())
        training, start = saved["training"], saved["start"]
        batches = [training["batch"] * saved["processes"], wanted["training"]["batch"] * wanted["processes"]]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{out / SETTINGS} is damaged: remove it to resume with the current settings.") from None
    if batches[0] != batches[1]:
        raise ConfigError(_begun_otherwise(out, "samples a step", *batches))
    places = ("init", "adapter")  # wherever they lie
    indifferent = {f"training.{name}" for name in (*MAY_CHANGE, *places)}
    compared = {name: held for name, held in wanted.items() if name not in UNCOMPARED}
    if other := first_difference(saved, compared, indifferent):
        raise ConfigError(_begun_otherwise(out, *other))
    named = [wanted["training"][name] for name in places]
    if start != start_of(*named):
        raise ConfigError(
            f"{out} was started from other weights than {' and '.join(filter(None, named))} hold now: restore them, or choose "
            "another folder."
        )


def _begun_otherwise(out: Path, name: str, was: Any, asked: Any) -> str:
    name = name.removeprefix("training.")
    return f"{out} was started with {name} = {was}, not {asked}: restore it, or choose another folder."


def progress(found: list[Path]) -> tuple[int, float]:
    """The last checkpoint's step, and the best score until then. Errors: ConfigError."""
    try:
        told = json.loads((found[-1] / "progress.json").read_text())
        return int(told["step"]), float(told["best"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(_damaged(found)) from None


def take_up(team: Replicas, found: list[Path]) -> None:
    """Errors: ConfigError, in every process, for a last checkpoint that one of them can't read."""
    why = None
    try:
        team.load(found[-1])
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        why = str(error) if isinstance(error, ConfigError) else _damaged(found)
    if reasons := [each for each in gathered(why, team.accelerator) if each]:
        raise ConfigError(reasons[0])


def _damaged(found: list[Path]) -> str:
    then = f"goes on from {found[-2]}" if len(found) > 1 else "begins anew"
    return f"The checkpoint {found[-1]} is damaged, or of another model: remove it, and --resume {then}."
