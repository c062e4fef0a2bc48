"""Two judge actors that pay for their model spend from the one budget of the run, and stop where it ends."""

from __future__ import annotations

import asyncio
import json

from tests.fakes import make_task
from tests.hostile_server import hostile_server, response
from webdancer.cluster.calls import answer, kill, spawn
from webdancer.cluster.servers import JudgeServer, LedgerServer
from webdancer.cluster.services import ActorChoice, RemoteJudge
from webdancer.config import JudgeConfig, ToolsConfig
from webdancer.rewards.judge import unpaid

REPLY = {
    "choices": [{"message": {"content": '{"correct": "no"}'}}],
    "usage": {"prompt_tokens": 900, "completion_tokens": 100},
}


async def test_judges_on_several_nodes_share_one_budget(nodes, tmp_path):
    async with hostile_server({"/v1/chat/completions": response(json.dumps(REPLY), content_type="application/json")}) as server:
        settings = {"usd_per_million_prompt": 100.0, "usd_per_million_completion": 100.0, "max_concurrent": 1}
        config = JudgeConfig(backend="openai", base_url=f"{server.origin}/v1", model="m", **settings)
        ledger = spawn(LedgerServer, {"num_cpus": 0}, ToolsConfig(budget_usd=0.55), run_dir=str(tmp_path))
        judges = [spawn(JudgeServer, {"num_cpus": 0}, config, ledger=ledger) for _ in range(2)]
        judge = RemoteJudge(ActorChoice(judges, stage="judge", timeout_s=60))
        try:
            verdicts = [await judge.grade(make_task(), f"answer {number}") for number in range(8)]
            again = await asyncio.gather(*(judge.grade(make_task(), f"answer {number}") for number in range(2)))
            spent = await answer(ledger.spent.remote(), stage="ledger", timeout_s=30)
            await answer(ledger.close.remote(), stage="ledger", timeout_s=30)
        finally:
            for actor in [*judges, ledger]:
                kill(actor)
    assert [verdict.status for verdict in verdicts] == ["wrong"] * 6 + ["unknown"] * 2
    assert [unpaid(verdict) for verdict in verdicts] == [False] * 6 + [True] * 2
    assert {verdict.use.usd for verdict in verdicts[:6]} == {0.1}
    assert [verdict.use.hits for verdict in again] == [1, 1], "what is remembered costs nothing"
    assert len(server.requests) == 6
    assert round(spent["judge"]["usd"], 6) == 0.6
    assert json.loads((tmp_path / "spending.json").read_bytes())["judge"]["requests"] == 6
