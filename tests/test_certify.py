from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interv.engine import Edit, Executor, ReferenceExecutor, Run, SuffixExecutor, anatomy_of
from interv.engine.rows import Rows
from interv.errors import EngineError
from interv.runner.certify import Certificate, Sample, certify, model_samples, wide_executors
from tests import zoo
from tests.conftest import Result, SpecWriter


class Fake:
    """An executor whose logits are the first token id, off by `error` where the id is 7.

    Args:
        spread: how much further each further row of a forward moves them.
        offset: how far all are from those of others.
    """

    def __init__(
        self,
        error: float,
        spread: float = 0.0,
        offset: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.error, self.spread, self.offset, self.dtype = error, spread, offset, dtype

    def logits(self, runs: list[Run], at: Sequence[int]) -> torch.Tensor:
        moved = self.offset + self.spread * len(runs)
        values = [r.ids[0] + (self.error if r.ids[0] == 7 else 0.0) + moved for r in runs]
        return torch.tensor(values, dtype=self.dtype)[:, None, None].expand(-1, len(at), 3)

    states = forget = None


ROWS = [
    Sample("good", Run((1,)), (-2, -1)),
    Sample("good", Run((2,)), (-2, -1)),
    Sample("bad", Run((7,)), (-1,)),
]


@pytest.mark.parametrize(
    ("error", "spread", "holds"),
    [
        (0.0, 0.0, True),
        (6e-5, 0.0, True),
        (8e-5, 0.0, False),
        (0.01, 0.001, True),
        (0.1, 0.001, False),
        (float("nan"), 0.0, False),
    ],
)
def test_the_reference_own_spread_decides(error: float, spread: float, holds: bool) -> None:
    certificate = certify(Fake(error, spread), Fake(0.0, spread), ROWS)
    assert certificate.holds is holds
    assert certificate.rows == 3
    if error:
        assert certificate.own.worst == "bad"


@pytest.mark.parametrize(
    ("wide_error", "distance", "holds"),
    [
        (0.0, 0.02, True),  # the reference itself is off by as much
        (0.0, 0.0001, False),  # it is not: that is no rounding
        (0.3, 0.02, False),  # what differs in float64 too is a fault
    ],
)
def test_float64_decides_where_float32_is_in_doubt(
    wide_error: float, distance: float, holds: bool
) -> None:
    wide = Fake(wide_error, offset=distance), Fake(0.0, offset=distance)
    certificate = certify(Fake(0.1), Fake(0.0), ROWS, lambda: wide)
    assert certificate.float64 is not None
    assert certificate.holds is holds


def test_float64_is_not_asked_without_need_and_says_why_it_cannot_be() -> None:
    def refuse() -> tuple[Executor, Executor]:
        raise EngineError("too large")

    assert certify(Fake(0.0), Fake(0.0), ROWS, refuse).not_in_float64 == ""
    certificate = certify(Fake(0.1), Fake(0.0), ROWS, refuse)
    assert (certificate.holds, certificate.not_in_float64) == (False, "too large")
    in_16_bits = [Fake(0.0, dtype=torch.bfloat16) for _ in range(2)]
    narrow = certify(*in_16_bits, ROWS, refuse)
    assert (narrow.holds, narrow.not_in_float64) == (True, "too large")


# A real fault in each component.


def shifted(edit: Edit) -> Edit:
    """The edit one position too late."""
    positions = tuple(p + 1 for p in edit.site.positions or ())
    return replace(edit, site=replace(edit.site, positions=positions), read=edit.reads)


def other_head(edit: Edit) -> Edit:
    """The edit in another head."""
    return replace(edit, site=replace(edit.site, heads=(0,)), read=edit.reads)


def wrong_source(edit: Edit) -> Edit:
    """The edit with what the source has at another position."""
    positions = tuple(p - 1 for p in edit.reads.positions or ())
    return replace(edit, read=replace(edit.reads, positions=positions))


def faulty(fault: Callable[[Edit], Edit]) -> Callable[..., Any]:
    """What the suffix executor makes of a run, with a fault in its edits."""
    plain = Rows.row

    def row(self: Rows, run: Run, *args: Any, **kwargs: Any) -> Any:
        wrong = Run(run.ids, tuple(map(fault, run.edits)))
        return replace(plain(self, wrong, *args, **kwargs), run=run)

    return row


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.bfloat16), ("llama", torch.float32)])
@pytest.mark.parametrize("fault", [shifted, other_head, wrong_source])
def test_a_fault_in_any_component_is_seen(
    fault: Callable[[Edit], Edit],
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.make(name, dtype)
    anatomy = anatomy_of(model)
    wide = wide_executors(model, anatomy)()

    def found(kind: str) -> Certificate:
        rows = [sample for sample in model_samples(anatomy) if sample.kind == kind]
        fast, slow = SuffixExecutor(model, anatomy), ReferenceExecutor(model, anatomy)
        for one in wide:
            one.forget()
        return certify(fast, slow, rows, lambda: wide)

    kinds = dict.fromkeys(sample.kind for sample in model_samples(anatomy))
    # Edits before the blocks belong to the base, which the reference runs.
    del kinds["token_embedding"]
    if fault is other_head:
        kinds = {kind: None for kind in kinds if kind.endswith("by head")}
    assert all(found(kind).holds for kind in kinds)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "row", faulty(fault))
        missed = [kind for kind in kinds if found(kind).holds]
    # Behind the blocks only the last position is read, which these swaps leave as it is.
    assert set(missed) <= {"final_norm", "logits"}
    assert len(kinds) > 8


