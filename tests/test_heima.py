"""Heima: what becomes a thinking token, what interpreters are told and read, how its answers are found."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.backbones.base import Backbone, add_tokens
from engine.config import ConfigError
from engine.data.llava_cot import sections
from engine.data.samples import Sample, answer_of, context
from engine.data.worlds import WorldsSource
from engine.evaluation import evaluate
from engine.layout import Layout, Special, pack
from engine.methods import described, find, from_description
from engine.methods.heima import TEMPLATES, Heima, Interpreters, thinking_tokens
from engine.methods.method import run
from engine.methods.scorers import GIVEN, Scorers, scored
from tests import tiny

NAMES = ("SUMMARY", "CAPTION", "REASONING")
STEPS = ("I look.", "A dog on grass.", "Dogs bark, so it barks.")


def sample_of(model: Backbone, **changes: Any) -> Sample:
    whole = Sample(tiny.clip(model, 1), "What is heard?", ("a bark", "a purr"), STEPS, "A", sections=NAMES)
    return replace(whole, **changes)


def samples_of(model: Backbone) -> list[Sample]:
    """Three sections, one, and two in another order."""
    return [
        sample_of(model),
        sample_of(model, visual=None, steps=("Is it one?",), sections=("REASONING",), question="One {thought}, or {question}?"),
        sample_of(model, steps=("A long, long street.", "Two"), sections=("CAPTION", "SUMMARY"), options=(), answer="yes"),
    ]  # fmt: skip


@pytest.fixture(scope="module", params=[tiny.tiny_backbone, tiny.tiny_llama])
def model(request: pytest.FixtureRequest) -> Backbone:
    made = request.param()
    for method in (Heima(tags="tokens"), Heima(per_section=2)):
        add_tokens(made.model, made.tokenizer, method.tokens)
    return made


@pytest.fixture(scope="module")
def eyes() -> Backbone:
    made = tiny.tiny_backbone(layers=2)
    add_tokens(made.model, made.tokenizer, Heima(tags="tokens").tokens)
    return made


def seen(model: Backbone) -> list[Sample]:
    """Without pictures where the model has no eyes."""
    blind = not hasattr(model.model.model, "visual")
    return [replace(s, visual=None) if blind else s for s in samples_of(tiny.tiny_backbone(layers=1))]


def words(model: Backbone, layout: Layout) -> str:
    """All that is supervised in the answer's branch, read in order."""
    rows = pack([layout], model.encode, model.pad).branches["answer"]
    return model.decode(rows.target.tolist())


def laid(method: Heima, sample: Sample) -> Layout:
    return method.layout(sample, np.random.default_rng(0))


# The line


def test_sections_become_thinking_tokens_one_by_one(eyes: Backbone) -> None:
    sample = sample_of(eyes)
    summary, caption, reasoning = (f"<{name}> {{}} </{name}>\n\n" for name in NAMES)
    end = "<CONCLUSION> A </CONCLUSION><|im_end|>\n"
    silent = [f"<THINKING_OF_{name}>" for name in NAMES]

    def line(compressed: int) -> str:
        parts = (*silent[:compressed], *STEPS[compressed:])
        return "".join(tag.format(part) for tag, part in zip((summary, caption, reasoning), parts)) + end

    for compressed in range(4):
        assert words(eyes, laid(Heima(compressed), sample)) == line(compressed)
    plain = words(eyes, laid(Heima(0), sample))
    assert sections(plain.removesuffix("<|im_end|>\n")) == [*STEPS, "A"]  # LLaVA-CoT's own format


def test_tags_can_be_tokens(eyes: Backbone) -> None:
    layout = laid(Heima(2, tags="tokens"), sample_of(eyes))
    text = "<SUMMARY><THINKING_OF_SUMMARY></SUMMARY><CAPTION><THINKING_OF_CAPTION></CAPTION>"
    text += "<REASONING>Dogs bark, so it barks.</REASONING><CONCLUSION>A</CONCLUSION><|im_end|>\n"
    assert words(eyes, layout) == text
    rows = pack([laid(Heima(tags="tokens"), sample_of(eyes))], eyes.encode, eyes.pad).branches["answer"]
    assert len(rows.target) == 3 * 3 + 3 + 2


def test_a_section_may_have_several_tokens(model: Backbone) -> None:
    text = words(model, laid(Heima(1, per_section=2), seen(model)[0]))
    assert text.startswith("<SUMMARY> <THINKING_OF_SUMMARY_1><THINKING_OF_SUMMARY_2> </SUMMARY>\n\n<CAPTION> A dog")
    assert thinking_tokens("X") == ("<THINKING_OF_X>",)


