"""Running one spec for its reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from interv.api import Progress, carry_out, with_model
from interv.errors import IntervError, UsageError
from interv.plan import Plan, plan_of
from interv.reproduce.outcome import Outcome
from interv.spec import load_spec


def reproduce(
    path: Path,
    outputs: Path,
    *,
    download: bool = False,
    fresh: bool = False,
    plugin: Sequence[Path] | None = None,
    progress: Progress,
    say: Callable[[str], None],
) -> Outcome:
    """Run a spec, or take up its results, and compare with its reference.

    What is wrong with the spec or its run is told in the outcome, not raised, so that the other
    specs are reproduced all the same.

    Args:
        path: the spec.
        outputs: where run folders are made.
        download: fetch a hub model that is not on this machine.
        fresh: set an earlier run aside.
        plugin: a file of functions that the spec may use.
        progress, say: as `carry_out` has them.
    """
    began = time.monotonic()
    kind = name = model = ""
    claims = 0
    try:
        loaded = load_spec(path, plugin=plugin)
        spec = loaded.spec
        kind, name = spec.kind, spec.name
        claims = len(getattr(spec, "reference", ()))
        if not claims:
            raise UsageError(f"{path}: has no `reference`, so nothing can be compared")
        plan = plan_of(loaded)
        assert isinstance(plan, Plan)
        model = plan.files.label
        if plan.files.absent and not (download and plan.files.origin == "hub"):
            return Outcome(
                path, kind, name, model, "not run",
                reason="; ".join(dict.fromkeys(_why(one) for one in plan.files.absent)),
                checked=_checked(plan), claims=claims,
            )  # fmt: skip
        plan = with_model(plan)
        done = carry_out(plan, outputs, fresh=fresh, progress=progress, say=say)
    except IntervError as error:
        return Outcome(
            path, kind, name, model, "failed", reason=str(error), claims=claims,
            seconds=time.monotonic() - began, exit_code=error.exit_code,
        )  # fmt: skip
    verdicts = tuple(done.report.verdicts)
    missed = any(verdict.fails_run for verdict in verdicts)
    return Outcome(
        path,
        kind,
        name,
        model,
        "missed" if missed else "reproduced",
        claims=claims,
        verdicts=verdicts,
        folder=done.folder,
        seconds=time.monotonic() - began,
        exit_code=int(missed),
    )


def _why(absent: str) -> str:
    """What is not here, without which of the files it is said of."""
    what, _, why = absent.partition(": ")
    return why if what in ("config", "tokenizer", "weights") and why else absent


def _checked(plan: Plan) -> str:
    """How far a spec without its weights was checked."""
    if plan.cells:
        return f"validated and planned: {plan.headline}"
    return "validated; its points cannot be counted without the model's config and tokenizer"
