"""Packing and visibility with a toy model: one id a letter, upper case for special tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.layout import Encoded, Layout, Packed, Segment, Special, marker, pack, remembered, slots, target
from engine.masks import additive, visible
from tests.rows import branch_rows, only

PAD = 0


def encode(segment: Segment) -> Encoded:
    """One id a letter; a digit is as many tokens as it says and moves the positions on by ten: a toy clip."""
    ids: list[int] = []
    positions: list[int] = []
    start = 0
    for piece in segment.pieces:
        for character in piece.name if isinstance(piece, Special) else piece:
            if character.isdigit():
                ids += [ord("v")] * int(character)
                positions += range(start, start + int(character))
                start += 10
            else:
                ids.append(ord(character))
                positions.append(start)
                start += 1
    return Encoded(ids, torch.tensor(positions, dtype=torch.long).reshape(1, -1), start)


def context(text: str) -> Segment:
    return Segment("context", (text,))


def three_branches(question: str = "2q", count: int = 2, chain: str = "uv", answer: str = "a") -> Layout:
    """A pause method in small: speak (C) sees the slots alone, answer (A) sees all, teacher writes chain and answer."""
    trunk, think = context(question), slots("P", count)
    return Layout(
        {
            "speak": (trunk, think, marker("C", sees=(think,)), target(chain), target("e")),
            "answer": (trunk, think, marker("A"), target(answer, name="answer"), target("e")),
            "teacher": (trunk, target(chain), target(answer, name="answer"), target("e")),
        }
    )


def text(packed: Packed, sample: int = 0) -> str:
    return "".join(chr(i) if i else "." for i in packed.ids[sample].tolist())


def predictions(packed: Packed, branch: str, sample: int = 0) -> list[tuple[int, str, str]]:
    """(row, target, name) of one branch and sample."""
    rows = packed.branches[branch]
    return [
        (r, chr(t), rows.names[n])
        for s, r, t, n in zip(*(x.tolist() for x in (rows.sample, rows.row, rows.target, rows.name)), strict=True)
        if s == sample
    ]


def picture(packed: Packed, sample: int = 0) -> str:
    return "\n".join("".join("#" if x else "." for x in row) for row in visible(packed)[sample].tolist())


def test_the_shared_beginning_is_stored_once() -> None:
    packed = pack([three_branches()], encode, PAD)
    assert text(packed) == "vvqPPCuveAaeuvae"
    assert packed.node[0].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9, 10]


def test_positions_run_along_each_branch() -> None:
    packed = pack([three_branches()], encode, PAD)
    #      v  v  q   P   P   C   u   v   e   A   a   e   u   v   a   e
    assert packed.positions[0, 0].tolist() == [
        0, 1, 10, 11, 12, 13, 14, 15, 16, 13, 14, 15, 11, 12, 13, 14,
    ]  # fmt: skip


def test_supervised_rows() -> None:
    packed = pack([three_branches()], encode, PAD)
    assert predictions(packed, "speak") == [(5, "u", ""), (6, "v", ""), (7, "e", "")]
    assert predictions(packed, "answer") == [(9, "a", "answer"), (10, "e", "")]
    # The teacher's first token is predicted by the question's last, though other branches lie between them.
    assert predictions(packed, "teacher") == [(2, "u", ""), (12, "v", ""), (13, "a", "answer"), (14, "e", "")]


def test_slots() -> None:
    packed = pack([three_branches(), three_branches("q", count=3)], encode, PAD)
    assert list(zip(packed.slot_sample.tolist(), packed.slot_row.tolist(), strict=True)) == [
        (0, 3), (0, 4), (1, 1), (1, 2), (1, 3),
    ]  # fmt: skip


def test_who_sees_whom() -> None:
    # rows:          v v q P P  C u v e  A a e  u v a e
    packed = pack([three_branches()], encode, PAD)
    assert picture(packed) == (
        "#...............\n"
        "##..............\n"
        "###.............\n"
        "####............\n"  # slots see the video and the question
        "#####...........\n"
        "...###..........\n"  # spoken thoughts see the slots and themselves
        "...####.........\n"
        "...#####........\n"
        "...######.......\n"
        "#####....#......\n"  # the answer sees everything before it, and not the spoken thoughts
        "#####....##.....\n"
        "#####....###....\n"
        "###.........#...\n"  # the teacher sees no slot
        "###.........##..\n"
        "###.........###.\n"
        "###.........####"
    )


def test_padding_sees_and_is_seen_by_nobody() -> None:
    long, short = three_branches(), Layout({"only": (context("q"), target("ab"))})
    packed = pack([long, short], encode, PAD)
    assert text(packed, 1) == "qab" + 13 * "."
    allowed = visible(packed)
    assert allowed[1, :3, :3].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert allowed[1].sum() == 6
    assert torch.equal(allowed[0], visible(pack([long], encode, PAD))[0])
    leading = visible(replace(packed, node=packed.node.flip(1)))[1]  # the same holds on the other side
    assert leading[-3:, -3:].sum() > 0
    assert leading[:-3].sum() == leading[:, :-3].sum() == 0


def test_a_narrowed_view_lasts_and_grows_with_its_branch() -> None:
    first, second = context("ab"), context("c")
    layout = Layout({"x": (first, second, marker("M", sees=(second,)), target("t"), marker("N"), target("u"))})
    assert picture(pack([layout], encode, PAD)).splitlines()[3:] == ["..##...", "..###..", "..####.", "..#####"]


def test_branches_part_where_their_segments_do() -> None:
    trunk, think = context("q"), slots("P", 1)
    layout = Layout({"x": (trunk, think, target("ab")), "y": (trunk, think, target("ab"))})
    packed = pack([layout], encode, PAD)
    assert text(packed) == "qPabab"  # equal segments that are not the same are not shared
    assert predictions(packed, "y") == [(1, "a", ""), (4, "b", "")]
    assert packed.positions[0, 0].tolist() == [0, 1, 2, 3, 2, 3]


def test_a_segment_may_stand_in_branches_that_parted() -> None:
    trunk, end = context("q"), target("e")
    packed = pack([Layout({"x": (trunk, target("a"), end), "y": (trunk, target("b"), end)})], encode, PAD)
    assert text(packed) == "qaebe"
    assert picture(packed).splitlines()[4] == "#..##"


def test_flat_branches_share_nothing_and_count_plainly() -> None:
    layout = three_branches()
    packed = pack([Layout(layout.branches, frozenset({"speak"}))], encode, PAD)
    assert text(packed) == "vvqPPCuve" + "vvqPPAae" + "uvae"
    assert packed.positions[0, 0, :9].tolist() == list(range(9))
    assert packed.positions[0, 0, 9:14].tolist() == [0, 1, 10, 11, 12]
    assert picture(packed).splitlines()[5] == "...###" + 15 * "."
    assert not visible(packed)[0, 9:, :9].any()


def test_a_branch_alone_is_the_same_branch() -> None:
    layout = three_branches()
    whole, rows = pack([layout], encode, PAD), branch_rows(layout, encode)
    for name in layout.branches:
        alone = pack([only(layout, name)], encode, PAD)
        assert whole.ids[0, rows[name]].tolist() == alone.ids[0].tolist()
        assert whole.positions[:, 0, rows[name]].tolist() == alone.positions[:, 0].tolist()
        assert torch.equal(visible(whole)[0][rows[name]][:, rows[name]], visible(alone)[0])
        moved = [(rows[name].index(r), t, n) for r, t, n in predictions(whole, name)]
        assert moved == predictions(alone, name)
        outside = [r for r in range(whole.ids.shape[1]) if r not in rows[name]]
        assert not visible(whole)[0][rows[name]][:, outside].any()


def test_samples_with_other_branches_and_names() -> None:
    first = Layout({"x": (context("q"), target("a", name="answer"), target("e"))})
    second = Layout({"y": (context("q"), target("z"))})
    third = Layout({"x": (context("qq"), target("b"), target("c", name="answer"))})
    packed = pack([first, second, third], encode, PAD)
    assert predictions(packed, "x", 0) == [(0, "a", "answer"), (1, "e", "")]
    assert predictions(packed, "x", 2) == [(1, "b", ""), (2, "c", "answer")]
    assert predictions(packed, "y", 1) == [(0, "z", "")]
    assert predictions(packed, "x", 1) == []


def test_empty_segments_are_stepped_over() -> None:
    packed = pack([three_branches(count=0, answer="")], encode, PAD)
    assert text(packed) == "vvqCuveAeuve"
    assert predictions(packed, "answer") == [(7, "e", "")]
    assert predictions(packed, "teacher") == [(2, "u", ""), (9, "v", ""), (10, "e", "")]
    assert "answer" in packed.branches["answer"].names
    assert picture(packed).splitlines()[3] == "...#........"
    assert packed.slot_row.numel() == 0
    packed = pack([three_branches(chain="")], encode, PAD)
    assert text(packed) == "vvqPPCeAaeae"
    assert predictions(packed, "speak") == [(5, "e", "")]
    assert predictions(packed, "teacher") == [(2, "a", "answer"), (10, "e", "")]  # not by what another branch ends with


@pytest.mark.parametrize("start", [(), (context(""),)])
def test_a_target_needs_something_before_it(start: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError, match="branch 'x' begins with a target"):
        pack([Layout({"x": (*start, target("a"))})], encode, PAD)


def test_additive_mask() -> None:
    packed = pack([three_branches(), Layout({"only": (context("q"), target("a"))})], encode, PAD)
    allowed = visible(packed)
    for dtype in (torch.float32, torch.bfloat16):
        mask = additive(allowed, dtype)
        assert mask.shape == (2, 1, 16, 16)
        assert mask.dtype == dtype
        assert torch.isfinite(mask.bfloat16()).all()  # as autocast turns it
        assert torch.equal(mask[:, 0] == 0, allowed)
        assert (mask[:, 0][~allowed] == torch.finfo(torch.bfloat16).min).all()


def test_everything_moves_to_a_device() -> None:
    moved = pack([three_branches()], encode, PAD).to("meta")
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    tensors += [x for rows in moved.branches.values() for x in vars(rows).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 20
    assert all(x.device.type == "meta" for x in tensors)


def test_segments_of_the_same_pieces_are_encoded_once():
    asked = []

    def counted(segment: Segment) -> Encoded:
        asked.append(segment.pieces)
        return encode(segment)

    layouts = [three_branches(), three_branches(answer="b")]
    once = pack(layouts, remembered(counted), PAD)
    pieces = {segment.pieces for layout in layouts for path in layout.branches.values() for segment in path}
    assert sorted(asked, key=str) == sorted(pieces, key=str)
    each = pack(layouts, encode, PAD)
    for name in ("ids", "positions", "node", "sees", "slot_sample", "slot_row"):
        assert torch.equal(getattr(once, name), getattr(each, name))
    assert all(torch.equal(once.branches[name].target, each.branches[name].target) for name in each.branches)
