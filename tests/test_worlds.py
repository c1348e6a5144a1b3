"""Worlds: decided by their seed, split without overlap, at chance for guesses, told exactly, drawn and filmed alike."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from engine.config import ConfigError
from engine.data.worlds import WorldsSource
from engine.worlds import FAMILIES, as_json, draw, make, tally, write
from engine.worlds.oracle import solve
from engine.worlds.record import bucket
from engine.worlds.tally import Practice
from tests.orderless import best, guesses

HEIGHT, WIDTH = 56, 84
GOLDEN = [
    [
        "ball starts first",
        "first and third swap, ball third",
        "first and second swap, ball third",
        "first and third swap, ball first",
        "first and fourth swap, ball fourth",
        "so fourth C",
    ],
    [
        "star starts purple",
        "red and blue touch, star purple",
        "green and purple touch, star green",
        "red and blue touch, star green",
        "green and purple touch, star purple",
        "so purple B",
    ],
    [
        "total starts 0",
        "blue 8, plus 8 is 8",
        "blue 5, plus 5 is 3",
        "orange 4, minus 4 is 9",
        "blue 1, minus 1 is 8",
        "so 8 A",
    ],
]


def moments(record):
    return np.arange(0, record.duration, 0.25)


def uneven(counts: Counter, values) -> float:
    """Chi-square over its degrees of freedom: about 1 for an even draw, far above 3 for a biased one."""
    values = list(values)
    expected = sum(counts.values()) / len(values)
    assert set(counts) <= set(values)
    return sum((counts[value] - expected) ** 2 / expected for value in values) / (len(values) - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_is_decided_by_its_name(family):
    first, second = make(family, 3, 5, "train"), make(family, 3, 5, "train")
    assert first == second
    assert hash(first.trajectory) == hash(second.trajectory)
    assert (draw(first, moments(first), HEIGHT, WIDTH) == draw(second, moments(second), HEIGHT, WIDTH)).all()
    others = [make(family, 3, 5, "fresh"), make(family, 3, 5, "test"), make(family, 3, 6, "train")]
    assert all(first.trajectory != other.trajectory for other in others)


def test_clips_stay_as_they_were():
    """Trained weights and shipped numbers rest on these very clips."""
    told = [[step.text for step in make(family, 4, 11, "test").steps] for family in FAMILIES]
    assert told == GOLDEN, told


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_no_trajectory_is_shared_between_splits(family, steps):
    drawn = {
        split: {make(family, steps, seed, split).trajectory for seed in range(150)}
        for split in ("train", "validation", "test", "fresh")
    }
    assert not drawn["train"] & (drawn["validation"] | drawn["test"] | drawn["fresh"])
    assert not drawn["validation"] & (drawn["test"] | drawn["fresh"])


def test_no_handwritten_picture_is_shared_between_splits():
    parts = [{number for digit in tally.pictures(part) for number in digit} for part in ("train", "validation", "test")]
    assert [round(len(part) / 1797, 1) for part in parts] == [0.7, 0.1, 0.2]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    for split, part in zip(("train", "validation", "test", "fresh"), (*parts, parts[2]), strict=True):
        records = [make("tally", 4, seed, split) for seed in range(40)]
        assert {flash.picture for record in records for flash in record.scene.flashes} <= part


def test_training_digits_come_in_another_hand_each_and_stay_on_their_card():
    hands = [flash.hand for seed in range(40) for flash in make("tally", 6, seed, "train").scene.flashes]
    assert len(set(hands)) == 240
    for split in ("validation", "test", "fresh"):
        assert {flash.hand for flash in make("tally", 6, 0, split).scene.flashes} == {tally.AS_WRITTEN}
    step, picture = 10 / 60, np.ones((8, 8), np.float32)  # ink everywhere: the farthest that any digit reaches
    written, *others = (
        tally.stroke(picture, (60, 60), step, (-1.5 + step / 2,) * 2, hand) > 0 for hand in (tally.AS_WRITTEN, *hands)
    )
    assert all(written.mean() / 2 < other.mean() < 1.1 * written.mean() for other in others)
    assert sum((other != written).mean() > 0.02 for other in others) > 200
    middles = [np.argwhere(other).mean(0) - 29.5 for other in others]
    assert 1 < max(np.abs(middle).max() for middle in middles) < 0.6 / step


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("family", ["cups", "relay"])
def test_the_start_does_not_tell_the_end(family, steps, split):
    ends, letters = {}, {}
    for seed in range(600):
        record = make(family, steps, seed, split)
        count = len(record.options)
        start, end = (record.steps[index].text.split()[-1] for index in (0, -2))
        names = sorted(record.options) if family == "cups" else list(record.scene.colours)
        ends.setdefault((count, names.index(start)), Counter())[names.index(end)] += 1
        letters.setdefault(count, Counter())[record.letter] += 1
    assert len(ends) == 7  # places to start from: three and four
    assert np.mean([uneven(counts, range(count)) for (count, _), counts in ends.items()]) < 2.2
    assert all(uneven(counts, "ABCD"[:count]) < 4.5 for count, counts in letters.items())


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_total_is_even_and_no_single_digit_tells_it(steps):
    records = [make("tally", steps, seed, "train") for seed in range(1000)]
    assert uneven(Counter(record.answer for record in records), map(str, range(10))) < 2.8
    assert uneven(Counter(record.letter for record in records), "ABCD") < 4.5
    assert all(len(set(record.options)) == 4 for record in records)
    if steps > 1:
        last = Counter((int(record.answer) - record.scene.flashes[-1].digit) % 10 for record in records)
        assert uneven(last, range(10)) < 2.8


@pytest.mark.parametrize("family", ["cups", "relay"])
def test_no_single_swap_tells_the_end(family):
    """The hidden thing ends among the two of any one swap as often as two of the places would have it."""
    inside, total, moved = Counter(), Counter(), 0
    for seed, steps in product(range(500), (3, 4)):
        record = make(family, steps, seed, "train")
        count, *_, start, events = (len(record.options), *record.scene.trajectory)
        pairs, places = [event[:2] for event in events], [start]
        assert all(before != after for before, after in pairwise(pairs))
        for first, second in pairs:
            places.append({first: second, second: first}.get(places[-1], places[-1]))
        moved += sum(before != after for before, after in pairwise(places)) / steps
        for back in range(1, 4):
            inside[count, back] += places[-1] in pairs[-back]
            total[count, back] += 1
    assert moved / 1000 > 0.55
    for (count, back), times in total.items():
        assert abs(inside[count, back] / times - 2 / count) < 0.09


def retold_cups(scene):
    names = {3: "left middle right", 4: "first second third fourth"}[scene.cups].split()
    row = [place == scene.start for place in range(scene.cups)]
    yield f"ball starts {names[row.index(True)]}"
    for swap in scene.swaps:
        row[swap.left], row[swap.right] = row[swap.right], row[swap.left]
        yield f"{names[swap.left]} and {names[swap.right]} swap, ball {names[row.index(True)]}"


def retold_relay(scene):
    holds = {colour: number == scene.start for number, colour in enumerate(scene.colours)}
    yield f"star starts {next(colour for colour in holds if holds[colour])}"
    for touch in scene.touches:
        pair = [scene.colours[touch.first], scene.colours[touch.second]]
        pair.sort(key=["red", "blue", "green", "yellow", "purple", "orange"].index)
        holds[pair[0]], holds[pair[1]] = holds[pair[1]], holds[pair[0]]
        yield f"{pair[0]} and {pair[1]} touch, star {next(colour for colour in holds if holds[colour])}"


def retold_tally(scene):
    yield "total starts 0"
    total, colours = 0, [flash.colour for flash in scene.flashes]
    for number, flash in enumerate(scene.flashes):
        if number == 0 or colours[number - 1] == colours[number]:
            sign, total = "plus", total + flash.digit
        else:
            sign, total = "minus", total - flash.digit
        yield f"{flash.colour} {flash.digit}, {sign} {flash.digit} is {total - 10 * (total // 10)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_tells_what_happens(family):
    retold = {"cups": retold_cups, "relay": retold_relay, "tally": retold_tally}[family]
    for seed, steps in product(range(12), (1, 2, 5, 10)):
        record = make(family, steps, seed, "validation")
        texts = [step.text for step in record.steps]
        assert texts[:-1] == list(retold(record.scene))
        assert texts[-2].split()[-1] == record.answer
        assert texts[-1] == f"so {record.answer} {record.letter}"
        assert record.options["ABCD".index(record.letter)] == record.answer
        assert all(re.fullmatch(r"[a-z0-9, ]+", text) for text in texts[:-1])
        assert [(step.start, step.end) for step in record.steps] == [
            (0, 1),
            *((1 + i, 2 + i) for i in range(steps)),
            (1 + steps, 1.5 + steps),
        ]
        assert record.duration == 1.5 + steps
        if family == "tally":
            labels = tally.digits()[1]
            assert all(labels[flash.picture] == flash.digit for flash in record.scene.flashes)


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_rest_between_steps_and_move_within(family):
    for seed in range(4):
        record = make(family, 4, seed, "train")
        frames = draw(record, moments(record), HEIGHT, WIDTH).astype(int)
        assert frames.shape == (22, HEIGHT, WIDTH, 3)
        for step in range(4):
            rest, *moving = frames[4 + 4 * step : 8 + 4 * step]
            for frame in moving:
                assert (np.abs(frame - rest).max(-1) > 40).mean() > 0.03
            around = draw(record, [1 + step - 0.01, 1 + step + 0.01], HEIGHT, WIDTH).astype(int)
            assert np.abs(around - rest).mean() < 1  # no jump from one step to the next
        assert (np.abs(frames[0] - frames[4]).max(-1) > 40).mean() > 0.02 or family == "tally"  # the start is shown
        assert (frames[0] == frames[4]).all() or family != "tally"  # an empty card
        hidden = [frames[4 + 4 * step] for step in range(5)]
        if family != "relay":  # whose shapes change places
            assert all((frame == hidden[0]).all() for frame in hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_drawn_together_are_as_each_alone(family):
    """Pictures share what is at rest, and none may be painted over by another."""
    record = make(family, 3, 4, "train")
    times = np.random.default_rng(0).permutation(np.arange(0, record.duration, 0.2))
    alone = [draw(record, [time], HEIGHT, WIDTH)[0] for time in times]
    assert (draw(record, times, HEIGHT, WIDTH) == np.stack(alone)).all()


@pytest.mark.parametrize("family", ["cups", "relay"])
def test_the_ball_and_the_star_are_seen_at_the_start_only(family):
    """Two clips that differ in the hiding place alone look the same from the first step on."""
    record = make(family, 3, 3, "train")
    other = replace(record, scene=replace(record.scene, start=(record.scene.start + 1) % 3))
    later = np.arange(1, record.duration, 0.25)
    assert (draw(record, later, HEIGHT, WIDTH) == draw(other, later, HEIGHT, WIDTH)).all()
    for early in (0.0, 0.25, 0.5):
        assert (draw(record, [early], HEIGHT, WIDTH) != draw(other, [early], HEIGHT, WIDTH)).mean() > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_only_changes_the_grain(family):
    import cv2

    record = make(family, 1, 2, "train")
    times = [0.0, 1.5]
    small, large = draw(record, times, HEIGHT, WIDTH), draw(record, times, 6 * HEIGHT, 6 * WIDTH)
    shrunk = np.stack([cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for frame in large])
    assert np.abs(small.astype(int) - shrunk).mean() < 2
    assert draw(record, times, 84, 84).shape == (2, 84, 84, 3)
    assert draw(record, [], HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH, 3)


def decoded(path):
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = stream.codec_context.name, stream.codec_context.pix_fmt, int(stream.average_rate)
        seconds = float(stream.duration * stream.time_base)
        return facts, seconds, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_film_shows_the_drawing_and_the_oracle_solves_it(family, tmp_path):
    record = make(family, 2, 21, "fresh")
    write(record, tmp_path / "clip.mp4")
    facts, seconds, frames = decoded(tmp_path / "clip.mp4")
    assert facts == ("h264", "yuv420p", 24)
    assert seconds == pytest.approx(record.duration)
    assert frames.shape == (round(24 * record.duration), 336, 504, 3)
    times = moments(record)
    assert np.abs(frames[::6][: len(times)].astype(int) - draw(record, times, 336, 504)).mean() < 4
    assert solve(frames[::6], times, record.question, record.options) == record.letter
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser can start at once
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_solves_every_length(family):
    for steps in range(1, 11):
        record = make(family, steps, 100 + steps, "test")
        times = moments(record)
        assert solve(draw(record, times, 168, 252), times, record.question, record.options) == record.letter


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_what_happens_matters_from_the_second_step_on(family):
    share = {}
    for steps in (1, 4):
        records = [make(family, steps, seed, "test") for seed in range(30)]
        assert all(guesses(record)[record.answer] > 0 for record in records)  # the true order is among those played
        share[steps] = np.mean([best(record) for record in records])
    assert share[1] == 1
    assert share[4] < 0.85


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_reads_the_frames_and_not_the_record(family):
    """Shown the frames of another clip it gives the other clip's answer, so it can be wrong."""
    asked, *others = (make(family, 4, seed, "test") for seed in range(300))
    shown = next(
        other
        for other in others
        if other.answer in asked.options
        and other.answer != asked.answer
        and (family == "tally" or set(other.options) == set(asked.options))
    )
    letter = solve(draw(shown, moments(shown), 168, 252), moments(shown), asked.question, asked.options)
    assert asked.options["ABCD".index(letter)] == shown.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_json_names_the_clip(family):
    record = make(family, 2, 9, "validation")
    told = json.loads(json.dumps(as_json(record)))
    assert make(**{name: told[name] for name in ("family", "difficulty", "seed", "split")}) == record
    assert told["steps"][1] == {"text": record.steps[1].text, "start": 1.0, "end": 2.0}
    assert told["options"] == list(record.options)
    assert told["letter"] == record.letter


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("dice", 3, 1, "train"), "no world 'dice'"),
        (("cups", 0, 1, "train"), "1 to 10 steps, not 0"),
        (("cups", 11, 1, "train"), "1 to 10 steps, not 11"),
        (("cups", 3, -1, "train"), "from 0, not -1"),
        (("cups", 3, 1, "exam"), "no split 'exam'"),
        (
            ("tally", 3, 1, "train", Practice(1)),
            r"2 to 10 digits in training, .*, and 10 and 0.5 elsewhere, not Practice\(digits=1, ",
        ),
        (("tally", 3, 1, "train", Practice(10, 0.6)), r"not Practice\(digits=10, orange=0.6\)"),
        (("tally", 3, 1, "test", Practice(10, 0.4)), r"not Practice\(digits=10, orange=0.4\)"),
    ],
)
def test_bad_clips_are_refused_in_a_sentence(arguments, says):
    with pytest.raises(ValueError, match=says):
        make(*arguments)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"families": ("cup",)}, "no world 'cup'"),
        ({"families": ()}, "name a world"),
        ({"difficulties": (0, 3)}, "from 1 to 10"),
        ({"difficulties": (3, 11)}, "from 1 to 10"),
        ({"difficulties": (4, 3)}, "the fewest and the most steps"),
        ({"split": "exam"}, "no split 'exam'"),
        ({"seed": -1}, "from 0, not -1"),
        ({"ramp": -1}, "ramp is -1: it must be 0 or more"),
        ({"digits_ramp": -9}, "digits_ramp is -9: it must be 0 or more"),
        ({"colours_ramp": -1}, "colours_ramp is -1: it must be 0 or more"),
    ],
)
def test_a_source_that_cannot_be_is_refused_in_a_sentence(settings, says):
    with pytest.raises(ConfigError, match=f"^worlds: .*{says}"):
        WorldsSource(**settings)


