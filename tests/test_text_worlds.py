"""Worlds in words: decided by their seed, split without overlap, solved from the words alone, at chance for guesses."""

import re
from collections import Counter

import pytest

from engine.backbones import small
from engine.config import ConfigError, build
from engine.data.text_worlds import TextWorldsSource, phrases, texts
from engine.worlds.text import FAMILIES, LARGEST, NOUNS, make

SPLITS = ("train", "validation", "test", "fresh")
WORDS = {"twice": 2, "half": 2, "three": 3, "third": 3, "four": 4, "quarter": 4, "five": 5, "fifth": 5}
OPERATIONS = (  # of the sentences of all stories about one amount, as a reader would take them
    (r"\b(half|third|quarter|fifth)\b|into (\d+) equal|equally by (\d+)", lambda value, n: value // n),
    (r"\b(twice|three|four|five)\b", lambda value, n: value * n),
    (r"(\d+) (?:of them|people (?:get off|leave)|pages fewer|hens (?:away|to))", lambda value, n: value - n),
    (r"(?:takes|pays) (\d+) dollars", lambda value, n: value - n),
    (r"(\d+)", lambda value, n: value + n),
)
GOLDEN = [
    "Jack wants to buy a book for 12 dollars. A sale cuts the bill to a third. The shop adds 12 dollars for the box. "
    "How many dollars does Jack pay?",
    "Every klumpus is a vumpus. Every filpus is a klumpus. Every rorpus is a quimpus. Mia is a rorpus. "
    "Ruth is a klumpus. Every filpus is a quimpus. Every klumpus is a tompus. Every rorpus is a lorpus. "
    "Every rimpus is a vumpus. Every rimpus is a rorpus. Is Ruth a vumpus or a quimpus?",
]


def matched(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text)
    assert found, text
    return found.groups()


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def told(record) -> tuple[list[str], str]:
    """The statements, and the question at the end."""
    *statements, question = re.split(r"(?<=[.?]) ", record.question)
    return statements, question


def story(statements: list[str]) -> int:
    """One amount, changed sentence by sentence."""
    value = numbers(statements[0])[0]
    for sentence in statements[1:]:
        pattern, change = next(pair for pair in OPERATIONS if re.search(pair[0], sentence))
        found = next(group for groups in re.finditer(pattern, sentence) for group in groups.groups() if group)
        value = change(value, WORDS.get(found) or int(found))
    return value


def compared(statements: list[str], who: str) -> int:
    """What one of several people has, worked out backwards."""
    sentence = next(s for s in statements if s.startswith(f"{who} has"))
    names = re.findall(r"\b[A-Z][a-z]+\b", sentence)[1:]
    values = [compared(statements, name) for name in names]
    if not names:
        return numbers(sentence)[0]
    if "together" in sentence:
        return sum(values)
    word = sentence.split(" has ")[1].removeprefix("a ").split()[0]
    if word in WORDS:
        return values[0] * WORDS[word] if word in ("twice", "three", "four", "five") else values[0] // WORDS[word]
    return values[0] + int(word) if "more" in sentence else values[0] - int(word)


def calculated(record) -> str:
    statements, question = told(record)
    person = re.fullmatch(r"How many \w+ does (\w+) have\?", question)
    return str(compared(statements, person[1]) if person else story(statements))


def links(record) -> dict[str, list[str]]:
    """Who is what, by the statements."""
    found: dict[str, list[str]] = {}
    for statement in told(record)[0]:
        one, two = matched(r"(?:Every )?(\w+) is a (\w+)\.", statement)
        found.setdefault(one, []).append(two)
    return found


def ways(record, name: str) -> list[tuple[str, ...]]:
    """Every way from a name to a candidate, as written steps."""
    known, (one, two), done = links(record), candidates(record)[1], []

    def walk(place: str, steps: tuple[str, ...]) -> None:
        if place in (one, two):
            done.append(steps)
        for next_place in known.get(place, ()):
            walk(next_place, (*steps, f"{'Every ' if steps else ''}{place} is a {next_place}."))

    walk(name, ())
    return done


def candidates(record) -> tuple[str, tuple[str, str]]:
    name, one, two = matched(r"Is (\w+) a (\w+) or a (\w+)\?", told(record)[1])
    return name, (one, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_problem_is_decided_by_its_name(family):
    assert make(family, 4, 5, "train") == make(family, 4, 5, "train")
    others = [make(family, 4, 6, "train"), make(family, 4, 5, "test"), make(family, 4, 5, "fresh")]
    assert len({make(family, 4, 5, "train").question, *(other.question for other in others)}) == 4


def test_problems_stay_as_they_were():
    """Trained weights and shipped numbers rest on these very problems."""
    assert [make(family, 2, 11, "test").question for family in FAMILIES] == GOLDEN


@pytest.mark.parametrize("difficulty", [1, 2, 3, 6, 10])
def test_calculations_follow_from_the_words_and_lead_to_the_answer(difficulty):
    for seed in range(120):
        record = make("arithmetic", difficulty, seed, SPLITS[seed % 4])
        known = [numbers(record.question)[0]]
        assert len(record.steps) == difficulty
        for place, step in enumerate(record.steps):
            first, sign, second, result = matched(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", step)
            a, b = int(first), int(second)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
            assert a == known[-1] or not place  # goes on from the result before it
            assert 0 <= int(result) <= LARGEST
            known = [*known, int(result)] if place else [a, int(result)]
        assert record.answer == str(known[-1]) == calculated(record)


@pytest.mark.parametrize("difficulty", [1, 2, 3, 6, 10])
def test_the_only_way_from_the_name_to_a_candidate_is_the_steps(difficulty):
    for seed in range(60):
        record = make("graph", difficulty, seed, SPLITS[seed % 4])
        name, _ = candidates(record)
        assert ways(record, name) == [record.steps]
        assert len(record.steps) == difficulty
        assert record.answer == f"{name} is a {record.steps[-1].split()[-1]}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_no_content_is_shared_between_splits(family, difficulty):
    def content(record):
        return record.steps if family == "arithmetic" else frozenset(told(record)[0])

    drawn = {split: {content(make(family, difficulty, seed, split)) for seed in range(300)} for split in SPLITS}
    assert not drawn["train"] & (drawn["validation"] | drawn["test"] | drawn["fresh"])
    assert not drawn["validation"] & (drawn["test"] | drawn["fresh"])


def undirected(record, name: str, goal: str) -> int:
    """Statements between a name and a candidate, whichever way they point."""
    pairs = [(one, two) for one, twos in links(record).items() for two in twos]
    reached, distance = {name}, 0
    while goal not in reached and distance < 99:
        near = {two for one, two in pairs if one in reached} | {one for one, two in pairs if two in reached}
        reached, distance = reached | near, distance + 1
    return distance


def cues(record) -> dict[str, tuple[int, ...]]:
    """Cue -> its value for either candidate, in the question's order; the larger one is guessed."""
    statements, (name, pair) = told(record)[0], candidates(record)
    named = [place for place, s in enumerate(statements) if s.startswith(f"{name} is")]
    mentions = [[place for place, s in enumerate(statements) if noun in re.split("[ .]", s)] for noun in pair]
    return {
        "second in the question": (0, 1),
        "mentioned last": tuple(max(places) for places in mentions),
        "mentioned first": tuple(-min(places) for places in mentions),
        "mentioned most": tuple(len(places) for places in mentions),
        "most led to": tuple(sum(s.endswith(f" {noun}.") for s in statements) for noun in pair),
        "told near the name": tuple(-min(abs(a - b) for a in places for b in named) for places in mentions),
        "told before the name": tuple(sum(a < min(named) for a in places) for places in mentions),
        "one step from the name": tuple(f"{name} is a {noun}." in statements for noun in pair),
        "noun's place in the vocabulary": tuple(NOUNS.index(noun) for noun in pair),
    }


def accuracies(records) -> dict[str, float]:
    """Of guessing by each cue; a tie is half right."""
    points: dict[str, float] = {}
    for record in records:
        right = candidates(record)[1].index(record.answer.split()[-1].rstrip("."))
        for cue, (one, two) in cues(record).items():
            points[cue] = points.get(cue, 0) + (0.5 if one == two else float((two > one) == bool(right)))
    return {cue: total / len(records) for cue, total in points.items()}


@pytest.mark.parametrize("difficulty", [2, 4, 6, 10])
def test_no_cue_tells_the_candidate(difficulty):
    found = accuracies([make("graph", difficulty, seed, "train") for seed in range(400)])
    assert len(found) == 9
    assert all(abs(share - 0.5) < 0.09 for share in found.values()), found


@pytest.mark.parametrize("difficulty", [1, 3, 6])
def test_asked_about_the_other_name_the_answer_is_the_other_candidate(difficulty):
    """So whatever doesn't follow the name through the statements is right half of the time, exactly."""
    for seed in range(60):
        record = make("graph", difficulty, seed, "train")
        name, pair = candidates(record)
        (other,) = {one for one in links(record) if one[0].isupper()} - {name}
        reached = [ways(record, one) for one in (name, other)]
        assert [len(found) for found in reached] == [1, 1]
        ends = [found[0][-1].split()[-1].rstrip(".") for found in reached]
        assert set(ends) == set(pair)
        assert len(reached[0][0]) == len(reached[1][0])
        degrees = [Counter(s.split()[-1] for s in told(record)[0])[f"{noun}."] for noun in pair]
        assert degrees[0] == degrees[1]


def test_directions_matter():
    """Going along the statements either way, the wrong candidate is often as near or nearer."""
    records = [make("graph", 6, seed, "train") for seed in range(200)]
    nearer = 0
    for record in records:
        name, (one, two) = candidates(record)
        right = record.answer.split()[-1].rstrip(".")
        wrong = two if one == right else one
        nearer += undirected(record, name, wrong) <= undirected(record, name, right)
    assert nearer > 20


@pytest.mark.parametrize("difficulty", [2, 3, 6])
def test_no_guess_calculates(difficulty):
    records = [make("arithmetic", difficulty, seed, "train") for seed in range(400)]
    answers = Counter(record.answer for record in records)
    assert answers.most_common(1)[0][1] / len(records) < 0.07
    assert len(answers) > 70
    for guess in (lambda n: n[-1], lambda n: n[0], max, sum, lambda n: n[0] + n[-1], lambda n: abs(n[0] - n[-1])):
        right = sum(str(guess(numbers(record.question))) == record.answer for record in records)
        assert right / len(records) < 0.25


def test_every_kind_of_sum_is_asked_for():
    signs = Counter(re.search(r"\d([-+*/])", make("arithmetic", 1, seed, "train").steps[0])[1] for seed in range(600))
    assert all(signs[sign] > 40 for sign in "+-*/")
    reused = [make("arithmetic", 4, seed, "train") for seed in range(300)]
    assert sum("together" in record.question for record in reused) > 20


def test_the_words_are_few():
    words = {word for text in texts(600) for word in re.findall(r"[A-Za-z]+", text)}
    assert len(words) < 300
    assert {f"{noun}" for noun in NOUNS} <= words


def test_what_is_said_again_and_again_is_one_token():
    words = small.tokenizer(texts(50), phrases=phrases())

    def told(text: str) -> list[str]:
        ids = words.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert words.decode(ids) == text
        return [words.decode([i]) for i in ids]

    assert told("There are 17 hens on the farm of Mia. A storm drives 86 hens away.") == [
        "There are ", "17", " hens on the farm of ", "Mia", ".", " A storm drives ", "86", " hens away.",
    ]  # fmt: skip
    assert told("Every gorpus is a lempus. Every lempus is a limpus.") == [
        "Every ", "gorpus", " is a ", "lempus", ". Every ", "lempus", " is a ", "limpus", ".",
    ]  # fmt: skip
    assert told("<<12*3=36>>") == ["<<", "12", "*", "3", "=", "36", ">>"]
    for index in range(200):
        told(TextWorldsSource(seed=1)(index).question)


def test_a_source_is_decided_by_seed_and_index():
    source = TextWorldsSource(difficulties=(2, 3), seed=4)
    first, second = source(6), source(7)
    assert (first.dialect, first.visual, first.options) == ("plain", None, ())
    assert first == TextWorldsSource(difficulties=(2, 3), seed=4)(6)
    assert first.problem_type == "numerical"
    assert second.answer.endswith(".")
    assert {len(source(i).steps) for i in range(20)} == {2, 3}
    assert {source.record(i).family for i in (0, 2, 4)} == {"arithmetic"}
    assert {TextWorldsSource(families=("graph",)).record(i).family for i in range(4)} == {"graph"}
    held_out = TextWorldsSource(split="validation", difficulties=(2, 3), seed=4)
    assert held_out(6).question != first.question


def test_a_ramp_begins_with_short_problems():
    source = TextWorldsSource(ramp=1000)
    assert {source.record(i).difficulty for i in range(100)} == {1}
    assert {source.record(i).difficulty for i in range(1000, 1100)} == set(range(1, 7))
    held_out = TextWorldsSource(ramp=1000, split="validation")
    assert {held_out.record(i).difficulty for i in range(100)} == set(range(1, 7))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("cups", 3, 1, "train"), "no text world 'cups'"),
        (("graph", 0, 1, "train"), "1 to 10 steps, not 0"),
        (("graph", 11, 1, "train"), "1 to 10 steps, not 11"),
        (("graph", 3, -1, "train"), "from 0, not -1"),
        (("graph", 3, 1, "exam"), "no split 'exam'"),
    ],
)
def test_bad_problems_are_refused_in_a_sentence(arguments, says):
    with pytest.raises(ValueError, match=says):
        make(*arguments)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"families": ["cups"]}, "no text world 'cups'; choose one of arithmetic, graph"),
        ({"families": []}, "name a world"),
        ({"difficulties": [2, 11]}, "1 to 10 steps, not 11"),
        ({"difficulties": [0, 2]}, "1 to 10 steps, not 0"),
        ({"difficulties": [3, 2]}, "the fewer first"),
        ({"ramp": -1}, "ramp is -1: it must be 0 or more"),
        ({"split": "exam"}, "no split 'exam'"),
    ],
)
def test_a_source_that_can_not_be_is_refused_before_a_run(settings, says):
    with pytest.raises(ConfigError, match=f"text_worlds: .*{says}"):
        build(TextWorldsSource, settings)
