"""Every scorer against values worked out by hand."""

import pytest

from engine.exams import scores


@pytest.mark.parametrize(
    ("said", "true", "score"),
    [("B", "B", 1), (" B\n", "B", 1), ("b", "B", 0), ("B.", "B", 0), ("", "B", 0)],
)
def test_a_choice_is_the_very_letter(said, true, score):
    assert scores.exact(said, true) == score


@pytest.mark.parametrize(
    ("said", "true", "score"),
    [
        ("42", "42", 1),
        ("3.141", "3.14", 1),  # equal at two decimals
        ("3.146", "3.14", 0),
        ("42", "42.0", 0),  # one has decimals, one hasn't
        ("1,000", "1000.0", 1),  # a comma counts as a mark of decimals, as published
        ("1000", "1,000", 0),
        ("-7", "7", 0),
        ("about 42", "42", 0),
        ("inf", "inf", 0),
        ("", "42", 0),
    ],
)
def test_numbers(said, true, score):
    assert scores.numerical(said, true) == score


@pytest.mark.parametrize(
    ("said", "true", "score"),
    [
        ("10", "10", 1.0),
        ("9.3", "10", 0.9),  # off by 0.07: below 0.5 .. 0.1, not below 0.05
        ("12", "10", 0.6),  # off by 0.2 exactly: below 0.5 .. 0.25; in float32 1 - 0.8 lies just below 0.2
        ("6", "10", 0.2),  # off by 0.4: below 0.5 and 0.45, not below 0.4
        ("5", "10", 0.0),  # off by 0.5, which isn't below it
        ("0", "0", 1.0),
        ("1", "0", 0.0),
        ("-10", "-10", 1.0),
        ("ten", "10", 0.0),
    ],
)
def test_mean_relative_accuracy(said, true, score):
    assert scores.mean_relative_accuracy(said, true) == pytest.approx(score)


def test_edits_and_transcriptions():
    assert scores.edits("kitten", "sitting") == 3
    assert scores.edits("", "abc") == 3
    assert scores.edits("abc", "abc") == 0
    assert scores.transcription("the cat sat", "the cat sat") == 1
    assert scores.transcription("the dog sat down", "the cat sat") == pytest.approx(1 / 3)  # one replaced, one added
    assert scores.transcription("", "the cat") == 0
    assert scores.transcription("a b c d e", "a") == 0  # four errors in one word: never below 0
    assert scores.transcription("", "") == 1


def test_rouge_is_the_mean_of_three():
    """said: the cat ran; true: the cat sat. Words 2 of 3, pairs 1 of 2, longest common part 2 of 3."""
    assert scores.rouge("the cat ran", "the cat sat") == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert scores.rouge("cats running", "cat runs") == pytest.approx(1)  # stemmed
    assert scores.rouge("", "cat") == 0


def test_direct_answers_count_people():
    people = ["red", "red", "Red ", "crimson", "blue"] + ["scarlet"] * 5
    assert scores.direct_answer("Red", people) == 1
    assert scores.direct_answer("crimson", people) == pytest.approx(1 / 3)
    assert scores.direct_answer("green", people) == 0


@pytest.mark.parametrize(
    ("said", "picked"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The answer is B.", "B"),
        ("a dog", "B"),
        ("I see a DOG here.", "B"),
        ("A dog runs over there", "B"),  # its A is an article; the text decides
        ("A", "A"),
        ("A or B", ""),
        ("a cat and a dog", ""),
        ("a horse", ""),
        ("D", ""),  # there is no D
        ("", ""),
    ],
)
def test_which_option_was_meant(said, picked):
    assert scores.option_letter(said, ["a cat", "a dog", "an owl"]) == picked


@pytest.mark.parametrize(
    ("said", "found"),
    [("Yes.", "Yes"), ("No, it isn't", "No"), ("yes and no", ""), ("I know nothing", ""), ("Not", ""), ("YES!", "Yes")],
)
def test_yes_or_no(said, found):
    assert scores.yes_or_no(said) == found


@pytest.mark.parametrize(
    ("said", "choices", "kind", "precision", "found"),
    [
        ("(B)", ["4", "8"], "text", 0, "8"),
        ("It is 8 cm", ["4 cm", "8 cm"], "text", 0, "8 cm"),
        ("circel", ["square", "circle"], "text", 0, "circle"),  # the nearest spelling
        ("The answer is 1,234.", [], "integer", 0, "1234"),
        ("From 3 to 7.9", [], "integer", 0, "7"),  # the last number; its decimals are cut
        ("x = 3.14159", [], "float", 2, "3.14"),
        ("-0.5", [], "float", 1, "-0.5"),
        ("none", [], "float", 1, ""),
        (" [1, 2] ", [], "list", 0, "[1, 2]"),
        ("", ["4", "8"], "text", 0, ""),
    ],
)
def test_mathvista_answers(said, choices, kind, precision, found):
    assert scores.math_answer(said, choices, kind, precision) == found
