"""`interv inspect`: which components a model has, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interv.cli.options import Json
from interv.cli.output import out

if TYPE_CHECKING:
    from interv.models.anatomy import Anatomy

EPILOG = "Example: interv inspect smollm2-135m"


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="smollm2-135m, a hub name, ./a/folder, ./a/config.json or ./a/file.gguf",
            show_default=False,
        ),
    ] = None,
    support: Annotated[
        bool, typer.Option("--support", help="All families: which components each has.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List a model's components: module, shape, heads, and where a fast row starts.

    Works from the config alone.
    """
    from interv.errors import UsageError

    if support:
        _show_support(as_json=as_json)
        return
    if model is None:
        raise UsageError("which model? `interv inspect smollm2-135m`, or --support for all")
    anatomy, label = _anatomy(model)
    _show_model(anatomy, label, as_json=as_json)


def _anatomy(word: str) -> tuple[Anatomy, str]:
    from interv.errors import ModelError, UsageError
    from interv.models import locate
    from interv.models.anatomy import Anatomy
    from interv.models.fetch import fetch
    from interv.spec.schema import ModelSection, bare_model

    by_config = word.endswith(".json")
    if not word:
        raise UsageError("which model? its name is empty")
    if by_config:
        section = ModelSection(config=_read_config(Path(word)))
    else:
        section = ModelSection.model_validate(bare_model(word))
    try:
        files = locate(section, 0)
    except ModelError as error:
        # As in a spec: what was written is wrong.
        raise UsageError(str(error)) from None
    if files.facts is None and files.origin == "hub":
        fetch(section, weights=False)
        files = locate(section, 0)
    if files.facts is None:
        raise ModelError(f"{files.label}: {'; '.join(files.absent)}")
    config = dict(files.config or {})
    family = files.facts.family
    if family is None:
        # Not in the table: a copy of two layers tells where things stand.
        from interv.engine.sample import from_config

        family = from_config(config)
    return Anatomy(family, files.facts, config), word if by_config else files.label


def _read_config(path: Path) -> dict[str, Any]:
    from interv.errors import UsageError

    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise UsageError(f"{path}: {reason}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is not a config.json")
    return found


def _show_model(anatomy: Anatomy, label: str, *, as_json: bool) -> None:
    from interv.models.support import component_facts, shape_of

    assert anatomy.facts is not None and anatomy.family is not None
    lines = component_facts(anatomy)
    if as_json:
        document = {
            "model": label,
            "family": anatomy.family.name,
            "note": anatomy.family.note,
            "shape": shape_of(anatomy.facts),
            "components": [line.as_dict() for line in lines],
        }
        out(json.dumps(document, indent=1))
        return
    facts = anatomy.facts
    out(
        f"{label} ({anatomy.family.name}): {facts.n_layers} layers, width {facts.d_model}, "
        + (
            f"{facts.n_heads} heads of {facts.d_head}, {facts.n_kv_heads} for keys and values, "
            if facts.n_heads
            else "no heads, "
        )
        + f"{facts.d_mlp} neurons a layer, {facts.vocab_size:,} tokens"
    )
    if anatomy.family.note:
        out(anatomy.family.note)
    out(f"The suffix executor starts a row {lines[0].fast}.")
    out("Any module's .input and .output, by its path, are components too.")
    rows = [("component", "shape", "module")]
    for line in lines:
        shape = "queries x keys" if line.side == "pattern" else str(line.width)
        if line.heads:
            shape = f"{line.heads} x {line.head_width or shape}"
        rows.append((line.component, shape, f"{line.module}.{line.side}"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        out(f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip())


def _show_support(*, as_json: bool) -> None:
    from interv.models.support import counts, support

    table = support()
    if as_json:
        out(json.dumps(table, indent=1))
        return
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    families = list(table)
    out("P: the suffix executor starts at layer and position; L: at the layer; R: full")
    for i, family in enumerate(families):
        out(f"{'  |' * i}  {family}")
    marks = {"positions": "P", "layers": "L", "nothing": "R"}
    for name in names:
        cells = [marks[table[f][name]] if name in table[f] else "." for f in families]
        out("  " + "  ".join(cells) + f"  {name}")
    n_families, pairs, fast = counts()
    out(
        f"{n_families} families, {pairs} pairs of family and component, {fast} of them from the "
        "changed position on; other causal models are recognised by their modules"
    )
