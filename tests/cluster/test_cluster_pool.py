"""Workers die, hang and break in a real Ray; episodes go on elsewhere from their last finished turn, and the pool heals."""

from __future__ import annotations

import asyncio
import functools
import os
import signal

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError

from tests.cluster.fake_engine import NUM_CALLS, CountingTools, make_fake_engine
from tests.fakes import make_task
from webdancer.cluster.calls import ActorLost, answer, kill, spawn
from webdancer.cluster.pool import WorkerPool
from webdancer.cluster.servers import JudgeServer
from webdancer.cluster.services import ActorChoice, RemoteJudge, RemoteRunner, RemoteToolbox
from webdancer.cluster.worker import RolloutWorker, WorkerSpec
from webdancer.config import EngineConfig, EpisodeConfig, JudgeConfig, PromptConfig, RewardConfig
from webdancer.errors import EngineFault
from webdancer.rollout.group import sample_group
from webdancer.types import Sampling, StopReason, ToolCall, TurnText

TASK = make_task(answers=("yes",))


def worker_spec(model_path: str) -> WorkerSpec:
    episode = EpisodeConfig(max_turns=8, max_tool_calls=8, max_tokens=2048, max_turn_tokens=128, timeout_s=120, tool_timeout_s=30)
    prompt = PromptConfig(style="brief")
    return WorkerSpec(model_path=model_path, dtype="float32", engine=EngineConfig(), episode=episode, prompt=prompt, reward=RewardConfig())


class Rollouts:
    """A pool of fake engines on the two other nodes, with one tool server and one judge on the head."""

    def __init__(
        self, model_path: str, *, directory: str | None = None, num_workers: int = 2, capacity: int = 4, make_engine=None, **timeouts
    ) -> None:
        self.tools = spawn(CountingTools, {"num_cpus": 0})
        self.judge = spawn(JudgeServer, {"num_cpus": 0}, JudgeConfig())
        toolbox = RemoteToolbox(ActorChoice([self.tools], stage="tools", timeout_s=30))
        judge = RemoteJudge(ActorChoice([self.judge], stage="judge", timeout_s=30))
        make_engine = make_engine or functools.partial(make_fake_engine, directory)

        def spawn_worker(name):
            options = {"num_cpus": 1, "max_concurrency": 100, "scheduling_strategy": "SPREAD"}
            return spawn(RolloutWorker, options, worker_spec(model_path), toolbox, judge, make_engine)

        self.pool = WorkerPool(spawn_worker, num_workers=num_workers, capacity=capacity, start_timeout_s=120, **timeouts)
        self.runner = RemoteRunner(self.pool)

    async def __aenter__(self):
        await self.pool.start()
        return self

    async def __aexit__(self, *error):
        await self.pool.stop()
        kill(self.tools)
        kill(self.judge)

    async def group(self, size: int = 1, on_turn=None):
        return await sample_group(TASK, self.runner, group_size=size, attempt=0, start_version=0, sampling=Sampling(), on_turn=on_turn)

    async def until(self, condition, timeout_s: float = 60.0):
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.05)


async def test_episodes_run_on_the_workers_and_report_their_turns(nodes, fake_model):
    turns = []
    async with Rollouts(fake_model) as rollouts:
        group = await rollouts.group(size=8, on_turn=turns.append)
    assert [m.trajectory.stop for m in group.members] == [StopReason.ANSWERED] * 8
    assert all(m.reward.answer == 1.0 for m in group.members)
    assert sorted(t.index for t in turns if t.member == 3) == list(range(NUM_CALLS + 1))


async def test_who_listens_hears_each_turn_as_it_is_written(nodes, fake_model):
    news, written = [], {}
    async with Rollouts(fake_model, num_workers=1) as rollouts:
        listening = {"on_turn": news.append, "on_text": news.append}
        scored = await rollouts.runner.run(TASK, member=0, attempt=0, sampling=Sampling(), **listening)
        (quiet,) = (await rollouts.group(on_turn=news.append)).members
    assert quiet.trajectory.token_ids.tolist() == scored.trajectory.token_ids.tolist()
    texts = [one for one in news if isinstance(one, TurnText)]
    for one in texts:
        assert one.start == len(written.get(one.index, ""))
        written[one.index] = written.get(one.index, "") + one.text
    assert [written[index] for index in range(NUM_CALLS + 1)] == [turn.completion.text for turn in scored.trajectory.turns]
    last = {one.index: place for place, one in enumerate(news) if isinstance(one, TurnText)}
    ends = {one.index: place for place, one in enumerate(news[: max(last.values()) + 2]) if not isinstance(one, TurnText)}
    assert all(last[index] < ends[index] < last.get(index + 1, len(news)) for index in ends)
    assert len(ends) == NUM_CALLS + 1


