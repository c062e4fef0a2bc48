"""API keys in a real run with fake providers: they reach the providers, and nothing that the run leaves behind or shows."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import tempfile
import threading
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cluster.key_probe import Looks, LooksForJudge
from tests.cluster.test_bad_input import ENVIRONMENT, REPOSITORY, command
from webdancer.cluster.calls import answer, kill, spawn
from webdancer.data.demonstrations import read_demonstrations
from webdancer.offline_web.server import running_server
from webdancer.tools import keys

CANARIES = {variable: secrets.token_hex(20) for variable in keys.ALL_KEYS}


def told(data: bytes) -> list[str]:
    return [variable for variable, canary in CANARIES.items() if canary.encode() in data]


class Providers(ThreadingHTTPServer):
    """Serper and a chat endpoint in front of the offline web. Both repeat the key that they were asked with, as some providers do."""

    def __init__(self, web: str) -> None:
        super().__init__(("127.0.0.1", 0), _Provider)
        self.web = web
        self.asked: dict[str, set[str]] = {}
        self.shown: list[str] = []

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Provider(BaseHTTPRequestHandler):
    server: Providers

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.setdefault(self.path, set()).update(told(str(self.headers).encode()))
        self.server.shown += [line for path in Path("/proc").glob("[0-9]*/cmdline") for line in told(_read(path))]
        content = json.dumps(self._search(body["q"]) if self.path == "/search" else self._chat(body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Not into the test's output."""

    def _search(self, query: str) -> object:
        payload = json.dumps({"queries": [query], "topk": 3}).encode()
        request = urllib.request.Request(f"{self.server.web}/retrieve", payload, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            (documents,) = json.load(response)["result"]
        snippets = [document["contents"].partition("\n")[2] for document in documents]
        return {
            "organic": [
                {"title": document["title"], "link": document["url"], "snippet": snippet, "source": f"asked by {self.headers['X-API-KEY']}"}
                for document, snippet in zip(documents, snippets, strict=True)
            ]
        }

    def _chat(self, body: dict[str, list[dict[str, str]]]) -> object:
        page = json.loads(body["messages"][1]["content"])["page"]
        reply = {"rational": "All of it.", "evidence": page, "summary": f"Written for {self.headers['Authorization']}."}
        return {"choices": [{"message": {"role": "assistant", "content": json.dumps(reply)}}]}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


@contextmanager
def providers():
    with running_server(num_entities=600) as web, Providers(web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture
def short_directory():
    """Ray's sockets need a short path."""
    directory = Path(tempfile.mkdtemp(prefix="wd-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_a_run_tells_its_keys_to_the_providers_and_to_nobody_else(tmp_path, short_directory):
    environment = {**ENVIRONMENT, **CANARIES, "RAY_TMPDIR": str(short_directory), "HOME": str(tmp_path / "home")}
    run_dir, output = tmp_path / "run", b""
    with providers() as server:
        settings = [
            *("tools.search.backend=serper", f"tools.search.url={server.origin}", f"tools.visit.site={server.web}"),
            *("tools.visit.summarizer.backend=openai", f"tools.visit.summarizer.base_url={server.origin}/v1"),
            f"tools.fetch.allowed_origins=[{server.web}]",
            *("telemetry.wandb_mode=offline", "sample.max_demonstrations=20"),
        ]
        for program in ("synthesize", "sample"):
            arguments = command(program, run_dir, *settings)
            done = subprocess.run(arguments, cwd=REPOSITORY, env=environment, capture_output=True, timeout=240, check=False)
            output += done.stdout + done.stderr
            assert done.returncode == 0, output.decode()[-3000:]

    assert server.asked == {"/search": {keys.SERPER}, "/v1/chat/completions": {keys.SUMMARIZER}}
    assert len(read_demonstrations(run_dir / "demonstrations.jsonl")) > 10
    assert f"asked by {keys.REDACTED}" in (run_dir / "trajectories.jsonl").read_text()
    assert f"Written for Bearer {keys.REDACTED}" in (run_dir / "trajectories.jsonl").read_text()

    left = {path: told(path.read_bytes()) for root in (tmp_path, short_directory) for path in root.rglob("*") if path.is_file()}
    for name in ("config.yaml", "trajectories.jsonl", "metrics.jsonl", "*.wandb", "raylet.out", "gcs_server.out"):
        assert any(path.match(name) for path in left), (name, sorted(map(str, left)))
    assert {str(path): found for path, found in left.items() if found} == {}
    assert told(output) == []
    assert server.shown == []  # in the arguments of any process


@pytest.mark.parametrize(("kind", "has"), [(Looks, []), (LooksForJudge, [keys.JUDGE])])
async def test_an_actor_has_the_keys_of_its_kind_whatever_its_node_has(nodes, kind, has):
    node = {"num_cpus": 0, "runtime_env": {"env_vars": CANARIES}}
    actor = spawn(kind, node)
    try:
        assert await answer(actor.keys.remote(), stage="look", timeout_s=60) == (has, has)
    finally:
        kill(actor)
