"""The page's tabs as HTML: what was seen inside of one reply, in words and tables. Whatever was written is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np

from engine.ask import Reply
from engine.insight import replace, spoken
from engine.insight.inside import UNTOUCHED, Inside
from engine.page.cards import duration, mark, slotless, text, unsaid

CHANGED = "a changed clip"  # donors, by name
OTHER = "another clip"
ONE = "one pause or more"
MOVED = 0.1  # total variation from which a change counts as felt
SURE = 0.9  # confidence at which it could have stopped
COPIES, ALIKE = 0.95, 0.7  # mean cosine from which slots are called copies of each other, or much alike

THOUGHT = """What the slots say when the model speaks from them. Words that can be read off a slot need not be what the answer
is made from: that is what “Does it matter?” tests."""
LOOKED = """How much each slot attends to each moment of the clip, over all layers and heads. Dotted lines mark where the steps
of an example or a filmed clip begin. Attention says where information could come from, not what was used of it."""
TOGETHER = "It has learnt to speak from all slots together."
STRIP = "<h4>The chosen slot, frame by frame: the brighter, the more it attends</h4>"
MATTERS = """Each row puts something else in the place of the slots and asks for the answer again. Where nothing moves, the
slots do not matter for this clip. It is a test of one clip: the report over many is python -m engine insight."""
MANY = """The same answer from the first slots only. A model that was trained with one number of slots may do badly with
fewer; being sure is not being right."""
HOOD = """The hidden states themselves: how alike they are (a cosine of 1 is the same direction, 0 is unrelated, -1 is opposite),
and what each layer would say if it were the last. A word that can be read off a layer need not be used by the layers above it.
States of the last layer are those behind the final norm. The way through the layers is one of directions, lengths left out; the
large dot is the last layer."""
STRANGER = (
    "The model abstains from this clip or question: what its slots do here says nothing about those that it knows."
)


def chips(count: int, chosen: int) -> str:
    """The slots as buttons; the chosen one is pressed."""
    buttons = "".join(
        f'<button data-index="{i}" aria-pressed="{"true" if i == chosen else "false"}">{i + 1}</button>'
        for i in range(count)
    )
    return f'<div class="s-chips" role="group" aria-label="Slot">Slot {buttons}</div>' if count else ""


def lead(sentence: str) -> str:
    """What a tab shows, and what it does not."""
    return f'<p class="s-lead">{text(" ".join(sentence.split()))}</p>'


def slot_words(reply: Reply, chosen: int, steps: Sequence[str] | None = None) -> str:
    """One slot in words. steps: the true ones, where they may be told; else it is held against the written chain's."""
    inside = reply.inside
    if inside is None:
        return ""
    written = reply.explicit.text.splitlines() if reply.explicit else []
    against, whose = (steps, "true") if steps is not None else (written, "written")
    rows = []
    for title, said in (
        (f"Alone, it says<small>{TOGETHER}</small>", inside.alone),
        ("Its step decoder says", inside.taught),
    ):
        if chosen < len(said):
            place, likeness = spoken.named_best(said[chosen], against)
            best = f"most like {whose} step {place + 1}, overlap of the words (F1) {likeness:.0%}" if place >= 0 else ""
            rows.append(f"<dt>{title}</dt><dd>{text(said[chosen]) or '(nothing)'}<small>{best}</small></dd>")
    if not rows:
        rows.append("<dt>In words</dt><dd>This model was never taught to say single thoughts.</dd>")
    return f'<section class="s-slot"><h4>Slot {chosen + 1} by itself</h4><dl>{"".join(rows)}</dl></section>'


def strip(reply: Reply, chosen: int) -> str:
    """The frames, each lit where the chosen slot attends to it."""
    inside = reply.inside
    if inside is None:
        return f"<p>{_lacking(reply, 'There is nothing to show', among=False)}</p>"
    if inside.looked is None:
        why = "the picture is cut into tiles that overlap" if reply.settings["frames"] else "there is no clip"
        return f"<p>There is nothing to show: {why}.</p>"
    heat = inside.looked.patches.mean((0, 1))[chosen].numpy()  # [slices, height, width]
    most = max(float(heat.max()), 1e-12)
    shown = []
    for picture, place, seconds in zip(inside.pictures, inside.pictured, inside.moments, strict=True):
        share = f"{100 * heat[place].sum():.1f} %"
        shown.append(
            f'<figure><img src="{_lit(picture, heat[place] / most)}" alt="The clip at {seconds:.1f} s">'
            f"<figcaption>{seconds:.1f} s<b>{share}</b></figcaption></figure>"
        )
    return f'<div class="s-strip">{"".join(shown)}</div>'


