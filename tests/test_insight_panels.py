"""The page's tabs: what they say of planted replies, that plain words follow from the numbers, and that words are escaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from engine.ask import Explicit, Option, Reply
from engine.insight import attention, inside, plots, similarity
from engine.insight import replace as matter
from engine.insight.attention import Looked
from engine.insight.inside import Inside
from engine.layout import Frames
from engine.page import cards, panels, share

LAYERS, SLOTS, DIM, SLICES = 4, 3, 6, 5
SURE_OF_A, SURE_OF_B, TORN = (0.9, 0.1), (0.2, 0.8), (0.6, 0.4)


def seen(hidden: tuple[float, ...] = SURE_OF_B, changed: tuple[float, ...] = SURE_OF_B) -> Inside:
    """What was seen inside of a reply that says A: the answer when the slots are hidden, and with those of a changed clip,
    which says B itself."""
    torch.manual_seed(0)
    heat = torch.zeros(LAYERS, 2, SLOTS + 2, SLICES, 2, 3)
    for slot in range(SLOTS):
        heat[:, :, slot, slot, 1, 2] = 0.5  # slot i looks at slice i
    alone = [f"without slot {i + 1}" for i in range(SLOTS)]
    kept = {"as they are": SURE_OF_A, "zeros": TORN, "a changed clip": changed, "hidden": hidden}
    return Inside(
        alone=("ball starts left", "<script>", "left and right swap"),
        taught=(),
        looked=Looked(heat, torch.zeros(LAYERS, 2, SLOTS + 2, SLOTS), 0.5),
        pictures=np.full((SLICES, 28, 42, 3), 200, np.uint8),
        pictured=tuple(range(SLICES)),
        moments=tuple(0.5 * i + 0.25 for i in range(SLICES)),
        changes=kept | dict.fromkeys(alone, SURE_OF_A),
        donors={"a changed clip": SURE_OF_B},
        fewer=(SURE_OF_B, TORN, SURE_OF_A, SURE_OF_A),
        words=[[[("\n", 0.5), ("left", 0.3)], [(" ", 0.9)], [(" <b>", 0.25)]]] * LAYERS,
        tuned=False,
        steps=torch.randn(LAYERS, 2, DIM),
        collapse={
            "cosine": torch.tensor([1, 0.5, 0.5, 0.2]), "effective_rank": torch.tensor([1, 2, 2, 2.5]),
            "norm": torch.ones(LAYERS), "distance": torch.ones(LAYERS), "centre": torch.ones(LAYERS),
        },
    )  # fmt: skip


@pytest.fixture
def reply() -> Reply:
    torch.manual_seed(1)
    asked = {"model": "m", "pauses": SLOTS, "question": "Where <i>?", "options": ["left", "<b>right</b>"], "frames": 5,
             "frame_size": [42, 28], "reader": "decord", "silent": True, "writes": True, "speaks": True, "taught": True,
             "thinks": "slots"}  # fmt: skip
    return Reply(
        "left", (Option("left", 0.9), Option("<b>right</b>", 0.1)), "ball starts left\nleft and right swap, ball right",
        Explicit("ball starts left\nleft and right swap, ball right", "<b>right</b>", 40, 0.9), SLOTS, 4,
        {"think": 0.1, "answer": 0.2, "speak": 1.0}, (), asked, True, torch.randn(LAYERS, SLOTS, DIM),
        torch.randn(LAYERS, DIM), torch.randn(LAYERS, DIM), seen(),
    )  # fmt: skip


def test_slots_that_decide_sway_or_do_not_matter_are_told_apart(reply: Reply) -> None:
    def said(hidden: tuple[float, ...], changed: tuple[float, ...] = SURE_OF_A) -> str:
        return panels.matters(replace(reply, inside=seen(hidden, changed)))

    assert "The slots decide this answer: when nothing may look at them, it becomes “&lt;b&gt;right" in said(SURE_OF_B)
    assert "sway this answer" in said(TORN)
    assert "60% sure and not 90%" in said(TORN)
    assert "The slots do not matter for this answer: without them it stays “left”, 91% sure (90% with them)" in said(
        (0.91, 0.09)
    )
    for hidden in ((0.91, 0.09), TORN):  # a guess may happen to be the answer
        stays = f"without any it stays “left”, {hidden[0]:.0%} sure (90% with them)"
        assert (
            f"can decide this answer, since it follows those of a clip that is answered otherwise; but {stays}"
            in said(hidden, SURE_OF_B)
        )


def test_an_answer_follows_another_clips_slots_or_does_not(reply: Reply) -> None:
    def said(changed: tuple[float, ...], donor: tuple[float, ...] = SURE_OF_B) -> str:
        held = replace(seen(changed=changed), donors={"a changed clip": donor})
        return panels.matters(replace(reply, inside=held))

    assert "the answer follows" in said(SURE_OF_B)
    assert "it does not follow" in said(SURE_OF_A)
    assert "prove nothing" in said(SURE_OF_A, SURE_OF_A)


def test_how_many_slots_an_answer_needs(reply: Reply) -> None:
    said = panels.many(reply)
    assert "From 1 slot on, the answer is “left”" in said
    assert "It first reaches 90% with 2 slots" in said
    unsure = panels.many(replace(reply, inside=replace(seen(), fewer=(TORN, TORN))))
    assert "Without any slot, and with every number of them, the answer is “left”" in unsure
    assert "would write the chain" in unsure


def test_without_slots_or_options_the_tabs_say_what_to_do(reply: Reply) -> None:
    bare = replace(reply, inside=None, slots=0)
    assert "ask with one pause or more" in panels.matters(bare)
    assert "ask with one pause or more" in panels.many(bare)
    assert "ask with one pause or more." in panels.strip(bare, 0)
    assert "cut into tiles" in panels.strip(replace(reply, inside=replace(seen(), looked=None)), 0)
    none = replace(bare, settings=reply.settings | {"silent": False, "thinks": ""})
    assert panels.matters(none) == panels.many(none) == panels.strip(none, 0) == "<p>This model has no slots.</p>"
    tokens = replace(bare, settings=reply.settings | {"thinks": "tokens"})
    untaught = replace(bare, slots=8, settings=reply.settings | {"taught": False, "thinks": ""})
    for other, said in ((tokens, "thinks in tokens that it writes"), (untaught, "was never trained for pauses")):
        assert said in panels.matters(other)
        assert panels.matters(other) == panels.many(other) == panels.strip(other, 0)
    assert panels.meanings(None) == panels.lens_table(None, 0) == panels.collapsed(None) == panels.chips(0, 0) == ""


def test_every_change_is_explained() -> None:
    own = torch.randn(2, 1, 1, 1, 4, 3)
    names = [change.name for change in matter.changes(own, {panels.CHANGED: own, panels.OTHER: own})]
    told = matter.meant(names)
    assert [name.split("…")[0] for name in told] == [name for name in names if not name.startswith("without")] + [
        "without slot "
    ]
    assert len(set(told.values())) == len(told)
    table = panels.meanings(seen())
    assert all(said in table for said in matter.meant(seen().changes).values())
    assert "shuffled" not in table  # it is no row of these


@pytest.mark.parametrize(("cosine", "said"), [(0.99, "Yes"), (0.8, "In part"), (0.1, "No: the slots differ")])
def test_collapse_is_said_in_words(cosine: float, said: str) -> None:
    held = seen()
    last = {**held.collapse, "cosine": torch.tensor([0, 0, 0, cosine])}
    told = panels.collapsed(replace(held, collapse=last))
    assert said in told
    assert "2.5 of at most 3 directions" in told


def test_the_chosen_slot_is_shown_everywhere(reply: Reply) -> None:
    """Its words, its frames, its row or column in every plot."""
    held, chosen = seen(), 1
    assert "Slot 2 by itself" in panels.slot_words(reply, chosen)
    assert "<script>" not in panels.slot_words(reply, chosen)
    assert "most like written step 2" in panels.slot_words(reply, 2)
    assert "most like true step 1, overlap of the words (F1) 100%" in panels.slot_words(reply, 0, ["ball starts left"])
    shares = re.findall(r"<b>([\d.]+) %</b>", panels.strip(reply, chosen))
    assert shares == ["0.0", "50.0", "0.0", "0.0", "0.0"]
    pressed = re.findall(r'data-index="(\d)" aria-pressed="true"', panels.chips(SLOTS, chosen))
    assert pressed == ["1"]
    assert panels.lens_table(held, chosen).count('class="s-on"') == LAYERS + 1

    assert held.looked is not None
    rows = held.looked.frames.mean((0, 1))[: SLOTS + 1]
    changed = plots.changed(held.changes, ["left", "right"], chosen)
    assert [row for row in changed.data[0].y if "<b>" in row] == ["<b>without slot 2</b>"]
    for figure, x, y in (
        (plots.looked(rows, 0.5, [(0.0, 0.5), (0.5, 1.0)], chosen), (0, 2.5), (0.5, 1.5)),
        (plots.slots(reply.states, 1, chosen), (0.5, 3.5), (1.5, 2.5)),
        (plots.steps(reply.states[1], torch.randn(2, DIM), chosen), (0.5, 2.5), (1.5, 2.5)),
        (plots.teacher(reply.states, reply.answer_state, reply.answer_state, chosen), (1.5, 2.5), (-0.5, 3.5)),
    ):
        frame = next(shape for shape in figure.layout.shapes if shape.type == "rect")
        assert (frame.x0, frame.x1, frame.y0, frame.y1) == (*x, *y)
    lines = plots.way(reply.states, chosen).data
    assert [line.opacity == 1 for line in lines] == [i == chosen for i in range(SLOTS)]


def test_the_steps_of_a_clip_are_marked_on_the_timeline() -> None:
    figure = plots.looked(torch.rand(SLOTS + 1, SLICES), 0.5, [(0.0, 0.5), (0.5, 1.5), (1.5, 2.5)], 0)
    assert [shape.x0 for shape in figure.layout.shapes if shape.type == "line"] == [0.0, 0.5, 1.5]
    assert [(note.x, note.text) for note in figure.layout.annotations] == [(0.5, "2"), (1.5, "3")]
    assert figure.layout.xaxis.title.text == "time in the clip, s"
    assert list(figure.data[0].x) == [0.25, 0.75, 1.25, 1.75, 2.25]


def test_what_is_pointed_at_is_named(reply: Reply) -> None:
    """A row of the answer isn't called a slot, and a line or bar says whose it is."""
    looked = plots.looked(torch.rand(SLOTS + 1, SLICES), 0.5, [], 0).data[0]
    assert [{*row} for row in looked.customdata] == [{"slot 1"}, {"slot 2"}, {"slot 3"}, {"answer"}]
    assert looked.hovertemplate.startswith("%{customdata}, ")
    for figure in (plots.by_number([SURE_OF_A] * 3, ["x", "y"]), plots.changed(seen().changes, ["x", "y"], 0)):
        assert [trace.name for trace in figure.data] == ["A x", "B y"]
        assert all("%{fullData.name}" in trace.hovertemplate for trace in figure.data)


