"""One table of what methods are worth: trains what isn't trained, tests what isn't tested, writes JSON, Markdown and CSV.

python -m train.table --config train/configs/text/table.yaml
python -m train.table --config train/configs/text/table.yaml --shard 1/2    # and 2/2 beside it

A file lists rows, each a method with its preset and what the row changes in it. All start from one checkpoint and see as
many samples, or the table isn't made. Stopped, it goes on where it was; a run that was made otherwise than the file says is
refused. Figures and words: train/tabulate.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine import latents
from engine.backbones.base import Backbone
from engine.config import ConfigError, build, read_yaml, shard_of
from engine.curriculum import step_groups
from engine.data.gsm8k_icot import Gsm8kIcotSource
from engine.data.samples import Sample, context
from engine.data.text_worlds import TextWorldsSource
from engine.data.worlds import WorldsSource
from engine.evaluation import How, Outcome, evaluate, mean
from engine.folders import checkpoints, fingerprint
from engine.insight.similarity import collapse, vocabulary
from engine.layout import Layout, pack
from engine.methods import described, find
from engine.methods.method import Method
from engine.video import VideoError
from train.command import Run, changed, opened, section, trained
from train.fresh import make
from train.heima import Planned, plan
from train.publish import seconds
from train.tabulate import tabulate, write

RESULT = "test.json"  # in a run's folder
START = "start.txt"  # in a run's folder: what tells the weights that it was started from
OWN = {"method", "training", "lora", "validation", "worlds", "text_worlds"}  # a run's sections without a file of data
INDIFFERENT = ("device", "workers", "log_every", "save_every", "keep", "only_eval")  # settings of no effect on a run
SIGNS = "+-*/"
OPERATORS = re.compile(rf"[{re.escape(SIGNS)}]")


@dataclass(frozen=True)
class Row:
    """A method in the table. `changes`: what differs from the preset `config`, which lies beside the table's file."""

    name: str
    method: str  # as `python -m train` takes it
    config: str
    against: str = ""  # the row that is its control
    seeds: int = 1
    changes: dict = field(default_factory=dict)


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


@dataclass(frozen=True)
class Trial:
    """One run of a row: one seed."""

    row: Row
    seed: int
    stages: tuple[Planned, ...]  # one, but for Heima

    @property
    def final(self) -> Planned:
        return [stage for stage in self.stages if not stage.method.frozen][-1]

    @property
    def folder(self) -> Path:
        return Path(self.final.run.training.out)

    @property
    def seen(self) -> int:
        """Samples trained on."""
        trainings = [stage.run.training for stage in self.stages if not stage.method.frozen]
        return sum(training.steps * training.batch for training in trainings)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations over each other, section by section."""
    whole: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, Mapping) else value
    return whole


def folder(row: str, seed: int = 1) -> str:
    """What the run of a row's seed is called."""
    return re.sub(r"\W+", "-", f"{row} {seed}".lower())


def trial(table: Table, place: Path, row: Row, seed: int, init: str = "") -> Trial:
    """A row's run with this seed, ready to train. Errors: ConfigError."""
    preset = read_yaml(place / row.config)
    given = merged(preset, table.shared, row.changes)
    if filed := sorted(({each.name for each in fields(Run)} - OWN) & set(given)):
        raise ConfigError(f"{row.name}: a table is made on the worlds, not on files ({filed[0]}).")
    data = "text_worlds" if "text_worlds" in given else "worlds"
    out = Path(table.out) / folder(row.name, seed)
    own = {"training": {"out": str(out), "seed": seed, **({"init": init} if init else {})}, data: {"seed": seed}}
    values = merged(given, own)
    if "stages" in values:
        return Trial(row, seed, tuple(plan(values)))
    run = build(Run, values)
    return Trial(row, seed, (Planned(run, build(find(row.method), run.method, "method.")),))


def trials(table: Table, place: Path) -> list[Trial]:
    """Every run of the table. Errors: ConfigError for a control that isn't there, for unequal budgets, and for rows that would be
    tested on different problems."""
    names = [row.name for row in table.rows]
    if unknown := [row.against for row in table.rows if row.against and row.against not in names]:
        raise ConfigError(f"There is no row {unknown[0]!r} to hold another against.")
    init = str(trial(table, place, table.base, 0).final.best) if table.base else ""
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


def prepare(table: Table, place: Path, wait: bool = False) -> None:
    """Makes and trains what all rows start from. wait: another shard does. Errors: ConfigError where it hasn't yet."""
    if wait:
        if table.base and not all(map(finished, trial(table, place, table.base, 0).stages)):
            raise ConfigError("The first shard trains what all rows start from: start the others when that is done.")
        return
    start = Path(table.out) / "fresh"
    if table.fresh and not start.exists():
        make(str(start), **asdict(table.fresh))
    if table.base:
        finish(trial(table, place, table.base, 0, str(start) if table.fresh else ""))


