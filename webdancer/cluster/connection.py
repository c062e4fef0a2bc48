"""A Ray to work in: one of our own, quiet, small and without a dashboard; or a running one that is joined and left as it was."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from webdancer.config import ClusterConfig
from webdancer.errors import ServiceError

_OWN_TOKEN = secrets.token_hex(32)
_TOKEN_SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def cluster(config: ClusterConfig, *, num_cpus: int) -> Iterator[None]:
    """Connected inside, disconnected after, a Ray of our own stopped. `num_cpus` are logical, for a Ray of our own.

    Raises ServiceError when Ray does not start or is not there.
    """
    if ray.is_initialized():
        raise ServiceError("cluster.address: must be free to start or join a Ray, but this process is in one already")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "address": config.address}
    if config.address == "local":
        _use_own_token()
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # idle Python processes cost 70 MB each
        settings |= {
            "num_cpus": config.num_cpus or num_cpus,
            "object_store_memory": config.object_store_mib * 2**20,
            "include_dashboard": False,
        }
    handlers = _signal_handlers()
    interrupted = _hold_interrupt() if handlers else []
    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises a bare one where a busy machine has not started it within 30 s
        raise ServiceError(f"cluster.address: must be a Ray that can be started or joined, got {config.address!r}: {error}") from error
    finally:
        _restore(handlers)
    try:
        if interrupted:
            signal.raise_signal(signal.SIGINT)
        yield
    finally:
        ray.shutdown()


@contextmanager
def joined(address: str, *, namespace: str) -> Iterator[None]:
    """Connected to a running Ray inside, for a short while."""
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, AuthenticationError) as error:
        raise ServiceError(f"--address: must be a Ray that can be joined from this machine, got {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def cluster_size() -> Mapping[str, float]:
    """Logical resources of all nodes together, by Ray's names (CPU, GPU)."""
    size: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return size


def largest_node_gpus() -> float:
    """GPUs of the node that has the most."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return max((float(node["Resources"].get("GPU", 0.0)) for node in nodes if node["Alive"]), default=0.0)


def own_token() -> str | None:
    """That of the Ray which this process started for itself; None where the user has set one, or joined a cluster."""
    return _OWN_TOKEN if os.environ.get("RAY_AUTH_TOKEN") == _OWN_TOKEN else None


def _use_own_token() -> None:
    """Ray starts with token authentication; without this it would leave a token file in the home directory. One for the process: Ray
    reads it once."""
    if not any(name in os.environ for name in _TOKEN_SETTINGS):
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN


def _signal_handlers() -> dict[int, Any]:
    """Ray puts its own handler of SIGTERM in place of the program's."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _hold_interrupt() -> list[int]:
    """Ctrl-C is only noted in the returned list: a Ray that is interrupted while it starts aborts, and leaves processes behind."""
    noted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    return noted


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
