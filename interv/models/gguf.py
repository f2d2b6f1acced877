"""GGUF files without torch: their config and tokenizer, as the JSON files of a hub model.

transformers' tables of GGUF need torch: a process of its own reads them, once for each file
(`interv.engine.gguf.write_facts`). The weights are dequantised in `interv.engine.gguf` too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from interv.errors import ModelError
from interv.models.cache import cached, text_hash

_VERSION = 4
"""Raised when the same file comes to mean other facts or weights."""

_READERS = ("transformers", "gguf", "tokenizers")
_CALL = """\
import sys
from interv.engine.gguf import write_facts
from interv.errors import ModelError
try:
    write_facts(*sys.argv[1:])
except ModelError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""


def cache_key(sha256: str, what: str) -> str:
    """Name of a cache folder made from a GGUF file: by its hash and by all that reads it."""
    versions = [importlib.metadata.version(name) for name in _READERS]
    return f"gguf/{sha256[:16]}-{what}-{text_hash(json.dumps([_VERSION, versions]))[:8]}"


def unpack(path: Path, sha256: str) -> Path:
    """The cache folder with config.json and the tokenizer's files of a GGUF file.

    Raises:
        ModelError: the file is not GGUF, not a language model's, or not one that can be loaded.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path}: is not a GGUF file: it does not begin with GGUF")

    def build(folder: Path) -> None:
        package = str(Path(__file__).parents[2])
        places = [package, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CALL, str(path.resolve()), str(folder)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode == 3:
            raise ModelError(done.stderr.strip())
        if done.returncode:
            last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ModelError(f"{path}: cannot be read: {last[-1]}")

    return cached(cache_key(sha256, "facts"), build)