def finished(stage: Planned) -> bool:
    """Errors: ConfigError for a run, finished or not, that was made with other settings."""
    out = Path(stage.run.training.out)
    if not (last := checkpoints(out)[-1:]):
        return False
    saved = json.loads((out / "settings.json").read_text())
    data = stage.run.source
    wanted = {
        "training": asdict(stage.run.training),
        "method": described(stage.method),
        type(data).__name__: asdict(data),
        "lora": asdict(stage.run.lora) if stage.run.lora else {},
    }
    sections = {name for name in saved if name.endswith("Source")} | {"lora"} & saved.keys()
    if other := sorted(sections ^ {type(data).__name__, *(["lora"] if stage.run.lora else [])}):
        raise ConfigError(f"{out} was made with another choice of data or of weights to train ({other[0]}): move it away, or set that back.")  # fmt: skip
    if (out / START).exists() and (out / START).read_text() != start_of(stage):
        raise ConfigError(
            f"{out} was started from other weights than {stage.run.training.init} holds now: move it away."
        )
    for name, settings in json.loads(json.dumps(wanted)).items():
        if other := [key for key in differing(saved.get(name, {}), settings) if key not in INDIFFERENT]:
            raise ConfigError(f"{out} was made with another {name}.{other[0]}: move it away, or set that back.")
    return int(last[0].name.removeprefix("step-")) >= stage.run.training.steps


def start_of(stage: Planned) -> str:
    """What tells the weights that a run starts from, where they are files here."""
    training = stage.run.training
    return fingerprint(*(Path(place) for place in (training.init, training.adapter) if place))


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings that both know and that differ."""
    return [key for key, value in saved.items() if key in wanted and value != wanted[key]]


def finish(wanted: Trial) -> None:
    """Trains what isn't trained yet."""
    for stage in wanted.stages:
        if not finished(stage):
            out = Path(stage.run.training.out)
            out.mkdir(parents=True, exist_ok=True)
            if not checkpoints(out):
                (out / START).write_text(start_of(stage))
            trained(stage.run, stage.method, stage.validate, resume=True)


def real_problems(table: Table) -> list[Sample]:
    """GSM8K's, where the table names a file. Errors: ConfigError for one that can't be read."""
    if table.gsm8k is None:
        return []
    source = replace(table.gsm8k, split="test")
    return [source(i) for i in range(len(source))]


def tested(wanted: Trial, count: int, batch: int, real: Sequence[Sample]) -> dict[str, Any]:
    """What a finished run answers to the test problems, and to real ones: as its folder says, or asked now."""
    final, place = wanted.final, wanted.folder / RESULT
    state = {"best": json.loads((final.best / "scores.json").read_text()), "samples": count, "batch": batch}
    if real:
        state["gsm8k"] = hashlib.sha256(repr(real).encode()).hexdigest()
    if place.exists() and (known := json.loads(place.read_text()))["state"] == state:
        return known
    source, method = final.run.source, final.method
    assert isinstance(source, WorldsSource | TextWorldsSource)  # `trial` makes no other
    test = replace(source, split="test", seed=0)
    records = [test.record(i) for i in range(count)]
    asked = [(record.family, record.difficulty, test(i)) for i, record in enumerate(records)]
    base, adapter = (final.run.training.init, str(final.best)) if final.run.lora else (str(final.best), "")
    backbone, companions = opened(base, adapter, method, final.best, final.run.training.device)
    how: How = "silent" if method.silent else "explicit"

    def answered(samples: Sequence[Sample]) -> list[Outcome]:
        return evaluate(backbone, samples, method, how, method.trained_slots, companions, batch)

    results = answered([sample for *_, sample in asked])
    if real:
        asked += [("GSM8K", len(sample.steps), sample) for sample in real]
        results += answered(real)
    answers = [
        {"world": world, "k": k, "correct": each.correct, "seconds": each.seconds, "generated_tokens": each.generated_tokens}
        for (world, k, _), each in zip(asked, results, strict=True)
    ]  # fmt: skip
    held = {}
    if method.trained_slots > 1:
        for world in test.families:
            chosen = [sample for own, _, sample in asked if own == world]
            held[world] = what_slots_hold(backbone, companions, method, chosen, batch)
    took = sum(seconds(Path(s.run.training.out)) for s in wanted.stages if not s.method.frozen)
    found = {"state": state, "slots": results[0].slots, "training_seconds": took, "held": held, "answers": answers}
    place.write_text(json.dumps(found))
    return found


