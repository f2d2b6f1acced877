from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from interv.engine import Run, SuffixExecutor
from interv.runner.certify import certify
from tests.conftest import Result, SpecWriter


class Fake:
    """An executor whose logits are the first token id, off by `error` where the id is 7."""

    def __init__(self, error: float, spread: float = 0.0) -> None:
        self.error, self.spread = error, spread

    def logits(self, runs: list[Run], at: Sequence[int]) -> torch.Tensor:
        values = [r.ids[0] + self.error * (r.ids[0] == 7) + self.spread * len(runs) for r in runs]
        return torch.tensor(values)[:, None, None].expand(-1, len(at), 3)

    states = forget = None


RUNS = {"good": [Run((1,)), Run((2,))], "bad": [Run((7,))]}


@pytest.mark.parametrize(
    ("error", "spread", "holds"),
    [
        (0.0, 0.0, True),
        (6e-5, 0.0, True),
        (8e-5, 0.0, False),
        (0.01, 0.001, True),
        (0.1, 0.001, False),
    ],
)
def test_the_reference_own_spread_decides(error: float, spread: float, holds: bool) -> None:
    certificate = certify(Fake(error, spread), Fake(0.0, spread), RUNS, (-2, -1))
    assert certificate.holds is holds
    assert certificate.rows == 3
    if error:
        assert certificate.worst == "bad"


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
