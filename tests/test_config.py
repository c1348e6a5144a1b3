"""Configurations: unknown keys, wrong types and missing values are errors that say what to do; the shipped ones load."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from engine.config import ConfigError, build, convert, read_yaml
from engine.methods.pause import PauseDistillation
from engine.recipe import Training
from train.command import arguments, changed, main


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    kind: Literal["a", "b"] = "a"
    span: tuple[int, int] = (1, 2)
    words: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    perhaps: float | None = None


def test_nested_values_are_converted():
    made = build(Outer, {"name": "x", "count": "3", "span": "4,5", "words": ["p", "q"], "inner": {"rate": "1e-3"}})
    assert made == Outer("x", 3, "a", (4, 5), ("p", "q"), Inner(0.001))
    assert build(Outer, {"name": "x", "perhaps": "none"}).perhaps is None
    assert build(Outer, {"name": "x", "perhaps": 2}).perhaps == 2.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "x", "cuont": 1}, "'cuont'. Did you mean 'count'"),
        ({"name": "x", "inner": {"rte": 1}}, "'inner.rte'. Did you mean 'rate'"),
        ({"name": "x", "count": 1.5}, "count = 1.5: expected int"),
        ({"name": "x", "count": True}, "count = True: expected int"),
        ({"name": "x", "kind": "c"}, "one of 'a', 'b'"),
        ({"name": "x", "span": [1]}, "span"),
        ({"name": "x", "span": "4"}, "span = '4': expected 2 values, such as 4,4."),
        ({"name": "x", "words": 4}, "words = 4: expected a list of values."),
        ({"name": 3}, "name = 3: expected str"),
        ({}, "Missing: name"),
    ],
)
def test_mistakes_are_named(values, words):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"- 1", "keys and values"),
        (b"a: [", "not valid YAML"),
        (b"!!python/object:os.x {}", "YAML"),
        (b"a: " + b"[" * 5000, "not valid YAML"),
        (b"a: " + b"9" * 5000, "not valid YAML"),
        (b"a: 2026-13-45", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        (b"a: \0", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(path)
    with pytest.raises(ConfigError, match="Can't read"):
        read_yaml(tmp_path / "none.yaml")


def test_whole_numbers_keep_every_digit():
    for value in (2**53 + 1, str(2**53 + 1)):
        assert convert(value, int, "n") == 2**53 + 1
    assert convert("1e3", int, "n") == convert(1000.0, int, "n") == 1000


def test_numbers_must_be_finite_where_they_count():
    for value, kind in (("inf", int), (10**400, float), ("nan", int)):
        with pytest.raises(ConfigError):
            convert(value, kind, "n")


def test_the_small_models_configurations_load():
    """Those of published recipes: test_presets.py."""
    from engine.methods import find
    from train.command import Run
    from train.heima import plan
    from train.trials import Table, trials

    methods = {
        **dict.fromkeys(("short", "silent", "tally", "decoder", "digits", "settle", "pause", "polish", "pauses"), "pause"), **dict.fromkeys(("answer_only", "filler"), "controls.Silent"),
        **dict.fromkeys(("explicit", "sums", "baseline"), "controls.Explicit"), "lookup": "lookup", "coconut": "coconut",
        "codi_projector": "codi", "codi": "codi",
    }  # fmt: skip
    configs = Path(__file__).parent.parent / "train" / "configs"
    for path in (*sorted((configs / "text").glob("table*.yaml")), configs / "small" / "table.yaml"):
        assert trials(build(Table, read_yaml(path)), path.parent)
    for path in sorted((configs / "small").glob("*.yaml")):
        if path.stem == "table":
            continue
        if "stages" in read_yaml(path):
            assert plan(read_yaml(path))
        else:
            build(find(methods.pop(path.stem)), build(Run, read_yaml(path)).method, "method.")
    assert not methods


def test_one_setting_of_a_file_is_changed_on_the_command_line():
    values = {"worlds": {"families": ["cups"], "corrupt": "none"}, "method": {}}
    made = changed(changed(values, "worlds.corrupt=blind"), "method.pauses=4,16")
    assert made == {"worlds": {"families": ["cups"], "corrupt": "blind"}, "method": {"pauses": "4,16"}}
    assert values["worlds"]["corrupt"] == "none"
    nested = changed({"method": {"steps": {"mean": "tokens"}}}, "method.steps.layers=1")
    assert nested == {"method": {"steps": {"mean": "tokens", "layers": "1"}}}
    assert build(PauseDistillation, made["method"]).pauses == (4, 16)
    for wrong in ("corrupt=blind", "worlds.corrupt", "worlds.=x", ".corrupt=x"):
        with pytest.raises(ConfigError, match=r"write SECTION\.KEY=VALUE"):
            changed({}, wrong)


def test_settings_may_be_given_one_by_one_or_together(tmp_path):
    (tmp_path / "one.yaml").write_text("worlds: {seed: 1}")
    (tmp_path / "two.yaml").write_text("method: {pauses: 2}")
    words = ["--config", str(tmp_path / "one.yaml"), "--config", str(tmp_path / "two.yaml")]
    asked = arguments(
        "", [*words, "--set", "worlds.corrupt=blind", "--set", "worlds.seed=2", "method.pauses=3", "--steps", "5"]
    )
    assert asked.values == {
        "worlds": {"seed": "2", "corrupt": "blind"},
        "method": {"pauses": "3"},
        "training": {"steps": "5"},
    }
    assert asked.given == {
        "worlds": {"seed": "2", "corrupt": "blind"},
        "method": {"pauses": "3"},
        "training": {"steps": "5"},
    }
    assert arguments("", words).given == {"training": {}}


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("method: {}\nworlds: {}", ["--set", "worlds.families=cup"], "there is no world 'cup'"),
        ("method: {}\nstages: [{name: a}]", ["--set", "stages.x=1"], "stages must hold keys and values, not list"),
        ("method: {}\ntraining: [1]", [], "training must hold keys and values, not list"),
        ("method: {}\ntraining:\ntext_worlds: {}\nvalidation: {samples: 1}", [], "what to start from"),
        (
            "method: {}\ntraining: {init: a, out: b}\ntext_worlds: {}\nvalidation: {samples: 1}",
            ["--lr", "-1"],
            "lr is -1.0",
        ),
        ("method: {}\nlora: {r: 0}", [], "lora.r is 0"),
        ("method: {decode: -1}", [], "decode is -1.0: it must be 0 or more"),
        ("method: {steps: {weight: -1}}", [], "steps.weight is -1.0"),
        ("method: {pauses: [4, 1000000]}", [], "1,000,000 slots: train with 256 at most"),
    ],
)
def test_mistakes_on_the_command_line_give_one_sentence_and_exit_2(tmp_path, capsys, text, words, says):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(None, PauseDistillation, ["--config", str(path), *words]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert len(told.strip().splitlines()) == 1


def test_a_bare_no_is_a_word_where_that_is_a_choice(tmp_path):
    """YAML reads it as false."""
    (tmp_path / "run.yaml").write_text("precision: no")
    assert build(Training, read_yaml(tmp_path / "run.yaml")).precision == "no"
    with pytest.raises(ConfigError, match="schedule = False"):
        build(Training, {"schedule": False})
