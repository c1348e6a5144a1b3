"""One packed forward is the separate passes; a sample's result doesn't depend on its neighbours; who reaches whom.

The separate passes are made here by hand: ids and positions put together segment by segment, a loop for the mask, one
unpadded forward a branch and sample, the published losses as sums over plain sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine import masks
from engine.backbones.base import Backbone
from engine.backbones.internvl import InternVL
from engine.data.samples import Sample
from engine.layout import Layout, Segment, pack
from engine.methods.controls import Explicit, Silent
from engine.methods.method import Outcome, run
from engine.methods.pause import PauseDistillation
from tests import tiny
from tests.near import close
from tests.rows import branch_rows
from tests.tiny import tiny_backbone, tiny_internvl

METHODS = {
    "pause": PauseDistillation(pauses=(2, 9)),
    "as published": replace(PauseDistillation.as_published(), pauses=(2, 9)),
    "student": PauseDistillation(mode="student", pauses=(1, 3)),
    "silent": PauseDistillation(mode="silent", pauses=(1, 3)),
    "teacher": PauseDistillation(mode="teacher"),
    "explicit": Explicit(),
    "filler": Silent(pauses=3),
    "answer only": Silent(pauses=0),
}


@pytest.fixture(scope="module", params=[tiny_backbone, tiny_internvl])
def build(request: pytest.FixtureRequest) -> Callable[..., Backbone]:
    return request.param


@pytest.fixture(scope="module")
def model(build: Callable[..., Backbone]) -> Backbone:
    return build()


@pytest.fixture(scope="module")
def samples(model: Backbone) -> list[Sample]:
    return tiny.samples(model)


@dataclass
class Separate:
    """One branch of one sample in a pass of its own."""

    hidden: tuple[Tensor, ...]  # [length, dim] a layer
    logits: Tensor  # [length, vocabulary]
    target: Tensor  # [length]: what each row predicts, -1 where nothing is supervised
    answer: Tensor  # bool [length]: rows that predict the answer

    def cross_entropy(self) -> Tensor:
        return F.cross_entropy(self.logits, self.target, ignore_index=-1)


def separate(model: Backbone, segments: Sequence[Segment], flat: bool) -> Separate:
    ids: list[int] = []
    positions: list[Tensor] = []
    features: list[tuple[list[int], Tensor]] = []
    owner: list[Segment] = []
    start = 0
    for segment in segments:
        encoded = model.encode(segment)
        for visual, rows in encoded.visual:
            features.append(([len(ids) + r for r in rows], model.encode_patches(visual.patches, [visual.grid])))
        ids += encoded.ids
        owner += [segment] * len(encoded.ids)
        positions.append(encoded.positions + start)
        start += encoded.extent
    length = len(ids)
    position = torch.arange(length).expand(model.axes, -1) if flat else torch.cat(positions, dim=1)
    seen = torch.ones(length, length).tril().bool()
    for segment in segments:
        if segment.sees is not None:  # from here on, everything before is hidden but what is named
            first = owner.index(segment)
            hidden = [i for i in range(first) if not any(owner[i] is s for s in segment.sees)]
            seen[first:, hidden] = False
    embeds = model.embed_ids(torch.tensor([ids]))
    for rows, feature in features:
        embeds = embeds.index_put((torch.zeros(len(rows), dtype=torch.long), torch.tensor(rows)), feature)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    states = model.forward(embeds, position[:, None], mask)
    supervised = [i + 1 < length and owner[i + 1].role == "target" for i in range(length)]
    target = torch.tensor([ids[i + 1] if given else -1 for i, given in enumerate(supervised)])
    answer = torch.tensor([given and owner[i + 1].name == "answer" for i, given in enumerate(supervised)])
    return Separate(tuple(h[0] for h in states.hidden), model.logits(states.last[0]), target, answer)


def distance(student: Separate, teacher: Separate, form: str) -> Tensor:
    terms = []
    for s, t in list(zip(student.hidden, teacher.hidden, strict=True))[1:]:
        s, t = s[student.answer], t[teacher.answer].detach()
        if form == "paper":
            terms.append((s - t).abs().mean() / (t.std() + 1e-6))
        else:
            terms.append((F.smooth_l1_loss(s, t, reduction="none").mean(1) / (t.std(1) + 1e-6)).mean())
    return torch.stack(terms).mean()


def loss_of(method: object, branches: dict[str, Separate]) -> Tensor:
    """The published total of one sample."""
    losses = {name: branch.cross_entropy() for name, branch in branches.items()}
    if not isinstance(method, PauseDistillation):
        (only,) = losses.values()
        return only
    if method.mode == "teacher":
        return losses["teacher"]
    if method.mode == "silent":
        return 0.5 * losses["answer"]
    tasks = 0.5 * losses["speak"] + 0.5 * losses["answer"]
    if method.mode == "student":
        return tasks
    return tasks + losses["teacher"] + 10 * distance(branches["answer"], branches["teacher"], method.form)


def layouts_of(method: object, samples: Sequence[Sample]) -> list[Layout]:
    rng = np.random.default_rng(4)
    return [method.layout(sample, rng) for sample in samples]


def packed_run(model: Backbone, layouts: Sequence[Layout]) -> Outcome:
    return run(model, pack(layouts, model.encode, model.pad))


def gradients(model: Backbone, loss: Tensor) -> dict[str, Tensor]:
    model.model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_packed_is_separate(name: str, model: Backbone, samples: list[Sample]) -> None:
    method = METHODS[name]
    layouts = layouts_of(method, samples)
    out = packed_run(model, layouts)
    total, terms = method.loss(out)
    losses = []
    for b, layout in enumerate(layouts):
        rows = branch_rows(layout, model.encode)
        alone = {n: separate(model, segments, n in layout.flat) for n, segments in layout.branches.items()}
        losses.append(loss_of(method, alone))
        for branch, expected in alone.items():
            for ours, theirs in zip(out.hidden, expected.hidden, strict=True):
                close(ours[b, rows[branch]], theirs)
            close(model.logits(out.hidden[-1][b, rows[branch]]), expected.logits)
            supervised = out.packed.branches[branch]
            mine = supervised.sample == b
            assert supervised.target[mine].tolist() == expected.target[expected.target >= 0].tolist()
            close(out.branch(branch).logits()[mine], expected.logits[expected.target >= 0])
    expected_total = torch.stack(losses).mean()
    close(total, expected_total)
    assert set(terms) <= {"decode", "answer", "teacher", "distil"}
    packed_gradients, separate_gradients = gradients(model, total), gradients(model, expected_total)
    assert packed_gradients.keys() == separate_gradients.keys()
    assert len(packed_gradients) == len(list(model.model.parameters()))
    for parameter, expected in separate_gradients.items():
        norm = float(expected.norm())
        rounding = 1e-8  # InternVL's vision: its keys' biases move nothing, so their gradient is rounding alone
        assert float(packed_gradients[parameter].norm()) == pytest.approx(norm, rel=2e-4, abs=rounding), parameter
        assert float((packed_gradients[parameter] - expected).norm()) <= 2e-4 * norm + rounding, parameter


@pytest.mark.parametrize("name", ["pause", "as published"])
def test_batch_is_single(name: str, model: Backbone, samples: list[Sample]) -> None:
    method = METHODS[name]
    layouts = layouts_of(method, samples)
    assert len({len(layout.branches["answer"][1].pieces) for layout in layouts}) > 1  # N differs
    with torch.no_grad():
        together = packed_run(model, layouts)
        mean, terms = method.loss(together)
        singles = [packed_run(model, [layout]) for layout in layouts]
        alone = [method.loss(single) for single in singles]
        backwards = packed_run(model, layouts[::-1])
    close(mean, torch.stack([total for total, _ in alone]).mean())
    for term, value in terms.items():
        close(value, torch.stack([each[term] for _, each in alone]).mean())
    lengths = {single.packed.ids.shape[1] for single in singles}
    assert len(lengths) == len(layouts)  # so all but one are padded
    for b, single in enumerate(singles):
        length = single.packed.ids.shape[1]
        for ours, reverse, theirs in zip(together.hidden, backwards.hidden, single.hidden, strict=True):
            close(ours[b, :length], theirs[0])
            close(reverse[-1 - b, :length], theirs[0])


def test_padding_is_of_no_consequence(model: Backbone, samples: list[Sample]) -> None:
    method = METHODS["pause"]
    packed = pack(layouts_of(method, samples), model.encode, model.pad)
    other = pack(layouts_of(method, samples), model.encode, model.token("<COT>"))
    padding = packed.node < 0
    other.positions[:, padding] = 77
    assert padding.any()
    assert (packed.ids != other.ids).any()
    expected, got = run(model, packed), run(model, other)
    assert all(torch.isfinite(h).all() for h in got.hidden)
    for ours, theirs in zip(got.hidden, expected.hidden, strict=True):
        assert torch.equal(ours[~padding], theirs[~padding])
    (loss, _), (same, _) = method.loss(expected), method.loss(got)
    grads, same_grads = gradients(model, loss), gradients(model, same)
    assert all(torch.equal(grads[name], same_grads[name]) for name in grads)


def test_spoken_thoughts_see_the_slots_alone(build: Callable[..., Backbone], model: Backbone) -> None:
    """With one layer the slots' keys hold their own embeddings, so nothing of the clip can pass through them."""
    shallow, method = build(layers=1), PauseDistillation(pauses=(4, 4))
    first = Sample(tiny.clip(model, 1), "Was it 1 or 2?", ("left", "right"), ("It goes right.",), "B")
    second = Sample(tiny.clip(model, 2), "Was it 3 or 4?", ("right", "left"), ("It goes right.",), "B")
    for backbone, passes_through_slots in ((shallow, False), (model, True)):
        with torch.no_grad():
            outs = [packed_run(backbone, [method.layout(s, np.random.default_rng(0))]) for s in (first, second)]
        assert torch.equal(outs[0].packed.positions, outs[1].packed.positions)
        for branch in ("speak", "answer", "teacher"):
            states = [out.branch(branch).hidden[-1][0, out.packed.branches[branch].row] for out in outs]
            unchanged = torch.equal(states[0], states[1])
            assert unchanged == (branch == "speak" and not passes_through_slots), (branch, passes_through_slots)


