"""From a config to live services, and back to nothing: the one door between the programs and Ray.

    async with services(config, parts={"tools", "judge", ...}) as live:      # live: interfaces.Services, all parts by default
        live.tokenizer  Tokenizer       the engine's own, in the driver
        live.toolbox    Toolbox         tool actors
        live.judge      Judge           judge actors
        live.runner     EpisodeRunner   rollout workers: agent loop and engine in one actor each
        live.learner    Learner         FSDP2 ranks
        live.weights    WeightSync      learner -> engines, and the canary

`config.tools.search.url` and `config.tools.visit.site` must be set by then: the offline web is the program's, not the cluster's.
`config.cluster.address: local` starts a Ray of its own, anything else joins a running one. Leaving the context stops every actor and
every engine process, whatever ended the program.
"""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from webdancer.agent.tokenizer import load_tokenizer
from webdancer.cluster.calls import answer, answers, kill, spawn
from webdancer.cluster.connection import cluster, cluster_size, largest_node_gpus
from webdancer.cluster.learner_actor import LearnerActor
from webdancer.cluster.placement import Resources, in_pairs, label, num_local_cpus, plan_resources, rank_bundle, shares_gpus
from webdancer.cluster.pool import WorkerPool
from webdancer.cluster.scaling import scalable
from webdancer.cluster.servers import JudgeServer, LedgerServer, ToolServer
from webdancer.cluster.services import ActorChoice, RemoteJudge, RemoteLearner, RemoteRunner, RemoteToolbox, RemoteWriter
from webdancer.cluster.tool_pool import ToolPool
from webdancer.cluster.weight_sync import WeightPublisher, check_backend
from webdancer.cluster.worker import MakeEngine, RolloutWorker, WorkerSpec, make_vllm_engine
from webdancer.config import Config, ToolsConfig
from webdancer.errors import ConfigError, WebDancerError
from webdancer.inference.canary import probe
from webdancer.interfaces import Services
from webdancer.model_location import model_path
from webdancer.rewards.judge import has_price
from webdancer.rollout.outage import OutageGuard
from webdancer.tools.ledger import providers

START_TIMEOUT_S = 900.0
"""For an engine or a learner rank to load its model, downloads included."""
CLOSE_TIMEOUT_S = 10.0
"""For an actor to end by itself before it is killed."""
PARTS = frozenset({"rollout", "learner", "tools", "judge"})
Starting = list[Coroutine[Any, Any, None]]
CALLS_AT_ONCE = 10_000
"""Of an async actor; how many there really are is bounded by the pool and by tools.max_concurrent."""


@asynccontextmanager
async def services(config: Config, *, parts: Set[str] = PARTS, make_engine: MakeEngine = make_vllm_engine) -> AsyncIterator[Services]:
    """Start the parts of `config` that a program needs: the rollout needs tools and judge. Raises ConfigError or ServiceError before
    anything runs, and what an actor's start raised after stopping the others. `make_engine` is for tests."""
    assert parts <= PARTS, parts
    assert "rollout" not in parts or {"tools", "judge"} <= parts, parts
    config = _restricted(config, parts)
    tokenizer = load_tokenizer(config.model.path)
    async with AsyncExitStack() as stack:
        stack.enter_context(cluster(config.cluster, num_cpus=num_local_cpus(config)))
        resources = plan_resources(config, cluster_size(), largest_node_gpus=largest_node_gpus())
        if {"rollout", "learner"} <= parts:
            check_backend(config, cluster_size().get("GPU", 0.0))
        live = Services(tokenizer=tokenizer)
        starting: Starting = []
        if "learner" in parts:
            group = _learner_group(stack, config, resources)
            if in_pairs(config, resources):
                here = PlacementGroupSchedulingStrategy(placement_group=group)
                resources = replace(resources, worker={**resources.worker, "scheduling_strategy": here})
        ledger = _spawn_ledger(stack, config, starting) if _needs_ledger(config) else None
        if ledger is not None:
            live = replace(live, spent=lambda: answer(ledger.spent.remote(), stage="ledger", timeout_s=CLOSE_TIMEOUT_S))
        judges = _spawn_judges(stack, config, resources, starting, ledger) if "judge" in parts else []
        if judges:
            live = replace(live, judge=RemoteJudge(ActorChoice(judges, stage="judge", timeout_s=_judge_timeout_s(config))))
        if "tools" in parts:
            toolbox, servers, spawn_tool = _spawn_tools(stack, config, resources, starting, ledger, judges)
            live = replace(live, toolbox=toolbox)
        if "rollout" in parts:
            pool = _make_pool(stack, config, resources, live, make_engine)
            starting.append(pool.start())
            live = replace(live, runner=OutageGuard(RemoteRunner(pool, timeout_s=_episode_timeout_s(config)), limit=2 * _at_once(config)))
        if "learner" in parts:
            ranks = _spawn_ranks(stack, config, resources, group)
            learner = RemoteLearner(ranks, timeout_s=config.learner.timeout_s)
            if shares_gpus(config):
                learner.make_room = pool.sleep
                await _all_or_first_error(starting)  # an engine looks at how much of its GPU is free when it starts
                starting = []
            starting.append(_start_ranks(ranks))
            live = replace(live, learner=learner)
        await _all_or_first_error(starting)
        if "learner" in parts:
            # Not before: ranks that still start would keep who interrupts them waiting.
            stack.push_async_callback(_close_ranks, ranks, config.learner.timeout_s)
        if {"rollout", "learner"} <= parts:
            live = replace(live, weights=await _publisher(config, learner, ranks, pool, tokenizer.vocab_size))
        if "rollout" in parts:
            tools = ToolPool(spawn_tool, servers, toolbox, pool, drain_timeout_s=config.episode.tool_timeout_s)
            stack.push_async_callback(tools.stop)
            await stack.enter_async_context(scalable({"rollout": pool, "tools": tools}, config.run_dir))
        yield live


