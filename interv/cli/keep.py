"""`interv save`, `load`, `push`, `pull`: trained interventions as folders, and on the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interv.cli.options import Json, Plugin
from interv.cli.output import out

if TYPE_CHECKING:
    from interv.keep import Trained

Folder = Annotated[Path, typer.Argument(help="The folder of a saved intervention.")]
RepoId = Annotated[str, typer.Argument(help="user/name", metavar="USER/NAME")]


def save(
    run: Annotated[Path, typer.Argument(help="The run folder of `interv train-das`.")],
    folder: Annotated[Path, typer.Argument(help="Where it goes: a new folder, or an empty one.")],
    fit: Annotated[
        str | None, typer.Option("--fit", help="Which fit, by its id; without, the best one.")
    ] = None,
    pyvene: Annotated[
        bool, typer.Option("--pyvene", help="Also the files that pyvene loads.")
    ] = False,
    plugin: Plugin = None,
) -> None:
    """Keep a trained intervention: weights as safetensors, JSON, and a model card."""
    from interv.errors import UsageError, nearest
    from interv.keep import read, write
    from interv.keep.card import CARD, card
    from interv.storage import write_atomically

    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder}: is not empty; name a new folder")
    fits = sorted(path.parent.name for path in run.glob("fits/*/intervention.json"))
    if not fits:
        raise UsageError(f"{run}: is not a run folder of `interv train-das` with finished fits")
    if fit is not None and fit not in fits:
        near = nearest(fit, fits)
        raise UsageError(
            f"--fit {fit}: {run} has no such fit; it has {', '.join(fits[:8])}"
            + (f"; did you mean '{near}'?" if near else "")
        )
    trained = {name: read(run / "fits" / name) for name in ([fit] if fit else fits)}
    name = max(trained, key=lambda key: _accuracy(trained[key]))
    write(folder, trained[name])
    how = f"interv train-das spec.yaml  # {trained[name].about.get('name', '')}, fit {name}"
    write_atomically(folder / CARD, card(trained[name], how).encode())
    spec = run / "spec.yaml"
    if spec.is_file():
        write_atomically(folder / "spec.yaml", spec.read_bytes())
    if pyvene:
        _write_pyvene(run, folder, trained[name], plugin)
    out(str(folder))


def _accuracy(trained: Trained) -> tuple[bool, float]:
    """Whether there is more to it than whole states; its held-out accuracy."""
    results = trained.about.get("results")
    value = results.get("iia") if isinstance(results, dict) else None
    learned = any(part.intervention.name != "vanilla" for part in trained.parts)
    return learned, float(value) if value is not None else -1.0


def _write_pyvene(run: Path, folder: Path, trained: Trained, plugin: Sequence[Path] | None) -> None:
    from interv.errors import UsageError
    from interv.keep.pyvene import write_pyvene
    from interv.plan import make_train_plan
    from interv.spec import load_spec

    loaded = load_spec(run / "resolved.yaml", kind="train-das", plugin=plugin)
    made = make_train_plan(loaded, only_check=True)
    if made.anatomy is None or made.shape is not None:
        raise UsageError(f"--pyvene: {made.files.label} is no model that pyvene loads by a name")
    write_pyvene(folder, trained, made.anatomy)


def load(folder: Folder, as_json: Json = False) -> None:
    """Check a saved intervention, its own format or pyvene's, and say what it is."""
    trained = _read(folder)
    if as_json:
        out(json.dumps(_told(trained), indent=1))
        return
    for part in _told(trained)["parts"]:
        where = part["component"] + (f" {part['layer']}" if part["layer"] is not None else "")
        at = "all positions" if part["position"] is None else f"position {part['position']}"
        out(f"{part['type']} at {where}, {at}, for {part['variable']}")
    for name, value in _told(trained)["about"].items():
        out(f"  {name}: {value}")


def _read(folder: Path) -> Trained:
    from interv.keep import read
    from interv.keep.format import JSON
    from interv.keep.pyvene import read_pyvene

    if not (folder / JSON).is_file() and (folder / "config.json").is_file():
        return read_pyvene(folder)
    return read(folder)


def _told(trained: Trained) -> dict[str, Any]:
    return {
        "parts": [
            {
                "type": part.intervention.name,
                "component": part.site.component,
                "layer": part.site.layer,
                "heads": part.site.heads,
                "dims": part.site.dims,
                "position": part.unit,
                "variable": part.variable,
            }
            for part in trained.parts
        ],
        "about": dict(trained.about),
    }


def push(
    folder: Folder,
    repo_id: RepoId,
    private: Annotated[bool, typer.Option("--private", help="Others may not see it.")] = False,
) -> None:
    """Send a saved intervention to the hub; you must be logged in there."""
    from interv.keep.hub import push as send

    out(send(folder, repo_id, private=private))


def pull(
    repo_id: RepoId,
    folder: Annotated[Path, typer.Argument(help="Where it goes.")],
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit.")
    ] = None,
) -> None:
    """Fetch a saved intervention from the hub; no pickle is read that is more than weights."""
    from interv.keep.hub import pull as fetch

    fetch(repo_id, folder, revision)
    _read(folder)
    out(str(folder))
