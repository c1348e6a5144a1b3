"""The study: what figures say of planted observations, controls that are what they claim, files, and the command."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from engine import adapters, ask, generate, models, worlds
from engine.__main__ import main
from engine.backbones import small
from engine.backbones.base import add_tokens
from engine.benchmark import Benchmark
from engine.data.samples import Sample
from engine.data.worlds import texts
from engine.insight import command, figures, report
from engine.insight.estimates import average, gain, mcnemar, share
from engine.insight.holds import collapse, in_the_best, lenses, looked, named, probes, said, towards
from engine.insight.lens import TunedLens
from engine.insight.observe import among_options, observe
from engine.insight.similarity import vocabulary
from engine.insight.study import beside_controls, how_many, in_words, replacement
from engine.insight.subject import Clips, Subject, untrained, words_of
from engine.methods import described
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.controls import Explicit, Silent
from engine.methods.method import META, Method
from engine.methods.pause import PauseDistillation
from engine.page import cards
from engine.video import read

CHANGES = ("as they are", "hidden", "another")
CLIPS = 200


def one_hot(chosen: list[int]) -> np.ndarray:
    return np.eye(26)[chosen] * 0.9 + np.eye(26)[[(c + 1) % 3 for c in chosen]] * 0.1


def planted(follow: bool, needed: bool) -> tuple[dict, Clips]:
    """Every clip's true option is A. As they are, the slots say A; without them the answer is B if they are `needed`; with
    another's slots it is the other's C if it is to `follow`. Every fifth clip has no donor."""
    sample = Sample(None, "Which?", ("one", "two", "three"), ("it is one", "so one A"), "A")
    donors = [None if i % 5 == 0 else sample for i in range(CLIPS)]
    rows = [[0] * CLIPS, [1 if needed else 0] * CLIPS, [2 if follow else 0] * CLIPS]
    fewer = [rows[1], rows[0]]  # no slot, one slot
    shares = np.stack([one_hot(row) for row in rows + fewer], axis=1)
    seen = {
        "names": [list(CHANGES)] * CLIPS, "shares": shares, "said by another": np.full(CLIPS, 2),
        "tokens": np.full(CLIPS, 4), "written_tokens": np.full(CLIPS, 40), "written_right": np.ones(CLIPS, dtype=bool),
    }  # fmt: skip
    return seen, Clips([sample] * CLIPS, ["f"] * CLIPS, [()] * CLIPS, {"another": donors}, {})


def test_a_planted_cause_is_found() -> None:
    seen, clips = planted(follow=True, needed=True)
    rows = replacement(seen, clips)
    assert rows["as they are"]["accuracy"]["value"] == 1
    assert rows["as they are"]["distance"]["high"] == 0
    gained = rows["hidden"]["gain"]
    assert (gained["value"], gained["low"], gained["n"]) == (-1, -1, CLIPS)
    assert -1 < gained["high"] < -0.95
    assert gained["p"] < 1e-50
    assert rows["hidden"]["same_answer"]["value"] == 0
    assert rows["hidden"]["distance"]["value"] == pytest.approx(0.9)
    assert rows["another"]["follows"]["value"] == 1
    assert rows["another"]["follows"]["n"] == rows["another"]["accuracy"]["n"] == CLIPS * 4 // 5
    said = " ".join(in_words(rows))
    assert "The slots matter" in said
    assert "reads its answer from them" in said


def test_slots_without_effect_are_said_to_have_none() -> None:
    seen, clips = planted(follow=False, needed=False)
    rows = replacement(seen, clips)
    assert rows["hidden"]["gain"]["value"] == 0
    assert rows["another"]["follows"]["value"] == 0
    said = " ".join(in_words(rows))
    assert "hardly matter" in said
    assert "mostly does not read its answer from them" in said


@pytest.mark.parametrize(
    ("clips", "needed", "sentence"),
    [
        (1, True, "The slots sway the answer"),
        (5, True, "The slots sway the answer"),
        (6, True, "The slots matter"),
        (1, False, "Whether the slots matter is left open"),
        (40, False, "The slots hardly matter"),
    ],
)
def test_few_clips_claim_no_more_than_chance_leaves(clips: int, needed: bool, sentence: str) -> None:
    """All fall alike, so that a resampled mean has no spread; six of six fall so by chance 1 time in 32."""
    seen, whole = planted(follow=False, needed=needed)
    rows = replacement(
        {name: values[:clips] for name, values in seen.items()} | {"names": seen["names"]}, whole.part(0, clips)
    )
    assert in_words(rows)[1].startswith(sentence)
    assert rows["hidden"]["gain"]["low"] < rows["hidden"]["gain"]["high"]


def test_slots_that_do_harm_are_found_out() -> None:
    seen, clips = planted(follow=False, needed=True)
    wrong = replace(clips, samples=[replace(sample, answer="B") for sample in clips.samples])
    assert "The slots do harm: without them more" in in_words(replacement(seen, wrong))[1]


def test_a_donor_that_says_the_same_proves_nothing() -> None:
    seen, clips = planted(follow=True, needed=True)
    seen["said by another"] = np.zeros(CLIPS, dtype=int)
    rows = replacement(seen, clips)
    assert rows["another"]["follows"]["n"] == rows["another"]["follows_letter"]["n"] == 0
    assert in_words(rows)[-1].startswith("The slots of another prove nothing here")


def test_a_letter_may_follow_where_the_word_does_not() -> None:
    """The donor's options stand in another order: its C is the clip's "two". Slots that hold a letter give C, "three"."""
    seen, clips = planted(follow=True, needed=True)
    other = Sample(None, "Which?", ("three", "one", "two"), ("it is two", "so two C"), "C")
    rows = replacement(seen, replace(clips, donors={"another": [other] * CLIPS}))
    assert rows["another"]["follows"]["value"] == 0
    assert rows["another"]["follows_letter"]["value"] == 1
    assert rows["another"]["follows_letter"]["n"] == CLIPS
    assert "by its letter: it reads its answer from them" in in_words(rows)[-1]


def test_how_many_thoughts_by_hand() -> None:
    seen, clips = planted(follow=True, needed=True)
    found = how_many(seen, clips)
    assert [row["accuracy"]["value"] for row in found["by_slots"]] == [0, 1]
    assert found["by_slots"][1]["confidence"]["value"] == pytest.approx(0.9)
    aloud = {row["threshold"]: row for row in found["think_aloud"]}
    assert aloud[0.8]["tokens"]["value"] == 4
    assert aloud[0.95]["tokens"]["value"] == 44
    early = {row["threshold"]: row for row in found["early_exit"]}
    assert (early[0.5]["slots"]["value"], early[0.5]["accuracy"]["value"]) == (0, 0)
    assert (early[0.95]["slots"]["value"], early[0.95]["accuracy"]["value"]) == (1, 1)


def test_slots_are_held_against_the_steps_of_chains_that_are_whole() -> None:
    samples = [Sample(None, "?", ("a", "b"), tuple("xyz"[:n]), "A") for n in (2, 2, 3, 3)]
    shape = (1, 2)  # layers + 1, slots
    alike = [np.full((*shape, 2), 0.2), np.full((*shape, 2), 0.4), np.full((*shape, 3), 0.5), np.zeros((*shape, 2))]
    found = towards({"towards": alike}, samples)
    assert np.allclose(found["2"], 0.3)
    assert np.allclose(found["3"], 0.5)
    assert np.array(found["3"]).shape == (1, 2, 3)


STEPS = {
    "left": ("ball starts left", "so left A"),
    "right": ("ball starts left", "left and right swap, ball right", "so right B"),
}


def told(count: int) -> tuple[list[Sample], Clips]:
    """Clips that end left or right, by turns."""
    ends = ["left", "right"] * (count // 2)
    samples = [Sample(None, "Where?", ("left", "right"), STEPS[end], "AB"[end == "right"]) for end in ends]
    return samples, Clips(samples, ["cups"] * count, [()] * count, {}, {})


def test_a_state_is_read_where_it_was_planted() -> None:
    """The first layer's second slot holds where the ball ends; all else is noise."""
    samples, clips = told(200)
    rng = np.random.default_rng(0)
    states = rng.normal(size=(400, 2, 2, 8))
    states[:, 0, 1, 0] += 6 * np.array([1, -1] * 200)
    found = probes(states[200:], clips, states[:200], samples)
    right = found["end"]["right"]
    assert np.array(right["every"]).shape == (2, 2)
    assert right["every"][0][1] > 0.97
    assert right["best"][0]["n"] == 200
    assert max(right["every"][0][0], *right["every"][1]) < 0.65
    assert found["end"]["shuffled"]["best"][0]["value"] < 0.65
    assert "start" not in found  # it is "left" in all of them: there is nothing to tell apart


