"""What a table's file says: rows, and the runs that they stand for, ready to train; whether a run is one of them, and finished.

Knows neither how a run is tested nor what the table looks like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from engine.config import ConfigError, at_least, build, read_yaml
from engine.data.gsm8k_icot import Gsm8kIcotSource
from engine.data.text_worlds import TextWorldsSource
from engine.data.worlds import WorldsSource
from engine.folders import SETTINGS, checkpoints
from engine.methods import described, find
from engine.resume import INDIFFERENT, first_difference, start_of
from train.command import Run, over, section
from train.heima import Planned, plan

OWN = {"method", "training", "lora", "validation", "worlds", "text_worlds"}  # a run's sections without a file of data


@dataclass(frozen=True)
class Row:
    """A method in the table. `changes`: what differs from the preset `config`, which lies beside the table's file."""

    name: str
    method: str  # as `python -m train` takes it
    config: str
    against: str = ""  # the row that is its control
    seeds: int = 1
    changes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(1, self, "seeds", where=f"{self.name}: ")


@dataclass(frozen=True)
class Fresh:
    """The untrained model that the base starts from, as train/fresh.py makes it."""

    family: Literal["gpt2", "llama", "qwen2_5_vl"] = "llama"
    layers: int = 4
    hidden: int = 128


@dataclass(frozen=True)
class Table:
    """A table's file. `shared`: what all rows change in their presets (the budget, the data).

    fresh, base: the model that all rows start from, made and trained first; without them, what the presets name.
    gsm8k: problems of a file, to test on besides: what was learnt on the worlds, on real ones.
    """

    out: str
    rows: tuple[Row, ...]
    shared: dict = field(default_factory=dict)
    fresh: Fresh | None = None
    base: Row | None = None
    samples: int = 1200  # to test on, about as many of every world and number of steps
    batch: int = 100
    gsm8k: Gsm8kIcotSource | None = None
    given: dict = field(default_factory=dict)  # settings by section that hold for every run, whatever the file says

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("rows: a table needs at least one.")
        at_least(1, self, "samples", "batch")
        by_folder: dict[str, str] = {}
        for row in self.rows:
            if (folder := run_name(row.name)) in by_folder:
                both = f"{by_folder[folder]!r} and {row.name!r}"
                raise ConfigError(f"Rows {both} would share a folder: give each a name of its own.")
            by_folder[folder] = row.name


@dataclass(frozen=True)
class Trial:
    """One run of a row: one seed."""

    row: Row
    seed: int
    stages: tuple[Planned, ...]  # one, but for Heima

    @property
    def learnt(self) -> list[Planned]:
        """The stages in which the model itself learns."""
        return [stage for stage in self.stages if not stage.method.frozen]

    @property
    def final(self) -> Planned:
        return self.learnt[-1]

    @property
    def name(self) -> str:
        return run_name(self.row.name, self.seed)

    @property
    def folder(self) -> Path:
        return Path(self.final.run.training.out)

    @property
    def seen(self) -> int:
        """Samples trained on."""
        return sum(stage.run.training.steps * stage.run.training.batch for stage in self.learnt)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations over each other, section by section. Errors: ConfigError for a section that is a list or a single value."""
    whole: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            whole[key] = over(section(whole, key), dict(value)) if isinstance(value, Mapping) else value
    return whole


def run_name(row: str, seed: int = 1) -> str:
    """What the run of a row's seed is called."""
    return re.sub(r"\W+", "-", f"{row} {seed}".lower())


