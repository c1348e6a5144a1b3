"""Measures on constructed states whose value is known: collapsed and orthogonal slots, planted readings, planted savings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.backbones.base import Backbone
from engine.insight import howmany, lens, probe, similarity
from tests import tiny

LAYERS, SLOTS, DIM = 3, 4, 8


def test_slots_on_one_line_have_rank_one() -> None:
    direction = torch.randn(DIM)
    states = torch.stack([direction * scale for scale in (1, 2, 0.5, 3)]).expand(LAYERS, -1, -1)
    found = similarity.collapse(states, similarity.vocabulary(torch.eye(DIM)))
    assert found["cosine"].tolist() == pytest.approx([1] * LAYERS)
    assert found["effective_rank"].tolist() == pytest.approx([1] * LAYERS, abs=1e-5)
    lengths = direction.norm() * torch.tensor([1, 2, 0.5, 3])
    assert found["norm"][0] == pytest.approx(lengths.mean().item())
    assert found["distance"][0] == pytest.approx(
        np.mean([abs(a - b) for i, a in enumerate(lengths) for b in lengths[:i]])
    )


def test_orthogonal_slots_have_full_rank_and_known_distances() -> None:
    states = 2 * torch.eye(SLOTS, DIM).expand(LAYERS, 5, -1, -1)  # with an axis of clips between
    vocabulary = torch.stack([torch.zeros(DIM), torch.ones(DIM)])  # its middle is a half everywhere
    found = similarity.collapse(states, similarity.vocabulary(vocabulary))
    assert {values.shape for values in found.values()} == {(LAYERS, 5)}
    assert torch.allclose(found["cosine"], torch.zeros(()).double())
    assert torch.allclose(found["effective_rank"], torch.tensor(float(SLOTS)).double())
    assert torch.allclose(found["distance"], torch.tensor(8**0.5).double())
    assert torch.allclose(found["norm"], torch.tensor(2 / (DIM**0.5 / 2)).double())
    assert torch.allclose(found["centre"], torch.tensor((1.5**2 + (DIM - 1) * 0.25) ** 0.5).double())


def test_one_slot_has_no_other_to_be_like() -> None:
    found = similarity.collapse(torch.ones(LAYERS, 5, 1, DIM), similarity.vocabulary(torch.eye(DIM)))
    assert set(found) == {"effective_rank", "norm", "centre"}
    assert all(values.isfinite().all() for values in found.values())


def test_slots_against_the_steps_of_a_chain() -> None:
    steps = torch.eye(3, DIM).expand(LAYERS, -1, -1)
    slots = torch.stack([steps[:, 2], 5 * steps[:, 0]], dim=1)
    assert similarity.between(slots, steps)[1].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_path_in_a_plane_is_found_whole() -> None:
    plane = torch.linalg.qr(torch.randn(DIM, 2))[0].T
    way = torch.randn(LAYERS, SLOTS, 2)
    points, shares = similarity.path(way @ plane + 3)
    assert shares.sum() == pytest.approx(1)
    assert torch.allclose(torch.cdist(points.flatten(0, 1), points.flatten(0, 1)).float(), torch.cdist(way.flatten(0, 1), way.flatten(0, 1)), atol=1e-4)  # fmt: skip
    assert similarity.path(torch.ones(1, 1, DIM))[0].shape == (1, 1, 2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.tiny_backbone()


@pytest.mark.parametrize("made", [tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_llama, tiny.tiny_gpt2])
def test_the_logit_lens_ends_where_the_model_does(made) -> None:
    model = made()
    states = torch.randn(model.layers + 1, 2, 3, model.text_config.hidden_size)
    with torch.no_grad():
        said = lens.logits(model, states)
        assert torch.allclose(said[-1], model.logits(states[-1]), atol=1e-5)
        assert torch.allclose(said[0], model.logits(model.final_norm(states[0])), atol=1e-5)
        unmoved = lens.logits(model, states, lens.TunedLens(model.layers, states.shape[-1]))
    assert torch.allclose(said, unmoved, atol=1e-6)
    assert torch.allclose(lens.divergence(said)[-1], torch.zeros(()), atol=1e-6)
    assert lens.divergence(said)[:-1].min() > 0


def test_a_tuned_lens_learns_a_planted_map(backbone: Backbone, tmp_path: Path) -> None:
    """Every layer's states are the one before the last, moved by a fixed affine map: the lens finds the way back."""
    torch.manual_seed(0)
    dim, layers = backbone.text_config.hidden_size, backbone.layers
    turns, shifts = torch.eye(dim) + 0.05 * torch.randn(layers, dim, dim), torch.randn(layers, dim)
    last = torch.randn(600, dim)
    backbone.model.requires_grad_(False)
    with torch.no_grad():
        states = torch.cat([last @ turns + shifts[:, None], backbone.final_norm(last)[None]])
    tuned = lens.TunedLens(layers, dim)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2)
    before = lens.loss(backbone, tuned, states[:, 500:]).item()
    for _ in range(150):
        optimizer.zero_grad()
        lens.loss(backbone, tuned, states[:, :500]).backward()
        optimizer.step()
    after = lens.loss(backbone, tuned, states[:, 500:]).item()
    assert after < before / 10

    tuned.save(tmp_path)
    again = lens.TunedLens.load(tmp_path, backbone)
    assert again is not None
    assert torch.allclose(again.weight, tuned.weight, atol=1e-2)
    assert lens.loss(backbone, again, states[:, 500:]).item() < before / 10
    assert lens.TunedLens.load(tmp_path / "nowhere", backbone) is None
    with pytest.raises(ValueError, match=r"train\.lens"):
        lens.TunedLens.load(tmp_path, tiny.tiny_backbone(layers=2))