def test_gradients_of_the_spoken_thoughts_reach_the_clip_through_the_slots_only(model: Backbone) -> None:
    layout = PauseDistillation(pauses=(3, 3)).layout(tiny.samples(model)[0], np.random.default_rng(0))
    packed = pack([layout], model.encode, model.pad)
    rows = branch_rows(layout, model.encode)
    before_slots = len(model.encode(layout.branches["speak"][0]).ids)

    def reach(allowed: Tensor) -> Tensor:
        """Size of the gradient of the spoken thoughts' loss at every row's embedding."""
        embeds = model.embed(packed).detach().requires_grad_()
        states = model.forward(embeds, packed.positions, masks.additive(allowed, embeds.dtype))
        Outcome(packed, states.hidden, model).branch("speak").cross_entropy().backward()
        return embeds.grad[0].norm(dim=1)

    allowed = masks.visible(packed)
    size = reach(allowed)
    spoken = rows["speak"]
    assert (size[spoken[:-1]] > 0).all()  # clip, question and every slot
    others = [r for r in range(packed.ids.shape[1]) if r not in spoken]
    assert (size[others] == 0).all()
    blinded = allowed.clone()
    blinded[:, before_slots : before_slots + 3, :before_slots] = False  # slots that saw neither clip nor question
    size = reach(blinded)
    assert (size[:before_slots] == 0).all()
    assert (size[before_slots : before_slots + 3] > 0).all()


