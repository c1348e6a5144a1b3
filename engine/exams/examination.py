"""Runs a model on a real benchmark: one answer per line, resumable, shard by shard, then scores.

The folder holds `answers-1-of-4.jsonl` for each shard: the settings, then an answer a line, written as soon as its batch is
done. A line that a kill has torn is dropped. When the last shard is done, `summary.json` holds the scores of all. Clips are
read while the batch before them is answered; one that can't be read is named in its line, and counts as wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from engine import ask, models
from engine.config import ConfigError
from engine.data.samples import Sample, answer_of, looked_at
from engine.evaluation import mean, respond
from engine.exams import scores
from engine.exams.protocols import PROTOCOLS, Graded, Protocol, Question, questions, summary
from engine.exams.scores import Judge
from engine.folders import fingerprint, write_whole
from engine.footage import Footage
from engine.insight import spoken
from engine.layout import Frames
from engine.methods.method import expect_slots
from engine.video import Sampling

IMAGE_PIXELS = 1024 * 28 * 28
Mode = Literal["silent", "explicit", "spoken"]
Line = dict[str, Any]


@dataclass(frozen=True)
class Examination:
    """What decides the answers; those of other settings are never gone on with.

    mode: silent = after the slots; spoken = the same, and the thoughts are said too; explicit = behind a written chain.
    pauses: slots of a silent answer. hints: a sentence behind each question says in which form to answer; without, it is
    asked as it stands, as LLaVA-CoT's and Heima's training data has it. limit: so many questions, from the first. longest:
    most tokens of what is written. judge: the name of the user's own, where there is one.
    """

    name: str
    file: str
    media: str
    model: str
    adapter: str
    mode: Mode
    pauses: int
    sampling: Sampling
    hints: bool = True
    limit: int | None = None
    longest: int = 1024
    judge: str = ""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit {self.limit}: ask at least one question.")
        if self.longest < 1:
            raise ConfigError(f"longest {self.longest}: let at least one token be written.")
        expect_slots(self.pauses)


def protocol_of(name: str, judge: Judge | None) -> Protocol:
    """Errors: ConfigError for a benchmark that isn't known, or one that needs a judge and has none."""
    if name not in PROTOCOLS:
        raise ConfigError(f"There is no benchmark {name!r}: choose one of {', '.join(PROTOCOLS)}.")
    if PROTOCOLS[name].judged and judge is None:
        raise ConfigError(f"{name} needs a judge: name a function of your own with --judge MODULE:FUNCTION.")
    return PROTOCOLS[name]


def sampling(model: models.Model, name: str, given: Mapping[str, Any]) -> Sampling:
    """How clips are looked at: as the model was trained, but for what is given. Others' models see images larger.

    All benchmarks but Video-R1's are of images; its own are read at the size of its frames."""
    usual = model.sampling_of(still=name != "video-r1")
    if name != "video-r1" and not model.taught:
        usual = replace(usual, pixels=IMAGE_PIXELS)
    return replace(usual, **given)


