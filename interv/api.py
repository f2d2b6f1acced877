"""The same from Python: specs as files or mappings, results as tables, the engine on any model.

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from interv.engine import Executor
    from interv.plan import CollectPlan, Plan
    from interv.report.claims import Verdict
    from interv.report.write import Report
    from interv.runner.collect import Activations
    from interv.runner.journal import Journal

Progress = Callable[[str, int, int], None]
"""Told what is at work, how much is done, and of how much."""

P = TypeVar("P", bound="Plan | CollectPlan")


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


@dataclass(frozen=True)
class Results:
    """A finished run of `trace` or `patch`.

    Attributes:
        folder: the run folder, with all that the command writes.
        results: a row for each place, prompt and metric.
        summary: a row for each place, with means and intervals.
        prompts: every prompt, and why it was left out if it was.
        verdicts: of the spec's reference.
        record: run.json: versions, hashes, seeds, what was certified.
        findings: of `patch`: how attribution compares with patching, a circuit's scores.
    """

    folder: Path
    results: pd.DataFrame
    summary: pd.DataFrame
    prompts: pd.DataFrame
    verdicts: list[Verdict]
    record: dict[str, Any]
    findings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A run as the command line tells of it."""

    folder: Path
    report: Report
    journal: Journal
    computed: bool


def load(spec: str | Path | Mapping[str, Any], *overrides: str) -> Plan | CollectPlan:
    """Check a spec and expand it; nothing is computed.

    Args:
        spec: a YAML file, or what would stand in one (with a `name`).
        overrides: `key.key=value`, as on the command line.

    Raises:
        UsageError, SpecError: all that is wrong with it.
    """
    from interv.plan import plan_of
    from interv.spec import load_spec

    return plan_of(load_spec(spec if isinstance(spec, Mapping) else Path(spec), overrides))


def run(
    spec: str | Path | Mapping[str, Any],
    *overrides: str,
    outputs: str | Path = "outputs",
    fresh: bool = False,
) -> Results | Activations:
    """Run a spec as its command does, or take up its results where it has run already.

    Args:
        spec, overrides: as `load` has them.
        outputs: where run folders are made.
        fresh: set an earlier run of it aside, and begin again.

    Raises:
        IntervError: any of its kinds; what was computed is kept.
    """
    import json

    from interv.plan import Plan
    from interv.report.write import RECORD

    plan = with_model(load(spec, *overrides))
    if not isinstance(plan, Plan):
        from interv.runner.collect import Activations

        return Activations(carry_out_collect(plan, Path(outputs), fresh=fresh)[0])
    done = carry_out(plan, Path(outputs), fresh=fresh)
    report = done.report
    return Results(
        done.folder,
        report.results,
        report.summary,
        report.prompts,
        report.verdicts,
        json.loads((done.folder / RECORD).read_text("utf-8")),
        report.findings,
    )


def executor(
    model: nn.Module,
    kind: Literal["auto", "suffix", "reference"] = "auto",
    *,
    max_tokens: int = 1024,
    batch_dim: int = 0,
) -> Executor:
    """The engine on a model that is at hand already; it is left as it was found.

    Args:
        model: a `transformers` language model, or any module (its parts named by path). Of
            DataParallel, DistributedDataParallel, torch.compile and PEFT the model inside.
        kind: `reference` for full forwards; `suffix` for only what differs, checked against
            the reference on this model before it is handed out; `auto`: suffix where the
            model's blocks allow it and nobody has hooks on it.
        max_tokens: of one forward on the suffix executor.
        batch_dim: where a module whose inputs are not tokens has its rows.

    Raises:
        UsageError: there is no executor of this kind, or of this wrapper.
        ModelError: suffix, of a `transformers` model that is of no known type; a model that the
            installed versions compute wrongly.
        EngineError: the suffix executor was asked for and does not hold here.
    """
    from transformers import PreTrainedModel

    from interv.engine import ReferenceExecutor, SuffixExecutor, anatomy_of
    from interv.engine.hooks import foreign_hooks
    from interv.engine.wrappers import speaks, unwrapped
    from interv.errors import ModelError, UsageError
    from interv.models.anatomy import Anatomy
    from interv.models.known_faults import refuse_known_faults
    from interv.runner.certify import certify_model

    if kind not in ("auto", "suffix", "reference"):
        raise UsageError(f"no executor {kind!r}; expected auto, suffix or reference")
    model = unwrapped(model)
    anatomy = Anatomy()
    if isinstance(model, PreTrainedModel):
        refuse_known_faults(model.config.to_dict(), model.config._attn_implementation)
        try:
            anatomy = anatomy_of(model)
        except ModelError:
            # Its modules have paths all the same.
            if kind == "suffix":
                raise
    reference = ReferenceExecutor(model, anatomy, batch_dim)
    free = anatomy.reach != "nothing" and not foreign_hooks(model) and speaks(model)
    if kind == "reference" or (kind == "auto" and not free):
        return reference
    fast = SuffixExecutor(model, anatomy, max_tokens)
    certify_model(fast, reference)
    return fast


def with_model(made: P) -> P:
    """The plan, made again once its model has been fetched where it is not at hand.

    Raises:
        ModelError: it cannot be had.
    """
    from interv.errors import ModelError
    from interv.models.fetch import fetch
    from interv.plan import plan_of

    if made.files.absent and made.files.origin == "hub":
        fetch(made.spec.model)
        made = cast(P, plan_of(made.loaded))
    if made.files.absent:
        raise ModelError(f"{made.files.label}: {'; '.join(made.files.absent)}")
    return made


def carry_out(
    made: Plan,
    outputs: Path,
    *,
    fresh: bool,
    progress: Progress = _silent,
    say: Callable[[str], None] = lambda _: None,
) -> Done:
    """Run a sweep in its folder, or go on with it, and write all that comes of it."""
    from interv.report.write import write_finished, write_report

    with _folder(made, outputs, fresh=fresh, say=say) as folder:
        # Torch takes seconds to import: not before the folder is known to be ours.
        from interv.runner.kinds import kind_of
        from interv.runner.sweep import run_sweep

        try:
            outcome = run_sweep(made, kind_of(made), folder, progress, adopt=not fresh)
            report = write_report(made, outcome.journal, folder, outcome.record)
        except Exception:
            if write_finished(made, folder):
                say(f"the grid is done: {folder / 'results.csv'} has it; what follows failed")
            raise
    return Done(folder, report, outcome.journal, bool(outcome.record))


def carry_out_collect(
    made: CollectPlan,
    outputs: Path,
    *,
    fresh: bool,
    progress: Progress = _silent,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Path, bool]:
    """Save activations in the run's folder; whether anything was left to do."""
    from interv.report.write import RECORD, write_collect_record

    with _folder(made, outputs, fresh=fresh, say=say) as folder:
        from interv.runner.collect import run_collect

        record = run_collect(made, folder, progress)
        if record or not (folder / RECORD).is_file():
            write_collect_record(made, folder, record)
    return folder, bool(record)


@contextlib.contextmanager
def _folder(
    made: Plan | CollectPlan, outputs: Path, *, fresh: bool, say: Callable[[str], None]
) -> Iterator[Path]:
    """The run's folder, held for this process, with what was asked in it."""
    from interv.report.write import write_start
    from interv.runner.folder import locked, run_folder, set_aside

    assert made.identity is not None
    folder = run_folder(outputs, made.spec.name, made.identity)
    with locked(folder):
        if fresh and (old := set_aside(folder)):
            say(f"the earlier run is now {old}")
        write_start(made.loaded, folder)
        yield folder
