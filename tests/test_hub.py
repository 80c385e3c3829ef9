"""Models by hub id: downloaded once from a stand-in of the hub on this machine, pinned, and clear errors without it."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from pipeline import hub
from pipeline.artifacts import hashing
from pipeline.artifacts.hashing import file_sha256, remembered_sha256
from pipeline.errors import PipelineError
from tests.support.paths import ROOT

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "gpt_oss"}',
    "model.safetensors": b"not really",
    "chat_template.jinja": b"{{ messages }}",
    "original/model.safetensors": b"another layout",
    "README.md": b"# words",
}
SCRIPT = """
import json, sys
from pathlib import Path
from pipeline import hub
from pipeline.errors import PipelineError
try:
    directory, revision = hub.directory_of(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, key="target.path")
    files = sorted(str(file.relative_to(directory)) for file in Path(directory).rglob("*") if file.is_file())
    print(json.dumps({"files": files, "revision": revision}))
except PipelineError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    def do_GET(self):
        self._answer(True)

    def do_HEAD(self):
        self._answer(False)

    def _answer(self, with_body):
        self.server.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "owner", "model"] and parts[4] == "revision":
            if parts[5] not in ("main", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"_id": "1", "id": "owner/model", "sha": COMMIT, "siblings": siblings, "tags": []})
            return self._send(200, body.encode(), {}, with_body)
        if parts[:5] == ["api", "models", "owner", "model", "tree"]:
            tree = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in FILES.items()]
            return self._send(200, json.dumps(tree).encode(), {}, with_body)
        if parts[:3] == ["owner", "model", "resolve"]:
            body = FILES["/".join(parts[4:])]
            return self._send(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}"'}, with_body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _send(self, status, body, headers, with_body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(tmp_path, endpoint, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(ended.stdout)


def test_a_model_is_downloaded_once_pinned_and_then_found_without_the_hub(tmp_path, server):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    found = ask(tmp_path, endpoint, "owner/model")
    assert found == {"files": ["chat_template.jinja", "config.json", "model.safetensors"], "revision": COMMIT}
    assert ask(tmp_path, endpoint, "owner/model", COMMIT) == found
    server.shutdown()
    server.server_close()
    assert ask(tmp_path, endpoint, "owner/model") == found


def test_what_the_hub_does_not_have_is_told(tmp_path, server):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    assert "no such model on the hub" in ask(tmp_path, endpoint, "owner/other")["error"]
    assert "owner/model has no revision old" in ask(tmp_path, endpoint, "owner/model", "old")["error"]


def test_without_a_network_one_error_says_what_to_do(tmp_path):
    error = ask(tmp_path, "http://127.0.0.1:9", "owner/model")["error"]
    assert "no directory owner/model is here, the hub's cache does not have it" in error
    assert "set target.path to its directory" in error
    assert "\n" not in error


def test_a_directory_is_taken_as_it_is_and_has_no_revision(tmp_path):
    assert hub.directory_of(str(tmp_path), None, key="target.path") == (tmp_path, None)
    with pytest.raises(PipelineError, match="a revision .* goes with a hub id"):
        hub.directory_of(str(tmp_path), "main", key="target.path")
    with pytest.raises(PipelineError, match="target.path is /no/where/at/all, which is no directory"):
        hub.directory_of("/no/where/at/all", None, key="target.path")


def test_a_large_file_is_read_once_until_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "REMEMBERED_BYTES", 4)
    file, memory = tmp_path / "weights", tmp_path / "outputs" / "sha256.json"
    file.write_bytes(b"12345")
    first = remembered_sha256(file, memory)
    assert first == file_sha256(file)
    monkeypatch.setattr(hashing, "file_sha256", lambda path: "read again")
    assert remembered_sha256(file, memory) == first
    file.write_bytes(b"12346")
    assert remembered_sha256(file, memory) == "read again"
    assert remembered_sha256(file, None) == "read again"
