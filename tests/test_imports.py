from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CONFIGS, SPECS

PROBE = """
import atexit, sys
def tell():
    heavy = [m for m in ("torch", "transformers", "pandas", "matplotlib") if m in sys.modules]
    print("HEAVY", heavy, file=sys.stderr)
atexit.register(tell)
from interv.cli import main
sys.argv[0] = "interv"
main()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["trace", "--help"],
        ["schema"],
        ["validate", *map(str, SPECS)],
        ["plan", str(CONFIGS / "rome.yaml")],
        ["trace", str(CONFIGS / "rome.yaml"), "--plan"],
    ],
    ids=lambda a: " ".join(Path(x).name for x in a),
)
@pytest.mark.model
def test_what_is_checked_before_a_run_imports_no_torch(
    arguments: list[str], environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr


def test_importing_the_package_is_light() -> None:
    code = "import interv, sys; assert not {'torch', 'pydantic', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_sorted_and_there() -> None:
    import importlib

    for name in ("interv", "interv.errors", "interv.engine", "interv.models", "interv.plan",
                 "interv.spec", "interv.task"):  # fmt: skip
        module = importlib.import_module(name)
        # Constants first, as ruff has it.
        assert sorted(module.__all__, key=lambda n: (not n.isupper(), n)) == module.__all__
        assert all(hasattr(module, n) for n in module.__all__)
