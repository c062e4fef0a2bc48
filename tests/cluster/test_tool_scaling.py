"""Tool actors come and go while a run goes on: a change costs what has to be asked anew, and no call gets another answer for it.

Real servers and the real router, without a Ray: an actor is an object of this process, and a call is a task.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from tests.cluster.test_cluster_pool import worker_spec
from tests.cluster.test_cluster_tools import ask_all, provider, search, toolbox_over
from tests.fakes import FakeJudge
from webdancer.cluster import scaling, services, tool_pool
from webdancer.cluster.pool import PoolState
from webdancer.cluster.servers import ToolServer
from webdancer.cluster.services import ActorChoice, RemoteToolbox
from webdancer.cluster.tool_pool import ToolPool
from webdancer.cluster.worker import RolloutWorker
from webdancer.config import SearchConfig, ToolsConfig
from webdancer.tools.pieces import owner_key, owners
from webdancer.types import ToolResult


class Actor:
    """An actor's handle on a plain object; once `dead`, every call fails as Ray's do."""

    def __init__(self, target) -> None:
        self.target = target
        self.dead = False
        self.num_calls = 0

    def __getattr__(self, name):
        async def call(*arguments):
            if self.dead:
                raise ActorDiedError
            self.num_calls += name == "call"
            return await getattr(self.target, name)(*arguments)

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))


class Workers:
    """As much of a pool of rollout workers as is told of tools."""

    def __init__(self, *toolboxes) -> None:
        self.prepare = None
        self.workers = [self.member(toolbox) for toolbox in toolboxes]

    @staticmethod
    def member(toolbox):
        return SimpleNamespace(name="rollout-0", handle=Actor(RolloutWorker(worker_spec("none"), toolbox, FakeJudge())))


@pytest.fixture
def killed(monkeypatch):
    found = []

    def kill(actor):
        actor.dead = True
        found.append(actor)

    monkeypatch.setattr(tool_pool, "kill", kill)
    return found


@asynccontextmanager
async def tools(*, count, limit=9, **search_settings):
    """A pool of `count` tool actors over the driver's toolbox and one worker's; actors from number `limit` on do not start.

    (pool, driver's toolbox, worker's toolbox, workers, what the provider was asked)"""
    async with provider() as (origin, asked):
        config = ToolsConfig(search=SearchConfig(url=origin, **search_settings))
        broken = ToolsConfig(search=SearchConfig(backend="index", index="/nowhere"))

        def spawn_tool(shard):
            return Actor(ToolServer(config if shard < limit else broken, call_timeout_s=60.0, shard=shard))

        servers = [spawn_tool(shard) for shard in range(count)]
        toolbox, copy = toolbox_over(servers), toolbox_over(servers)
        workers = Workers(copy)
        pool = ToolPool(spawn_tool, servers, toolbox, workers, drain_timeout_s=60.0)
        yield pool, toolbox, copy, workers, asked
        await pool.stop()
        for server in servers:
            await server.target.drain()


async def reach(pool, number):
    pool.scale(number)
    async with asyncio.timeout(60):
        while pool.state != PoolState(wanted=number, serving=number, starting=0, leaving=0, failure=""):
            assert pool.state.failure == ""
            await asyncio.sleep(0.01)


def owned_by(index, count, queries):
    return {query for query in queries if owners(owner_key(search(query)), count)[0] == index}


async def test_more_and_fewer_tool_actors_cost_misses_only(killed):
    queries = [f"q{number}" for number in range(40)]
    async with tools(count=2) as (pool, toolbox, copy, workers, _):
        await ask_all(toolbox, queries)
        moved = owned_by(2, 3, queries)
        assert 0 < len(moved) < 30
        await reach(pool, 3)
        assert await ask_all(copy, queries) == set(queries) - moved, "a worker knows the newcomer, who takes over what is its own"
        assert await ask_all(toolbox, queries) == set(queries), "so does the driver"
        late = toolbox_over(pool._servers[:2])
        await workers.prepare(workers.member(late))
        assert await ask_all(late, queries) == set(queries), "and a worker that was made before and joins after"
        await reach(pool, 2)
        assert await ask_all(copy, queries) == set(queries), "who owned them before still knows"
        assert len(killed) == 1


async def test_the_calls_of_a_leaver_end_before_it_goes(killed):
    queries = sorted(owned_by(1, 2, [f"q{number}" for number in range(60)]))[:8]
    async with tools(count=2, requests_per_s=4.0) as (pool, _, copy, _, asked):
        stale = toolbox_over(pool._servers)
        leaver = pool._servers[1]
        under_way = asyncio.create_task(ask_all(copy, queries))
        async with asyncio.timeout(30):
            while leaver.num_calls < 8:
                await asyncio.sleep(0.01)
        pool.scale(1)
        async with asyncio.timeout(30):
            while pool.state.leaving == 0:
                await asyncio.sleep(0.001)
        assert not under_way.done(), "a quota of 4 a second makes eight requests take a second"
        assert killed == []
        await under_way
        assert sorted(query for _, query in asked if query in queries) == queries, "each was asked once"
        await reach(pool, 1)
        assert killed == [leaver]
        assert leaver.num_calls == 8
        await ask_all(stale, queries[:2])
        await ask_all(copy, queries[:2])


async def test_a_desk_that_fails_or_asks_for_nonsense_is_asked_again(monkeypatch):
    monkeypatch.setattr(scaling, "EXCHANGE_S", 0.01)
    scaled = asyncio.Event()
    replies = [RuntimeError("a fault of the desk"), {"judges": ("t0", 3)}, {"rollout": ("t1", 2)}]

    class Desk:
        async def exchange(self, states, heard):
            if not replies:
                assert heard["rollout"] == "t1"
                scaled.set()
                await asyncio.sleep(1e6)
            reply = replies.pop(0)
            if isinstance(reply, Exception):
                raise reply
            return reply

    numbers = []
    pool = SimpleNamespace(state=None, scale=numbers.append)
    following = asyncio.create_task(scaling._follow(Actor(Desk()), {"rollout": pool}))
    await asyncio.wait_for(scaled.wait(), 30)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert numbers == [2]


async def test_an_actor_that_lives_and_does_not_answer_is_restarted(monkeypatch):
    restarted = []
    monkeypatch.setattr(services, "restart", restarted.append)

    class Hung:
        hangs = True

        async def call(self, piece, hop=None):
            if self.hangs:
                await asyncio.sleep(1e6)
            return ToolResult(text="here")

    hung = Actor(Hung())
    toolbox = RemoteToolbox(ActorChoice([hung], stage="tools", timeout_s=0.05))
    for _ in range(2):
        assert restarted == []
        with pytest.raises(TimeoutError, match="tools: no answer within"):
            await toolbox.call(search("q"))
    assert restarted == [hung]
    for hangs in (True, False, True):  # two in a row, with nothing answered between
        hung.target.hangs = hangs
        await asyncio.gather(toolbox.call(search("q")), return_exceptions=True)
    assert restarted == [hung]


async def test_tool_actors_that_do_not_start_are_told_of_and_nothing_changes(killed):
    async with tools(count=1, limit=1) as (pool, toolbox, _, _, _):
        pool.scale(3)
        async with asyncio.timeout(30):
            while not pool.state.failure:
                await asyncio.sleep(0.01)
        assert (pool.state.wanted, pool.state.serving, pool.state.starting) == (1, 1, 0)
        assert len(killed) == 2
        await ask_all(toolbox, ["q"])
