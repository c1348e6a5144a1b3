"""A model sits a benchmark: shard by shard, gone on with after a kill, with clips that can't be read, and its command."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from torch import nn

from engine import models, worlds
from engine.__main__ import main
from engine.config import ConfigError
from engine.evaluation import Response
from engine.exams import examination
from engine.exams.examination import Examination, examine
from engine.methods.method import META
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.video import Sampling
from tests.test_protocols import VIDEO_R1, wrote
from tests.tiny import tiny_backbone, tiny_llama

SAMPLING = Sampling(fps=2.0, min_frames=2, max_frames=4, pixels=56 * 56)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    tiny_backbone().save(made)
    meta = {
        "name": "tiny",
        "pauses": [4, 8],
        "method": {"name": "pause", "pauses": [4, 8]},
        "sampling": {"fps": 2.0, "min_frames": 2, "max_frames": 4, "pixels": 3136},
    }
    (made / META).write_text(json.dumps(meta))
    return made


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder, device="cpu")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    made = tmp_path_factory.mktemp("media")
    for seed in range(2):
        worlds.write(worlds.make("cups", 1, seed, "fresh"), made / f"{seed}.mp4")
    (made / "broken.mp4").write_bytes(b"no clip at all" * 100)
    rows = [VIDEO_R1 | {"problem_id": i, "path": f"{i % 2}.mp4", "problem": f"What? {i}"} for i in range(5)]
    rows[3]["path"] = "broken.mp4"
    wrote(made, "eval.json", rows)
    return made


def exam(media, **changes) -> Examination:
    given = Examination("video-r1", str(media / "eval.json"), str(media), "tiny", "", "silent", 4, SAMPLING, longest=6)
    return replace(given, **changes)


def lines(place) -> list[dict]:
    return [json.loads(line) for line in place.read_text().splitlines()[1:]]


def test_answers_and_scores(model, media, tmp_path):
    told = examine(model, exam(media), tmp_path / "out")
    found = lines(tmp_path / "out" / "answers-1-of-1.jsonl")
    assert [line["id"] for line in found] == list("01234")
    assert [bool(line["problem"]) for line in found] == [False, False, False, True, False]
    assert found[3]["score"] == 0
    assert "broken.mp4" in found[3]["problem"]
    assert all(line["slots"] == 4 and 1 <= line["generated_tokens"] <= 6 for line in found if not line["problem"])
    assert (told["n"], told["unread"], told["complete"]) == (5, 1, True)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == told


def test_another_model_of_the_same_name_or_another_judge_starts_anew(model, media, tmp_path):
    out = tmp_path / "out"
    examine(model, exam(media, limit=1), out)
    others = tmp_path / "others"
    tiny_backbone(seed=1).save(others)
    for what, other, given in (
        ("weights", replace(model, folders=(others,)), exam(media, limit=1)),
        ("judge", model, exam(media, limit=1, judge="mine:judge")),
    ):
        with pytest.raises(ConfigError, match=f"another {what}"):
            examine(other, given, out, resume=True)


def test_the_same_weights_elsewhere_go_on(model, media, tmp_path):
    """In a shard's own file, and beside other shards."""
    examine(model, exam(media, limit=2), tmp_path, (1, 2))
    moved = exam(media, limit=2, model="/elsewhere", adapter="/beside")
    examine(model, moved, tmp_path, (1, 2), resume=True)
    assert examine(model, moved, tmp_path, (2, 2))["complete"]


def test_who_cannot_sit_it_says_so_before_the_first_question(model, media, tmp_path):
    blind = replace(model, backbone=tiny_llama())
    with pytest.raises(ConfigError, match="without vision"):
        examine(blind, exam(media), tmp_path / "out")
    with pytest.raises(ConfigError, match="batch 0"):
        examine(model, exam(media), tmp_path / "out", batch=0)
    assert not (tmp_path / "out").exists()


