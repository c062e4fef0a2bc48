"""What stands behind each command: the programs of `runs/` on the offline web and on the services that are opened for them.

Each takes the config, the telemetry of its run directory and `open_services` (`cluster.launch.services`, or a test's own), and
returns what to say at the end. `check` comes first, before a run directory is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from webdancer.config import Config, JudgeConfig
from webdancer.data.demonstrations import demonstration_sample, read_demonstrations
from webdancer.data.tasks import TaskStream, read_tasks
from webdancer.demo.server import build_app, listen, serve
from webdancer.errors import ConfigError
from webdancer.evaluation.benchmarks import BENCHMARKS, load_benchmark, size_note
from webdancer.evaluation.metrics import summary
from webdancer.evaluation.round_table import table
from webdancer.offline_web.server import running_server
from webdancer.preflight import check
from webdancer.runs import quickstart as whole
from webdancer.runs.benchmark import run_benchmark
from webdancer.runs.chat import converse
from webdancer.runs.evaluate import evaluate_stage
from webdancer.runs.methods import asked_by_method, method_runner
from webdancer.runs.questions import has_seeds, make_questions
from webdancer.runs.quickstart import OpenServices
from webdancer.runs.rl import train
from webdancer.runs.sft import warm_start
from webdancer.runs.synthesize import have_pools, read_pools
from webdancer.synthesis.similar import words
from webdancer.telemetry import Telemetry
from webdancer.types import Sampling, Task

__all__ = ["chat", "check", "demo", "evaluate", "export", "quickstart", "rl", "sample", "sft", "synthesize"]


async def quickstart(config: Config, telemetry: Telemetry, open_services: OpenServices) -> str:
    """Everything, on the offline web."""
    return f"report: {await whole.run(config, telemetry, open_services)}"


async def synthesize(config: Config, telemetry: Telemetry, open_services: OpenServices) -> str:
    """The four pools of questions, from `synthesis.roots`, from `synthesis.seeds`, or from the offline web."""
    elsewhere = config.synthesis.roots or has_seeds(config)
    with nullcontext(config) if elsewhere else _web(config) as webbed, telemetry.phase(f"synthesize {config.synthesis.method}"):
        manifest = await make_questions(webbed, telemetry)
    made = ", ".join(f"{counts['questions']} {pool}" for pool, counts in manifest["counts"].items())
    missing = sum(manifest["missing"].values())
    short = f"\n{missing} fewer than asked for: the pages do not hold more (manifest.json, missing)" if missing else ""
    report = Path(config.run_dir) / "questions" / "report.html"
    return f"questions: {made}; left out: {sum(manifest['left_out'].values())}{short}\nreport: {report}"


async def sample(config: Config, telemetry: Telemetry, open_services: OpenServices) -> str:
    """Demonstrations of the teacher on `sample.data`, or on the questions that `synthesize` left in the run directory."""
    config = whole.dated(config)
    files = whole.RunFiles(run_dir=Path(config.run_dir))
    parts = {"tools", "judge"} | ({"rollout"} if config.sample.backend == "engine" else set())
    with _web(config) as webbed:
        async with whole.started(open_services(webbed, parts=parts), telemetry) as live:
            with telemetry.phase("sample"):
                await whole.sample(webbed, live, telemetry)
    return f"demonstrations: {files.demonstrations}\nreport: {files.folder / 'report.html'}"


async def sft(config: Config, telemetry: Telemetry, open_services: OpenServices) -> str:
    """The warm start on `sft.data`, or on what `sample` left; resumes from its checkpoints, exports to `model/`."""
    files = whole.RunFiles(run_dir=Path(config.run_dir))
    # A bad line is found before anything is started.
    demonstrations = read_demonstrations(config.sft.data or files.demonstrations, strict=config.sft.strict)
    async with whole.started(open_services(config, parts={"learner"}), telemetry) as live:
        samples = [demonstration_sample(shown, live.tokenizer) for shown in demonstrations]
        cursor = await whole.load_cursor(files, live.learner)
        if cursor and cursor["phase"] != "sft":
            raise ConfigError(f"run_dir: must be new or in its warm start, got {config.run_dir!r}, which RL goes on from; choose another")
        with telemetry.phase("warm start"):
            await warm_start(config, samples, live.learner, telemetry, resume=cursor)
        await live.learner.export(files.model)
    return f"model: {files.model}"


async def rl(config: Config, telemetry: Telemetry, open_services: OpenServices) -> str:
    """DAPO on `rl.data`, or on the run directory's RL pool; resumes from its checkpoints, exports to `model/`. Where there are held-out
    questions, they are asked before and after as well."""
    files = whole.RunFiles(run_dir=Path(config.run_dir))
    tasks = read_tasks(config.rl.data or files.rl_tasks)
    heldout = _evaluation_tasks(config)
    with _web(config) as webbed:
        async with whole.started(open_services(webbed), telemetry) as live:
            cursor = await whole.load_cursor(files, live.learner)
            await live.weights.publish(live.learner.version)
            resume = cursor if cursor and cursor["phase"] == "rl" else None
            if not heldout:
                telemetry.say("  note: no held-out questions (evaluation.data), so that nothing is evaluated")
            if seen := _num_seen(heldout, tasks):
                telemetry.say(f"  note: {seen} of {len(heldout)} held-out questions are trained on as well: they say nothing of new ones")
            if heldout and resume is None:
                await whole.evaluate_once(webbed, files, heldout, live, telemetry, stage="rl-0")
            with telemetry.phase("RL"):
                await train(webbed, TaskStream(tasks, seed=config.seed), heldout, live, telemetry, resume=resume)
            await live.learner.export(files.model)
            if heldout:
                await whole.evaluate_once(webbed, files, heldout, live, telemetry, stage=f"rl-{config.rl.num_steps}")
    return f"model: {files.model}"


async def evaluate(config: Config, telemetry: Telemetry, open_services: OpenServices) -> str:
    """`model.path` on a benchmark, on `evaluation.data`, or on the run directory's held-out questions."""
    tasks = _evaluation_tasks(config)
    if not tasks:
        raise ConfigError("evaluation.data: must name a file of questions where the run directory has no held-out ones, got ''")
    with _web(asked_by_method(config)) as webbed:
        async with whole.started(open_services(webbed, parts={"rollout", "tools", "judge"}), telemetry) as live:
            runner = method_runner(config, live)
            with telemetry.phase("evaluate"):
                if config.evaluation.benchmark:
                    _say_what_differs(config, len(tasks), telemetry)
                    return table(await run_benchmark(webbed, tasks, runner, live.judge, telemetry))
                found = await evaluate_stage(webbed, tasks, runner, telemetry, stage="evaluation", version=0)
    figures = summary(found.rows, k=max(1, config.evaluation.num_samples))
    return "\n".join(f"{name:28} {value:.3f}" for name, value in figures.items())


