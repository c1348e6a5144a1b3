"""Relay: a star lies on one of three or four coloured shapes, is hidden, and passes on at each touch of its holder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import combinations, product
from math import cos, hypot, pi, sin

import numpy as np

from engine.worlds.paint import Colour, Placed, Sprite, View, ease, glow, mix, placed, smooth, stamp
from engine.worlds.record import carry, phase

QUESTION = "Who holds the star at the end?"
COLOURS: dict[str, Colour] = {
    "red": (218, 40, 46),
    "blue": (36, 104, 220),
    "green": (38, 156, 78),
    "yellow": (250, 206, 36),
    "purple": (136, 66, 186),
    "orange": (246, 126, 22),
}
SHAPES = ("circle", "square", "triangle", "diamond")
TOUCHING = 0.142  # from the meeting point to either shape's middle
LAYOUTS = {  # by number of shapes, the places to stand on
    3: (((0.75, 0.23), (0.25, 0.75), (1.25, 0.75)), ((0.75, 0.76), (0.25, 0.24), (1.25, 0.24))),
    4: (((0.24, 0.24), (1.26, 0.24), (0.24, 0.76), (1.26, 0.76)),),
}
LOOKS = (
    ((250, 245, 234), (230, 220, 200)),
    ((240, 246, 250), (206, 218, 230)),
    ((240, 248, 240), (208, 224, 210)),
    ((250, 242, 244), (230, 212, 218)),
    ((244, 242, 252), (214, 210, 232)),
    ((246, 246, 244), (214, 214, 212)),
)


@dataclass(frozen=True)
class Touch:
    """Two shapes (lower number first) that meet; `swap`: each goes home to the other's place."""

    first: int
    second: int
    swap: bool


@dataclass(frozen=True)
class Relay:
    colours: tuple[str, ...]  # of the shapes, in the order of their first places
    shapes: tuple[str, ...]
    start: int
    touches: tuple[Touch, ...]
    layout: int
    look: int

    @property
    def trajectory(self) -> tuple:
        return (self.colours, self.start, tuple((t.first, t.second, t.swap) for t in self.touches))


def sample(rng: np.random.Generator, steps: int, split: str, fits: Callable[[tuple], bool], practice: object) -> Relay:
    count = int(rng.integers(3, 5))
    start, goal = rng.integers(count, size=2).tolist()
    shapes = tuple(SHAPES[i] for i in rng.integers(len(SHAPES), size=count))
    layout, look = int(rng.integers(len(LAYOUTS[count]))), int(rng.integers(len(LOOKS)))
    while True:
        colours = tuple(list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count])
        pairs, swaps = carry(rng, count, start, goal, steps), rng.integers(2, size=steps).tolist()
        touches = tuple(Touch(*pair, bool(swap)) for pair, swap in zip(pairs, swaps, strict=True))
        scene = Relay(colours, shapes, start, touches, layout, look)
        if fits(scene.trajectory):
            return scene


def others(scene: Relay, event: int, part: str) -> Iterator[Relay]:
    """The same scene with another touch in one place, the same pair never twice in a row."""
    beside = [(touch.first, touch.second) for touch in scene.touches[max(event - 1, 0) : event + 2]]
    pairs = [pair for pair in combinations(range(len(scene.colours)), 2) if pair not in beside]
    for pair, swap in product(pairs, (scene.touches[event].swap, not scene.touches[event].swap)):
        touches = (*scene.touches[:event], Touch(*pair, swap), *scene.touches[event + 1 :])
        yield replace(scene, touches=touches)


def tell(scene: Relay, rng: np.random.Generator) -> tuple[str, list[str], list[str], str]:
    """The question, the options (not yet shuffled), the written steps (without the last) and the answer."""
    star, order = scene.start, list(COLOURS)
    texts = [f"star starts {scene.colours[star]}"]
    for touch in scene.touches:
        star = {touch.first: touch.second, touch.second: touch.first}.get(star, star)
        names = sorted((scene.colours[touch.first], scene.colours[touch.second]), key=order.index)
        texts.append(f"{names[0]} and {names[1]} touch, star {scene.colours[star]}")
    return QUESTION, list(scene.colours), texts, scene.colours[star]


