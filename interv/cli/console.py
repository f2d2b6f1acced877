"""What people see while a command runs: all of it on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import rich.console
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from interv.text import printable

if TYPE_CHECKING:
    import pandas as pd

    from interv.plan import PatchPlan, Plan
    from interv.report.claims import Verdict

_TOP = 3
_TOP_FITS = 20
VERDICTS = {
    "holds": "holds",
    "missed": "MISSED",
    "noted": "missed (noted)",
    "outside": "not in this grid",
}
_TOP_PATCHES = 6
_SECONDS_BETWEEN_LINES = 30  # where there is no terminal for a bar


def count(number: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def titled(title: str) -> Table:
    """Return an empty table under a title."""
    return Table(title=Text(printable(title)), title_justify="left", box=SIMPLE_HEAD)


def add_row(table: Table, *cells: str) -> None:
    """Add a row whose cells are shown as they are: never as markup, never as control sequences."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


class Console:
    """stderr, or nothing at all where `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = rich.console.Console(stderr=True, quiet=quiet, highlight=False)
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, 120)

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(Text(printable(text)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that is not to be overlooked; nothing where there is no text."""
        if text:
            self._console.print(f"WARNING: {text}", markup=False, soft_wrap=True, style="bold red")

    def show(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

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

            started = told = time.monotonic()
            before = 0

            def tell(what: str, done: int, total: int) -> None:
                nonlocal told, started, before
                bar.update(
                    task, description=printable(what)[:40], completed=done, total=total or None
                )
                now = time.monotonic()
                if done < before:
                    # Another part of the work, with a pace of its own.
                    started = now
                before = done
                if bar.disable and total and now - told >= _SECONDS_BETWEEN_LINES:
                    told = now
                    left = (now - started) / max(done, 1) * (total - done)
                    self.say(f"{what}: {done:,} of {total:,}, about {left:.0f} s to go")

            yield tell

    def left_out(self, prompts: pd.DataFrame, used: str) -> None:
        """How many prompts are not among the results, with the most frequent reasons."""
        gone = prompts[~prompts[used].astype(bool)]
        if len(gone):
            reasons = gone["left_out_because"].value_counts()
            told = "; ".join(f"{n}: {reason}" for reason, n in reasons.head(3).items())
            self.say(
                f"{len(gone)} of {len(prompts)} prompts left out ({told}); all are in prompts.csv"
            )

    def top(self, summary: pd.DataFrame, made: Plan) -> None:
        """For each component the places with the largest effects, each in its best layer."""
        from interv.report.tables import by_site

        for metric, frame in summary.groupby("metric", sort=False):
            table = titled(f"{metric}: the best layer of the best places")
            for name in ("component", "layer", "place", "value", "effect (95 % interval)"):
                left = name in ("component", "place", "effect (95 % interval)")
                keep = name not in ("component", "place")
                table.add_column(
                    name, justify="left" if left else "right", no_wrap=keep, overflow="fold"
                )
            for component, _, severed, rows in by_site(frame):
                ordered = rows.sort_values("mean", ascending=metric == "rank")
                for row in (
                    ordered.drop_duplicates(["role", "pos", "token"]).head(_TOP).to_dict("records")
                ):
                    held = f" without {severed}" if severed else ""
                    place = row["role"] or f"{row['pos']} {row['token']!r}"
                    known = row["ci_low"] == row["ci_low"]
                    interval = f" ({row['ci_low']:.3f} to {row['ci_high']:.3f})" if known else ""
                    add_row(
                        table,
                        component + held,
                        str(row["layer"]),
                        place,
                        f"{row['value']:.3f}",
                        f"{row['mean']:+.3f}{interval}",
                    )
            self._console.print(table)
            clean, corrupted = frame["clean"].mean(), frame["corrupted"].mean()
            n, over = int(frame["n"].max()), frame["over"].iloc[0]
            self.say(
                f"clean {clean:.3f}, corrupted {corrupted:.3f} on {made.files.label}; effect is "
                f"value minus corrupted, over {n} {over if n > 1 else over.removesuffix('s')}"
            )

    def patches(self, summary: pd.DataFrame, made: PatchPlan) -> None:
        """For each metric, component and receiver the largest effects."""
        from interv.report.patch_tables import described

        for metric, frame in summary.groupby("metric", sort=False):
            table = titled(f"{metric}: the largest effects")
            for name in ("component", "where", "value", "effect (interval)"):
                right = name == "value"
                table.add_column(name, justify="right" if right else "left", overflow="fold")
            for (component, receiver), rows in frame.groupby(["component", "receiver"], sort=False):
                ends = f" → {receiver}" if receiver == "logits" else ""
                has_heads = rows["head"].notna().any()
                ordered = rows.reindex(rows["mean"].abs().sort_values(ascending=False).index)
                # Of a place that is patched in every layer the best one.
                places = ordered.drop_duplicates(
                    ["set", "role", "pos", "neuron", *(["layer", "head"] if has_heads else [])]
                )
                for _, row in places.head(_TOP_PATCHES).iterrows():
                    known = row["ci_low"] == row["ci_low"]
                    interval = f" ({row['ci_low']:.3f} to {row['ci_high']:.3f})" if known else ""
                    add_row(
                        table,
                        f"{component}{ends}",
                        described(row).removeprefix(f"{component} "),
                        f"{row['value']:.3f}",
                        f"{row['mean']:+.3f}{interval}",
                    )
            if len(frame):
                self._console.print(table)
                clean, corrupted = frame["clean"].mean(), frame["corrupted"].mean()
                self.say(
                    f"clean {clean:.3f}, corrupted {corrupted:.3f} on {made.files.label}; effect "
                    f"is value minus {made.relative_to}, over {int(frame['n'].max())} prompts"
                )

    def alignments(self, summary: pd.DataFrame) -> None:
        """The fits of highest accuracy on held-out pairs, with their controls."""
        from interv.report.das import labelled

        table = titled("interchange intervention accuracy, held-out pairs")
        for name in ("where", "exchanged", "trained", "whole", "random", "shuffled"):
            table.add_column(name, justify="left" if name in ("where", "exchanged") else "right")
        keys = ["component", "layer", "pos", "role", "set", "type", "rank", "exchanged"]
        fits = [rows for _, rows in summary.groupby(keys, sort=False, dropna=False)]
        best = sorted(fits, key=lambda rows: -_of(rows, "iia", "mean"))[:_TOP_FITS]
        labels = labelled([rows.iloc[0] for rows in best])
        for label, rows in zip(labels, best, strict=True):
            low, high = _of(rows, "iia", "ci_low"), _of(rows, "iia", "ci_high")
            others = [_of(rows, f"iia_{name}", "mean") for name in ("full", "random", "shuffled")]
            add_row(
                table,
                label,
                str(rows["exchanged"].iloc[0]),
                f"{_of(rows, 'iia', 'mean'):.3f} ({low:.3f} to {high:.3f})",
                *(f"{value:.3f}" if value == value else "" for value in others),
            )
        self._console.print(table)

    def findings(self, findings: Mapping[str, Any]) -> None:
        """Numbers that are no table, one line each."""
        for part, found in findings.items():
            told = found if isinstance(found, dict) else {"": found}
            words = [
                f"{name.replace('_', ' ')} {value:.3f}" if isinstance(value, float)
                else f"{name.replace('_', ' ')} {value}"
                for name, value in told.items()
            ]  # fmt: skip
            self.say(f"{part.replace('_', ' ')}: {', '.join(word.strip() for word in words)}")

    def verdicts(self, verdicts: list[Verdict]) -> None:
        """The reference's claims, each with what was found."""
        if not verdicts:
            return
        table = titled("reference")
        for name in ("claim", "found", "wanted", "verdict"):
            table.add_column(name)
        for verdict in verdicts:
            told = (verdict.claim, verdict.told, verdict.wanted)
            add_row(table, *told, VERDICTS[verdict.word])
        self._console.print(table)


def _of(rows: pd.DataFrame, metric: str, column: str) -> float:
    """A metric's number among a fit's lines; not a number where it has none."""
    found = rows.loc[rows["metric"] == metric, column]
    return float(found.iloc[0]) if len(found) else float("nan")
