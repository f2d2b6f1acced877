"""What people see while a command runs: all of it on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import rich.console
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from interv.plan import Plan
    from interv.report.claims import Verdict

_TOP = 3


class Console:
    """stderr, or nothing at all where `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = rich.console.Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar on a terminal, nothing elsewhere; yields what to tell it with."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        bar = Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=self._quiet or not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task("loading the model", total=None)

            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=what[:40], completed=done, total=total or None)

            yield tell

    def top(self, summary: pd.DataFrame, made: Plan) -> None:
        """The places with the largest effect, each in its best layer, by component and metric."""
        from interv.report.tables import by_site

        metrics = list(dict.fromkeys(summary["metric"]))
        title = f"largest effects ({', '.join(metrics)})"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for name in ("component", "layer", "place", "value", "effect", "95 % interval", "n"):
            left = name in ("component", "place")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for metric, of_metric in summary.groupby("metric", sort=False):
            lower_is_better = metric == "rank"
            for *_, frame in by_site(of_metric):
                ordered = frame.sort_values("mean", ascending=lower_is_better)
                best = ordered.drop_duplicates(["role", "pos", "token"]).head(_TOP)
                for row in best.to_dict("records"):
                    severed = f" without {row['severed']}" if row["severed"] else ""
                    place = row["role"] or f"{row['pos']} {row['token']!r}"
                    interval = f"{row['ci_low']:.3f} to {row['ci_high']:.3f}"
                    table.add_row(
                        f"{row['component']}{severed}",
                        str(row["layer"]),
                        place.replace("[", r"\["),
                        f"{row['value']:.3f}",
                        f"{row['mean']:+.3f}",
                        interval if row["n"] > 1 else "-",
                        f"{row['n']} {row['over']}",
                    )
        self._console.print(table)
        clean, corrupted = summary["clean"].mean(), summary["corrupted"].mean()
        if len(metrics) == 1:
            self.say(f"clean {clean:.3f}, corrupted {corrupted:.3f} on {made.files.label}")

    def verdicts(self, verdicts: list[Verdict]) -> None:
        """The reference's claims, each with what was found."""
        if not verdicts:
            return
        table = Table(title="reference", title_justify="left", box=SIMPLE_HEAD)
        for name in ("claim", "found", "wanted", "verdict"):
            table.add_column(name)
        for verdict in verdicts:
            word = "holds" if verdict.holds else "MISSED" if verdict.fails_run else "missed (noted)"
            found = "" if verdict.found is None else f"{verdict.found:.4g}"
            if verdict.found is None and not verdict.fails_run:
                word = "not in this grid"
            table.add_row(verdict.claim.replace("[", r"\["), found, verdict.wanted, word)
        self._console.print(table)
