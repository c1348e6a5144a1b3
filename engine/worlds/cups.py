"""Cups: a ball goes under one of three or four alike cups, cups swap places, and the ball is never seen again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import combinations, product
from math import cos, pi, sin

import numpy as np

from engine.worlds.paint import Colour, Placed, Sprite, View, ease, glow, mix, placed, smooth, stamp
from engine.worlds.record import carry, phase

QUESTION = "Where is the ball at the end?"
PLACES = {3: ("left", "middle", "right"), 4: ("first", "second", "third", "fourth")}
SPACING = {3: 0.44, 4: 0.345}
BASE, HORIZON = 0.74, 0.34  # where cups stand, where the table begins
REACHES = 16  # how far a swap swings out: this many shades, so that short clips have trajectories enough to split


@dataclass(frozen=True)
class Look:
    wall: tuple[Colour, Colour]
    table: tuple[Colour, Colour]
    cup: Colour
    band: Colour
    ball: Colour


LOOKS = (
    Look(
        ((244, 234, 216), (226, 208, 182)),
        ((142, 92, 60), (188, 132, 90)),
        (26, 132, 140),
        (244, 224, 176),
        (228, 48, 50),
    ),
    Look(
        ((40, 50, 84), (80, 88, 126)), ((52, 66, 100), (92, 108, 148)), (240, 120, 94), (255, 226, 190), (255, 214, 72)
    ),
    Look(
        ((228, 238, 224), (200, 216, 196)),
        ((104, 140, 112), (146, 180, 146)),
        (248, 238, 220),
        (206, 128, 74),
        (226, 62, 44),
    ),
    Look(
        ((236, 228, 244), (210, 198, 228)),
        ((112, 94, 150), (158, 138, 192)),
        (246, 184, 62),
        (120, 72, 130),
        (250, 246, 240),
    ),
    Look(((42, 54, 52), (70, 88, 82)), ((20, 98, 74), (44, 142, 108)), (204, 62, 58), (246, 206, 120), (255, 222, 90)),
    Look(
        ((216, 232, 244), (188, 212, 232)),
        ((196, 170, 136), (232, 212, 182)),
        (44, 70, 138),
        (246, 196, 90),
        (232, 58, 48),
    ),
)


@dataclass(frozen=True)
class Swap:
    """Two places, left one first, whose cups change over; which of the cups passes in front; how far out they swing."""

    left: int
    right: int
    left_in_front: bool
    reach: int


@dataclass(frozen=True)
class Cups:
    cups: int
    start: int
    swaps: tuple[Swap, ...]
    look: int

    @property
    def trajectory(self) -> tuple:
        return (self.cups, self.start, tuple((s.left, s.right, s.left_in_front, s.reach) for s in self.swaps))


def sample(rng: np.random.Generator, steps: int, split: str, fits: Callable[[tuple], bool], practice: object) -> Cups:
    cups = int(rng.integers(3, 5))
    start, goal = rng.integers(cups, size=2).tolist()
    look = int(rng.integers(len(LOOKS)))
    while True:
        pairs = carry(rng, cups, start, goal, steps)
        fronts, reaches = rng.integers(2, size=steps).tolist(), rng.integers(REACHES, size=steps).tolist()
        swaps = (Swap(*pair, bool(front), reach) for pair, front, reach in zip(pairs, fronts, reaches, strict=True))
        scene = Cups(cups, start, tuple(swaps), look)
        if fits(scene.trajectory):
            return scene


def others(scene: Cups, event: int, part: str) -> Iterator[Cups]:
    """The same scene with another swap in one place, the same pair never twice in a row."""
    beside = [(swap.left, swap.right) for swap in scene.swaps[max(event - 1, 0) : event + 2]]
    pairs = [pair for pair in combinations(range(scene.cups), 2) if pair not in beside]
    for pair, front, reach in product(pairs, (True, False), range(REACHES)):
        swaps = (*scene.swaps[:event], Swap(*pair, front, reach), *scene.swaps[event + 1 :])
        yield replace(scene, swaps=swaps)


def tell(scene: Cups, rng: np.random.Generator) -> tuple[str, list[str], list[str], str]:
    """The question, the options (not yet shuffled), the written steps (without the last) and the answer."""
    names, ball = PLACES[scene.cups], scene.start
    texts = [f"ball starts {names[ball]}"]
    for swap in scene.swaps:
        ball = {swap.left: swap.right, swap.right: swap.left}.get(ball, ball)
        texts.append(f"{names[swap.left]} and {names[swap.right]} swap, ball {names[ball]}")
    return QUESTION, list(names), texts, names[ball]


def painter(scene: Cups, view: View) -> Callable[[float], np.ndarray]:
    """A function from a time (seconds) to the canvas at that time, which is to be left as it is."""
    look = LOOKS[scene.look]
    cup, ball, shadow = _cup(look, view), _ball(look, view), _shadow(view)
    table = _table(look, view)
    homes = [0.75 + (place - (scene.cups - 1) / 2) * SPACING[scene.cups] for place in range(scene.cups)]

    def put(canvas: np.ndarray, x: float, y: float, size: float = 1.0, lift: float = 0.0) -> None:
        stamp(canvas, view, shadow, view.pixel(x, y), size * (1 + 0.5 * lift), 1 - lift)
        stamp(canvas, view, cup, view.pixel(x, y - lift), size)

    @cache
    def standing(place: int) -> tuple[Placed, ...]:
        """A cup at rest and its shadow."""
        both = [placed(view, sprite, view.pixel(homes[place], BASE)) for sprite in (shadow, cup)]
        return tuple(each for each in both if each)

    def leave(canvas: np.ndarray, place: int) -> None:
        for each in standing(place):
            each.lay(canvas)

    rest = table.copy()
    for place in range(scene.cups):
        leave(rest, place)

    @lru_cache(maxsize=1)
    def shown(lift: float) -> np.ndarray:
        canvas = table.copy()
        for place, home in enumerate(homes):
            if place == scene.start:
                stamp(canvas, view, ball, view.pixel(home, BASE))
                put(canvas, home, BASE, lift=lift)
            else:
                leave(canvas, place)
        return canvas

    def canvas_at(time: float) -> np.ndarray:
        event, share = phase(time, len(scene.swaps))
        if event < 0:
            return shown(0.29 * (1 - ease((time - 0.5) / 0.45)))
        if share == 0:
            return rest
        swap, turn = scene.swaps[event], pi * ease(share)
        middle, half = (homes[swap.left] + homes[swap.right]) / 2, (homes[swap.right] - homes[swap.left]) / 2
        swing = (0.10 + 0.05 * swap.reach / (REACHES - 1)) * sin(turn) * (1 if swap.left_in_front else -1)
        moving = {swap.left: (middle - half * cos(turn), swing), swap.right: (middle + half * cos(turn), -swing)}
        depths = {place: moving[place][1] if place in moving else 0.0 for place in range(scene.cups)}
        canvas = table.copy()
        for place in sorted(depths, key=depths.__getitem__):
            if place in moving:
                x, depth = moving[place]
                put(canvas, x, BASE + depth, 1 + 1.3 * depth)
            else:
                leave(canvas, place)
        return canvas

    return canvas_at


@lru_cache(maxsize=16)
def _table(look: Look, view: View) -> np.ndarray:
    x, y = view.grid()
    wall = mix(*look.wall, smooth(y + 0 * x, 0, HORIZON))
    near = smooth(y + 0 * x, HORIZON, 1)
    grain = 0.02 * np.sin(9 * np.sin(1.7 * x) + 70 * (y - HORIZON) / (0.6 + y)) * near
    table = mix(*look.table, near) * (1 + grain)[..., None]
    canvas = mix(wall, table, np.clip((y + 0 * x - HORIZON) * view.scale + 0.5, 0, 1))
    edge = np.exp(-((np.minimum(y - HORIZON, 0) / 0.03) ** 2)) * (y < HORIZON) * 0.22  # the wall darkens at the table
    canvas *= (1 - edge - 0 * x)[..., None]
    glow(canvas, view, (0.6, 0.6), 1.0, 0.12)
    return canvas.astype(np.float32)


@lru_cache(maxsize=16)
def _cup(look: Look, view: View) -> Sprite:
    sprite = Sprite(view, -0.17, -0.47, 0.17, 0.06)
    x, y = sprite.x, sprite.y
    top, foot, crown, squash = -0.42, 0.145, 0.108, 0.26  # ends, half widths, how flat the round ends look
    half = crown + (foot - crown) * np.clip((y - top) / -top, 0, 1.1)  # [height, 1]
    across = np.clip(x / half, -1, 1)
    curve = squash * np.sqrt(1 - across**2)
    body = np.maximum(np.abs(x) - half, np.maximum(y - foot * curve, top - y))
    lip = np.maximum(np.abs(x) - half - 0.006, np.maximum(y - foot * curve, foot * curve - y - 0.035))
    shade = 0.60 + 0.42 * np.sqrt(1 - (0.8 * across + 0.2) ** 2) - 0.10 * across
    shine = 0.35 * np.exp(-(((across + 0.48) / 0.13) ** 2)) * smooth(y, top, top + 0.06) * (1 - smooth(y, -0.07, -0.02))
    sprite.add(_lit(look.cup, shade, shine), sprite.cover(body))
    band = np.maximum(np.abs(y + 0.155 - crown * curve) - 0.026, np.abs(x) - half)
    sprite.add(_lit(look.band, shade, 0.4 * shine), sprite.cover(band))
    sprite.add(_lit(look.cup, 0.88 * shade, 0.5 * shine), sprite.cover(lip))
    lid = np.sqrt((x / crown) ** 2 + ((y - top) / (crown * squash)) ** 2)
    distance = (lid - 1) * crown * squash
    sprite.add(_lit(look.cup, 1.12 - 0.5 * x + 0 * y, 0.10 + 0 * shine), sprite.cover(distance))
    sprite.add(_lit(look.cup, 1.02 + 0.5 * x + 0 * y, 0 * shine), sprite.cover(distance + 0.011))
    return sprite


@lru_cache(maxsize=16)
def _ball(look: Look, view: View) -> Sprite:
    radius = 0.088
    sprite = Sprite(view, -0.14, -0.22, 0.22, 0.08)
    spot = np.sqrt(((sprite.x - 0.035) / 0.115) ** 2 + ((sprite.y - 0.0) / 0.034) ** 2)
    sprite.add((10, 10, 24), 0.45 * (1 - smooth(spot, 0.3, 1.3)))
    x, y = sprite.x / radius, (sprite.y + radius - 0.015) / radius
    from_light = np.sqrt((x + 0.35) ** 2 + (y + 0.4) ** 2)
    lit = _lit(look.ball, 1.08 - 0.42 * smooth(from_light, 0.3, 1.7), 0.75 * (1 - smooth(from_light, 0.05, 0.42)))
    return sprite.add(lit, sprite.cover((np.sqrt(x**2 + y**2) - 1) * radius))


@lru_cache(maxsize=4)
def _shadow(view: View) -> Sprite:
    sprite = Sprite(view, -0.22, -0.11, 0.30, 0.12)
    spot = np.sqrt(((sprite.x - 0.045) / 0.205) ** 2 + ((sprite.y - 0.008) / 0.075) ** 2)
    return sprite.add((10, 10, 24), 0.5 * (1 - smooth(spot, 0.45, 1.2)))


def _lit(colour: Colour, shade: np.ndarray, shine: np.ndarray) -> np.ndarray:
    """A colour under light: darker or brighter by `shade`, towards white by `shine`; [height, width, 3]."""
    return mix(np.clip(np.asarray(colour, np.float32) * shade[..., None], 0, 255), (255, 255, 255), shine)
