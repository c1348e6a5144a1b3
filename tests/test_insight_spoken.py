"""What single slots say: exactly what a slot that is alone in sight says, and what the decoder that taught it would."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import generate
from engine.backbones.base import Backbone, add_tokens
from engine.data.samples import Sample, thoughts_of
from engine.insight import inside, spoken
from engine.insight.reconstruction import interpreted, on_one_line, unfolded
from engine.insight.replace import Change, replaced
from engine.insight.subject import Subject
from engine.layout import pack
from engine.methods.coconut import Coconut
from engine.methods.codi import Codi
from engine.methods.heima import Interpreters
from engine.methods.method import Method, holes_filled, run
from engine.methods.pause import PauseDistillation
from engine.methods.steps import DECODER, StepSupervision
from tests import tiny


@pytest.fixture(scope="module", params=[tiny.tiny_backbone, tiny.tiny_gpt2])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    made = request.param()
    add_tokens(made.model, made.tokenizer, Coconut.tokens)
    return made


def test_a_slot_alone_says_what_it_says_when_the_others_are_wiped_out(backbone: Backbone) -> None:
    """Hidden by the mask, or spoiled in the cache and hidden: the same words; and all slots together, the whole chain."""
    samples = [replace(sample, dialect="chat") for sample in tiny.chains(backbone)]
    thoughts = generate.think(backbone, samples, PauseDistillation().thinking(3))
    said = spoken.alone(backbone, thoughts, limit=6)
    assert [len(texts) for texts in said] == [3] * len(samples)
    for slot in range(3):
        others = [i for i in range(3) if i != slot]
        spoiled = replace(thoughts, layers=tuple((k.clone(), v.clone()) for k, v in thoughts.layers))
        for _, values in spoiled.layers:
            for b in range(len(samples)):
                values[b, :, thoughts.slots[b, others]] = 99.0
        seen = torch.arange(3) == slot
        written = generate.speak(backbone, replaced(backbone, spoiled, [Change("one", seen=seen)]), 6)
        assert [thoughts_of(text) for text in written.text] == [texts[slot] for texts in said]
    whole = generate.speak(backbone, replaced(backbone, thoughts, [Change("all"), Change("all again")]), 6)
    assert whole.ids[::2] == whole.ids[1::2] == generate.speak(backbone, thoughts, 6).ids


METHODS: dict[str, Method] = {
    "pause": PauseDistillation(pauses=(3, 3), steps=StepSupervision()),
    "coconut": Coconut(c_thought=2, epochs_per_stage=1, max_latent_stage=2, steps=StepSupervision()),
    "codi": Codi(num_latent=3, prj_dim=48, steps=StepSupervision(first_position=0)),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_step_decoder_reads_what_it_was_taught_on(backbone: Backbone, name: str) -> None:
    """Greedy words from the captured thoughts are those of the training layout's own states, told to stop at the hole."""
    method = METHODS[name]
    torch.manual_seed(1)
    companions = method.companions(backbone)
    with torch.no_grad():
        for parameter in companions[DECODER].parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    companions.eval()
    samples = [replace(s, dialect="chat") if name == "pause" else s for s in tiny.chains(backbone)]
    samples = [s for s in samples if len(s.steps) >= 2]
    count = 4 if name == "coconut" else 3
    thoughts = generate.think(backbone, samples, method.thinking(count), method.feedback(companions))
    said = spoken.taught(backbone, method, companions, thoughts, 3, limit=5)
    assert [len(texts) for texts in said] == [2 if name == "coconut" else 3] * len(samples)

    layouts = [method.layout(s, np.random.default_rng(0), 9) for s in samples]
    prompts = [replace(x, readings=tuple(replace(r, path=r.path[:1]) for r in x.readings)) for x in layouts]
    fed = method.feedback(companions)
    with torch.no_grad():
        out = run(backbone, pack(prompts, backbone.encode, backbone.pad), fed, companions)
        readings = out.packed.readings[DECODER]
        wanted: dict[tuple[int, int], str] = {}
        embeds = holes_filled(out, readings, backbone, fed if name == "codi" else lambda states: states)
        for index, group in enumerate(readings.group.tolist()):
            sample = int(readings.source_sample[readings.packed.slot_sample == index][0])
            assert method.steps is not None  # type: ignore[attr-defined]
            first = method.steps.first_position  # type: ignore[attr-defined]
            wanted[sample, group] = greedy(backbone, companions[DECODER], embeds[index : index + 1], first, 5)
    for (sample, group), text in wanted.items():
        if group < len(said[sample]):
            assert said[sample][group] == text


def test_a_thought_that_is_not_whole_says_nothing(backbone: Backbone) -> None:
    method = METHODS["coconut"]
    companions = method.companions(backbone).eval()
    samples = tiny.chains(backbone)[:2]
    for count, whole in ((5, 2), (1, 0)):
        thoughts = generate.think(backbone, samples, method.thinking(count), method.feedback(companions))
        said = spoken.taught(backbone, method, companions, thoughts, 3, limit=2)
        assert [len(texts) for texts in said] == [whole, whole]


def test_who_needs_the_number_of_steps_does_not_tell_without(backbone: Backbone) -> None:
    for steps, tells in ((StepSupervision(), True), (StepSupervision(stairs=1), False), (None, False)):
        method = PauseDistillation(mode="silent", steps=steps)
        assert spoken.tells(method, method.companions(backbone)) == tells