def test_the_words_of_a_lens(backbone: Backbone) -> None:
    said = torch.zeros(2, 3, len(backbone.tokenizer))
    a, b = lens.first_tokens(backbone, ["A", "B"]).tolist()
    assert [backbone.decode([i]).strip() for i in (a, b)] == ["A", "B"]
    said[1, 2, b] = 20
    ((text, chance),) = lens.words(backbone, said, 1)[1][2]
    assert text.strip() == "B"
    assert chance == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="same token"):
        lens.first_tokens(backbone, ["A", "A"])


def test_only_words_that_could_be_are_compared() -> None:
    said = torch.zeros(1, 2, 1, 6)
    said[..., 4], said[..., 2], said[..., 1] = 3, 2, 1
    tokens = torch.tensor([1, 2, 4])
    assert lens.likeliest(said, tokens, [[0, 1], [0, 1, 2]]).flatten().tolist() == [1, 2]


def test_the_written_steps_tell_the_state_of_the_world() -> None:
    chains = [
        ["ball starts left", "left and right swap, ball right", "so right B"],
        ["total starts 0", "blue 3, plus 3 is 3", "blue 4, plus 4 is 7", "so 7 A"],
    ]
    assert probe.world_states(chains[1]) == ("0", "3", "7")
    names, columns = probe.targets(chains)
    assert dict(zip(names, columns, strict=True)) == {
        "start": ["left", "0"], "step 1": ["right", "3"], "step 2": ["", "7"], "end": ["right", "7"],
    }  # fmt: skip


def test_a_probe_finds_what_was_planted_and_nothing_else() -> None:
    """One layer and slot hold the state in a linear code; the others hold noise. Shuffled labels teach nothing."""
    rng = np.random.default_rng(0)
    words, code = np.array(["left", "middle", "right"]), rng.normal(size=(3, DIM))
    states = rng.normal(size=(700, 2, SLOTS, DIM))
    which = rng.integers(3, size=700)
    states[:, 1, 2] += 3 * code[which]
    labels = words[which].tolist()
    labels[5] = ""
    said = probe.predicted(states[:500], labels[:500], states[500:])
    assert said is not None
    assert said.shape == (200, 2, SLOTS)
    means = (said == np.array(labels[500:])[:, None, None]).mean(0)
    assert means[1, 2] > 0.95
    means[1, 2] = 1 / 3
    assert np.abs(means - 1 / 3).max() < 0.15
    mixed = probe.shuffled(labels, ["cups"] * 700)
    assert sorted(mixed) == sorted(labels)
    assert mixed[5] == ""
    assert (said[:, 1, 2] == mixed[500:]).mean() < 0.5
    assert probe.predicted(states[:10], labels[:10], states[500:]) is None
    assert probe.predicted(states[:500], ["left"] * 500, states[500:]) is None


def test_shuffling_stays_within_groups() -> None:
    labels, groups = [str(i) for i in range(20)], ["a"] * 10 + ["b"] * 10
    mixed = probe.shuffled(labels, groups)
    assert set(mixed[:10]) == set(labels[:10])
    assert mixed != labels


def test_leaving_early_and_thinking_aloud_by_hand() -> None:
    confidence = np.array([[0.2, 0.6, 0.9], [0.5, 0.4, 0.3]])
    right = np.array([[False, False, True], [True, False, False]])
    sure, never = howmany.early_exit(confidence, right, (0.5, 1.01))
    assert (sure.cost.tolist(), sure.right.tolist(), sure.went_on.tolist()) == ([1, 0], [False, True], [False, False])
    assert (never.cost.tolist(), never.right.tolist(), never.went_on.tolist()) == ([2, 2], [True, False], [True, True])
    tokens, written = np.array([4, 4]), np.array([40, 60])
    (half,) = howmany.think_aloud(confidence[:, 2], right[:, 2], tokens, np.array([False, True]), written, (0.5,))
    assert (half.cost.tolist(), half.right.tolist(), half.went_on.tolist()) == ([4, 64], [True, True], [False, True])
