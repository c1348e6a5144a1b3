"""Tally: handwritten digits flash in two colours; the order of the colours says which are added and which taken away.

The digits are scikit-learn's bundled `load_digits`; the pictures of one split are never seen in another. Those of training
are few, and would be learnt by heart: there every flash is turned, slanted, stretched and shifted a little, as if by another
hand. The others are shown as they were written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from math import ceil, cos, floor, sin

import numpy as np

from engine.worlds.paint import Colour, View, glow, in_every_colour, mix, smooth
from engine.worlds.record import phase

QUESTION = (
    "Start with the first digit. Add a digit of the same colour as the one before, "
    "take it away if the colour changed. What is the last digit of the total?"
)
INKS: dict[str, Colour] = {"blue": (28, 84, 206), "orange": (236, 112, 16)}
SIDE = 0.86  # of a digit's 10 x 10 picture (8 x 8 and a margin), so that the digit itself is about 0.7 high
LOOKS = (
    ((86, 120, 136), (52, 78, 98)),
    ((150, 128, 108), (104, 84, 72)),
    ((108, 138, 116), (66, 94, 80)),
    ((132, 116, 150), (86, 74, 108)),
    ((74, 84, 116), (42, 50, 78)),
    ((170, 140, 132), (122, 94, 92)),
)


Row = tuple[float, float, float]
Hand = tuple[Row, Row]  # the map from a point as shown to one as written, both from the picture's middle
AS_WRITTEN: Hand = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@dataclass(frozen=True)
class Flash:
    digit: int
    colour: str
    picture: int  # its number in load_digits
    hand: Hand = AS_WRITTEN


@dataclass(frozen=True)
class Practice:
    """What is practised in training: so many digits, from 0, and how often one is orange, the others being blue.

    Whether the colour changed is a parity, of which gradients tell nothing until each colour counts by itself, as it does where
    orange is rare; and sums are learnt on few numbers first.
    """

    digits: int = 10
    orange: float = 0.5


WHOLE = Practice()


@dataclass(frozen=True)
class Tally:
    flashes: tuple[Flash, ...]
    look: int

    @property
    def trajectory(self) -> tuple:
        """Digits and colours; of a lone digit the picture too, since twenty trajectories can't be split in three."""
        if len(self.flashes) == 1:
            return ((self.flashes[0].digit, self.flashes[0].colour, self.flashes[0].picture),)
        return tuple((flash.digit, flash.colour) for flash in self.flashes)


