"""Keeps groups in flight, filters them as they finish, and draws batches whose groups are at most `max_staleness` versions old.

A group's life, and what moves it on:

    tasks --admit--> in flight --finish, record--> buffered --draw--> in the batch --release--> trained
                        |                 \\--> dropped: all_correct | all_wrong | too_few_valid
                        \\--------------------> dropped: surplus (too old for the new weights)

    admit    a slot is free: (max_staleness + 1) x P slots, P groups a batch, and at most P for each batch that is still wanted;
             the curriculum says which question, and how it grows; while the tools are throttled fewer run at once (`admission`)
    draw     the deadline rule (`slots.newest_drawable`) says that nobody still held would come too late for its own batch
    release  new weights have landed in the engines; only then is a trained group's slot free
    dropped  frees the slot at once, or a synchronous run would deadlock; with `refill: duplicate` the dropped group keeps its slot and is
             drawn like any other, and a kept group of the same batch is trained once more in its place

Groups left over when a batch is full stay buffered with their version; with max_staleness 0 there are none. Slots alone bound how many
groups are admitted, not how old they get. This is pure asyncio: where the episodes run is the EpisodeRunner's business.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from webdancer.algorithm.dynamic_sampling import keep_group
from webdancer.config import RolloutConfig
from webdancer.errors import DataError, ServiceError, StalledError
from webdancer.interfaces import EpisodeRunner, Staged
from webdancer.rollout.admission import INTERVAL_S, Admission
from webdancer.rollout.curriculum import Curriculum
from webdancer.rollout.group import sample_group
from webdancer.rollout.metrics import RolloutWindow
from webdancer.rollout.slots import Accounting, Held, Slots
from webdancer.types import FilterDecision, Group, Sampling, ScoredTrajectory, Task, TurnFinished

DEFAULT_ADMITTED_BATCHES = 10  # verl's max_num_gen_batches


class Tasks(Protocol):
    """An endless or finite stream; `data.tasks.TaskStream`."""

    def __next__(self) -> Task: ...

    def state_dict(self, untrained: Sequence[str] = ()) -> Mapping[str, Any]:
        """A position from which `untrained` task ids are given out again, in this order, before anything new."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class GroupRecorder(Protocol):
    """Hears of every finished group before anything may drop it."""

    def record_group(self, group: Group, decision: str) -> None:
        """`decision` is the reason: `kept`, or why the group will be dropped."""
        ...


