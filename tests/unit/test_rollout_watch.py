"""An engine that hangs, lies or dies is never data; a stall says what episodes wait for; and under all faults at once every group is
accounted for."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeJudge, FakeToolbox, ScriptedPolicy, answer, make_completion, make_tokenizer, search
from tests.rollout_fakes import CyclingTasks, TimedRunner, make_task
from tests.unit.test_rollout_collector import ListRecorder, check_accounting, collector, rollout_config
from tests.virtual_time import run_virtual
from webdancer.config import EpisodeConfig, PromptConfig, RewardConfig
from webdancer.errors import EngineFault, StalledError
from webdancer.rollout.outage import OutageGuard
from webdancer.rollout.runner import LocalEpisodeRunner
from webdancer.rollout.watch import Activity, GuardedPolicy, RunPolicy, Waiting, WatchedToolbox, described, garbage
from webdancer.types import EpisodeLost, Sampling, StopReason, VersionSpan

LIMITS = EpisodeConfig(max_turns=4, max_tool_calls=4, max_tokens=2048, max_turn_tokens=64, timeout_s=400.0, tool_timeout_s=30.0)


def complete(policy, **changes):
    return policy.complete([1, 2], **{"sampling": Sampling(), "max_tokens": 64, "session": "s", **changes})


def test_an_engine_that_does_not_answer_is_a_fault_that_names_its_stage():
    policy = GuardedPolicy(ScriptedPolicy([answer("x")], delay_s=1e9), Activity(), timeout_s=60.0)
    with pytest.raises(EngineFault, match=r"generate: no answer of the engine within 60 s \(episode\.turn_timeout_s\)"):
        run_virtual(complete(policy))


def test_who_gives_up_earlier_is_not_told_of_a_hung_engine():
    activity = Activity()
    policy = GuardedPolicy(ScriptedPolicy([answer("x")], delay_s=1e9), activity, timeout_s=60.0)

    async def main():
        async with asyncio.timeout(5):
            await complete(policy)

    with pytest.raises(TimeoutError):
        run_virtual(main())
    assert activity.now() == {}


@pytest.mark.parametrize("turn_s", [100.0, 449.0])
def test_an_engine_that_hangs_loses_an_episode_however_old_it_is(turn_s):
    """The second time the episode's deadline passes 4 s later, long before the turn's."""
    limits = EpisodeConfig(max_turns=9, max_tool_calls=9, max_tokens=4096, max_turn_tokens=64, timeout_s=1800.0, turn_timeout_s=900.0)
    engine = ScriptedPolicy([search(f"q{index}") for index in range(9)], delay_s=turn_s)
    complete_turn = engine.complete

    async def hanging(*arguments, **settings):
        if len(engine.prompts) == 4:
            await asyncio.sleep(1e9)
        return await complete_turn(*arguments, **settings)

    engine.complete = hanging
    runner = LocalEpisodeRunner(
        policy=GuardedPolicy(engine, Activity(), timeout_s=limits.turn_timeout_s),
        toolbox=FakeToolbox("Nothing."),
        judge=FakeJudge(),
        tokenizer=make_tokenizer(),
        episode=limits,
        prompt=PromptConfig(style="brief"),
        reward=RewardConfig(),
    )
    outcome = run_virtual(runner.run(make_task(0), member=0, attempt=0, sampling=Sampling()))
    assert isinstance(outcome, EpisodeLost)
    assert outcome.reason == "generate: no answer of the engine within 900 s (episode.turn_timeout_s)"


def test_what_an_engine_gives_before_its_weights_are_proven_waits():
    policy = GuardedPolicy(ScriptedPolicy([answer("x")] * 2), Activity(), timeout_s=60.0)

    async def main():
        policy.proven.clear()
        waiting = asyncio.create_task(complete(policy))
        await asyncio.sleep(1000)
        assert not waiting.done()
        policy.proven.set()
        assert (await waiting).finish == "stop"

    run_virtual(main())


def test_two_runs_of_an_episode_are_two_sessions():
    seen = []

    class Engine:
        async def complete(self, prompt_ids, *, session, **settings):
            seen.append(session)

    async def main():
        for run in (3, 3, 8):
            await RunPolicy(Engine(), run).complete([1], sampling=Sampling(), max_tokens=4, session="q1/0/0")

    run_virtual(main())
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"token_ids": (), "logprobs": (), "versions": ()}, "0 tokens where 1 to 64"),
        ({"token_ids": (1,) * 65, "logprobs": (-1.0,) * 65}, "65 tokens where 1 to 64"),
        ({"token_ids": (5, -1), "logprobs": (-1.0, -1.0)}, "the token id -1"),
        ({"token_ids": (5, 6), "logprobs": (-1.0, float("nan"))}, "the log-probability nan"),
        ({"token_ids": (5, 6), "logprobs": (float("-inf"), -1.0)}, "the log-probability -inf"),
        ({"token_ids": (5, 6), "logprobs": (-1.0, 0.5)}, "the log-probability 0.5"),
        ({"token_ids": (5, 6), "logprobs": (-1.0, -1.0), "versions": (VersionSpan(version=0, start=0, end=1),)}, "a part of its tokens"),
        ({"token_ids": (5, 6), "logprobs": (-1.0, -1.0), "versions": (VersionSpan(version=0, start=1, end=2),)}, "a part of its tokens"),
    ],
)
def test_what_no_engine_can_mean_is_a_fault(change, fault):
    sound = make_completion(answer("x"))
    assert garbage(sound, max_tokens=64) is None
    assert fault in garbage(replace(sound, **change), max_tokens=64)


def test_two_versions_in_one_turn_are_sound():
    spans = (VersionSpan(version=0, start=0, end=1), VersionSpan(version=1, start=1, end=2))
    assert garbage(replace(make_completion("x"), token_ids=(5, 6), logprobs=(-1.0, 0.0), versions=spans), max_tokens=2) is None


def test_one_that_leaves_begins_nothing():
    policy = GuardedPolicy(ScriptedPolicy([answer("x")]), Activity(), timeout_s=60.0)
    policy.leaving = "rollout-0: it leaves"
    with pytest.raises(EngineFault, match="it leaves"):
        run_virtual(complete(policy))


async def test_a_stage_is_who_waits_and_since_when():
    activity = Activity()
    toolbox = WatchedToolbox(FakeToolbox(delay_s=60), activity)
    calls = [asyncio.create_task(toolbox.call(None)) for _ in range(3)]
    await asyncio.sleep(0.01)
    (stage,) = activity.now().items()
    assert stage[0] == "tool"
    assert stage[1].count == 3
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert activity.now() == {}


def test_the_stage_that_stalls_is_named_first():
    busy = {"generate": Waiting(count=7, longest_s=3.0), "judge": Waiting(count=1, longest_s=1.0)}
    stuck = {"generate": Waiting(count=2, longest_s=2.0), "tool": Waiting(count=1, longest_s=900.0)}
    line = described({"rollout-0": busy, "rollout-1": stuck})
    assert line == (
        "1 in tool (the longest for 900 s, rollout-1), 9 in generate (the longest for 3 s, rollout-0), "
        "1 in judge (the longest for 1 s, rollout-0)"
    )
    assert described({"rollout-0": {}}) == ""


def test_a_stalled_run_says_where_its_episodes_are():
    class StuckRunner(TimedRunner):
        def stages(self) -> str:
            return "8 in tool (the longest for 61 s, rollout-1)"

    async def main():
        runner = OutageGuard(StuckRunner(latency_s=lambda task, member: 1e9), limit=100)
        async with collector(rollout_config(stall_timeout_s=60), runner=runner) as groups:
            await groups.next_batch()

    with pytest.raises(StalledError, match=r"no episode finished for 60 s .*; episodes: 8 in tool \(the longest for 61 s, rollout-1\)"):
        run_virtual(main())


class FaultyEngine:
    """Dies mid-generation, hangs, lies, or never stops; else it searches twice and answers, wrong for every other member."""

    def __init__(self, seed: int, version: list[int]) -> None:
        self.draws = random.Random(seed)
        self.version = version

    async def complete(self, prompt_ids, *, sampling, max_tokens, session):
        await asyncio.sleep(self.draws.expovariate(1.0))
        fault = self.draws.random()
        done = make_tokenizer().decode(prompt_ids).count("<tool_response>")
        if fault < 0.03:
            raise EngineFault("died mid-generation")
        if fault < 0.06:
            await asyncio.sleep(1e9)
        text = search(f"q{done}") if done < 2 else answer("yes" if int(session[-1]) % 2 else "no")
        sound = make_completion(text, version=self.version[0])
        if fault < 0.09:
            return replace(sound, logprobs=(float("nan"),) * len(sound.logprobs))
        if fault < 0.12:  # never stops: the limit of the turn ends it
            ids = (7,) * max_tokens
            spans = (VersionSpan(version=self.version[0], start=0, end=max_tokens),)
            return replace(sound, token_ids=ids, text="y" * max_tokens, logprobs=(-1.0,) * max_tokens, finish="length", versions=spans)
        return sound


class TasksWithOneTooLong(CyclingTasks):
    """Every fifth question alone is longer than the context."""

    def __next__(self):
        task = super().__next__()
        return replace(task, question="why? " * 5000) if task.id.endswith(("0", "5")) else task


class HangingTools:
    def __init__(self, seed: int) -> None:
        self.draws = random.Random(seed)

    async def call(self, call):
        return await FakeToolbox("Nothing.", delay_s=1e9 if self.draws.random() < 0.02 else self.draws.expovariate(2.0)).call(call)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), staleness=st.integers(0, 1))
def test_whatever_fails_every_group_is_trained_dropped_or_in_flight(seed, staleness):
    version, activity, recorder = [0], Activity(), ListRecorder()
    engine = FaultyEngine(seed, version)
    runner = LocalEpisodeRunner(
        policy=GuardedPolicy(engine, activity, timeout_s=100.0),
        toolbox=WatchedToolbox(HangingTools(seed), activity),
        judge=FakeJudge(),
        tokenizer=make_tokenizer(),
        episode=LIMITS,
        prompt=PromptConfig(style="brief"),
        reward=RewardConfig(),
    )
    config = rollout_config(groups_per_step=3, max_staleness=staleness, max_lost=3, max_admitted_per_step=1000)

    async def main():
        async with collector(config, tasks=TasksWithOneTooLong(20), runner=runner, recorder=recorder) as groups:
            for _ in range(3):
                batch = await groups.next_batch()
                check_accounting(groups)
                version[0] += 1
                groups.release(batch, version=version[0])
                check_accounting(groups)
        return groups.accounting

    accounts = run_virtual(main())
    assert accounts.trained == 9
    assert activity.now() == {}, "nobody waits for an engine that hung"
    members = [member for group, _ in recorder.groups for member in group.members]
    assert len({member.trajectory.id for member in members}) == len(members), "no member is counted twice"
    too_long = [m for m in members if len(m.trajectory.task.question) > 1000]
    assert all(m.trajectory.stop is StopReason.MAX_TOKENS and not m.trajectory.turns for m in too_long)
    assert {make_task(0).id} <= {m.trajectory.task.id for m in too_long}
    assert all(m.reward.valid or m.trajectory.stop is StopReason.FAILED or _hung(m) for m in members)


def _hung(member) -> bool:
    return any(turn.result is not None and turn.result.error == "tool_timeout" for turn in member.trajectory.turns)