def test_the_teacher_is_not_trained_by_the_distillation(model: Backbone, samples: list[Sample]) -> None:
    layout = PauseDistillation(pauses=(3, 3)).layout(samples[0], np.random.default_rng(0))
    rows = branch_rows(layout, model.encode)
    packed = pack([layout], model.encode, model.pad)
    embeds = model.embed(packed).detach().requires_grad_()
    states = model.forward(embeds, packed.positions, masks.additive(masks.visible(packed), embeds.dtype))
    only = PauseDistillation(decode=0, answer=0, teacher=0)
    only.loss(Outcome(packed, states.hidden, model))[0].backward()
    size = embeds.grad[0].norm(dim=1)
    shared = len(model.encode(layout.branches["teacher"][0]).ids)
    assert (size[rows["teacher"][shared:]] == 0).all()
    assert (size[rows["answer"][shared : shared + 4]] > 0).all()  # slots and <ANS>


def test_the_vision_encoder_runs_once(model: Backbone, samples: list[Sample]) -> None:
    calls: list[object] = []
    eye = "vision_tower" if isinstance(model, InternVL) else "visual"
    hook = model.model.model.get_submodule(eye).register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        out = packed_run(model, layouts_of(METHODS["pause"], samples))
    hook.remove()
    assert len(calls) == 1
    assert len(out.packed.patches) == sum(len(s.visual.patches) for s in samples if s.visual)