def test_the_default_model_is_certified_by_any_number_of_threads_on_special_tokens_too() -> None:
    """Ids 3 to 9 are special ones here, and float32 itself is off by as much on them."""
    code = """
import torch, interv
from interv.engine import Edit, ReferenceExecutor, Run, Site, SuffixExecutor, Vanilla
from interv.runner import certify as C
from interv.runner.sweep import load

spec = {"kind": "collect", "name": "x", "model": "smollm2-135m", "data": {"prompts": ["a b"]},
        "grid": {"component": "block_output"}}
model = load(interv.load(spec))
torch.set_num_threads(1)
assert isinstance(interv.executor(model.module), SuffixExecutor)
base, source = tuple(range(3, 9)), Run((3, 4, 9, 6, 7, 8))
samples = [
    C.Sample(name, Run(base, (Edit(Site(name, layer, (2, 4)), Vanilla(), source),)), (-1,))
    for name in ("block_input",) for layer in (0, 29)
]
both = SuffixExecutor(model.module, model.anatomy), ReferenceExecutor(model.module, model.anatomy)
wide = C.wide_executors(model.module, model.anatomy)()
for threads in (1, 2):
    torch.set_num_threads(threads)
    for one in (*both, *wide):
        one.forget()
    found = C.certify(*both, samples, lambda: wide)
    assert found.holds, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suffix executor that is off by a thousandth."""
    right = SuffixExecutor.logits
    monkeypatch.setattr(SuffixExecutor, "logits", lambda *a, **k: right(*a, **k) + 1e-3)


@pytest.mark.usefixtures("wrong")
def test_a_wrong_executor_stops_the_run(
    write_spec: SpecWriter, cli: Callable[..., Result], tmp_path: Path
) -> None:
    result = cli("trace", write_spec(), "-o", tmp_path / "out")
    assert result.code == 1
    assert "not certified" in result.err
    assert "block_output" in result.err or "mlp_output" in result.err
    assert not list(tmp_path.glob("out/*/*/journal.jsonl"))


@pytest.mark.usefixtures("wrong")
def test_or_goes_on_with_the_reference_where_the_spec_says_so(
    write_spec: SpecWriter, cli: Callable[..., Result], tmp_path: Path
) -> None:
    path = write_spec()
    done = cli("trace", path, "run.on_uncertified=reference", "-o", tmp_path / "out")
    slow = cli("trace", path, "run.executor=reference", "-o", tmp_path / "slow")
    assert (done.code, slow.code) == (0, 0)
    one, other = (Path(r.out.strip()) / "results.csv" for r in (done, slow))
    assert one.read_bytes() == other.read_bytes()


def test_both_executors_give_the_same_table(
    write_spec: SpecWriter, cli: Callable[..., Result], tmp_path: Path, model_folder: Path
) -> None:
    import pandas as pd

    grid = [
        {"component": ["block_input", "block_output", "mlp_activation", "attention_input"]},
        {"component": ["mlp_output", "attention_output"], "window": 2},
        {"component": "block_output", "sever": "mlp_output"},
    ]
    path = write_spec(model={"path": str(model_folder), "dtype": "float64"}, grid=grid)
    tables = []
    for executor in ("suffix", "reference"):
        result = cli("trace", path, f"run.executor={executor}", "-o", tmp_path / executor)
        assert result.code == 0, result.err
        tables.append(pd.read_csv(Path(result.out.strip()) / "results.csv"))
    pd.testing.assert_frame_equal(*tables, rtol=1e-9, atol=1e-12)
    assert len(tables[0]) == 3 * 6 * 7
    assert tables[0]["effect"].std() > 1e-6
