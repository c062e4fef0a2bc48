"""Workers come and go while episodes run: nothing is lost, nothing is done twice, and nobody counts a move as a fault."""

from __future__ import annotations

import asyncio
import functools
import os
from contextlib import ExitStack
from dataclasses import replace

import pytest
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tests.cluster.fake_engine import NUM_CALLS, CountingTools, make_slow_engine
from tests.cluster.test_cluster_pool import TASK, Rollouts
from tests.cluster.test_cluster_weights import synced
from webdancer.cluster.calls import answer, kill, spawn
from webdancer.cluster.connection import cluster_size, largest_node_gpus
from webdancer.cluster.launch import _learner_group
from webdancer.cluster.placement import plan_resources
from webdancer.config import ClusterConfig, Config, EngineConfig, LearnerConfig, RolloutConfig
from webdancer.errors import ServiceError
from webdancer.rollout.group import sample_group
from webdancer.types import Sampling


async def sampled(rollouts, size, turns):
    """A group none of whose members may be lost even once."""
    settings = {"attempt": 0, "start_version": 0, "sampling": Sampling(), "max_lost": 0}
    return await sample_group(TASK, rollouts.runner, group_size=size, on_turn=turns.append, **settings)


async def num_calls(rollouts) -> int:
    return await answer(rollouts.tools.count.remote(), stage="count", timeout_s=30)


async def test_a_newcomer_takes_what_waits_and_a_leaver_hands_on_what_runs(nodes, fake_model):
    turns: list = []
    make_engine = functools.partial(make_slow_engine, 1.0)
    async with Rollouts(fake_model, num_workers=1, capacity=4, make_engine=make_engine) as rollouts:
        running = asyncio.create_task(sampled(rollouts, 6, turns))
        await rollouts.until(lambda: rollouts.pool.num_waiting == 2)
        rollouts.pool.scale(2)
        assert (rollouts.pool.state.wanted, rollouts.pool.state.starting) == (2, 1)
        await rollouts.until(lambda: len(rollouts.pool.workers) == 2)
        await rollouts.until(lambda: rollouts.pool.num_waiting == 0 and rollouts.pool.workers[1].load > 0)
        await rollouts.until(lambda: any("generate" in worker.activity for worker in rollouts.pool.workers))
        assert "in generate" in rollouts.runner.stages()
        leaver = min(rollouts.pool.workers, key=lambda worker: worker.load)
        rollouts.pool.scale(1)
        assert leaver not in rollouts.pool.workers
        group = await asyncio.wait_for(running, 60)
        await rollouts.until(lambda: rollouts.pool.state.leaving == 0)
        await rollouts.until(lambda: not os.path.exists(f"/proc/{leaver.process_id}"))
        assert rollouts.pool.num_replaced == 0
        assert await num_calls(rollouts) == 6 * NUM_CALLS, "no tool was called twice"
    assert all(member.reward.valid for member in group.members)
    for index, member in enumerate(group.members):
        assert [turn.index for turn in turns if turn.member == index] == list(range(NUM_CALLS + 1))
        told = [turn.turn.completion for turn in turns if turn.member == index]
        assert [turn.completion for turn in member.trajectory.turns] == told, "token ids and log-probabilities are carried over"
    lengths = {len(member.trajectory.token_ids) for member in group.members}
    assert len(lengths) == 1, "moved or not, the ledger is the same"


async def test_a_turn_that_does_not_end_is_cut_off_and_done_again_elsewhere(nodes, fake_model, tmp_path):
    turns: list = []
    async with Rollouts(fake_model, directory=str(tmp_path), drain_timeout_s=1.0) as rollouts:
        running = asyncio.create_task(sampled(rollouts, 1, turns))
        await rollouts.until((tmp_path / "waiting").exists)
        await rollouts.until(lambda: len(turns) == 2)
        (busy,) = [worker for worker in rollouts.pool.workers if worker.load]
        (idle,) = [worker for worker in rollouts.pool.workers if not worker.load]
        idle.load += 5  # the busy one is to leave
        rollouts.pool.scale(1)
        idle.load -= 5
        assert rollouts.pool.workers == (idle,)
        (member,) = (await asyncio.wait_for(running, 60)).members
        assert await num_calls(rollouts) == NUM_CALLS
        assert "no answer within 1 s" in busy.gone.result()
    assert member.reward.valid
    assert [turn.index for turn in turns] == list(range(NUM_CALLS + 1))


async def test_what_is_not_wanted_any_more_is_not_started(nodes, fake_model):
    async with Rollouts(fake_model, num_workers=1) as rollouts:
        rollouts.pool.scale(3)
        rollouts.pool.scale(1)
        state = rollouts.pool.state
        assert (state.wanted, state.serving, state.starting, state.leaving) == (1, 1, 0, 0)
        assert (await rollouts.group()).members[0].reward.valid


