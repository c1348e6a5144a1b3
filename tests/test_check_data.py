"""check-data and prepare as a user types them; and that a large file is opened without its media."""

import bz2
import gzip
import json
import lzma
import random
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.__main__ import main
from engine.config import ConfigError
from engine.data import check
from engine.data.aokvqa import MultimodalCoconutSource
from engine.data.codi_json import CodiSource
from engine.data.files import FileSource, Rows, json_rows
from engine.data.jsonl import JsonlSource
from engine.data.values import BadRow, as_json, written
from engine.data.video_r1 import VideoR1Source
from tests.media import write
from tests.test_readers import AOKVQA, CODI, ICOT, PROSQA, SECTIONS, turn
from train.command import Run

R1 = {
    "problem": "What happens?", "options": ["A. Yes", "B. No"], "problem_type": "multiple choice", "data_type": "video",
    "path": "./clip.mp4", "process": "<think>It moves.</think>", "solution": "<answer>A</answer>",
}  # fmt: skip
OWN = {"video": "clip.mp4", "question": "What moves?", "steps": ["A ball."], "answer": "a ball"}
LLAVA = {"id": "1", "image": "dog.png", "conversations": [*turn("What?", SECTIONS), *turn("And?", SECTIONS)]}
COCONUT_D = {"image_path": "dog.png", "question": "What?", "steps": ["It barks."], "answer": "dog"}
# As CODI's data sets have them
AUG = [{"question": "How many?", "cot": "<<600*30/100=180>> <<600*10/100=60>>", "answer": "60"}]
AUG_NL = [{"question": "How many?", "cot": "Half of 8 is 8/2 = <<8/2=4>>4 eggs. She eats 1, e.g. for lunch. So 4 - 1 = 3.", "answer": "#### 3"}]  # fmt: skip
COMMONSENSE = [{"question": "Where is a pen?\nChoices:\nA: moon\nB: desk", "cot": "1. People write at desks.\n2. So B.", "answer": "B"}]  # fmt: skip
STRATEGY = [{"question": "Can a hen fly to Mars?", "cot": "Hens need air. There is none.", "answer": False}]
FILES = {
    "own.jsonl": ("jsonl", [OWN]), "r1.json": ("video_r1", [R1]), "llava.jsonl": ("llava_cot", [LLAVA]),
    "aokvqa.json": ("aokvqa", [AOKVQA]), "d.json": ("multimodal_coconut", [COCONUT_D]),
    "prosqa.json": ("coconut_json", [PROSQA]), "gsm.txt": ("gsm8k_icot", ICOT), "codi.json": ("codi_json", CODI),
    "aug.jsonl": ("codi_json", AUG), "nl.json": ("codi_json", AUG_NL), "csqa.jsonl": ("codi_json", COMMONSENSE),
    "strategy.json": ("codi_json", STRATEGY), "prosqa.jsonl": ("coconut_json", [PROSQA | {"root": 0, "target": 2}]), "own_text.jsonl": ("jsonl", [{k: OWN[k] for k in OWN if k != "video"}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    write(place / "clip.mp4")
    picture = Image.fromarray(np.zeros((56, 56, 3), np.uint8))
    for name in ("dog.png", "000000123456.jpg"):
        picture.save(place / name)
    for name, (_, rows) in FILES.items():
        wrote(place, name, rows)
    return place


def wrote(folder, name: str, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(lines) + "\n")
    return str(folder / name)


def ran(capsys, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(words))
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_recognised_and_clean(capsys, folder, name):
    code, out, _ = ran(capsys, "check-data", str(folder / name), "--json")
    report = json.loads(out)
    assert (code, report["format"], report["clean"], report["faults"]) == (0, FILES[name][0], True, [])
    assert report["rows"] == report["usable"] == len(FILES[name][1]) + (name == "llava.jsonl")
    assert sum(report["shown"].values()) == report["usable"]


def test_the_formats_are_those_of_a_configuration():
    named = {f.name for f in fields(Run)} - {"method", "training", "lora", "validation", "worlds", "text_worlds"}
    assert set(check.FORMATS) == named
    assert len({known.reader for known in check.FORMATS.values()}) == len(check.FORMATS)


def test_a_report_counts_what_is_there(capsys, folder):
    rows = [
        OWN, OWN | {"steps": list("abc"), "answer": 3}, OWN | {"options": ["x", "y", "z"], "answer": "y"},
        {"image": "dog.png", "question": "Is it?", "chain": "a\nb", "answer": True},
        {"images": ["dog.png", "dog.png"], "question": "Is it?", "steps": ["a"], "answer": "no"},
        {"question": "Is it?", "steps": ["a"] * 9, "answer": "words"},
    ]  # fmt: skip
    code, out, _ = ran(capsys, "check-data", wrote(folder, "mixed.jsonl", rows), "--json")
    report = json.loads(out)
    assert code == 0
    assert report["shown"] == {"video": 3, "image": 1, "images": 1, "text": 1}
    assert (report["steps"], report["options"]) == ([1, 1.5, 9], [3, 3, 3])
    assert report["answers"] == {"words": 2, "number": 1, "letter": 1, "yes or no": 2}
    assert report["types"]["multiple choice"] == 1


def test_faults_have_row_and_field(capsys, folder):
    file = wrote(folder, "faults.jsonl", [OWN, OWN | {"video": "none.mp4"}, "{", OWN | {"steps": []}, OWN | {"answer": " "}])  # fmt: skip
    code, out, err = ran(capsys, "check-data", file)
    assert (code, err) == (1, "")
    for line in ("line 2: video names no file", "line 3: row is not valid JSON", "line 4: steps holds no steps", "line 5: answer is empty", "4 faults"):  # fmt: skip
        assert line in out
    report = json.loads(ran(capsys, "check-data", file, "--json")[1])
    assert (report["rows"], report["usable"], report["missing_media"]) == (5, 1, 1)
    assert [fault["where"] for fault in report["faults"]] == ["line 2", "line 3", "line 4", "line 5"]
    report = json.loads(ran(capsys, "check-data", file, "--json", "--without-steps")[1])
    assert (len(report["faults"]), report["without_steps"]) == (3, 1)
    report = json.loads(ran(capsys, "check-data", str(folder / "prosqa.json"), "--json", "--most-steps", "1")[1])
    assert report["faults"][0]["says"].startswith("steps holds 2 steps, more than 1")


@pytest.mark.parametrize("field", ["video", "image", "images", "image_path", "options"])
def test_what_text_alone_would_lose_is_a_fault(capsys, folder, field):
    """Our own rows, or Multimodal CoCoNuT's, as a list: they aren't read as text about nothing."""
    row = {"question": "What?", "steps": ["a"], "answer": "b", field: "nofile.mp4"}
    code, out, _ = ran(capsys, "check-data", wrote(folder, "shown.json", [row]), "--format", "coconut_json")
    assert code == 1
    assert f"sample 0: {field} would be lost: this format is text alone" in out


def test_a_list_of_clips_is_not_clean_text(capsys, folder):
    row = {"video": "nofile.mp4", "question": "What?", "options": ["a", "b"], "steps": ["a"], "answer": "b"}
    code, out, _ = ran(capsys, "check-data", wrote(folder, "listed.json", [row]))
    assert code == 1
    assert "jsonl, a JSON object a line, has clips" in out


def test_what_check_data_refuses_training_refuses(folder):
    file = wrote(folder, "refused.jsonl", [OWN, OWN | {"answer": ""}])
    (fault,) = check.check(*check.reader(file)).faults
    with pytest.raises(ConfigError, match=f"{fault.where}: {fault.says}"):
        JsonlSource(file)(0)


def test_media_are_read_on_request(capsys, folder):
    (folder / "broken.mp4").write_bytes(b"no clip")
    file = wrote(folder, "media.jsonl", [OWN, OWN | {"video": "broken.mp4"}, OWN])
    assert ran(capsys, "check-data", file)[0] == 0
    assert ran(capsys, "check-data", file, "--media", "2")[0] == 0  # the first and the last
    code, out, _ = ran(capsys, "check-data", file, "--media", "9", "--json")
    report = json.loads(out)
    assert (code, report["media_read"], report["broken_media"]) == (1, 3, 1)
    assert report["faults"][0]["where"] == "line 2"
    assert "broken.mp4" in report["faults"][0]["says"]


def test_a_picture_called_a_video_and_a_film_called_an_image_are_said(capsys, folder):
    image = {"image": "clip.mp4", "question": "What moves?", "steps": ["A ball."], "answer": "a ball"}
    out = ran(capsys, "check-data", wrote(folder, "swapped.jsonl", [OWN | {"video": "dog.png"}, image]), "--media", "9")[1]  # fmt: skip
    assert "line 1: media can't be used: video names a single picture (dog.png): give it as image." in out
    assert "line 2: media can't be used: image names a film (clip.mp4): give it as video." in out


def test_a_format_and_a_root_may_be_named(capsys, folder, tmp_path):
    file = wrote(tmp_path, "elsewhere.jsonl", [OWN])
    assert ran(capsys, "check-data", file)[0] == 1
    assert ran(capsys, "check-data", file, "--root", str(folder))[0] == 0
    assert ran(capsys, "check-data", file, "--format", "video_r1")[0] == 1
    assert "cot missing" in ran(capsys, "check-data", file, "--format", "codi_json")[1]


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        (None, [], "Can't read"),
        (b"", [], "file holds no rows"),
        (b" \n\n", [], "file holds no rows"),
        (b"[]", [], "file holds no rows"),
        (b"just words\n", [], "file, line 1: row is not valid JSON"),
        (b'{"a": 1}\n', [], "none of the formats"),
        (b"[[1, 2], [3]]", [], "file, sample 0: row must hold fields, not [1, 2]"),
        (b'{"data": [{"question": "a"}]}', [], "file is one JSON object, not a list or a row a line"),
        (b'{\n "data": [\n  {"question": "a"}\n ]\n}\n', [], "file is one JSON object, not a list or a row a line"),
        (b"\x00\xff\x00" * 99, [], "file, line 1: row is not UTF-8 text (byte 1 of it)"),
        ('{"question": "O\xf9 ?"}'.encode("latin-1"), [], "write the file as UTF-8 first (iconv -f LATIN1"),
        (json.dumps([OWN]).encode("utf-16"), [], "file is UTF-16: write it as UTF-8 first (iconv -f UTF-16 -t UTF-8)"),
        (json.dumps(OWN).encode("utf-16-be"), [], "file is UTF-16BE: write it as UTF-8 first"),
        (json.dumps([OWN]).encode("utf-32"), [], "file is UTF-32: write it as UTF-8 first"),
        (gzip.compress(b"{}", mtime=0), [], "file is compressed (gzip): unpack it first (gunzip file)"),
        (lzma.compress(b"{}"), [], "file is compressed (xz): unpack it first (unxz file)"),
        (bz2.compress(b"{}"), [], "file is compressed (bzip2): unpack it first (bunzip2 file)"),
        (b"PK\x03\x04" + b"\0" * 99, [], "file is compressed (zip): unpack it first (unzip file)"),
        (b"\x28\xb5\x2f\xfd" + b"\0" * 99, [], "file is compressed (zstd): unpack it first (unzstd file)"),
        (gzip.compress(b"{}", mtime=0), ["--format", "jsonl"], "file is compressed (gzip)"),
        (b'{\n "question": "a"\n}\n', ["--format", "jsonl"], "file is one JSON object, not a list or a row a line"),
        (b"PAR1" + b"\0" * 99, [], "Parquet"),
        (b'[{"question": "a", "answer": "b"', [], "the list has no end"),
        (b'[{"question": "a", "answer": "b"}] and more', [], "stands behind the end of the list"),
        (b"[]", ["--format", "coconut_json"], "holds no rows"),
        (b'{"question": "a"}', ["--format", "tables"], "no format 'tables'"),
        (b'{"question": "a"}', ["--media", "-1"], "--media -1"),
        (b'{"question": "a", "cot": "b", "answer": "c"}', ["--root", "x"], "names no clips"),
    ],
)
def test_files_that_cannot_be_read_at_all(capsys, tmp_path, content, more, says):
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    code, out, err = ran(capsys, "check-data", str(file), *more)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_the_help_describes_our_own_format(capsys):
    with pytest.raises(SystemExit):
        main(["check-data", "--help"])
    out = capsys.readouterr().out
    assert '{"video": "clips/cups.mp4"' in out
    assert "video | image | images" in out


def test_codis_data_sets(folder):
    def first(name: str):
        sample = CodiSource(str(folder / name), split="test")(0)
        return sample.steps, sample.answer

    assert first("aug.jsonl") == (("<<600*30/100=180>>", "<<600*10/100=60>>"), "60")
    assert first("nl.json") == (("Half of 8 is 8/2 = 4 eggs.", "She eats 1, e.g. for lunch.", "So 4 - 1 = 3."), "3")
    assert first("csqa.jsonl") == (("1. People write at desks.", "2. So B."), "B")
    assert first("strategy.json") == (("Hens need air.", "There is none."), "False")


def test_rows_of_video_r1_that_cannot_be_scored_are_counted_and_named(capsys, folder):
    rows = [R1, R1 | {"solution": "<answer>D</answer>"}, R1 | {"options": ["A. left", "B. left"]}, R1]
    file = wrote(folder, "unscored.json", rows)
    code, out, _ = ran(capsys, "check-data", file)
    assert code == 1
    assert "4 rows, 2 of them usable" in out
    assert "sample 1: solution must be a letter from A to B or the text of an option, not 'D'" in out
    assert "sample 2: options[0] and options[1] are the same ('left')" in out
    assert len(VideoR1Source(file, held_out=1, leave_out=2)) == 1


def test_nothing_is_left_where_a_prepared_file_cannot_be_placed(capsys, folder, tmp_path):
    file = wrote(folder, "placed.json", [AOKVQA])
    (tmp_path / "out.json").mkdir()
    code, _, err = ran(capsys, "prepare", "aokvqa", file, str(tmp_path / "out.json"))
    assert code == 2
    assert "out.json is a folder: name a file to write." in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_aokvqa_is_prepared(capsys, folder, tmp_path):
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    (tmp_path / "coco" / "val2017" / "000000123456.jpg").write_bytes((folder / "000000123456.jpg").read_bytes())
    wrote(tmp_path, "aokvqa_v1p0_val.json", [AOKVQA | {"split": "val"}])
    out = tmp_path / "out" / "val.json"
    code, told, _ = ran(
        capsys,
        "prepare",
        "aokvqa",
        str(tmp_path / "aokvqa_v1p0_val.json"),
        str(out),
        "--images",
        str(tmp_path / "coco"),
    )
    assert (code, json.loads(told)) == (0, {"samples": {str(out): 1}})
    assert MultimodalCoconutSource(str(out), split="test")(0).answer == "dog"
    assert ran(capsys, "check-data", str(out))[0] == 0
    again = ran(capsys, "prepare", "aokvqa", str(tmp_path), str(tmp_path / "all"), "--images", str(tmp_path / "coco"))
    assert json.loads(again[1]) == {"samples": {str(tmp_path / "all" / "val.json"): 1}}


def test_aokvqa_without_its_images_is_refused(capsys, tmp_path):
    file = wrote(tmp_path, "aokvqa_v1p0_train.json", [AOKVQA])
    code, out, err = ran(capsys, "prepare", "aokvqa", file, str(tmp_path / "out.json"))
    assert (code, out) == (2, "")
    assert "sample 0: image_id names no file" in err
    assert not (tmp_path / "out.json").exists()
    assert "Can't read" in ran(capsys, "prepare", "aokvqa", str(tmp_path / "none"), str(tmp_path / "x"))[2]
    (tmp_path / "empty").mkdir()
    assert "holds neither" in ran(capsys, "prepare", "aokvqa", str(tmp_path / "empty"), str(tmp_path / "x"))[2]


def test_opening_a_large_file_reads_no_media(tmp_path, monkeypatch):
    """Every clip is rubbish: whoever opened one would say so. And nothing but places is remembered of the rows."""
    (tmp_path / "clip.mp4").write_bytes(b"no clip")
    rows = [R1 | {"problem": f"Question {i}?", "process": f"<think>{'so ' * 200}</think>"} for i in range(5000)]
    file = wrote(tmp_path, "large.json", rows)
    touched = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *given, **named: touched.append(path) or real(path, *given, **named))
    source = VideoR1Source(file)
    assert len(source) == 5000 - 256
    sample = source(0)
    assert {path.name for path in touched} == {"large.json"}
    assert sample.visual.path.name == "clip.mp4"
    kept = sum(array.nbytes for array in (source.samples, source._rows.spans, source._rows.numbers))
    assert kept < 60 * 5000


