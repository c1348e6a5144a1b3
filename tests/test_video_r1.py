"""Video-R1's format: a row becomes a sample, epochs are shuffled rounds, what is held out is not trained on."""

import json

import pytest

from engine import worlds
from engine.config import ConfigError
from engine.container import VideoError
from engine.data.samples import looked_at
from engine.data.video_r1 import VideoR1Source


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r1")
    worlds.write(worlds.make("cups", 1, 0, "fresh"), folder / "clip.mp4", width=168, height=112)
    row = {
        "options": ["A. Yes", "B. No"], "problem_type": "multiple choice", "data_type": "video", "path": "./clip.mp4",
        "process": "<think>It moves.</think>", "solution": "<answer>A</answer>",
    }  # fmt: skip
    rows = [row | {"problem": f"Question {i}?"} for i in range(6)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def test_a_row_becomes_a_sample(data):
    sample = VideoR1Source(str(data / "data.json"), held_out=2)(0)
    assert (sample.options, sample.thoughts, sample.answer) == (("Yes", "No"), "It moves.", "A")
    frames, seconds = sample.visual.frames(sample.visual.sampling)
    assert len(frames) == 5  # 2.5 s at 2 frames a second
    assert seconds == 0.5


def test_every_epoch_is_one_shuffled_round_without_the_held_out(data):
    source = VideoR1Source(str(data / "data.json"), held_out=2)
    rounds = [[source(i).question for i in range(e * 4, e * 4 + 4)] for e in range(6)]
    assert all(sorted(r) == [f"Question {i}?" for i in range(4)] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    held = VideoR1Source(str(data / "data.json"), held_out=2, split="validation")
    assert [held(i).question for i in range(2)] == ["Question 4?", "Question 5?"]


def parsed(data, **change):
    (row, *_) = json.loads((data / "data.json").read_text())
    return VideoR1Source(str(data / "data.json")).parse(row | change)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["A: left", "B: right"], ("left", "right")),
        (["A)left", "B)right"], ("left", "right")),
        (["A.Yes", "B.9 cm"], ("Yes", "9 cm")),
        (["A. A", "B. C"], ("A", "C")),
        (["U.S. troops", "U.K. troops"], None),
        (["J. S. Bach", "G. F. Handel"], None),
        (["A. Lincoln", "Obama"], None),
        (["A.D.", "B.C."], None),
        (["A:B", "B:A"], None),
    ],
)
def test_letters_are_taken_off_only_where_each_option_has_its_own(data, given, options):
    assert parsed(data, options=given).options == (options or tuple(given))


def test_an_answer_is_the_letter_of_an_option_whatever_the_texts_are(data):
    answers = {"B": "B", "left": "A", "right": "B"}
    options = ["A. left", "B. right"]
    assert {
        each: parsed(data, options=options, solution=f"<answer>{each}</answer>").answer for each in answers
    } == answers
    assert parsed(data, options=["A. B", "B. A"], solution="<answer>B</answer>").answer == "B"


def test_options_are_shown_for_a_multiple_choice_alone(data):
    sample = parsed(data, problem_type="numerical", options=["A. 3", "B. 4"], solution="<answer>1,003.5</answer>")
    assert (sample.options, sample.answer) == ((), "1,003.5")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem_type": "riddle"}, "sample 1: unknown problem_type 'riddle'"),
        ({"path": None}, "sample 1: path missing"),
        ({"path": "./none.mp4"}, "sample 1: path names no file"),
        ({"problem": " "}, "sample 1: problem is empty"),
        ({"data_type": "sound"}, "sample 1: data_type must be image or video, not 'sound'"),
        ({"options": ["A. Yes"]}, "sample 1: options must be a list of 2 to 26"),
        ({"options": ["A. Yes", "B."]}, r"sample 1: options\[1\] is empty"),
        ({"options": ["A. Yes", 2]}, r"sample 1: options\[1\] must be text, not 2"),
        (
            {"options": ["B. right", "A. left"]},
            r"sample 1: options\[0\] begins with the letter B, and stands where A does",
        ),
        ({"options": ["A. left", "B. left"]}, r"sample 1: options\[0\] and options\[1\] are the same \('left'\)"),
        ({"solution": "<answer>D</answer>"}, "solution must be a letter from A to B or the text of an option, not 'D'"),
        (
            {"problem_type": "numerical", "solution": "<answer>three</answer>"},
            "solution must be a number for a numerical problem, not 'three'",
        ),
        (
            {"problem_type": "regression", "solution": "<answer>3 m</answer>"},
            "must be a number for a regression problem",
        ),
        ({"process": "It moves."}, "sample 1: process must be <think>...</think>, not 'It moves.'"),
        ({"process": "<thought>It moves.</thought>"}, "sample 1: process must be <think>"),
        ({"process": "<think> </think>"}, "sample 1: process holds no steps"),
        ({"solution": "A"}, "sample 1: solution must be <answer>...</answer>, not 'A'"),
        ({"solution": "<answer> </answer>"}, "sample 1: solution is empty"),
    ],
)
def test_bad_rows_are_named(data, change, words):
    rows = json.loads((data / "data.json").read_text())
    rows[1] = {k: v for k, v in (rows[1] | change).items() if v is not None}
    (data / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=words):
        VideoR1Source(str(data / "bad.json"), held_out=2)(0)


def test_missing_files_are_said(data):
    with pytest.raises(ConfigError, match="Can't read"):
        VideoR1Source(str(data / "none.json"))(0)
    with pytest.raises(ConfigError, match="path names no file"):
        VideoR1Source(str(data / "data.json"), root=str(data / "elsewhere"), held_out=2)(0)


def test_a_damaged_clip_is_said_when_its_turn_comes(data):
    rows = json.loads((data / "data.json").read_text())
    (data / "broken.mp4").write_bytes(b"no clip")
    (data / "damaged.json").write_text(json.dumps([row | {"path": "./broken.mp4"} for row in rows]))
    source = VideoR1Source(str(data / "damaged.json"), held_out=2)
    assert len(source) == 4
    with pytest.raises(VideoError, match=r"damaged\.json, sample \d: broken\.mp4 can't be read"):
        looked_at(source(0), lambda shown: shown.opened())
