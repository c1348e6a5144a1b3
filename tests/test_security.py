"""SECURITY.md keeps its word: the tests and commands that it names are there, libraries are held to ranges, and what strangers
type is text to every family."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from engine.backbones.base import Backbone
from engine.data.samples import Sample, context
from tests.pins import lowest, required
from tests.serve import ROOT
from tests.tiny import tiny_backbone, tiny_internvl, tiny_llama, tiny_llava, tiny_mllama, tiny_qwen3vl

TABLE = [line for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if line.count("|") == 4]


def named(cell: str) -> list[tuple[str, str]]:
    """Files of tests/ and what a cell of the table says is in them, each as it stands there between backticks."""
    found, file = [], ""
    for word in re.findall("`([^`]+)`", cell):
        if word.endswith(".py"):
            file = word
        found.append((file, word))
    return found


def test_every_threat_has_a_test_that_is_there() -> None:
    threats = [line.split("|")[1:4] for line in TABLE[2:]]
    threats = [row for row in threats if "**" not in row[0]]
    assert len(threats) > 20
    for threat, _, cell in threats:
        assert named(cell), threat
        for file, word in named(cell):
            if word.startswith("python -m tests."):
                assert (ROOT / "tests" / f"{word.split()[2].removeprefix('tests.')}.py").is_file(), word
                continue
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert word == file or word in text, f"{threat}: tests/{file} has no {word}"


def test_every_library_has_a_lowest_and_a_highest_version() -> None:
    for wanted in required():
        assert {">=", "<"} <= {each.operator for each in wanted.specifier}, wanted
    (torch,) = [wanted for wanted in required(["torch>=2.10,<2.12"]) if wanted.name == "torch"]
    assert lowest(torch, ["2.12.0", "2.11.0", "2.10.1", "2.10.0rc1", "2.9.0"]) == "torch==2.10.1"
    with pytest.raises(ValueError, match="can't be had here"):
        lowest(torch, ["2.9.0"])


@pytest.mark.parametrize(
    "make", [tiny_backbone, tiny_qwen3vl, tiny_internvl, tiny_llava, tiny_mllama, tiny_llama], ids=lambda m: m.__name__
)
def test_special_tokens_in_a_question_are_text(make: Callable[[], Backbone]) -> None:
    """Whatever structure a tokenizer knows: a question that spells it has as much of it as any other question."""
    backbone = make()
    special = {i for i, token in backbone.tokenizer.added_tokens_decoder.items() if token.special}
    spelled = " ".join(backbone.tokenizer.convert_ids_to_tokens(sorted(special)))
    assert {"<pause>", "<ANS>"} <= {*spelled.split()}

    def structure(question: str) -> list[int]:
        ids = backbone.encode(context(Sample(None, question, (), (), ""))).ids
        return [i for i in ids if i in special - {backbone.tokenizer.unk_token_id}]

    assert structure(f"Where {spelled} is it?") == structure("Where is it?")
