"""What does not fit in memory is done in halves, whatever the work and whoever says so."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interv.engine.memory import OutOfMemoryError, halving, is_out_of_memory
from tests.conftest import Result, SpecWriter

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 57600000 bytes. Error code 12 (Cannot allocate memory)"
)
KINDS = {
    **dict.fromkeys(f"{name}: {what}" for name in ("suffix", "reference", "layers")
                    for what in ("logits", "states")),
    **dict.fromkeys(("gradients", "forwards of training", "a step of training")),
    **dict.fromkeys(("baseline", "pack", "attribution", "decompose", "edges", "circuit")),
    "collect": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if sys.platform != "linux":
        pytest.skip("only Linux limits a process's address space")
    above = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.short_of_memory", str(tmp_path_factory.mktemp("short"))],
        env={**os.environ, **above, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_allocator_says_no_and_the_work_is_halved(kind: str, found: Any) -> None:
    assert set(found) == set(KINDS)
    assert found[kind]["halved"] > 0
    assert found[kind]["apart"] < 1e-5


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CPU),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "unable to mmap 100001343 bytes from file <x.pt>: Cannot allocate memory (12)"
        ),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OutOfMemoryError("one row"),
    ],
)
def test_every_allocator_is_understood(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_numpy_and_torch_are_understood_here() -> None:
    for allocate in (lambda: np.empty(1 << 60, np.uint8), lambda: torch.empty(1 << 60)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), ValueError("out of memory"), OSError(errno.ENOSPC, "full")]
)
def test_other_errors_are_raised_as_they_are(error: Exception) -> None:
    calls: list[int] = []

    def broken(some: Any) -> Any:
        calls.append(len(some))
        raise error

    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught:
        halving([1, 2, 3], broken)
    assert caught.value is error
    assert calls == [3]


def test_results_keep_their_order_and_what_does_not_fit_alone_is_told() -> None:
    def at_most_two(some: Any) -> list[int]:
        if len(some) > 2 or 9 in some:
            raise RuntimeError(CPU)
        return [item * 10 for item in some]

    assert halving(range(7), at_most_two) == [0, 10, 20, 30, 40, 50, 60]
    assert halving([], at_most_two) == []
    with pytest.raises(OutOfMemoryError, match="goes no further in halves") as caught:
        halving([1, 9], at_most_two)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(CPU)])
def test_the_command_line_says_so_in_one_line(
    error: Exception,
    write_spec: SpecWriter,
    cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("interv.report.write.write_report", full)
    result = cli("trace", write_spec(), "-o", tmp_path / "out")
    assert result.code == 1
    assert "interv: out of memory" in result.err
    assert "Traceback" not in result.err
