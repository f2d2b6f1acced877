"""`make bench`: the same cells by interv and by its peers, on the default model.

One process for each peer, case and round, two threads, the peers in turn. interv computes every
cell; slow peers a seeded sample, scaled to all, with the clean runs of each prompt timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from tests.bench import chart, results
from tests.bench.cases import CASES, Case, Kind
from tests.bench.peers.common import THREADS
from tests.bench.peers.interv_peer import check_tokens, default_folder
from tests.bench.results import OURS, Measured

PYTHON = Path(".venv-bench/bin/python")
REFERENCE = "interv_reference"
ESTIMATE = "hooks_attribution"
"""With whose estimates those of others are compared: plain autograd."""
MODULES = {
    (OURS, "sweep"): "interv_peer",
    (OURS, "trace"): "interv_peer",
    (OURS, "paths"): "interv_peer",
    (OURS, "screen"): "interv_peer",
    ("hooks", "paths"): "hooks_paths",
    ("pyvene", "paths"): "pyvene_paths",
}
"""Of a peer and a kind of case; else a module has the peer's own name."""
APART = ("nnsight_serial", "nnsight_batched", "transformer_lens")
"""Peers of the environment that `make peers` makes, so that interv's own stays small."""

# Cells of a round, None for all; a peer takes part in the kinds of cases that it names. Cells of
# a trace are ten rows each. Of the head-to-head paths 36 are one sender in each of four prompts.
SAMPLES: dict[str, dict[Kind, int | None]] = {
    OURS: {"sweep": None, "trace": None, "paths": None, "screen": None},
    "hooks": {"sweep": 64, "trace": 9, "paths": 72},
    "authors": {"trace": 9},
    "pyvene": {"sweep": 24, "trace": 3, "paths": 36},
    "nnsight_serial": {"sweep": 24, "trace": 6},
    "nnsight_batched": {"sweep": 96, "trace": 9},
    "transformer_lens": {"sweep": 8, "trace": 3},
    "interv_attribution": {"screen": None},
    "hooks_attribution": {"screen": None},
}
REFERENCE_CELLS: dict[Kind, int | None] = {"sweep": 128, "trace": 18, "paths": 144, "screen": 128}

# Threads that wait for each other give their core up after some microseconds: of no effect on a
# quiet machine; on a busy one a forward is otherwise ten times slower, and not by a like factor
# for all.
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "MKL_NUM_THREADS": str(THREADS),
    "GOMP_SPINCOUNT": "10000",
    "HF_HUB_OFFLINE": "1",
}
BUSY = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, help="of a peer at most so many: no measurement")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder")
    args = parser.parse_args()
    asked = {p for p in args.peers for name in args.cases if _takes_part(p, CASES[name])}
    if asked & set(APART) and not PYTHON.exists():
        sys.exit(f"{PYTHON} is not there: run `make peers`, or leave --peers")
    check_tokens()
    began = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(default_folder(), args.seed, args.cells)
    rows: list[dict[str, Any]] = []
    for name in args.cases:
        case = CASES[name]
        reference = bench.run(REFERENCE, case)["values"]
        estimates = bench.run(ESTIMATE, case)["values"] if case.kind == "screen" else {}
        measured = {peer: Measured() for peer in args.peers if _takes_part(peer, case)}
        for number in range(args.rounds):
            # Every other round backwards: who follows whom changes too.
            for peer in list(measured)[:: -1 if number % 2 else 1]:
                measured[peer].add(bench.run(peer, case))
        rows += results.rows(case, measured, reference, estimates)
        # What is done is kept, should a later case fail.
        pd.DataFrame(rows).to_csv(args.output / "bench.csv", index=False)
    frame = pd.DataFrame(rows)
    versions = ", ".join(f"{k} {v}" for k, v in sorted(bench.versions.items()))
    how = f"smollm2-135m in float32, {THREADS} CPU threads, median of {args.rounds} rounds"
    caption = f"{how}\n{versions}"
    if OURS in args.peers:
        chart.draw(frame, caption, args.output / "bench.png")
    Console(width=120).print(results.table(frame, caption))
    busy = frame[frame["other_cores"] > BUSY]
    if len(busy):
        bench.say(
            f"{len(busy)} of {len(frame)} medians were taken while other processes used more than "
            f"{BUSY} of a core (column other_cores): those are no measurements; run it alone"
        )
    if args.cells is not None:
        bench.say(
            "--cells: interv's forwards were not full, and what it computes once for all cells was "
            "scaled like the rest: this shows that all of it runs and agrees, not how fast"
        )
    bench.say(f"{args.output}/bench.csv, bench.png; {(time.monotonic() - began) / 60:.0f} minutes")


class Bench:
    """Starts the peers' processes; keeps the versions that they ran."""

    def __init__(self, folder: Path, seed: int, cells: int | None) -> None:
        self._folder, self._seed, self._cells = folder, seed, cells
        self._console = Console(stderr=True)
        self.versions: dict[str, str] = {}

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def run(self, peer: str, case: Case) -> dict[str, Any]:
        """One process's result: a round of a peer on a case."""
        python = str(PYTHON) if peer in APART else sys.executable
        module = MODULES.get((peer, case.kind), peer)
        command = [python, "-m", f"tests.bench.peers.{module}", case.name]
        command += ["--model", str(self._folder), "--seed", str(self._seed)]
        size = (REFERENCE_CELLS if peer == REFERENCE else SAMPLES[peer])[case.kind]
        sizes = [n for n in (size, self._cells) if n is not None]
        if sizes:
            command += ["--sample", str(min(sizes))]
        if peer == OURS:
            command += ["--rate"]
        began, others = time.monotonic(), _others()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        took = time.monotonic() - began
        result["other_cores"] = max(0.0, _others() - others) / took
        for package, version in result["versions"].items():
            if self.versions.setdefault(package, version) != version:
                sys.exit(f"{peer}: {package} {version}, others {self.versions[package]}")
        self.say(
            f"{case.name:3} {peer:18} {result['seconds'][-1]:9.1f} s for all "
            f"({result['cells']} cells run; {took:.0f} s in all; "
            f"others took {result['other_cores']:.1f} cores)"
        )
        return result


def _others() -> float:
    """Seconds of all cores that went to other processes than the peers, where that is known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return busy - own.ru_utime - own.ru_stime


def _takes_part(peer: str, case: Case) -> bool:
    return case.kind in SAMPLES[peer]


if __name__ == "__main__":
    main()