@torch.no_grad()
def what_slots_hold(
    backbone: Backbone, companions: nn.ModuleDict, method: Method, samples: Sequence[Sample], batch: int
) -> dict[str, float | None]:
    """SIM-CoT's measures, means over samples: how alike the thoughts are, and whether they name their steps' operators.

    A slot's thought is what it is fed; of one that rides the prefill, its own last state.
    """
    feedback, count = method.feedback(companions), method.trained_slots
    words = vocabulary(backbone.model.get_input_embeddings().weight)
    measured: dict[str, list[float]] = {"cosine": [], "effective_rank": [], "centre": []}
    said = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        layouts = [Layout({"think": (context(sample), *method.thinking(count))}) for sample in part]
        packed = pack(layouts, backbone.encode, backbone.pad).to(backbone.device)
        last = latents.forward(backbone, packed, feedback)[-1]
        fed_back = packed.latents[packed.slot_sample, packed.slot_row]
        states = last[packed.slot_sample, packed.slot_row - fed_back.long()].unflatten(0, (len(part), count))
        found = collapse((feedback(states) if fed_back.all() else states)[None], words)
        for name, values in measured.items():
            values += found[name][0].tolist()
        said.append(backbone.logits(states))
    whole = torch.cat(said)  # [samples, slots, vocabulary]
    wanted = [operators(sample.steps, count, method.slots_a_step) for sample in samples]
    return {name: mean(values) for name, values in measured.items()} | {
        "operator": share_named(backbone, whole, wanted),
        "by_chance": share_named(backbone, whole, wanted[1:] + wanted[:1]),  # another problem's
    }


def operators(steps: tuple[str, ...], slots: int, each: int = 1) -> list[str]:
    """The operator of the step that each slot stands for, `each` slots a step; "" where it stands for none, or for several."""
    found = [set(OPERATORS.findall(group or "")) for group in step_groups(steps, slots // each, "ignore", "")]
    return ["".join(signs) if len(signs) == 1 else "" for signs in found for _ in range(each)]


def share_named(backbone: Backbone, said: Tensor, wanted: Sequence[Sequence[str]]) -> float | None:
    """Of the slots that stand for an operator, the share whose lens holds it likelier than the others.

    said: logits [samples, slots, vocabulary].
    """
    chosen = [(i, k, SIGNS.index(sign)) for i, row in enumerate(wanted) for k, sign in enumerate(row) if sign]
    if not chosen:
        return None
    sample, slot, true = zip(*chosen, strict=True)
    tokens = [backbone.text_ids(sign)[0] for sign in SIGNS]
    likeliest = said[list(sample), list(slot)][:, tokens].argmax(-1)
    return mean([found == sign for found, sign in zip(likeliest.tolist(), true, strict=True)])


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 with one sentence for a bad configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the table's YAML file")
    parser.add_argument("--finished", action="store_true", help="only of the runs that are finished; train nothing")
    parser.add_argument("--rows", nargs="+", action="extend", metavar="NAME", help="only these rows (default: all)")
    parser.add_argument("--shard", default="1/1", help="I/N: train the I-th of N parts of the runs, from 1; the last to finish makes the table")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", help="what all rows change besides, such as training.precision=no")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the runs and the table (default: the file's)")
    options = parser.parse_args(argv)
    try:
        part, parts = shard_of(options.shard)
        values = read_yaml(options.config)
        for assignment in options.set:
            values |= {"shared": changed(section(values, "shared"), assignment)}
        table = build(Table, values | ({"out": str(options.out)} if options.out else {}))
        made, real = trials(table, options.config.parent), real_problems(table)
        made = [each for each in made if each.row.name in asked(table, options.rows)]
        if options.finished:
            made = [each for each in made if all(map(finished, each.stages))]
        else:
            prepare(table, options.config.parent, wait=part > 1)
            for each in made[part - 1 :: parts]:
                finish(each)
            if missing := [each.folder.name for each in made if not all(map(finished, each.stages))]:
                print(
                    f"{len(missing)} runs of other shards aren't finished, such as {missing[0]}: no table yet.",
                    file=sys.stderr,
                )
                return 0
        if not made:
            raise ConfigError("No run is finished: start the command without --finished.")
        results = [(each.row.name, tested(each, table.samples, table.batch, real)) for each in made]
        whole = tabulate({row.name: row.against for row in table.rows}, results)
        said = {"samples_seen": made[0].seen, "samples_tested": len(results[0][1]["answers"]), "batch": table.batch}
        write(Path(table.out) / options.config.stem, said, whole)
    except (ConfigError, VideoError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