@lru_cache(maxsize=1)
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All pictures, float32 [1797, 8, 8] from 0 to 1, and their digits [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target


@lru_cache(maxsize=4)
def pictures(part: str) -> tuple[tuple[int, ...], ...]:
    """For each of the ten digits the numbers of the pictures that belong to train (70 %), validation or test."""
    _, labels = digits()
    order = np.random.default_rng(1797).permutation(len(labels))
    first, second = int(0.7 * len(order)), int(0.8 * len(order))
    mine = {"train": order[:first], "validation": order[first:second], "test": order[second:]}[part]
    return tuple(tuple(int(number) for number in mine if labels[number] == digit) for digit in range(10))


def totals(scene: Tally) -> list[tuple[int, int]]:
    """After each digit: its sign and the total, kept between 0 and 9."""
    out, total, before = [], 0, None
    for flash in scene.flashes:
        sign = 1 if before in (None, flash.colour) else -1
        total, before = (total + sign * flash.digit) % 10, flash.colour
        out.append((sign, total))
    return out


def sample(
    rng: np.random.Generator, steps: int, split: str, fits: Callable[[tuple], bool], practice: Practice
) -> Tally:
    """All totals are as frequent as another only where there are ten digits."""
    goal, look = int(rng.integers(10)), int(rng.integers(len(LOOKS)))
    mine = pictures(split)
    while True:
        numbers, colours, picks = (
            rng.integers(practice.digits, size=steps),
            rng.integers(2, size=steps),
            rng.random(steps),
        )
        if practice.orange < 0.5:  # drawn apart, so that clips in which both colours are alike stay what they were
            colours = (rng.random(steps) < practice.orange).astype(int)
        drawn = numbers.tolist(), colours.tolist(), picks.tolist()
        flashes = (
            Flash(digit, ("blue", "orange")[colour], mine[digit][int(pick * len(mine[digit]))])
            for digit, colour, pick in zip(*drawn, strict=True)
        )
        scene = Tally(tuple(flashes), look)
        if (practice.digits < 10 or totals(scene)[-1][1] == goal) and fits(scene.trajectory):
            break
    if split != "train":
        return scene
    return replace(scene, flashes=tuple(replace(flash, hand=_hand(rng)) for flash in scene.flashes))


def _hand(rng: np.random.Generator) -> Hand:
    """Another hand that may have written the same: up to 10 degrees turned, 0.15 slanted, 20 % smaller, 0.4 points away."""
    turn, slant, right, down = (rng.uniform(-1, 1, 4) * (0.17, 0.15, 0.4, 0.4)).tolist()
    wide, high = (1 / rng.uniform(0.8, 1.04, 2)).tolist()
    across = (wide * (cos(turn) + slant * sin(turn)), wide * (slant * cos(turn) - sin(turn)), right)
    return across, (high * sin(turn), high * cos(turn), down)


def others(scene: Tally, event: int, part: str) -> Iterator[Tally]:
    """The same scene with another digit or colour flashed in one place."""
    mine = pictures(part)
    for digit, colour in product(range(10), INKS):
        for picture in mine[digit][:8]:
            flashes = (*scene.flashes[:event], Flash(digit, colour, picture), *scene.flashes[event + 1 :])
            yield replace(scene, flashes=flashes)


def tell(scene: Tally, rng: np.random.Generator) -> tuple[str, list[str], list[str], str]:
    """The question, the options (not yet shuffled), the written steps (without the last) and the answer."""
    texts = ["total starts 0"]
    for flash, (sign, total) in zip(scene.flashes, totals(scene), strict=True):
        texts.append(f"{flash.colour} {flash.digit}, {'plus' if sign > 0 else 'minus'} {flash.digit} is {total}")
    answer = totals(scene)[-1][1]
    others = rng.choice([digit for digit in range(10) if digit != answer], 3, replace=False)
    return QUESTION, [str(answer), *(str(digit) for digit in others)], texts, str(answer)


def painter(scene: Tally, view: View) -> Callable[[float], np.ndarray]:
    """A function from a time (seconds) to the canvas at that time, which is to be left as it is."""
    card = _card(LOOKS[scene.look], view)

    @cache
    def ink_of(event: int) -> tuple[int, int, np.ndarray]:
        return _ink(scene.flashes[event], view)

    @lru_cache(maxsize=1)
    def flashed(event: int, strength: float) -> np.ndarray:
        canvas = card.copy()
        top, left, ink = ink_of(event)
        share = in_every_colour(strength * ink)
        region = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
        region *= 1 - share
        region += np.asarray(INKS[scene.flashes[event].colour], np.float32) * share
        return canvas

    def canvas_at(time: float) -> np.ndarray:
        event, share = phase(time, len(scene.flashes))
        strength = float(smooth(share, 0.06, 0.2) * (1 - smooth(share, 0.8, 0.94)))
        return flashed(event, strength) if strength > 0 else card

    return canvas_at


@lru_cache(maxsize=16)
def _card(wall: tuple[Colour, Colour], view: View) -> np.ndarray:
    x, y = view.grid()
    canvas = mix(*wall, smooth(y + 0 * x, -0.2, 1.2))
    glow(canvas, view, (0.75, 0.45), 1.0, 0.18)
    half_width, half_height, corner = 0.42, 0.45, 0.05

    def away(dx: float, dy: float) -> np.ndarray:
        """Distance to the card, shifted by (dx, dy)."""
        over = np.maximum(np.abs(x - 0.75 - dx) - half_width + corner, 0) ** 2
        return np.sqrt(over + np.maximum(np.abs(y - 0.5 - dy) - half_height + corner, 0) ** 2) - corner

    canvas = mix(canvas, (12, 14, 26), 0.42 * (1 - smooth(away(0.014, 0.02), -0.03, 0.055)))
    paper = mix((255, 254, 250), (242, 238, 230), smooth(x + y, 0.6, 1.9))
    canvas = mix(canvas, paper, np.clip(0.5 - away(0, 0) * view.scale, 0, 1))
    line = np.abs(away(0, 0) + 0.03)
    canvas = mix(canvas, (222, 214, 200), np.clip(0.5 - (line - 0.003) * view.scale, 0, 1) * 0.8)
    return canvas.astype(np.float32)


def stroke(
    picture: np.ndarray, size: tuple[int, int], step: float, start: tuple[float, float], hand: Hand = AS_WRITTEN
) -> np.ndarray:
    """Opacity of the ink, float32 of `size` (height, width): a picture [8, 8] as a felt pen would draw it.

    A pixel is `step` points of the picture wide, the first pixel's centre lies at the point `start` (x, y).
    """
    import cv2

    place = np.array([[step, 0, start[0] - 3.5], [0, step, start[1] - 3.5], [0, 0, 1]])  # around the picture's middle
    inverse = np.array(hand) @ place + [[0, 0, 4.5]] * 2  # with the empty margin of one point
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    ink = cv2.warpAffine(np.pad(picture, 1), inverse, size[::-1], flags=flags)
    dense = 0.6 + 0.4 * smooth(ink, 0.45, 0.95)  # thin strokes are paler, so that small holes stay open
    return smooth(ink, 0.32, 0.48) * dense


def _ink(flash: Flash, view: View) -> tuple[int, int, np.ndarray]:
    """The first row and column that a digit takes of the canvas, and its ink there, 0 to 1."""
    middle = view.pixel(0.75, 0.5)
    side, step = ceil(SIDE * view.scale) + 2, 10 / (SIDE * view.scale)
    left, top = (max(floor(at - side / 2), 0) for at in middle)
    size = (min(side, view.height - top), min(side, view.width - left))
    start = (3.5 + (left + 0.5 - middle[0]) * step, 3.5 + (top + 0.5 - middle[1]) * step)
    return top, left, stroke(digits()[0][flash.picture], size, step, start, flash.hand)
