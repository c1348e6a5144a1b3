"""Published files of real benchmarks become questions; bad rows are named; scores are summed up by hand-worked rules."""

import base64
import csv
import gzip
import io
import json

import pytest
from PIL import Image

from engine.config import ConfigError
from engine.exams.protocols import PROTOCOLS, Graded, figures, questions, summary
from engine.exams.tables import table


def picture(side: int = 56) -> bytes:
    made = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(made, "PNG")
    return made.getvalue()


PICTURE = base64.b64encode(picture()).decode()


@pytest.fixture
def media(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in ("images/1.jpg", "images/v1_0.png", "val2017/000000000042.jpg", "clip.mp4"):
        (tmp_path / name).write_bytes(picture())
    return tmp_path


def tsv(folder, name: str, rows: list[dict]) -> str:
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        made = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        made.writeheader()
        made.writerows(rows)
    return str(folder / name)


def wrote(folder, name: str, rows) -> str:
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return str(folder / name)


def grade(name: str, asked, *said: str, judge=None) -> list[float]:
    return [PROTOCOLS[name].score(told, each, judge) for told, each in zip(said, asked, strict=True)]


VIDEO_R1 = {
    "problem_id": 7, "problem": "What happens?", "data_type": "video", "problem_type": "multiple choice",
    "options": ["A. it falls", "B. it rises"], "process": "", "solution": "<answer>B</answer>", "path": "./clip.mp4",
    "data_source": "MVBench",
}  # fmt: skip


def test_video_r1(media):
    kinds = ("numerical", "regression", "OCR", "free-form")
    trues = ("3", "10", "go left", "a red ball")
    more = [
        VIDEO_R1 | {"problem_id": i, "problem_type": kind, "options": [], "solution": f"<answer>{true}</answer>"}
        for i, (kind, true) in enumerate(zip(kinds, trues))
    ]
    asked = questions("video-r1", wrote(media, "eval.json", [VIDEO_R1, *more]), media)
    assert (asked[0].id, asked[0].options, asked[0].true) == ("7", ("it falls", "it rises"), "B")
    assert (asked[0].still, asked[0].media) == (False, (media / "clip.mp4",))
    found = grade("video-r1", asked, "B", "3", "9.3", "go right", "a red ball")
    assert found == pytest.approx([1, 1, 0.9, 0.5, 1])
    told = summary("video-r1", [Graded(q, s) for q, s in zip(asked, found)])
    assert told["mean_mra"]["score"] == pytest.approx(0.9)
    assert told["mean_acc"]["score"] == pytest.approx(3.5 / 4)  # all but the regression
    assert told["by"]["data_source"]["MVBench"]["n"] == 5
    assert told["by"]["problem_type"]["OCR"]["score"] == 0.5


AOKVQA = {
    "split": "val", "image_id": 42, "question_id": "q1", "question": "What is it?", "choices": ["cat", "dog"],
    "correct_choice_idx": 1, "direct_answers": ["dog"] * 2 + ["puppy"] * 8, "difficult_direct_answer": False,
}  # fmt: skip


def test_aokvqa_both_ways(media):
    file = wrote(media, "aokvqa.json", [AOKVQA, AOKVQA | {"question_id": "q2", "difficult_direct_answer": True}])
    chosen = questions("aokvqa-choice", file, media)
    assert [each.true for each in chosen] == ["B", "B"]
    assert chosen[0].media == (media / "val2017" / "000000000042.jpg",)
    assert grade("aokvqa-choice", chosen, "B", "a cat") == [1, 0]
    direct = questions("aokvqa-direct", file, media)
    assert [each.id for each in direct] == ["q1"]  # the one that is hard without choices is left out
    assert grade("aokvqa-direct", direct, "Dog") == pytest.approx([2 / 3])
    assert grade("aokvqa-direct", direct, "puppy") == [1]


def test_tables_of_options(media):
    row = {"index": "0", "hint": "Look.", "question": "Which?", "A": "x", "B": "y", "C": "", "D": "nan", "answer": "B",
           "category": "finding", "l2-category": "perception", "image": PICTURE}  # fmt: skip
    turned = row | {"index": "1000000", "A": "y", "B": "x", "answer": "A", "image": "0"}  # the picture of row 0
    other = row | {"index": "1", "hint": "", "image": PICTURE, "category": "naming"}
    asked = questions("mmbench", tsv(media, "mmbench.tsv", [row, turned, other]), media)
    assert (asked[0].text, asked[0].options) == ("Look.\nWhich?", ("x", "y"))
    assert asked[0].media == asked[1].media == (base64.b64decode(PICTURE),)
    assert asked[2].text == "Which?"
    found = grade("mmbench", asked, "B", "B", "y")
    assert found == [1, 0, 1]
    told = summary("mmbench", [Graded(q, s) for q, s in zip(asked, found)])
    assert told["score"] == pytest.approx(2 / 3)
    assert (told["circular"]["score"], told["circular"]["n"]) == (0.5, 2)  # one of its two rotations is wrong
    assert told["by"]["category"] == {"finding": figures([1, 0]), "naming": figures([1])}


def test_options_keep_the_letters_of_their_columns(media):
    """An option may be the number 0; where a column between is empty, the ones behind it keep their letters."""
    row = {"index": 0, "question": "How many?", "A": 0, "B": 1, "answer": "B", "image": "images/1.jpg"}
    gap = row | {"index": 1, "C": "", "D": 7, "answer": "D"}
    for file in (wrote(media, "zero.json", [row, gap]), tsv(media, "zero.tsv", [row, gap])):
        whole, broken = questions("mmstar", file, media)
        assert (whole.options, whole.true) == (("0", "1"), "B")
        assert (broken.text, broken.options) == ("How many? Options:\nA. 0\nB. 1\nD. 7", ())
        for said, score in (("D", 1), ("7", 1), ("C", 0), ("B", 0), ("0", 0)):
            assert grade("mmstar", [broken], said) == [score]
    (late,) = questions("mmstar", wrote(media, "late.json", [row | {"A": None, "C": 5}]), media)
    assert late.text.endswith("Options:\nB. 1\nC. 5")
    assert grade("mmstar", [late], "B") == [1]


def test_a_question_may_show_several_pictures(media):
    row = {"index": 0, "question": "Which?", "A": "x", "B": "y", "answer": "B", "image": ["images/1.jpg", PICTURE]}
    both = (media / "images" / "1.jpg", base64.b64decode(PICTURE))
    (listed,) = questions("mmstar", wrote(media, "listed.json", [row]), media)
    (told,) = questions("mmstar", tsv(media, "listed.tsv", [row]), media)
    assert listed.media == told.media == both


def test_mmstar_with_options_in_the_question(media):
    rows = [{"index": 3, "question": "Which?\nOptions: A: x, B: y", "answer": "B", "image": "images/1.jpg"}]
    asked = questions("mmstar", wrote(media, "mmstar.json", rows), media)
    assert (asked[0].options, asked[0].media) == ((), (media / "images" / "1.jpg",))
    assert grade("mmstar", asked, "(B)") == [1]
    assert grade("mmstar", asked, "A") == [0]
    assert grade("mmstar", asked, "y") == [0]


def hallusion(media, form: str) -> list:
    """Two figures of one set, each asked the same two questions."""
    rows = []
    for figure in (0, 1):
        for question in (0, 1):
            right = (figure + question) % 2
            if form == "json":
                rows.append({
                    "category": "VD", "subcategory": "figure", "visual_input": "1", "set_id": "5", "figure_id": str(figure),
                    "question_id": str(question), "question": "Is it?", "gt_answer": str(right), "filename": "./images/1.jpg",
                })  # fmt: skip
            else:
                rows.append({
                    "index": f"VD_figure_0_5_{figure}_{question}", "question": "Is it?", "answer": ("No", "Yes")[right],
                    "category": "VD", "l2-category": "figure", "image": PICTURE,
                })  # fmt: skip
    file = wrote(media, "hb.json", rows) if form == "json" else tsv(media, "hb.tsv", rows)
    return questions("hallusionbench", file, media)


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_hallusionbench(media, form):
    asked = hallusion(media, form)
    assert [each.true for each in asked] == ["No", "Yes", "Yes", "No"]
    found = grade("hallusionbench", asked, "No.", "yes", "Yes", "yes")  # the last is wrong
    told = summary("hallusionbench", [Graded(q, s) for q, s in zip(asked, found)])
    assert told["aAcc"]["score"] == 0.75
    assert told["fAcc"]["score"] == 0.5  # figure 0 is all right, figure 1 isn't
    assert told["qAcc"]["score"] == 0.5  # question 0 is right for both figures, question 1 isn't


def test_hallusionbench_without_a_picture(media):
    row = {
        "category": "VS", "subcategory": "map", "visual_input": "0", "set_id": "0", "figure_id": "0", "question_id": "0",
        "question": "Is it?", "gt_answer": "1", "filename": None,
    }  # fmt: skip
    (asked,) = questions("hallusionbench", wrote(media, "vs.json", [row]), media)
    assert asked.media == ()


def test_mathvista_as_published_and_as_a_table(media):
    row = {"question": "How many?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": 1.0, "answer": "2.5",
           "question_type": "free_form", "answer_type": "float", "pid": "1"}  # fmt: skip
    chosen = row | {
        "choices": ["(red)", "blue"],
        "answer": "blue",
        "question_type": "multi_choice",
        "answer_type": "text",
    }
    asked = questions("mathvista", wrote(media, "testmini.json", {"1": row, "2": chosen | {"pid": "2"}}), media)
    assert [each.kind for each in asked] == ["numerical", "multiple choice"]
    assert grade("mathvista", asked, "It is 2.54.", "B") == [1, 1]
    told = tsv(media, "mv.tsv", [row | {"index": "0", "image": PICTURE, "choices": "[]", "unit": "cm"}])
    (asked,) = questions("mathvista", told, media)
    assert asked.text == "How many? (Unit: cm)"
    text = [row | {"answer_type": "text", "answer": "two", "precision": None}]
    free = questions("mathvista", wrote(media, "free.json", text), media)
    assert grade("mathvista", free, "two") == [1]
    assert grade("mathvista", free, "a pair", judge=lambda question, said, true: 0.5) == [0.5]


def test_mmvet_needs_a_judge(media):
    file = wrote(media, "mm-vet.json", {"v1_0": {
        "imagename": "images/v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"],
    }})  # fmt: skip
    asked = questions("mmvet", file, media)
    assert asked[0].id == "v1_0"
    heard = []
    found = grade("mmvet", asked, "x = -1", judge=lambda *told: heard.append(told) or 0.5)
    assert heard == [("What is x?", "x = -1", "-1<AND>-5")]
    told = summary("mmvet", [Graded(asked[0], found[0])])
    assert told["by"]["capability"] == {"math": figures([0.5]), "ocr": figures([0.5])}
    with pytest.raises(ValueError, match="need a judge"):
        grade("mmvet", asked, "x")
    with pytest.raises(ValueError, match="0 to 1"):
        grade("mmvet", asked, "x", judge=lambda *told: 7)
    with pytest.raises(ValueError, match="failed on v1_0: division"):
        grade("mmvet", asked, "x", judge=lambda *told: 1 / 0)


