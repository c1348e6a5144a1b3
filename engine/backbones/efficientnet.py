"""EfficientNet-lite0's convolutions in plain torch, to the last map before its classifier. Knows no language model.

Batch normalisation is part of the convolutions' weights, so that there is nothing here that training mode changes. Pads as
TensorFlow does: where the two sides can't get the same, the right and the lower one get more.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

STAGES = (  # blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, CHANNELS = 32, 1280  # of the first map and of the last
STRIDE = 32  # pixels of a frame's side that become one cell of the last map
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


class Layer(nn.Conv2d):
    """A convolution whose map has a `stride`-th of the input's sides, and what follows it."""

    def __init__(
        self, given: int, made: int, kernel: int = 1, stride: int = 1, groups: int = 1, cut: bool = True
    ) -> None:
        super().__init__(given, made, kernel, stride, groups=groups)
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.margin, self.cut = (before, after, before, after), cut

    def forward(self, maps: Tensor) -> Tensor:
        """[pictures, channels, height, width], both a multiple of the stride."""
        made = super().forward(F.pad(maps, self.margin) if any(self.margin) else maps)
        return F.relu6(made) if self.cut else made


class Block(nn.Sequential):
    """Widens, looks around in every channel for itself, narrows; where the map keeps its shape, it is added to."""

    def __init__(self, given: int, made: int, kernel: int, stride: int, expansion: int) -> None:
        wide = given * expansion
        widen = [Layer(given, wide)] if expansion > 1 else []
        super().__init__(*widen, Layer(wide, wide, kernel, stride, groups=wide), Layer(wide, made, cut=False))
        self.added = stride == 1 and given == made

    def forward(self, maps: Tensor) -> Tensor:
        made = super().forward(maps)
        return maps + made if self.added else made


class EfficientNetLite0(nn.Sequential):
    """Pictures [pictures, 3, height, width], sides multiples of STRIDE, normalised by MEAN and STD -> [pictures, CHANNELS,
    height / STRIDE, width / STRIDE]."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [Layer(3, STEM, 3, 2)]
        width = STEM
        for blocks, kernel, stride, expansion, channels in STAGES:
            for number in range(blocks):
                layers.append(Block(width, channels, kernel, 1 if number else stride, expansion))
                width = channels
        super().__init__(*layers, Layer(width, CHANNELS))
