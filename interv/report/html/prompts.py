"""Prompts with their tokens, and over which of them a span or a role stands."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from interv.report.html.folder import Row, RunFolder, is_true, number

MOST_PROMPTS = 40
_USED = {"trace": "traced", "patch": "patched", "train-das": "used"}
_VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥", " ": "\N{NO-BREAK SPACE}"})


@dataclass(frozen=True)
class Token:
    position: int
    text: str
    changed: bool


@dataclass(frozen=True)
class Group:
    """Tokens beside each other that belong to the same spans."""

    names: str
    tokens: list[Token]


@dataclass(frozen=True)
class PromptView:
    """A prompt on a page.

    Attributes:
        groups: its tokens; empty where there are none.
        text: shown where there are no tokens.
        lines: what else there is to it, each with a name: plain text.
        others: tokens of its counterfactual, those that differ marked.
        left_out: why it is not among the results; empty where it is.
    """

    number: str
    text: str
    groups: list[Group]
    lines: list[tuple[str, str]]
    others: list[Group] = field(default_factory=list)
    left_out: str = ""


def tokens_of(row: Row) -> list[str]:
    """Texts of a prompt's tokens; none in the tables of versions before 0.1."""
    text = row.get("tokens") or ""
    return [str(token) for token in json.loads(text)] if text.startswith("[") else []


def spans_of(row: Row) -> dict[str, list[int]]:
    """Positions of each of a prompt's spans or roles."""
    text = row.get("spans") or ""
    return dict(json.loads(text)) if text.startswith("{") else {}


def groups_of(
    tokens: Sequence[str], spans: Mapping[str, Sequence[int]], other: Sequence[str] = ()
) -> list[Group]:
    """Tokens in order, those beside each other with the same spans together."""
    found: list[Group] = []
    for i, token in enumerate(tokens):
        names = ", ".join(name for name, at in spans.items() if i in at).replace("_", " ")
        changed = bool(other) and i < len(other) and other[i] != token
        shown = Token(i, token.translate(_VISIBLE), changed)
        if found and found[-1].names == names:
            found[-1].tokens.append(shown)
        else:
            found.append(Group(names, [shown]))
    return found


def prompt_views(run: RunFolder) -> list[PromptView]:
    """The first prompts of a run, or of each split; of activations and vectors there are none."""
    rows = run.table("prompts.csv")
    if run.kind not in _USED or (rows and "prompt_id" not in rows[0]):
        return []
    make = {"trace": _traced, "patch": _patched, "train-das": _exchanged}[run.kind]
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.get("split", ""), []).append(row)
    each = MOST_PROMPTS // max(1, len(splits))
    return [make(row) for some in splits.values() for row in some[:each]]


def left_out(run: RunFolder) -> list[tuple[str, int]]:
    """Why prompts were left out, and how many for each reason."""
    rows = run.table("prompts.csv")
    if run.kind not in _USED or not rows or "prompt_id" not in rows[0]:
        return []
    used = _USED[run.kind]
    gone = [row for row in rows if not is_true(row[used])]
    return Counter(_reason(row) for row in gone).most_common()


def _reason(row: Row) -> str:
    """Why, without the word that is another for each prompt."""
    reason = row.get("left_out_because") or "the model gets them wrong"
    return reason.partition(" is '")[0].partition(' is "')[0] + (
        " is another" if reason.startswith("the model's top answer") else ""
    )


def _percent(text: str) -> str:
    return f"{number(text):.3g}"


def _traced(row: Row) -> PromptView:
    lines = [
        ("answer", row["answer"]),
        (
            "probability",
            f"{_percent(row['p_clean'])} clean, {_percent(row['p_corrupted'])} corrupted",
        ),
    ]
    return PromptView(
        row["prompt_id"],
        row["prompt"],
        groups_of(tokens_of(row), spans_of(row)),
        [*lines, ("top answer", row["top"])],
        left_out="" if is_true(row["traced"]) else row["left_out_because"] or "not traced",
    )


def _patched(row: Row) -> PromptView:
    tokens, others = tokens_of(row), json.loads(row.get("corrupted_tokens") or "[]")
    lines = []
    if (others and not tokens) or (not others and row["corrupted_prompt"] not in ("", "nan")):
        lines.append(("corrupted", row["corrupted_prompt"]))
    told = {"answer": row["answer"], "wrong": row["wrong"], "top answer": row["top"]}
    lines += [(name, text) for name, text in told.items() if text not in ("", "nan")]
    for column in row:
        if column.startswith("clean_") and row[column] not in ("", "nan"):
            of = column.removeprefix("clean_")
            values = f"{_percent(row[column])} clean, {_percent(row[f'corrupted_{of}'])} corrupted"
            lines.append((of.replace("_", " "), values))
    return PromptView(
        row["prompt_id"],
        row["prompt"],
        groups_of(tokens, spans_of(row)),
        lines,
        groups_of(others, {}, tokens),
        "" if is_true(row["patched"]) else row["left_out_because"] or "not patched",
    )


def _exchanged(row: Row) -> PromptView:
    sources = [
        (f"source of {column.removeprefix('source_')}", text)
        for column, text in row.items()
        if column.startswith("source_") and text not in ("", "nan")
    ]
    lines = [*sources, ("exchanged", row["exchanged"]), ("answer", row["answer"])]
    return PromptView(
        f"{row['prompt_id']}, {row['split']}",
        row["base"],
        groups_of(tokens_of(row), spans_of(row)),
        [*lines, ("after the exchange", row["label"])],
        left_out="" if is_true(row["used"]) else "the model gets it wrong",
    )
