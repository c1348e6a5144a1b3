"""Drawing that does not depend on resolution: smooth coverage from distances, soft sprites, sub-pixel stamping.

The scene is 1.5 wide and 1 high, y pointing down; a view maps it to pixels. Colours are RGB from 0 to 255, canvases
float32 [height, width, 3]. Knows nothing of what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor

import numpy as np

Colour = tuple[int, int, int]
ASPECT = 1.5


@dataclass(frozen=True)
class View:
    """The pixels that a scene is drawn on; a picture that is not 3:2 shows more background."""

    height: int
    width: int

    @cached_property
    def scale(self) -> float:
        """Pixels per unit of the scene."""
        return min(self.height, self.width / ASPECT)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        return self.width / 2 + (x - ASPECT / 2) * self.scale, self.height / 2 + (y - 0.5) * self.scale

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Scene coordinates of the pixel centres: x [1, width], y [height, 1]."""
        x = (np.arange(self.width, dtype=np.float32) + 0.5 - self.width / 2) / self.scale + ASPECT / 2
        y = (np.arange(self.height, dtype=np.float32) + 0.5 - self.height / 2) / self.scale + 0.5
        return x[None].astype(np.float32), y[:, None].astype(np.float32)


class Sprite:
    """A small picture with opacity, built layer by layer on a patch of the scene around its origin."""

    def __init__(self, view: View, left: float, top: float, right: float, bottom: float) -> None:
        self.scale = view.scale
        self.origin = (int(np.ceil(-left * view.scale)) + 1, int(np.ceil(-top * view.scale)) + 1)
        width = self.origin[0] + int(np.ceil(right * view.scale)) + 1
        height = self.origin[1] + int(np.ceil(bottom * view.scale)) + 1
        self.x = ((np.arange(width, dtype=np.float32) + 0.5 - self.origin[0]) / view.scale)[None]  # [1, width]
        self.y = ((np.arange(height, dtype=np.float32) + 0.5 - self.origin[1]) / view.scale)[:, None]  # [height, 1]
        self.pixels = np.zeros((height, width, 4), np.float32)  # colour, already times opacity; then how much
        self.pixels[..., 3] = 1  # of what lies below is seen

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Coverage [height, width], 0 to 1, of the places where the distance (scene units) is negative."""
        return np.clip(0.5 - distance * self.scale, 0, 1)

    def add(self, colour: Colour | np.ndarray, cover: np.ndarray) -> Sprite:
        """Lay a colour (one, or [height, width, 3]) over what is there."""
        cover = np.broadcast_to(cover, self.pixels.shape[:2])[..., None]
        self.pixels *= 1 - cover
        self.pixels[..., :3] += np.asarray(colour, np.float32) * cover
        return self


@dataclass(frozen=True)
class Placed:
    """A sprite where it belongs on a canvas, sampled at the canvas's pixels; it may be laid there many times."""

    top: int
    left: int
    paint: np.ndarray  # float32 [height, width, 3]
    keep: np.ndarray  # float32 [height, width, 3], alike in all colours

    def lay(self, canvas: np.ndarray) -> None:
        """In place."""
        height, width, _ = self.paint.shape
        region = canvas[self.top : self.top + height, self.left : self.left + width]
        region *= self.keep
        region += self.paint


def placed(
    view: View, sprite: Sprite, at: tuple[float, float], size: float = 1.0, opacity: float = 1.0
) -> Placed | None:
    """A sprite with its origin at the pixel position `at` (fractions count); None where nothing of it is on the view."""
    import cv2

    height, width = sprite.pixels.shape[:2]
    left, top = floor(at[0] - sprite.origin[0] * size), floor(at[1] - sprite.origin[1] * size)
    right, bottom = left + ceil(width * size) + 1, top + ceil(height * size) + 1
    left, top = max(left, 0), max(top, 0)
    right, bottom = min(right, view.width), min(bottom, view.height)
    if left >= right or top >= bottom:
        return None
    shift_x = (left + 0.5 - at[0]) / size + sprite.origin[0] - 0.5
    shift_y = (top + 0.5 - at[1]) / size + sprite.origin[1] - 0.5
    inverse = np.array([[1 / size, 0, shift_x], [0, 1 / size, shift_y]])
    shape, flags = (right - left, bottom - top), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pixels = cv2.warpAffine(sprite.pixels, inverse, shape, flags=flags, borderValue=(0, 0, 0, 1))
    paint, keep = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), in_every_colour(cv2.extractChannel(pixels, 3))
    if opacity < 1:
        paint = paint * opacity
        keep = 1 - opacity * (1 - keep)
    return Placed(top, left, paint, keep)


def stamp(
    canvas: np.ndarray, view: View, sprite: Sprite, at: tuple[float, float], size: float = 1.0, opacity: float = 1.0
) -> None:
    """Lay a sprite on the view's canvas, in place."""
    if found := placed(view, sprite, at, size, opacity):
        found.lay(canvas)


def in_every_colour(plane: np.ndarray) -> np.ndarray:
    """[height, width] -> [height, width, 3]. Products of equal shapes take numpy a tenth of the time of broadcast ones."""
    import cv2

    return cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB)


def mix(first: Colour | np.ndarray, second: Colour | np.ndarray, share: float | np.ndarray) -> np.ndarray:
    """Between two colours, [..., 3]: share 0 gives the first, 1 the second; shares broadcast as [...]."""
    first, second = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return first + (second - first) * np.asarray(share, np.float32)[..., None]


def smooth(value: np.ndarray | float, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, without a kink between."""
    share = np.minimum(np.maximum((value - low) / (high - low), 0), 1)  # np.clip takes ten times as long for one number
    return share * share * (3 - 2 * share)


def ease(share: float) -> float:
    """Start and stop softly, at an even pace between: 0 to 1 over 0 to 1."""
    ramp = 0.25
    share = min(max(share, 0.0), 1.0)
    if share > 0.5:
        return 1 - ease(1 - share)
    pace = 1 / (1 - ramp)
    return pace * share * share / (2 * ramp) if share < ramp else pace * (share - ramp / 2)


def glow(canvas: np.ndarray, view: View, at: tuple[float, float], reach: float, gain: float) -> None:
    """Brighten around a scene position and darken the far corners, in place."""
    x, y = view.grid()
    distance = np.sqrt((x - at[0]) ** 2 + (y - at[1]) ** 2)
    canvas *= (1 + gain * (1 - smooth(distance, 0.0, reach)) - 0.5 * gain * smooth(distance, reach, 1.6 * reach))[
        ..., None
    ]
    np.clip(canvas, 0, 255, out=canvas)