def test_rows_of_a_list_are_found_wherever_they_stand(tmp_path):
    rng = random.Random(0)

    def value(depth: int):
        kinds = [lambda: rng.choice(["a,b", '"]', "\\", "{[", "ü💡", '\\"']), lambda: rng.random(), lambda: None]
        if depth:
            kinds += [lambda: [value(depth - 1) for _ in range(rng.randrange(3))]] * 2
            kinds += [lambda: {f"{rng.randrange(9)}}}": value(depth - 1) for _ in range(rng.randrange(3))}] * 2
        return rng.choice(kinds)()

    for case in range(60):
        rows = [value(3) for _ in range(rng.randrange(1, 6))]
        path = tmp_path / f"{case}.json"
        indent, ascii_only = rng.choice([None, 1]), rng.random() < 0.5
        path.write_text(rng.choice(["", " \n", "\ufeff"]) + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n")  # fmt: skip
        found: Rows = json_rows(path)
        assert [as_json(written(text)) for text in found.texts(range(len(found)))] == rows


def test_a_file_that_changes_under_way_is_said(tmp_path):
    file = wrote(tmp_path, "own.jsonl", [CODI[0], CODI[0]])
    source = CodiSource(file)
    source(0)
    wrote(tmp_path, "own.jsonl", [CODI[0]])
    with pytest.raises(ConfigError, match="has been changed while it was in use"):
        source(1)


def test_readers_never_fail_but_with_a_bad_row(folder):
    """Rows with any of their values exchanged for another: a sample, or a sentence."""
    rng = random.Random(1)
    strange = [
        None,
        True,
        0,
        -1,
        1e300,
        "",
        " ",
        "x",
        "<image>",
        "\ud800",
        [],
        [[]],
        [None],
        {},
        {"a": {}},
        "\0",
        "../" * 9,
    ]
    rows = {"jsonl": OWN, "video_r1": R1, "llava_cot": LLAVA, "aokvqa": AOKVQA, "multimodal_coconut": COCONUT_D}
    rows |= {"coconut_json": PROSQA, "codi_json": CODI[0]}
    for name, row in rows.items():
        source, _ = check.reader(str(folder / "own.jsonl"), name)
        assert isinstance(source, FileSource)
        for _ in range(150):
            changed = {key: rng.choice(strange) if rng.random() < 0.3 else value for key, value in row.items()}
            for _, raw in source.parts(changed):
                with suppress(BadRow):
                    assert source.parse(raw).answer