def _restricted(config: Config, parts: Set[str]) -> Config:
    """The config with its model found and the parts that are not asked for counted as none."""
    needs_web = "tools" in parts and config.tools.search.backend == "retrieve" and config.tools.replay.mode != "replay"
    if needs_web and not config.tools.search.url:
        raise ConfigError("tools.search.url: must be the origin of a /retrieve server by the time the cluster starts, got ''")
    return replace(
        config,
        model=replace(config.model, path=model_path(config.model.path)),
        rollout=config.rollout if "rollout" in parts else replace(config.rollout, num_workers=0),
        learner=config.learner if "learner" in parts else replace(config.learner, num_ranks=0),
        tools=config.tools if "tools" in parts else replace(config.tools, num_servers=0),
        judge=config.judge if "judge" in parts else replace(config.judge, num_servers=0),
    )


def _spawn_tools(
    stack: AsyncExitStack, config: Config, resources: Resources, starting: Starting, ledger: Any, judges: list[Any]
) -> tuple[RemoteToolbox, list[Any], Callable[[int], Any]]:
    """The toolbox, the actors behind it, and what makes another one of a number."""
    timeout_s = 0.9 * config.episode.tool_timeout_s  # the server's own answer comes before the episode stops waiting
    tools, engine = _with_absolute_recording(config.tools), None
    if tools.visit.summarizer.backend == "engine":
        # What is recorded and remembered is this model's.
        summarizer = replace(tools.visit.summarizer, model=config.judge.model)
        tools = replace(tools, visit=replace(tools.visit, summarizer=summarizer))
        engine = RemoteWriter(ActorChoice(judges, stage="summarizer", timeout_s=summarizer.timeout_s))
    settings = {"config": tools, "call_timeout_s": timeout_s, "ledger": ledger, "engine": engine}

    def spawn_tool(shard: int) -> Any:
        return spawn(ToolServer, _server_options(resources.server), **settings, shard=shard)

    servers = [spawn_tool(shard) for shard in range(tools.num_servers)]
    stack.callback(_kill, servers)
    starting.append(_ready(list(servers)))
    # A server answers by itself before this, and the episode stops waiting after: in between it is the actor that does not answer.
    choice = ActorChoice(servers, stage="tools", timeout_s=0.95 * config.episode.tool_timeout_s)
    return RemoteToolbox(choice, site=config.tools.visit.site), servers, spawn_tool


def _needs_ledger(config: Config) -> bool:
    """Nothing is shared where nothing has a quota or a price, and nothing is recorded."""
    tools, judges = config.tools, config.judge
    shared = tools.replay.mode == "record" or any(provider.leased for provider in providers(tools))
    return bool(tools.num_servers and shared) or bool(judges.num_servers and has_price(judges))


