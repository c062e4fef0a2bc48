"""An outage is not the policy's fault, from the provider's 503 to the training batch; throttled tools admit fewer; money ends runs."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import numpy as np
import pytest

from tests.fakes import FakeJudge, ScriptedPolicy, answer, make_task, make_tokenizer, search
from tests.hostile_server import hostile_server, response
from tests.rollout_fakes import CountingTasks, ListRecorder, make_member, make_turn
from tests.virtual_time import run_virtual
from webdancer.algorithm.advantages import samples_from
from webdancer.algorithm.dynamic_sampling import keep_group
from webdancer.config import EpisodeConfig, PoliteConfig, PromptConfig, RewardConfig, RolloutConfig, SearchConfig, ToolsConfig
from webdancer.errors import ServiceError
from webdancer.rollout.admission import INTERVAL_S, Admission
from webdancer.rollout.collector import GroupCollector
from webdancer.rollout.group import sample_group
from webdancer.rollout.outage import OutageGuard
from webdancer.rollout.runner import LocalEpisodeRunner
from webdancer.rollout.tool_tally import ToolTally
from webdancer.tools.ledger import Ledger
from webdancer.tools.result import BUDGET_SPENT, INFRASTRUCTURE_ERRORS
from webdancer.tools.toolbox import WebToolbox, open_tools
from webdancer.types import JudgeUse, Sampling, ToolCall, ToolResult, ToolUse, Turn, TurnFinished, Verdict

LIMITS = EpisodeConfig(max_turns=3, max_tool_calls=5, max_tokens=1500, max_turn_tokens=200, timeout_s=60.0)
HITS = json.dumps({"result": [[{"document": {"contents": '"Karo Mil"\nThe school of Karo Mil.', "url": "/wiki/K"}}]]})


class Episodes:
    """An EpisodeRunner whose policy searches once and answers, by member: (query, answer)."""

    def __init__(self, toolbox, script):
        self.toolbox, self.script = toolbox, script

    async def run(self, task, *, member, **options):
        query, said = self.script[member]
        runner = LocalEpisodeRunner(
            policy=ScriptedPolicy([search(query), answer(said)]),
            toolbox=self.toolbox,
            judge=FakeJudge(),
            tokenizer=make_tokenizer(),
            episode=LIMITS,
            prompt=PromptConfig(style="brief"),
            reward=RewardConfig(),
            infrastructure_errors=INFRASTRUCTURE_ERRORS,
        )
        return await runner.run(task, member=member, **options)


async def group_of(toolbox, script, *, guard: bool = False):
    runner = Episodes(toolbox, script)
    runner = OutageGuard(runner, limit=99) if guard else runner
    return await sample_group(
        make_task(("yes",)), runner, group_size=len(script), attempt=0, start_version=0, sampling=Sampling(), max_lost=0
    )


async def test_a_provider_that_fails_for_some_members_leaves_the_others_a_group():
    """Members 2 and 3 meet an outage; 3 answers right all the same. Neither is trained on, neither moves the others' advantages."""
    script = [("fine", "yes"), ("fine", "no"), ("down", "no"), ("down", "yes"), ("fine", "no")]
    handlers = {}
    async with hostile_server(handlers) as server:

        async def retrieve(writer):
            down = b"down" in server.bodies[-1]
            await response("{}" if down else HITS, status=503 if down else 200, content_type="application/json")(writer)

        handlers["/retrieve"] = retrieve
        config = ToolsConfig(search=SearchConfig(url=server.origin), polite=PoliteConfig(max_attempts=1))
        async with WebToolbox(config) as toolbox:
            group = await group_of(toolbox, script)
    assert [member.reward.valid for member in group.members] == [True, True, False, False, True]
    lost = group.members[2]
    assert lost.trajectory.turns[0].result.error == "unavailable", "the turn is marked"
    assert lost.verdict.status == "unknown"
    valid = [member.reward.valid for member in group.members]
    assert keep_group([member.reward.answer for member in group.members], valid_G=valid).keep
    samples = {sample.id: sample.advantages[0] for sample in samples_from([group])}
    alone = [member for member in group.members if member.reward.valid]
    rewards = np.array([member.reward.total for member in alone])
    expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
    assert list(samples) == [member.trajectory.id for member in alone]
    np.testing.assert_allclose(list(samples.values()), expected, rtol=1e-6)


