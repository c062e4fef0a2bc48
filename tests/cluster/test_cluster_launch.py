"""Whole runs in processes of their own: a Ray started, joined, or driven as a job; and nothing left behind, however they end."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from webdancer.cluster.connection import cluster
from webdancer.cluster.launch import _at_once, model_path, services
from webdancer.cluster.placement import num_local_cpus, plan_resources, rank_bundle
from webdancer.config import ClusterConfig, Config, EngineConfig, LearnerConfig, RolloutConfig
from webdancer.errors import ConfigError, ServiceError

REPOSITORY = Path(__file__).parents[2]
MARK = "WEBDANCER_TEST_RUN"


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PYTHONPATH": str(REPOSITORY), "PATH": path, "OMP_NUM_THREADS": "1", MARK: secrets.token_hex(8), **changes}


def processes_of(env: dict[str, str]) -> list[str]:
    """Command lines of all living processes that inherited the environment."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={env[MARK]}".encode() in (directory / "environ").read_bytes():
                found.append((directory / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended, or is not ours
    return [line for line in found if line]


def weights_of(env: dict[str, str]) -> list[Path]:
    """Directories that learner ranks of this run have made, not those of another run on the machine."""
    mark = f"{MARK}={env[MARK]}".encode()
    made = [(path, Path("/proc") / path.name.split("-")[2] / "environ") for path in Path("/dev/shm").glob("webdancer-weights-*")]
    return [path for path, environ in made if environ.exists() and mark in environ.read_bytes()]


def wait_until_gone(env: dict[str, str], timeout_s: float = 30.0) -> list[str]:
    ends = time.monotonic() + timeout_s
    while (left := processes_of(env)) and time.monotonic() < ends:
        time.sleep(0.2)
    return left


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_program(model: str, run_dir: Path, address: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cluster.run_services", model, str(run_dir), address]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until_ready(program: subprocess.Popen[str]) -> str:
    for line in program.stdout:
        if line.startswith("READY"):
            return line
    raise AssertionError(program.stderr.read()[-3000:])


@pytest.fixture(scope="module")
def head():
    """(environment, dashboard address) of a Ray head of its own, as an administrator would start it."""
    port, dashboard, agent, client = free_ports(4)
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_ADDRESS="")
    del env["RAY_ADDRESS"]
    ray = str(Path(sys.executable).parent / "ray")
    options = [
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
    ]
    command = [ray, "start", "--head", "--block", "--num-cpus=8", "--object-store-memory=104857600", "--disable-usage-stats", *options]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    ends = time.monotonic() + 90
    while True:
        try:
            socket.create_connection(("127.0.0.1", dashboard), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < ends
            time.sleep(0.5)
    yield {**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}, f"http://127.0.0.1:{dashboard}"
    process.terminate()
    process.wait(60)
    left = wait_until_gone(env)
    assert not left, left


def scale(env: dict[str, str], *words: str) -> str:
    """What `webdancer scale` says."""
    command = [sys.executable, "-m", "webdancer.cli", "scale", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("ending", ["exception", "ctrl-c"])
def test_own_ray_is_gone_with_everything_in_it(tiny_model, tmp_path, ending):
    env = environment(HOME=str(tmp_path))
    program = start_program(tiny_model, tmp_path / "run", "local", env)
    ready = until_ready(program)
    assert float(ready.split()[1]) < 1e-3
    weights = weights_of(env)
    if ending == "ctrl-c":
        assert scale(env, "rollout=2", "--run-dir", str(tmp_path / "run")).endswith("rollout workers: 2 of 2 serve\n")
    if ending == "exception":
        program.stdin.write("\n")
        program.stdin.flush()
    else:
        program.send_signal(signal.SIGINT)
        program.stdin.close()
    code = program.wait(90)
    assert code == (7 if ending == "exception" else 130) or (ending == "ctrl-c" and code == -signal.SIGINT)
    assert not wait_until_gone(env)
    assert not any(path.exists() for path in weights)
    assert not (tmp_path / "run" / "live.json").exists()
    assert not (tmp_path / ".ray").exists(), "no token file in the home directory"


def test_running_cluster_is_joined_and_left_as_it_was(head, tiny_model, tmp_path):
    env, _ = head
    before = len(processes_of(env))
    program = start_program(tiny_model, tmp_path / "run", "auto", env)
    until_ready(program)
    assert len(processes_of(env)) >= before + 5
    assert scale(env, "rollout=1") == "rollout workers: 1 of 1 serve\n", "the only run on this Ray"
    assert scale(env, "tools=2").endswith("tool actors: 2 of 2 serve\n")
    assert '"token": null' in (tmp_path / "run" / "live.json").read_text()
    program.stdin.write("\n")
    program.stdin.close()
    assert program.wait(90) == 0, program.stderr.read()[-2000:]
    ends = time.monotonic() + 60
    while any("RolloutWorker" in line or "LearnerActor" in line or "ToolServer" in line for line in processes_of(env)):
        assert time.monotonic() < ends
        time.sleep(0.5)


def submit(env: dict[str, str], address: str, cwd: Path, *program: str) -> subprocess.CompletedProcess[str]:
    """What launch/submit.py does, without its check that the program is one of the long ones."""
    script = (
        "import sys; from webdancer.cluster.submit import submit; sys.exit(submit(sys.argv[2:], address=sys.argv[1], run_dir='runs/x'))"
    )
    command = [sys.executable, "-c", script, address, *program]
    env = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_submitted_job_is_followed_and_its_exit_code_is_ours(head, tmp_path):
    env, address = head
    (tmp_path / "mine.yaml").write_text("name: sent\n")
    done = submit(env, address, tmp_path, "config", "show", "--config", "mine.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "name: sent" in done.stdout, "the working directory went along"
    assert "address: auto" in done.stdout
    assert f"run_dir: {tmp_path}/runs/x" in done.stdout
    failed = submit(env, address, tmp_path, "config", "show", "nam=oops")
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "nam" in failed.stdout


def test_submitting_without_the_token_is_one_clear_line(head, tmp_path):
    _, address = head
    command = [sys.executable, str(REPOSITORY / "launch" / "submit.py"), "--address", address, "--", "rl"]
    env = environment(HOME=str(tmp_path))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "RAY_AUTH_MODE, RAY_AUTH_TOKEN: must be the head's own" in line


def test_submitting_to_nobody_is_one_clear_line(tmp_path):
    env = environment()
    (port,) = free_ports(1)
    command = [sys.executable, str(REPOSITORY / "launch" / "submit.py"), "--address", f"http://127.0.0.1:{port}", "--", "rl"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "--address: must be the dashboard of a running Ray head" in line


def test_a_ray_that_is_not_up_in_time_is_one_clear_line(monkeypatch):
    def too_slow(**settings: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", too_slow)
    rule = r"cluster\.address: must be a Ray that can be started or joined, got 'auto': The current node timed out"
    with pytest.raises(ServiceError, match=rule), cluster(ClusterConfig(address="auto"), num_cpus=1):
        pass


async def test_forgotten_web_is_an_error_before_anything_starts():
    with pytest.raises(ConfigError, match=r"tools\.search\.url"):
        async with services(Config()):
            pass


def config_of(workers: int, ranks: int, tensor_parallel: int = 1) -> Config:
    engine = EngineConfig(tensor_parallel_size=tensor_parallel)
    return Config(engine=engine, rollout=RolloutConfig(num_workers=workers), learner=LearnerConfig(num_ranks=ranks))


def test_gpus_are_whole_where_there_are_enough_and_shared_where_not():
    enough = plan_resources(config_of(2, 4, tensor_parallel=2), {"CPU": 64.0, "GPU": 8.0})
    assert (enough.worker["num_gpus"], enough.rank["num_gpus"]) == (2.0, 1.0)
    shared = plan_resources(config_of(1, 1), {"CPU": 64.0, "GPU": 1.0})
    assert (shared.worker["num_gpus"], shared.rank["num_gpus"]) == (0.5, 0.5)
    without = plan_resources(config_of(1, 1), {"CPU": 64.0})
    assert "num_gpus" not in without.worker
    for gpus, workers, ranks in ((2, 2, 1), (8, 8, 4), (4, 9, 2), (8, 3, 2)):
        some = plan_resources(config_of(workers, ranks), {"CPU": 64.0, "GPU": float(gpus)})
        assert gpus * int(1 / some.worker["num_gpus"]) >= workers + ranks, "each share is on one GPU"
    config = replace(config_of(8, 8), cluster=ClusterConfig(shared_gpus=True))
    in_turn = plan_resources(config, {"CPU": 64.0, "GPU": 8.0})
    assert rank_bundle(config, in_turn) == {"CPU": 2.0, "GPU": 1.0}
    assert 2 * in_turn.worker["num_gpus"] > 1, "no two engines on one"
    assert rank_bundle(config, plan_resources(config, {"CPU": 64.0})) == {"CPU": 1.0}, "nothing to share: engines are where there is room"
    with pytest.raises(ServiceError, match="need 8 GPUs, got 7"):
        plan_resources(config, {"CPU": 64.0, "GPU": 7.0})
    with pytest.raises(ServiceError, match="needs 8 GPUs, got 4"):
        plan_resources(config_of(2, 4, tensor_parallel=2), {"CPU": 64.0, "GPU": 4.0})
    with pytest.raises(ServiceError, match="CPUs, got 2"):
        plan_resources(config_of(2, 4), {"CPU": 2.0})


def test_an_outage_may_take_what_is_in_flight_and_an_evaluation_has_no_groups_in_flight():
    config = replace(config_of(2, 4), rollout=RolloutConfig(num_workers=2, groups_per_step=64, group_size=16, max_staleness=1))
    assert _at_once(config) == 2048
    assert _at_once(replace(config, learner=LearnerConfig(num_ranks=0))) == 2 * 64


def test_local_cpus_hold_every_actor():
    config = config_of(3, 2)
    plan_resources(config, {"CPU": float(num_local_cpus(config))})


def test_model_paths():
    assert Path(model_path("builtin:tiny"), "tokenizer.json").is_file()
    assert model_path("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(ConfigError, match=r"builtin:huge"):
        model_path("builtin:huge")
