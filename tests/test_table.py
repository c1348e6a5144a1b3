"""The table: equal budgets, one run after another, resumed where it stopped, and the figures worked out by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import ConfigError
from engine.evaluation import evaluate, wilson
from tests.tiny import tiny_backbone, tiny_llama
from train import table, tested
from train.table import main
from train.tabulate import lead, markdown, tabulate, verdict
from train.tested import operators, share_named
from train.trials import Row, Table, trials


@pytest.fixture
def place(tmp_path):
    tiny_llama().save(tmp_path / "start")
    preset = {
        "method": {}, "validation": {"samples": 2}, "text_worlds": {"families": ["arithmetic", "graph"]},
        "training": {"init": str(tmp_path / "start"), "device": "cpu", "workers": 0, "batch": 2, "accumulate": 1},
    }  # fmt: skip
    (tmp_path / "plain.yaml").write_text(json.dumps(preset))
    return tmp_path


def config(place, **changes) -> str:
    """Two rows, three runs, from a base that is made and trained first."""
    two = {"method": {"c_thought": 1, "max_latent_stage": 2}, "training": {"epoch": 2}}
    rows = [
        {"name": "answer only", "method": "controls.Silent", "config": "plain.yaml", "changes": {"method": {"pauses": 0}}},
        {"name": "thoughts", "method": "coconut", "config": "plain.yaml", "changes": two, "against": "answer only", "seeds": 2},
    ]  # fmt: skip
    base = {"name": "base", "method": "controls.Explicit", "config": "plain.yaml"}
    shared = {"training": {"steps": 2}, "text_worlds": {"difficulties": [1, 2]}}
    values = {
        "out": str(place / "runs"),
        "fresh": {"layers": 2, "hidden": 32},
        "base": base,
        "rows": rows,
        "shared": shared,
        "samples": 8,
        "batch": 4,
    }
    file = place / "table.yaml"
    file.write_text(json.dumps(values | changes))
    return str(file)


def test_one_command_trains_tests_and_writes(place, capsys):
    assert main(["--config", config(place)]) == 0, capsys.readouterr().err
    out = place / "runs"
    assert sorted(p.name for p in out.glob("*/best")) == ["best"] * 4
    assert json.loads((out / "thoughts-2" / "settings.json").read_text())["training"]["seed"] == 2
    assert json.loads((out / "thoughts-2" / "settings.json").read_text())["TextWorldsSource"]["seed"] == 2
    for run in ("answer-only-1", "thoughts-1", "thoughts-2"):
        assert json.loads((out / run / "settings.json").read_text())["training"]["init"] == str(out / "base-0" / "best")

    whole = json.loads((out / "table.json").read_text())
    assert (whole["samples_seen"], whole["samples_tested"]) == (4, 8)
    cells = {(c["method"], c["world"], c["k"]): c for c in whole["cells"]}
    assert {k for name, world, k in cells if world == "graph"} >= {"all"}
    for world in ("arithmetic", "graph"):
        cell = cells["thoughts", world, "all"]
        answers = [json.loads((out / f"thoughts-{s}" / "test.json").read_text())["answers"] for s in (1, 2)]
        right = [[c for c, w in zip(each["correct"], each["world"], strict=True) if w == world] for each in answers]
        assert cell["problems"] == len(right[0]) == 4
        assert cell["accuracy"] == pytest.approx(np.mean(right))
        assert cell["slots"] == 2
        assert 1 <= cell["held"]["effective_rank"] <= 2
        assert len(cell["lead"]) == 3
    assert cells["thoughts", "graph", "all"]["held"]["operator"] is None
    assert cells["answer only", "graph", "all"]["held"] == {}

    text = (out / "table.md").read_text()
    assert "| answer only¹ |" in text
    assert "| thoughts |" in text
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == len(whole["cells"])
    assert float(rows[0]["low"]) == whole["cells"][0]["interval"][0]


def test_it_goes_on_where_it_was(place, monkeypatch):
    assert main(["--config", config(place), "--finished"]) == 2  # nothing is, and nothing is trained
    assert not (place / "runs").exists()
    assert main(["--config", config(place)]) == 0
    kept = (place / "runs" / "table.json").read_text()

    def refuse(*_, **__):
        raise AssertionError("trained or tested again")

    with monkeypatch.context() as closed:
        closed.setattr(table, "trained", refuse)
        closed.setattr(tested, "evaluate", refuse)
        assert main(["--config", config(place)]) == 0
    assert (place / "runs" / "table.json").read_text() == kept
    (place / "runs" / "answer-only-1" / "checkpoints").rename(place / "away")
    assert main(["--config", config(place), "--finished"]) == 0
    part = json.loads((place / "runs" / "table.json").read_text())["cells"]
    assert {cell["method"]: cell["lead"] for cell in part} == {"thoughts": None}
    (place / "away").rename(place / "runs" / "answer-only-1" / "checkpoints")
    asked = []
    monkeypatch.setattr(tested, "evaluate", lambda *a, **k: asked.append(1) or evaluate(*a, **k))
    assert main(["--config", config(place, samples=6)]) == 0
    assert len(asked) == 3


def test_shards_train_their_own_and_the_last_makes_the_table(place, capsys):
    assert main(["--config", config(place), "--shard", "2/2"]) == 2
    assert "The first shard trains what all rows start from" in capsys.readouterr().err
    assert not (place / "runs").exists()
    assert main(["--config", config(place), "--shard", "1/2"]) == 0
    assert "1 runs aren't finished, such as thoughts-1: the table is of the others" in capsys.readouterr().err
    assert sorted(p.parent.name for p in (place / "runs").glob("*/best")) == ["answer-only-1", "base-0", "thoughts-2"]
    assert main(["--config", config(place), "--shard", "2/2"]) == 0
    sharded = json.loads((place / "runs" / "table.json").read_text())
    assert main(["--config", config(place)]) == 0
    assert json.loads((place / "runs" / "table.json").read_text()) == sharded
    assert main(["--config", config(place), "--shard", "3/2"]) == 2
    assert "--shard 3/2: write it as 1/4" in capsys.readouterr().err


def test_some_rows_alone_and_what_all_change(place, capsys):
    out = place / "elsewhere"
    words = ["--config", config(place), "--out", str(out), "--set", "training.steps=1", "training.lr=0.5"]
    assert main([*words, "--rows", "thoughts"]) == 0, capsys.readouterr().err
    assert sorted(p.parent.name for p in out.glob("*/best")) == ["base-0", "thoughts-1", "thoughts-2"]
    whole = json.loads((out / "table.json").read_text())
    assert whole["samples_seen"] == 2
    assert json.loads((out / "thoughts-1" / "settings.json").read_text())["training"]["lr"] == 0.5
    assert {(cell["method"], cell["lead"]) for cell in whole["cells"]} == {("thoughts", None)}
    assert main([*words, "--rows", "answer only"]) == 0  # the table keeps the others
    assert {c["method"] for c in json.loads((out / "table.json").read_text())["cells"]} == {"thoughts", "answer only"}
    for settled in ("training.seed=3", "training.init=other", "text_worlds.seed=3", "training.out=there"):
        assert main([*words, "--set", settled]) == 2
        assert f"--set {settled.partition('=')[0]}: that is the table's own choice" in capsys.readouterr().err
    assert main([*words, "--rows", "thoughts", "nothing"]) == 2
    assert "no row 'nothing': choose among answer only, thoughts" in capsys.readouterr().err
    assert main([*words, "--set", "steps=1"]) == 2
    assert "write SECTION.KEY=VALUE" in capsys.readouterr().err


def test_results_are_kept_where_runs_are_not(place, monkeypatch, capsys):
    """The same table without the runs; a row that isn't kept is trained from what is kept of them, and joins."""
    results = str(place / "results")
    assert main(["--config", config(place), "--rows", "thoughts", "--kept", results]) == 0
    assert main(["--config", config(place)]) == 0
    wanted = json.loads((place / "runs" / "table.json").read_text())
    (place / "runs").rename(place / "gone")
    assert main(["--config", config(place), "--kept", results, "--finished"]) == 0
    assert not (place / "runs").exists()
    assert main(["--config", config(place), "--kept", results]) == 0
    assert {p.name for p in (place / "runs").glob("*-?")} == {"answer-only-1"}
    assert sorted(p.stem for p in (place / "results").glob("*-?.json")) == ["answer-only-1", "thoughts-1", "thoughts-2"]
    found = json.loads((place / "results" / "table.json").read_text())
    timed = ("seconds", "training_seconds")
    for cell in (*wanted["cells"], *found["cells"]):
        for name in timed:
            del cell[name]
    assert found == wanted
    monkeypatch.setattr(table, "trained", None)
    assert main(["--config", config(place), "--kept", results]) == 0

    file = place / "results" / "thoughts-2.json"
    whole = json.loads(file.read_text())
    stage = whole["stages"][0]
    for text, reason in (
        ("{", "holds no result of a run"),
        (json.dumps(whole | {"stages": [stage, stage]}), "another number of stages"),
        (json.dumps(whole | {"stages": [stage | {"lora": {"r": 4}}]}), "another lora"),
        (
            json.dumps(whole | {"stages": [stage | {"method": stage["method"] | {"c_thought": 3}}]}),
            "another method.c_thought",
        ),
    ):
        file.write_text(text)
        assert main(["--config", config(place), "--kept", results]) == 2
        assert reason in capsys.readouterr().err
    file.write_text(json.dumps(whole))
    assert main(["--config", config(place), "--kept", str(file)]) == 2
    assert "is no folder" in capsys.readouterr().err
    elsewhere = ["--config", config(place), "--kept", results, "--out", str(place / "other"), "--finished"]
    assert main(elsewhere) == 0  # where runs lay doesn't matter

    (place / "runs").rename(place / "gone too")
    for changes, reason in (
        ({"samples": 6}, "was tested on other problems"),
        ({"shared": {"training": {"steps": 3}, "text_worlds": {"difficulties": [1, 2]}}}, "another training.steps"),
    ):
        assert main(["--config", config(place, **changes), "--kept", results]) == 2
        assert reason in capsys.readouterr().err
    other = {"base": {"name": "base", "method": "coconut", "config": "plain.yaml"}}
    assert main(["--config", config(place, **other), "--kept", results]) == 2
    assert "base was made with another method" in capsys.readouterr().err
    told = place / "results" / "base" / "settings.json"
    whole = told.read_text()
    told.write_text("{")
    assert main(["--config", config(place), "--kept", results]) == 2
    assert "settings.json can't be read" in capsys.readouterr().err
    told.write_text(whole)
    weights = place / "results" / "base" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert main(["--config", config(place), "--kept", results]) == 2
    assert "started from other weights" in capsys.readouterr().err


