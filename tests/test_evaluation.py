"""Scores: intervals, steps, tokens, the benchmark's clips; and what is known to be familiar."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engine import evaluation, generate, models
from engine.backbones.base import add_tokens
from engine.benchmark import Benchmark, asked_for, measure
from engine.data import worlds
from engine.data.worlds import WorldsSource, corrupted, frames
from engine.evaluation import Outcome, evaluate, neighbours, steps_right, summary, wilson
from engine.familiarity import Asked, Familiarity, fit
from engine.insight import spoken
from engine.layout import Frames
from engine.methods.coconut import Coconut
from engine.methods.pause import PauseDistillation
from engine.methods.steps import StepSupervision
from tests.tiny import tiny_backbone
from train import publish


def test_wilson_intervals_known_values():
    """Against the closed form worked by hand for 8 of 10 (0.4902 to 0.9433) and the two ends."""
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == pytest.approx(1)
    assert wilson(0, 0) == (0.0, 1.0)


def test_steps_are_held_line_by_line():
    assert steps_right("a\nb\nx", "a\nb\nc") == (True, True, False)
    assert steps_right("a", "a\nb") == (True, False)
    assert steps_right("b\na", "a\nb") == (False, False)


def test_the_summary_counts_what_it_says():
    def one(correct: bool, tokens: int, said: str | None, true: str = "a\nb") -> Outcome:
        return Outcome(correct, "A", said, true, tokens, 8, 0.5)

    results = [one(True, 4, "a\nx"), one(False, 6, "a\nc", "a\nc"), one(True, 5, None)]
    figures = summary(results, ["cups", "cups", "tally"], [2, 2, 2])
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["generated_tokens"] == 5
    assert figures["by_family"]["cups"] == {"accuracy": 0.5, "n": 2, "interval": list(wilson(1, 2))}
    assert figures["by_steps"]["2"]["n"] == 3
    assert figures["step_accuracy"] == 0.75
    assert figures["swapped_step_accuracy"] == 0.5  # "a" is right for both, "c" and "x" for neither


def test_neighbours_are_of_one_kind_and_never_oneself():
    pairs = neighbours(["cups", "tally", "cups", "cups", "relay"], [1, 1, 1, 2, 1])
    assert pairs == [(0, 2), (2, 0)]


def test_evaluation_decodes_and_counts_the_end_token():
    backbone = tiny_backbone()
    samples = [WorldsSource(split="validation", difficulties=(1, 2))(i) for i in range(3)]
    silent = evaluate(backbone, samples, PauseDistillation(), "silent", 4, batch=2, speak=True)
    assert [r.slots for r in silent] == [4, 4, 4]
    assert all(1 <= r.generated_tokens <= 32 and r.steps is not None for r in silent)
    written = evaluate(backbone, samples, PauseDistillation(), "explicit", 4, batch=2)
    assert all(r.slots == 0 for r in written)
    alone = evaluate(backbone, samples[2:], PauseDistillation(), "silent", 4)
    assert alone[0].answer == silent[2].answer


def test_the_benchmark_has_equal_families_and_steps():
    records = Benchmark("test", limit=36).records()
    assert {r.split for r in records} == {"test"}
    count = {(f, k): 0 for f in ("cups", "relay", "tally") for k in range(1, 7)}
    for record in records:
        count[record.family, record.difficulty] += 1
    assert set(count.values()) == {2}
    assert {r.difficulty for r in Benchmark("longer", limit=24).records()} == {7, 8, 9, 10}
    fresh = Benchmark(seeds=(5, 8), fewest=2, most=2).records()
    assert [(r.split, r.seed, r.difficulty) for r in fresh] == [("fresh", 5, 2), ("fresh", 6, 2), ("fresh", 7, 2)]


@pytest.mark.parametrize("how", ["last", "single", "shuffled"])
def test_baselines_see_what_they_should(how):
    clip = frames(WorldsSource().record(4))
    seen = corrupted(clip, how, np.random.default_rng(3)).pixels
    if how == "shuffled":
        assert not np.array_equal(seen, clip.pixels)
        assert sorted(frame.sum() for frame in seen) == sorted(frame.sum() for frame in clip.pixels)
    else:
        assert len(seen) == 1
        assert any(np.array_equal(seen[0], frame) for frame in clip.pixels)
        assert how == "single" or np.array_equal(seen[0], clip.pixels[-1])


def test_which_frame_is_shown_has_nothing_to_do_with_the_steps(monkeypatch):
    """All of a clip's frames come, whatever its length."""
    places = {k: [] for k in range(1, 7)}
    monkeypatch.setattr(worlds, "shown", lambda record, how, rng: places[record.difficulty].append(rng.random()))
    source = worlds.WorldsSource(corrupt="single")
    for index in range(600):
        source(index)
    assert all(min(each) < 0.1 and max(each) > 0.9 and 0.4 < np.mean(each) < 0.6 for each in places.values())


