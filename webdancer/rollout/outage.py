"""The end of a run whose tools, judge or money have gone: otherwise it would go on sampling episodes of which none can count."""

from __future__ import annotations

from webdancer.errors import ServiceError
from webdancer.interfaces import EpisodeRunner, OnText, OnTurn, Staged
from webdancer.rewards.judge import unpaid
from webdancer.tools.ledger import out_of_money
from webdancer.tools.result import BUDGET_SPENT
from webdancer.types import EpisodeLost, Sampling, ScoredTrajectory, Task, Turn


class OutageGuard:
    """An EpisodeRunner that raises ServiceError once the budget is spent, or after `limit` episodes in a row that something outside
    made invalid.

    A limit of twice as many as run at once lets a short outage pass, which takes with it only what was in flight.
    """

    def __init__(self, runner: EpisodeRunner, *, limit: int) -> None:
        self._runner = runner
        self._limit = limit
        self._num_lost = 0

    def stages(self) -> str:
        return self._runner.stages() if isinstance(self._runner, Staged) else ""

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
        listening = {} if on_text is None else {"on_text": on_text}
        outcome = await self._runner.run(
            task, member=member, attempt=attempt, sampling=sampling, resume_from=resume_from, on_turn=on_turn, **listening
        )
        if isinstance(outcome, ScoredTrajectory) and _is_out_of_money(outcome):
            raise out_of_money()
        if isinstance(outcome, ScoredTrajectory) and task.answers:  # without an answer to compare with, no judge can decide
            self._num_lost = 0 if outcome.reward.valid else self._num_lost + 1
            if self._num_lost >= self._limit:
                raise ServiceError(
                    f"tools, judge: must answer, but the last {self._num_lost} episodes were all lost to an outage "
                    f"({outcome.verdict.reason}); what is finished is kept, and the same command goes on"
                )
        return outcome


def _is_out_of_money(outcome: ScoredTrajectory) -> bool:
    return unpaid(outcome.verdict) or any(
        turn.result is not None and turn.result.error == BUDGET_SPENT for turn in outcome.trajectory.turns
    )