def test_a_sample_with_fewer_sections_has_all_of_them_compressed_sooner(model: Backbone) -> None:
    _, one, two = seen(model)
    assert words(model, laid(Heima(1), one)).startswith("<REASONING> <THINKING_OF_REASONING> </REASONING>\n\n<CONCL")
    text = words(model, laid(Heima(1), two))
    assert text.startswith("<CAPTION> <THINKING_OF_CAPTION> </CAPTION>\n\n<SUMMARY> Two </SUMMARY>")


def test_what_has_no_known_sections_is_refused(eyes: Backbone) -> None:
    with pytest.raises(ValueError, match="SUMMARY, CAPTION, REASONING; this sample has unnamed steps"):
        laid(Heima(), sample_of(eyes, sections=()))
    with pytest.raises(ValueError, match="this sample has SUMMARY, OTHER, REASONING"):
        laid(Heima(), sample_of(eyes, sections=("SUMMARY", "OTHER", "REASONING")))


def test_what_is_written_is_supervised_and_nothing_before_it(eyes: Backbone) -> None:
    """The context's tokens are no targets; every later one is, thinking tokens too."""
    layout = laid(Heima(), sample_of(eyes))
    packed = pack([layout], eyes.encode, eyes.pad)
    given = len(eyes.encode(layout.branches["answer"][0]).ids)
    rows = packed.branches["answer"]
    assert rows.row.tolist() == list(range(given - 1, packed.ids.shape[1] - 1))
    assert torch.equal(rows.target, packed.ids[0, given:])
    silent = [eyes.token(f"<THINKING_OF_{name}>") for name in NAMES]
    assert [token for token in rows.target.tolist() if token in silent] == silent


def test_questions_as_asked_have_no_hint(eyes: Backbone) -> None:
    def prompt(kind: str) -> str:
        return eyes.decode(eyes.encode(context(sample_of(eyes, visual=None, problem_type=kind))).ids)

    assert "B. a purr<|im_end|>\n<|im_start|>assistant\n" in prompt("as asked")
    assert "within the <answer>" in prompt("multiple choice")


# Worlds and answers


def test_the_worlds_chains_have_three_sections() -> None:
    plain, named = WorldsSource(difficulties=(3, 3)), WorldsSource(difficulties=(3, 3), sections=True)
    for index in range(3):
        before, after = plain(index), named(index)
        assert after.sections == NAMES
        assert after.thoughts == before.thoughts
        assert after.steps == (before.steps[0], "\n".join(before.steps[1:-1]), before.steps[-1])
        assert (before.visual.pixels == after.visual.pixels).all()
    assert plain(0).sections == ()


@pytest.mark.parametrize(
    ("text", "dialect", "answer"),
    [
        ("<SUMMARY> x </SUMMARY>\n\n<CONCLUSION> B </CONCLUSION>", "chat", "B"),
        ("<CONCLUSION>B</CONCLUSION>", "chat", "B"),
        ("<CONCLUSION> two\nlines </CONCLUSION>", "chat", "two\nlines"),
        ("<answer>A</answer> <CONCLUSION> B </CONCLUSION>", "chat", "B"),
        ("<CONCLUSION> 1,000 </CONCLUSION>", "plain", "1000"),
        ("<CONCLUSION> B", "chat", "<CONCLUSION> B"),
    ],
)
def test_the_conclusion_is_the_answer(text: str, dialect: Any, answer: str) -> None:
    assert answer_of(text, dialect) == answer


def test_answers_are_decoded_behind_the_thinking_tokens(eyes: Backbone) -> None:
    """All of it is generated, the thinking tokens too."""
    method = Heima(tags="tokens")
    sample = sample_of(eyes)
    ids = pack([laid(method, sample)], eyes.encode, eyes.pad).branches["answer"].target.tolist()
    place = iter(ids)

    class Parrot(type(eyes)):  # type: ignore[misc]
        def logits(self, rows: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.full(rows.shape[:-1], next(place)), super().logits(rows).shape[-1]).float()

    parrot = Parrot(eyes.model, eyes.tokenizer)
    (result,) = evaluate(parrot, [sample], method, "silent", method.trained_slots)
    assert result.correct
    assert result.answer == "A"
    assert result.generated_tokens == 3 * 3 + 3 + 1


# Interpreters


