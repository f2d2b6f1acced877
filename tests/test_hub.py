"""Push and pull through the real client, against a server on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml

from interv.engine import Site
from interv.engine.masks import Boundary, BoundlessRotatedSpace
from interv.engine.rotations import Rotation
from interv.keep import Part, Trained, read, write
from interv.keep.card import card

TOKEN = "hf_good"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""

    def commit(self, changed: Mapping[str, bytes]) -> str:
        self.files = {**self.files, **changed}
        self.head = hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()
        self.commits[self.head] = self.files
        return self.head


class Hub:
    """As much of the hub as an upload and a download need: repositories, commits, LFS."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked.append(f"{self.command} {path}")
                data = self.content()
                allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, body, headers = hub.reply(self.command, path, data, allowed)
                if not isinstance(body, bytes):
                    body = json.dumps(body).encode()
                    headers = {**headers, "Content-Type": "application/json"}
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

            def content(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def reply(
        self, verb: str, path: str, data: bytes, allowed: bool
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers."""
        if verb == "PUT" and path.startswith("/lfs/"):
            assert hashlib.sha256(data).hexdigest() == path.rsplit("/", 1)[1]
            self.objects[path.rsplit("/", 1)[1]] = data
            return 200, {}, {}
        if path == "/api/validate-yaml":
            front = json.loads(data)["content"].split("---\n")[1]
            fine = isinstance(yaml.safe_load(front)["tags"], list)
            return 200 if fine else 400, {"errors": [], "warnings": []}, {}
        if verb == "POST" and not allowed:
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        name = self.name(path)
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not allowed):
            # As the hub does: nobody is told whether there is one that they may not see.
            status = 404 if allowed else 401
            return status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self.within(repository, name, path.split(name, 1)[1], data)

    def name(self, path: str) -> str:
        parts = path.removeprefix("/api/models").removesuffix(".git/info/lfs/objects/batch")
        return "/".join(parts.split("/")[1:3])

    def create(self, asked: Mapping[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.address}/{name}"
        if asked["organization"] == "others":
            return 403, {"error": "You don't have the rights"}, {}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        self.repositories[name].commit({".gitattributes": b""})
        return 200, {"url": url}, {}

    def within(
        self, repository: Repository, name: str, rest: str, data: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        kind = rest.split("/")[1] if rest.startswith("/") else rest
        if rest == ".git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        if kind == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "regular" if f["path"].endswith((".json", ".md")) else "lfs",
                    "shouldIgnore": False,
                }
                for f in json.loads(data)["files"]
            ]
            return 200, {"files": files}, {}
        if kind == "commit":
            changed = {}
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    changed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "lfsFile":
                    changed[entry["value"]["path"]] = self.objects[entry["value"]["oid"]]
            oid = repository.commit(changed)
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{oid}", "commitOid": oid}, {}
        revision = rest.split("/")[2] if kind in ("revision", "tree", "resolve") else "main"
        oid = repository.head if revision == "main" else revision
        if oid not in repository.commits:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        files_there = repository.commits[oid]
        if kind == "tree":
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files_there.items()
            ]
            return 200, tree, {}
        if kind == "resolve":
            content = files_there[rest.split("/", 3)[3]]
            etag = hashlib.sha256(content).hexdigest()
            return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid}
        siblings = [{"rfilename": n} for n in files_there]
        info = {"id": name, "sha": oid, "siblings": siblings, "private": repository.private}
        return 200, info, {}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


_SCRIPT = """
import json, sys
from pathlib import Path
from interv.errors import IntervError
from interv.keep.hub import pull, push

first = None  # the commit that was pulled first
for call in json.loads(sys.argv[1]):
    do, folder = call.pop("do"), Path(call.pop("folder"))
    name = call.pop("name")
    if call.get("revision") == "FIRST":
        call["revision"] = first
    try:
        done = push(folder, name, **call) if do == "push" else pull(name, folder, **call)
    except IntervError as error:
        done = [type(error).__name__, str(error)]
    else:
        first = first or (done if do == "pull" else None)
    print(json.dumps(done))
"""


def use(
    calls: list[dict[str, Any]], address: str, home: Path, environment: dict[str, str], **more: str
) -> list[Any]:
    """What the calls give, in a process whose hub is at the address: its client reads that once."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **more}
    settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    clean = {k: v for k, v in environment.items() if k not in ("HF_TOKEN", "HF_HUB_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(calls, default=str)],
        capture_output=True,
        text=True,
        env={**clean, **settings},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved intervention with its card, beside files that are nobody's business."""
    made = BoundlessRotatedSpace(Rotation.seeded(5, 5, 0), Boundary(5))
    trained = Trained(
        (Part(Site("block_output", 1), "END", "name", made),),
        {"model": "owner/tiny", "results": [{"layer": 1, "iia": 0.91}]},
    )
    folder = tmp_path / "kept"
    write(folder, trained)
    (folder / "README.md").write_text(card(trained, "interv train-das spec.yaml"))
    (folder / "notes.txt").write_text("private")
    (folder / "secret.json").write_text("{}")
    return folder


KEPT = ("README.md", "intervention.json", "intervention.safetensors")


def test_what_is_pushed_is_pulled(
    hub: Hub, folder: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    there, later, old = (tmp_path / name for name in ("there", "later", "old"))
    newer = tmp_path / "newer"
    write(newer, Trained((), {"version": 2}))
    mine: dict[str, Any] = {"name": "me/das", "token": TOKEN}
    url, first, again, same, _, second, before = use(
        [
            {"do": "push", "folder": folder, "private": True, **mine},
            {"do": "pull", "folder": there, **mine},
            {"do": "push", "folder": folder, "private": True, **mine},
            {"do": "pull", "folder": later, **mine},
            # A second version; it is pulled over the first, which is there by its commit.
            {"do": "push", "folder": newer, **mine},
            {"do": "pull", "folder": later, **mine},
            {"do": "pull", "folder": old, "revision": "FIRST", **mine},
        ],
        hub.address,
        tmp_path / "home",
        environment,
    )
    assert url == again == f"{hub.address}/me/das"
    repository = hub.repositories["me/das"]
    assert repository.private
    assert sorted(repository.files) == [".gitattributes", *KEPT]
    assert first == same == before != second == repository.head
    assert any(line.startswith("PUT /lfs/") for line in hub.asked), "LFS was not tried"
    for pulled in (there, old):
        assert sorted(p.name for p in pulled.iterdir()) == list(KEPT)
        assert all((pulled / n).read_bytes() == (folder / n).read_bytes() for n in KEPT)
    found, sent = (read(f).parts[0].intervention for f in (there, folder))
    assert all(
        torch.equal(a, b) for a, b in zip(found.parameters(), sent.parameters(), strict=True)
    )
    assert read(later).about == {"version": 2}

    # What was pulled once needs no connection.
    asked = len(hub.asked)
    (cached,) = use(
        [{"do": "pull", "folder": tmp_path / "off", "name": "me/das"}],
        hub.address,
        tmp_path / "home",
        environment,
        HF_HUB_OFFLINE="1",
    )
    assert cached == second and len(hub.asked) == asked
    assert read(tmp_path / "off").about == {"version": 2}


def test_what_the_hub_refuses(
    hub: Hub, folder: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    hub.repositories["me/public"] = Repository(False)
    hub.repositories["me/public"].commit({"README.md": b""})
    hub.repositories["me/hidden"] = Repository(True)
    hub.repositories["me/weights"] = Repository(False)
    hub.repositories["me/weights"].commit(
        {"config.json": b"{}", "model.safetensors": b"x", "pytorch_model.bin": b"x"}
    )
    broken = (folder / "intervention.json").read_bytes()
    hub.repositories["me/broken"] = Repository(False)
    hub.repositories["me/broken"].commit(
        {"intervention.json": broken, "intervention.safetensors": b"x"}
    )
    to = tmp_path / "to"
    push = {"do": "push", "folder": folder, "name": "me/das", "token": TOKEN}
    pull = {"do": "pull", "folder": to, "name": "me/public"}
    table: list[tuple[dict[str, Any], str, str]] = [
        ({**push, "token": None}, "ModelError", "the hub does not let you write to it (401). Log"),
        ({**push, "token": "hf_bad"}, "ModelError", "'me/das' cannot be pushed to: the hub does"),
        ({**push, "name": "others/das"}, "ModelError", "does not let you write to it (403)"),
        ({**push, "name": "das"}, "UsageError", "'das' names no repository; expected user/name"),
        ({**push, "name": "me/d as"}, "UsageError", "'me/d as' names no repository"),
        ({**push, "name": "me/public", "private": True}, "ModelError", "is there already, and pub"),
        ({**push, "folder": tmp_path / "home"}, "UsageError", "no intervention; expected interven"),
        ({**pull, "name": "me/nothing"}, "ModelError", "there is no such repository, or the hub"),
        ({**pull, "name": "me/hidden"}, "ModelError", "'me/hidden' cannot be pulled: there is no"),
        ({**pull, "name": "a/b/c"}, "UsageError", "'a/b/c' names no repository"),
        (
            {**pull, "revision": "v2"},
            "ModelError",
            "'me/public@v2' cannot be pulled: there is no s",
        ),
        (pull, "ModelError", "'me/public' holds no intervention that can be read"),
        ({**pull, "name": "me/weights"}, "ModelError", "holds no intervention that can be read"),
        ({**pull, "name": "me/broken"}, "ModelError", "its SHA-256 is another"),
        ({**pull, "folder": folder / "notes.txt"}, "ModelError", "holds no intervention"),
    ]
    found = use([call for call, _, _ in table], hub.address, tmp_path / "home", environment)
    for (call, kind, message), done in zip(table, found, strict=True):
        assert done[0] == kind and message in done[1], (call, done)
    assert not to.exists()
    assert "me/das" not in hub.repositories
    assert not any("model.safetensors" in a or "pytorch_model" in a for a in hub.asked)


def test_no_connection(folder: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    calls = [
        {"do": "push", "folder": folder, "name": "me/das", "token": TOKEN},
        {"do": "pull", "folder": tmp_path / "to", "name": "me/das"},
    ]
    # Port 9 of this machine: nothing listens there.
    for kind, message in use(calls, "http://127.0.0.1:9", tmp_path / "home", environment):
        assert kind == "ModelError"
        assert "the hub cannot be reached" in message


class Bomb:
    """Something that would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "boom")


def test_pickles_are_pulled_unread(hub: Hub, tmp_path: Path, environment: dict[str, str]) -> None:
    """pyvene's folders are pickles; `read_pyvene` refuses what is not tensors."""
    from interv.errors import UsageError
    from interv.keep.pyvene import read_pyvene

    target, to = tmp_path / "boom", tmp_path / "to"
    key = "layer_0_comp_block_output_unit_pos_nunit_1#0"
    config = {
        "representations": [[0, "block_output", "pos", 1]],
        "intervention_types": ["<class 'pyvene.models.interventions.RotatedSpaceIntervention'>"],
    }
    hub.repositories["me/bomb"] = Repository(False)
    hub.repositories["me/bomb"].commit(
        {
            "config.json": json.dumps(config).encode(),
            f"intkey_{key}.bin": pickle.dumps(Bomb(target), protocol=2),
            "onnx/intkey_x.bin": b"",
        }
    )
    calls = [{"do": "pull", "folder": to, "name": "me/bomb"}]
    assert use(calls, hub.address, tmp_path / "home", environment) == [
        hub.repositories["me/bomb"].head
    ]
    assert sorted(p.name for p in to.iterdir()) == ["config.json", f"intkey_{key}.bin"]
    with pytest.raises(UsageError, match="is not a file of tensors"):
        read_pyvene(to)
    assert not target.exists()
