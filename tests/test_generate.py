"""Generation: cached = uncached, batch = single, what infers is what trains, and nothing shared is written to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from engine import generate, masks
from engine.data.samples import Sample, answer_of, thoughts_of
from engine.data.worlds import WorldsSource
from engine.layout import Layout, Segment, Special, marker, pack, slots
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from tests.tiny import tiny_backbone, tiny_gpt2


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    source = WorldsSource(split="validation")
    return [source(i) for i in range(4)]


def uncached(backbone, path: tuple, limit: int) -> list[int]:
    """Greedy decoding that runs the whole path again for each token."""
    emitted: list[int] = []
    while len(emitted) < limit:
        forced = Segment("context", tuple(Special(backbone.tokenizer.convert_ids_to_tokens(i)) for i in emitted))
        packed = pack([Layout({"line": (*path, forced)})], backbone.encode, backbone.pad)
        with torch.no_grad():
            out = run(backbone, packed)
        emitted.append(int(backbone.logits(out.hidden[-1][0, -1]).argmax()))
        if emitted[-1] == backbone.end:
            break
    return emitted


def paths(sample: Sample, pauses: int) -> dict[str, tuple]:
    trunk, think = generate.context(sample), slots("<pause>", pauses)
    return {
        "answer": (trunk, think, marker("<ANS>")),
        "speak": (trunk, think, marker("<COT>", sees=(think,))),
        "explicit": (trunk,),
    }


@pytest.mark.parametrize("name", ["answer", "speak", "explicit"])
def test_cached_generation_equals_running_everything_again(backbone, samples, name):
    thoughts = generate.think(backbone, samples, (slots("<pause>", 5),))
    written = getattr(generate, name)(backbone, thoughts, limit=12)
    for i, sample in enumerate(samples):
        assert written.ids[i] == uncached(backbone, paths(sample, 5)[name], 12)


def grown(backbone, thoughts: generate.Thoughts, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding of the chain with transformers' growing cache: tokens [batch, limit], states [limit, ..]."""
    cache, sees, state = DynamicCache(list(thoughts.layers)), thoughts.context, thoughts.last_context
    tokens, states = [], []
    for step in range(limit):
        tokens.append(backbone.logits(state[-1]).argmax(-1, keepdim=True))
        states.append(state)
        sees = torch.cat([sees, torch.ones_like(sees[:, :1])], dim=1)
        embeds = backbone.embed_ids(tokens[-1])
        positions = (thoughts.after_context + step)[:, None].expand(backbone.axes, -1, -1)
        out = backbone.forward(embeds, positions, masks.additive(sees[:, None], embeds.dtype), cache, thoughts.sight)
        state = torch.stack([h[:, -1] for h in out.hidden])
    return torch.cat(tokens, dim=1), torch.stack(states)


@torch.no_grad()
def test_written_in_place_as_with_a_growing_cache(backbone, samples):
    thoughts = generate.think(backbone, samples, (slots("<pause>", 5),))
    written = generate.explicit(backbone, thoughts, 24)
    tokens, states = grown(backbone, thoughts, 24)
    for i, ids in enumerate(written.ids):
        assert ids == tokens[i, : len(ids)].tolist()
        assert torch.allclose(written.states[: len(ids), :, i], states[: len(ids), :, i], atol=1e-5)


@pytest.mark.parametrize("pauses", [0, 1, 8])
def test_a_batch_gives_each_sample_what_it_gets_alone(backbone, samples, pauses):
    together = generate.think(backbone, samples, (slots("<pause>", pauses),))
    for i, sample in enumerate(samples):
        alone = generate.think(backbone, [sample], (slots("<pause>", pauses),))
        assert torch.allclose(together.states[:, i], alone.states[:, 0], atol=1e-5)
        for name in ("answer", "speak", "explicit"):
            many, one = (getattr(generate, name)(backbone, t, limit=10) for t in (together, alone))
            assert many.ids[i] == one.ids[0]
            steps = len(one.states)
            assert torch.allclose(many.states[:steps, :, i], one.states[:, :, 0], atol=1e-5)


def test_inference_feeds_what_training_fed(backbone, samples):
    """The states at the slots, and the state that predicts the first answer token, are those of the training layout."""
    method = PauseDistillation(pauses=(6, 6))
    packed = pack([method.layout(s, np.random.default_rng(0)) for s in samples], backbone.encode, backbone.pad)
    with torch.no_grad():
        trained = run(backbone, packed)
    thoughts = generate.think(backbone, samples, (slots("<pause>", 6),))
    rows = packed.slot_row.reshape(len(samples), 6)
    every = torch.arange(len(samples))[:, None]
    for layer, states in zip(thoughts.states, trained.hidden):
        assert torch.allclose(layer, states[every, rows], atol=1e-5)
    table = packed.branches["answer"]
    first = [int(table.row[table.sample == i][0]) for i in range(len(samples))]
    written = generate.answer(backbone, thoughts, limit=1)
    assert torch.allclose(written.states[0, -1], trained.hidden[-1][torch.arange(len(samples)), first], atol=1e-5)