def test_no_two_of_26_options_look_the_same() -> None:
    options, shares = [f"option {i}" for i in range(26)], [1 / 26] * 26
    lines = [trace.line for trace in plots.by_number([shares] * 2, options).data]
    assert len({(line.color, line.dash) for line in lines}) == 26
    assert {line.dash for line in lines[:8]} == {"solid"}
    bars = [trace.marker for trace in plots.changed({"as they are": shares}, options, 0).data]
    assert len({(bar.color, bar.pattern.shape) for bar in bars}) == 26
    way = [trace.line for trace in plots.way(torch.randn(3, 32, 8), 0).data]
    assert len({(line.color, line.dash) for line in way}) == 32
    assert [plots.way(torch.randn(3, n, 8), 0).layout.showlegend for n in (8, 9)] == [True, False]


def test_the_way_is_one_of_directions() -> None:
    """The final norm, which changes the last layer's lengths alone, moves nothing."""
    states = torch.randn(4, 3, 6)
    normed = torch.cat([100 * states[:-1], states[-1:]])
    drawn, same = (np.array([[line.x, line.y] for line in plots.way(each, 0).data]) for each in (normed, states))
    np.testing.assert_allclose(drawn, same, atol=1e-5)


@pytest.mark.parametrize(("frames", "slices"), [(33, 17), (5, 3), (8, 4), (1, 1)])
def test_a_slice_is_pictured_by_its_own_frames(monkeypatch: pytest.MonkeyPatch, frames: int, slices: int) -> None:
    """Two frames a slice, of which the last may have one."""
    attended = Looked(torch.rand(1, 1, 2, slices, 2, 2), torch.rand(1, 1, 2, 2), 0.5)
    monkeypatch.setattr(attention, "looked", lambda *given: [attended])
    pixels = np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, 2, 2, 3))
    asked: Any = SimpleNamespace(visual=Frames(pixels, 0.25))
    subject: Any = SimpleNamespace(backbone=None, method=SimpleNamespace(lead=()))
    looked, pictures, pictured, moments = inside._looked(subject, asked, cast(Any, None))
    assert looked is not None
    assert [int(picture[0, 0, 0]) // 2 for picture in pictures] == list(pictured)
    wanted = [min(0.5 * place + 0.25, (0.5 * place + 0.25 * frames) / 2) for place in pictured]
    assert list(moments) == pytest.approx(wanted)


def test_the_lens_table_shows_what_cannot_be_seen(reply: Reply) -> None:
    table = panels.lens_table(seen(), 0)
    assert "logit lens" in table
    assert "tuned lens" in panels.lens_table(replace(seen(), tuned=True), 0)
    assert re.findall(r"<td[^>]*>([^<]*)</td>", table)[:3] == ["⏎", "␣", "&lt;b&gt;"]
    assert 'title="⏎ 50%, left 30%"' in table
    assert re.findall(r'<th scope="row">(\d)</th>', table) == ["3", "2", "1", "0"]


def test_two_models_stand_beside_each_other(reply: Reply) -> None:
    silent = replace(reply, answer="<b>right</b>", slots=0, inside=None, explicit=None, thoughts="")
    table = panels.compared({"one": reply, "<two>": silent}, {"answer": "left"})
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', table)
    told = {aspect: (mine, theirs) for aspect, mine, theirs in rows}
    assert "✓ correct" in told["Silent answer"][0]
    assert "✗ incorrect" in told["Silent answer"][1]
    assert told["Slots"] == ("3", "0")
    assert told["Written chain's answer"][1] == "not asked for"
    assert told["Thoughts"][0] == "ball starts left<br>left and right swap, ball right"
    assert told["Thoughts"][1] == "No pauses, so no thoughts to say."
    assert "The slots decide this answer" in told["Do its slots matter?"][0]
    assert told["Do its slots matter?"][1] == ""
    assert "<two>" not in table
    assert "<b>right</b>" not in table
    assert "correct" not in panels.compared({"one": reply, "two": silent})


def test_total_variation() -> None:
    assert [panels.distance((1.0, 0.0), other) for other in ((1.0, 0.0), (0.0, 1.0), (0.75, 0.25))] == [0, 1, 0.25]


def test_a_model_that_only_knows_its_chain_has_one_answer(reply: Reply) -> None:
    asked = {**reply.settings, "silent": False, "speaks": False}
    only = replace(
        reply, answer="<b>right</b>", slots=0, generated_tokens=40, inside=None, thoughts="", teacher_state=None, settings=asked
    )  # fmt: skip
    card = cards.answers(only)
    assert card.count("<section>") == 1
    assert "By its written chain" in card
    assert "pauses" not in card
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', panels.compared({"one": only}))
    told = dict(rows)
    assert told["Silent answer"] == "none: it only writes its chain"
    assert told["Silent steps and time"] == ""
    assert "90% sure" in told["Written chain's answer"]
    assert "This model has no slots." in cards.thoughts(only)
    assert told["Thoughts"] in cards.teacher_note(only)


def test_compared_models_say_what_they_have_not_learnt_and_what_to_mind(reply: Reply) -> None:
    asked = {**reply.settings, "writes": False, "speaks": False}
    filler = replace(
        reply, explicit=None, thoughts="", settings=asked, notices=("Trained with <b>4</b>.", "Not yours.")
    )
    table = panels.compared({"one": reply, "two": filler})
    rows = {
        name: cells for name, *cells in re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', table)
    }
    assert rows["Written chain's answer"][1] == "none: it hasn't learnt to write one"
    assert rows["Thoughts"][1] == "This model hasn't learnt to say its thoughts."
    assert rows["Notices"] == ["", "Trained with &lt;b&gt;4&lt;/b&gt;.<br>Not yours."]
    unasked = panels.compared({"one": replace(reply, explicit=None)})
    assert "<td>not asked for</td>" in unasked


def test_the_page_to_share_is_whole(reply: Reply) -> None:
    shown = {
        "answers": "<p>answers</p>", "compared": "", "thoughts": "<p>thoughts</p>", "words": panels.slot_words(reply, 0),
        "strip": panels.strip(reply, 0), "lens": panels.lens_table(reply.inside, 0),
        "looked": plots.looked(torch.rand(SLOTS + 1, SLICES), 0.5, [], 0), "changed": plots.changed(seen().changes, ["a", "b"], 0),
        "slots": plots.slots(reply.states, 0, 0), "steps": None, "way": plots.way(reply.states, 0),
        "teacher": plots.teacher(reply.states, reply.answer_state, reply.answer_state, 0),
    }  # fmt: skip
    page = share.page(reply, None, shown, 2)
    assert "Slot by slot, in layer 2" in page
    assert page.count('class="plotly-graph-div"') == 6
    assert "<i>?" not in page
    assert "<b>right" not in page
    assert "True answer" not in page
    assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(?!data:)', page)
    own = {name: reply.settings[name] for name in ("question", "options")}
    truth = {"answer": "left", "steps": [{"text": "ball starts left"}], "difficulty": 1}
    assert "True answer: <b>left</b>" in share.page(reply, truth | own, shown, 2)
    assert "to this clip's own question: <b>left</b>" in share.page(reply, truth | own | {"question": "Why?"}, shown, 2)


def test_what_was_seen_inside_is_all_in_the_json() -> None:
    told = json.loads(json.dumps(inside.as_json(seen()), allow_nan=False))
    assert told["changes"]["hidden"] == [0.2, 0.8]
    assert told["said_by_donors"] == {"a changed clip": [0.2, 0.8]}
    assert len(told["fewer_slots"]) == SLOTS + 1
    assert np.array(told["looked"]["patches"]).shape == (SLOTS + 2, SLICES, 2, 3)
    assert np.array(told["written_steps"]).shape == (LAYERS, 2, DIM)
    assert set(told["collapse"]) == {"cosine", "effective_rank", "norm", "distance", "centre"}
    assert told["lens"]["kind"] == "plain"
    assert told["alone"][0] == "ball starts left"


def test_one_slot_is_neither_like_nor_unlike_another() -> None:
    """A cosine of 0 would be a false one."""
    words = similarity.vocabulary(torch.eye(DIM))
    held = similarity.collapse(torch.randn(LAYERS, 1, DIM), words)
    one = replace(seen(), collapse=held, words=[layer[:1] for layer in seen().words])
    assert set(inside.as_json(one)["collapse"]) == {"effective_rank", "norm", "centre"}
    assert "One slot has no other to be like." in panels.collapsed(one)
