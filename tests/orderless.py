"""What the worlds' answers owe to the order of events: how often who sees all that happens in a clip, but not when, can be right.

    python -m tests.orderless            # the 500 test clips

All orders of a clip's events that the worlds allow are played through, and the option to which most of them lead is the best
guess. No model of shuffled frames can do better, unless the pictures tell the order. Knows no model.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import numpy as np

from engine.benchmark import Benchmark
from engine.worlds import FAMILIES, Record, cups, relay, tally

PLAYED = {
    "cups": (cups, "swaps"),
    "relay": (relay, "touches"),
    "tally": (tally, "flashes"),
}  # who tells, what a scene's events are


def guesses(record: Record) -> dict[str, float]:
    """Each option's share of the orders in which the clip's events may have happened and that lead to an option."""
    world, events = PLAYED[record.family]
    scene: Any = record.scene
    happened = getattr(scene, events)
    orders = list(permutations(happened))
    if record.family != "tally":  # no pair twice in a row, save in the one case that has no other way
        orders = [order for order in orders if all(_pair(a) != _pair(b) for a, b in pairwise(order))] or [happened]
    chance = np.random.default_rng(0)  # for the options that a world's words come with, which aren't read
    ends = Counter(world.tell(replace(scene, **{events: order}), chance)[-1] for order in orders)
    found = sum(ends[option] for option in record.options)
    return {option: ends[option] / found for option in record.options}


def best(record: Record) -> float:
    """How often the best guess is right: 1 where the order doesn't matter."""
    return max(guesses(record).values())


def _pair(event: cups.Swap | relay.Touch) -> tuple[int, int]:
    """The two places, or shapes, that change over."""
    return (event.left, event.right) if isinstance(event, cups.Swap) else (event.first, event.second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=500, help="clips (default 500)")
    records = Benchmark("test", limit=parser.parse_args().limit).records()
    told = {"all": records}
    told |= {family: [record for record in records if record.family == family] for family in FAMILIES}
    told |= {f"{steps} steps": [record for record in records if record.difficulty == steps] for steps in range(1, 7)}
    shares = {name: sum(map(best, chosen)) / len(chosen) for name, chosen in told.items() if chosen}
    print(json.dumps({name: round(share, 3) for name, share in shares.items()}, indent=1))


if __name__ == "__main__":
    main()