def test_right_answers_score(model, media, tmp_path, monkeypatch):
    """Everybody says B, which is right; the broken clip still counts as wrong."""

    def says(backbone, part, *rest, **more):
        return [Response("<answer>B</answer>", None, 4, 4, 0.1) for _ in part]

    monkeypatch.setattr(examination, "respond", says)
    told = examine(model, exam(media), tmp_path / "out")
    assert told["score"] == told["mean_acc"]["score"] == 0.8
    assert (told["generated_tokens"], told["slots"]) == (4, 4)


def test_shards_add_up_to_the_whole(model, media, tmp_path):
    whole = examine(model, exam(media), tmp_path / "one", batch=3)
    first = examine(model, exam(media), tmp_path / "two", (1, 2), batch=1)
    assert (first["complete"], first["shard"], first["n"]) == (False, "1/2", 3)
    assert not (tmp_path / "two" / "summary.json").exists()
    both = examine(model, exam(media), tmp_path / "two", (2, 2))
    assert both["complete"]
    assert {k: v for k, v in both.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}

    def said(place):
        return {line["id"]: line.get("text") for file in place.glob("*.jsonl") for line in lines(file)}

    assert said(tmp_path / "one") == said(tmp_path / "two")


def test_going_on_after_a_kill(model, media, tmp_path, monkeypatch):
    """Cut at any byte, the file is gone on with; what was whole isn't asked again, and nothing is there twice."""
    out = tmp_path / "out"
    examine(model, exam(media), out, batch=2)
    place = out / "answers-1-of-1.jsonl"
    whole = place.read_bytes()
    expected = {line["id"]: line["score"] for line in lines(place)}
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    asked = []
    real = examination.respond
    monkeypatch.setattr(
        examination, "respond", lambda b, part, *a, **k: asked.append(len(part)) or real(b, part, *a, **k)
    )
    for cut in (0, ends[0] - 3, ends[0], ends[1] + 5, ends[2], len(whole) - 1):
        place.write_bytes(whole[:cut])
        asked.clear()
        told = examine(model, exam(media), out, resume=True, batch=2)
        known = sum(end <= cut for end in ends) - 1
        assert sum(asked) == 4 - min(max(known, 0), 3) - (known > 4)  # of five, one can't be read
        assert told["complete"]
        assert {line["id"]: line["score"] for line in lines(place)} == expected
        assert all(json.loads(line) for line in place.read_text().splitlines())


def test_a_repaired_clip_is_asked_about_again(model, media, tmp_path):
    examine(model, exam(media), tmp_path / "out")
    broken = (media / "broken.mp4").read_bytes()
    (media / "broken.mp4").write_bytes((media / "0.mp4").read_bytes())
    try:
        told = examine(model, exam(media), tmp_path / "out", resume=True)
    finally:
        (media / "broken.mp4").write_bytes(broken)
    assert (told["unread"], told["n"]) == (0, 5)
    assert len(lines(tmp_path / "out" / "answers-1-of-1.jsonl")) == 6  # the later line counts