async def test_a_group_pays_once_for_what_all_its_members_ask_and_a_spent_budget_ends_the_run():
    async with hostile_server({"/retrieve": response(HITS, content_type="application/json")}) as server:
        config = ToolsConfig(search=SearchConfig(url=server.origin, usd_per_1000=1.0))
        ledger = Ledger(budget_usd=0.0025)
        async with WebToolbox(config, tools=open_tools(config, quota=ledger)) as toolbox:
            group = await group_of(toolbox, [("same", "yes")] * 8 + [("other", "no")] * 8, guard=True)
            figures = ToolTally(group.members).figures(useful_groups=1)
            with pytest.raises(ServiceError, match=r"tools\.budget_usd: must cover the run, but is spent"):
                await group_of(toolbox, [("a third", "yes")] * 4, guard=True)
    assert len(server.requests) == 2 == ledger.spent["retrieve"]["requests"]
    assert figures["tools/calls"] == 16
    assert figures["tools/requests_per_call"] == 2 / 16
    assert figures["tools/hit_rate"] == 14 / 16
    assert figures["tools/retrieve_hits"] == 14
    assert figures["tools/usd"] == pytest.approx(0.002)
    assert figures["tools/usd_per_useful_group"] == pytest.approx(0.002)
    assert figures["tools/usd_per_trajectory"] == pytest.approx(0.002 / 16)


def test_no_tool_call_no_figures():
    assert ToolTally([make_member(make_task())]).figures(useful_groups=1) == {}


def test_what_the_judge_took_is_in_the_metrics_of_all_rollouts():
    use = JudgeUse(requests=1, prompt_tokens=300, completion_tokens=20, usd=0.001)
    judged = Verdict(status="wrong", use=use)
    members = [dataclasses.replace(make_member(make_task(), member=member), verdict=judged) for member in range(2)]
    members.append(dataclasses.replace(members[0], verdict=Verdict(status="wrong", use=JudgeUse(hits=1))))
    expected = {"requests": 2.0, "hits": 1.0, "prompt_tokens": 600.0, "completion_tokens": 40.0, "usd": 0.002}
    assert ToolTally(members).figures() == {f"judge/{name}": value for name, value in expected.items()}


async def test_a_run_whose_judge_spent_its_money_ends():
    class Unpaid:
        async def run(self, task, **settings):
            return dataclasses.replace(make_member(task), verdict=Verdict(status="unknown", reason=BUDGET_SPENT))

    with pytest.raises(ServiceError, match=r"tools\.budget_usd: must cover the run, but is spent"):
        await OutageGuard(Unpaid(), limit=99).run(make_task(), member=0, attempt=0, sampling=Sampling())


def turn_with(result: ToolResult) -> Turn:
    base = make_turn()
    return Turn(completion=base.completion, action=ToolCall(name="search", arguments={"query": "x"}), result=result)


def test_misses_of_a_recording_are_counted():
    found = ToolResult(text="", uses=(ToolUse(provider="recording", hits=1),))
    turns = (turn_with(ToolResult(text="", error="replay_miss")), turn_with(found))
    assert ToolTally([make_member(make_task(), turns=turns)]).figures()["tools/replay_misses"] == 1


def test_admission_halves_while_throttled_and_recovers():
    admission, limits = Admission(16), []
    for interval, throttled in enumerate([True, True, True, False, False, False, False, False, False, False]):
        for index in range(10):
            admission.note(ToolResult(text="", throttled=throttled and index < 5))
        limits.append(admission.limit((interval + 1) * INTERVAL_S, running=16))
    assert limits[0] == 16, "the first interval only starts the clock"
    assert limits[1:] == [8, 4, 6, 9, 13, 16, 16, 16, 16]