def test_the_best_place_is_not_chosen_by_the_clips_it_is_scored_on() -> None:
    """Where nothing can be read, the best of 800 places looks like one where something can; where one can, it is found."""
    right = np.random.default_rng(0).random((200, 800)) < 0.3
    assert right.mean(0).max() > 0.38
    assert share(in_the_best(right, right))["value"] == pytest.approx(0.3, abs=0.05)
    right[:, 7] = True
    right[3, 7] = False
    assert (in_the_best(right, right) == right[:, 7]).all()
    assert (in_the_best(~right, right) == ~right[:, 7]).all()  # chance is told of the place where most is right
    assert in_the_best(right[:1], right[:1]).tolist() == [right[0, 0]]  # nothing to choose by
    words = np.random.default_rng(1).choice(["left", "right"], (200, 9, 90))
    found = lenses({"words plain": words, "divergence plain": np.zeros(words.shape)}, told(200)[1])
    held = found["plain"]["named"]["end"]["right"]
    assert np.max(held["every"]) > 0.6
    assert held["anywhere"]["low"] < 0.5 < held["anywhere"]["high"]
    assert np.mean([one["value"] for one in held["best"]]) == pytest.approx(0.5, abs=0.04)
    assert "best on the other half" in figures.SAID["probe"][1]
    assert "best on the other half" in figures.SAID["lens"][1]