class GroupCollector:
    """`async with GroupCollector(...) as collector:` then, once a step, `next_batch`, (train, publish), `release`, `metrics`.

    `version` is the learner's at the start, `resume` what an earlier `state_dict` said; `seed` is the engines', `curriculum_seed` that
    of the choice of questions. After `num_batches` no more are wanted, and no group is begun for which none of them has a place. A group
    that raises, a recorder that fails, or a stage that stalls ends the run: the error comes out of `next_batch`, `release` or the
    context's exit, whichever is first. Leaving the context cancels what runs.
    """

    def __init__(
        self,
        config: RolloutConfig,
        tasks: Tasks,
        runner: EpisodeRunner,
        recorder: GroupRecorder,
        *,
        version: int = 0,
        seed: int | None = None,
        curriculum_seed: int = 0,
        num_batches: int | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        resume = resume or {}
        self._config = config
        self._tasks = tasks
        self._runner = runner
        self._recorder = recorder
        self._version = version
        self._sampling = Sampling(temperature=config.temperature, seed=seed)
        self._curriculum = Curriculum(config, seed=curriculum_seed)
        self._slots = Slots(config, resume.get("attempts", {}), num_batches)
        self._again: deque[int] = deque(resume.get("again_attempts", ()))
        self._allowance = self._max_admitted + config.max_staleness * config.groups_per_step  # the first batch also fills the slots
        self._open = False
        self._exhausted = False
        self._failure: BaseException | None = None
        self._metrics: dict[str, float] = {}
        if resume:
            tasks.load_state_dict(resume)
            self._curriculum.load_state_dict(resume.get("curriculum", {}))

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._progress_s = self._loop.time()
        self._window = RolloutWindow(self._loop.time())
        self._admission = Admission((self._config.max_staleness + 1) * self._config.groups_per_step)
        self._later: asyncio.TimerHandle | None = None
        self._open = True
        self._fill()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._open = False
        if self._later is not None:
            self._later.cancel()
        running = [held.running for held in self._slots.held if held.running is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if error is None:
            self._raise_failure()

    async def next_batch(self) -> list[Group]:
        """P kept groups, in the order of their admission, none more than `max_staleness` versions behind.

        Raises StalledError when no episode finishes for `stall_timeout_s`, DataError when `max_admitted_per_step` groups did not
        yield P mixed ones or the tasks ran out, ServiceError when that was the doing of an outage.
        """
        assert self._open, "next_batch outside of the collector's context"
        started_s = self._loop.time()
        self._progress_s = max(self._progress_s, started_s)
        batch: list[Held] = []
        while not batch:
            batch = await self._full_batch()
        if self._slots.batches_left is not None:
            self._slots.batches_left -= 1
        groups = _with_duplicates(batch)
        now_s = self._loop.time()
        self._window.waited_s = now_s - started_s
        self._window.skipped = self._curriculum.skipped()
        self._metrics = self._window.metrics(groups, version=self._version, now_s=now_s)
        self._window = RolloutWindow(now_s)
        self._allowance = self._max_admitted
        self._fill()
        return groups

    def release(self, groups: Sequence[Group], *, version: int) -> None:
        """The weights of `version` have landed in the engines: free are the slots of these groups, and of those they stood in for."""
        trained = {(group.task.id, group.attempt) for group in groups}
        for held in [held for held in self._slots.held if held.drawn and held not in self._slots.batch]:
            if not held.kept:
                self._drop(held, held.decision)
            elif (held.task.id, held.attempt) in trained:
                self._slots.train(held)
                self._observe(held)
        self.set_version(version)
        self._raise_failure()

    def set_version(self, version: int) -> None:
        """New weights: what would be too old for the next batch (nothing, after a trained one) is dropped as surplus."""
        self._version = version
        for held in self._slots.too_old(version):
            if held.running is not None:
                held.running.cancel()
            reason = held.decision if held.group is not None and not held.kept else "surplus"
            self._drop(held, reason)
            if reason == "surplus":
                self._window.drop(reason)
        self._curriculum.advance()
        self._fill()

    def metrics(self) -> dict[str, float]:
        """Of the window that ended with the last batch; see rollout.metrics."""
        return dict(self._metrics)

    def state_dict(self) -> Mapping[str, Any]:
        """The task stream's cursor, from which every task that holds a slot is given out again, first, and under the same attempt: nothing
        untrained is lost, and a seeded synchronous run goes on with the very batches that it would have had. Call after `release`."""
        untrained = self._slots.held
        tasks = self._tasks.state_dict([held.task.id for held in untrained])
        again = [*(held.attempt for held in untrained), *self._again]
        return {**tasks, "attempts": dict(self._slots.attempts), "again_attempts": again, "curriculum": self._curriculum.state_dict()}

    @property
    def accounting(self) -> Accounting:
        return self._slots.accounting

    @property
    def _max_admitted(self) -> int:
        return self._config.max_admitted_per_step or DEFAULT_ADMITTED_BATCHES * self._config.groups_per_step

    async def _full_batch(self) -> list[Held]:
        """P drawn groups; none where all of them were dropped ones (`refill: duplicate`), whose slots are then free."""
        while len(self._slots.batch) < self._config.groups_per_step:
            self._raise_failure()
            if self._slots.draw(self._version) is None:
                self._raise_if_starved()
                await self._wait()
        batch = self._slots.take_batch()
        if any(held.kept for held in batch):
            return batch
        for held in batch:
            self._drop(held, held.decision)
        self._fill()
        return []

    def _fill(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        while self._open and self._failure is None and self._slots.free and self._allowance > 0:
            running = sum(held.group is None for held in self._slots.held)
            if running >= self._admission.limit(self._loop.time(), running=running):
                self._later = self._loop.call_later(INTERVAL_S, self._fill)
                return
            task, attempt = self._next_task()
            if task is None:
                self._exhausted = True
                self._changed.set()  # nobody else may, if a timer has called this
                return
            self._admit(task, attempt)

    def _next_task(self) -> tuple[Task | None, int | None]:
        """What an earlier process had admitted and not trained comes again first, as the same attempt and whatever is expected of it."""
        if self._again:
            return next(self._tasks, None), self._again.popleft()
        return self._curriculum.choose(self._tasks), None

    def _admit(self, task: Task, attempt: int | None) -> None:
        plan = self._curriculum.plan(task)
        held = self._slots.admit(task, version=self._version, plan=plan, now_s=self._loop.time(), attempt=attempt)
        self._allowance -= 1
        self._window.admitted += 1
        held.running = self._loop.create_task(self._collect(held), name=f"group {task.id}/{held.attempt}")
        held.running.add_done_callback(self._note_failure)

    async def _collect(self, held: Held) -> None:
        def on_turn(finished: TurnFinished) -> None:
            held.turns_done += 1
            if finished.turn.result is not None:
                self._admission.note(finished.turn.result)

        def on_member(member: ScoredTrajectory) -> None:
            held.members_done += 1
            self._progress_s = self._loop.time()

        group = await sample_group(
            held.task,
            self._runner,
            group_size=self._config.group_size,
            attempt=held.attempt,
            start_version=held.start_version,
            sampling=self._sampling,
            max_lost=self._config.max_lost,
            plan=held.plan,
            on_turn=on_turn,
            on_member=on_member,
        )
        decision = self._decide(group)
        self._recorder.record_group(group, decision.reason)
        held.running, held.group, held.decision = None, group, decision.reason
        self._window.finish(group, keep=decision.keep, reason=decision.reason, whole=self._config.group_size)
        if not decision.keep and self._config.refill == "resample":
            self._drop(held, decision.reason)
            self._fill()
        elif self._later is not None:
            self._fill()  # no slot has become free, but one group less runs
        self._changed.set()

    def _decide(self, group: Group) -> FilterDecision:
        members = group.members
        decision = keep_group([m.reward.answer for m in members], valid_G=[m.reward.valid for m in members])
        if self._config.dynamic_sampling or decision.reason == "too_few_valid":
            return decision
        return FilterDecision(keep=True, reason="kept")

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None and self._failure is None:
            self._failure = task.exception()
        self._changed.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _drop(self, held: Held, reason: str) -> None:
        self._slots.drop(held, reason)
        self._observe(held)

    def _observe(self, held: Held) -> None:
        """A group is evidence once it has left its slot: until then, a resumed run would sample it again."""
        if held.group is not None:
            self._curriculum.observe(held.number, held.group, kept=held.kept, plan=held.plan)

    async def _wait(self) -> None:
        """Until a group finishes or a task dies; StalledError when no member finished for too long."""
        self._changed.clear()
        remaining_s = self._progress_s + self._config.stall_timeout_s - self._loop.time()
        if remaining_s <= 0:
            raise StalledError(self._stalled())
        try:
            async with asyncio.timeout(remaining_s):
                await self._changed.wait()
        except TimeoutError:
            return  # a member may have finished meanwhile: the caller looks again, and the next wait decides

    def _stalled(self) -> str:
        running = [held for held in self._slots.held if held.group is None]
        if not running:
            return f"rollout: tools are throttled, and no group runs for {self._config.stall_timeout_s:g} s (rollout.stall_timeout_s)"
        oldest = running[0]
        age_s = self._loop.time() - oldest.admitted_s
        stages = self._runner.stages() if isinstance(self._runner, Staged) else ""
        return (
            f"rollout: no episode finished for {self._config.stall_timeout_s:g} s with {len(running)} groups in flight "
            f"(rollout.stall_timeout_s); the oldest, task {oldest.task.id}, runs since {age_s:.0f} s, "
            f"{oldest.members_done} of {self._config.group_size} members finished, {oldest.turns_done} turns so far"
            + (f"; episodes: {stages}" if stages else "")
        )

    def _raise_if_starved(self) -> None:
        if self._later is not None or any(held.group is None for held in self._slots.held):
            return
        found = sum(held.kept for held in self._slots.batch)
        short = f"{found} of {self._config.groups_per_step} mixed groups found; {self._window.shares()}"
        if self._exhausted:
            raise DataError(f"rl.data: the questions ran out with {short}")
        if self._window.mostly_invalid:
            often = f", most often to: {lost}" if (lost := self._window.commonest_loss) else ""
            raise ServiceError(f"tools, judge, engines: must answer, but most groups lost members to outages{often}; {short}")
        raise DataError(
            f"rollout.max_admitted_per_step: {self._max_admitted} groups admitted for one batch, but only {short}. "
            "Choose questions of which the policy solves some members and misses others, or raise the limit"
        )


def _with_duplicates(batch: Sequence[Held]) -> list[Group]:
    """Every place of the batch, in the order of admission; in the places of dropped groups stand the kept ones, one after the other."""
    substitutes = itertools.cycle([held.group for held in batch if held.kept])
    groups = [held.group if held.kept else next(substitutes) for held in batch]
    return [group for group in groups if group is not None]