def _spawn_ledger(stack: AsyncExitStack, config: Config, starting: Starting) -> Any:
    """On this node: its files are in the run directory."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_restarts": -1, "max_task_retries": 3, "max_concurrency": CALLS_AT_ONCE, "num_cpus": 0, "scheduling_strategy": here}
    ledger = spawn(LedgerServer, options, _with_absolute_recording(config.tools), run_dir=str(Path(config.run_dir).absolute()))
    stack.callback(_kill, [ledger])
    stack.push_async_callback(_close_ledger, ledger)
    starting.append(_ready([ledger]))
    return ledger


def _with_absolute_recording(tools: ToolsConfig) -> ToolsConfig:
    """Actors have working directories of their own."""
    path = tools.replay.path and str(Path(tools.replay.path).absolute())
    return replace(tools, replay=replace(tools.replay, path=path))


async def _close_ledger(ledger: Any) -> None:
    closing = answer(ledger.close.remote(), stage="end of the ledger", timeout_s=CLOSE_TIMEOUT_S)
    await asyncio.gather(closing, return_exceptions=True)  # its files are whole without it, and a second behind at most


def _spawn_judges(stack: AsyncExitStack, config: Config, resources: Resources, starting: Starting, ledger: Any) -> list[Any]:
    judge = replace(config.judge, model=model_path(config.judge.model)) if config.judge.backend == "vllm" else config.judge
    settings = {"config": judge, "ledger": ledger if has_price(judge) else None}
    servers = _spawn_servers(stack, JudgeServer, resources.judge, [settings] * judge.num_servers)
    if judge.backend == "vllm":
        stack.push_async_callback(_stop_judges, servers)
    starting.append(_ready(servers))
    return servers


async def _stop_judges(servers: list[Any]) -> None:
    """Their engines have processes of their own: these end in order before Ray ends them with their actor."""
    closing = [answer(server.stop.remote(), stage="end of the judge", timeout_s=CLOSE_TIMEOUT_S) for server in servers]
    await asyncio.gather(*closing, return_exceptions=True)  # one that does not answer is killed next


def _judge_timeout_s(config: Config) -> float:
    """Every attempt has its own time-out in the actor; this leaves as much again, and more, for waiting until it is one's turn."""
    return 4 * (config.judge.max_attempts + 1) * config.judge.timeout_s


def _at_once(config: Config) -> int:
    """Episodes in flight: as many as the engines begin with, or, in RL, as the groups of all slots have once the engines have room for
    them."""
    rollout = config.rollout
    slots = (rollout.max_staleness + 1) * rollout.groups_per_step if config.learner.num_ranks else 0
    return max(rollout.num_workers * (rollout.episodes_per_worker or config.engine.max_num_seqs), slots * rollout.group_size)


def _episode_timeout_s(config: Config) -> float:
    """By when a worker that lives has ended an episode, whatever happened to it; else the call itself was lost."""
    episode = config.episode
    last = max(episode.turn_timeout_s, episode.tool_timeout_s)
    return episode.timeout_s + last + _judge_timeout_s(config) + config.rollout.heartbeat_timeout_s


async def _ready(servers: list[Any]) -> None:
    await answers([server.ready.remote() for server in servers], stage="start of servers", timeout_s=START_TIMEOUT_S)


def _make_pool(stack: AsyncExitStack, config: Config, resources: Resources, live: Services, make_engine: MakeEngine) -> WorkerPool:
    pool = WorkerPool(
        functools.partial(_spawn_worker, config, resources, live, make_engine),
        num_workers=config.rollout.num_workers,
        capacity=config.rollout.episodes_per_worker or config.engine.max_num_seqs,
        start_timeout_s=config.rollout.start_timeout_s,
        heartbeat_timeout_s=config.rollout.heartbeat_timeout_s,
        drain_timeout_s=config.rollout.drain_timeout_s,
        max_workers=config.learner.num_ranks if in_pairs(config, resources) else None,
    )
    stack.push_async_callback(pool.stop)
    return pool


