"""The interfaces that programs see, over actors. Nothing outside of this package knows that they are remote."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from webdancer.cluster.calls import ActorLost, answer, answers, restart
from webdancer.cluster.pool import PooledWorker, TurnListener, WorkerPool
from webdancer.cluster.worker import EpisodeEnd
from webdancer.errors import EngineFault, StalledError
from webdancer.interfaces import OnText, OnTurn
from webdancer.rewards.chat import ChatRefused
from webdancer.rewards.judge import verdict_key
from webdancer.rollout.watch import described
from webdancer.tools.hops import Hop
from webdancer.tools.pieces import ask_owners, owners
from webdancer.tools.provider import ProviderFailed
from webdancer.tools.result import REFUSED, UNAVAILABLE
from webdancer.types import (
    EpisodeLost,
    Sampling,
    ScoredTrajectory,
    StepResult,
    Task,
    ToolCall,
    ToolResult,
    TrainBatch,
    TrainingPhase,
    Turn,
    TurnNews,
    TurnText,
    Verdict,
)

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class RemoteRunner:
    """interfaces.EpisodeRunner over the pool: one placement an episode, a second one only where its worker is to leave, and EpisodeLost
    when it leaves without notice, or does not answer for `timeout_s`."""

    def __init__(self, pool: WorkerPool, *, timeout_s: float | None = None) -> None:
        self._pool = pool
        self._timeout_s = timeout_s

    async def run(
        self,
        task: Task,
        *,
        member: int,
        attempt: int,
        sampling: Sampling,
        resume_from: tuple[Turn, ...] = (),
        on_turn: OnTurn | None = None,
        on_text: OnText | None = None,
    ) -> ScoredTrajectory | EpisodeLost:
        """Waits for a place on a worker first."""
        turns = list(resume_from)

        def hear(news: TurnNews) -> None:
            if isinstance(news, TurnText):
                if on_text is not None:
                    on_text(news)
                return
            if news.index < len(turns):
                return  # it came with the episode's end as well
            if news.index == len(turns):
                turns.append(news.turn)
            if on_turn is not None:
                on_turn(news)

        streaming = {} if on_text is None else {"streams": True}
        while True:
            settings = {"member": member, "attempt": attempt, "sampling": sampling, "resume_from": tuple(turns), **streaming}
            end = await self._run_on_one(task, hear, **settings)
            if not end.moved:
                return end.outcome

    def stages(self) -> str:
        """What the episodes wait for, as far as their workers have said."""
        waiting = f"{self._pool.num_waiting} wait for a place on a worker"
        return ", ".join(filter(None, [described({worker.name: worker.activity for worker in self._pool.workers}), waiting]))

    async def _run_on_one(self, task: Task, hear: TurnListener, **settings: Any) -> EpisodeEnd:
        group = (task.id, settings["attempt"])
        worker = await self._pool.acquire(group)
        run = self._pool.listen(hear)
        try:
            end: EpisodeEnd = await unless_gone(worker, worker.handle.run_episode.remote(run, task, **settings), timeout_s=self._timeout_s)
            self._pool.forget(run, end.turns)
            if not end.moved:
                self._pool.note(worker, fault=end.outcome.reason if isinstance(end.outcome, EpisodeLost) else None)
            return end
        except (ActorLost, StalledError) as error:
            self._pool.retire(worker, str(error))
            lost = EpisodeLost(task_id=task.id, member=settings["member"], attempt=settings["attempt"], reason=str(error))
            return EpisodeEnd(outcome=lost, turns=(), moved=worker.leaving)
        finally:
            self._pool.forget(run)
            self._pool.release(worker, group)


async def unless_gone(worker: PooledWorker, reference: Awaitable[Result], *, timeout_s: float | None) -> Result:
    """The call's result; ActorLost as soon as the worker leaves the pool, whether or not the call ever ends."""
    call: asyncio.Future[Result] = asyncio.ensure_future(answer(reference, stage=worker.name, timeout_s=timeout_s))
    try:
        watched: set[asyncio.Future[Any]] = {call, worker.gone}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if call.done():
            return call.result()
        raise ActorLost(f"{worker.name}: {worker.gone.result()}")
    finally:
        call.cancel()


