"""An episode from question to reward, in one process: what a rollout worker does, and what tests use without a cluster."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import dataclass

from webdancer.agent.episode import EPISODE_ERRORS, run_episode
from webdancer.config import EpisodeConfig, PromptConfig, RewardConfig
from webdancer.errors import EngineFault
from webdancer.interfaces import Judge, OnText, OnTurn, Policy, Tokenizer, Toolbox
from webdancer.rewards.reward import outage, trajectory_reward
from webdancer.types import EpisodeLost, Sampling, ScoredTrajectory, Task, Trajectory, Turn, Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeScorer:
    """Judge and reward of finished episodes. `infrastructure_errors`: tool error codes that mean an outage, not a bad call."""

    judge: Judge
    reward: RewardConfig
    max_tokens: int
    infrastructure_errors: Set[str] = frozenset()

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        verdict = await self._verdict(trajectory)
        reward = trajectory_reward(trajectory, verdict, self.reward, max_tokens=self.max_tokens, infrastructure_errors=self._outages())
        return ScoredTrajectory(trajectory=trajectory, reward=reward, verdict=verdict)

    async def _verdict(self, trajectory: Trajectory) -> Verdict:
        """No judge is asked where nothing was answered or the answer cannot count."""
        if (reason := outage(trajectory, self._outages())) is not None:
            return Verdict(status="unknown", reason=reason, judge="none")
        if trajectory.answer is None:
            return Verdict(status="wrong", reason=f"no answer: {trajectory.stop}", judge="none")
        try:
            return await self.judge.grade(trajectory.task, trajectory.answer)
        except Exception as error:
            # A Judge says unknown by itself, so its server is gone: this verdict is lost, the program is not.
            log.exception("episode %s: the judge failed", trajectory.id)
            return Verdict(status="unknown", reason=f"the judge failed: {type(error).__name__}", judge="failed")

    def _outages(self) -> Set[str]:
        return EPISODE_ERRORS | self.infrastructure_errors


class LocalEpisodeRunner:
    """interfaces.EpisodeRunner over whatever policy, tools and judge it is given."""

    def __init__(
        self,
        *,
        policy: Policy,
        toolbox: Toolbox,
        judge: Judge,
        tokenizer: Tokenizer,
        episode: EpisodeConfig,
        prompt: PromptConfig,
        reward: RewardConfig,
        infrastructure_errors: Set[str] = frozenset(),
    ) -> None:
        self._policy = policy
        self._toolbox = toolbox
        self._tokenizer = tokenizer
        self._episode = episode
        self._prompt = prompt
        self._scorer = EpisodeScorer(
            judge=judge, reward=reward, max_tokens=episode.max_tokens, infrastructure_errors=frozenset(infrastructure_errors)
        )

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
        """EpisodeLost when the engine failed: the episode can go on elsewhere from the turns that `on_turn` reported."""
        try:
            trajectory = await run_episode(
                task,
                policy=self._policy,
                toolbox=self._toolbox,
                tokenizer=self._tokenizer,
                limits=self._episode,
                prompt=self._prompt,
                sampling=sampling,
                member=member,
                attempt=attempt,
                resume_from=resume_from,
                on_turn=on_turn,
                on_text=on_text,
            )
        except EngineFault as error:
            return EpisodeLost(task_id=task.id, member=member, attempt=attempt, reason=str(error))
        return await self._scorer.score(trajectory)
