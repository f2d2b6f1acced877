"""A model card: what was trained, what it is worth, how to load it and how to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from interv.engine.adapters import Lora
from interv.engine.dictionaries import Autoencoder, EditLatents, JumpReLUAutoencoder
from interv.engine.interventions import Intervention
from interv.engine.masks import BoundlessRotatedSpace, SigmoidMask, SigmoidMaskRotatedSpace
from interv.engine.rotations import LowRankRotatedSpace, PCARotatedSpace, RotatedSpace
from interv.keep.format import Part, Trained

CARD = "README.md"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def card(trained: Trained, how: str) -> str:
    """README.md of a trained intervention.

    Of `about` it shows, where they are there, `model` (a name, or a mapping with `name`),
    `results` (rows, or one mapping of numbers), `spec` and `versions`.

    Args:
        trained: the intervention.
        how: the command that makes it again.
    """
    about = trained.about
    kinds = list(dict.fromkeys(part.intervention.name for part in trained.parts))
    front: dict[str, Any] = {
        "library_name": "interv",
        "tags": ["interv", "causal-intervention", "interpretability", *kinds],
    }
    model = _model(about)
    if model and _HUB_NAME.fullmatch(model):
        front["base_model"] = model
    variables = list(dict.fromkeys(part.variable for part in trained.parts))
    named = ", ".join(f"`{' '.join(v.split())}`" for v in variables)
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {' and '.join(kinds) or 'nothing'}{f' in {_inline(model)}' if model else ''}",
        "A trained intervention on activations, made by `interv`"
        + (f" for the variable{'s' if len(variables) > 1 else ''} {named}." if named else "."),
    ]
    if results := _results(about.get("results")):
        parts += ["## Result", results]
    parts += ["## Where it acts", _table([_place(part) for part in trained.parts])]
    parts += [
        "## How to load it",
        _code("sh", "interv pull USER/NAME FOLDER\ninterv load FOLDER"),
        "In Python:",
        _code(
            "python",
            "from pathlib import Path\n\nfrom interv.keep import read\n\n"
            'trained = read(Path("FOLDER"))\n'
            "for part in trained.parts:\n"
            "    print(part.site, part.unit, part.variable, part.intervention)",
        ),
        "Its tensors are in `intervention.safetensors`; `intervention.json` says what they are.",
        "## How to make it again",
        _code("sh", how),
    ]
    if spec := about.get("spec"):
        text = spec if isinstance(spec, str) else _yaml(spec)
        parts += ["with the spec", _code("yaml", text.rstrip("\n"))]
    if isinstance(versions := about.get("versions"), Mapping):
        parts += ["## Versions", _table([{"package": k, "version": versions[k]} for k in versions])]
    return "\n\n".join(parts) + "\n"


def _model(about: Mapping[str, Any]) -> str | None:
    model = about.get("model")
    if isinstance(model, Mapping):
        model = model.get("name") or model.get("label")
    return model if isinstance(model, str) else None


def _results(results: object) -> str:
    if isinstance(results, Mapping):
        return _table([{"measure": key, "value": value} for key, value in results.items()])
    if isinstance(results, Sequence) and all(isinstance(row, Mapping) for row in results):
        return _table(results)
    return ""


def _place(part: Part) -> dict[str, Any]:
    site, unit = part.site, part.unit
    return {
        "component": site.component,
        "layer": site.layer,
        "position": "all" if unit is None else unit,
        "heads": "all" if site.heads is None else ", ".join(map(str, site.heads)),
        "columns": "all" if site.dims is None else _some(site.dims),
        "variable": part.variable,
        "type": part.intervention.name,
        "size": _size(part.intervention),
    }


def _some(indices: Sequence[int]) -> str:
    """`0–5` where they follow each other, else all of them, or how many if those are many."""
    if tuple(indices) == tuple(range(indices[0], indices[0] + len(indices))) and len(indices) > 2:
        return f"{indices[0]}–{indices[-1]}"
    return ", ".join(map(str, indices)) if len(indices) <= 8 else f"{len(indices)} of them"


def _size(made: Intervention) -> str:
    """How much of the site it takes."""
    match made:
        case RotatedSpace() | LowRankRotatedSpace():
            width, rank = made.rotation.shape
            return f"{rank if made.dims is None else len(made.dims)} of {width}"
        case PCARotatedSpace():
            n, width = made.components.shape
            return f"{n if made.dims is None else len(made.dims)} of {width}"
        case BoundlessRotatedSpace():
            share = float(made.boundary.boundary.detach().clamp(1e-3, 1))
            return f"{share * made.boundary.width:.1f} of {made.rotation.shape[0]}"
        case SigmoidMask() | SigmoidMaskRotatedSpace():
            return f"{int((made.mask().detach() > 0.5).sum())} of {made.mask.width}"
        case Autoencoder() | JumpReLUAutoencoder() | EditLatents():
            n = made.dictionary.shape[1]
            return f"{n if made.latents is None else len(made.latents)} of {n} latents"
        case Lora():
            return f"rank {made.adapter.down.shape[1]}"
    return ""


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table in Markdown, of all columns that some row has."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return "nothing"
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    heads = [[_inline(str(name)) for name in lines[0]], *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in heads)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list | tuple):
        return _inline(json.dumps(value, ensure_ascii=False))
    return "" if value is None else _inline(str(value))


def _inline(text: str) -> str:
    """A text that stays in its line and its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(language: str, text: str) -> str:
    """A block of code, fenced by more marks than the text has."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _yaml(value: object) -> str:
    # Through JSON: what is not a plain value becomes one, or fails as the file itself would.
    plain = json.loads(json.dumps(value))
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return text
