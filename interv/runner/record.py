"""The run record: what computed a result, and how to compute it again. Always on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil

from interv.spec.run import RunSection

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


def environment(
    device: str, threads: int, executor: str, max_tokens: int, *, deterministic: bool
) -> dict[str, Any]:
    """What may change the last bits of a result: resuming under another is refused."""
    import torch

    from interv.version import __version__

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "interv": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "device": gpu or device,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "executor": executor,
        "max_tokens": max_tokens,
        "deterministic": deterministic,
    }


def provenance() -> dict[str, Any]:
    """Where and by what the run was started; changes no result."""
    return {
        "command": sys.argv,
        "host": platform.node(),
        "system": platform.platform(),
        "git": _git(),
        "packages": dict(
            sorted({d.name: d.version for d in importlib.metadata.distributions()}.items())
        ),
    }


def _git() -> dict[str, Any] | None:
    """Return the working folder's commit and whether it has changes; None outside git.

    A repository's own configuration may name programs that `git status` runs (a file system
    monitor, clean filters, those of its submodules): none of them runs here. A file whose
    filter is left out and whose time stamp changed counts as a change.
    """
    commit = _ask_git("rev-parse", "HEAD")
    if commit is None:
        return None
    off = ["-c", "core.fsmonitor=false"]
    for key in (_ask_git("config", "--name-only", "--get-regexp", r"^filter\.") or "").split("\n"):
        if key.endswith((".clean", ".process", ".smudge")):
            off += ["-c", f"{key}="]
        elif key.endswith(".required"):
            off += ["-c", f"{key}=false"]
    status = _ask_git(*off, "status", "--porcelain", "--ignore-submodules=all")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _ask_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            capture_output=True, text=True, timeout=10, check=True, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def settings(run: RunSection) -> Iterator[int]:
    """Within: torch's CPU threads and algorithms are as a spec's `run` has them.

    Afterwards they are as before: a process may run several specs. Gives the number of threads.
    """
    import torch

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        if run.deterministic:
            # CUDA's matrix products need it set before the first of them.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