def test_what_can_not_be_compared_is_refused(place, capsys):
    rows = json.loads(Path(config(place)).read_text())["rows"]
    more = [rows[0], rows[1] | {"changes": {"training": {"batch": 4}}}]
    assert main(["--config", config(place, rows=more)]) == 2
    assert "thoughts sees 8 samples and answer only 4" in capsys.readouterr().err
    more = [rows[0], rows[1] | {"changes": {"text_worlds": {"families": ["graph"]}}}]
    assert main(["--config", config(place, rows=more)]) == 2
    assert "thoughts and answer only would be tested on different problems" in capsys.readouterr().err
    more = [rows[0], rows[1] | {"changes": {"jsonl": {"file": "mine.jsonl"}}}]
    assert main(["--config", config(place, rows=more)]) == 2
    assert "not on files (jsonl)" in capsys.readouterr().err
    assert main(["--config", config(place, rows=[rows[1]])]) == 2
    assert "no row 'answer only'" in capsys.readouterr().err
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": []}, "rows: a table needs at least one"),
        ({"samples": 0}, "samples is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"shared": {"training": 5}}, "training must hold keys and values, not int"),
    ],
)
def test_a_table_that_can_not_be_meant(place, capsys, changes, words):
    assert main(["--config", config(place, **changes)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"seeds": 0}, "thoughts: seeds is 0"),
        ({"changes": {"training": 5}}, "training must hold keys and values, not int"),
        ({"name": "answer only"}, "'answer only' and 'answer only' would share a folder"),
        ({"name": "Answer-only"}, "'answer only' and 'Answer-only' would share a folder"),
    ],
)
def test_rows_that_can_not_be_meant(place, capsys, row, words):
    first, second = json.loads(Path(config(place)).read_text())["rows"]
    assert main(["--config", config(place, rows=[first, second | row])]) == 2
    assert words in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_a_place_that_can_not_be_written_to_is_one_sentence(place, capsys):
    (place / "file").write_text("")
    assert main(["--config", config(place), "--out", str(place / "file" / "runs")]) == 2
    assert "Not a directory" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_made_otherwise_is_refused(place, capsys):
    assert main(["--config", config(place)]) == 0
    for shared, name in (({"lr": 0.5}, "training.lr"), ({"steps": 3}, "training.steps")):
        assert main(["--config", config(place, shared={"training": {"steps": 2} | shared, "text_worlds": {"difficulties": [1, 2]}})]) == 2  # fmt: skip
        assert f"was made with another {name}: move it away" in capsys.readouterr().err
    assert main(["--config", config(place, shared={"training": {"steps": 2}})]) == 2
    assert "another TextWorldsSource.difficulties" in capsys.readouterr().err
    run = place / "runs" / "answer-only-1" / "settings.json"
    kept = run.read_text()
    run.write_text(kept.replace("TextWorldsSource", "WorldsSource"))
    assert main(["--config", config(place)]) == 2
    assert "was made with another TextWorldsSource" in capsys.readouterr().err
    run.write_text(json.dumps(json.loads(kept) | {"lora": {"r": 4}}))
    assert main(["--config", config(place)]) == 2
    assert "was made with another lora" in capsys.readouterr().err
    run.write_text(kept)
    weights = place / "runs" / "base-0" / "best" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert main(["--config", config(place)]) == 2
    assert "was started from other weights" in capsys.readouterr().err


