"""`python -m tests.bench.install`: nnsight and TransformerLens in a virtual environment apart.

They ask for the same torch and transformers as interv, whose own environment stays small.
torch comes first, at the pinned version: its CPU build, wherever pip is told to find that.
"""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

FOLDER = Path(".venv-bench")
PYTHON = FOLDER / "bin" / "python"
PACKAGES = ("nnsight==0.8.1", "transformer_lens==4.3.0")
_PINS = ".ci/constraints.txt"


def main() -> None:
    if not PYTHON.exists():
        venv.create(FOLDER, with_pip=True)
        (FOLDER / ".gitignore").write_text("*\n")
    pip = [str(PYTHON), "-m", "pip", "install", "-q", "-c", _PINS]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)
    # Fails here rather than in the middle of a bench.
    subprocess.run([PYTHON, "-c", "import nnsight, transformer_lens.model_bridge"], check=True)


if __name__ == "__main__":
    main()
