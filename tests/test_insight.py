"""Similarity by its definition, figures that say what they show, and cards that escape what was written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import ask, generate, models, worlds
from engine.ask import UNKNOWN, Explicit, Option, Reply
from engine.insight import plots, similarity
from engine.methods import controls
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.controls import Silent
from engine.methods.heima import Heima, Interpreters
from engine.methods.method import Method
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from engine.page import cards, panels
from engine.video import read
from tests import tiny
from tests.serve import ROOT

LAYERS, SLOTS, DIM = 4, 5, 6
ASKED = {
    "model": "m", "question": "Where is it?", "options": ["left", "<b>right</b>"], "silent": True, "writes": True,
    "speaks": True, "taught": True, "thinks": "slots",
}  # fmt: skip


@pytest.fixture
def reply() -> Reply:
    torch.manual_seed(0)
    return Reply(
        "left", (Option("left", 0.75), Option("<b>right</b>", 0.25)), "ball starts left\nso left is A",
        Explicit("ball starts left\nso left is A", "left", 40, 0.9), SLOTS, 4, {"think": 0.1, "answer": 0.2, "speak": 1.0},
        ("A notice & more.",), ASKED, True, torch.randn(LAYERS, SLOTS, DIM), torch.randn(LAYERS, DIM), torch.randn(LAYERS, DIM),
    )  # fmt: skip


def test_similarity_is_the_cosine(reply: Reply) -> None:
    between = similarity.between_slots(reply.states)
    towards = similarity.with_state(reply.states, reply.answer_state)
    assert between.shape == (LAYERS, SLOTS, SLOTS)
    assert towards.shape == (LAYERS, SLOTS)
    for layer in range(LAYERS):
        for i in range(SLOTS):
            state = reply.states[layer, i].double()
            for j in range(SLOTS):
                wanted = torch.cosine_similarity(state, reply.states[layer, j].double(), dim=0)
                assert between[layer, i, j] == pytest.approx(wanted.item(), abs=1e-9)
            wanted = torch.cosine_similarity(state, reply.answer_state[layer].double(), dim=0)
            assert towards[layer, i] == pytest.approx(wanted.item(), abs=1e-9)


def test_similarity_of_nothing_and_of_zero() -> None:
    assert similarity.between_slots(torch.zeros(3, 0, 4)).shape == (3, 0, 0)
    assert similarity.between_slots(torch.zeros(1, 2, 4)).abs().max() == 0


def test_figures(reply: Reply) -> None:
    figure = plots.slots(reply.states, 2, 0)
    assert torch.tensor(figure.data[0].z).double().allclose(similarity.between_slots(reply.states)[2], atol=1e-4)
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("slot", "slot")
    assert figure.data[0].zmin == -1
    against = plots.teacher(reply.states, reply.answer_state, reply.teacher_state, 0)
    drawn = torch.tensor(against.data[0].z).double()
    assert drawn.shape == (LAYERS, SLOTS + 1)
    assert drawn[:, :SLOTS].allclose(similarity.with_state(reply.states, reply.teacher_state), atol=1e-4)
    silent = torch.cosine_similarity(reply.answer_state.double(), reply.teacher_state.double(), dim=1)
    assert drawn[:, SLOTS].allclose(silent, atol=1e-4)
    assert against.layout.xaxis.ticktext[-1] == "answer"
    assert list(against.data[0].customdata[-1]) == [*(f"slot {i + 1}" for i in range(SLOTS)), "answer"]
    assert against.data[0].hovertemplate.startswith("layer %{y}, %{customdata}:")
    nearly = plots.steps(torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.001, 1.0], [-0.4, 0.3]]), 0)
    assert [list(row) for row in nearly.data[0].text] == [[".00", "-.80"]]


def test_colours_mean_the_same_in_every_layer() -> None:
    states = torch.rand(3, 4, 5) + 0.5
    scales = {(f.data[0].zmin, f.data[0].zmax) for f in (plots.slots(states, layer, 0) for layer in range(3))}
    assert len(scales) == 1
    low, high = scales.pop()
    assert 0 <= low < similarity.between_slots(states).min()
    assert high == 1


@pytest.mark.parametrize("slots", [0, 1, 32])
def test_any_number_of_slots_can_be_drawn(slots: int) -> None:
    states, state = torch.randn(3, slots, 8), torch.randn(3, 8)
    figure = plots.teacher(states, state, state, 0)
    assert len(figure.data[0].z[0]) == slots + 1
    if slots:
        assert len(plots.slots(states, 0, 0).layout.xaxis.tickvals) <= 8


def test_cards_escape_and_tell(reply: Reply) -> None:
    card = cards.answers(reply)
    assert "<b>right</b>" not in card
    assert "&lt;b&gt;right&lt;/b&gt;" in card
    assert "75 %" in card
    assert "10× fewer tokens" in card
    assert "3.0× less time" in card
    assert "A notice &amp; more." in cards.notices(reply)
    assert "s-right" not in card + cards.thoughts(reply)
    assert "<script" not in cards.thoughts(replace(reply, thoughts="<script>\x1ealert(1)</script>"))


def test_what_a_model_has_not_learnt_is_told_apart_from_what_was_not_asked_for(reply: Reply) -> None:
    mute = replace(reply, explicit=None, teacher_state=None, thoughts="")
    alone = replace(mute, settings=reply.settings | {"writes": False, "speaks": False})
    truth = {"answer": "left", "steps": [{"text": "ball starts left"}]}
    assert "Not asked for." in cards.answers(mute)
    assert "It hasn't learnt to write one." in cards.answers(alone)
    assert "Nothing was said." in cards.thoughts(mute)
    assert "0 of 1 right" in cards.thoughts(mute, truth)
    assert "This model hasn't learnt to say its thoughts." in cards.thoughts(alone, truth)
    assert "of 1 right" not in cards.thoughts(alone, truth)
    assert "No pauses" in cards.thoughts(replace(mute, slots=0))
    assert (cards.teacher_note(mute), cards.teacher_note(alone)) == (cards.NO_TEACHER, cards.NEVER_TEACHER)
    assert cards.teacher_note(reply) == cards.TEACHER


def test_an_abstention_is_loud(reply: Reply) -> None:
    strange = replace(reply, familiar=False, notices=(f"{UNKNOWN} this clip is unlike.", "A notice."))
    assert cards.notices(strange).index("s-warning") < cards.notices(strange).index("s-note")
    assert "don't trust it" in cards.answers(strange)
    assert "s-muted" in cards.answers(strange)
    assert "s-muted" not in cards.answers(reply)


def test_truth_marks_answers_and_steps(reply: Reply) -> None:
    truth = {"answer": "left", "steps": [{"text": "ball starts left"}, {"text": "so left is B"}], "difficulty": 1}
    assert "✓ correct" in cards.answers(reply, truth)
    assert "✗ incorrect" in cards.answers(replace(reply, answer="right"), truth)
    told = cards.thoughts(replace(reply, explicit=None), truth)
    assert told.count("✓") == told.count("✗") == 1
    assert "1 of 2 right" in told
    assert "True answer: <b>left</b>" in cards.true_answer(truth)


def test_a_truth_judges_answers_to_its_own_question_alone(reply: Reply) -> None:
    truth = {"question": "Where is it?", "options": ["<b>right</b>", "left"], "answer": "left", "steps": []}
    assert cards.answers_own(reply, truth)
    for other in ({"question": "Where is it not?"}, {"options": ["left", "middle"]}, {"options": []}):
        edited = replace(reply, settings=ASKED | other)
        assert not cards.answers_own(edited, truth)
        assert "The true answer to this clip's own question: <b>left</b>" in cards.true_answer(truth, edited)
    assert "<p>True answer: <b>left</b>" in cards.true_answer(truth, reply)


def test_a_silent_answer_says_how_it_was_thought_about(reply: Reply) -> None:
    none = replace(reply, slots=0)
    heima = replace(none, settings=ASKED | {"thinks": "tokens", "writes": False}, thoughts="")
    assert "Silent, with 5 pauses" in cards.answers(reply)
    fed = replace(reply, generated_tokens=9, settings=reply.settings | {"thinks": "fed back"})
    assert "Silent, with 5 thoughts" in cards.answers(fed)
    assert "At once, without pauses" in cards.answers(none)
    assert "Silent, in thinking tokens" in cards.answers(heima)
    assert "pauses" not in cards.answers(heima)
    assert "pauses" not in cards.thoughts(heima)


def test_thoughts_that_are_fed_back_are_told_apart_from_tokens(reply: Reply) -> None:
    fed = replace(reply, generated_tokens=11, settings=ASKED | {"thinks": "fed back"})
    assert "<b>5</b> thoughts fed back" in cards.answers(fed)
    assert "<b>6</b> tokens written" in cards.answers(fed)
    assert "3.6× fewer steps" in cards.answers(fed)
    assert "fed back" not in cards.answers(reply)


def test_an_answer_says_who_was_asked_what(reply: Reply) -> None:
    edited = replace(reply, settings=ASKED | {"question": "<i>Where</i>?", "pauses": 5})
    other = replace(reply, settings=ASKED | {"model": "n"})
    assert "m was asked: <q>&lt;i&gt;Where&lt;/i&gt;?</q>" in cards.asked(edited)
    assert "m and n were asked" in cards.asked(edited, other)
    (data,) = re.findall('data-asked="([^"]*)"', cards.asked(edited))
    assert json.loads(unescape(data)) == ["<i>Where</i>?", ["left", "<b>right</b>"], 5]


def test_where_there_is_nothing_to_draw_a_sentence_says_why(reply: Reply) -> None:
    asked = replace(reply, settings=ASKED | {"pauses": 0})
    assert panels.hollow(asked) == ""
    assert "ask with one pause or more" in panels.hollow(replace(asked, slots=0))
    assert cards.steps_note(replace(asked, slots=0)) == ""
    assert cards.steps_note(asked) == cards.NO_STEPS
    assert cards.steps_note(replace(asked, explicit=None)) == cards.NO_TEACHER


def test_models_are_told_apart_in_a_phrase() -> None:
    backbone = tiny.tiny_backbone(layers=1)
    methods = (
        PauseDistillation(),
        Silent(pauses=8),
        Silent(pauses=0),
        Coconut(),
        Codi(prj_dim=8),
        Interpreters(),
        controls.Explicit(),
    )
    told = [
        cards.in_short(replace(models.Model(backbone, "m", None, models.PUBLISHED_SAMPLING, None, method,
                                            method.companions(backbone)), trained_pauses=method.slot_range))
        for method in methods
    ]  # fmt: skip
    assert len({*told}) == len(methods)
    assert told[1] == "pauses taught by the answer alone"


def test_the_steps_of_a_world_are_called_what_they_are() -> None:
    clip = str(ROOT / "assets/examples/cups-3-2.mp4")
    records = [{"family": family, "difficulty": steps, "clip": clip} for family in worlds.FAMILIES for steps in (1, 3)]
    assert re.findall(">([a-z]+, [13] [a-z]+)<", cards.gallery(records)) == [
        "cups, 1 swap", "cups, 3 swaps", "relay, 1 touch", "relay, 3 touches", "tally, 1 number", "tally, 3 numbers",
    ]  # fmt: skip


ALL_AT_ONCE, BLIND, SILENT = "run all at once", "sees neither video nor question", "The model thinks in silence"


@pytest.mark.parametrize(
    ("method", "thinks", "said", "unsaid"),
    [
        (PauseDistillation(), "slots", [SILENT, ALL_AT_ONCE, BLIND, "says what it thought", "compare its silent answer"], []),
        (PauseDistillation(mode="silent"), "slots", [SILENT, ALL_AT_ONCE], [BLIND, "says what", "with the written one"]),
        (PauseDistillation(mode="teacher"), "", ["writes out"], [SILENT, ALL_AT_ONCE, BLIND]),
        (Silent(pauses=8), "slots", [SILENT, ALL_AT_ONCE], [BLIND, "says what"]),
        (Silent(pauses=0), "", ["answers at once"], [SILENT, ALL_AT_ONCE, "writes out"]),
        (Coconut(), "fed back", [SILENT, "one after another: each is fed"], [ALL_AT_ONCE, BLIND, "with the written one"]),
        (Coconut(thoughts="filler"), "slots", [SILENT, ALL_AT_ONCE], [BLIND]),
        (Coconut(mode="no_cot"), "", ["answers at once"], [SILENT]),
        (Codi(prj_dim=8, steps=StepSupervision()), "fed back", ["each is fed", "by the decoder that taught"], [ALL_AT_ONCE, BLIND]),
        (Interpreters(), "tokens", [SILENT, "tokens of its own", "know the question too"], [ALL_AT_ONCE, BLIND, "slots"]),
        (Heima(), "tokens", [SILENT, "tokens of its own"], ["interpreters", "slots", "says what"]),
        (Heima(compressed=0), "", ["writes out"], [SILENT]),
        (models.Untaught(), "", ["writes out", "has not learnt to think in another way"], [SILENT, ALL_AT_ONCE, BLIND]),
    ],
)  # fmt: skip
def test_the_page_says_of_itself_what_is_true_of_its_model(
    method: Method, thinks: str, said: list[str], unsaid: list[str]
) -> None:
    backbone = tiny.tiny_backbone(layers=1)
    model = models.Model(backbone, "m", None, models.PUBLISHED_SAMPLING, None, method, method.companions(backbone))
    told = " ".join(cards.header(model).split())
    assert method.thinks == thinks
    assert [words for words in said if words not in told] == []
    assert [words for words in unsaid if words in told] == []


def test_json_holds_everything(reply: Reply) -> None:
    told = json.loads(
        json.dumps(ask.as_json(replace(reply, states=reply.states / 0), 0.5, states=True), allow_nan=False)
    )
    assert told["seconds"]["video"] == 0.5
    assert told["options"][0] == {"text": "left", "probability": 0.75}
    assert (len(told["states"]["slots"]), len(told["states"]["slots"][0])) == (LAYERS, SLOTS)
    assert ask.as_json(replace(reply, options=(), explicit=None), 0.5)["options"] is None
    assert "states" not in ask.as_json(reply, 0.5)


@pytest.mark.parametrize(
    ("trained", "wanted", "near"), [((4, 12), 2, 4), ((4, 12), 9, 9), ((4, 12), 32, 12), (None, 8, 0)]
)
def test_a_model_is_asked_with_a_number_of_pauses_that_it_knows(
    trained: tuple[int, int] | None, wanted: int, near: int
) -> None:
    model = models.Model(tiny.tiny_backbone(), "m", trained, models.PUBLISHED_SAMPLING, None)
    assert model.pauses_near(wanted) == near
    assert model.usual_pauses == model.pauses_near(8)


def test_the_shipped_examples_are_what_they_say() -> None:
    """Their records are those of the worlds, so that their true answers can be shown."""
    from engine.models import SMALL

    files = sorted((SMALL.parent / "examples").glob("*.json"))
    assert len(files) >= 3
    assert {json.loads(f.read_text())["family"] for f in files} == set(worlds.FAMILIES)
    for file in files:
        told = json.loads(file.read_text())
        record = worlds.make(told["family"], told["difficulty"], told["seed"], told["split"])
        assert worlds.as_json(record) == {name: value for name, value in told.items() if name != "clip"}
        assert file.with_suffix(".mp4").stat().st_size < 150_000


@pytest.mark.parametrize(("name", "prefills"), [("pause", 1), ("codi", 2)])
def test_a_chain_is_not_charged_for_slots_that_cost_steps(
    monkeypatch: pytest.MonkeyPatch, name: str, prefills: int
) -> None:
    """Where slots ride the prefill, the chain goes on from the same."""
    thoughts: list[int] = []
    think = generate.think

    def counted(*given: Any, **named: Any) -> generate.Thoughts:
        found = think(*given, **named)
        thoughts.append(found.count)
        return found

    monkeypatch.setattr(generate, "think", counted)
    model = models.load(models.SMALL / name, device="cpu")
    shown = read(min((ROOT / "assets" / "examples").glob("cups-*.mp4")), model.sampling)
    reply = ask.ask(model, shown, "Where is the ball at the end?", ["left", "middle", "right"])
    assert thoughts == [8, 0][:prefills]
    assert reply.explicit
    seconds = reply.seconds["explicit"] + (reply.seconds["think"] if prefills == 1 else 0.0)
    assert reply.explicit.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("pieces", "plain", "place"),
    [
        (("<<1", "+1", "=2>>", "\n", "###", " 2", "<end>"), True, 5),
        (("The", " answer", " is:", " C#", "<end>"), True, 3),
        (("<think>", "x", "</think>", "<answer>", "B", "</answer>", "<end>"), False, 4),
        (("<think>", "x", "x"), False, None),
        (("1 + 1", "\n", "2 + 2"), True, None),
    ],
)
def test_the_state_that_predicts_an_answer_stands_behind_what_opens_it(
    pieces: Any, plain: bool, place: int | None
) -> None:
    states = torch.arange(float(len(pieces))).view(-1, 1, 1, 1)
    written = generate.Written([list(range(len(pieces)))], ["".join(pieces[:-1])], [len(pieces)], states)
    backbone = SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    model: Any = SimpleNamespace(dialect="plain" if plain else "chat", method=Coconut(), backbone=backbone)
    found = ask._behind_tag(model, written)
    assert (None if found is None else int(found)) == place