def test_a_lens_is_scored_where_it_names_the_state() -> None:
    _, clips = told(40)
    words = np.full((40, 2, 2), "left", dtype=object)
    words[:, 1, 0] = ["left", "right"] * 20
    found = lenses({"words plain": words, "divergence plain": np.ones((40, 2, 2)) * [[[3], [0]]]}, clips)
    assert set(found) == {"plain"}
    assert found["plain"]["named"]["end"]["right"]["every"] == [[0.5, 0.5], [1.0, 0.5]]
    assert found["plain"]["named"]["start"]["right"]["every"] == [[1.0, 1.0], [0.5, 1.0]]
    assert found["plain"]["named"]["step 1"]["right"]["best"][1]["n"] == 20
    assert [one["value"] for one in found["plain"]["divergence"]] == [3, 0]


def test_attention_to_moments_is_averaged_over_clips_of_a_length() -> None:
    rows = [np.array([[0.1, 0.3], [0.2, 0.2]]), np.array([[0.3, 0.1], [0.2, 0.2]]), np.array([[0.5], [0.4]])]
    found = looked({"looked": rows, "on_clip": np.array([[0.4, 0.4]] * 3), "on_slots": np.zeros((3, 2))})
    assert found["moments"] == {"1": [[0.5], [0.4]], "2": [[0.2, 0.2], [0.2, 0.2]]}
    assert [one["value"] for one in found["to_clip"]] == pytest.approx([0.4, 0.4])


def test_what_is_said_is_held_against_the_true_steps() -> None:
    samples, _ = told(2)
    texts = [["so left A", "?"], ["ball starts left", "left and right swap, ball left"]]
    found = said({"said": ["ball starts left\nso right A", "\n".join(STEPS["right"])], "alone": texts}, samples)
    assert found["steps_exact"]["value"] == 4 / 5
    assert found["alone"]["names"] == [[0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5]]
    assert found["alone"]["likeness"][0]["value"] == 1
    assert found["alone"] == named(texts, samples)