def painter(scene: Relay, view: View) -> Callable[[float], np.ndarray]:
    """A function from a time (seconds) to the canvas at that time, which is to be left as it is."""
    places = LAYOUTS[len(scene.colours)][scene.layout]
    board, star, flash = _board(LOOKS[scene.look], view), _star(view), _flash(view)
    sprites = [_shape(shape, COLOURS[colour], view) for shape, colour in zip(scene.shapes, scene.colours, strict=True)]
    homes = [tuple(range(len(places)))]  # before each touch, and at the end: the place of each shape
    for touch in scene.touches:
        after = list(homes[-1])
        if touch.swap:
            after[touch.first], after[touch.second] = after[touch.second], after[touch.first]
        homes.append(tuple(after))

    @cache
    def standing(number: int, place: int) -> Placed | None:
        return placed(view, sprites[number], view.pixel(*places[place]))

    @lru_cache(maxsize=2)
    def at_rest(home: tuple[int, ...], away: tuple[int, ...] = ()) -> np.ndarray:
        canvas = board.copy()
        for number, place in enumerate(home):
            if number not in away and (shape := standing(number, place)):
                shape.lay(canvas)
        return canvas

    @lru_cache(maxsize=1)
    def starred(opacity: float) -> np.ndarray:
        canvas = at_rest(homes[0]).copy()
        stamp(canvas, view, star, view.pixel(*places[scene.start]), opacity=opacity)
        return canvas

    def canvas_at(time: float) -> np.ndarray:
        event, share = phase(time, len(scene.touches))
        if event < 0 or share == 0:
            fade = 1 - float(smooth(time, 0.6, 0.95))
            return starred(fade) if fade > 0 else at_rest(homes[max(event, 0)])
        touch, home = scene.touches[event], homes[event]
        canvas = at_rest(home, (touch.first, touch.second)).copy()
        spots, middle = _meeting(places, home, homes[event + 1], touch, share)
        for number, spot in zip((touch.first, touch.second), spots, strict=True):
            stamp(canvas, view, sprites[number], view.pixel(*spot))
        bright = 0.65 * float(smooth(share, 0.36, 0.46) * (1 - smooth(share, 0.54, 0.64)))
        if bright > 0:
            stamp(canvas, view, flash, view.pixel(*middle), opacity=bright)
        return canvas

    return canvas_at


