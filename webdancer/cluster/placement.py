"""Which actor gets what: logical CPUs everywhere, GPUs where the cluster has them. Pure functions of config and cluster size.

What one actor asks for is always on one node, and so is an engine with its tensor parallel ranks: a STRICT_PACK group of one bundle. Actors
without a GPU go to nodes without one as long as there is room (Ray's own order), or where a label says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from webdancer.config import Config
from webdancer.errors import ServiceError

SPARE_WORKERS = 16
"""Rollout workers that a Ray of our own has logical CPUs for besides those of the start (`webdancer scale`)."""
ENGINE_SHARE, RANK_SHARE = 0.6, 0.4
"""Of a GPU that an engine and a learner rank share: no two engines fit on one. Their CPUs are the bundle's and neither asks for them: Ray
looks for an actor's CPUs and for its GPU in any bundle, each by itself, and an engine that took the CPUs of another bundle than its GPU's
would leave the rank there without."""
SERVER_CPUS = 0.1
"""Logical CPUs of a tool or judge actor: they wait for others nearly all of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Ray's options for each actor of a kind: logical resources, and the label of its nodes."""

    worker: Mapping[str, Any]
    rank: Mapping[str, float]
    server: Mapping[str, Any]
    judge: Mapping[str, Any]
    """As a server, unless it has an engine."""


def num_local_cpus(config: Config) -> int:
    """Logical CPUs for the actors of the run: Ray counts them, it does not pin anything."""
    spare = SPARE_WORKERS if config.rollout.num_workers else 0
    workers = (config.rollout.num_workers + spare) * config.engine.threads
    ranks = config.learner.num_ranks * config.learner.threads
    judge_engines = _num_judge_engines(config) * config.judge.engine.threads
    servers = SERVER_CPUS * (config.tools.num_servers + config.judge.num_servers)
    return workers + ranks + judge_engines + int(servers) + 1


def label(text: str) -> dict[str, str]:
    """Ray's selector for a `key=value`; empty for an empty text."""
    key, _, value = text.partition("=")
    return {key: value} if text else {}


def plan_resources(config: Config, available: Mapping[str, float], *, largest_node_gpus: float | None = None) -> Resources:
    """What each actor asks for. GPUs are shared in equal parts when there are fewer than engines and ranks; raises ServiceError where
    the cluster is too small."""
    engine, workers, ranks = config.engine, config.rollout.num_workers, config.learner.num_ranks
    judges, judge_engine = _num_judge_engines(config), config.judge.engine
    worker: dict[str, float] = {"num_cpus": engine.threads}
    judge: dict[str, float] = {"num_cpus": judge_engine.threads if judges else SERVER_CPUS}
    rank: dict[str, float] = {"num_cpus": config.learner.threads}
    gpus = available.get("GPU", 0.0)
    if gpus and shares_gpus(config):
        needed = ranks + judges * judge_engine.tensor_parallel_size
        if needed > gpus:
            raise ServiceError(f"cluster: learner.num_ranks (and engines of judges) need {needed} GPUs, got {gpus:g}")
        worker = {"num_cpus": 0.0, "num_gpus": ENGINE_SHARE}
        rank = {"num_cpus": 0.0, "num_gpus": RANK_SHARE}
        judge |= {"num_gpus": float(judge_engine.tensor_parallel_size)} if judges else {}
    elif gpus:
        needed = workers * engine.tensor_parallel_size + ranks + judges * judge_engine.tensor_parallel_size
        if needed > gpus and max(engine.tensor_parallel_size * bool(workers), judge_engine.tensor_parallel_size * bool(judges)) > 1:
            raise ServiceError(
                f"cluster: rollout.num_workers x engine.tensor_parallel_size + learner.num_ranks (and engines of judges) needs {needed} "
                f"GPUs, got {gpus:g}; engines with tensor parallelism cannot share GPUs"
            )
        most = gpus if largest_node_gpus is None else largest_node_gpus
        if workers and engine.tensor_parallel_size > most:
            raise ServiceError(
                f"engine.tensor_parallel_size: must fit on a node, got {engine.tensor_parallel_size} where nodes have {most:g} GPUs at most"
            )
        on_one = math.ceil(needed / gpus)  # an actor's share has to be free on one GPU: what is left over of several is of no use
        share = 1.0 if on_one == 1 else int(100 / on_one) / 100
        worker["num_gpus"] = engine.tensor_parallel_size * share
        rank["num_gpus"] = share
        judge |= {"num_gpus": judge_engine.tensor_parallel_size * share} if judges else {}
    cpus = workers * engine.threads + ranks * config.learner.threads + SERVER_CPUS * config.tools.num_servers
    cpus += config.judge.num_servers * judge["num_cpus"]
    if cpus > available.get("CPU", 0.0) + 1e-6:
        raise ServiceError(f"cluster: the actors of this run need {cpus:g} CPUs, got {available.get('CPU', 0.0):g}")
    at_workers, at_tools = _at(config.cluster.rollout_nodes), _at(config.cluster.tool_nodes)
    return Resources(
        worker=worker | at_workers,
        rank=rank,
        server={"num_cpus": SERVER_CPUS} | at_tools,
        judge=judge | ({} if judges else at_tools),
    )


def shares_gpus(config: Config) -> bool:
    """Whether the engines of this program sleep while its learner works."""
    return config.cluster.shared_gpus and config.rollout.num_workers > 0 and config.learner.num_ranks > 0


def in_pairs(config: Config, resources: Resources) -> bool:
    """Whether each engine is on the GPU of a learner rank; without GPUs, engines that sleep are where there is room."""
    return shares_gpus(config) and "num_gpus" in resources.rank


def rank_bundle(config: Config, resources: Resources) -> dict[str, float]:
    """What a learner rank needs where it is, and with it the engine that shares its GPU."""
    if in_pairs(config, resources):
        return {"CPU": float(config.learner.threads + config.engine.threads), "GPU": 1.0}
    gpus = resources.rank.get("num_gpus", 0.0)
    return {"CPU": float(config.learner.threads)} | ({"GPU": gpus} if gpus else {})


def _at(nodes: str) -> dict[str, Any]:
    return {"label_selector": label(nodes)} if nodes else {}


def _num_judge_engines(config: Config) -> int:
    return config.judge.num_servers if config.judge.backend == "vllm" else 0
