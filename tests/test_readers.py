"""Readers of published formats: rows become samples, rounds are shuffled, and what can't be used is named and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.config import ConfigError, build
from engine.container import VideoError
from engine.data.aokvqa import AokvqaSource, MultimodalCoconutSource, prepare
from engine.data.coconut_json import CoconutSource
from engine.data.codi_json import CodiSource, sentences
from engine.data.gsm8k_icot import Gsm8kIcotSource
from engine.data.llava_cot import LlavaCotSource
from engine.data.samples import looked_at
from tests.tiny import tiny_internvl

ICOT = [
    "Tom has 3 boxes of 4 pens. He loses 2. How many are left?||<<3*4=12>> <<12-2=10>> #### 10",
    "A shelf holds 1.5 kg on each of 2 boards.  How much is that?||<<1.5*2=3>> #### 3",
    "A house costs 5 times 1,000 dollars. How much?||<<5*1000=5000>> #### 5,000",
]
PROSQA: dict = {
    "question": "Every wumpus is a lorpus. Max is a wumpus. Is Max a lorpus or hilpus?",
    "steps": ["Max is a wumpus.", "Every wumpus is a lorpus."],
    "answer": "Max is a lorpus.",
    "edges": [[0, 1], [1, 2]],
}
CODI: list[dict] = [
    {"question": "What is 2 + 3, doubled?", "cot": "<<2+3=5>> <<5*2=10>>", "answer": "10"},
    {
        "question": "How much do Mr. Lee's apples cost?",
        "cot": "Mr. Lee buys 2 apples at $1.50 each. So he pays 2 * 1.5 = $3.\nThat is all!",
        "answer": "#### 3",
    },
    {"question": "Can a dog fly?", "cot": "Dogs have no wings. What has no wings can't fly.", "answer": False},
]
SECTIONS = "<SUMMARY> I look. </SUMMARY>\n\n<CAPTION> A dog. </CAPTION>\n<REASONING>1.\n2.</REASONING> <CONCLUSION> It is a dog. </CONCLUSION>"
AOKVQA = {
    "image_id": 123456, "question_id": "q", "split": "train", "question": "What is it?", "choices": ["cat", "dog"],
    "correct_choice_idx": 1, "direct_answers": ["dog"], "rationales": ["It barks.", "It has a tail."],
}  # fmt: skip


def turn(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    picture = np.zeros((70, 100, 3), np.uint8)
    picture[:, 50:] = 255
    for name in ("dog.png", "000000123456.jpg"):
        Image.fromarray(picture).save(tmp_path / "images" / name)
    return tmp_path


def wrote(folder, name: str, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    whole = json.dumps(rows) if name.endswith(".json") else "\n".join(lines) + "\n"
    (folder / name).write_text(whole, encoding="utf-8")
    return str(folder / name)


def test_icot_lines(folder):
    source = Gsm8kIcotSource(wrote(folder, "gsm.txt", ICOT), split="test")
    first, _, third = (source(i) for i in range(3))
    assert first.question == "Tom has 3 boxes of 4 pens. He loses 2. How many are left?"
    assert (first.steps, first.answer) == (("<<3*4=12>>", "<<12-2=10>>"), "10")
    assert (first.dialect, first.problem_type, first.options, first.visual) == ("plain", "numerical", (), None)
    assert third.answer == "5000"  # as answers are compared


def test_coconut_rows(folder):
    source = CoconutSource(wrote(folder, "prosqa.json", [PROSQA]))
    assert source(0).steps == tuple(PROSQA["steps"])
    assert (source(0).question, source(0).answer, source(0).dialect) == (
        PROSQA["question"],
        "Max is a lorpus.",
        "plain",
    )


@pytest.mark.parametrize("name", ["codi.json", "codi.jsonl"])
def test_codi_rows(folder, name):
    source = CodiSource(wrote(folder, name, CODI), split="test")
    samples = [source(i) for i in range(3)]
    assert [sample.answer for sample in samples] == ["10", "3", "False"]
    assert samples[0].steps == ("<<2+3=5>>", "<<5*2=10>>")
    assert samples[1].steps == (
        "Mr. Lee buys 2 apples at $1.50 each.", "So he pays 2 * 1.5 = $3.", "That is all!",
    )  # fmt: skip
    assert samples[2].steps == ("Dogs have no wings.", "What has no wings can't fly.")


def test_sentences_keep_their_numbers():
    assert sentences("1. Add 2.5. 2. Double it.") == ("1. Add 2.5.", "2. Double it.")
    assert sentences("Is it? No! Dr. No said so.\n\nDone") == ("Is it?", "No!", "Dr. No said so.", "Done")
    assert sentences("He pays 5. So 3 are left.\n1. Go. ") == ("He pays 5.", "So 3 are left.", "1. Go.")
    assert sentences(" ") == ()


def test_llava_cot_rows(folder):
    talk = [*turn("<image>\nWhat is it?", SECTIONS), *turn("Really?", SECTIONS.replace("It is a dog", "Yes"))]
    row = {"id": "1", "image": "images/dog.png", "conversations": talk}
    source = LlavaCotSource(wrote(folder, "train.jsonl", [row]), split="test")
    first, second = source(0), source(1)
    assert len(source) == 2
    assert (first.question, first.answer) == ("What is it?", "It is a dog.")
    assert first.steps == ("I look.", "A dog.", "1.\n2.")
    assert first.sections == ("SUMMARY", "CAPTION", "REASONING")
    assert (first.dialect, first.problem_type) == ("chat", "as asked")
    assert (second.question, second.answer) == ("Really?", "Yes.")
    assert first.visual.still
    pixels, _ = first.visual.frames(first.visual.sampling)
    assert pixels.shape == (1, 56, 112, 3)  # 70 x 100 pixels: multiples of 28
    assert pixels[:, :, :56].max() < 40
    assert pixels[:, :, 56:].min() > 215


def test_aokvqa_rows_and_their_prepared_form(folder):
    source = AokvqaSource(wrote(folder, "aokvqa.json", [AOKVQA]), root=str(folder / "images"))
    sample = source(0)
    assert sample.question == "What is it? The choices are 0: cat, 1: dog."
    assert (sample.steps, sample.answer) == (("Step 1: It barks.", "Step 2: It has a tail."), "dog")
    assert (sample.dialect, sample.visual.still) == ("plain", True)
    out = folder / "prepared" / "train.json"
    assert prepare(source, out) == 1
    (row,) = json.loads(out.read_text())
    assert set(row) == {"image_path", "question", "steps", "answer"}
    assert row["image_path"] == "../images/000000123456.jpg"
    again = MultimodalCoconutSource(str(out))(0)
    assert replace(again, visual=None) == replace(sample, visual=None)
    assert again.visual.path.samefile(sample.visual.path)


def test_every_epoch_is_one_shuffled_round_without_the_held_out(folder):
    file = wrote(folder, "gsm.txt", [f"Number {i}?||<<{i}+0={i}>> #### {i}" for i in range(8)])
    source = Gsm8kIcotSource(file, held_out=2)
    rounds = [[source(i).answer for i in range(e * 6, e * 6 + 6)] for e in range(4)]
    assert all(sorted(r) == list("012345") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert rounds == [[Gsm8kIcotSource(file, held_out=2)(e * 6 + i).answer for i in range(6)] for e in range(4)]
    assert rounds[0] != [Gsm8kIcotSource(file, held_out=2, seed=1)(i).answer for i in range(6)]
    held = replace(source, split="validation")
    assert [held(i).answer for i in range(3)] == ["6", "7", "6"]
    whole = replace(source, split="test")
    assert [whole(i).answer for i in range(8)] == list("01234567")


def test_a_validation_file_leaves_all_rows_to_training(folder):
    other = wrote(folder, "valid.txt", ICOT[:1])
    source = Gsm8kIcotSource(wrote(folder, "gsm.txt", ICOT), validation_file=other, held_out=2)
    assert len(source) == 3
    assert replace(source, split="validation")(0).answer == "10"


def test_only_training_needs_steps(folder):
    file = wrote(folder, "gsm.txt", [ICOT[0], "How many?|| #### 7"])
    assert Gsm8kIcotSource(file, split="test")(1).steps == ()
    with pytest.raises(ConfigError, match="line 2: chain holds no steps"):
        Gsm8kIcotSource(file)(0)
    rows = wrote(folder, "gsm.json", [PROSQA | {"steps": [""]}])
    assert CoconutSource(rows, split="test")(0).steps == ()
    with pytest.raises(ConfigError, match="sample 0: steps holds no steps"):
        CoconutSource(rows)(0)


def test_methods_that_need_no_steps_train_without(folder):
    file = wrote(folder, "gsm.txt", [ICOT[0], "How many?|| #### 7"])
    source = Gsm8kIcotSource(file, without_steps=True)
    assert sorted(source(i).steps for i in range(2)) == [(), ("<<3*4=12>>", "<<12-2=10>>")]
    rows = wrote(folder, "gsm.json", [PROSQA | {"steps": []}])
    assert CoconutSource(rows, without_steps=True)(0).answer == "Max is a lorpus."


def test_steps_beyond_the_limit_are_named(folder):
    chain = " ".join(f"<<{i}+1={i + 1}>>" for i in range(5))
    many = {"gsm.txt": [f"How many?||{chain} #### 5"], "a.json": [PROSQA | {"steps": ["a"] * 5}], "b.json": [CODI[0] | {"cot": chain}]}  # fmt: skip
    readers = {"gsm.txt": (Gsm8kIcotSource, "chain"), "a.json": (CoconutSource, "steps"), "b.json": (CodiSource, "cot")}
    for name, rows in many.items():
        reader, field = readers[name]
        file = wrote(folder, name, rows)
        assert len(reader(file, most_steps=5)(0).steps) == 5
        for split in ("train", "test"):
            with pytest.raises(ConfigError, match=f"{name}, (line 1|sample 0): {field} holds 5 steps, more than 4"):
                reader(file, most_steps=4, split=split)(0)


BAD = [
    (Gsm8kIcotSource, "a.txt", "How many? #### 7", "line 2: question and chain must be separated by exactly one"),
    (Gsm8kIcotSource, "a.txt", "How many?||<<1+1=2>>", "line 2: chain and answer must be separated by exactly one ####, not 0"),
    (Gsm8kIcotSource, "a.txt", "How many?||<<1+1=2>> #### ", "line 2: answer is empty"),
    (Gsm8kIcotSource, "a.txt", " ||<<1+1=2>> #### 2", "line 2: question is empty"),
    (Gsm8kIcotSource, "a.txt", "How #### many?||<<1+1=2>> 2", "line 2: question must stand before"),
    (Gsm8kIcotSource, "a.txt", "How many?||<<1+1=2>> so 2 #### 2", "line 2: chain has 'so 2' outside <<...>>"),
    (CoconutSource, "a.json", ["no row"], r"sample 1: row must hold fields, not \['no row'\]"),
    (CoconutSource, "a.json", PROSQA | {"steps": "one"}, "sample 1: steps must be a list, not 'one'"),
    (CoconutSource, "a.json", PROSQA | {"steps": ["one", ""]}, r"sample 1: steps\[1\] is empty"),
    (CoconutSource, "a.json", PROSQA | {"answer": None}, "sample 1: answer must be text, not None"),
    (CoconutSource, "a.json", {"steps": ["a"], "answer": "b"}, "sample 1: question missing"),
    (CodiSource, "a.jsonl", CODI[0] | {"cot": "<<1+1=2>> then"}, "line 2: cot has 'then' outside"),
    (CodiSource, "a.jsonl", CODI[0] | {"cot": " "}, "line 2: cot holds no steps"),
    (CodiSource, "a.jsonl", CODI[0] | {"cot": None}, "line 2: cot must be text"),
    (CodiSource, "a.jsonl", CODI[0] | {"answer": None}, "line 2: answer must be text, not None"),
]  # fmt: skip
GOOD = {Gsm8kIcotSource: ICOT[0], CoconutSource: PROSQA, CodiSource: CODI[0]}


@pytest.mark.parametrize(("reader", "name", "row", "says"), BAD)
def test_bad_rows_are_named(folder, reader, name, row, says):
    file = wrote(folder, name, [GOOD[reader], row, GOOD[reader]])
    with pytest.raises(ConfigError, match=says) as error:
        reader(file)(0)
    assert f"{file}, " in str(error.value)
    assert "1 of its 3 rows can't be used; leave_out: 1 goes on without them." in str(error.value)
    assert len(reader(file, leave_out=1)) == 2


def test_rows_that_cannot_be_used_are_counted_over_both_splits(folder):
    bad = CODI[0] | {"answer": None}
    file = wrote(folder, "both.jsonl", [CODI[0], bad, bad, CODI[0], CODI[0], bad, CODI[0]])
    for split in ("validation", "train"):
        source = CodiSource(file, held_out=2, split=split)
        with pytest.raises(ConfigError, match=r"line 2: answer .* 3 of its 7 rows can't be used; leave_out: 3 goes on"):
            source(0)
        assert len(replace(source, leave_out=3)) == {"validation": 1, "train": 3}[split]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (SECTIONS.replace("CAPTION", "THOUGHT"), "value must have one <CAPTION>, not 0"),
        (SECTIONS.replace("</REASONING>", ""), "value must have one </REASONING>, not 0"),
        (SECTIONS + "<SUMMARY> Again. </SUMMARY>", "value must have one <SUMMARY>, not 2"),
        (SECTIONS + " <DOUBT> Or? </DOUBT>", "value has an unknown section <DOUBT>"),
        (SECTIONS + " Right?", "value has 'Right\\?' outside its sections"),
        (SECTIONS.replace("A dog.", ""), "<CAPTION> is empty"),
        (
            "<CAPTION> a </CAPTION>" + SECTIONS.replace("<CAPTION> A dog. </CAPTION>", ""),
            "value must have the sections .* one after another, not CAPTION",
        ),
    ],
)
def test_bad_sections_are_named(folder, answer, says):
    row = {"id": "1", "image": "images/dog.png", "conversations": turn("What?", SECTIONS)}
    bad = row | {"conversations": [*row["conversations"], *turn("And?", answer)]}
    file = wrote(folder, "train.jsonl", [row, bad])
    with pytest.raises(ConfigError, match=f"line 2, turn 1: {says}"):
        LlavaCotSource(file)(0)
    assert len(LlavaCotSource(file, leave_out=1)) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": "images/cat.png"}, "image names no file"),
        ({"conversations": []}, "conversations must hold a human's question"),
        ({"conversations": turn("What?", SECTIONS)[:1]}, "conversations must hold a human's question"),
        ({"conversations": turn("What?", SECTIONS)[::-1]}, "conversations must hold a human's question"),
        ({"conversations": "none"}, "conversations must hold a human's question"),
        ({"conversations": turn("<image>", SECTIONS)}, "value is empty"),
    ],
)
def test_bad_conversations_are_named(folder, change, says):
    row = {"id": "1", "image": "images/dog.png", "conversations": turn("What?", SECTIONS)} | change
    with pytest.raises(ConfigError, match=f"line 1: {says}"):
        LlavaCotSource(wrote(folder, "train.jsonl", [row]))(0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_id": 7}, "image_id names no file"),
        ({"image_id": "7"}, "image_id must be a number"),
        ({"image_id": True}, "image_id must be a number, not True"),
        ({"correct_choice_idx": 2}, "correct_choice_idx must be one of 0 to 1, not 2"),
        ({"correct_choice_idx": None}, "correct_choice_idx must be one of 0 to 1, not None"),
        ({"correct_choice_idx": True}, "correct_choice_idx must be one of 0 to 1, not True"),
        ({"choices": "cat"}, "choices must be a list"),
        ({"choices": ["dog"], "correct_choice_idx": 0}, r"choices must be a list of 2 to 26, not \['dog'\]"),
        ({"choices": ["dog", " dog"]}, r"choices\[0\] and choices\[1\] are the same \('dog'\)"),
        ({"choices": ["", "dog"]}, r"choices\[0\] is empty"),
        ({"rationales": []}, "steps holds no steps"),
        ({"rationales": ["It barks.", 2]}, r"rationales\[1\] must be text, not 2"),
        ({"question": ""}, "question is empty"),
    ],
)
def test_bad_annotations_are_named(folder, change, says):
    file = wrote(folder, "aokvqa.json", [AOKVQA | change])
    with pytest.raises(ConfigError, match=f"sample 0: {says}"):
        AokvqaSource(file, root=str(folder / "images"))(0)


def test_a_damaged_image_is_said_when_its_turn_comes(folder):
    (folder / "images" / "dog.png").write_bytes(b"no picture")
    row = {"id": "1", "image": "images/dog.png", "conversations": turn("What?", SECTIONS)}
    source = LlavaCotSource(wrote(folder, "train.jsonl", [row]))
    assert len(source) == 1
    with pytest.raises(VideoError, match=r"train\.jsonl, line 1: dog\.png"):
        looked_at(source(0), tiny_internvl().see)


def test_files_that_cannot_be_read_are_named(folder):
    with pytest.raises(ConfigError, match=r"Can't read .*none\.txt"):
        Gsm8kIcotSource(str(folder / "none.txt"))(0)
    with pytest.raises(ConfigError, match="set its file"):
        CoconutSource()(0)
    with pytest.raises(ConfigError, match=r"broken\.jsonl, line 2: row is not valid JSON"):
        CodiSource(wrote(folder, "broken.jsonl", [CODI[0], "{"]))(0)
    with pytest.raises(ConfigError, match="must be more than 3"):
        Gsm8kIcotSource(wrote(folder, "gsm.txt", ICOT), held_out=3)(0)
    with pytest.raises(ConfigError, match="has no rows held out: set held_out or validation_file"):
        Gsm8kIcotSource(wrote(folder, "gsm.txt", ICOT), split="validation")(0)
    with pytest.raises(ConfigError, match="holds no rows"):
        CoconutSource(wrote(folder, "none.json", []), split="test")(0)


def test_a_configuration_builds_a_reader():
    source = build(LlavaCotSource, {"file": "train.jsonl", "leave_out": "3", "split": "train", "pixels": 784})
    assert (source.leave_out, source.pixels) == (3, 784)
    with pytest.raises(ConfigError, match="Did you mean 'leave_out'"):
        build(LlavaCotSource, {"leave_outs": 1})