def test_a_model_is_held_against_its_controls_in_words() -> None:
    def figures_of(right: int, read: int, by_chance: int = 50) -> dict:
        kept = {"as they are": {"accuracy": share(np.arange(100) < right)}}
        best = {kind: {"anywhere": share(np.arange(100) < n)} for kind, n in (("right", read), ("shuffled", by_chance))}
        return {"replacement": kept, "probe": {"end": best}}

    models = {"mine": figures_of(90, 95), "filler": figures_of(30, 93), "bare": figures_of(95, 50) | {"probe": {}}}
    told = beside_controls(models)
    assert len(told) == 3
    assert "“mine” answers 90.0%" in told[0]
    assert "it does better, by more than chance" in told[0]
    assert "no clear difference, so being readable is no evidence of thinking" in told[1]
    assert "best on the other half" in told[1]
    assert "no clear difference" in told[2]
    assert beside_controls({"mine": models["mine"]}) == []
    assert "the other does better" in beside_controls({"mine": figures_of(30, 50), "filler": figures_of(90, 90)})[0]


def test_intervals() -> None:
    assert share(np.array([True] * 8 + [False] * 2))["low"] == pytest.approx(0.4902, abs=1e-4)
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        one = average(rng.normal(3, 2, size=100), seed)
        held += one["low"] < 3 < one["high"]
    assert 0.85 < held / 60 <= 1
    assert average(np.array([])) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    assert share(np.array([], dtype=bool))["n"] == 0


def test_a_gain_is_told_with_its_interval_and_its_chance() -> None:
    """Of 21 clips 1 is won and 7 are lost: by hand, and by scipy's binomial test."""
    after, before = np.arange(21) < 2, (np.arange(21) < 1) | ((np.arange(21) > 1) & (np.arange(21) < 9))
    one = gain(after, before)
    assert (one["value"], one["n"]) == (pytest.approx(-6 / 21), 21)
    spread = 1.959964 * ((2 / 23 + 8 / 23 - (6 / 23) ** 2) / 23) ** 0.5
    assert (one["low"], one["high"]) == pytest.approx((-6 / 23 - spread, -6 / 23 + spread))
    assert one["p"] == pytest.approx(binomtest(1, 8).pvalue)
    assert mcnemar(300, 340) == pytest.approx(binomtest(300, 640).pvalue)
    assert mcnemar(4, 4) == mcnemar(0, 1) == 1
    none = np.array([], dtype=bool)
    assert gain(none, none) == {"value": 0.0, "low": -1.0, "high": 1.0, "n": 0, "p": 1.0}


def test_intervals_of_gains_hold_for_few_clips() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 5, 20):
        drawn = rng.choice(3, size=(1000, count), p=(0.5, 0.4, 0.1))  # the same, lost, won: a gain of -0.3
        every = [gain(row == 2, row == 1) for row in drawn]
        assert np.mean([one["low"] <= -0.3 <= one["high"] for one in every]) > 0.92
        assert np.mean([one["p"] < 0.05 for one in every]) < 0.5


def test_one_slot_is_like_no_other() -> None:
    """Numbers that there are, and nothing where there are none."""
    words = vocabulary(torch.eye(6))
    assert set(collapse(np.ones((2, 3, 1, 6)), words)) == {"effective_rank", "norm", "centre"}
    assert set(collapse(np.ones((2, 3, 2, 6)), words)) == set(figures.UNITS)


def test_letters_beyond_the_options_have_no_share() -> None:
    samples = [Sample(None, "?", tuple("xyz"[:n]), (), "A") for n in (2, 3)]
    kept = among_options(torch.tensor([[[0.2, 0.2, 0.6], [0.2, 0.2, 0.6]]]), samples)
    assert torch.allclose(kept, torch.tensor([[[0.5, 0.5, 0], [0.2, 0.2, 0.6]]]))