async def test_killed_worker_is_replaced_and_its_episode_goes_on_from_the_last_finished_turn(nodes, fake_model, tmp_path):
    turns = []
    async with Rollouts(fake_model, directory=str(tmp_path)) as rollouts:
        running = asyncio.create_task(rollouts.group(on_turn=turns.append))
        await rollouts.until((tmp_path / "waiting").exists)
        await rollouts.until(lambda: len(turns) == 2)
        os.kill(int((tmp_path / "waiting").read_text()), signal.SIGKILL)
        (member,) = (await running).members
        calls = await answer(rollouts.tools.count.remote(), stage="count", timeout_s=30)
        await rollouts.until(lambda: len(rollouts.pool.workers) == 2)
        assert rollouts.pool.num_replaced == 1
        (tmp_path / "waiting").unlink()
        (tmp_path / "waiting").touch()
        assert (await rollouts.group(size=8)).members[7].reward.valid, "the healed pool serves"
    assert member.reward.valid
    assert member.trajectory.stop is StopReason.ANSWERED
    assert [t.index for t in turns] == list(range(NUM_CALLS + 1))
    assert calls == NUM_CALLS, "no finished turn was done twice"


@pytest.mark.parametrize("error", [OutOfMemoryError("the node ran low on memory"), NodeDiedError("gone"), ActorDiedError()])
async def test_however_ray_says_that_an_actor_is_gone_it_is_lost(error):
    """What Ray raises of an actor that its memory monitor killed is no RayActorError."""

    async def call():
        raise error

    with pytest.raises(ActorLost, match=f"weights: {type(error).__name__}"):
        await answer(call(), stage="weights", timeout_s=5)


async def test_broken_engine_is_replaced_and_nothing_of_it_becomes_data(nodes, fake_model, tmp_path):
    (tmp_path / "break").touch()
    async with Rollouts(fake_model, directory=str(tmp_path)) as rollouts:
        (member,) = (await rollouts.group()).members
        await rollouts.until(lambda: rollouts.pool.num_replaced == 1)
        await rollouts.until(lambda: len(rollouts.pool.workers) == 2)
    assert member.reward.valid
    assert len(member.trajectory.turns) == NUM_CALLS + 1


async def test_hung_worker_is_found_by_its_missing_heartbeat(nodes, fake_model, tmp_path):
    async with Rollouts(fake_model, directory=str(tmp_path), heartbeat_timeout_s=8.0) as rollouts:
        running = asyncio.create_task(rollouts.group())
        await rollouts.until((tmp_path / "waiting").exists)
        process_id = int((tmp_path / "waiting").read_text())
        os.kill(process_id, signal.SIGSTOP)
        (member,) = (await asyncio.wait_for(running, 60)).members
        await rollouts.until(lambda: not os.path.exists(f"/proc/{process_id}"))
        await rollouts.until(lambda: len(rollouts.pool.workers) == 2)
    assert member.reward.valid


async def test_members_of_a_group_stay_together_until_the_worker_is_full(nodes, fake_model):
    async with Rollouts(fake_model, capacity=4) as rollouts:
        pool = rollouts.pool
        first = [await pool.acquire("a") for _ in range(4)]
        other = await pool.acquire("b")
        overflow = await pool.acquire("a")
        assert len({worker.name for worker in first}) == 1
        assert other.name != first[0].name
        assert overflow.name == other.name
        for _ in range(2):
            await pool.acquire("c")
        waiting = asyncio.create_task(pool.acquire("d"))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "a full pool makes its callers wait"
        pool.release(first[0], "a")
        assert (await waiting).name == first[0].name


async def test_cancelled_episode_frees_its_place(nodes, fake_model, tmp_path):
    async with Rollouts(fake_model, directory=str(tmp_path), num_workers=1, capacity=1) as rollouts:
        running = asyncio.create_task(rollouts.group())
        await rollouts.until((tmp_path / "waiting").exists)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await rollouts.until((tmp_path / "cancelled").exists)
        (member,) = (await asyncio.wait_for(rollouts.group(), 30)).members
        assert rollouts.pool.num_replaced == 0
    assert member.reward.valid


async def test_pool_that_cannot_be_healed_tells_everyone_who_waits(nodes, fake_model, monkeypatch):
    async with Rollouts(fake_model, num_workers=1) as rollouts:

        async def refuse(worker):
            raise EngineFault("no weights")

        rollouts.pool.prepare = refuse
        rollouts.pool.retire(rollouts.pool.workers[0], "killed by the test")
        with pytest.raises(EngineFault, match="no worker is left, and 3 replacements did not start; the last: no weights"):
            await asyncio.wait_for(rollouts.group(), 60)


async def test_dead_tool_actor_is_passed_over_and_a_dead_judge_is_no_verdict(nodes):
    servers = [spawn(CountingTools, {"num_cpus": 0}) for _ in range(2)]
    toolbox = RemoteToolbox(ActorChoice(servers, stage="tools", timeout_s=30))
    call = ToolCall(name="search", arguments={"query": "x"})
    await toolbox.call(call)
    kill(servers[0])
    assert [(await toolbox.call(call)).error for _ in range(4)] == [None] * 4
    kill(servers[1])
    with pytest.raises(ActorLost, match="tools"):
        await toolbox.call(call)
    judge = spawn(JudgeServer, {"num_cpus": 0}, JudgeConfig())
    remote = RemoteJudge(ActorChoice([judge], stage="judge", timeout_s=30))
    assert (await remote.grade(TASK, "yes")).status == "correct"
    kill(judge)
    assert (await remote.grade(TASK, "yes")).status == "unknown"