async def export(config: Config, telemetry: Telemetry, open_services: OpenServices, *, to: Path) -> str:
    """The newest checkpoint of the run directory as a Hugging Face directory."""
    async with whole.started(open_services(config, parts={"learner"}), telemetry) as live:
        await live.learner.load(Path(config.run_dir) / "checkpoints")
        await live.learner.export(to)
        return f"version {live.learner.version}: {to}"


async def chat(config: Config, telemetry: Telemetry, open_services: OpenServices, *, temperature: float = 0.0) -> None:
    """Questions from the terminal, answered by `model.path` with its searches and visits shown."""
    with _web(_without_judge(config)) as webbed:
        async with whole.started(open_services(webbed, parts={"rollout", "tools", "judge"}), telemetry) as live:
            screen = {"say": telemetry.say, "write": telemetry.console.write}
            await converse(live.runner, sampling=Sampling(temperature=temperature), site=webbed.tools.visit.site, **screen)


async def demo(
    config: Config, telemetry: Telemetry, open_services: OpenServices, *, host: str, port: int, temperature: float = 0.0
) -> None:
    """The same as a page on `host`:`port`, until Ctrl-C; questions of `evaluation.data` are offered as examples."""
    examples = [task.question for task in read_tasks(config.evaluation.data)[:3]] if config.evaluation.data else []
    with _web(_without_judge(config)) as webbed, closing(listen(host, port)) as listening:
        async with whole.started(open_services(webbed, parts={"rollout", "tools", "judge"}), telemetry) as live:
            app = build_app(
                live.runner,
                model=config.model.path,
                sampling=Sampling(temperature=temperature),
                site=webbed.tools.visit.site,
                host=host,
                examples=examples,
            )
            shown = f"[{host}]" if ":" in host else host
            telemetry.say(f"http://{shown}:{listening.getsockname()[1]}   (Ctrl-C ends)")
            await serve(app, listening)


def _without_judge(config: Config) -> Config:
    """A question that somebody asks has no gold answer: no judge is paid to compare with nothing."""
    return replace(config, judge=JudgeConfig(num_servers=1))


@contextmanager
def _web(config: Config) -> Iterator[Config]:
    """The config as it is where it names its search and its site, or needs none; else the offline web, running while the program does."""
    tools = config.tools
    if tools.search.backend != "retrieve" or tools.search.url or tools.replay.mode == "replay":
        yield config
        return
    with running_server(seed=config.web.seed, num_entities=config.web.num_entities, port=config.web.port) as origin:
        yield whole.with_offline_web(config, origin)


def _say_what_differs(config: Config, num_tasks: int, telemetry: Telemetry) -> None:
    """From an evaluation as papers report it."""
    name, tools = config.evaluation.benchmark, config.tools
    notes = [size_note(name, num_tasks)]
    if name in BENCHMARKS and tools.search.backend == "retrieve" and not tools.search.url and tools.replay.mode != "replay":
        notes.append(f"{name} is asked of the offline web, which knows none of its answers: choose tools.search.backend")
    if name in BENCHMARKS and config.judge.backend == "match":
        notes.append(f"{name} is judged by exact matching, where papers ask a model: choose judge.backend")
    for note in filter(None, notes):
        telemetry.say(f"  note: {note}")


def _num_seen(heldout: Sequence[Task], trained: Sequence[Task]) -> int:
    """Held-out questions that are in the training set, whatever case and punctuation."""
    known = {tuple(words(task.question)) for task in trained}
    return sum(tuple(words(task.question)) in known for task in heldout)


def _evaluation_tasks(config: Config) -> tuple[Task, ...]:
    if config.evaluation.benchmark:
        return load_benchmark(config.evaluation.benchmark, config.evaluation.data)
    if config.evaluation.data:
        return read_tasks(config.evaluation.data)
    return read_pools(config).heldout if have_pools(config) else ()