async def test_no_more_start_than_there_are_places(nodes, fake_model):
    async with Rollouts(fake_model, num_workers=1, max_workers=1) as rollouts:
        rollouts.pool.scale(2)
        state = rollouts.pool.state
        assert (state.wanted, state.serving, state.starting, state.leaving) == (1, 1, 0, 0)
        assert state.failure == "each needs the GPU of a learner rank (cluster.shared_gpus), of which there are 1"
        rollouts.pool.scale(1)
        assert rollouts.pool.state.failure == ""


async def test_one_who_joins_in_the_middle_of_an_update_has_the_new_weights(nodes, tiny_model, tmp_path):
    async with synced(nodes, tiny_model, tmp_path) as live:
        await live.weights.publish(0)
        live.pool.scale(1)
        await until(lambda: live.pool.state.leaving == 0)
        version = await live.train()
        join, updates = live.pool.prepare, []

        async def join_during_an_update(worker):
            updates.append(asyncio.create_task(live.weights.publish(version)))
            await asyncio.sleep(0)  # the update has begun, and is of the workers that serve now
            await join(worker)

        live.pool.prepare = join_during_an_update
        live.pool.scale(2)
        await until(lambda: len(live.pool.workers) == 2)
        (figures,) = await asyncio.gather(*updates)
        assert figures["engine/workers"] == 1
        assert await live.difference() < 1e-3
        live.pool.prepare = join
        assert (await live.weights.publish(await live.train()))["engine/workers"] == 2


async def test_an_engine_is_on_one_node_with_its_gpus_and_tools_are_on_others(ray_cluster):
    cluster, others = ray_cluster
    engine = EngineConfig(tensor_parallel_size=2)
    config = Config(engine=engine, rollout=RolloutConfig(num_workers=1), learner=LearnerConfig(num_ranks=0))
    added = [
        cluster.add_node(num_cpus=4, num_gpus=count, labels={"kind": kind}) for count, kind in ((1, "small"), (2, "large"), (0, "web"))
    ]
    _, large, web = (node.node_id for node in added)
    actors: list = []

    async def node_of(resources):
        actors.append(spawn(CountingTools, resources))
        return await answer(actors[-1].node.remote(), stage="place", timeout_s=300)

    try:
        resources = plan_resources(config, cluster_size(), largest_node_gpus=largest_node_gpus())
        assert await node_of(resources.worker) == large, "three GPUs on two nodes hold one engine of two"
        assert await node_of(resources.server) in {*others, web}, "not where the GPUs are"
        labelled = replace(config, engine=EngineConfig(), cluster=ClusterConfig(rollout_nodes="kind=small", tool_nodes="kind=web"))
        resources = plan_resources(labelled, cluster_size(), largest_node_gpus=largest_node_gpus())
        assert await node_of(resources.worker) == added[0].node_id
        assert [await node_of(resources.server), await node_of(resources.judge)] == [web, web]
        for actor in actors:
            kill(actor)  # their GPUs are needed
        in_turn = replace(config, engine=EngineConfig(), cluster=ClusterConfig(shared_gpus=True), learner=LearnerConfig(num_ranks=2))
        in_turn = replace(in_turn, rollout=RolloutConfig(num_workers=2))
        resources = plan_resources(in_turn, cluster_size(), largest_node_gpus=largest_node_gpus())
        with ExitStack() as stack:
            group = _learner_group(stack, in_turn, resources)
            gpus = []
            for options, bundle in [(resources.worker, -1), (resources.worker, -1), (resources.rank, 0), (resources.rank, 1)]:
                where = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
                actors.append(spawn(CountingTools, {**options, "scheduling_strategy": where}))
                gpus.append(await answer(actors[-1].gpus.remote(), stage="place", timeout_s=120))  # engines first: as a program starts
            assert len(gpus[0]) == 1
            assert sorted(gpus[:2]) == sorted(gpus[2:]), "each engine is on the GPU of one rank"
            assert gpus[0] != gpus[1]
        too_wide = replace(config, engine=EngineConfig(tensor_parallel_size=3))
        with pytest.raises(ServiceError, match=r"engine\.tensor_parallel_size: must fit on a node, got 3 where nodes have 2 GPUs at most"):
            plan_resources(too_wide, cluster_size(), largest_node_gpus=largest_node_gpus())
    finally:
        for actor in actors:
            kill(actor)
        for node in added:
            cluster.remove_node(node)


async def until(condition, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)
