"""What the worlds' answers owe to the order of events: how often who sees all that happens in a clip, but not when, can be right.

    python -m tests.orderless            # the 500 test clips

All orders of a clip's events that the worlds allow are played through, and the option to which most of them lead is the best
guess. No model of shuffled frames can do better, unless the pictures tell the order. Knows no model.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations

from engine.benchmark import Benchmark
from engine.worlds import FAMILIES, Record

Event = tuple[str, str]


def guesses(record: Record) -> dict[str, float]:
    """Each option's share of the orders in which the clip's events may have happened and that lead to an option."""
    events, end = _played(record)
    orders = [order for order in permutations(events) if record.family == "tally" or _no_pair_twice(order)]
    ends = Counter(end(order) for order in orders or [tuple(events)])
    found = sum(ends[option] for option in record.options)
    return {option: ends[option] / found for option in record.options}


def best(record: Record) -> float:
    """How often the best guess is right: 1 where the order doesn't matter."""
    return max(guesses(record).values())


def _no_pair_twice(order: Sequence[Event]) -> bool:
    return all(set(event) != set(after) for event, after in pairwise(order))


def _played(record: Record) -> tuple[list[Event], Callable[[Sequence[Event]], str]]:
    """The events as the written steps name them, and where a sequence of them ends."""
    start, *steps, _ = (step.text for step in record.steps)
    if record.family == "tally":  # "blue 5, plus 5 is 5"
        flashes = [(colour, digit) for colour, digit in (step.partition(",")[0].split() for step in steps)]
        return flashes, _total
    # "left and middle swap, ball is middle": two places, or two shapes, and who has it in the end
    pairs = [(words[0], words[2]) for words in (step.split() for step in steps)]
    return pairs, lambda order: _carried(start.split()[-1], order)


def _total(order: Sequence[Event]) -> str:
    total, before = 0, ""
    for colour, digit in order:
        total += int(digit) if before in ("", colour) else -int(digit)
        before = colour
    return str(total % 10)


def _carried(holder: str, order: Sequence[Event]) -> str:
    for one, other in order:
        holder = other if holder == one else one if holder == other else holder
    return holder


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