def test_answers_of_other_settings_are_left_alone(model, media, tmp_path):
    examine(model, exam(media, limit=1), tmp_path / "out")
    before = (tmp_path / "out" / "answers-1-of-1.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="--resume"):
        examine(model, exam(media, limit=1), tmp_path / "out")
    with pytest.raises(ConfigError, match="another pauses"):
        examine(model, exam(media, limit=1, pauses=5), tmp_path / "out", resume=True)
    (tmp_path / "out" / "answers-2-of-2.jsonl").write_text("not ours\n")
    with pytest.raises(ConfigError, match="no file of answers"):
        examine(model, exam(media, limit=1), tmp_path / "out", (2, 2), resume=True)
    assert (tmp_path / "out" / "answers-1-of-1.jsonl").read_bytes() == before


@pytest.mark.parametrize("mode", ["explicit", "spoken"])
def test_modes(model, media, tmp_path, mode):
    examine(model, exam(media, mode=mode, limit=2), tmp_path)
    found = lines(tmp_path / "answers-1-of-1.jsonl")
    assert all(isinstance(line["thoughts"], str) for line in found)
    assert {line["slots"] for line in found} == {4 if mode == "spoken" else 0}


def test_a_step_decoder_says_thoughts_too(model, media, tmp_path):
    """A model that can't, and has none, is refused before anything is answered."""
    silent = PauseDistillation(mode="silent", pauses=(4, 4), steps=StepSupervision(layers=1))
    taught = replace(model, method=silent, companions=silent.companions(model.backbone))
    examine(taught, exam(media, mode="spoken", limit=1), tmp_path / "said")
    (line,) = lines(tmp_path / "said" / "answers-1-of-1.jsonl")
    assert isinstance(line["thoughts"], str)
    with pytest.raises(ConfigError, match="can't put its thoughts into words"):
        examine(replace(taught, companions=nn.ModuleDict()), exam(media, mode="spoken", limit=1), tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_pictures_in_a_table(model, tmp_path):
    from tests.test_protocols import PICTURE, tsv

    row = {"index": "0", "question": "Which?", "A": "x", "B": "y", "answer": "B", "image": PICTURE}
    file = tsv(tmp_path, "mmstar.tsv", [row, row | {"index": "1", "image": "QUJD" * 40}])
    told = examine(model, exam(tmp_path, name="mmstar", file=file), tmp_path / "out")
    found = lines(tmp_path / "out" / "answers-1-of-1.jsonl")
    assert found[0]["problem"] is None
    assert found[1]["problem"]  # base64 of no picture
    assert told["unread"] == 1


def test_several_pictures_are_shown_in_their_order(model, tmp_path, monkeypatch):
    from tests.test_protocols import PICTURE

    Image.new("RGB", (56, 56), "white").save(tmp_path / "white.png")
    row = {"index": "0", "question": "Which?", "A": "x", "B": "y", "answer": "B", "image": ["white.png", PICTURE]}
    file = wrote(tmp_path, "mmstar.json", [row, row | {"index": "1", "image": [PICTURE, "white.png"]}])
    asked = []
    real = examination.respond
    monkeypatch.setattr(examination, "respond", lambda b, part, *a, **k: asked.extend(part) or real(b, part, *a, **k))
    assert examine(model, exam(tmp_path, name="mmstar", file=file), tmp_path / "out")["unread"] == 0
    first, second = ([each.patches for each in sample.visuals] for sample in asked)
    assert [len(first), len(second)] == [2, 2]
    assert (first[0] == second[1]).all()
    assert (first[1] == second[0]).all()
    assert not (first[0] == first[1]).all()


def run(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["benchmark", *map(str, words)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_command(capsys, folder, media, tmp_path):
    words = ["video-r1", media / "eval.json", "--model", folder, "--device", "cpu", "--longest", "4", "--limit", "2"]
    code, out, err = run(capsys, *words, "--out", tmp_path / "out")
    assert code == 0
    told = json.loads(out)
    assert (told["n"], told["settings"]["pauses"], told["settings"]["mode"]) == (2, 8, "silent")
    assert "2 of 2" in err
    assert run(capsys, *words, "--out", tmp_path / "out", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trivia", "x.json"], "no benchmark 'trivia'"),
        (["video-r1", "nowhere.json"], "Can't read nowhere.json"),
        (["video-r1", "x.json", "--shard", "3/2"], "--shard 3/2"),
        (["video-r1", "x.json", "--shard", "one"], "--shard one"),
        (["video-r1", "x.json", "--limit", "0"], "at least one question"),
        (["video-r1", "x.json", "--pauses", "-1"], "-1 pauses"),
        (["mmvet", "x.json"], "needs a judge"),
        (["mmvet", "x.json", "--judge", "no.such:thing"], "--judge no.such:thing"),
        (["mmvet", "x.json", "--judge", "math:pi"], "isn't a function"),
    ],
)
def test_mistakes(capsys, folder, tmp_path, words, sentence):
    code, out, err = run(capsys, *words, "--model", folder, "--device", "cpu", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err
