"""Hinted silent answers: cutting the chain changes nothing for the teacher, and each cut is the pass it says it is."""

import numpy as np
import torch

from engine.data.samples import chain, context, ending, solution
from engine.data.worlds import WorldsSource
from engine.layout import Layout, Special, marker, pack, slots
from engine.methods.lookup import Lookup
from engine.methods.method import run
from engine.methods.pause import PauseDistillation, pieces
from tests.tiny import tiny_backbone


def test_the_pieces_are_the_chain():
    sample = WorldsSource(split="validation", difficulties=(2, 2))(0)
    cuts = set()
    for seed in range(40):
        parts = pieces(sample, 3, np.random.default_rng(seed))
        assert len(parts) == 4
        said = "".join(p for part in parts for p in part.pieces if isinstance(p, str))
        assert said == sample.thoughts
        assert parts[0].pieces[0] == Special("<think>")
        assert parts[-1].pieces[-1] == Special("</think>")
        cuts.add(len("".join(p for p in parts[0].pieces if isinstance(p, str))))
    assert 0 in cuts  # nothing but the opening tag
    assert len(cuts) > 10


def test_more_cuts_than_words_are_no_error():
    sample = WorldsSource(split="validation", difficulties=(1, 1))(0)
    assert len(pieces(sample, 100, np.random.default_rng(0))) == 101


@torch.no_grad()
def test_a_hinted_answer_is_the_separate_pass_behind_the_written_beginning():
    backbone = tiny_backbone()
    sample = WorldsSource(split="validation", difficulties=(1, 1))(1)
    plain, hinted = PauseDistillation(), PauseDistillation(hints=2)
    layout = hinted.layout(sample, np.random.default_rng(3))
    packed = run(backbone, pack([layout], backbone.encode, backbone.pad))
    whole = run(backbone, pack([plain.layout(sample, np.random.default_rng(3))], backbone.encode, backbone.pad))
    for name in ("speak", "answer", "teacher"):
        assert torch.allclose(packed.branch(name).logits(), whole.branch(name).logits(), atol=1e-5)
    parts = pieces(sample, 2, np.random.default_rng(3))
    # The layout draws the number of slots first, so its cuts are its own: they are read off its branch.
    given = layout.branches["hinted1"][1:3]
    path = (context(sample), *given, slots("<pause>", 8), marker("<ANS>"), *solution(sample), ending(sample))
    alone = run(backbone, pack([Layout({"one": path})], backbone.encode, backbone.pad))
    assert torch.allclose(
        packed.branch("hinted1").only("answer").logits(), alone.branch("one").only("answer").logits(), atol=1e-5
    )
    assert len(parts) == len(layout.branches["teacher"]) - len((context(sample), *solution(sample), ending(sample)))
    terms = hinted.loss(packed)[1]
    assert set(terms) == {"decode", "answer", "teacher", "distil", "hinted"}
    one, two = (packed.branch(f"hinted{i}").only("answer").cross_entropy() for i in range(2))
    assert torch.allclose(terms["hinted"], (one + two) / 2)


@torch.no_grad()
def test_the_silent_look_up_asks_for_the_letter_of_the_option_that_was_told():
    backbone = tiny_backbone()
    sample = WorldsSource(split="validation", corrupt="blind")(0)
    layout = Lookup(lines=3).layout(sample, np.random.default_rng(0))
    for i in range(3):
        told, answer = layout.branches[f"silent{i}"][1], layout.branches[f"silent{i}"][5]
        word = str(told.pieces[1]).rpartition(" ")[2]
        assert sample.options["ABCD".index(str(answer.pieces[0]))] == word
    out = run(backbone, pack([layout], backbone.encode, backbone.pad))
    assert set(Lookup(lines=3).loss(out)[1]) == {"look", "silent"}
    assert chain(sample).pieces[1] == sample.thoughts