def test_steps_grow_in_training_alone():
    """What is held out is as long at the start as at the end."""
    rising, whole = WorldsSource(families=("cups",), ramp=60), WorldsSource(families=("cups",))
    assert {rising.record(i).difficulty for i in range(10)} == {1}
    assert {whole.record(i).difficulty for i in range(60)} == set(range(1, 7))
    for split in ("validation", "test"):
        one, other = replace(rising, split=split), replace(whole, split=split)
        assert all(one.record(i) == other.record(i) for i in range(30))


def test_tally_grows_in_training_alone():
    """What is held out has all digits and colours at the start as at the end, and nothing of it is trained on while tally is easy."""
    growing = WorldsSource(families=("tally",), difficulties=(4, 6), digits_ramp=900, colours_ramp=900)
    drawn = [growing.record(i).scene.flashes for i in range(1000)]
    most = np.array([max(flash.digit for flash in flashes) for flashes in drawn]).reshape(10, 100)
    orange = np.array([np.mean([flash.colour == "orange" for flash in flashes]) for flashes in drawn]).reshape(10, 100)
    whole = (most > np.minimum(np.arange(10) + 1, 9)[:, None]).mean(1)  # have all digits already
    assert all(0.1 < share < 0.3 for share in whole[:6])
    assert (most[4] < 3).mean() > 0.02  # few are still practised
    assert (most[9] > 7).mean() > 0.3
    assert orange[:2].mean() < 0.3 < orange[4:6].mean() < 0.4 < orange[9].mean() < 0.55
    for split in ("validation", "test"):
        one, other = replace(growing, split=split), replace(growing, split=split, digits_ramp=0, colours_ramp=0)
        assert all(one.record(i) == other.record(i) for i in range(30))
    assert all(bucket(growing.record(i).trajectory) == "train" for i in range(200))
    others = replace(growing, families=("cups", "relay"))
    assert others.record(0) == replace(others, digits_ramp=0, colours_ramp=0).record(0)


def test_bad_films_are_refused_in_a_sentence(tmp_path):
    record = make("tally", 1, 1, "fresh")
    with pytest.raises(ValueError, match="no folder"):
        write(record, tmp_path / "missing" / "clip.mp4")
    with pytest.raises(ValueError, match="even sides"):
        write(record, tmp_path / "clip.mp4", width=101, height=68)
    with pytest.raises(ValueError, match=r"end the name 'clip.avi' in \.mp4"):
        write(record, tmp_path / "clip.avi")
    with pytest.raises(ValueError, match="one frame a second"):
        write(record, tmp_path / "clip.mp4", fps=0)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write(record, tmp_path / "folder.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]
    with pytest.raises(ValueError, match="oracle only knows"):
        solve(draw(record, [0, 1], HEIGHT, WIDTH), [0, 1], "Why?", record.options)
