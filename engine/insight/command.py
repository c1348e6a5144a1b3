"""python -m engine insight: the shipped models studied over a split, each beside matched controls.

The controls are the first model's twin, whose slots were never trained, and the shipped ones. Knows neither how a figure
is drawn nor how a page is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine import models, worlds
from engine.benchmark import RANGES, Benchmark, folder_of, shipped
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource, frames, sample
from engine.evaluation import neighbours
from engine.insight.observe import observe
from engine.insight.report import write
from engine.insight.similarity import vocabulary
from engine.insight.study import beside_controls, study
from engine.insight.subject import Clips, Subject, untrained, words_of
from engine.methods.controls import Silent
from engine.methods.method import MOST_SLOTS

UNTRAINED = "untrained slots"
USUAL = 8  # slots for a model that was never trained with any


def clips_of(records: Sequence[worlds.Record], words: Mapping[str, Sequence[str]]) -> Clips:
    """Clips, with others whose slots are put in the place of theirs: another of the kind ("another clip"), and the same but
    for one event, so that its answer is another ("a changed clip")."""
    samples = [sample(record, frames(record)) for record in records]
    families = [record.family for record in records]
    other = dict(neighbours(families, [record.difficulty for record in records]))
    changed = [worlds.changed(record) for record in records]
    donors: dict[str, list[Sample | None]] = {
        "another clip": [samples[other[i]] if i in other else None for i in range(len(samples))],
        "a changed clip": [sample(record, frames(record)) if record else None for record in changed],
    }
    moments = [[(step.start, step.end) for step in record.steps] for record in records]
    return Clips(samples, families, moments, donors, words)


def folders(names: Sequence[str]) -> dict[str, Path]:
    """The models' folders by name (shipped ones, or folders); without names, of all shipped ones. Errors: ValueError."""
    known = shipped()
    places = {}
    for name in names or known:
        if (folder := folder_of(name, known)) is None:
            raise ValueError(f"There is no model {name!r}: choose among {', '.join(known)}, or name a folder.")
        places[name] = folder
    return places


def subjects(
    places: Mapping[str, Path], chosen: bool, pauses: int | None, device: str
) -> Iterator[tuple[str, Subject]]:
    """The models by name, the first with its twin whose slots were never trained behind it.

    Unless they were chosen, those that have learnt to think in slots: the embedded one first, controls last.
    Errors: ValueError for one that doesn't.
    """
    loaded = {name: models.load(place, device=device) for name, place in places.items()}
    if not chosen:
        able = [name for name, model in loaded.items() if model.method.trained_slots]
        order = {name: (isinstance(loaded[name].method, Silent), name != models.EMBEDDED.name) for name in able}
        loaded = {name: loaded[name] for name in sorted(able, key=order.__getitem__)}
    for number, (name, model) in enumerate(loaded.items()):
        slots = pauses if pauses is not None else model.method.trained_slots or USUAL
        if not model.method.thinking(slots):
            raise ValueError(f"{name} can't be studied with {slots} slots: choose a model that has them.")
        subject = Subject(model.backbone, model.method, slots, model.companions, model.tuned)
        yield name, subject
        if not number and model.method.trained_slots and any(s.role == "slots" for s in model.method.thinking(1)):
            yield f"{name}, {UNTRAINED}", untrained(subject)


def report(
    split: str, limit: int, out: Path, methods: Sequence[str], pauses: int | None, batch: int, device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Studies the models over a split and writes all of it into `out`. -> what was found in short, and the files.

    Errors: ValueError for a choice that can't be studied; OSError for a folder that can't be written.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch}: take at least one clip at a time.")
    if pauses is not None and not 1 <= pauses <= MOST_SLOTS:
        raise ValueError(f"--pauses {pauses}: choose at least one, and at most {MOST_SLOTS}.")
    places = folders(methods)
    records = Benchmark(split, limit=limit).records()
    out.mkdir(parents=True, exist_ok=True)
    source = WorldsSource(difficulties=RANGES[split])
    drawn = [source.record(i) for i in range(limit)]  # other clips, from which probes learn
    lessons = [sample(record, frames(record)) for record in drawn]
    clips = clips_of(records, words_of([*drawn, *records]))
    studied, used = {}, device
    for name, subject in subjects(places, bool(methods), pauses, device):
        used = str(subject.backbone.device)
        seen = observe(subject, clips, batch, lambda line, name=name: say(f"{name}: {line}"))  # type: ignore[misc]
        states = [subject.think(lessons[i : i + batch]).states for i in range(0, limit, batch)]
        learned = torch.cat(states, dim=1).transpose(0, 1).float().cpu().numpy()
        table = vocabulary(subject.backbone.model.get_input_embeddings().weight)
        studied[name] = {"slots": subject.slots, **study(seen, clips, learned, lessons, table)}
    slots = {name: figures["slots"] for name, figures in studied.items()}
    settings = {"split": split, "clips": len(records), "slots": slots, "device": used}
    beside = beside_controls(studied)
    files = write(out, settings, studied, beside)
    brief = {name: {"in_words": m["in_words"], "replacement": m["replacement"]} for name, m in studied.items()}
    return {"settings": settings, "out": str(out), "files": files, "beside_controls": beside, "models": brief}
