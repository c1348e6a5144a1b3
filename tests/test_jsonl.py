"""Data written by hand: every field does what its description says, and what can't be used is named by line and field."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine import worlds
from engine.config import ConfigError, build
from engine.data.jsonl import JsonlSource
from engine.data.samples import context
from engine.footage import Footage
from tests.tiny import tiny_backbone

PLAIN: dict = {"question": "What is 2 + 3, doubled?", "steps": ["2 + 3 = 5", "5 * 2 = 10"], "answer": "10"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    (place / "clips").mkdir()
    worlds.write(worlds.make("cups", 1, 0, "fresh"), place / "clips" / "cups.mp4", width=168, height=112)
    for name in ("one.png", "two.png"):
        Image.fromarray(np.full((56, 84, 3), 90, np.uint8)).save(place / name)
    return place


def written(folder, *rows: dict | str, name: str = "own.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def one(folder, row: dict, **settings):
    return JsonlSource(written(folder, row), split="test", **settings)(0)


def test_text_alone(folder):
    sample = one(folder, PLAIN)
    assert (sample.visual, sample.question, sample.steps, sample.answer) == (None, PLAIN["question"], tuple(PLAIN["steps"]), "10")  # fmt: skip
    assert (sample.problem_type, sample.dialect, sample.options) == ("numerical", "chat", ())


def test_a_video_beside_the_file(folder):
    sample = one(folder, PLAIN | {"video": "clips/cups.mp4"}, fps=2.0, pixels=56 * 84)
    assert isinstance(sample.visual, Footage)
    frames, seconds = sample.visual.frames(sample.visual.sampling)
    assert (len(frames), seconds, sample.visual.still) == (5, 0.5, False)  # 2.5 s
    assert frames.shape[1] * frames.shape[2] <= 56 * 84


def test_an_image_and_several(folder):
    sample = one(folder, PLAIN | {"image": "one.png"})
    assert sample.visual.still
    several = one(folder, PLAIN | {"images": ["two.png", "one.png"]})
    assert [shown.path.name for shown in several.visuals] == ["two.png", "one.png"]
    model = tiny_backbone()
    single, both = (model.encode(context(s)) for s in (sample, several))
    assert (len(single.visual), len(both.visual)) == (1, 2)
    assert torch.equal(both.visual[0][0].patches, single.visual[0][0].patches)
    assert len(both.ids) > len(single.ids)


def test_options_and_their_answers(folder):
    rows = [PLAIN | {"options": ["left", "1,000", "B"], "answer": answer} for answer in ("A", "left", "1000", 1000)]
    source = JsonlSource(written(folder, *rows), split="test")
    assert [source(i).answer for i in range(4)] == ["A", "A", "B", "B"]
    assert (source(0).options, source(0).problem_type) == (("left", "1,000", "B"), "multiple choice")
    with pytest.raises(ConfigError, match="line 1: answer 'B' is the letter of one option and the text of another"):
        one(folder, rows[0] | {"answer": "B"})


def test_a_chain_is_a_step_a_line_and_sections_have_names(folder):
    row = {key: PLAIN[key] for key in ("question", "answer")}
    assert one(folder, row | {"chain": " One.\n\n Two. "}).steps == ("One.", "Two.")
    sectioned = one(folder, row | {"steps": {"SUMMARY": "I look.", "REASONING": "It is so."}})
    assert (sectioned.steps, sectioned.sections) == (("I look.", "It is so."), ("SUMMARY", "REASONING"))


def test_types_of_problems(folder):
    answers = {"a lamp": "free-form", 3: "numerical", "-2.5": "numerical", True: "free-form"}
    assert {answer: one(folder, PLAIN | {"answer": answer}).problem_type for answer in answers} == answers
    assert one(folder, PLAIN | {"answer": "STOP", "type": "OCR"}).problem_type == "OCR"


def test_plain_text_has_its_options_in_the_question(folder):
    sample = one(folder, PLAIN | {"options": ["5", "10"], "answer": "10"}, dialect="plain")
    assert sample.question.endswith("Options:\nA. 5\nB. 10")
    assert (sample.options, sample.answer, sample.dialect) == ((), "B", "plain")


def test_a_file_from_a_text_editor(folder):
    file = written(folder, "\ufeff" + json.dumps(PLAIN) + "\r", "", json.dumps(PLAIN | {"question": "Où ? 💡"}) + "\r")
    source = JsonlSource(file, split="test")
    assert [source(i).question for i in range(2)] == [PLAIN["question"], "Où ? 💡"]
    assert source(1).where == f"{file}, line 3"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": " "}, "question is empty"),
        ({"question": None}, "question must be text, not None"),
        ({"question": "<image> What?"}, "question has the marker <image>"),
        ({"question": "\ud800?"}, "question contains an unpaired surrogate"),
        ({"answer": ""}, "answer is empty"),
        ({"answer": None}, "answer must be text"),
        ({"answer": ["10"]}, "answer must be text"),
        ({"answer": float("nan")}, "answer must be a finite number, not nan"),
        ({"answer": float("inf")}, "answer must be a finite number, not inf"),
        ({"steps": []}, "steps holds no steps"),
        ({"steps": "one"}, "steps must be a list of texts, not 'one'"),
        ({"steps": ["one", 2]}, r"steps\[1\] must be text, not 2"),
        ({"steps": {"A": ""}}, "steps.A is empty"),
        ({"steps": ["a"] * 65}, "steps holds 65 steps, more than 64"),
        ({"chain": "one"}, "chain and steps are both given"),
        ({"step": ["one"]}, r"step is no field of this format \(did you mean steps\?\)"),
        ({"options": ["one"]}, "options must be 2 to 26 texts"),
        ({"options": ["one", "two", "one"]}, r"options\[0\] and options\[2\] are the same \('one'\)"),
        ({"options": ["1,000", "1000"]}, r"options\[0\] and options\[1\] are the same \('1000'\)"),
        ({"options": ["B. 9", "A. 10"]}, r"options\[0\] begins with the letter B, and stands where A does"),
        ({"options": ["A. 9", "B. 10"]}, "options must be texts without their letters"),
        ({"options": [str(i) for i in range(27)]}, "options must be 2 to 26 texts"),
        ({"options": ["one", "two"]}, "answer must be a letter from A to B or the text of an option, not '10'"),
        ({"type": "riddle"}, "type must be one of multiple choice, .* not 'riddle'"),
        ({"type": ["OCR"]}, "type must be text"),
        ({"type": "numerical", "answer": "abc"}, "answer must be a number for a numerical problem, not 'abc'"),
        ({"type": "regression", "answer": "3 m"}, "answer must be a number for a regression problem, not '3 m'"),
        ({"type": "numerical", "answer": True}, "answer must be a number for a numerical problem, not 'True'"),
        ({"type": "multiple choice"}, "type is multiple choice, and options are missing"),
        ({"options": ["10", "11"], "type": "OCR"}, "type is OCR, and options are given"),
        ({"video": "none.mp4"}, "video names no file"),
        ({"video": "\0.mp4"}, "video names no file"),
        ({"video": "x" * 5000}, "video names no file"),
        ({"video": "clips"}, "video names no file"),
        ({"images": []}, "images is empty"),
        ({"images": ["one.png", "none.png"]}, r"images\[1\] names no file"),
        ({"image": "one.png", "video": "clips/cups.mp4"}, "image stands beside video"),
    ],
)
def test_bad_rows_are_named(folder, change, says):
    (folder / "bad.jsonl").write_text("\n".join(json.dumps(row) for row in (PLAIN, PLAIN | change)))
    source = JsonlSource(str(folder / "bad.jsonl"))
    with pytest.raises(ConfigError, match=rf"bad\.jsonl, line 2: {says}"):
        source(0)


@pytest.mark.parametrize("line", ["{", "[1, 2]", "7", '"text"', "{" * 5000, '{"answer": ' + "9" * 5000 + "}"])
def test_lines_that_are_no_row(folder, line):
    with pytest.raises(ConfigError, match="line 2: row"):
        JsonlSource(written(folder, PLAIN, line))(0)


def test_bytes_that_are_no_text(folder):
    (folder / "latin.jsonl").write_bytes(json.dumps(PLAIN).encode() + b'\n{"question": "\xe9"}\n')
    with pytest.raises(ConfigError, match="line 2: row is not UTF-8 text"):
        JsonlSource(str(folder / "latin.jsonl"))(0)


def test_settings_that_cannot_be(folder):
    with pytest.raises(ConfigError, match=r"cache_gigabytes: 0\.5 is too little"):
        JsonlSource(cache="frames", cache_gigabytes=0.5)
    with pytest.raises(ConfigError, match="fps, frames, pixels: min_frames"):
        one(folder, PLAIN | {"video": "clips/cups.mp4"}, frames=(8, 4))


def test_a_configuration_names_it():
    from train.command import Run

    run = build(Run, {"method": {}, "jsonl": {"file": "mine.jsonl", "fps": 1, "frames": [2, 8], "cache": "frames"}})
    assert run.source == JsonlSource("mine.jsonl", fps=1.0, frames=(2, 8), cache="frames")


def test_every_field_is_described():
    import engine.data.jsonl as module

    for name in module.FIELDS:
        assert f" {name} " in module.__doc__.replace(",", " ").replace("|", " ") or f"\n    {name}" in module.__doc__
