"""A page server that goes away under a real run, and one that only the actors miss: one line, exit code 2, nothing finished is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from webdancer.data.demonstrations import read_demonstrations

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
}
SMALL = [
    *("web.num_entities=600", "synthesis.num_sft=150", "synthesis.num_rl=20", "synthesis.num_heldout=6", "synthesis.num_dev=2"),
    *("synthesis.num_count=0", "synthesis.hop_shares=[0.7,0.3,0.0]", "telemetry.wandb_mode=disabled"),
]


def command(program: str, run_dir: Path, *overrides: str) -> list[str]:
    config = ["--config", "ray_configs/quickstart.yaml", f"run_dir={run_dir}"]
    return [sys.executable, "-m", "webdancer.cli", program, *config, *SMALL, *overrides]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def serve_web(run_dir: Path, port: int) -> subprocess.Popen[str]:
    server = start([*command("web", run_dir)[:3], "web", "serve", f"web.port={port}", "web.num_entities=600"])
    ends = time.monotonic() + 90
    while time.monotonic() < ends:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            server.stdout.readline()  # its origin: the port is open before the pages are made
            return server
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.2)
    raise AssertionError("the web did not come up")


def until_connected(program: subprocess.Popen[str], port: int) -> None:
    """Until somebody holds a connection to the port (state 01): the tool actor does from its first check on."""
    remote = f":{port:04X} 01"
    while program.poll() is None:
        if any(remote in " ".join(line.split()[2:4]) for line in Path("/proc/net/tcp").read_text().splitlines()):
            return
        time.sleep(0.05)


def test_a_page_server_that_goes_away_ends_the_run_which_then_goes_on(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_dir = tmp_path / "run"
    subprocess.run(command("synthesize", run_dir), cwd=REPOSITORY, env=ENVIRONMENT, check=True, capture_output=True)
    questions = {path.name: path.read_bytes() for path in (run_dir / "questions").iterdir()}
    origin = f"http://127.0.0.1:{port}"
    sample = command("sample", run_dir, f"tools.search.url={origin}", f"tools.visit.site={origin}", "tools.cache_entries=0")
    server = serve_web(run_dir, port)
    program = start(sample)
    for line in program.stdout:
        if line.startswith("sample"):
            break
    until_connected(program, port)
    time.sleep(0.5)
    server.kill()
    server.wait()
    _, errors = program.communicate(timeout=240)
    assert program.returncode == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith("webdancer: tools, judge: must answer, but the last 64 episodes were all lost to an outage (turn "), line
    assert {path.name: path.read_bytes() for path in (run_dir / "questions").iterdir()} == questions
    assert not (run_dir / "demonstrations.jsonl").exists()

    server = serve_web(run_dir, port)
    try:
        done = subprocess.run(sample, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr
    assert len(read_demonstrations(run_dir / "demonstrations.jsonl")) > 20


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["tools.search.url=http://127.0.0.1:9"], "tools.search.url: must be a search that answers"),
        (["tools.search.url=ORIGIN", "tools.visit.site=http://127.0.0.1:9"], "tools.visit.site: must be a site that answers"),
        (
            ["tools.search.url=ORIGIN", "judge.backend=openai", "judge.base_url=http://127.0.0.1:9/v1", "judge.max_attempts=1"],
            "judge.base_url: must be a judge that answers",
        ),
    ],
)
def test_what_only_the_actors_cannot_reach_is_found_when_they_start(ray_cluster, overrides, line):
    script = """
import asyncio, sys
from webdancer.cluster.launch import services
from webdancer.config import load
from webdancer.errors import ServiceError
from webdancer.offline_web.server import running_server

async def main(overrides):
    async with services(load(["ray_configs/quickstart.yaml"], overrides), parts={"tools", "judge"}):
        raise AssertionError("started")

with running_server(num_entities=600) as origin:
    try:
        asyncio.run(main([override.replace("ORIGIN", origin) for override in sys.argv[1:]]))
    except ServiceError as error:
        print(getattr(error, "cause", error))
"""
    arguments = [sys.executable, "-c", script, f"cluster.address={ray_cluster[0].address}", *overrides]
    environment = ENVIRONMENT | {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    done = subprocess.run(arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert line in done.stdout, done.stderr[-2000:]
