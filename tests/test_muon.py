"""Muon on stacks of matrices: what it turns is orthogonal, and its steps are those of torch's own, which goes one by one."""

import pytest
import torch
from torch import nn

from engine.muon import Muon, orthogonal

SHAPES = [(24, 24), (24, 24), (24, 40), (40, 24), (8, 64)]


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    """Those of matrices whose own lie between 0.2 and 1."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    turned = orthogonal(left * torch.linspace(0.2, 1, min(shape)) @ right)
    values = torch.linalg.svdvals(turned)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25
    torch.testing.assert_close(turned / turned.norm(), (left @ right) / (left @ right).norm(), atol=0.05, rtol=0)


def test_each_matrix_is_turned_for_itself() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 16, 24) * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None, None]
    torch.testing.assert_close(
        orthogonal(stack), torch.cat([orthogonal(one[None]) for one in stack]), rtol=1e-4, atol=1e-5
    )


def test_its_steps_are_torchs() -> None:
    """As near as torch's own, which multiplies in bfloat16, comes to the exact ones."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for one, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            one.grad, other.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        moved, expected = one.detach() - before, other.detach() - before
        assert float((moved - expected).norm() / expected.norm()) < 0.03


def test_what_has_no_gradient_stays() -> None:
    still, moving = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([still, moving], lr=0.1, weight_decay=0.1)
    moving.grad = torch.eye(4)
    optimizer.step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moving, torch.ones(4, 4))


def test_it_goes_on_from_its_saved_state() -> None:
    torch.manual_seed(0)
    straight, resumed = ([nn.Parameter(torch.ones(6, 8))] for _ in range(2))
    gradients = [torch.randn(6, 8) for _ in range(4)]
    first, second = Muon(straight, lr=0.1, weight_decay=0.0), Muon(resumed, lr=0.1, weight_decay=0.0)
    for number, gradient in enumerate(gradients):
        if number == 2:
            saved = second.state_dict()
            second = Muon(resumed, lr=0.1, weight_decay=0.0)
            second.load_state_dict(saved)
        for (matrix,), optimizer in ((straight, first), (resumed, second)):
            matrix.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(straight[0], resumed[0])
