"""Can the hidden state of the world be read off a slot? Linear probes, layer by layer and slot by slot, on clips held out.

The state after each step (which cup, which colour, which total) is the last word of the written step. A probe that reads it
shows that it is there, not that the model uses it. How much is right by chance, since the family alone narrows it down, is
told by holding the same words against the labels of other clips of the family (`shuffled`). Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ALPHAS = (1.0, 10.0, 100.0, 1000.0)  # strengths of the ridge; the best on the training clips themselves is taken
FEWEST = 20  # training clips that a probe needs


def world_states(steps: Sequence[str]) -> tuple[str, ...]:
    """The hidden state after each written step: its last word. The last step names an option, and tells no state."""
    return tuple(step.split()[-1] for step in steps[:-1])


def targets(chains: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """What there is to probe for: -> names ("start", "step 1", .., "end"), and for each the states [clips], "" without one."""
    found = [world_states(chain) for chain in chains]
    longest = max(map(len, found), default=0)
    names = ["start", *(f"step {i}" for i in range(1, longest)), "end"]
    columns = [[states[i] if i < len(states) else "" for states in found] for i in range(longest)]
    return names, [*columns, [states[-1] if states else "" for states in found]]


def shuffled(labels: Sequence[str], groups: Sequence[str], seed: int = 0) -> list[str]:
    """The labels changed about within each group, so that only what a group is still tells anything of them."""
    rng, made = np.random.default_rng(seed), np.array(labels, dtype=object)
    for group in dict.fromkeys(groups):
        mine = np.array([g == group and label != "" for g, label in zip(groups, labels, strict=True)])
        made[mine] = rng.permutation(made[mine])
    return made.tolist()


def predicted(train: np.ndarray, labels: Sequence[str], test: np.ndarray) -> np.ndarray | None:
    """What a linear probe says of held-out clips, every place of the middle axes probed by itself.

    train: [clips, ..., dim], of which those whose label is "" are left out; test: [clips, ..., dim]. -> words [clips, ...];
    None where there is too little to learn from.
    """
    from sklearn.linear_model import RidgeClassifierCV

    kept = np.array([label != "" for label in labels])
    learned = np.array(labels)[kept]
    if len(learned) < FEWEST or len(set(learned)) < 2:
        return None
    shape, dim = test.shape[:-1], test.shape[-1]
    train, test = train[kept].reshape(len(learned), -1, dim), test.reshape(len(test), -1, dim)
    said = np.zeros(test.shape[:2], dtype=learned.dtype)
    for place in range(train.shape[1]):
        mean, spread = train[:, place].mean(0), train[:, place].std(0) + 1e-6
        fitted = RidgeClassifierCV(ALPHAS).fit((train[:, place] - mean) / spread, learned)
        said[:, place] = fitted.predict((test[:, place] - mean) / spread)
    return said.reshape(shape)
