"""configs/default_model: the papers' experiments on the default model, against independent code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from interv.spec import load_spec
from tests.conftest import CONFIGS, Result

SPECS = sorted((CONFIGS / "default_model").glob("*.yaml"))


def test_the_set_is_that_of_the_papers() -> None:
    names = {path.stem for path in SPECS}
    assert names >= {"rome_figure1", "rome_figure2", "rome_figure3", "ioi_figure3b"}
    assert names >= {"ioi_activation_patching", "ioi_das", "ioi_circuit"}
    for path in SPECS:
        claims = load_spec(path).spec.reference
        # Values of code that is not interv's, and of each tolerance the reason.
        assert any("tests.independent" in str(claim.source) for claim in claims), path
        for claim in claims:
            assert claim.because or claim.tolerance is None, claim.claim


@pytest.mark.model
@pytest.mark.published
@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_it_is_reproduced(path: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli("reproduce", path, "-o", tmp_path, "--json")
    assert result.code == 0, result.err
    [outcome] = json.loads(result.out)
    assert outcome["status"] == "reproduced"
    # Nothing is only noted here: all of it can be run.
    assert {verdict["verdict"] for verdict in outcome["verdicts"]} == {"holds"}
