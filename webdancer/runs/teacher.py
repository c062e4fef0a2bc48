"""Who answers the questions of `webdancer sample`, and who checks the right answers: behind the same EpisodeRunner as RL's rollouts.

    scripted    the offline web's expert, a policy in this process
    openai      a chat model behind any OpenAI-compatible endpoint, as a policy in this process
    engine      model.path on the rollout workers of the cluster
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdancer.config import Config, LlmConfig
from webdancer.interfaces import EpisodeRunner, Policy, Services, Spent, nothing_spent
from webdancer.llm.answers import AnswerLog
from webdancer.llm.client import ChatModel
from webdancer.offline_web.expert import ExpertNoise, ScriptedExpert
from webdancer.rollout.outage import OutageGuard
from webdancer.rollout.runner import LocalEpisodeRunner
from webdancer.synthesis.quality_check import QualityCheck
from webdancer.synthesis.teacher import ChatTeacher
from webdancer.tools import keys
from webdancer.tools.toolbox import INFRASTRUCTURE_ERRORS


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """`checker` is None where the rules alone decide. `usage`: what the chat models have cost, by part; `spent`: all other services."""

    runner: EpisodeRunner
    checker: QualityCheck | None = None
    usage: Callable[[], dict[str, dict[str, Any]]] = dict
    spent: Spent = nothing_spent


@asynccontextmanager
async def open_teacher(config: Config, services: Services, folder: Path) -> AsyncIterator[Teacher]:
    """The teacher of `config.sample`; what chat models answer is kept in `folder`, and not asked again by a job that is resumed."""
    sample = config.sample
    models: dict[str, ChatModel] = {}
    async with AsyncExitStack() as stack:

        def open_model(part: str, llm: LlmConfig, variable: str) -> ChatModel:
            models[part] = ChatModel(llm, log=AnswerLog(folder / f"{part}_answers.jsonl"), variable=variable)
            stack.push_async_callback(models[part].aclose)
            return models[part]

        runner = services.runner
        if sample.backend == "scripted":
            noise = ExpertNoise(**vars(sample.teacher))
            runner = local_runner(config, ScriptedExpert(services.tokenizer, noise=noise, seed=config.seed), services)
        elif sample.backend == "openai":
            model = open_model("teacher", sample.llm, keys.LLM)
            policy = ChatTeacher(model, services.tokenizer, style=sample.style, more_tools=config.prompt.more_tools)
            runner = local_runner(config, policy, services)
        checker = None
        if sample.quality.llm.base_url and sample.keep == "quality":
            checker = QualityCheck(open_model("checker", sample.quality.llm, keys.CHECKER))

        def usage() -> dict[str, dict[str, Any]]:
            return {part: asdict(model.usage) for part, model in models.items()}

        yield Teacher(runner=runner, checker=checker, usage=usage, spent=services.spent)


def local_runner(config: Config, policy: Policy, services: Services) -> EpisodeRunner:
    """Episodes of a policy that is no engine of the pool, over the pool's own tools and judges."""
    runner = LocalEpisodeRunner(
        policy=policy,
        toolbox=services.toolbox,
        judge=services.judge,
        tokenizer=services.tokenizer,
        episode=config.episode,
        prompt=config.prompt,
        reward=config.reward,
        infrastructure_errors=INFRASTRUCTURE_ERRORS,
    )
    return OutageGuard(runner, limit=2 * config.sample.concurrent_questions)
