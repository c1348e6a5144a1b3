"""Muon (arXiv 2502.16982) on stacks: the matrices of one shape are orthogonalised together.

torch.optim.Muon takes them one by one and in bfloat16. A small model has dozens of small ones, so that a GPU is mostly being
launched; and a CPU without bfloat16 arithmetic takes four times as long over each product. Knows no model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration, as published: steep at zero rather than exact
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, its direction made orthogonal, at the size of AdamW's steps: one learning rate serves both.

    Decoupled weight decay, as AdamW's.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """closure: torch's interface; none is taken."""
        for group in self.param_groups:
            stacks: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    stacks[matrix.shape].append(matrix)
            for shape, matrices in stacks.items():
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                turned = orthogonal(torch.stack([self._direction(matrix) for matrix in matrices]))
                for matrix, direction in zip(matrices, turned, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-size)

    def _direction(self, matrix: nn.Parameter) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(mean, MOMENTUM)


def orthogonal(stack: Tensor) -> Tensor:
    """Matrices [n, rows, columns] -> the same with singular values near 1, between 0.7 and 1.2.

    In bfloat16 on a GPU, where it is as good and quicker.
    """
    tall = stack.shape[1] > stack.shape[2]
    x = (stack.mT if tall else stack).to(torch.bfloat16 if stack.is_cuda else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stack.dtype)
