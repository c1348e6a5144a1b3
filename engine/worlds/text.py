"""Two worlds in words, with exact steps and answers: arithmetic as in GSM8k-Aug, and who is what as in ProsQA.

`make` decides a problem. Its wording knows small vocabularies only, so that a small model can learn it. No problem is
in two of train, validation and test: not the same chain of calculations, nor the same set of statements.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.worlds.record import LONGEST, SPLITS, bucket

LARGEST = 100  # of all numbers on the way
NAMES = ("Mia", "Tom", "Ana", "Leo", "Eva", "Max", "Zoe", "Sam", "Lily", "Ben", "Ruth", "Jack")
THINGS = ("marbles", "stickers", "coins", "cards", "shells", "books", "pencils", "beads", "stamps", "apples")
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
STARTS = (
    "wum zum yum rom lem ster jel shum brim grim tum num vum dum gor lor ror zhor stor jom bom fom tom quim yim tim lim "
    "rim ter ger yer fer ver der scrom gwom plom drom klum blum skel mel dal gal bal sil nil fil"
)
NOUNS = tuple(f"{start}pus" for start in STARTS.split(" "))


@dataclass(frozen=True)
class TextRecord:
    """One problem: the question, its `difficulty` written steps, its answer."""

    family: str
    split: str
    seed: int
    difficulty: int
    question: str
    steps: tuple[str, ...]
    answer: str


Accept = Callable[[tuple], bool]  # whether a content is in the split asked for
Told = tuple[str, tuple[str, ...], str]  # question, steps, answer


def make(family: str, difficulty: int, seed: int, split: str) -> TextRecord:
    """The problem that these four name, always the same: `difficulty` steps (1 to 10), any seed from 0.

    `split` is train, validation, test or fresh; fresh problems share the test's contents but not its seeds.
    Raises ValueError on anything else.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no text world {family!r}; choose one of {', '.join(FAMILIES)}.")
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if not 1 <= difficulty <= LONGEST:
        raise ValueError(f"A problem has 1 to {LONGEST} steps, not {difficulty}.")
    if seed < 0:
        raise ValueError(f"A seed is a whole number from 0, not {seed}.")
    part = "test" if split == "fresh" else split
    rng = np.random.default_rng([SPLITS.index(split), FAMILIES.index(family), difficulty, seed])
    told = _WORLDS[family](rng, difficulty, lambda content: bucket((family, *content)) == part)
    return TextRecord(family, split, seed, difficulty, *told)


@dataclass(frozen=True)
class Operation:
    """`&` adds an earlier result, which is the number; `earlier` says which one, 0 being what the problem starts from."""

    sign: str
    number: int
    result: int
    earlier: int = 0

    @property
    def words(self) -> dict[str, object]:
        return {"n": self.number, "times": TIMES.get(self.number), "part": PARTS.get(self.number)}

    def step(self, before: int) -> str:
        return f"<<{before}{self.sign.replace('&', '+')}{self.number}={self.result}>>"


@dataclass(frozen=True)
class Scene:
    """A story about one amount that changes: how it opens, what each sign may be told as, and what is asked."""

    opening: str
    more: tuple[str, ...]
    less: tuple[str, ...]
    times: tuple[str, ...]
    part: tuple[str, ...]
    question: str

    @property
    def sentences(self) -> tuple[str, ...]:
        return (self.opening, *self.more, *self.less, *self.times, *self.part, self.question)

    def phrases(self, sign: str) -> tuple[str, ...]:
        return {"+": self.more, "-": self.less, "*": self.times, "/": self.part}[sign]


SCENES = (
    Scene(
        "{name} has {start} {things}.",
        ("Then {name} finds {n} more.", "{friend} gives {n} more to {name}.", "{name} buys {n} more."),
        ("{name} gives {n} of them to {friend}.", "{name} loses {n} of them.", "{name} sells {n} of them."),
        ("A week later {name} has {times} as many.", "{name} trades with {friend} and ends up with {times} as many."),
        ("{name} keeps only {part} of them.", "{name} sorts them into {n} equal piles and keeps one pile."),
        "How many {things} does {name} have now?",
    ),
    Scene(
        "A bus leaves the school with {start} people.",
        ("At the next stop {n} people get on.", "Then {n} more people get on."),
        ("At the next stop {n} people get off.", "Then {n} people leave the bus."),
        ("After the market there are {times} as many people on the bus.",),
        ("At the station only {part} of the people stay on.",),
        "How many people are on the bus at the end?",
    ),
    Scene(
        "{name} wants to buy a book for {start} dollars.",
        ("A pen for {n} dollars is added to the bill.", "The shop adds {n} dollars for the box."),
        ("A coupon takes {n} dollars off the bill.", "{friend} pays {n} dollars of the bill."),
        ("Then {name} orders all of it {times}.",),
        ("The bill is shared equally by {n} people, and {name} pays one share.", "A sale cuts the bill to {part}."),
        "How many dollars does {name} pay?",
    ),
    Scene(
        "On the first day {name} reads {start} pages.",
        ("On the next day {name} reads {n} pages more than the day before.",),
        ("On the next day {name} reads {n} pages fewer than the day before.",),
        ("On the next day {name} reads {times} as many pages as the day before.",),
        ("On the next day {name} reads {part} as many pages as the day before.",),
        "How many pages does {name} read on the last day?",
    ),
    Scene(
        "There are {start} hens on the farm of {name}.",
        ("In spring {n} more hens arrive.", "{name} buys {n} hens."),
        ("A storm drives {n} hens away.", "{name} sells {n} hens to {friend}."),
        ("A year later there are {times} as many hens.",),
        ("{name} keeps {part} of the hens.", "The hens are shared equally by {n} farms, {name} keeping one share."),
        "How many hens does {name} have at the end?",
    ),
)
COMPARED = {
    "+": "{who} has {n} more {things} than {other}.",
    "-": "{who} has {n} fewer {things} than {other}.",
    "*": "{who} has {times} as many {things} as {other}.",
    "/": "{who} has {part} as many {things} as {other}.",
    "&": "{who} has as many {things} as {other} and {third} together.",
}


