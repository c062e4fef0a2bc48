"""The whole of WebDancer in one program: questions, trajectories, warm start, RL, evaluation, report.

Each phase leaves its result in the run directory before the next one starts, so the same command goes on where it was stopped:

    questions/*.jsonl              synthesize   crawl the offline web, make questions
    demonstrations.jsonl           sample       a scripted teacher, rejection by format and correctness
    evaluations/base.json          evaluate     the base model, which has never seen a tool
    checkpoints/                   sft, rl      one learner; the cursor says which phase and step come next
    evaluations/{sft,rl-N}.json    evaluate
    model/                         export       a Hugging Face directory
    report.html                    report
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from webdancer.config import Config, VisitConfig
from webdancer.data.demonstrations import demonstration_sample, read_demonstrations
from webdancer.data.tasks import TaskStream, read_tasks
from webdancer.errors import ConfigError
from webdancer.interfaces import Learner, Services
from webdancer.offline_web.server import running_server
from webdancer.runs.evaluate import evaluate_stage
from webdancer.runs.rl import train
from webdancer.runs.sample import make_demonstrations
from webdancer.runs.sft import warm_start
from webdancer.runs.synthesize import have_pools, read_pools, synthesize
from webdancer.runs.teacher import open_teacher
from webdancer.synthesis.sampling_files import SampleFiles
from webdancer.telemetry import Telemetry
from webdancer.telemetry.report import write_report
from webdancer.types import Task
from webdancer.whole_file import write_whole


class OpenServices(Protocol):
    """`cluster.launch.services`, or a test's own. `parts` of rollout, learner, tools, judge: what the program needs, or all."""

    def __call__(self, config: Config, *, parts: Set[str] = ...) -> AbstractAsyncContextManager[Services]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles(SampleFiles):
    """What a phase leaves behind, and the next one looks for."""

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def model(self) -> Path:
        return self.run_dir / "model"

    def has_evaluation(self, stage: str) -> bool:
        return (self.run_dir / "evaluations" / f"{stage}.json").exists()


async def run(config: Config, telemetry: Telemetry, open_services: OpenServices) -> Path:
    """Everything, or what is left of it; returns the path of the report."""
    config = dated(config)
    files = RunFiles(run_dir=Path(config.run_dir))
    with running_server(seed=config.web.seed, num_entities=config.web.num_entities, port=config.web.port) as origin:
        config = with_offline_web(config, origin)
        if not have_pools(config):
            with telemetry.phase("synthesize"):
                pools = await synthesize(config, site=origin)
                telemetry.say(f"  {len(pools.sft)} questions for the teacher, {len(pools.rl)} for RL, {len(pools.heldout)} held out")
        async with started(open_services(config), telemetry) as services:
            if not files.demonstrations.exists() or not files.rl_tasks.exists():
                with telemetry.phase("sample"):
                    await sample(config, services, telemetry)
            await learn(config, files, services, telemetry)
            with telemetry.phase("export"):
                await services.learner.export(files.model)
    return write_report(files.run_dir)


@asynccontextmanager
async def started(opening: AbstractAsyncContextManager[Services], telemetry: Telemetry) -> AsyncIterator[Services]:
    """The services, once actors, engines and learner are up: a phase of its own, which is seen and timed."""
    async with AsyncExitStack() as stack:
        with telemetry.phase("start"):
            services = await stack.enter_async_context(opening)
        yield services


async def sample(config: Config, services: Services, telemetry: Telemetry) -> None:
    """The teacher's demonstrations, and the RL pool with the questions that it left."""
    folder = RunFiles(run_dir=Path(config.run_dir)).folder
    tasks, reserved = questions_for_teacher(config)
    async with open_teacher(config, services, folder) as teacher:
        telemetry.say(f"  {await make_demonstrations(config, tasks, reserved, teacher, telemetry)}")