def test_speaking_sees_the_slots_alone(backbone, samples):
    """The same slots' cache behind another context says the same words, and the slots matter."""
    thoughts = generate.think(backbone, samples, (slots("<pause>", 4),))
    blind = replace(thoughts, layers=tuple((k.clone(), v.clone()) for k, v in thoughts.layers))
    for keys, values in blind.layers:
        for i in range(len(samples)):
            keys[i, :, thoughts.context[i]] = 7.0
            values[i, :, thoughts.context[i]] = -7.0
    before, after = generate.speak(backbone, thoughts, 8), generate.speak(backbone, blind, 8)
    assert torch.equal(before.states, after.states)
    blind.layers[0][1][0, :, thoughts.slots[0]] = 3.0
    assert not torch.equal(before.states[:, :, 0], generate.speak(backbone, blind, 8).states[:, :, 0])


def test_thoughts_can_be_continued_many_times(backbone, samples):
    thoughts = generate.think(backbone, samples, (slots("<pause>", 3),))
    before = [(k.clone(), v.clone()) for k, v in thoughts.layers]
    first = generate.answer(backbone, thoughts)
    generate.explicit(backbone, thoughts, 20)
    generate.speak(backbone, thoughts, 20)
    assert generate.answer(backbone, thoughts).ids == first.ids
    assert all(torch.equal(k, a) and torch.equal(v, b) for (k, v), (a, b) in zip(thoughts.layers, before))


def test_option_probabilities_are_where_the_letter_stands(backbone, samples):
    thoughts = generate.think(backbone, samples, (slots("<pause>", 2),))
    shares = generate.option_probabilities(backbone, thoughts, ["A", "B", "C"])
    assert torch.allclose(shares.sum(-1), torch.ones(len(samples)))
    for i, sample in enumerate(samples):
        path = (*paths(sample, 2)["answer"], marker("<answer>"))
        packed = pack([Layout({"line": path})], backbone.encode, backbone.pad)
        with torch.no_grad():
            logits = backbone.logits(run(backbone, packed).hidden[-1][0, -1])
        ids = [backbone.text_ids(letter)[0] for letter in "ABC"]
        assert torch.allclose(shares[i], logits[ids].softmax(-1), atol=1e-5)


def test_wrong_numbers_are_refused(backbone, samples):
    with pytest.raises(ValueError, match="negative"):
        generate.think(backbone, samples, (slots("<pause>", -1),))
    with pytest.raises(ValueError, match="No sample"):
        generate.think(backbone, [], (slots("<pause>", 3),))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>\n", "B"),
        ("<think>a</think><answer> A </answer><answer>C</answer>", "C"),
        ("no tags\n", "no tags"),
        ("", ""),
    ],
)
def test_the_answer_stands_between_the_last_tags(text, answer):
    assert answer_of(text) == answer


def test_the_thoughts_stand_between_the_thinking_tags():
    assert thoughts_of("<think>a\nb</think><answer>A</answer>") == "a\nb"
    assert thoughts_of("<think>a\nb") == "a\nb"
    assert thoughts_of("") == ""
    assert thoughts_of("a\nb</think><answer>A</answer>") == "a\nb"  # as a slot alone says it, out of its place
    assert thoughts_of("a</answer>") == "a"


@pytest.mark.parametrize(
    ("text", "chain", "answer"),
    [
        ("<<1+1=2>>\n### 2", "<<1+1=2>>", "2"),
        ("<<1+1=2>>\nThe answer is: 1,002", "<<1+1=2>>", "1002"),
        ("The answer is: Mia is a lempus.", "", "Mia is a lempus."),
        ("# 2", "# 2", "2"),
        ("no mark", "no mark", "no mark"),
        ("He plays.\n### C#", "He plays.", "C#"),
        ("### F# minor", "", "F# minor"),
        ("<<1+1=2>>####2", "<<1+1=2>>", "2"),
        ("So it is 2 ## 3 # 4", "So it is 2 ## 3 # 4", "4"),
        ("### Paris, Texas", "", "Paris, Texas"),
        ("### $1,234,567.50", "", "$1234567.50"),
    ],
)
def test_plain_answers_stand_behind_either_mark(text, chain, answer):
    assert answer_of(text, "plain") == answer
    assert thoughts_of(text, "plain") == chain


def test_nothing_is_written_past_the_last_position():
    """GPT-2's are rows of a table."""
    gpt2 = tiny_gpt2()
    gpt2.tokenizer.eos_token = "<pause>"  # which it never writes here
    asked = Sample(None, "How many? " * 25, (), (), "", "numerical", "plain")
    thoughts = generate.think(gpt2, [asked], ())
    written = generate.explicit(gpt2, thoughts, limit=1000)
    assert int(thoughts.after_context) + written.tokens[0] == gpt2.most_positions
    assert written.ids == generate.explicit(gpt2, thoughts, limit=written.tokens[0]).ids
    with pytest.raises(ValueError, match=r"this model supports 256"):
        generate.think(gpt2, [replace(asked, question="How many? " * 40)], ())


def test_a_long_neighbour_does_not_cut_a_text_short():
    """Each turn ends at its own last position."""
    gpt2 = tiny_gpt2()
    gpt2.tokenizer.eos_token = "<pause>"
    short, long = (Sample(None, "How many? " * n, (), (), "", "numerical", "plain") for n in (1, 25))
    alone = [generate.explicit(gpt2, generate.think(gpt2, [each], ()), limit=300).ids[0] for each in (short, long)]
    assert len(alone[0]) > len(alone[1]) + 100
    assert generate.explicit(gpt2, generate.think(gpt2, [short, long], ()), limit=300).ids == alone