def test_a_written_text_may_be_twice_as_long_as_the_true_one(monkeypatch):
    """Whatever is usual, so that no right answer is cut off in the middle."""
    backbone, sample = tiny_backbone(), WorldsSource(split="validation")(0)
    allowed = []

    def respond(*given):
        allowed.append(given[-1])
        return [evaluation.Response("", None, 1, 0, 0.0)]

    monkeypatch.setattr(evaluation, "respond", respond)
    for steps in (sample.steps[:1], sample.steps * 100):
        for how in ("silent", "explicit"):
            evaluate(backbone, [replace(sample, steps=steps)], PauseDistillation(), how, 4)
    long = len(backbone.text_ids("\n".join(sample.steps * 100)))
    assert allowed[:3] == [32, generate.LONGEST_CHAIN, 32]
    assert 2 * long <= allowed[3] <= 2 * long + 20


def test_a_benchmark_shows_what_it_is_told_to():
    asked = [Benchmark("test", limit=3, corrupt=how) for how in ("none", "last", "blind")]
    whole, last, blind = (benchmark.samples(benchmark.records()) for benchmark in asked)
    for clip, end, nothing in zip(whole, last, blind):
        assert np.array_equal(end.visual.pixels, clip.visual.pixels[-1:])
        assert nothing.visual is None
        assert clip.question == end.question == nothing.question


def test_what_happens_can_be_told():
    """All but what comes of it."""
    source = WorldsSource(corrupt="told", difficulties=(2, 2))
    for index, words in enumerate(("swap", "touch", "plus minus")):
        sample, (start, first, second, _) = source(index), source(index).steps
        assert sample.visual is None
        opening, one, two, question = sample.question.split("\n")
        assert (opening, question) == (start, source.record(index).question)
        for event, step in ((one, first), (two, second)):
            assert step.startswith(event)
            assert step[len(event) :].startswith((", ball ", ", star ", " is "))
            assert any(word in event for word in words.split())


def test_a_step_decoder_says_the_thoughts():
    """A line a thought, as the page has them; nothing of a method without one."""
    backbone = tiny_backbone()
    add_tokens(backbone.model, backbone.tokenizer, Coconut.tokens)
    samples = [WorldsSource(split="validation")(i) for i in range(3)]
    for method, slots in ((Coconut(steps=StepSupervision(layers=1)), 4), (Coconut(), 4)):
        companions = method.companions(backbone)
        found = evaluate(backbone, samples, method, "silent", slots, companions, batch=2, speak=True)
        thoughts = generate.think(backbone, samples, method.thinking(slots), method.feedback(companions))
        lines = spoken.taught(backbone, method, companions, thoughts, slots)
        for outcome, said in zip(found, lines, strict=True):
            assert outcome.said == ("\n".join(said) if method.steps else None)
            assert (outcome.steps is None) == (method.steps is None)
            assert outcome.generated_tokens > slots  # which cost nothing more


def test_a_method_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no method 'runs/nothing'"):
        measure(Benchmark(limit=3), ["runs/nothing-explicit"], None, "cpu", print)


def test_a_folder_is_taken_by_its_whole_name_before_its_neighbours_written_chain(tmp_path):
    beside, explicit = tmp_path / "a", tmp_path / "a-explicit"
    beside.mkdir()
    assert asked_for(f"{beside}-explicit", ["pause"]) == (beside, True)
    explicit.mkdir()
    assert asked_for(str(explicit), ["pause"]) == (explicit, False)
    assert asked_for(f"{explicit}-explicit", ["pause"]) == (explicit, True)
    assert asked_for("pause-explicit", ["pause"]) == (models.SMALL / "pause", True)