def companions_of(method: Any, model: Backbone) -> nn.ModuleDict:
    """Different from each other and from the model."""
    torch.manual_seed(5)
    made = method.companions(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("per_section", [1, 2])
def test_an_interpreter_reads_the_state_that_predicted_its_token(model: Backbone, per_section: int) -> None:
    """Against one text at a time, embedded by the interpreter's own table, at positions from 0, without a picture."""
    method = Interpreters(per_section=per_section)
    companions, samples = companions_of(method, model), seen(model)
    layouts = [laid(method, sample) for sample in samples]
    packed = pack(layouts, model.encode, model.pad)
    out = run(model, packed, companions=companions)
    total, terms = method.loss(out)
    losses: dict[str, list[torch.Tensor]] = {}
    for b, layout in enumerate(layouts):
        assert {r.kind for r in layout.readings} == set(samples[b].sections)
        for reading in layout.readings:
            reader: Any = companions[reading.kind]
            ids = [i for segment in reading.path for i in model.encode(segment).ids]
            thought = [model.token(token) for token in thinking_tokens(reading.kind, per_section)]
            place = next(i for i in range(len(ids)) if ids[i : i + per_section] == thought)
            in_line = packed.ids[b].tolist()
            row = next(i for i in range(len(in_line)) if in_line[i : i + per_section] == thought)
            embeds = reader.get_input_embeddings()(torch.tensor(ids)).clone()
            embeds[place : place + per_section] = out.hidden[-1][b, row - 1 : row - 1 + per_section]
            length = len(ids)
            mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
            own = method.reader(model, companions, reading.kind)
            last = own.forward(embeds[None], torch.arange(length).expand(model.axes, 1, -1), mask).last[0]
            given = len(model.encode(reading.path[0]).ids)  # what stands before the user's words
            each = F.cross_entropy(own.logits(last[given - 1 : -1]), torch.tensor(ids[given:]), reduction="none")
            losses.setdefault(reading.kind, []).append(each)
    assert losses.keys() == set(NAMES)
    for name, each in losses.items():
        torch.testing.assert_close(terms[name], torch.cat(each).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, torch.stack([terms[name] for name in NAMES]).sum())


def test_the_prompt_is_learnt_or_not(model: Backbone) -> None:
    sample = seen(model)[0]
    every, text = (laid(Interpreters(train_on_input=x), sample).readings[0].path for x in (True, False))
    whole, told = (pack([Layout({"read": path})], model.encode, model.pad) for path in (every, text))
    assert torch.equal(whole.ids, told.ids)
    assert len(whole.branches["read"].row) == whole.ids.shape[1] - len(model.encode(every[0]).ids)
    end = model.tokenizer.eos_token
    assert model.decode(told.branches["read"].target.tolist()) == f"{STEPS[0]}{end}"
    assert torch.equal(whole.slot_row, told.slot_row)
    assert model.decode(whole.ids[0, whole.slot_row].tolist()) == "<THINKING_OF_SUMMARY>"


def test_prompts_are_ten_templates_with_the_question_and_no_picture(eyes: Backbone) -> None:
    method, sample = Interpreters(), seen(eyes)[1]
    drawn = set()
    for seed in range(60):
        (reading,) = method.layout(sample, np.random.default_rng(seed)).readings
        text = eyes.decode([i for segment in reading.path[:-1] for i in eyes.encode(segment).ids])
        assert (
            text.count("One {thought}, or {question}? Options:\nA. a bark\nB. a purr") == 1
        )  # not taken for a template
        assert text.count("<THINKING_OF_REASONING>") == 1
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        drawn.add(text)
    assert len(drawn) == len(TEMPLATES) == 10
    again = [method.layout(sample, np.random.default_rng(3)).readings[0].path[1].pieces for _ in range(2)]
    assert again[0] == again[1]
    for template in TEMPLATES:
        assert re.findall(r"{(\w+)}", template).count("thought") == 1
        assert "{question}" in template
        assert "{section}" in template


def test_the_model_is_frozen_and_interpreters_are_its_copies(eyes: Backbone) -> None:
    method = Interpreters(interpreted=("CAPTION",))
    companions = method.companions(eyes)
    assert list(companions) == ["CAPTION"]
    assert not any("visual" in name for name, _ in companions.named_parameters())
    assert not {p.data_ptr() for p in eyes.model.parameters()} & {p.data_ptr() for p in companions.parameters()}
    assert method.frozen
    assert not Heima.frozen
    total, terms = method.loss(
        run(eyes, pack([laid(method, sample_of(eyes))], eyes.encode, eyes.pad), companions=companions)
    )
    assert list(terms) == ["CAPTION"]
    total.backward()
    assert all(p.grad is not None for p in companions.parameters())


def test_a_section_that_no_sample_of_a_pass_has_costs_nothing(eyes: Backbone) -> None:
    """And the pass can be learnt from, though there is nothing to learn."""
    method = Interpreters(interpreted=("CAPTION",))
    packed = pack([laid(method, samples_of(eyes)[1])], eyes.encode, eyes.pad)
    companions = method.companions(eyes)
    loss, _ = method.loss(run(eyes, packed, companions=companions))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None for p in companions.parameters())