def test_a_changed_clip_differs_in_one_event_and_in_its_answer() -> None:
    found = 0
    for record in Benchmark("test", limit=18).records():
        other = worlds.changed(record)
        if other is None:
            continue
        found += 1
        assert other == worlds.changed(record)
        assert (other.question, other.options, other.duration) == (record.question, record.options, record.duration)
        assert other.answer != record.answer
        assert other.options["ABCD".index(other.letter)] == other.answer
        events = [(a, b) for a, b in zip(record.scene.trajectory[-1], other.scene.trajectory[-1]) if a != b]
        mine, theirs = ([step.text for step in r.steps] for r in (record, other))
        first = next(i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b)
        if record.family != "tally":
            assert len(events) == 1
            said = [(a.split(",")[0], b.split(",")[0]) for a, b in zip(mine[1:-1], theirs[1:-1])]
            assert sum(a != b for a, b in said) == 1
        assert first > 0
        times = np.arange(0, 1 + first - 1, 0.25)
        if first > 1 or record.family != "tally":
            assert np.array_equal(worlds.draw(record, times, 56, 84), worlds.draw(other, times, 56, 84))
    assert found > 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model that knows the worlds' words."""
    folder = tmp_path_factory.mktemp("model")
    backbone = small.fresh(small.tokenizer(texts(300)), layers=2, hidden=64)
    backbone.save(folder)
    (folder / META).write_text(json.dumps({"method": described(PauseDistillation(pauses=(3, 3))), "pauses": [3, 3]}))
    return folder


def test_the_untrained_twin_differs_in_its_slots_alone(model: Path) -> None:
    loaded = models.load(model, device="cpu")
    subject = Subject(loaded.backbone, loaded.method, 3)
    twin = untrained(subject)
    samples = [command.clips_of(Benchmark("test", limit=1).records(), {}).samples[0]]
    mine, theirs = subject.think(samples), twin.think(samples)
    assert torch.equal(mine.last_context, theirs.last_context)
    assert not torch.allclose(mine.states[0], theirs.states[0])
    table = loaded.backbone.model.get_input_embeddings().weight
    assert theirs.states[0, 0, 0].norm() == pytest.approx(table.norm(dim=-1).mean().item(), rel=1e-4)
    written = [generate.explicit(s.backbone, t, 8).ids for s, t in ((subject, mine), (twin, theirs))]
    assert written[0] == written[1]


def test_observations_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr("engine.insight.observe.LONGEST", 4)
    loaded = models.load(model, device="cpu")
    records = Benchmark("test", limit=4).records()
    clips = command.clips_of(records, words_of(records))
    subject = Subject(loaded.backbone, Silent(3), 3)
    together, apart = observe(subject, clips, 4), observe(subject, clips, 1)
    assert set(together) == set(apart)
    for name in ("states", "shares", "on_clip", "on_slots", "divergence plain"):
        assert np.allclose(together[name], apart[name], atol=1e-4), name
    assert together["names"] == apart["names"]
    assert [x.shape for x in together["looked"]] == [(3 + 2, len(m)) for m in clips.moments]
    assert (np.array([x.sum(1) for x in together["looked"]]) <= together["on_clip"] + 1e-6).all()