def trial(table: Table, place: Path, row: Row, seed: int, init: str = "") -> Trial:
    """A row's run with this seed, ready to train. Errors: ConfigError."""
    preset = read_yaml(place / row.config)
    given = merged(preset, table.shared, row.changes)
    if filed := sorted(({each.name for each in fields(Run)} - OWN) & set(given)):
        raise ConfigError(f"{row.name}: a table is made on the worlds, not on files ({filed[0]}).")
    data = "text_worlds" if "text_worlds" in given else "worlds"
    out = Path(table.out) / run_name(row.name, seed)
    own: dict[str, dict[str, Any]] = {
        "training": {"out": str(out), "seed": seed, **({"init": init} if init else {})},
        data: {"seed": seed},
    }
    if settled := [f"{part}.{key}" for part, held in own.items() for key in held if key in table.given.get(part, {})]:
        raise ConfigError(f"--set {settled[0]}: that is the table's own choice.")
    values = merged(given, own, table.given)
    if "stages" in values:
        return Trial(row, seed, tuple(plan(values, table.given)))
    run = build(Run, values)
    return Trial(row, seed, (Planned(run, build(find(row.method), run.method, "method.")),))


def trials(table: Table, place: Path, start: str = "") -> list[Trial]:
    """Every run of the table. start: the folder of the model that all start from, if the base isn't made here.

    Errors: ConfigError for a control that isn't there, for unequal budgets, and for rows that would be tested on different
    problems."""
    names = [row.name for row in table.rows]
    if unknown := [row.against for row in table.rows if row.against and row.against not in names]:
        raise ConfigError(f"There is no row {unknown[0]!r} to hold another against.")
    init = start or (str(trial(table, place, table.base, 0).final.best) if table.base else "")
    most = max(row.seeds for row in table.rows)  # every row's first seed comes first
    made = [trial(table, place, row, s, init) for s in range(1, most + 1) for row in table.rows if s <= row.seeds]
    first = made[0]
    for other in made:
        if other.seen != first.seen:
            raise ConfigError(
                f"{other.row.name} sees {other.seen} samples and {first.row.name} {first.seen}: give all rows one budget."
            )
        if problems(other) != problems(first):
            raise ConfigError(f"{other.row.name} and {first.row.name} would be tested on different problems: give all rows the same worlds and steps.")  # fmt: skip
    return made


def asked(table: Table, rows: Sequence[str] | None) -> Sequence[str]:
    """The rows that were named, or all. Errors: ConfigError for a name that no row has."""
    names = [row.name for row in table.rows]
    if unknown := [row for row in rows or () if row not in names]:
        raise ConfigError(f"There is no row {unknown[0]!r}: choose among {', '.join(names)}.")
    return rows or names


def problems(wanted: Trial) -> Sequence[object]:
    """What decides a row's test problems."""
    source = wanted.final.run.source
    assert isinstance(source, WorldsSource | TextWorldsSource)  # `trial` makes no other
    return type(source), source.families, source.difficulties


def finished(stage: Planned) -> bool:
    """Errors: ConfigError for a run, finished or not, that was made with other settings."""
    training = stage.run.training
    out = Path(training.out)
    if not (last := checkpoints(out)[-1:]):
        return False
    saved = json.loads((out / SETTINGS).read_text())
    if saved["start"] != start_of(training.init, training.adapter):
        raise ConfigError(f"{out} was started from other weights than {training.init} holds now: move it away.")
    if other := differing(saved, stage):
        raise ConfigError(f"{out} was made with another {other}: move it away, or set that back.")
    return int(last[0].name.removeprefix("step-")) >= training.steps


def settings_of(stage: Planned) -> dict[str, dict[str, Any]]:
    """A run's settings by section, as JSON holds them."""
    data = stage.run.source
    return json.loads(json.dumps({
        "training": asdict(stage.run.training), "method": described(stage.method), type(data).__name__: asdict(data),
        "lora": asdict(stage.run.lora) if stage.run.lora else {},
    }))  # fmt: skip


def differing(saved: Mapping[str, Any], stage: Planned, *indifferent: str) -> str:
    """The first section of a run's settings that isn't this stage's, or setting, as SECTION.KEY, that both know and that isn't;
    "" where all are. Where weights lie doesn't matter, if they are here, since they are told by `start_of`."""
    indifferent += (*INDIFFERENT, *(("init", "adapter") if Path(stage.run.training.init).is_dir() else ()))
    other = first_difference(saved, settings_of(stage), {f"training.{name}" for name in indifferent})
    return other[0] if other else ""
