"""Procedural worlds: seeded clips with an exact question, options, written steps and answer.

`make` decides a clip, `draw` shows it at any moments and size, `write` films it, `as_json` tells it.
Each family is one file with four functions: `sample` (what happens), `others` (what else could have), `tell` (the words),
`painter` (the pictures).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from engine.worlds import cups, relay, tally
from engine.worlds.film import film
from engine.worlds.paint import View
from engine.worlds.record import LETTERS, LONGEST, SPLITS, Record, Step, bucket, timed

__all__ = ["FAMILIES", "SPLITS", "Record", "Step", "as_json", "changed", "draw", "make", "write"]

_WORLDS = {"cups": cups, "relay": relay, "tally": tally}
FAMILIES = tuple(_WORLDS)


def make(family: str, difficulty: int, seed: int, split: str, practice: tally.Practice = tally.WHOLE) -> Record:
    """The clip that these name, always the same: `difficulty` steps (1 to 10), any seed from 0.

    `split` is train, validation, test or fresh; fresh clips share the test's trajectories but not its seeds.
    practice: of tally, in training alone; elsewhere the whole.
    Raises ValueError on anything else.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no world {family!r}; choose one of {', '.join(FAMILIES)}.")
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if not 1 <= difficulty <= LONGEST:
        raise ValueError(f"A clip has 1 to {LONGEST} steps, not {difficulty}.")
    if seed < 0:
        raise ValueError(f"A seed is a whole number from 0, not {seed}.")
    if not (2 <= practice.digits <= 10 and 0 < practice.orange <= 0.5) or (
        practice != tally.WHOLE and split != "train"
    ):
        raise ValueError(
            f"Tally has 2 to 10 digits in training, of which orange are above 0 and up to 0.5, and 10 and 0.5 elsewhere, not {practice}."
        )
    world, part = _WORLDS[family], "test" if split == "fresh" else split
    rng = np.random.default_rng([SPLITS.index(split), FAMILIES.index(family), difficulty, seed])
    # Every world is asked alike: cups and relay need no part (tally picks its handwriting by it), no practice nor, to tell, chance.
    scene = world.sample(rng, difficulty, part, lambda trajectory: bucket((family, *trajectory)) == part, practice)
    question, options, texts, answer = world.tell(scene, rng)
    options = tuple(options[i] for i in rng.permutation(len(options)))
    letter = LETTERS[options.index(answer)]
    steps = timed([*texts, f"so {answer} {letter}"])
    return Record(family, split, seed, difficulty, question, options, steps, answer, letter, steps[-1].end, scene)


def changed(record: Record) -> Record | None:
    """The same clip but for one event, so that another of its options is true: same look, same question, same split.

    Which event, and what happens instead, the record's seed decides. None where no such clip is in the split.
    """
    world, part = _WORLDS[record.family], "test" if record.split == "fresh" else record.split
    rng = np.random.default_rng([record.seed, record.difficulty])
    for event in rng.permutation(record.difficulty).tolist():
        scenes = list(world.others(record.scene, event, part))
        for place in rng.permutation(len(scenes)).tolist():
            scene = scenes[place]
            _, _, texts, answer = world.tell(scene, rng)
            told = answer in record.options and answer != record.answer
            if told and bucket((record.family, *scene.trajectory)) == part:
                letter = LETTERS[record.options.index(answer)]
                steps = timed([*texts, f"so {answer} {letter}"])
                return replace(record, steps=steps, answer=answer, letter=letter, scene=scene)
    return None


def draw(record: Record, times: Sequence[float] | np.ndarray, height: int, width: int) -> np.ndarray:
    """The clip at these times (seconds), uint8 RGB [times, height, width, 3]; times beyond the clip show its ends.

    Pictures lower than 200 pixels are drawn double and averaged down.
    """
    frames = list(_frames(record, times, height, width))
    return np.stack(frames) if frames else np.empty((0, height, width, 3), np.uint8)


def write(record: Record, path: str | os.PathLike[str], width: int = 504, height: int = 336, fps: int = 24) -> None:
    """Film the clip into an H.264 mp4 that browsers play. Raises ValueError, in one sentence, if that can't be done."""
    times = np.arange(round(record.duration * fps)) / max(fps, 1)
    film(_frames(record, times, height, width), path, width, height, fps)


def as_json(record: Record) -> dict[str, Any]:
    """All of a clip but its scene, in JSON's own types; family, difficulty, seed and split make it again."""
    kept = {name: value for name, value in vars(record).items() if name not in ("scene", "steps", "options")}
    return {**kept, "options": list(record.options), "steps": [asdict(step) for step in record.steps]}


def _frames(record: Record, times: Iterable[float], height: int, width: int) -> Iterator[np.ndarray]:
    import cv2

    double = height < 200
    view = View(2 * height, 2 * width) if double else View(height, width)
    canvas_at = _WORLDS[record.family].painter(record.scene, view)
    drawn: np.ndarray | None = None
    for time in times:
        canvas = canvas_at(float(time))
        if canvas is not drawn:  # moments that look alike share one
            small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA) if double else canvas
            drawn, picture = canvas, np.clip(small + 0.5, 0, 255).astype(np.uint8)
        yield picture