def test_stages_are_one_budget(place):
    stages = [{"name": "one", "training": {"steps": 1}}, {"name": "two", "training": {"steps": 3}}]
    preset = json.loads((place / "plain.yaml").read_text()) | {"stages": [*stages, {"name": "read", "kind": "scorers", "training": {"steps": 9}}]}  # fmt: skip
    (place / "staged.yaml").write_text(json.dumps(preset))
    row = Row("Heima", "heima", "staged.yaml")
    (made,) = trials(Table(str(place), (row,)), place)
    assert made.seen == 8
    assert made.folder.name == "two"
    with pytest.raises(ConfigError, match="Unknown key"):
        trials(Table(str(place), (row,), shared={"nonsense": 1}), place)


def test_leads_and_what_is_said_of_them():
    mean, low, high = lead(np.array([1.0, 0, 0, 0]))
    assert (mean, high - mean) == (0.25, pytest.approx(1.959964 * 0.1875**0.5 / 2))
    assert low == pytest.approx(2 * mean - high)

    def said(*figures: float) -> str:
        return verdict({"against": "filler", "lead": figures})

    assert said(-0.1, -0.15, -0.05) == "**loses** -10.0 (-15.0 to -5.0) against filler"
    assert said(-0.01, -0.05, 0.03) == "**loses** -1.0 (-5.0 to +3.0; may be chance) against filler"
    assert said(0.1, 0.05, 0.15).startswith("wins +10.0")
    assert verdict({"against": "", "lead": None}) == ""


