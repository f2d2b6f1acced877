"""Everything that a run folder holds besides its journal, made from the journal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from interv.plan import PatchPlan, Plan, TracePlan, TrainPlan
from interv.plan.claims import grid_replaced
from interv.plan.collect import CollectPlan
from interv.report.certificate import below
from interv.report.claims import Verdict, cells_table, check_claims, verdicts_table
from interv.report.corruption import corruption
from interv.report.das import draw_train, train_report
from interv.report.figures import draw
from interv.report.fonts import without_font
from interv.report.patch import draw_patch, grid_tables, patch_report
from interv.report.reference_figures import draw_reference
from interv.report.tables import prompts_table, results_table, summary_table, to_csv
from interv.runner.folder import json_text
from interv.runner.journal import JOURNAL, Journal, read
from interv.runner.patch_steps import is_patched
from interv.runner.record import provenance
from interv.spec import LoadedSpec, Spec
from interv.spec.schema import ModelSection
from interv.storage import write_atomically
from interv.task.encoder import Encoder
from interv.version import __version__

RECORD = "run.json"


@dataclass(frozen=True)
class Report:
    """What was written, for the command to print.

    Attributes:
        used: the column of `prompts` that says which were run.
        findings: numbers that are no table, for people and for the record.
        certificate: of this session, with the share of effects that are below what it allows;
            None where nothing was certified.
        unshown: characters of tokens that no installed font has, so that figures lack them.
    """

    results: pd.DataFrame
    summary: pd.DataFrame
    prompts: pd.DataFrame
    used: str
    figures: list[str]
    verdicts: list[Verdict]
    findings: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    unshown: str = ""


def write_start(loaded: LoadedSpec[Spec], folder: Path) -> None:
    """What was asked, before anything is computed."""
    write_atomically(folder / "spec.yaml", loaded.document.text)
    write_atomically(folder / "resolved.yaml", loaded.resolved_yaml())


def write_report(plan: Plan, journal: Journal, folder: Path, record: dict[str, Any]) -> Report:
    """Tables, figures and the run record.

    Args:
        plan: what was run.
        journal: its values, complete.
        folder: the run folder.
        record: what this session adds to the record; empty where nothing was left to do.
    """
    if isinstance(plan, PatchPlan):
        made = patch_report(plan, journal)
        tables, findings, asked = made.tables, made.findings, made.asked
        for name, text in made.files.items():
            write_atomically(folder / name, text)
        drawn = draw_patch(plan, journal, made)
        used = "patched"
    elif isinstance(plan, TrainPlan):
        made = train_report(plan, journal)
        tables, findings, asked = made.tables, made.findings, made.asked
        drawn = draw_train(plan, made)
        used = "used"
    else:
        assert isinstance(plan, TracePlan)
        results = results_table(plan, journal)
        summary = summary_table(plan, journal, results)
        prompts = prompts_table(plan, journal)
        tables = {"results": results, "summary": summary, "prompts": prompts}
        traced = prompts.loc[prompts["traced"], ["p_clean", "p_corrupted"]]
        findings = {"corruption": corruption(traced.to_numpy().tolist()).as_dict()}
        asked = {"draw_seeds": plan.draw_seeds}
        drawn = iter(draw(plan, results, summary, prompts))
        used = "traced"
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", to_csv(table))
    figures = []
    (folder / "figures").mkdir(exist_ok=True)
    for name, content in drawn:
        write_atomically(folder / "figures" / name, content)
        figures.append(name)
    verdicts = check_claims(
        plan.spec.reference, tables, list(plan.spec.metric), outside=grid_replaced(plan.loaded)
    )
    if verdicts:
        write_atomically(folder / "reference.csv", to_csv(verdicts_table(verdicts)))
        cells = cells_table(verdicts)
        if len(cells):
            write_atomically(folder / "reference_cells.csv", to_csv(cells))
        for name, content in draw_reference(plan.spec.figures, verdicts):
            write_atomically(folder / "figures" / name, content)
            figures.append(name)
    certificate = record.get("certificate")
    if certificate and not isinstance(plan, TrainPlan):
        certificate = {**certificate, "effects_below": below(certificate, tables["results"])}
        record = {**record, "certificate": certificate}
    if record or not (folder / RECORD).is_file():
        document = {
            **_asked(plan),
            **asked,
            "points": len(plan.cells),
            "points_from_other_runs": len(journal.adopted),
            "notes": plan.notes,
            "prompts": len(tables["prompts"]),
            f"prompts_{used}": int(tables["prompts"][used].sum()),
            **findings,
            "environment": journal.environment,
            **journal.notes,
            "sessions": _sessions(folder, record),
        }
        write_atomically(folder / RECORD, json_text(document, 1) + "\n")
    results, summary, prompts = (tables[name] for name in ("results", "summary", "prompts"))
    # Copies that were left out have no tokens there.
    texts = (token for told in prompts.get("tokens", ()) if told for token in json.loads(told))
    return Report(
        results,
        summary,
        prompts,
        used,
        figures,
        verdicts,
        findings,
        certificate,
        without_font(texts),
    )


def write_finished(plan: Plan, folder: Path) -> bool:
    """Write the tables of a grid that is done, where what comes after it failed.

    Args:
        plan: what was run.
        folder: the run folder.

    Returns:
        Whether there is such a grid.
    """
    journal = read(folder / JOURNAL)
    if journal is None or not isinstance(plan, PatchPlan) or not is_patched(plan, journal):
        return False
    for name, table in grid_tables(plan, journal).items():
        write_atomically(folder / f"{name}.csv", to_csv(table))
    return True


def write_collect_record(plan: CollectPlan, folder: Path, record: dict[str, Any]) -> None:
    """The run record of `interv collect`."""
    journal = read(folder / JOURNAL)
    assert journal is not None
    document = {
        **_asked(plan),
        "prompts": len(plan.texts),
        "rows": plan.n_rows,
        "tensors": [wanted.name for wanted in plan.wanted],
        "environment": journal.environment,
        "sessions": _sessions(folder, record),
    }
    write_atomically(folder / RECORD, json_text(document, 1) + "\n")


def _asked(plan: Plan | CollectPlan) -> dict[str, Any]:
    """What was asked of which model."""
    tokenizer, model = plan.files.tokenizer, plan.spec.model
    told: dict[str, Any] = {
        "label": plan.files.label,
        "origin": plan.files.origin,
        "weights": plan.files.identity,
        "dtype": model.dtype,
    }
    if tokenizer is not None and isinstance(model, ModelSection):
        told |= {"tokenizer": tokenizer.identity, **Encoder(tokenizer, model).record}
    return {
        "interv": __version__,
        "kind": plan.spec.kind,
        "identity": plan.identity,
        "model": told,
        "seed": plan.spec.seed,
    }


def _sessions(folder: Path, record: dict[str, Any]) -> list[Any]:
    """Each time a command computed something for this folder, this one last."""
    before: list[Any] = []
    if (folder / RECORD).is_file():
        before = json.loads((folder / RECORD).read_text("utf-8"))["sessions"]
    return [*before, {**record, **provenance()}]
