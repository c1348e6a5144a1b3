"""One table of what methods are worth: trains what isn't trained, tests what isn't tested, writes JSON, Markdown and CSV.

python -m train.table --config train/configs/text/table.yaml
python -m train.table --config train/configs/text/table.yaml --shard 1/2    # and 2/2 beside it

A file lists rows, each a method with its preset and what the row changes in it. All start from one checkpoint and see as
many samples, or the table isn't made. Stopped, it goes on where it was; a run that was made otherwise than the file says is
refused. What a file says: train/trials.py; what runs answer: train/tested.py; figures and words: train/tabulate.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import ConfigError, build, read_yaml, shard_of
from engine.folders import checkpoints
from engine.video import VideoError
from train.command import changed, section, trained
from train.fresh import make
from train.tabulate import tabulate, write
from train.tested import kept, real_problems, tested
from train.trials import START, Table, Trial, asked, finished, start_of, trial, trials


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


def finish(wanted: Trial) -> None:
    """Trains what isn't trained yet."""
    for stage in wanted.stages:
        if not finished(stage):
            out = Path(stage.run.training.out)
            out.mkdir(parents=True, exist_ok=True)
            if not checkpoints(out):
                (out / START).write_text(start_of(stage))
            trained(stage.run, stage.method, stage.validate, resume=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 with one sentence for a bad configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the table's YAML file")
    parser.add_argument("--finished", action="store_true", help="only of the runs that are finished; train nothing")
    parser.add_argument("--rows", nargs="+", action="extend", metavar="NAME", help="only these rows (default: all)")
    parser.add_argument("--shard", default="1/1", help="I/N: train the I-th of N parts of the runs, from 1; the last to finish makes the table")  # fmt: skip
    parser.add_argument("--kept", type=Path, metavar="FOLDER", help="results of runs that aren't here any more, which aren't made again; those made now are added, and the table is written there")  # fmt: skip
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
        results: dict[str, dict[str, Any]] = {}
        for each in made if options.kept else ():
            if found := kept(each, options.kept, table, real):
                results[each.name] = found
        here = [each for each in made if each.name not in results]
        if options.finished:
            here = [each for each in here if all(map(finished, each.stages))]
            made = [each for each in made if each.name in results or each in here]
        elif here:
            prepare(table, options.config.parent, wait=part > 1)
            for each in here[part - 1 :: parts]:
                finish(each)
            if missing := [each.name for each in here if not all(map(finished, each.stages))]:
                print(f"{len(missing)} runs of other shards aren't finished, such as {missing[0]}: no table yet.", file=sys.stderr)  # fmt: skip
                return 0
        if not made:
            raise ConfigError("No run is finished: start the command without --finished.")
        results |= {each.name: tested(each, table.samples, table.batch, real) for each in here}
        if options.kept:
            options.kept.mkdir(parents=True, exist_ok=True)
            for each in here:
                (options.kept / f"{each.name}.json").write_text(json.dumps(results[each.name]) + "\n")
        named = [(each.row.name, results[each.name]) for each in made]
        whole = tabulate({row.name: row.against for row in table.rows}, named)
        said = {"samples_seen": made[0].seen, "samples_tested": len(named[0][1]["answers"]["k"]), "batch": table.batch}
        write((options.kept or Path(table.out)) / options.config.stem, said, whole)
    except (ConfigError, VideoError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
