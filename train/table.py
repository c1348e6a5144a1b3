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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shutil import copy2, copytree
from typing import Any

from engine.config import ConfigError, build, read_yaml, shard_of
from engine.container import VideoError
from engine.data.samples import Sample
from engine.folders import SETTINGS, as_a_whole
from train.command import changed, trained
from train.fresh import make
from train.tabulate import tabulate, write
from train.tested import keep, kept, real_problems, tested
from train.trials import Table, Trial, asked, differing, finished, trial, trials

START_KEPT = "base"  # the folder among kept results of the model that all rows start from


def prepare(table: Table, place: Path, kept: Path | None, wait: bool) -> None:
    """Makes, trains and keeps what all rows start from. wait: another shard does. Errors: ConfigError where it hasn't yet."""
    start = Path(table.out) / "fresh"
    if table.fresh and not start.exists() and not wait:
        make(str(start), **asdict(table.fresh))
    if table.base:
        base = trial(table, place, table.base, 0, str(start) if table.fresh else "")
        if wait and not all(map(finished, base.stages)):
            raise ConfigError("The first shard trains what all rows start from: start the others when that is done.")
        finish(base)
        if kept and not wait:
            keep_start(base, kept)


def keep_start(base: Trial, kept: Path) -> None:
    """Puts what all rows start from among the kept results, with the settings that made it."""
    with as_a_whole(kept / START_KEPT) as copy:
        copytree(base.final.best, copy)
        copy2(base.folder / SETTINGS, copy)


def kept_start(table: Table, place: Path, kept: Path | None) -> str:
    """The folder of what all rows start from, where it is kept; else "". Errors: ConfigError for one that was made otherwise, or
    doesn't say how."""
    if not (table.base and kept and (kept / START_KEPT).is_dir()):
        return ""
    start, base = kept / START_KEPT, trial(table, place, table.base, 0)
    try:
        saved = json.loads((start / SETTINGS).read_text())
    except (OSError, ValueError):
        raise ConfigError(f"{start / SETTINGS} can't be read: move {start} away.") from None
    if other := differing(saved, base.final, "init"):
        raise ConfigError(f"{start} was made with another {other}: move it away, or set that back.")
    return str(start)


def finish(wanted: Trial) -> None:
    """Trains what isn't trained yet."""
    for stage in wanted.stages:
        if not finished(stage):
            trained(stage.run, stage.method, stage.held_out, resume=True)


def results(
    table: Table, made: Sequence[Trial], place: Path | None, real: Sequence[Sample]
) -> dict[str, dict[str, Any]]:
    """What the runs that are finished here answer, and those whose results are kept in the folder `place`, where all are kept
    from now on. Errors: ConfigError."""
    known = {}
    for each in made:
        if all(map(finished, each.stages)):
            known[each.name] = tested(each, table.samples, table.batch, real)
            if place:
                keep(known[each.name], each, place)
        elif place and (found := kept(each, place, table, real)):
            known[each.name] = found
    return known


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 with one sentence for a bad configuration, or for files that can't be read or written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the table's YAML file")
    parser.add_argument("--finished", action="store_true", help="train nothing: a table of what is finished")
    parser.add_argument("--rows", nargs="+", action="extend", metavar="NAME", help="train only these rows (default: all)")  # fmt: skip
    parser.add_argument("--shard", default="1/1", help="I/N: train the I-th of N parts of the runs, from 1")
    parser.add_argument("--kept", type=Path, metavar="FOLDER", help="the table, every run's result and the model that all start from go there; what is there isn't made again")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", help="a setting of all runs, whatever the file says, such as training.precision=no")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the runs, and of the table without --kept (default: the file's)")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        part, parts = shard_of(options.shard)
        given: dict[str, Any] = {}
        for assignment in options.set:
            given = changed(given, assignment)
        values = read_yaml(options.config) | {"given": given}
        table = build(Table, values | ({"out": str(options.out)} if options.out else {}))
        if options.kept:
            if options.kept.exists() and not options.kept.is_dir():
                raise ConfigError(f"--kept {options.kept} is no folder.")
            options.kept.mkdir(parents=True, exist_ok=True)
        start = kept_start(table, options.config.parent, options.kept)
        made, real = trials(table, options.config.parent, start), real_problems(table)
        mine = [each for each in made if each.row.name in asked(table, options.rows)][part - 1 :: parts]
        known = results(table, made, options.kept, real)
        if not options.finished and any(each.name not in known for each in mine):
            if not start:
                prepare(table, options.config.parent, options.kept, wait=part > 1)
            known = results(table, made, options.kept, real)  # kept ones must have started from what there is now
            for each in mine:
                if each.name not in known:
                    finish(each)
                    tested(each, table.samples, table.batch, real)
            known = results(table, made, options.kept, real)
        if not known:
            raise ConfigError("No run is finished: start the command without --finished.")
        if missing := [each.name for each in made if each.name not in known]:
            print(f"{len(missing)} runs aren't finished, such as {missing[0]}: the table is of the others.", file=sys.stderr)  # fmt: skip
        named = [(each.row.name, known[each.name]) for each in made if each.name in known]
        whole = tabulate({row.name: row.against for row in table.rows}, named)
        said = {"samples_seen": made[0].seen, "samples_tested": len(named[0][1]["answers"]["k"]), "batch": table.batch}
        write((options.kept or Path(table.out)) / options.config.stem, said, whole)
    except (ConfigError, VideoError, FloatingPointError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
