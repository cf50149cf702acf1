"""A run's adapter goes to the hub whole: tried against a stand-in of its interface on this machine, over HTTP."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from fedlotr import SimulationConfig, cli, run_simulation
from tests.run.test_handover import assert_placeless


class StandIn(ThreadingHTTPServer):
    """Repositories of models, as far as creating one and committing to it goes.

    Large files go by git's LFS (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), others in the commit.
    """

    TOKEN = "hf_a_token_that_may_write"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def create(self, name: str, *, private: bool) -> None:
        self.repos[name] = {"private": private, "files": {}, "message": ""}


class Answers(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, found: Any, code: int = 200) -> None:
        content = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        if name not in self.server.repos:
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"id": name, "private": self.server.repos[name]["private"], "siblings": [], "sha": "0"})

    def do_PUT(self) -> None:
        content = self.body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        path, content = self.path.partition("?")[0], self.body()
        self.server.asked.append(path)
        if self.headers.get("Authorization") != f"Bearer {self.server.TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            assert json.loads(content)["content"].startswith("---\n")
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path.endswith("/preupload/main"):
            files = [{**file, "shouldIgnore": False} for file in json.loads(content)["files"]]
            for file in files:
                file["uploadMode"] = "lfs" if file["path"].endswith(".safetensors") else "regular"
            return self.answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            found = json.loads(content)["objects"]
            for each in found:
                each["actions"] = {"upload": {"href": f"{self.server.address}/objects/{each['oid']}"}}
            return self.answer({"transfer": "basic", "objects": found})
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        return self.commit(name, [json.loads(line) for line in content.splitlines()])

    def create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, (asked["organization"] or "me", asked["name"])))
        if asked["organization"] == "others":
            return self.answer({"error": "You don't have the rights"}, 403)
        if name in self.server.repos:
            return self.answer(
                {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}, 409
            )
        self.server.create(name, private=asked.get("visibility") == "private")
        return self.answer({"url": f"{self.server.address}/{name}"})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repo = self.server.repos[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo["message"] = value["summary"]
            elif line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                repo["files"][value["path"]] = self.server.objects[value["oid"]]
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1", "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)  # what HF_ENDPOINT says, read as the library loads
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(tiny_bert: Path, animals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pushed") / "run"
    options: dict[str, Any] = {"model": str(tiny_bert), "data": str(animals), "clients": 2, "sample": 2, "rounds": 1}
    options |= {"engine": "local", "threads": 1, "dtype": "float32", "rank": 2, "method": "lora-xs", "quiet": True}
    run_simulation(SimulationConfig(**options, public_examples=8, out=out))
    return out


def push(run: Path, *words: str) -> int:
    return cli.main(["export", str(run), "--to", "hub", *words])


def test_the_hub_gets_what_peft_makes_and_a_private_repository(
    run: Path, hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, "--repo", "org/tiny-adapter") == 0
    assert capsys.readouterr().out.strip() == f"{hub.address}/org/tiny-adapter"
    repo = hub.repos["org/tiny-adapter"]
    assert cli.main(["export", str(run), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert repo["private"] and repo["files"] == {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    assert set(repo["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"}
    assert_placeless(tmp_path / "peft", run.parent)
    assert not (run / "export").exists(), "nothing stays here"
    # Once more, of another rank: the same repository.
    before = repo["files"]["adapter_model.safetensors"]
    assert push(run, "--repo", "org/tiny-adapter", "--rank", "1") == 0
    assert hub.repos["org/tiny-adapter"]["files"]["adapter_model.safetensors"] != before


def test_a_public_one_is_made_where_it_is_asked_for_and_said_where_it_was_there(
    run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, "--repo", "mine", "--public") == 0
    assert not hub.repos["me/mine"]["private"]
    capsys.readouterr()
    assert push(run, "--repo", "me/mine") == 0
    assert "is public" in capsys.readouterr().out


def test_what_keeps_it_from_the_hub_is_one_line(
    run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(code: int, *words: str) -> str:
        assert push(run, *words) == code
        text = capsys.readouterr().err
        assert text.startswith("error: ") and len(text.splitlines()) == 1
        return text

    assert "the token may not write there" in said(2, "--repo", "others/x")
    assert "expected ORG/NAME" in said(2, "--repo", "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not know the token" in said(2, "--repo", "org/x")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in said(2, "--repo", "org/x")
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in said(1, "--repo", "org/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in said(1, "--repo", "org/x")
    assert not hub.repos
