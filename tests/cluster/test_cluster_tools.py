"""Tool actors on two nodes: each query has one owner, a quota holds for their sum, and a pool that shrinks or grows costs misses only."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.cluster.speaking_judge import SpeakingJudge
from tests.hostile_server import hostile_server, response
from webdancer.cluster.calls import answer, kill, spawn
from webdancer.cluster.servers import LedgerServer, ToolServer
from webdancer.cluster.services import ActorChoice, RemoteToolbox, RemoteWriter
from webdancer.config import FetchConfig, ReplayConfig, SearchConfig, SummarizerConfig, ToolsConfig, VisitConfig
from webdancer.tools.pieces import owner_key, owners
from webdancer.types import ToolCall

RATE = 25.0


def search(query) -> ToolCall:
    return ToolCall(name="search", arguments={"query": query})


def visit(url) -> ToolCall:
    return ToolCall(name="visit", arguments={"url": url, "goal": "owl"})


@asynccontextmanager
async def provider():
    """Answers each query with a page that names it; keeps who was asked for what, and when."""
    handlers, asked = {}, []
    async with hostile_server(handlers) as server:

        async def retrieve(writer):
            (query,) = json.loads(server.bodies[-1])["queries"]
            asked.append((time.monotonic(), query))
            document = {"contents": f'"{query}"\nAll about {query}.', "url": f"/wiki/{query}"}
            await response(json.dumps({"result": [[{"document": document}]]}), content_type="application/json")(writer)

        handlers["/retrieve"] = retrieve
        yield server.origin, asked


@asynccontextmanager
async def tool_actors(config, nodes, *, run_dir, count=2, engine=None):
    """One on each of the two other nodes, a third beside the first; the ledger is on the head."""

    def on(node):
        return {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}

    ledger = spawn(LedgerServer, on(nodes[0]), config, run_dir=str(run_dir))
    settings = {"config": config, "call_timeout_s": 60.0, "ledger": ledger, "engine": engine}
    servers = [spawn(ToolServer, on(nodes[1 + index % 2]), **settings, shard=index) for index in range(count)]
    try:
        await asyncio.gather(*(answer(server.ready.remote(), stage="start", timeout_s=60) for server in servers))
        yield servers, ledger
    finally:
        for actor in [*servers, ledger]:
            kill(actor)


def toolbox_over(servers) -> RemoteToolbox:
    return RemoteToolbox(ActorChoice(servers, stage="tools", timeout_s=60))


async def ask_all(toolbox, queries) -> set[str]:
    """Asks each for itself; gives those that were answered from memory. Every answer must be the right one."""
    results = await asyncio.gather(*(toolbox.call(search(query)) for query in queries))
    for query, result in zip(queries, results, strict=True):
        assert result.error is None, result
        assert f"All about {query}." in result.text
    return {query for query, result in zip(queries, results, strict=True) if result.cached}


async def test_two_nodes_together_never_exceed_a_quota_and_a_recording_of_both_is_one_file(nodes, tmp_path):
    async with provider() as (origin, asked):
        config = ToolsConfig(
            search=SearchConfig(url=origin, requests_per_s=RATE, usd_per_1000=1.0),
            replay=ReplayConfig(mode="record", path=str(tmp_path / "recording")),
        )
        async with tool_actors(config, nodes, run_dir=tmp_path) as (servers, ledger):
            del asked[:]
            queries = [f"q{number}" for number in range(100)]
            shares = [sum(owners(owner_key(search(query)), 2)[0] == index for query in queries) for index in (0, 1)]
            assert min(shares) > 30, "both nodes ask"
            started = time.monotonic()
            await ask_all(toolbox_over(servers), queries)
            # The check at the start, by one actor for all, was a lease as well; what is sent cannot be earlier than its lease allows.
            for number, (at, _) in enumerate(sorted(asked), start=1):
                assert at - started >= (number - 1) / RATE - 1e-3, f"request {number} of {len(asked)}"
            assert len(asked) == 100
            spent = await answer(ledger.spent.remote(), stage="ledger", timeout_s=30)
            assert spent["retrieve"]["requests"] == 101
            await answer(ledger.close.remote(), stage="ledger", timeout_s=30)
    assert json.loads((tmp_path / "spending.json").read_text())["retrieve"]["requests"] == 101
    replay = ToolsConfig(replay=ReplayConfig(mode="replay", path=str(tmp_path / "recording")))
    async with tool_actors(replay, nodes, run_dir=tmp_path / "elsewhere", count=1) as (servers, _):
        assert await ask_all(toolbox_over(servers), queries) == set(queries)


async def test_a_page_that_moves_to_another_host_is_asked_for_by_that_hosts_owner(nodes, tmp_path):
    handlers = {"/y": response("<p>All about the owl.</p>"), "/retrieve": response('{"result": [[]]}', content_type="application/json")}
    async with hostile_server(handlers) as server:
        here = server.origin
        other = here.replace("127.0.0.1", "localhost")
        for number in range(8):
            handlers[f"/{number}"] = response(status=301, location=f"{other}/y")
        config = ToolsConfig(
            search=SearchConfig(url=here), fetch=FetchConfig(allowed_origins=[here, other]), visit=VisitConfig(extraction_processes=0)
        )
        async with tool_actors(config, nodes, run_dir=tmp_path) as (servers, _):
            toolbox = toolbox_over(servers)
            led = [visit(f"{here}/{number}") for number in range(8)]
            assert [owners(owner_key(call), 2)[0] for call in (led[0], visit(f"{other}/y"))] == [0, 1], "on two nodes"
            results = await asyncio.gather(*map(toolbox.call, [*led, visit(f"{other}/y"), visit([f"{here}/0", f"{other}/y"])]))
            assert all(result.error is None and "All about the owl." in result.text for result in results), results
            asked = [request.split(" ")[1] for request in server.requests]
            assert sorted(path for path in asked if path != "/retrieve") == [*(f"/{number}" for number in range(8)), "/y"]


async def test_pages_are_summarized_on_the_engine_of_a_judge(nodes, tmp_path):
    found = json.dumps({"rational": "It says so.", "evidence": "All about the owl.", "summary": "An owl."})
    script = ["too long", found, "broken", "I would rather not."]  # ten times too long a page, then an outage, then nothing of use for ever
    on_head = {"num_cpus": 0, "max_concurrency": 100, "scheduling_strategy": NodeAffinitySchedulingStrategy(nodes[0], soft=False)}
    judge = spawn(SpeakingJudge, on_head, script)
    engine = RemoteWriter(ActorChoice([judge], stage="summarizer", timeout_s=60))
    handlers = {"/y": response("<p>All about the owl.</p>"), "/retrieve": response('{"result": [[]]}', content_type="application/json")}
    try:
        async with hostile_server(handlers) as server:
            summarizer = SummarizerConfig(backend="engine")
            web = VisitConfig(site=server.origin, extraction_processes=0, summarizer=summarizer)
            config = ToolsConfig(search=SearchConfig(url=server.origin), visit=web)
            async with tool_actors(config, nodes, run_dir=tmp_path, count=1, engine=engine) as (servers, _):
                toolbox = toolbox_over(servers)
                group = await asyncio.gather(*(toolbox.call(visit("/y")) for _ in range(4)))
                other_goal = ToolCall(name="visit", arguments={"url": "/y", "goal": "cat"})
                outage, useless = await toolbox.call(other_goal), await toolbox.call(other_goal)
        heard = await answer(judge.heard.remote(), stage="judge", timeout_s=30)
    finally:
        kill(judge)
    assert {(result.error, result.text.rpartition("Summary: ")[2].strip()) for result in group} == {(None, "An owl.")}
    assert (outage.error, useless.error) == ("unavailable", "no_summary")
    assert len(heard) == 2 + 1 + 3, "a page that is too long once more, an engine that is gone not, words that are no JSON three times"
    assert all('"page": "All about the owl' in prompt.replace("\\", "") for prompt in (heard[0], heard[2]))


async def test_a_group_asks_once_and_a_pool_that_changes_costs_misses_only(nodes, tmp_path):
    async with provider() as (origin, asked):
        config = ToolsConfig(search=SearchConfig(url=origin))
        async with tool_actors(config, nodes, run_dir=tmp_path, count=3) as (servers, _):
            del asked[:]
            two, three = toolbox_over(servers[:2]), toolbox_over(servers)
            from_everywhere = [ray.cloudpickle.loads(ray.cloudpickle.dumps(two)) for _ in range(16)]
            group = await asyncio.gather(*(member.call(search(["Karo Mil", "Bana School"])) for member in from_everywhere))
            assert len({result.text for result in group}) == 1
            assert sorted(query for _, query in asked) == ["Bana School", "Karo Mil"], "16 members, 32 queries, 2 requests"
            queries = [f"q{number}" for number in range(60)]
            await ask_all(two, queries)
            assert await ask_all(two, queries) == set(queries)

            def owned_by(index, count):
                return {query for query in queries if owners(owner_key(search(query)), count)[0] == index}

            assert await ask_all(three, queries) == set(queries) - owned_by(2, 3), "a third actor takes over only what is its own"
            kill(servers[0])
            cached = await ask_all(three, queries)
            assert set(queries) - owned_by(0, 3) <= cached, "who is left knows what it knew, and the heirs answer for the dead"