def test_intervals():
    """Right and wrong: Wilson's, 8 of 10. Scores between: mean 0.5, standard deviation 0.5 over 2 samples."""
    told = figures([1.0] * 8 + [0.0] * 2)
    assert (told["score"], told["n"]) == (0.8, 10)
    assert told["interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    spread = 1.959964 * (((0.2**2 + 0.2**2) / 1) ** 0.5) / 2**0.5
    assert figures([0.3, 0.7])["interval"] == pytest.approx([0.5 - spread, 0.5 + spread])
    assert figures([0.05, 0.95])["interval"] == [0, 1]  # held to what scores can be


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("video-r1", {"path": "gone.mp4"}, "sample 0: names no file"),
        ("video-r1", {"problem_type": "odd"}, "unknown problem_type 'odd'"),
        ("video-r1", {"options": ["A. one"]}, "of 2 to 26"),
        ("video-r1", {"options": ["B. one", "A. two"]}, "options[0] begins with the letter B, and stands where A does"),
        ("video-r1", {"options": ["A. one", "B. one"]}, "options[0] and options[1] are the same ('one')"),
        ("video-r1", {"solution": "C"}, "a letter from A to B or the text of an option, not 'C'"),
        (
            "video-r1",
            {"problem_type": "numerical", "solution": "three"},
            "a number for a numerical problem, not 'three'",
        ),
        ("aokvqa-choice", {"correct_choice_idx": True}, "correct_choice_idx must be one of 0 to 1, not True"),
        ("aokvqa-direct", {"direct_answers": "['dog',"}, "direct_answers must be a list, not"),
        ("aokvqa-choice", {"choices": ["cat"]}, "choices must be a list of 2 to 26"),
        ("aokvqa-choice", {"choices": ["cat", "cat"]}, "choices[0] and choices[1] are the same ('cat')"),
        ("video-r1", {"solution": ""}, "solution"),
        ("mmstar", {"answer": None}, "answer missing"),
        ("mmstar", {"answer": "E"}, "one of its 2 options"),
        ("mmstar", {"image": "images/gone.jpg"}, "names no file"),
        ("mmstar", {"image": "!" * 100}, "nor a picture in base64"),
        ("mmstar", {"image": "['images/1.jpg', 'b.jpg']"}, "names no file"),
        ("mmstar", {"image": "['a.jpg', "}, "image must be a list, not"),
        ("mathvista", {"answer_type": None}, "answer_type missing"),
        ("mathvista", {"choices": "[1,"}, "choices must be a list"),
        ("hallusionbench", {"answer": "maybe"}, "yes or no"),
        ("hallusionbench", {"index": "12"}, "index must be like"),
    ],
)
def test_bad_rows_are_named(media, name, change, sentence):
    rows = {
        "video-r1": VIDEO_R1,
        "aokvqa-choice": AOKVQA,
        "aokvqa-direct": AOKVQA,
        "mmstar": {"index": 0, "question": "Which?", "A": "x", "B": "y", "answer": "A", "image": "images/1.jpg"},
        "mathvista": {"question": "How?", "answer": "1", "answer_type": "integer", "pid": "1", "image": "images/1.jpg"},
        "hallusionbench": {"index": "VD_a_0_0_0_0", "question": "Is it?", "answer": "Yes", "category": "VD",
                           "l2-category": "a", "image": "images/1.jpg"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="1 of its 1 rows can't be used") as told:
        questions(name, wrote(media, "bad.json", [rows[name] | change]), media)
    assert sentence in str(told.value)


def test_bad_files(media):
    with pytest.raises(ConfigError, match="Can't read"):
        table(media / "gone.json", media)
    (media / "torn.json").write_text('[{"a": 1}, {')
    with pytest.raises(ConfigError, match="not valid JSON"):
        table(media / "torn.json", media)
    (media / "torn.jsonl").write_text('{"a": 1}\n{\n')
    with pytest.raises(ConfigError, match=r"torn\.jsonl, line 2: row is not valid JSON"):
        table(media / "torn.jsonl", media)
    with pytest.raises(ConfigError, match="holds no rows"):
        table(media / wrote(media, "none.json", []), media)
    for name, content, says in (
        ("packed.json", gzip.compress(b"[]"), r"is compressed \(gzip\): unpack it first \(gunzip packed\.json\)"),
        ("packed.tsv", gzip.compress(b"index"), r"is compressed \(gzip\)"),
        ("wide.tsv", "index\tA".encode("utf-16"), "is UTF-16: write it as UTF-8 first"),
        ("latin.tsv", b"index\tquestion\n1\t\xe9?\n", "latin.tsv, line 2: row is not UTF-8 text"),
        ("latin.json", b'[{"question": "\xe9?"}]', "latin.json, sample 0: row is not UTF-8 text"),
        ("head.tsv", b"index\tquestion\n", "holds no rows"),
    ):
        (media / name).write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            table(media / name, media)
    lines = "\n".join([json.dumps(VIDEO_R1), "", json.dumps(VIDEO_R1 | {"problem_id": 8})])
    (media / "rows.jsonl").write_text(lines)
    assert [each.id for each in questions("video-r1", media / "rows.jsonl", media)] == ["7", "8"]
    with pytest.raises(ConfigError, match="same name"):
        questions("video-r1", wrote(media, "twice.json", [VIDEO_R1, VIDEO_R1]), media)
