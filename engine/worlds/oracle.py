"""An oracle: classical vision that answers from the frames alone, and so proves that the clips tell their answers.

It knows how the worlds look and the rules, and sees nothing of a clip but sampled pictures, their times, the question
and the options. It wants pictures of 504x336 (84x56 do, if they weren't compressed) at 4 frames a second, so that one
falls on the middle of each step.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from engine.worlds import cups, relay, tally
from engine.worlds.paint import ASPECT
from engine.worlds.record import INTRO, LETTERS, STEP

GRID = 43  # side of the grid on which digits are compared


def solve(frames: np.ndarray, times: Sequence[float], question: str, options: Sequence[str]) -> str:
    """The letter of the answer, from frames uint8 RGB [T, height, width, 3], 3:2, at `times` (seconds).

    Raises ValueError for a question of no world.
    """
    film = _Film(frames, times)
    if question == cups.QUESTION:
        answer = _follow_ball(film, len(options))
    elif question == relay.QUESTION:
        answer = _follow_star(film, options)
    elif question == tally.QUESTION:
        answer = _count(film)
    else:
        raise ValueError("The oracle only knows the questions of cups, relay and tally.")
    return LETTERS[list(options).index(answer)]


class _Film:
    """Pictures by time."""

    def __init__(self, frames: np.ndarray, times: Sequence[float]) -> None:
        self.frames, self.times = frames, np.asarray(times)
        self.steps = int((self.times[-1] - INTRO) / STEP)

    def at(self, time: float) -> np.ndarray:
        """The picture nearest to a time, float32 [height, width, 3]."""
        return self.frames[int(np.abs(self.times - time).argmin())].astype(np.float32)

    def start(self, step: int) -> np.ndarray:
        return self.at(INTRO + step * STEP)

    def middle(self, step: int) -> np.ndarray:
        return self.at(INTRO + (step + 0.5) * STEP)


def _patch(picture: np.ndarray, x: float, half: float, top: float, bottom: float) -> np.ndarray:
    """The part from `half` left of x to `half` right of it, from top to bottom, in scene units."""
    height = picture.shape[0]
    left = round((x - half) * height)
    return picture[round(top * height) : round(bottom * height), left : max(round((x + half) * height), left + 1)]


def _follow_ball(film: _Film, count: int) -> str:
    """The ball lies where the intro differs most from the start; the two places bare in mid-step have swapped."""
    homes = [ASPECT / 2 + (place - (count - 1) / 2) * cups.SPACING[count] for place in range(count)]
    shown, rest = film.at(0.0), film.start(0)
    low, high = (cups.BASE - 0.20, cups.BASE - 0.02), (cups.BASE - 0.36, cups.BASE - 0.24)
    change = [np.abs(_patch(shown, x, 0.06, *low) - _patch(rest, x, 0.06, *low)).mean() for x in homes]
    ball = int(np.argmax(change))
    gap = homes[0] + cups.SPACING[count] / 2  # between two cups the table is seen
    table = np.median(_patch(rest, gap, 0.02, *high), axis=(0, 1))
    for step in range(film.steps):
        bare = []
        for x in homes:
            cup = np.median(_patch(rest, x, 0.015, *high), axis=(0, 1))
            seen = np.median(_patch(film.middle(step), x, 0.015, *high), axis=(0, 1))
            bare.append(float((seen - cup) @ (table - cup) / ((table - cup) @ (table - cup))))
        first, second = np.argsort(bare)[-2:]
        ball = {first: second, second: first}.get(ball, ball)
    return cups.PLACES[count][ball]


def _follow_star(film: _Film, colours: Sequence[str]) -> str:
    """The star lies on the shape nearest to what the intro loses; the two that have moved most in mid-step touch."""
    lost = np.abs(film.at(0.0) - film.start(0)).sum(-1)
    star_at = np.argwhere(lost > 60).mean(0)
    start = _middles(film.start(0), colours)
    star = min(start, key=lambda colour: float(np.linalg.norm(start[colour] - star_at)))
    for step in range(film.steps):
        before, during = _middles(film.start(step), colours), _middles(film.middle(step), colours)
        moved = sorted(colours, key=lambda colour: float(np.linalg.norm(during[colour] - before[colour])))
        first, second = moved[-2:]
        star = {first: second, second: first}.get(star, star)
    return star


def _middles(picture: np.ndarray, colours: Sequence[str]) -> dict[str, np.ndarray]:
    """The middle (row, column) of the pixels of each colour, told apart by hue."""
    hues = np.array([_hue(np.array(relay.COLOURS[colour], np.float32)) for colour in colours])
    vivid = np.argwhere(np.ptp(picture, axis=-1) > 90)
    away = np.abs(_hue(picture[tuple(vivid.T)])[:, None] - hues)  # [pixels, colours]
    nearest = np.minimum(away, 1 - away).argmin(-1)
    return {colour: np.median(vivid[nearest == index], axis=0) for index, colour in enumerate(colours)}


def _hue(colour: np.ndarray) -> np.ndarray:
    """Hue of RGB [..., 3], from 0 to 1 around the circle."""
    red, green, blue = colour[..., 0], colour[..., 1], colour[..., 2]
    return np.arctan2(np.sqrt(3.0) * (green - blue), 2 * red - green - blue) / (2 * np.pi) % 1


def _count(film: _Film) -> str:
    """Each digit is the label of the picture in load_digits that its ink matches best."""
    blank, total, before = film.start(0), 0, None
    strokes, labels = _strokes()
    for step in range(film.steps):
        picture = film.middle(step)
        height, half = picture.shape[0], tally.SIDE / 2
        inked = blank - picture
        reddish = inked[..., 2] - inked[..., 0]  # orange takes blue light away, blue takes red light
        colour = "orange" if reddish.sum() > 0 else "blue"
        shift = blank - np.array(tally.INKS[colour], np.float32)
        opacity = (inked * shift).sum(-1) / (shift * shift).sum(-1)
        rows = ((0.5 - half + (np.arange(GRID) + 0.5) * 2 * half / GRID) * height).astype(int)
        columns = ((ASPECT / 2 - half + (np.arange(GRID) + 0.5) * 2 * half / GRID) * height).astype(int)
        ink = opacity[np.ix_(rows, columns)]
        digit = int(labels[((strokes - ink) ** 2).sum((1, 2)).argmin()])
        total = (total + (digit if before in (None, colour) else -digit)) % 10
        before = colour
    return str(total)


@lru_cache(maxsize=1)
def _strokes() -> tuple[np.ndarray, np.ndarray]:
    """All digits as drawn, float32 [pictures, GRID, GRID], and their labels."""
    pictures, labels = tally.digits()
    step = 10 / GRID
    start = (-1.5 + step / 2,) * 2
    return np.stack([tally.stroke(picture, (GRID, GRID), step, start) for picture in pictures]), labels