def _lit(picture: np.ndarray, heat: np.ndarray) -> str:
    """A frame [height, width, 3], darkened where the heat [patches down, across], 0 to 1, is low; as a data address."""
    import cv2

    scale = 168 / picture.shape[0]
    size = (max(1, round(picture.shape[1] * scale)), 168)
    large = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    light = cv2.resize(heat.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)[..., None]
    shown = (large * (0.35 + 0.65 * light)).clip(0, 255).astype(np.uint8)
    data = cv2.imencode(".jpg", shown[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def matters(reply: Reply) -> str:
    """In words: do the slots matter for this answer, and does it follow another clip's?"""
    inside, options = reply.inside, [option.text for option in reply.options]
    if inside is None or not inside.changes:
        return f"<p>{_lacking(reply, 'Nothing can be replaced here')}</p>"
    told = [verdict(inside, options), *[STRANGER] * (not reply.familiar)]
    for name, theirs in inside.donors.items():
        said, after = (options[_best(row)] for row in (theirs, inside.changes[name]))
        whose = "the same clip with one event changed" if name == CHANGED else "another clip"
        follows = _follows(inside, options, name)
        if follows is None:
            told.append(f"The slots of {whose}, which is answered “{said}” too, prove nothing here.")
        elif follows:
            told.append(f"With the slots of {whose} the answer follows: “{said}”, that clip's own.")
        else:
            told.append(f"With the slots of {whose}, which is answered “{said}”, the answer is “{after}”: it does not follow.")  # fmt: skip
    return "".join(f"<p>{text(line)}</p>" for line in told)


def _follows(inside: Inside, options: Sequence[str], name: str) -> bool | None:
    """With that donor's slots, is the answer the donor's own? None: it is answered alike, which proves nothing."""
    rows = inside.donors[name], inside.changes[UNTOUCHED], inside.changes[name]
    said, before, after = (options[_best(row)] for row in rows)
    return None if said == before else after == said


def _lacking(reply: Reply, why: str, among: bool = True) -> str:
    """What to do about a reply whose slots can't be looked into, if anything can be done. among: options are needed too."""
    wanted = [*[ONE] * (not reply.slots), *["options to choose from"] * (among and not reply.options)]
    return slotless(reply) or f"{why}: ask with {' and with '.join(wanted) or ONE}."


def hollow(reply: Reply) -> str:
    """What stands in the place of the slots' states where there is none."""
    return "" if reply.slots else f"<p>{_lacking(reply, 'No pauses, so no slots to look into', among=False)}</p>"


def verdict(inside: Inside, options: Sequence[str]) -> str:
    """One sentence: do the slots matter for this answer? By what it becomes when nothing may look at them; where it stays what it
    is, which a guess may be by chance, by whether it follows the slots of a clip that is answered otherwise."""
    own, gone = (inside.changes[name] for name in (UNTOUCHED, "hidden"))
    now = options[_best(gone)]
    if now != options[_best(own)]:
        return f"The slots decide this answer: when nothing may look at them, it becomes “{now}”."
    before, after = (f"{max(row):.0%}" for row in (own, gone))
    if any(_follows(inside, options, name) for name in inside.donors):
        return f"The slots can decide this answer, since it follows those of a clip that is answered otherwise; but without any it stays “{now}”, {after} sure ({before} with them)."  # fmt: skip
    if distance(own, gone) >= MOVED:
        return f"The slots sway this answer but don't decide it: without them it stays “{now}”, {after} sure and not {before}."
    return f"The slots do not matter for this answer: without them it stays “{now}”, {after} sure ({before} with them)."


def meanings(inside: Inside | None) -> str:
    """What each row of the replacement test is, folded."""
    if inside is None or not inside.changes:
        return ""
    rows = "".join(
        f"<dt>{text(name)}</dt><dd>{text(said)}</dd>" for name, said in replace.meant(inside.changes).items()
    )
    return f'<details class="s-slot"><summary>What each row puts in the place of the slots</summary><dl>{rows}</dl></details>'


def many(reply: Reply) -> str:
    """In words: how many slots this answer needs."""
    inside, options = reply.inside, [option.text for option in reply.options]
    if inside is None or not inside.fewer:
        return f"<p>{_lacking(reply, 'There is nothing to count here')}</p>"
    chosen = [_best(row) for row in inside.fewer]
    last = max((n for n, best in enumerate(chosen) if best != chosen[-1]), default=-1) + 1
    since = f"From {_slots(last)} on" if last else "Without any slot, and with every number of them"
    told = f"{since}, the answer is “{options[chosen[-1]]}”."
    sure = next((n for n, row in enumerate(inside.fewer) if max(row) >= SURE), None)
    if sure is None:
        told += f" It never reaches {SURE:.0%}: a model that thinks aloud when unsure would write the chain here."
    else:
        told += f" It first reaches {SURE:.0%} with {_slots(sure)}, for “{options[chosen[sure]]}”."
    return f"<p>{text(told)}</p>"


def _slots(count: int) -> str:
    return f"{count} slot{'s' * (count != 1)}"


def lens_table(inside: Inside | None, chosen: int) -> str:
    """The likeliest word of every layer at every slot, the last layer first; the stronger, the likelier."""
    if inside is None:
        return ""
    head = "".join(f'<th scope="col" class="{_on(i, chosen)}">{i + 1}</th>' for i in range(len(inside.words[0])))
    rows = []
    for layer in range(len(inside.words) - 1, -1, -1):
        cells = []
        for i, likely in enumerate(inside.words[layer]):
            every = ", ".join(f"{_token(word)} {share:.0%}" for word, share in likely)
            word, share = likely[0]
            cells.append(
                f'<td class="{_on(i, chosen)}" title="{text(every)}" style="--s-share:{0.65 + 0.35 * share:.2f}">'
                f"{text(_token(word))}</td>"
            )
        rows.append(f'<tr><th scope="row">{layer}</th>{"".join(cells)}</tr>')
    kind = "tuned lens" if inside.tuned else "logit lens"
    return (
        f'<section class="s-slot"><h4>What each layer would say ({kind})</h4><small>Its likeliest word at every slot, the '
        f"stronger the likelier; ␣ is a blank, ⏎ a new line.</small><div class='s-lens' tabindex='0'><table>"
        f"<tr><th>layer \\ slot</th>{head}</tr>{''.join(rows)}</table></div></section>"
    )


def _token(word: str) -> str:
    """A token as it can be seen."""
    return word.strip() or ("⏎" if "\n" in word else "␣")


def _on(place: int, chosen: int) -> str:
    return "s-on" if place == chosen else ""


def collapsed(inside: Inside | None) -> str:
    """SIM-CoT's measures and their like, at the last layer."""
    if inside is None:
        return ""
    last, count = {name: float(layer[-1]) for name, layer in inside.collapse.items()}, len(inside.words[0])
    if count == 1:
        told = "One slot has no other to be like."
    elif last["cosine"] >= COPIES:
        told = "Yes: the slots are nearly copies of each other."
    elif last["cosine"] >= ALIKE:
        told = "In part: the slots are much alike."
    else:
        told = "No: the slots differ clearly from each other."
    said: dict[str, str] = {}
    if count > 1:
        said |= {
            "Effective rank": f"{last['effective_rank']:.1f} of at most {count} directions",
            "Mean cosine of two slots": f"{last['cosine']:.2f} (1 = the same direction)",
            "Mean distance of two slots": f"{last['distance']:.1f} (Euclidean)",
        }
    said |= {
        "Mean length": f"{last['norm']:.1f} embedding lengths",
        "Mean distance to the vocabulary's centre": f"{last['centre']:.1f} (Euclidean)",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in said.items())
    return f'<section class="s-slot"><h4>Have they collapsed into one? In the last layer, behind the final norm</h4><p>{told}</p><dl>{rows}</dl></section>'


def compared(replies: Mapping[str, Reply], truth: Mapping[str, object] | None = None) -> str:
    """The same question, answered by two models: a column each."""
    columns = [_column(reply, truth) for reply in replies.values()]
    rows = "".join(
        f'<tr><th scope="row">{aspect}</th>{"".join(f"<td>{column[aspect]}</td>" for column in columns)}</tr>'
        for aspect in columns[0]
    )
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in replies)
    return (
        '<section class="s-compared"><h3>Two models on the same clip</h3><div tabindex="0"><table>'
        f"<tr><td></td>{head}</tr>{rows}</table></div></section>"
    )


def _column(reply: Reply, truth: Mapping[str, object] | None) -> dict[str, str]:
    """What one model did, aspect by aspect, as HTML. A step is a token written or a thought fed back."""

    def answered(words: str) -> str:
        return (text(words) or "(nothing)") + (mark(words == truth["answer"], True) if truth else "")

    chain, inside, options = reply.explicit, reply.inside, [option.text for option in reply.options]
    sure = f", {max(option.probability for option in reply.options):.0%} sure" if reply.options else ""
    silent = reply.settings["silent"]
    no_chain = "not asked for" if reply.settings["writes"] else "none: it hasn't learnt to write one"
    felt = verdict(inside, options) if inside and inside.changes else ""
    return {
        "Silent answer": f"<b>{answered(reply.answer)}</b>{sure}" if silent else "none: it only writes its chain",
        "Slots": str(reply.slots),
        "Silent steps and time": f"{reply.generated_tokens}, {duration(reply.seconds['think'] + reply.seconds['answer'])}"
        if silent
        else "",
        "Written chain's answer": f"<b>{answered(chain.answer)}</b>{'' if silent else sure}" if chain else no_chain,
        "Written tokens and time": f"{chain.generated_tokens}, {duration(chain.seconds)}" if chain else "",
        "Thoughts": "<br>".join(map(text, reply.thoughts.splitlines())) or unsaid(reply) or "none",
        "Do its slots matter?": text(felt),
        "Notices": "<br>".join(map(text, reply.notices)),
    }


def distance(row: Sequence[float], other: Sequence[float]) -> float:
    """Total variation, 0 to 1."""
    return sum(abs(a - b) for a, b in zip(row, other, strict=True)) / 2


def _best(row: Sequence[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)