class RemoteLearner:
    """interfaces.Learner over one actor a rank. Every method is collective: all ranks get the same call, in the same order."""

    def __init__(self, ranks: Sequence[Any], *, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._version = 0
        self.make_room: Callable[[], Awaitable[None]] | None = None
        """Before every step and evaluation: sends engines to sleep that share the ranks' GPUs."""

    @property
    def version(self) -> int:
        return self._version

    async def begin(self, phase: TrainingPhase) -> None:
        settings = {"loss": phase.loss, "optimizer": phase.optimizer, "total_steps": phase.total_steps, "temperature": phase.temperature}
        await self._all("configure_phase", **settings)

    async def step(self, batch: TrainBatch) -> StepResult:
        """The batch goes into the object store once; each rank takes its microbatches out of it."""
        if self.make_room is not None:
            await self.make_room()
        result: StepResult = await self._all("step", ray.put(batch))
        self._version = result.version
        return result

    async def evaluate(self, batch: TrainBatch) -> Mapping[str, float]:
        if self.make_room is not None:
            await self.make_room()
        metrics: Mapping[str, float] = await self._all("evaluate", ray.put(batch))
        return metrics

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probabilities [T], 0 for the first token, at temperature 1."""
        scores: list[NDArray[np.float32]] = await self._all("score", sequences)
        return scores

    async def save(self, directory: Path, cursor: Mapping[str, Any], *, best: bool = False) -> None:
        await self._all("save", str(directory.absolute()), dict(cursor), best=best)

    async def saved(self) -> None:
        await self._all("saved")

    async def load(self, directory: Path) -> Mapping[str, Any]:
        cursor: Mapping[str, Any] = await self._all("load", str(directory.absolute()))
        self._version = await self._all("get_version")
        return cursor

    async def load_best(self, directory: Path) -> None:
        await self._all("load_best", str(directory.absolute()))

    async def export(self, directory: Path) -> None:
        await self._all("export_hf", str(directory.absolute()))

    async def export_weights(self, directory: Path, version: int | None) -> Mapping[str, Any]:
        """The manifest of the files that rank 0 wrote on its own node; `version` None: labelled with the learner's own."""
        manifest: Mapping[str, Any] = await self._all("export_weights", str(directory), version)
        return manifest

    async def connect_engines(self, workers: Sequence[Any], **settings: Any) -> None:
        """Every rank opens its end of a direct weight transfer (learner_actor)."""
        await answers(
            [rank.connect_engines.remote(workers, **settings) for rank in self._ranks], stage="weights", timeout_s=self._timeout_s
        )

    async def send_weights(self) -> Mapping[str, int]:
        """The checksums of what rank 0 has sent, by tensor."""
        sent = await answers([rank.send_weights.remote() for rank in self._ranks], stage="weights", timeout_s=self._timeout_s)
        checksums: Mapping[str, int] = sent[0]
        return checksums

    async def _all(self, method: str, *arguments: Any, **settings: Any) -> Any:
        """Rank 0's result. One rank's error is raised at once: the others would wait for it in a collective."""
        calls = [rank.call.remote(method, *arguments, **settings) for rank in self._ranks]
        results = await answers(calls, stage=f"learner: {method}", timeout_s=self._timeout_s)
        return results[0]


MAX_STALLS = 2
"""Calls in a row that an actor left without an answer; one alone may be the call, more are the actor."""


class ActorChoice:
    """Several actors of one kind: the least loaded, or those of an order, and a call that meets a dead one is made again on another. One
    that lives and does not answer is restarted."""

    def __init__(self, actors: Sequence[Any], *, stage: str, timeout_s: float) -> None:
        self._actors = list(actors)
        self._stage = stage
        self._timeout_s = timeout_s
        self._loads = [0] * len(actors)
        self._stalls = [0] * len(actors)
        self._turns = itertools.count()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process counts its own calls."""
        return _choice, (self._actors, self._stage, self._timeout_s)

    @property
    def count(self) -> int:
        return len(self._actors)

    def over(self, actors: Sequence[Any]) -> ActorChoice:
        """The same over other actors."""
        return ActorChoice(actors, stage=self._stage, timeout_s=self._timeout_s)

    async def call(self, method: str, *arguments: Any, order: Sequence[int] = ()) -> Any:
        """`order`: who is asked first, and who instead of the dead. Raises ActorLost when none answers, StalledError after the timeout."""
        tried: list[ActorLost] = []
        for attempt in range(len(self._actors) + 2):
            if attempt >= len(self._actors):
                await asyncio.sleep(2.0)  # they restart by themselves
            index = order[attempt % len(order)] if order else self._least_loaded()
            self._loads[index] += 1
            try:
                reference = getattr(self._actors[index], method).remote(*arguments)
                result = await answer(reference, stage=self._stage, timeout_s=self._timeout_s)
                self._stalls[index] = 0
                return result
            except ActorLost as error:
                tried.append(error)
                self._stalls[index] = 0
            except StalledError:
                self._note_stall(index)
                raise
            finally:
                self._loads[index] -= 1
        raise tried[-1]

    def _note_stall(self, index: int) -> None:
        self._stalls[index] += 1
        if self._stalls[index] == MAX_STALLS:
            self._stalls[index] = 0
            log.warning("%s: an actor that left %d calls in a row without an answer is restarted", self._stage, MAX_STALLS)
            restart(self._actors[index])

    def _least_loaded(self) -> int:
        turn = next(self._turns)  # among equals in turn, so that a dead one is not asked for ever
        count = len(self._actors)
        return min(((turn + offset) % count for offset in range(count)), key=lambda index: self._loads[index])


def _choice(actors: Sequence[Any], stage: str, timeout_s: float) -> ActorChoice:
    return ActorChoice(actors, stage=stage, timeout_s=timeout_s)


class RemoteToolbox:
    """interfaces.Toolbox over tool actors. Each query and each page goes to the actor that owns it; `site` is the run's own.

    Raises TimeoutError when the owner does not answer, and something else when every tool actor is gone: the episode is then an outage's.
    """

    def __init__(self, servers: ActorChoice, *, site: str = "") -> None:
        self._servers = servers
        self._site = site

    def use(self, actors: Sequence[Any]) -> None:
        """These from now on; a call that is under way ends with those that it began with."""
        self._servers = self._servers.over(actors)

    async def call(self, call: ToolCall) -> ToolResult:
        servers = self._servers

        async def ask(piece: ToolCall, hop: Hop | None, order: Sequence[int]) -> ToolResult:
            try:
                result: ToolResult = await servers.call("call", piece, hop, order=order)
            except StalledError as error:
                raise TimeoutError(str(error)) from error
            return result

        return await ask_owners(call, ask, count=servers.count, site=self._site)


class RemoteJudge:
    """interfaces.Judge over judge actors. An answer to a question is always asked of the same one, which remembers its verdict."""

    def __init__(self, servers: ActorChoice) -> None:
        self._servers = servers

    async def grade(self, task: Task, answer: str) -> Verdict:
        try:
            order = owners(verdict_key(task, answer, judge="").hex(), self._servers.count)
            verdict: Verdict = await self._servers.call("grade", task, answer, order=order)
        except (ActorLost, StalledError) as error:
            return Verdict(status="unknown", reason=str(error), judge="failed")
        return verdict


class RemoteWriter:
    """tools.summarize.Writer over the engines of judge actors, the least busy first."""

    def __init__(self, servers: ActorChoice) -> None:
        self._servers = servers

    async def reply(self, messages: Sequence[dict[str, str]], *, temperature: float, max_tokens: int) -> str:
        try:
            text: str = await self._servers.call("reply", messages, temperature, max_tokens)
        except ChatRefused as error:
            raise ProviderFailed(REFUSED, str(error), status=413) from error
        except (ActorLost, StalledError, EngineFault) as error:
            raise ProviderFailed(UNAVAILABLE, str(error)) from error
        return text

    async def aclose(self) -> None:
        """The engines are the judges' own."""