def test_a_blind_source_has_no_visual():
    assert WorldsSource(corrupt="blind")(0).visual is None


def test_familiarity_passes_its_share_and_turns_noise_away(tmp_path):
    backbone = tiny_backbone()
    source, held_out = WorldsSource(), WorldsSource(split="validation")
    known = [frames(source.record(i)) for i in range(150)]
    new = [frames(held_out.record(i)) for i in range(50)]
    found = fit(backbone, [(Asked("Q?", ("A", "B")), clip) for clip in known], new, pass_share=0.9)
    assert np.mean([not found.strange(backbone, clip, "Q?", ["A"]) for clip in new]) == pytest.approx(0.9, abs=0.03)
    noise = Frames(np.random.default_rng(0).integers(0, 256, known[0].pixels.shape, np.uint8), known[0].seconds)
    assert found.strange(backbone, noise, "Q?", ["A"]).startswith("this clip is unlike")
    found.save(tmp_path)
    again = Familiarity.load(tmp_path)
    assert again is not None
    assert again.mean.numpy() == pytest.approx(found.mean.numpy(), rel=1e-5)
    assert again.whiten.numpy() == pytest.approx(found.whiten.numpy(), rel=1e-5)
    assert again.limit == found.limit
    assert again.asked == (Asked("Q?", ("A", "B")),)
    assert again.longest == found.longest == 7.5  # of six steps
    assert Familiarity.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["pause", "heima"])
def test_a_clip_longer_than_training_is_said_to_be_so(name):
    """Of the shipped models: their longest clips have six steps."""
    model = models.load(models.SMALL / name, device="cpu")
    source = (
        WorldsSource(families=("cups",), difficulties=(6, 6)),
        WorldsSource(families=("cups",), difficulties=(7, 7)),
    )
    known, longer = (frames(each.record(0)) for each in source)
    assert model.familiarity is not None
    assert model.familiarity.longer(known) == ""
    assert "8.5 s long" in model.familiarity.longer(longer)


@pytest.fixture(scope="module")
def bounds():
    """A model's, of few clips."""
    backbone = models.load(device="cpu").backbone
    return backbone, publish.bounds(backbone, known=120, held_out=30)


def test_what_was_never_asked_is_strange(bounds):
    """Other options, none, another question; a question of another world than the clip's; a picture of a single token."""
    backbone, found = bounds
    records = [WorldsSource(split="validation").record(i) for i in range(3)]
    for record, other in zip(records, records[1:] + records[:1]):
        clip, asked = frames(record), partial(found.strange, backbone, frames(record))
        assert asked(record.question, record.options) == ""
        assert "among" in asked(record.question, ("Paris", "London"))
        assert "among" in asked(record.question, ())
        assert "only on those of the examples" in asked("How many cups are there?", record.options)
        assert "not for this kind of clip" in asked(other.question, other.options)
        dot = Frames(clip.pixels[:1, :28, :28], 1.0, still=True)
        assert "this clip is unlike" in found.strange(backbone, dot, record.question, record.options)


def test_mean_of_nothing_is_zero():
    assert evaluation.mean([]) == 0.0


@pytest.mark.parametrize("family", ["cups", "relay", "tally"])
def test_an_mp4_shows_the_model_what_training_drew(family, tmp_path):
    """The benchmark draws at the model's size; a visitor's clip goes through H.264 and resizing. Both look alike."""
    from engine import worlds
    from engine.data.worlds import FRAMES_PER_SECOND, HEIGHT, WIDTH, frame_times
    from engine.video import Sampling, read

    record = worlds.make(family, 2, 3, "fresh")
    worlds.write(record, tmp_path / "clip.mp4")
    clip = read(tmp_path / "clip.mp4", Sampling(fps=FRAMES_PER_SECOND, pixels=HEIGHT * WIDTH))
    drawn = worlds.draw(record, frame_times(record), HEIGHT, WIDTH)
    assert clip.frames.shape == drawn.shape
    assert clip.times == pytest.approx(frame_times(record), abs=1e-6)
    difference = np.abs(clip.frames.astype(int) - drawn.astype(int))
    assert difference.mean() < 3
    assert np.quantile(difference, 0.99) < 20