ASKED = "How many {things} does {who} have?"


def arithmetic(rng: np.random.Generator, steps: int, accept: Accept) -> Told:
    scene = int(rng.integers(len(SCENES) + 2))  # people compared are two of seven
    compared = scene >= len(SCENES)
    while True:
        start = int(rng.integers(3, 31))
        done = operations(rng, start, steps, "+-*/&" if compared else "+-*/")
        before = (start, *(operation.result for operation in done))
        told = tuple(operation.step(value) for operation, value in zip(done, before, strict=False))
        if accept(told):
            break
    story = people(rng, start, done) if compared else amount(rng, SCENES[scene], start, done)
    return story, told, str(before[-1])


def operations(rng: np.random.Generator, start: int, steps: int, signs: str) -> list[Operation]:
    """Each goes on from the result before it; all results are whole numbers from 2 to LARGEST."""
    results, done = [start], list[Operation]()
    while len(done) < steps:
        value, sign = results[-1], signs[rng.integers(len(signs))]
        earlier = int(rng.integers(max(1, len(results) - 1)))
        if sign == "&" and len(results) == 1:
            continue
        number = results[earlier] if sign == "&" else int(rng.integers(2, 6 if sign in "*/" else 21))
        if sign == "/" and value % number:
            continue
        result = {"+": value + number, "&": value + number, "-": value - number, "*": value * number}.get(sign)
        result = value // number if result is None else result
        if 2 <= result <= LARGEST:
            results.append(result)
            done.append(Operation(sign, number, result, earlier))
    return done


def amount(rng: np.random.Generator, scene: Scene, start: int, done: list[Operation]) -> str:
    """One amount, changed in the order of telling."""
    name, friend = (NAMES[i] for i in rng.permutation(len(NAMES))[:2])
    words = {"name": name, "friend": friend, "things": THINGS[rng.integers(len(THINGS))], "start": start}
    told = [scene.opening.format(**words)]
    for operation in done:
        phrases = scene.phrases(operation.sign)
        told.append(phrases[rng.integers(len(phrases))].format(**words, **operation.words))
    return " ".join([*told, scene.question.format(**words)])


def people(rng: np.random.Generator, start: int, done: list[Operation]) -> str:
    """Each has so many compared with one before, told in any order."""
    who = [NAMES[i] for i in rng.permutation(len(NAMES))[: len(done) + 1]]
    things = THINGS[rng.integers(len(THINGS))]
    facts = [f"{who[0]} has {start} {things}."]
    for place, operation in enumerate(done):
        words = {"who": who[place + 1], "other": who[place], "third": who[operation.earlier], "things": things}
        facts.append(COMPARED[operation.sign].format(**words, **operation.words))
    told = [facts[i] for i in rng.permutation(len(facts))]
    return " ".join([*told, ASKED.format(things=things, who=who[-1])])


def graph(rng: np.random.Generator, steps: int, accept: Accept) -> Told:
    """Two names head two graphs of one shape, a chain of `steps` nouns and a branch that ends as deep; either is asked.

    Everything that holds of one candidate holds of the other, so that only the way from the name tells them apart.
    Nouns that nobody is lead into both graphs: the way back from a candidate forks as well, and only the statements'
    direction keeps the graphs apart.
    """
    fork = int(rng.integers(steps))  # nouns of the chain before the branch
    parents = [*range(-1, steps - 1), fork - 1, *range(steps, 2 * steps - fork - 1)]  # -1 is the name
    size = len(parents)
    first, second = (int(i) for i in rng.permutation(size)[:2])  # the strays lead here; there are always two nouns
    while True:
        asked, other = (NAMES[i] for i in rng.permutation(len(NAMES))[:2])
        nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))]
        one, two, (stray, waif) = nouns[:size], nouns[size : 2 * size], nouns[2 * size : 2 * size + 2]
        links = [(asked if p < 0 else one[p], noun) for noun, p in zip(one, parents, strict=True)]
        links += [(other if p < 0 else two[p], noun) for noun, p in zip(two, parents, strict=True)]
        links += [(stray, one[first]), (stray, two[second]), (waif, one[second]), (waif, two[first])]
        candidates = one[steps - 1], two[steps - 1]
        if accept((*sorted(links), *sorted(candidates))):
            break
    told = [stated(*links[i]) for i in rng.permutation(len(links))]
    here, there = (candidates[i] for i in rng.permutation(2))
    way = tuple(stated(*link) for link in pairwise((asked, *one[:steps])))
    return " ".join([*told, f"Is {asked} a {here} or a {there}?"]), way, f"{asked} is a {candidates[0]}."


def stated(one: str, other: str) -> str:
    return f"{one} is a {other}." if one in NAMES else f"Every {one} is a {other}."


_WORLDS: dict[str, Callable[[np.random.Generator, int, Accept], Told]] = {"arithmetic": arithmetic, "graph": graph}
FAMILIES = tuple(_WORLDS)