def _spawn_servers(stack: AsyncExitStack, server: type, resources: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> list[Any]:
    actors = [spawn(server, _server_options(resources), **settings) for settings in each]
    stack.callback(_kill, actors)
    return actors


def _server_options(resources: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_restarts": -1, "max_concurrency": CALLS_AT_ONCE, **resources}


def _spawn_worker(config: Config, resources: Resources, live: Services, make_engine: MakeEngine, name: str) -> Any:
    spec = WorkerSpec(
        model_path=config.model.path,
        dtype=config.model.dtype,
        # Of its own: engines of one seed would all sample the same episode of a question.
        engine=replace(config.engine, seed=zlib.crc32(f"{config.seed}/{config.engine.seed}/{name}".encode())),
        episode=config.episode,
        prompt=config.prompt,
        reward=config.reward,
        weight_backend=config.rollout.weights.backend,
        sleeps=shares_gpus(config),
    )
    options = {"name": name, "max_concurrency": CALLS_AT_ONCE, **resources.worker}
    return spawn(RolloutWorker, options, spec, live.toolbox, live.judge, make_engine, adapts=not config.rollout.episodes_per_worker)


def _learner_group(stack: AsyncExitStack, config: Config, resources: Resources) -> Any:
    """All ranks or none, a bundle each, on as few nodes as hold them; an engine that shares a rank's GPU is in its bundle."""
    where = label(config.cluster.learner_nodes)
    bundles = [rank_bundle(config, resources) for _ in range(config.learner.num_ranks)]
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=[where] * len(bundles) if where else None)
    stack.callback(remove_placement_group, group)
    return group


def _spawn_ranks(stack: AsyncExitStack, config: Config, resources: Resources, group: Any) -> list[Any]:
    count = config.learner.num_ranks
    ranks = []
    for rank in range(count):
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
        options = {"scheduling_strategy": strategy, **resources.rank}
        settings = {"model": config.model, "learner": config.learner, "rl": config.rl, "seed": config.seed}
        ranks.append(spawn(LearnerActor, options, rank=rank, world_size=count, shares_gpu=shares_gpus(config), **settings))
    stack.callback(_kill, ranks)
    return ranks


async def _all_or_first_error(starting: Starting) -> None:
    """Start everything at once; the first error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in starting:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _start_ranks(ranks: list[Any]) -> None:
    stage = "start of the learner"
    places = await answers([rank.place.remote() for rank in ranks], stage=stage, timeout_s=START_TIMEOUT_S)
    node, address, port = places[0]
    on_one_node = {place[0] for place in places} == {node}
    init_method = f"tcp://{'127.0.0.1' if on_one_node else address}:{port}"
    await answers([rank.setup.remote(init_method) for rank in ranks], stage=stage, timeout_s=START_TIMEOUT_S)


async def _publisher(config: Config, learner: RemoteLearner, ranks: list[Any], pool: WorkerPool, vocab_size: int) -> WeightPublisher:
    """Rank 0 writes weights on its own node, into a directory of that node's memory where there is room."""
    fallback = str(Path(config.run_dir).absolute() / "weights")
    made = ranks[0].make_weights_directory.remote(config.rollout.weights.directory, fallback)
    directory = await answer(made, stage="start of weight sync", timeout_s=START_TIMEOUT_S)
    node, _, _ = await answer(ranks[0].place.remote(), stage="start of weight sync", timeout_s=START_TIMEOUT_S)
    return WeightPublisher(
        config.rollout.weights,
        learner,
        pool,
        exporter=ranks[0],
        exporter_node=node,
        directory=Path(directory),
        probe=probe(vocab_size, max_length=min(64, config.episode.max_tokens - 1)),
        ranks_per_engine=config.engine.tensor_parallel_size,
    )


async def _close_ranks(ranks: list[Any], timeout_s: float) -> None:
    """They leave in order, unless a step that was interrupted keeps them; the checkpoint in flight is finished in any case.

    What it fails with is not raised here: a program that has come to its end has asked (Learner.saved), and of another, why it ended is
    of more use.
    """
    closing = [answer(rank.close.remote(), stage="end of the learner", timeout_s=CLOSE_TIMEOUT_S) for rank in ranks]
    await asyncio.gather(*closing, return_exceptions=True)  # one that does not answer is killed next
    writing = [rank.wait_for_disk.options(concurrency_group="disk").remote() for rank in ranks]
    with suppress(WebDancerError):  # without a rank that is lost it will never be whole
        await answers(writing, stage="end of the last checkpoint", timeout_s=timeout_s)


def _kill(actors: list[Any]) -> None:
    for actor in actors:
        kill(actor)
