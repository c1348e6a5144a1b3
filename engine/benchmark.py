"""The embedded benchmark: which clips a split holds, and the shipped methods' scores on them. Clips go through the
training-size drawing, not through mp4 files; a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import worlds
from engine.data.samples import Sample
from engine.data.worlds import Corruption, shown
from engine.evaluation import How, evaluate, summary
from engine.folders import OLD, UNFINISHED
from engine.methods.method import META, expect_slots
from engine.models import SMALL, load

RANGES = {"validation": (1, 6), "test": (1, 6), "longer": (7, 10)}

WRITTEN = "-explicit"  # behind a model's name: its written chain rather than its silent answer


@dataclass(frozen=True)
class Benchmark:
    """`limit` clips: families in turn, difficulties in turn.

    seeds: freshly made clips instead of the split's own. corrupt: what is shown instead of each clip.
    """

    split: str = "test"
    families: tuple[str, ...] = worlds.FAMILIES
    fewest: int | None = None
    most: int | None = None
    limit: int = 500
    seeds: tuple[int, int] | None = None
    corrupt: Corruption = "none"

    def samples(self, records: Sequence[worlds.Record]) -> list[Sample]:
        """The records' questions, each with what is shown of its clip."""
        rngs = map(np.random.default_rng, range(len(records)))
        return [shown(record, self.corrupt, rng) for record, rng in zip(records, rngs, strict=True)]

    def records(self) -> list[worlds.Record]:
        """Errors: ValueError for an empty or impossible choice."""
        if self.split not in RANGES:
            raise ValueError(f"There is no split {self.split!r}: choose one of {', '.join(RANGES)}.")
        for family in self.families:
            if family not in worlds.FAMILIES:
                raise ValueError(f"There is no family {family!r}: choose among {', '.join(worlds.FAMILIES)}.")
        low = RANGES[self.split][0] if self.fewest is None else self.fewest
        high = RANGES[self.split][1] if self.most is None else self.most
        if not 1 <= low <= high:
            raise ValueError(f"Steps {low}:{high}: write the fewest and the most, from 1.")
        first, last = self.seeds or (0, self.limit)
        if self.seeds and not 0 <= first < last:
            raise ValueError(f"Seeds {first}:{last}: no clip is chosen, they need FIRST < LAST, from 0.")
        if self.limit < 1:
            raise ValueError(f"limit {self.limit}: take at least one clip.")
        kind = "fresh" if self.seeds else "validation" if self.split == "validation" else "test"
        made = []
        for seed in range(first, min(last, first + self.limit)):
            family = self.families[seed % len(self.families)]
            difficulty = low + (seed // len(self.families)) % (high - low + 1)
            made.append(worlds.make(family, difficulty, seed, kind))
        return made


def shipped() -> list[str]:
    """The small models that are there, by their folders' names."""
    folders = (file.parent for file in SMALL.glob(f"*/{META}"))
    return sorted(place.name for place in folders if place.suffix not in (UNFINISHED, OLD))


def folder_of(name: str, known: Sequence[str]) -> Path | None:
    """The folder of a shipped model, or of any other; None where there is neither."""
    if name in known:
        return SMALL / name
    return Path(name) if name and Path(name).is_dir() else None


def asked_for(name: str, known: Sequence[str]) -> tuple[Path, bool]:
    """A model's folder, and whether its written chain is meant: WRITTEN is a part of a folder's name where there is one of
    the whole. Errors: ValueError where there is none of either."""
    if folder := folder_of(name, known):
        return folder, False
    if name.endswith(WRITTEN) and (folder := folder_of(name.removesuffix(WRITTEN), known)):
        return folder, True
    raise ValueError(
        f"There is no method {name.removesuffix(WRITTEN)!r}: choose among {', '.join(known)}, or name a folder; NAME{WRITTEN} is a model's written chain."
    )


def measure(
    benchmark: Benchmark, methods: Sequence[str], pauses: int | None, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The figures of each method, and the settings that gave them. A method is a shipped model's name, or a folder; with
    WRITTEN behind it, its written chain. Errors: ValueError for an unknown or missing method, or so many pauses, before
    any clip is made."""
    known = shipped()
    places = {name: asked_for(name, known) for name in methods}
    expect_slots(pauses or 0)
    records = benchmark.records()
    samples = benchmark.samples(records)
    families, difficulties = [r.family for r in records], [r.difficulty for r in records]
    figures = {}
    used = {}
    for name in methods:
        folder, written = places[name]
        model = load(folder, device=device)
        method = model.method
        how: How = "silent" if method.silent and not written else "explicit"
        method.expect(how)
        if not model.taught:
            raise ValueError(
                f"{name} was trained by none of this project's methods: ask it with python -m engine answer."
            )
        count = method.trained_slots if pauses is None or not method.trained_slots else pauses
        used[name] = count if how == "silent" else 0
        say(f"{name}: {len(samples)} clips")
        results = evaluate(model.backbone, samples, method, how, count, model.companions, speak=True)
        figures[name] = summary(results, families, difficulties)
    settings = asdict(benchmark) | {
        "steps": [min(difficulties), max(difficulties)], "clips": len(records), "pauses": used, "device": device,
        "seeds": list(benchmark.seeds) if benchmark.seeds else None,
    }  # fmt: skip
    return {"methods": figures, "settings": settings}