def test_branches_in_words(model: Backbone) -> None:
    sample = Sample(None, "Why?", ("x", "y"), ("It is so.",), "B")
    prompt = "".join(
        [
            "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n",
            "<|im_start|>user\nWhy? Options:\nA. x\nB. y\nPlease provide only the single option letter ",
            "(e.g., A, B, C, D, etc.) within the <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n",
        ]
    )
    chain, answer, end = "<think>It is so.</think>", "<answer>B</answer>", "<|im_end|>\n"

    def written(method: object) -> dict[str, str]:
        layout = method.layout(sample, np.random.default_rng(0))
        packed, rows = pack([layout], model.encode, model.pad), branch_rows(layout, model.encode)
        supervised = {name: model.decode(packed.branches[name].target.tolist()) for name in layout.branches}
        words = {name: model.decode(packed.ids[0, rows[name]].tolist()) for name in layout.branches}
        assert all(words[name].endswith(supervised[name]) for name in words)
        return {
            name: whole.removesuffix(supervised[name]).removeprefix(prompt) + "|" + supervised[name]
            for name, whole in words.items()
        }

    teacher = {"teacher": f"|{chain}{answer}{end}"}
    student = {"speak": f"<pause><pause><COT>|{chain}{end}", "answer": f"<pause><pause><ANS>|{answer}{end}"}
    assert written(PauseDistillation(pauses=(2, 2))) == student | teacher
    assert written(PauseDistillation(mode="student", pauses=(2, 2))) == student
    assert written(PauseDistillation(mode="teacher")) == written(Explicit()) == teacher
    assert written(Silent(pauses=2)) == {"answer": student["answer"]}
    assert written(Silent(pauses=0)) == {"answer": f"<ANS>|{answer}{end}"}


def test_pauses_are_drawn_per_sample(samples: list[Sample]) -> None:
    method = PauseDistillation(pauses=(2, 5))

    def counts(seed: int, chosen: PauseDistillation = method) -> list[int]:
        rng = np.random.default_rng(seed)
        layouts = [chosen.layout(samples[0], rng) for _ in range(40)]
        assert all(layout.branches["speak"][1] is layout.branches["answer"][1] for layout in layouts)
        return [len(layout.branches["speak"][1].pieces) for layout in layouts]

    assert set(counts(0)) == {2, 3, 4, 5}
    assert counts(0) == counts(0) != counts(1)
    assert set(counts(0, PauseDistillation())) == {8}


def test_an_empty_answer_has_no_distance(model: Backbone, samples: list[Sample]) -> None:
    method = PauseDistillation()
    out = packed_run(model, layouts_of(method, [replace(samples[3], answer="")]))
    total, terms = method.loss(out)
    assert terms["distil"] == 0
    close(total, 0.5 * terms["decode"] + 0.5 * terms["answer"] + terms["teacher"])


def test_as_published_is_coded_and_flat() -> None:
    published = PauseDistillation.as_published()
    assert (published.form, published.compat, published.mode, published.pauses) == ("coded", True, "distilling", (8, 8))
    assert (PauseDistillation().form, PauseDistillation().compat) == ("paper", False)