def examine(
    model: models.Model, exam: Examination, out: Path, shard: tuple[int, int] = (1, 1), resume: bool = False, batch: int = 8,
    judge: Judge | None = None, say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Answers a shard's questions, and sums up: all of them if this was the last shard, else this one.

    Errors: ConfigError for a file, a model or a folder that can't be used, before anything is answered; ValueError for a
    judge that fails, behind what was answered until then.
    """
    protocol_of(exam.name, judge)
    model.method.expect("explicit" if exam.mode == "explicit" else "silent")
    if exam.mode == "spoken" and not spoken.speaks(model.method, model.companions):
        raise ConfigError("This model can't put its thoughts into words: ask for its silent answer.")
    asked = questions(exam.name, exam.file, exam.media)[: exam.limit]
    if exam.name == "video-r1" and any(each.kind == "free-form" for each in asked):
        scores.rouge("", "")  # says what to install now rather than hours later
    if batch < 1:
        raise ConfigError(f"batch {batch}: answer at least one question at a time.")
    for still in {each.still for each in asked if each.media}:
        # One that has no eyes, or none for videos, says so before the first question.
        model.backbone.see(Frames(np.zeros((1, 224, 224, 3), np.uint8), 1.0, still))
    settings = described(exam, model)
    out.mkdir(parents=True, exist_ok=True)
    place, (part, parts) = path(out, *shard), shard
    if place.exists() and not resume:
        raise ConfigError(f"{place} is there already: go on with --resume, or choose another --out.")
    known = {name for name, line in begin(place, settings).items() if not line["problem"]}
    waiting = [each for each in asked[part - 1 :: parts] if each.id not in known]
    say(f"{exam.name}: {len(waiting)} questions to answer, {len(known)} answered before")
    with place.open("a", encoding="utf-8") as file:
        done = 0
        for ready in batches(model, exam, waiting, batch):
            for line in answered(model, exam, ready, judge):
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done += len(ready)
            say(f"{exam.name}: {done} of {len(waiting)}")
    return merged(exam.name, asked, out, settings, shard)


def path(out: Path, part: int, parts: int) -> Path:
    return out / f"answers-{part}-of-{parts}.jsonl"


def described(exam: Examination, model: models.Model) -> dict[str, Any]:
    """What decides the answers, as JSON. The benchmark's file, and the model's, are known by their content, wherever they and
    the clips lie."""
    content = hashlib.sha256(Path(exam.file).read_bytes()).hexdigest()[:16]
    told = asdict(exam) | {"file": Path(exam.file).name, "content": content}
    told |= {"taught": model.taught, "weights": fingerprint(*model.folders)}
    return json.loads(json.dumps({name: value for name, value in told.items() if name != "media"}))


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The settings that decide the answers and aren't the same; where the weights lie doesn't decide them."""
    return [name for name in ours if name not in ("model", "adapter") and ours[name] != theirs.get(name)]


@dataclass(frozen=True)
class Answers:
    """A shard's file. settings: None where its head isn't whole. lines: by question; of two the later. length: in bytes,
    up to the end of the last whole line."""

    settings: Mapping[str, Any] | None
    lines: Mapping[str, Line]
    length: int


def kept(place: Path) -> Answers:
    """What a shard's file holds, of one that another process is writing too. Errors: ConfigError."""
    whole = place.read_bytes() if place.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    if not whole:
        return Answers(None, {}, 0)
    try:
        head, *lines = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
        return Answers(dict(head["settings"]), {line["id"]: line for line in lines}, len(whole))
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{place} is no file of answers: choose another --out.") from None


def begin(place: Path, settings: Mapping[str, Any]) -> Mapping[str, Line]:
    """Makes a shard's file ready to be added to: -> the answers that it holds.

    A torn last line is cut off, so that the next one begins on a line of its own. Errors: ConfigError for other settings,
    or a file that isn't ours.
    """
    found = kept(place)
    if found.settings is None:
        place.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return {}
    if other := differing(settings, found.settings):
        theirs, ours = (repr(each.get(other[0]))[:60] for each in (found.settings, settings))
        raise ConfigError(
            f"{place} was answered with another {other[0]} ({theirs}, not {ours}): set it back, or choose another --out."
        )
    os.truncate(place, found.length)
    return found.lines


Ready = list[tuple[Question, Sample | str]]  # a batch: each question with its clip, or what is wrong with that


def batches(model: models.Model, exam: Examination, waiting: Sequence[Question], size: int) -> Iterator[Ready]:
    """The questions with their clips, each batch read while the one before is answered."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as reader:
        parts = [waiting[i : i + size] for i in range(0, len(waiting), size)]

        def prepared(part: Sequence[Question]) -> Ready:
            return [(each, seen(model, exam, each, Path(folder))) for each in part]

        ahead = [reader.submit(prepared, part) for part in parts[:1]]
        for number in range(len(parts)):
            ready = ahead.pop().result()
            ahead += [reader.submit(prepared, part) for part in parts[number + 1 : number + 2]]
            yield ready


def seen(model: models.Model, exam: Examination, question: Question, folder: Path) -> Sample | str:
    """The question as it is put to the model, what it shows decoded and cut; or what is wrong with that."""
    kind = question.kind if exam.hints else "as asked"
    sample = ask.posed(model, None, question.text, question.options, kind, exam.mode == "explicit")
    try:
        files = [each if isinstance(each, Path) else laid(each, folder, i) for i, each in enumerate(question.media)]
        shown = tuple(Footage(file, exam.sampling, question.still) for file in files)
        return looked_at(replace(sample, visual=shown), model.backbone.see)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())


def laid(picture: bytes, folder: Path, number: int) -> Path:
    """A picture in a file, in place of the last question's."""
    place = folder / f"picture-{number}"
    place.write_bytes(picture)
    return place


def answered(model: models.Model, exam: Examination, part: Ready, judge: Judge | None) -> Iterator[Line]:
    """A line for each question. Errors: ValueError for a judge that fails."""
    good = [(question, given) for question, given in part if isinstance(given, Sample)]
    told = {}
    if good:
        how: Literal["silent", "explicit"] = "explicit" if exam.mode == "explicit" else "silent"
        replies = respond(
            model.backbone, [given for _, given in good], model.method, how, exam.pauses, model.companions,
            exam.mode == "spoken", exam.longest,
        )  # fmt: skip
        told = {question.id: reply for (question, _), reply in zip(good, replies, strict=True)}
    for question, given in part:
        line: Line = {"id": question.id, "true": question.true, "kind": question.kind}
        if isinstance(given, str):
            yield line | {"problem": given, "score": 0.0}
            continue
        reply = told[question.id]
        said = answer_of(reply.text, model.dialect)
        yield line | {
            "problem": None, "answer": said, "score": PROTOCOLS[exam.name].score(said, question, judge),
            **asdict(reply),
        }  # fmt: skip


def merged(
    name: str, asked: Sequence[Question], out: Path, settings: Mapping[str, Any], shard: tuple[int, int]
) -> dict[str, Any]:
    """The summary of all shards if each is done, else of this one; the first is kept as `summary.json`.

    Errors: ConfigError for a shard that was answered with other settings.
    """
    part, parts = shard
    lines: dict[str, Line] = {}
    for number in range(1, parts + 1):
        found = kept(path(out, number, parts))
        if found.settings is not None and differing(settings, found.settings):
            raise ConfigError(f"{path(out, number, parts)} was answered with other settings: choose another --out.")
        lines |= found.lines
    complete = all(question.id in lines for question in asked)
    chosen = [question for question in (asked if complete else asked[part - 1 :: parts]) if question.id in lines]
    good = [lines[question.id] for question in chosen if not lines[question.id]["problem"]]
    told = summary(name, [Graded(question, lines[question.id]["score"]) for question in chosen]) | {
        "complete": complete,
        "shard": None if complete else f"{part}/{parts}",
        "unread": len(chosen) - len(good),
        **{figure: mean([line[figure] for line in good]) for figure in ("generated_tokens", "slots", "seconds")},
        "settings": dict(settings),
    }
    if complete:
        write_whole(out / "summary.json", json.dumps(told, indent=1) + "\n")
    return told