def test_an_interpreter_may_be_another_language_model(eyes: Backbone, tmp_path: Path) -> None:
    tiny.tiny_llama(seed=4, layers=2).save(tmp_path / "llama")
    method = Interpreters(interpreter=str(tmp_path / "llama"))
    companions = method.companions(eyes)
    assert {type(each).__name__ for each in companions.values()} == {"LlamaForCausalLM"}
    out = run(eyes, pack([laid(method, sample_of(eyes))], eyes.encode, eyes.pad), companions=companions)
    assert torch.isfinite(method.loss(out)[0])


def test_an_interpreter_that_cannot_read_heima_is_refused(eyes: Backbone, tmp_path: Path) -> None:
    narrow = tiny.tiny_llama(layers=1)
    narrow.model.config.hidden_size, narrow.model.config.intermediate_size = 32, 32
    type(narrow)(type(narrow.model)(narrow.model.config), narrow.tokenizer).save(tmp_path / "narrow")
    with pytest.raises(ConfigError, match="width 32"):
        Interpreters(interpreter=str(tmp_path / "narrow")).companions(eyes)
    other = tiny.tiny_llama(layers=1)
    type(other)(other.model, tiny.words(300)).save(tmp_path / "other")
    with pytest.raises(ConfigError, match="another vocabulary"):
        Interpreters(interpreter=str(tmp_path / "other")).companions(eyes)


# Scorers


def test_scorers_see_what_they_are_given(eyes: Backbone) -> None:
    method = Scorers()
    layout = laid(method, sample_of(eyes))
    packed = {r.kind: pack([Layout({"read": r.path})], eyes.encode, eyes.pad) for r in layout.readings}
    silent = {eyes.token(token) for token in method.thinking_tokens}
    for kind, (slots, written) in GIVEN.items():
        ids = packed[kind].ids[0].tolist()
        assert len(silent & set(ids)) == (3 if slots else 0)
        assert ("A dog on grass." in eyes.decode(ids)) == written
        assert packed[kind].grids  # all see the clip
        rows = packed[kind].branches["read"]
        assert eyes.decode(rows.target.tolist()) == "A<|im_end|>"
    assert [len(r.holes) for r in layout.readings] == [0, 3, 0, 3]


def test_scores_do_not_depend_on_the_batch(eyes: Backbone) -> None:
    """And are likelihoods of whole answers, states in their places."""
    method = Scorers()
    companions, samples = companions_of(method, eyes), samples_of(eyes)
    one, other = (scored(eyes, companions, method, samples, batch) for batch in (1, 3))
    for kind in GIVEN:
        assert one[kind].shape == (3,)
        np.testing.assert_allclose(one[kind], other[kind], rtol=1e-4, atol=1e-4)
    assert len({round(float(one[kind][0]), 4) for kind in GIVEN}) == 4


# By name


def test_found_by_name() -> None:
    assert find("heima.Heima") is Heima
    method = Interpreters(compressed=2, per_section=2, sections=("A", "B"), interpreted=("A",))
    assert from_description(described(method)) == method
    assert method.tokens[-4:] == ("<THINKING_OF_A_1>", "<THINKING_OF_A_2>", "<THINKING_OF_B_1>", "<THINKING_OF_B_2>")
    with pytest.raises(ConfigError, match=r"heima\.Heima, heima\.Interpreters"):
        find("heima")
    for abstract in ("method", "method.Method"):
        with pytest.raises(ConfigError, match=r"engine/methods/method\.py holds no method"):
            from_description({"name": abstract})


def test_a_hole_may_be_a_target(eyes: Backbone) -> None:
    """It is predicted, and still keeps a place for a state."""
    (reading, *_) = laid(Interpreters(), sample_of(eyes)).readings
    packed = pack([Layout({"read": reading.path})], eyes.encode, eyes.pad)
    rows = packed.branches["read"]
    (hole,) = packed.slot_row.tolist()
    assert hole - 1 in rows.row.tolist()
    assert rows.target[rows.row == hole - 1].tolist() == [eyes.token("<THINKING_OF_SUMMARY>")]
    assert Special("<THINKING_OF_SUMMARY>") in reading.path[2].pieces