def _meeting(
    places: tuple[tuple[float, float], ...], before: tuple[int, ...], after: tuple[int, ...], touch: Touch, share: float
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Where the two shapes of a touch are, and where they meet.

    They come straight to the meeting point, touch it from opposite sides, turn half around it if they change places,
    and go straight home. With three shapes the meeting point keeps away from the third.
    """
    (first_x, first_y), (second_x, second_y) = places[before[touch.first]], places[before[touch.second]]
    middle_x, middle_y = (sum(place[axis] for place in places) / len(places) for axis in (0, 1))
    if len(places) == 3:
        middle_x += 0.5 * (first_x + second_x) / 2 - 0.5 * middle_x
        middle_y += 0.5 * (first_y + second_y) / 2 - 0.5 * middle_y
    length = hypot(second_x - first_x, second_y - first_y)
    near = ease(share / 0.4) if share < 0.5 else ease((1 - share) / 0.4)
    turn = pi * ease((share - 0.4) / 0.2) if touch.swap else 0.0
    side_x, side_y = ((second_x - first_x) / length * TOUCHING, (second_y - first_y) / length * TOUCHING)
    out_x, out_y = side_x * cos(turn) - side_y * sin(turn), side_x * sin(turn) + side_y * cos(turn)
    homes = before if share < 0.5 else after
    spots = []
    for number, sign in ((touch.first, -1), (touch.second, 1)):
        x, y = places[homes[number]]
        spots.append((x + (middle_x + sign * out_x - x) * near, y + (middle_y + sign * out_y - y) * near))
    return spots, (middle_x, middle_y)


@lru_cache(maxsize=16)
def _board(wall: tuple[Colour, Colour], view: View) -> np.ndarray:
    x, y = view.grid()
    canvas = mix(*wall, smooth(y + 0.3 * x, -0.1, 1.5))
    glow(canvas, view, (0.75, 0.45), 0.95, 0.06)
    ring = np.abs(np.sqrt((x - 0.75) ** 2 + (y - 0.5) ** 2) - 0.30)
    canvas *= (1 - 0.05 * np.clip(0.5 - (ring - 0.004) * view.scale, 0, 1))[..., None]
    return canvas.astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance [height, width] to a shape with soft corners, about 0.16 in radius."""
    if shape == "circle":
        return np.sqrt(x**2 + y**2) - 0.158
    corner = 0.025
    if shape == "triangle":
        y = y - 0.02
        slope = np.sqrt(3.0) / 2  # three half planes, 120 degrees apart
        flat = np.maximum(y, np.maximum(slope * x - y / 2, -slope * x - y / 2)) - 0.108 + corner
        rounded = np.maximum(flat, np.sqrt(x**2 + y**2) - 0.19)
        return rounded - corner
    if shape == "diamond":
        x, y = (x + y) / np.sqrt(2.0), (y - x) / np.sqrt(2.0)
    half = 0.14 - corner
    over = np.sqrt(np.maximum(np.abs(x) - half, 0) ** 2 + np.maximum(np.abs(y) - half, 0) ** 2)
    return over + np.minimum(np.maximum(np.abs(x), np.abs(y)) - half, 0) - corner


@lru_cache(maxsize=64)
def _shape(shape: str, colour: Colour, view: View) -> Sprite:
    sprite = Sprite(view, -0.24, -0.24, 0.26, 0.28)
    x, y = sprite.x, sprite.y
    sprite.add((16, 18, 36), 0.34 * (1 - smooth(_distance(shape, x - 0.014, y - 0.024), -0.03, 0.05)))
    away = _distance(shape, x, y) + 0 * x * y
    shade = 1.04 - 0.55 * y - 0.25 * x - 0.16 * smooth(away, -0.05, 0.0)
    edge = 0.35 * np.exp(-(((away + 0.024) / 0.010) ** 2)) * smooth(-y - 0.6 * x, -0.02, 0.18)
    lit = np.clip(np.asarray(colour, np.float32) * shade[..., None], 0, 255)
    return sprite.add(mix(lit, (255, 255, 255), edge), sprite.cover(away))


@lru_cache(maxsize=4)
def _star(view: View) -> Sprite:
    sprite = Sprite(view, -0.13, -0.13, 0.13, 0.13)
    x, y = sprite.x, sprite.y
    angle = (np.arctan2(x, -y) + pi / 5) % (2 * pi / 5) - pi / 5  # from the nearest point of the star
    radius = np.sqrt(x**2 + y**2)
    tip, dent = 0.112, 0.052
    along, across = radius * np.cos(angle), radius * np.abs(np.sin(angle))
    dent_x, dent_y = dent * cos(pi / 5), dent * sin(pi / 5)
    away = ((along - tip) * dent_y + across * (tip - dent_x)) / hypot(dent_y, tip - dent_x)  # to the edge tip-dent
    sprite.add((26, 24, 52), sprite.cover(np.maximum(away - 0.022, radius - 0.125)))
    return sprite.add(mix((255, 255, 250), (255, 236, 150), smooth(y + 0 * x, -0.05, 0.1)), sprite.cover(away))


@lru_cache(maxsize=4)
def _flash(view: View) -> Sprite:
    sprite = Sprite(view, -0.12, -0.12, 0.12, 0.12)
    radius = np.sqrt(sprite.x**2 + sprite.y**2)
    return sprite.add((255, 255, 255), 0.9 * (1 - smooth(radius, 0.0, 0.11)))
