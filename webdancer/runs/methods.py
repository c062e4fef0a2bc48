"""How a model is asked (`evaluation.method`): the agent, and the two baselines that a table of agents is compared with.

    react     the agent: it searches and visits until it answers
    direct    no tools: the question, one answer
    rag       the results of one search with the question itself stand before it; one answer

All three are the same episode code, engines and judges. What a search found goes into the prompt only: the judge sees the question as it
was.
"""

from __future__ import annotations

from dataclasses import replace

from webdancer.agent.prompt import RETRIEVED
from webdancer.config import Config
from webdancer.interfaces import EpisodeRunner, OnText, OnTurn, Services, Toolbox
from webdancer.tools.result import INFRASTRUCTURE_ERRORS
from webdancer.types import EpisodeLost, Sampling, ScoredTrajectory, Task, ToolCall, Turn

REACT, DIRECT, RAG = METHODS = ("react", "direct", "rag")


def asked_by_method(config: Config) -> Config:
    """Without tools the prompt names none, and the first turn is the forced answer."""
    if config.evaluation.method == REACT:
        return config
    return replace(config, prompt=replace(config.prompt, tools=False), episode=replace(config.episode, max_tool_calls=0))


def method_runner(config: Config, services: Services) -> EpisodeRunner:
    return SearchFirst(services.runner, services.toolbox) if config.evaluation.method == RAG else services.runner


class SearchFirst:
    """interfaces.EpisodeRunner: one search with the question, and its results in the prompt of the episode."""

    def __init__(self, runner: EpisodeRunner, toolbox: Toolbox) -> None:
        self._runner = runner
        self._toolbox = toolbox

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
        """EpisodeLost where the search is down: without it the episode would be another method's."""
        found = await self._toolbox.call(ToolCall(name="search", arguments={"query": [task.question]}))
        if found.error in INFRASTRUCTURE_ERRORS:
            return EpisodeLost(task_id=task.id, member=member, attempt=attempt, reason=f"search: {found.error}: {found.text[:200]}")
        shown = replace(task, metadata={**task.metadata, RETRIEVED: found.text})
        listening = {} if on_text is None else {"on_text": on_text}
        outcome = await self._runner.run(
            shown, member=member, attempt=attempt, sampling=sampling, resume_from=resume_from, on_turn=on_turn, **listening
        )
        if isinstance(outcome, EpisodeLost):
            return outcome
        return replace(outcome, trajectory=replace(outcome.trajectory, uses_before=found.uses))
