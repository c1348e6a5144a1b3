"""uint8 pictures as the families' published processors hand them on: cut into tiles, normalised. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(patches: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """uint8 [patches, numbers, channel by channel] or [patches, 3, ..] -> float32 of that shape: (x / 255 - mean) / std."""
    means, stds = (torch.tensor(each, device=patches.device)[:, None] for each in (mean, std))
    by_channel = patches.to(torch.float32).reshape(len(patches), 3, -1)
    return by_channel.mul_(1 / (255 * stds)).add_(-means / stds).reshape(patches.shape)


def tiles(pictures: np.ndarray, side: int) -> Tensor:
    """uint8 [pictures, rows x side, columns x side, 3] -> [tiles, 3, side, side], row by row."""
    count, height, width, _ = pictures.shape
    blocks = torch.from_numpy(pictures).reshape(count, height // side, side, width // side, side, 3)
    # [pictures, row, y, column, x, 3] -> [pictures, row, column, 3, y, x]
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, side, side).contiguous()
