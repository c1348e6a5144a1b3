"""The command line: python -m engine world | answer | evaluate | insight. JSON on stdout, messages on stderr, exit 0 or 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any


def world(options: argparse.Namespace) -> dict[str, Any]:
    from engine import worlds

    record = worlds.make(options.family, options.steps, options.seed, "fresh")
    worlds.write(record, options.out)
    return {**worlds.as_json(record), "clip": options.out}


def quiet() -> None:
    """Keeps the library's progress bars off stderr, which is for our sentences."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def answer(options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from engine import ask
    from engine.video import read

    quiet()
    ask.check(options.question, options.option, options.pauses)
    model = ask.load(options.model, options.adapter, options.device)
    chosen = {
        name: getattr(options, name) for name in ("fps", "frames", "pixels") if getattr(options, name) is not None
    }
    sampling = replace(model.sampling, **chosen)
    began = time.perf_counter()
    clip = read(options.clip, sampling)
    video = time.perf_counter() - began
    print(f"{clip.reader} read {len(clip.frames)} frames of {options.clip}", file=sys.stderr)
    reply = ask.ask(model, clip, options.question, options.option, options.pauses, not options.silent)
    return ask.as_json(reply, video) | {"sampling": asdict(sampling)}


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from engine.benchmark import Benchmark, measure

    quiet()
    families = tuple(options.families.split(","))
    low, high = span(options.steps, "--steps") if options.steps else (None, None)
    seeds = span(options.seeds, "--seeds") if options.seeds else None
    methods = options.methods.split(",")
    benchmark = Benchmark(options.split, families, low, high, options.limit, seeds)
    return measure(benchmark, methods, options.pauses, options.device, lambda line: print(line, file=sys.stderr))


def insight(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from engine.insight.command import report

    quiet()
    methods = options.methods.split(",") if options.methods else []
    return report(
        options.split, options.limit, Path(options.out), methods, options.pauses, options.batch, options.device,
        lambda line: print(line, file=sys.stderr),
    )  # fmt: skip


def span(text: str, flag: str) -> tuple[int, int]:
    """FIRST:LAST as two whole numbers. Errors: ValueError."""
    first, colon, last = text.partition(":")
    try:
        return int(first), int(last if colon else first)
    except ValueError:
        raise ValueError(f"{flag} {text}: write it as FIRST:LAST, two whole numbers.") from None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)

    film = verbs.add_parser("world", help="film a new clip and print its record")
    film.add_argument("family", help="cups, relay or tally")
    film.add_argument("--steps", type=int, default=4, help="1 to 10 (the small model was trained on 1 to 6)")
    film.add_argument("--seed", type=int, default=0)
    film.add_argument("--out", required=True, help="the mp4 to write")
    film.set_defaults(run=world)

    ask = verbs.add_parser("answer", help="answer a question about a clip")
    ask.add_argument("clip")
    ask.add_argument("question")
    ask.add_argument(
        "--option", action="append", default=[], help="an option's text; repeat it; none = an open question"
    )
    ask.add_argument("--pauses", type=int, default=8, help="thinking slots")
    ask.add_argument("--model", help="folder or Hub id (default: the small model that ships)")
    ask.add_argument("--adapter", help="PEFT adapter to merge in")
    ask.add_argument("--silent", action="store_true", help="don't answer by the written chain too")
    ask.add_argument("--fps", type=float, help="frames a second to look at")
    ask.add_argument("--frames", type=int, help="exact number of frames, evenly over the clip")
    ask.add_argument("--pixels", type=int, help="most pixels a frame")
    ask.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    ask.add_argument("--json", action="store_true", help="print JSON (the default, and the only form)")
    ask.set_defaults(run=answer)

    score = verbs.add_parser("evaluate", help="score the shipped models on the worlds")
    score.add_argument("--split", default="test", choices=["test", "longer", "validation"])
    score.add_argument("--seeds", help="FIRST:LAST (LAST excluded): freshly made clips instead of a split's")
    score.add_argument("--methods", default="pause,explicit,answer-only,filler")
    score.add_argument("--families", default="cups,relay,tally")
    score.add_argument("--steps", help="A:B, both included (default: the split's range)")
    score.add_argument("--pauses", type=int, help="default: the trained number")
    score.add_argument("--limit", type=int, default=500, help="clips")
    score.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    score.add_argument("--json", action="store_true", help="print JSON (the default, and the only form)")
    score.set_defaults(run=evaluate)

    study = verbs.add_parser("insight", help="what the slots of the shipped models hold, and whether they matter")
    study.add_argument("--split", default="test", choices=["test", "longer", "validation"])
    study.add_argument("--limit", type=int, default=500, help="clips")
    study.add_argument("--out", required=True, help="folder for JSON, CSV, figures and one HTML page")
    study.add_argument("--methods", help="shipped models, or folders (default: all shipped models with slots)")
    study.add_argument("--pauses", type=int, help="default: the trained number")
    study.add_argument("--batch", type=int, default=32, help="clips at a time")
    study.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    study.add_argument("--json", action="store_true", help="print JSON (the default, and the only form)")
    study.set_defaults(run=insight)
    return top


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = parser().parse_args(argv)
    try:
        print(json.dumps(options.run(options), indent=1))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