def questions_for_teacher(config: Config) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Those to try, and those that are RL's: of the files that the config names, else of what `synthesize` left.

    Raises ConfigError where a question is in both: a demonstration of it would be trained on twice.
    """
    pools = read_pools(config) if have_pools(config) else None
    tasks = read_tasks(config.sample.data) if config.sample.data else read_pools(config).sft
    reserved = read_tasks(config.rl.data) if config.rl.data else pools.rl if pools else ()
    known = {text for task in tasks for text in (task.id, task.question)}
    if twice := next((task for task in reserved if task.id in known or task.question in known), None):
        raise ConfigError(f"rl.data: must share no question with those for the teacher (sample.data), got {twice.id!r} in both")
    return tasks, reserved


def dated(config: Config) -> Config:
    """The config with the date that prompts show, if it is left to us: that of the first start, so that a resumed job asks the same."""
    if config.prompt.current_date or config.prompt.style != "released":
        return config
    first = Path(config.run_dir) / "date"
    if not first.exists():
        write_whole(first, datetime.date.today().isoformat().encode())
    return replace(config, prompt=replace(config.prompt, current_date=first.read_text()))


async def learn(config: Config, files: RunFiles, services: Services, telemetry: Telemetry) -> None:
    """Base, warm start, RL, each evaluated on the held-out questions; goes on from the newest checkpoint."""
    heldout = read_tasks(config.evaluation.data) if config.evaluation.data else read_pools(config).heldout
    cursor = await load_cursor(files, services.learner)
    await services.weights.publish(services.learner.version)  # also the first canary: the engines serve what the learner trains
    if cursor is None:
        await evaluate_once(config, files, heldout, services, telemetry, stage="base")
    phase = cursor["phase"] if cursor else "sft"
    if phase == "sft":
        demonstrations = read_demonstrations(files.demonstrations, strict=config.sft.strict)
        samples = [demonstration_sample(shown, services.tokenizer) for shown in demonstrations]
        with telemetry.phase("warm start"):
            await warm_start(config, samples, services.learner, telemetry, resume=cursor)
            await services.weights.publish(services.learner.version)
        await evaluate_once(config, files, heldout, services, telemetry, stage="sft")
    tasks = TaskStream(read_tasks(files.rl_tasks), seed=config.seed)
    if config.rl.num_steps:
        with telemetry.phase("RL"):
            await train(config, tasks, heldout, services, telemetry, resume=cursor if phase == "rl" else None)
        await evaluate_once(config, files, heldout, services, telemetry, stage=f"rl-{config.rl.num_steps}")


async def load_cursor(files: RunFiles, learner: Learner) -> Mapping[str, Any] | None:
    """Restore the newest checkpoint into the learner; None for a fresh run, or one that was killed before its first was committed."""
    if all(".tmp-" in path.name for path in files.checkpoints.glob("step_*")):
        return None
    return await learner.load(files.checkpoints)


def with_offline_web(config: Config, origin: str) -> Config:
    """The config with search and visit pointed at the run's own web, which is the only private origin that the gate lets through."""
    tools = replace(
        config.tools,
        search=replace(config.tools.search, url=config.tools.search.url or origin),
        visit=_visit_here(config.tools.visit, origin),
        fetch=replace(config.tools.fetch, allowed_origins=[*config.tools.fetch.allowed_origins, origin]),
    )
    return replace(config, tools=tools)


def _visit_here(visit: VisitConfig, origin: str) -> VisitConfig:
    """Pages of the run's own web, over HTTP or from its /access."""
    return replace(visit, site=visit.site or origin, url=visit.url or (origin if visit.backend == "access" else ""))


async def evaluate_once(
    config: Config, files: RunFiles, heldout: Sequence[Task], services: Services, telemetry: Telemetry, *, stage: str
) -> None:
    """Unless an earlier start has."""
    if files.has_evaluation(stage):
        return
    with telemetry.phase(f"evaluate {stage}"):
        await evaluate_stage(config, heldout, services.runner, telemetry, stage=stage, version=services.learner.version)