def test_operators_and_who_names_them():
    steps = ("<<12+7=19>>", "<<19*2=38>>", "<<38-8=30>>")
    assert operators(steps, 3) == ["+", "*", "-"]
    assert operators(steps, 4) == ["+", "*", "-", ""]
    assert operators(steps, 2) == ["+", ""]  # the last slot stands for two
    assert operators(steps[:2], 6, 2) == ["+", "+", "*", "*", "", ""]
    assert operators(("Mia is a gorpus.",), 2) == ["", ""]
    backbone = tiny_llama()
    said = torch.zeros(2, 2, len(backbone.tokenizer))
    said[0, 0, backbone.text_ids("+")[0]] = 1
    said[1, 0, backbone.text_ids("/")[0]] = 1
    said[1, 1] = 5.0  # nothing stands out
    said[1, 1, backbone.text_ids("*")[0]] = 6.0
    assert share_named(backbone, said, [["+", ""], ["+", "*"]]) == pytest.approx(2 / 3)
    assert share_named(backbone, said, [["", ""], ["", ""]]) is None


def test_cells_by_hand():
    def run(*correct: int, k: tuple[int, ...] = (1, 1, 2, 2), tokens: int = 5) -> dict:
        answers = {
            "world": ["w"] * 4,
            "k": k,
            "correct": correct,
            "generated_tokens": [tokens] * 4,
            "seconds": [0.5] * 4,
        }
        held = {"w": {"cosine": 0.5, "effective_rank": 1.5, "centre": 3.0, "operator": None, "by_chance": None}}
        return {"answers": answers, "slots": 2, "training_seconds": 60.0, "held": held}

    results = [("ours", run(1, 0, 1, 1)), ("ours", run(1, 0, 0, 0, tokens=7)), ("control", run(1, 1, 1, 0))]
    whole = tabulate({"control": "", "ours": "control", "unfinished": "control"}, results)
    cells = {(cell["method"], cell["k"]): cell for cell in whole}
    assert list(cells) == [(name, k) for name in ("control", "ours") for k in ("all", "1", "2")]
    ours = cells["ours", "all"]
    assert (ours["accuracy"], ours["by_seed"], ours["seeds"], ours["problems"]) == (0.5, [0.75, 0.25], 2, 4)
    assert ours["interval"] == wilson(2, 4)
    assert (ours["generated_tokens"], ours["seconds"], ours["training_seconds"]) == (6, 0.5, 60)
    assert ours["lead"][0] == pytest.approx(0.5 - 0.75)
    assert cells["ours", "2"]["lead"][0] == pytest.approx(0)
    assert cells["control", "all"]["lead"] is None

    text = markdown({"samples_seen": 640, "samples_tested": 4, "batch": 2}, whole)
    assert (
        "| control¹ | 75.0 (30.1 to 95.4) |  | 100.0 (34.2 to 100.0) | 50.0 (9.5 to 90.5) | 5.0 | 2 | 0.5000 | 60 |  |"
        in text
    )
    assert "| ours | 50.0 (15.0 to 85.0) | 75.0 25.0 | " in text
    assert "**loses** -25.0" in text
    assert "| ours | 2 | 50.0 (15.0 to 85.0) | 0.50 | 1.50 | 3.0 |  |  |" in text


