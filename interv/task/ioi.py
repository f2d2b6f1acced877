"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from math import perm

from interv.task.templates import (
    Example,
    Filled,
    Form,
    Recipe,
    Span,
    Task,
    Template,
    Values,
    Vocabulary,
    draw,
    others,
    rotate,
    used,
)
from interv.task.words import NAMES, OBJECTS, PLACES

# Every name has a word before it, so that it is one token with its space.
_TEMPLATES = (
    "While {IO} and {S} waited outside the {PLACE}, {S} handed a {OBJECT} to",
    "On Monday {IO} and {S} met near the {PLACE}, where {S} showed a {OBJECT} to",
    "Once {IO} and {S} had left the {PLACE}, {S} sold a {OBJECT} to",
    "Yesterday {IO} and {S} came back from the {PLACE}. Before dinner {S} passed a {OBJECT} to",
    "As soon as {IO} and {S} reached the {PLACE}, {S} lent a {OBJECT} to",
    "At noon {IO} and {S} drove to the {PLACE}. On the way {S} offered a {OBJECT} to",
    "Because {IO} and {S} liked the {PLACE}, they stayed for hours, and {S} brought a {OBJECT} to",
    "Last summer {IO} and {S} often walked to the {PLACE}. One day {S} gave a {OBJECT} to",
    "Since {IO} and {S} were early at the {PLACE}, {S} took out a {OBJECT} and gave it to",
    "In the morning {IO} and {S} talked about the {PLACE}. Later {S} sent a {OBJECT} to",
    "Before {IO} and {S} went home from the {PLACE}, {S} returned a {OBJECT} to",
    "Everyone saw {IO} and {S} at the {PLACE}, and everyone saw {S} give a {OBJECT} to",
)

_TASK = Task(
    "ioi",
    "Two people; one of them gives something to whom? The name that came once.",
    "Wang et al. 2022, arXiv 2211.00593",
    ("IO", "S1", "S1+1", "S2"),
    ("swapped", "names", "s2", "flip", "exchanged", "random_names", "random_names_flip"),
)
# Names that a pair of prompts has.
_NEEDED = {
    "swapped": 2,
    "names": 5,
    "s2": 3,
    "flip": 2,
    "exchanged": 2,
    "random_names": 4,
    "random_names_flip": 4,
}


def _order(template: Template) -> str:
    """ABBA where the indirect object comes first, else BABA."""
    names = [slot for slot in template.slots if slot in ("IO", "S")]
    if names[-1] == "IO":
        raise template.error("has {IO} after both {S}", "{IO} before the second {S}")
    return "ABBA" if names[0] == "IO" else "BABA"


def _exchanged(template: Template) -> Template:
    """The template in its other order: first mentions of the two names exchanged."""
    slots = list(template.slots)
    io, s = slots.index("IO"), slots.index("S")
    slots[io], slots[s] = "S", "IO"
    return Template(template.number, template.literals, tuple(slots))


def _spans(filled: Filled, *, flipped: bool = False) -> dict[str, Span]:
    """Where the names stand; `flipped`: where they stand in the prompt that this one is beside."""
    io, (s1, s2) = filled["IO"], filled.places["S"]
    if flipped:
        io, s1 = s1, io
    after = re.compile(r"\s*(\w+|\S)").match(filled.text, s1[1])
    assert after is not None  # the second mention comes after the first
    return {"IO": io, "S1": s1, "S1+1": after.span(1), "S2": s2}


def _counterfactual(
    kind: str, template: Template, io: str, s: str, same: Values, names: Sequence[str],
    rng: random.Random,
) -> Filled:  # fmt: skip
    """The other prompt of a pair.

    `swapped` exchanges the second mention's name for the other's; `names` and `s2` break the
    repetition. The rest separate what a head says of the repeated name from what it says of its
    position (Wang et al. 2022, appendix A): `flip` keeps the name and changes the order of the
    first two, `exchanged` keeps the order and exchanges the names, `random_names` keeps the order
    of two other names.
    """
    if kind == "swapped":
        return template.fill({"IO": io, "S": (s, io), **same})
    if kind == "s2":
        return template.fill({"IO": io, "S": (s, *others(names, (io, s), rng)), **same})
    if kind == "names":
        a, b, c = others(names, (io, s), rng, 3)
        return template.fill({"IO": a, "S": (b, c), **same})
    if kind == "exchanged":
        return template.fill({"IO": s, "S": io, **same})
    if kind.startswith("random_names"):
        io, s = others(names, (io, s), rng, 2)
    if kind.endswith("flip"):
        template = _exchanged(template)
    return template.fill({"IO": io, "S": s, **same})


def _forms(
    templates: Sequence[Template], vocabulary: Vocabulary, counterfactual: str
) -> list[Form]:
    names = vocabulary.words("names", NAMES, templates, ("IO", "S"), _NEEDED[counterfactual])
    places = vocabulary.words("places", PLACES, templates, ("PLACE",))
    objects = vocabulary.words("objects", OBJECTS, templates, ("OBJECT",))

    def form(template: Template) -> Form:
        its_places = used(template, "PLACE", places)
        its_objects = used(template, "OBJECT", objects)
        label = f"{template.number} {_order(template)}"

        def make(number: int, rng: random.Random) -> Example:
            number, (io, s) = draw(number, names, 2)
            number, (place,) = draw(number, its_places)
            number, (thing,) = draw(number, its_objects)
            same = {"PLACE": place, "OBJECT": thing}
            one = template.fill({"IO": io, "S": s, **same})
            two = _counterfactual(counterfactual, template, io, s, same, names, rng)
            spans = _spans(one), _spans(two, flipped=counterfactual.endswith("flip"))
            return Example(one.text, two.text, (f" {io}",), (f" {s}",), *spans, label)

        return Form(perm(len(names), 2) * len(its_places) * len(its_objects), make)

    by_text: dict[str, Template] = {}
    for template, other in rotate(templates, 2):
        wanted = _exchanged(template) if _order(template) != ("ABBA", "BABA")[other] else template
        by_text.setdefault(wanted.text, wanted)  # both orders of one may have been given
    return [form(template) for template in by_text.values()]


IOI = Recipe(_TASK, _TEMPLATES, {"IO": 1, "S": 2, "PLACE": None, "OBJECT": None}, _forms)