def test_admission_stops_at_once_where_calls_are_turned_away_and_lets_one_try():
    admission = Admission(16)
    assert admission.limit(0.0, running=0) == 16
    for _ in range(8):
        admission.note(ToolResult(text="", error="unavailable", throttled=True))
    limits = [admission.limit(now, running=0) for now in (0.1, 5.0, 5.2, 5.3)]
    assert limits == [0, 0, 1, 1]
    admission.note(ToolResult(text="", error="unavailable", throttled=True))
    assert [admission.limit(now, running=0) for now in (6.0, 10.9, 11.0)] == [0, 0, 1]


def test_a_few_throttled_calls_are_nothing():
    admission = Admission(4)
    for interval in range(5):
        for index in range(10):
            admission.note(ToolResult(text="", throttled=index < 4))
        assert admission.limit(interval * INTERVAL_S, running=4) == 4


class Provider:
    """Episodes of three calls to a provider that serves `rate` calls a second and says when it is behind; down in [from, to)."""

    def __init__(self, rate: float, *, down: tuple[float, float] = (0.0, 0.0)) -> None:
        self.rate, self.down = rate, down
        self.free_at = 0.0
        self.running = 0
        self.most: list[tuple[float, int]] = []
        self.started: list[float] = []

    async def run(self, task, *, member, attempt, sampling, resume_from=(), on_turn=None):
        loop = asyncio.get_running_loop()
        self.running += 1
        if member == 0:
            self.started.append(loop.time())
        valid = True
        for index in range(3):
            self.most.append((loop.time(), self.running))
            if self.down[0] <= loop.time() < self.down[1]:
                result, valid = ToolResult(text="", error="unavailable", throttled=True), False
            else:
                self.free_at = max(self.free_at, loop.time()) + 1 / self.rate
                wait = self.free_at - loop.time()
                await asyncio.sleep(wait)
                result = ToolResult(text="", throttled=wait > 1)
            turn = turn_with(result)
            on_turn(TurnFinished(task_id=task.id, member=member, attempt=attempt, index=index, turn=turn))
        self.running -= 1
        return make_member(task, member=member, attempt=attempt, correct=member % 2 == 0, valid=valid)


def train(provider: Provider, *, batches: int, groups: int = 8) -> float:
    async def main() -> float:
        config = RolloutConfig(groups_per_step=groups, group_size=4, max_staleness=1, stall_timeout_s=1e6)
        async with GroupCollector(config, CountingTasks(), provider, ListRecorder()) as collector:
            for version in range(1, batches + 1):
                collector.release(await collector.next_batch(), version=version)
            return asyncio.get_running_loop().time()

    return run_virtual(main())


def test_the_collector_admits_fewer_groups_to_a_provider_that_cannot_keep_up(monkeypatch):
    """A twelfth as many rollouts wait for it, and nothing takes longer: the provider alone decides."""
    slow = Provider(rate=2)
    took = train(slow, batches=6)
    assert max(running for at, running in slow.most if at < 5) == 64, "at first nobody knows"
    waiting = np.mean([running for at, running in slow.most if at > took / 2])
    monkeypatch.setattr(Admission, "note", lambda self, result: None)
    unheeded = Provider(rate=2)
    assert took <= 1.05 * train(unheeded, batches=6)
    assert waiting < np.mean([running for _, running in unheeded.most]) / 8


def test_a_provider_that_keeps_up_is_given_all():
    quick = Provider(rate=1e6)
    train(quick, batches=6)
    assert max(running for _, running in quick.most) == 64


def test_an_outage_does_not_use_the_questions_up():
    """60 seconds without the provider: a group now and then tries, and the run goes on when it is back."""
    provider = Provider(rate=1e6, down=(0.0, 60.0))
    train(provider, batches=2)
    during = [at for at in provider.started if 5 < at < 60]
    assert 3 <= len(during) <= 20
