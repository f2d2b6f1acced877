"""`interv data`: what a spec's prompts look like to the model, before anything runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interv.cli.options import Json, Overrides, Plugin, Spec
from interv.cli.output import err, out

if TYPE_CHECKING:
    from interv.plan import PatchPlan, TracePlan, TrainPlan

EPILOG = "Example: interv data configs/ioi_heads.yaml --show 2"


def data(
    spec: Spec,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", min=1, help="How many prompts.")] = 4,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Print a sample of prompts: tokens with their positions, spans and roles, and answers."""
    from interv.errors import UsageError
    from interv.plan import CollectPlan, PatchPlan, TracePlan, TrainPlan, plan_of
    from interv.spec import load_spec
    from interv.task.left_out import told_copies

    made = plan_of(load_spec(spec, overrides or (), plugin=plugin))
    if isinstance(made, TrainPlan) and made.causal.is_vector:
        _vectors(made, show, as_json=as_json)
        return
    if made.files.tokenizer is None:
        why = "; ".join(made.files.absent)
        raise UsageError(f"{made.files.label}: no tokenizer is at hand: {why}")
    if isinstance(made, PatchPlan):
        sample = _pairs(made, show)
    elif isinstance(made, TrainPlan):
        sample = _exchanges(made, show)
    elif isinstance(made, TracePlan):
        sample = _prompts(made, show)
    else:
        assert isinstance(made, CollectPlan)
        sample = [
            {"prompt_id": t.index, "tokens": list(t.tokens), "marks": {}} for t in made.texts[:show]
        ]
    if as_json:
        out(json.dumps(sample, indent=1))
        return
    for entry in sample:
        _print(entry)
    total = len(made.texts) if isinstance(made, CollectPlan) else len(made.baselines)
    total = len(made.exchanges) if isinstance(made, TrainPlan) else total
    left_out = made.left_out if isinstance(made, PatchPlan | TracePlan) else ()
    gone = f", {len(left_out)} left out" if left_out else ""
    err(f"{total} prompts{gone}")
    for note in told_copies(left_out, total):
        err(f"note: {note}")


def _pairs(made: PatchPlan, show: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": pair.index,
            "tokens": list(pair.tokens),
            "corrupted": list(pair.corrupted_tokens),
            "marks": {name: list(positions) for name, positions in pair.spans.items()},
            "read": pair.read,
            "answers": list(pair.answers),
            "wrong": list(pair.wrong),
            "group": pair.group,
            "stand_ins": list(made.drawn.get(pair.index, ())),
        }
        for pair in list(made.pairs.values())[:show]
    ]


def _exchanges(made: TrainPlan, show: int) -> list[dict[str, Any]]:
    """Bases with their sources, and the label once the variables are exchanged."""
    assert made.files.tokenizer is not None
    decode = made.files.tokenizer.decode
    return [
        {
            "prompt_id": pair.index,
            "split": pair.split,
            "tokens": [decode(i) for i in pair.base.ids],
            "marks": {name: list(positions) for name, positions in pair.base.spans.items()},
            "answers": [pair.base.answer],
            "sources": {
                name: source.text
                for name, source in zip(made.spec.variables, pair.sources, strict=True)
                if name in pair.exchanged
            },
            "label": pair.label,
        }
        for pair in made.exchanges[:show]
    ]


def _vectors(made: TrainPlan, show: int, *, as_json: bool) -> None:
    """Values of a model of vectors, whose inputs are numbered entities."""
    from interv.plan.train import vectors_of

    pairs = vectors_of(made, "train")
    sample = [
        {
            "base": {name: values[i].item() for name, values in pairs.base.items()},
            "sources": {
                name: {key: values[i].item() for key, values in source.items()}
                for name, source, on in zip(
                    pairs.variables, pairs.sources, pairs.exchanged[i], strict=True
                )
                if on
            },
            "label": pairs.label[i].item(),
        }
        for i in range(min(show, len(pairs)))
    ]
    if as_json:
        out(json.dumps(sample, indent=1))
        return
    for i, entry in enumerate(sample):
        out(f"pair {i}  label {entry['label']!r}")
        out("  base     " + _values(entry["base"]))
        for name, values in entry["sources"].items():
            out(f"  {name} from " + _values(values))


def _values(values: dict[str, Any]) -> str:
    return "  ".join(f"{name}={value}" for name, value in values.items())


def _prompts(made: TracePlan, show: int) -> list[dict[str, Any]]:
    from interv.spec.schema import ROLES

    return [
        {
            "prompt_id": prompt.index,
            "tokens": list(prompt.tokens),
            "marks": {role: list(prompt.role(role)) for role in ROLES if prompt.role(role)},
            "answers": [prompt.answer],
        }
        for prompt in list(made.prompts.values())[:show]
    ]


def _print(entry: dict[str, Any]) -> None:
    others = entry.get("corrupted") or []
    answers = " | ".join(repr(answer) for answer in entry.get("answers", [])[:6])
    wrong = " | ".join(repr(answer) for answer in entry.get("wrong", [])[:6])
    out(f"prompt {entry['prompt_id']}" + (f"  answer {answers}" if answers else ""), end="")
    out(f"  not {wrong}" if wrong else "")
    if entry.get("stand_ins"):
        out(f"  group {entry['group']}; activations from {entry['stand_ins']}")
    width = max(len(repr(token)) for token in (*entry["tokens"], *others))
    for i, token in enumerate(entry["tokens"]):
        names = [name for name, positions in entry["marks"].items() if i in positions]
        other = ""
        if others:
            other = repr(others[i]) if others[i] != token else ""
            other = f"  {other:<{width}}"
        out(f"  {i:>3}  {token!r:<{width}}{other}  {' '.join(names)}".rstrip())
    for name, text in entry.get("sources", {}).items():
        out(f"  {name} from {text!r}")
    if "label" in entry:
        out(f"  then {entry['label']!r}")
    out()
