"""Work that halves itself where memory does not suffice."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from interv.errors import EngineError

T = TypeVar("T")
R = TypeVar("R")

# As allocators say it: torch on Linux ("can't allocate memory"), on Windows ("not enough memory"),
# on CUDA, XPU and MPS ("out of memory"), cuBLAS and cuDNN ("..._ALLOC_FAILED"), mmap and the
# standard library of C ("Cannot allocate memory"), that of C++ ("std::bad_alloc").
_SAID = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "bad_alloc",
)


class OutOfMemoryError(EngineError):
    """An allocation failed in work that is not halved any further."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by whichever allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def halving(items: Sequence[T], do: Callable[[Sequence[T]], Iterable[R]]) -> list[R]:
    """Return what `do` gives for all items, in halves where it runs out of memory.

    Args:
        items: what to do it to.
        do: gives results in the items' order; no item's depends on which others are there.

    Raises:
        OutOfMemoryError: a single item does not fit.
    """
    try:
        return list(do(items))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(items) <= 1:
            raise out_of_memory(error) from error
    # Here the error is gone, and with it the frames that hold the tensors it was raised among.
    release()
    middle = len(items) // 2
    return halving(items[:middle], do) + halving(items[middle:], do)


def out_of_memory(error: BaseException) -> OutOfMemoryError:
    """Return the error of work that is not halved any further."""
    if isinstance(error, OutOfMemoryError):
        return error
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OutOfMemoryError(
        f"out of memory, and this work goes no further in halves ({said}): free some, or take "
        "shorter prompts, a narrower model.dtype or another run.device; what was finished is kept"
    )


def release() -> None:
    """Give back memory that nothing uses: what only cycles hold, and what a GPU's cache does."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