@pytest.mark.parametrize("method", [PauseDistillation(pauses=(3, 3)), Coconut(), Codi(num_latent=3, prj_dim=8)])
def test_half_precision_is_looked_into_too(
    method: Method, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """As on every GPU."""
    monkeypatch.setattr("engine.insight.observe.LONGEST", 4)
    monkeypatch.setattr("engine.generate.LONGEST_CHAIN", 4)
    monkeypatch.setattr(type(method), "longest", 4)  # an untrained model never ends its turn
    monkeypatch.setattr(models, "precision", lambda *_: torch.bfloat16)
    backbone, folder = models.load(model, device="cpu").backbone, tmp_path / "model"
    add_tokens(backbone.model, backbone.tokenizer, method.tokens)
    adapters.save(folder, backbone, method.companions(backbone), {}, frozen=False)
    (folder / META).write_text(json.dumps({"method": described(method), "pauses": [3, 3]}))
    loaded = models.load(folder, device="cpu")
    clips = command.clips_of(Benchmark("test", limit=1).records(), {})
    clips = replace(clips, words={family: ["left"] for family in clips.families})
    lens = TunedLens(loaded.layers, 64)
    subject = Subject(loaded.backbone, loaded.method, 3, loaded.companions, lens)
    assert np.isfinite(observe(subject, clips, 1)["shares"]).all()
    clip = read(models.SMALL.parent / "examples" / "cups-3-2.mp4", loaded.sampling)
    reply = ask.ask(replace(loaded, tuned=lens), clip, "Where?", ["left", "right"], 3, donors={"the same": clip})
    assert sum(option.probability for option in reply.options) == pytest.approx(1)
    assert reply.inside is not None


def test_slots_that_are_fed_back_count_as_tokens(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    """Each takes a step of its own, on the page as in the study."""
    monkeypatch.setattr("engine.insight.observe.LONGEST", 4)
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / META).write_text(json.dumps({"method": described(Coconut()), "pauses": [3, 3]}))
    loaded = models.load(tmp_path, device="cpu")
    clips = command.clips_of(Benchmark("test", limit=1).records(), {})
    clips = replace(clips, words={family: ["left"] for family in clips.families})
    subject = Subject(loaded.backbone, loaded.method, 3, loaded.companions)
    thoughts = subject.think(clips.samples)
    written = generate.answer(loaded.backbone, thoughts, loaded.method.marks, loaded.method.longest)
    assert thoughts.serial == 3
    assert observe(subject, clips, 1)["tokens"].tolist() == [written.tokens[0] + 3]

    clip = read(models.SMALL.parent / "examples" / "cups-3-2.mp4", loaded.sampling)
    told: list[generate.Written] = []
    answer = generate.answer
    monkeypatch.setattr(generate, "answer", lambda *given: told.append(answer(*given)) or told[-1])
    reply = ask.ask(loaded, clip, "Where?", ["left", "right"], write_chain=False)
    assert reply.generated_tokens == told[0].tokens[0] + 3


def test_the_command_writes_everything_it_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("engine.insight.observe.LONGEST", 4)  # an untrained model never comes to an end
    monkeypatch.setattr("engine.insight.probe.FEWEST", 5)
    out = tmp_path / "report"
    filler = tmp_path / "filler"  # which has learnt neither to speak nor to write
    shutil.copytree(model, filler)
    (filler / META).write_text(json.dumps({"method": described(Silent(3)), "pauses": [3, 3]}))
    methods = f"{model},{filler}"
    words = ["insight", "--split", "test", "--limit", "9", "--out", str(out), "--methods", methods, "--batch", "5"]
    assert main([*words, "--device", "cpu"]) == 0
    printed, said = capsys.readouterr()
    told = json.loads(printed)
    assert "9 of 9 clips" in said
    names = [str(model), f"{model}, {command.UNTRAINED}", str(filler)]
    assert list(told["models"]) == names
    assert all((out / name).is_file() for name in told["files"])
    whole = json.loads((out / "insight.json").read_text())
    for name in names:
        figures = whole["models"][name]
        assert {"replacement", "how_many", "collapse", "probe", "lens", "looked", "in_words"} <= set(figures)
        assert ("spoken" in figures) == ("towards" in figures) == (name != str(filler))
        assert ("think_aloud" in figures["how_many"]) == ("written" in figures["how_many"]) == (name != str(filler))
        assert figures["slots"] == 3
        assert "end" in figures["probe"]
        assert 0 < figures["replacement"]["a changed clip"]["accuracy"]["n"] <= 9
    with (out / "insight.csv").open() as file:
        rows = {(row["model"], row["figure"]): row for row in csv.DictReader(file)}
    mine = rows[names[0], "replacement / zeros / accuracy"]
    assert float(mine["value"]) == whole["models"][names[0]]["replacement"]["zeros"]["accuracy"]["value"]
    page = (out / "report.html").read_text()
    assert "<script src=" not in page
    assert "<link" not in page
    assert all(escape(line) in page for line in told["models"][names[0]]["in_words"])
    assert all(escape(line) in page for line in told["beside_controls"])
    assert names[1] in told["beside_controls"][0]
    for file in (out / "figures").iterdir():
        drawn = json.loads(file.read_text())
        layout, named = drawn["layout"], [trace["y"] for trace in drawn["data"] if len(trace["y"])]
        assert layout["xaxis"]["title"]["text"], file.name
        assert layout["yaxis"]["title"]["text"] or isinstance(named[0][0], str), file.name
    assert page.count("plotly-graph-div") == len([f for f in told["files"] if f.startswith("figures/")])


def test_one_slot_and_one_clip_can_be_studied(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """Nothing in the files is no number, and nothing is claimed."""
    monkeypatch.setattr("engine.insight.observe.LONGEST", 4)
    words = [
        "insight",
        "--limit",
        "1",
        "--pauses",
        "1",
        "--methods",
        str(model),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    assert "more than chance" not in capsys.readouterr().out
    for name in ("insight.json", "figures/how-many.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    assert not (tmp_path / "figures" / "collapse-cosine.json").exists()
    assert (tmp_path / "figures" / "collapse-norm.json").is_file()


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(tmp_path, {"clips": float("nan")}, {}, [])


def test_the_lens_is_trained_and_found_beside_its_model(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    from engine.backbones.load import load
    from train import lens

    assert (
        lens.main([str(model), "--steps", "15", "--clips", "2", "--rows", "120", "--lr", "1e-2", "--device", "cpu"])
        == 0
    )
    far = json.loads(capsys.readouterr().out)
    assert sum(far["tuned"]) < sum(far["plain"])
    assert far["tuned"][-1] == pytest.approx(0, abs=1e-5)
    assert TunedLens.load(model, load(model)) is not None
    assert lens.main(["./nowhere"]) == 2


def test_the_lens_learns_from_pauses_that_do_not_follow_the_number_of_steps() -> None:
    """Which the worlds draw with [seed, index]."""
    from train import lens

    class Drew(Exception):
        pass

    def layout(sample: object, rng: np.random.Generator, epoch: int) -> None:
        raise Drew(rng.random())

    with pytest.raises(Drew) as drew:
        lens.states(SimpleNamespace(method=SimpleNamespace(layout=layout), backbone=None), 0, 1, 8, 3)
    assert drew.value.args[0] != np.random.default_rng([3, 0]).random()


def test_names_are_escaped_on_the_page() -> None:
    row = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    held = {measure: [row] for measure in figures.UNITS}
    models = {"<script>x": {"in_words": ["<b>"], "replacement": {"zeros": {"accuracy": row}}, "collapse": held}}
    page = report.page({"split": "<i>"}, models, ["<u>"], [])
    assert "<script>x" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<u>" not in page
    assert ("replacement / zeros / accuracy", row) in list(report.leaves(models["<script>x"]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "magic"], "no model 'magic'"),
        (["--methods", "pause", "--pauses", "0"], "at least one"),
        (["--limit", "0"], "limit"),
        (["--out", "/dev/null/here"], "/dev/null"),
    ],
)
def test_mistakes_give_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    assert main(["insight", "--limit", "6", "--out", str(tmp_path), "--device", "cpu", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


@pytest.fixture
def bare(model: Path, tmp_path: Path) -> Path:
    """The same model, told to have learned to write its chain and nothing else."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / META).write_text(json.dumps({"method": described(Explicit())}))
    return tmp_path


def test_a_model_without_slots_is_refused(capsys: pytest.CaptureFixture[str], bare: Path) -> None:
    assert main(["insight", "--limit", "6", "--out", str(bare), "--methods", str(bare), "--device", "cpu"]) == 2
    assert "can't be studied" in capsys.readouterr().err


def test_a_model_without_slots_claims_none(bare: Path) -> None:
    loaded = models.load(bare, device="cpu")
    clip = read(models.SMALL.parent / "examples" / "cups-3-2.mp4", loaded.sampling)
    reply = ask.ask(loaded, clip, "Where?", ["left", "right"], pauses=4, write_chain=False, donors={})
    assert (reply.slots, reply.states.shape[1], reply.inside) == (0, 0, None)
    assert "By its written chain" in cards.answers(reply)
    assert "This model has no slots." in cards.thoughts(reply)