def test_a_filler_s_steps_stand_before_its_slots_so_that_it_tells_nothing(backbone: Backbone) -> None:
    for thoughts, tells in (("continuous", True), ("filler", False)):
        method = Coconut(thoughts=thoughts, steps=StepSupervision())
        assert spoken.tells(method, method.companions(backbone)) == tells


def greedy(backbone: Backbone, decoder: torch.nn.Module, embeds: Tensor, first: int, limit: int) -> str:
    """Without a cache; words are embedded by the model's own table."""
    reader, ids = replace(backbone, model=decoder), list[int]()
    for _ in range(limit):
        line = torch.cat([embeds, backbone.embed_ids(torch.tensor([ids], dtype=torch.long))], dim=1)
        length = line.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        positions = (torch.arange(length) + first).expand(backbone.axes, 1, -1)
        ids.append(int(reader.logits(reader.forward(line, positions, mask).last[0, -1]).argmax()))
        if ids[-1] == backbone.end:
            break
    return backbone.decode([i for i in ids if i != backbone.end]).strip()


def test_looking_inside_ends_at_its_next_part_or_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heard before each token that a decoder or a slot says, between the parts, and before each clip that lends its slots."""
    backbone, method = tiny.tiny_backbone(layers=2), PauseDistillation(pauses=(2, 2), steps=StepSupervision())
    subject = Subject(backbone, method, 2, method.companions(backbone).eval())
    sample = Sample(tiny.clip(backbone, 1), "What is heard?", ("a bark", "a purr"), (), "A")
    thoughts = subject.think([sample])
    for name in ("taught", "alone"):
        monkeypatch.setattr(spoken, name, partial(getattr(spoken, name), limit=4))

    def heard(most: int) -> int:
        """How often, if the looking ends by itself and not at the last that is allowed."""
        times = itertools.count(1)

        def heed() -> None:
            if next(times) == most:
                raise InterruptedError

        inside.look(subject, sample, thoughts, "two\nlines", None, {"one": sample, "another": sample}, heed)
        return next(times) - 1

    tokens, parts, donors = 3, 5, 2  # a text's first token is there before any is fed
    assert heard(0) == tokens + parts + donors + tokens
    for most in (1, tokens + 1, tokens + parts + donors, tokens + parts + donors + tokens):
        with pytest.raises(InterruptedError):
            heard(most)


def test_models_without_a_step_decoder_say_nothing_by_it(backbone: Backbone) -> None:
    samples = [replace(tiny.chains(backbone)[3], dialect="chat")]
    method = PauseDistillation()
    thoughts = generate.think(backbone, samples, method.thinking(2))
    assert spoken.taught(backbone, method, torch.nn.ModuleDict(), thoughts, 3) == [[]]


def test_interpreters_say_what_they_would_if_the_chain_were_known() -> None:
    """Heima's thinking tokens are written alike whatever the chain was, so that its interpreters need no true steps."""
    backbone, method = tiny.tiny_backbone(layers=2), Interpreters(tags="tokens", compressed=2, interpreted=("CAPTION",))
    add_tokens(backbone.model, backbone.tokenizer, method.tokens)
    torch.manual_seed(2)
    companions = method.companions(backbone)
    with torch.no_grad():
        for parameter in companions.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    known = Sample(
        tiny.clip(backbone, 1), "What is heard?", ("a bark", "a purr"), ("I look.", "A dog.", "Dogs bark."), "A",
        sections=method.sections,
    )  # fmt: skip
    (wanted,) = interpreted(backbone, companions, method, [known])
    told = unfolded(backbone, companions, method, replace(known, steps=(), sections=(), answer=""))
    assert wanted.said
    assert told == f"CAPTION: {on_one_line(wanted.said)}"
    assert on_one_line("\na  dog\n\n barks\n") == "a dog; barks"

    def heed() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        unfolded(backbone, companions, method, known, heed)


def test_which_step_a_text_names_best() -> None:
    steps = ("ball starts left", "left and right swap, ball right", "so right B")
    assert spoken.named_best("ball starts left", steps) == (0, 1.0)
    assert spoken.named_best("nothing\nleft and right swap, ball left", steps)[0] == 1
    assert spoken.likeness("a b", "b c") == pytest.approx(0.5)
    assert spoken.named_best("", steps) == (-1, 0.0)
    assert spoken.named_best("xyz", steps) == (-1, 0.0)
    assert spoken.named_best("left", ()) == (-1, 0.0)


def test_the_states_at_the_ends_of_written_steps() -> None:
    backbone = tiny.tiny_backbone()
    think, close = (backbone.token(name) for name in ("<think>", "</think>"))
    a, line = backbone.text_ids("A")[0], backbone.text_ids("\n")[0]
    ids = [think, a, line, a, a, line, a, close, line, a]
    states = torch.arange(len(ids)).float().reshape(-1, 1, 1, 1).expand(-1, 4, 1, 2)
    written = generate.Written([ids], [""], [len(ids)], states)
    assert spoken.step_states(backbone, written)[0, :, 0].tolist() == [2, 5, 7]
    unfinished = generate.Written([ids[:5]], [""], [5], states[:5])
    assert spoken.step_states(backbone, unfinished)[:, :, 0].shape == (4, 1)


def test_a_method_says_itself_how_its_slots_were_taught(backbone: Backbone) -> None:
    """Whatever its class."""

    class Own(Method):
        supervision = StepSupervision()

    assert spoken.tells(Own(), nn.ModuleDict({DECODER: nn.Identity()}))
    assert not spoken.tells(Method(), nn.ModuleDict({DECODER: nn.Identity()}))