def test_the_video_worlds_have_tables_too(tmp_path):
    tiny_backbone().save(tmp_path / "start")
    preset = {
        "method": {"pauses": [2, 2]}, "validation": {"samples": 1}, "worlds": {"difficulties": [1, 2], "families": ["tally"]},
        "training": {"init": str(tmp_path / "start"), "device": "cpu", "workers": 0, "batch": 1, "accumulate": 1, "steps": 1},
    }  # fmt: skip
    (tmp_path / "pause.yaml").write_text(json.dumps(preset))
    rows = [{"name": "pauses", "method": "pause", "config": "pause.yaml"}]
    (tmp_path / "clips.yaml").write_text(json.dumps({"out": str(tmp_path), "rows": rows, "samples": 3}))
    assert main(["--config", str(tmp_path / "clips.yaml")]) == 0
    cell = json.loads((tmp_path / "clips.json").read_text())["cells"][0]
    assert (cell["world"], cell["problems"], cell["slots"]) == ("tally", 3, 2)
    assert 1 <= cell["held"]["effective_rank"] <= 2


def test_adapters_and_real_problems(place, capsys):
    """Rows may train adapters of one model, which stays as it is; what they learnt is tried on a file's problems too."""
    (place / "gsm8k.txt").write_text(
        "Two hens and 3 more?||<<2+3=5>> #### 5\nOne hen, doubled, and 1?||<<1*2=2>> <<2+1=3>> #### 3\n"
    )
    before = (place / "start" / "model.safetensors").read_bytes()
    rows = json.loads(Path(config(place)).read_text())["rows"]
    rows = [row | {"seeds": 1, "changes": row["changes"] | {"lora": {"r": 2, "train_embeddings": True, "targets": ["mlp"]}}} for row in rows]  # fmt: skip
    file = config(place, rows=rows, base=None, gsm8k={"file": str(place / "gsm8k.txt")})
    assert main(["--config", file]) == 0, capsys.readouterr().err
    assert (place / "start" / "model.safetensors").read_bytes() == before
    for run in ("answer-only-1", "thoughts-1"):
        assert (place / "runs" / run / "best" / "adapter_model.safetensors").is_file()
    whole = json.loads((place / "runs" / "table.json").read_text())
    cells = {(c["method"], c["world"], c["k"]): c for c in whole["cells"]}
    assert whole["samples_tested"] == 8 + 2
    for name in ("answer only", "thoughts"):
        assert [cells[name, "GSM8K", k]["problems"] for k in ("all", "1", "2")] == [2, 1, 1]
        assert cells[name, "arithmetic", "all"]["problems"] == 4
    assert len(cells["thoughts", "GSM8K", "all"]["lead"]) == 3
    assert "## GSM8K" in (place / "runs" / "table.md").read_text()

    other = [row | {"changes": row["changes"] | {"lora": {"r": 4}}} for row in rows]
    assert main(["--config", config(place, rows=other, base=None)]) == 2
    assert "was made with another lora.r" in capsys.readouterr().err


def test_real_problems_are_read_before_anything_is_trained(place, capsys):
    assert main(["--config", config(place, gsm8k={"file": str(place / "none.txt")})]) == 2
    assert "Can't read" in capsys.readouterr().err
    assert not (place / "runs").exists()
