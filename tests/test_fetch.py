"""Hub models through the real client, against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import PROMPT, SpecWriter

COMMIT = "c" * 40


class Hub:
    """The three calls of the hub that a download makes; counts what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.split("?")[0]
                if body:
                    hub.asked.append(path)
                if path.startswith("/api/models/owner/tiny"):
                    names = sorted(p.name for p in folder.iterdir())
                    siblings = [
                        {"rfilename": n, "size": (folder / n).stat().st_size} for n in names
                    ]
                    siblings.append({"rfilename": "onnx/model.onnx", "size": 1})
                    files = [
                        {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": "0" * 40}
                        for s in siblings
                    ]
                    listing = "/tree/" in path
                    info = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
                    self.send(json.dumps(files if listing else info).encode(), body, {})
                elif path.startswith("/owner/tiny/resolve/"):
                    data = (folder / path.rsplit("/", 1)[1]).read_bytes()
                    etag = hashlib.sha256(data).hexdigest()
                    self.send(data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def send(self, data: bytes, body: bool, headers: dict[str, str]) -> None:
                self.send_response(200)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(gpt2_folder: Path) -> Iterator[Hub]:
    hub = Hub(gpt2_folder)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def interv(
    arguments: list[str], address: str, home: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "interv", *arguments],
        capture_output=True,
        text=True,
        env={**environment, **settings},
        check=False,
        timeout=120,
    )


def test_a_hub_model_is_fetched_once_and_named_by_its_commit(
    hub: Hub, write_spec: SpecWriter, tmp_path: Path, environment: dict[str, str], gpt2_folder: Path
) -> None:
    path = write_spec(model="owner/tiny")
    home, outputs = tmp_path / "home", str(tmp_path / "outputs")
    checked = interv(["validate", str(path)], hub.address, home, environment)
    assert checked.returncode == 0
    assert "not checked: tokenizer" in checked.stderr
    assert hub.asked == [], "validate went to the network"
    done = interv(["trace", str(path), "-o", outputs], hub.address, home, environment)
    assert done.returncode == 0, done.stderr
    assert any(p.endswith("model.safetensors") for p in hub.asked)
    assert not any("onnx" in p for p in hub.asked if "/resolve/" in p)
    folder = Path(done.stdout.strip())
    record = json.loads((folder / "run.json").read_text())
    assert record["model"]["weights"] == f"owner/tiny@{COMMIT}"
    asked = len(hub.asked)
    again = interv(["trace", str(path), "-o", outputs, "seed=3"], hub.address, home, environment)
    assert again.returncode == 0, again.stderr
    assert len(hub.asked) == asked, "what was in the cache was fetched again"
    local = interv(
        ["trace", str(write_spec(model={"path": str(gpt2_folder)})), "-o", outputs],
        hub.address, home, environment,
    )  # fmt: skip
    assert (Path(local.stdout.strip()) / "results.csv").read_bytes() == (
        folder / "results.csv"
    ).read_bytes()


def test_a_model_that_the_hub_does_not_have(
    hub: Hub, write_spec: SpecWriter, tmp_path: Path, environment: dict[str, str]
) -> None:
    path = write_spec(model="owner/nowhere")
    done = interv(
        ["trace", str(path), "-o", str(tmp_path / "o")], hub.address, tmp_path, environment
    )
    assert done.returncode == 1
    assert "model 'owner/nowhere' is not on this machine and cannot be fetched" in done.stderr
    assert "hf download owner/nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_no_connection(write_spec: SpecWriter, tmp_path: Path, environment: dict[str, str]) -> None:
    path = write_spec(model="gpt2")
    # Port 9 of this machine: nothing listens there.
    done = interv(
        ["trace", str(path), "-o", str(tmp_path / "o")], "http://127.0.0.1:9", tmp_path, environment
    )
    assert done.returncode == 1
    assert "cannot be fetched" in done.stderr
    assert "smollm2-135m needs no connection" in done.stderr
    assert "Traceback" not in done.stderr
    assert PROMPT not in done.stderr


def test_an_adapters_base_is_fetched_with_it(
    hub: Hub, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The adapter in a folder here, its base on the hub; only what transformers reads is taken."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    named = {"peft_type": "LORA", "base_model_name_or_path": "owner/tiny", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    code = """
import sys
from interv.models import locate
from interv.models.fetch import fetch
from interv.spec.schema import ModelSection
section = ModelSection(path=sys.argv[1])
before = locate(section, 0)
assert before.origin == "hub" and before.identity is None, before
fetch(section)
after = locate(section, 0)
assert after.absent == () and after.adapter is not None, after
print(after.label, after.folder.name)
"""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapter)],
        capture_output=True,
        text=True,
        env={**environment, **settings},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["adapter", COMMIT]
