"""What can be found wrong before a run directory is claimed and Ray starts: a mistake costs seconds and leaves nothing behind.

The program itself checks what it then uses; nothing here is relied on later.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from webdancer.agent.prompt import prompt_messages
from webdancer.agent.tokenizer import load_tokenizer
from webdancer.agent.transcript import Transcript
from webdancer.algorithm.packing import fitting
from webdancer.config import Config, SummarizerConfig
from webdancer.config_loading import resolved_yaml
from webdancer.data.demonstrations import demonstration_sample, read_demonstrations
from webdancer.data.tasks import read_tasks
from webdancer.errors import ConfigError, ServiceError
from webdancer.evaluation.benchmarks import load_benchmark
from webdancer.llm.client import ChatModel, ChatRefused
from webdancer.model_location import check_model, model_path
from webdancer.offline_web.server import check_port
from webdancer.rewards.judge import OpenAIJudge
from webdancer.tools.keys import MissingKey
from webdancer.tools.store import RecordingFile
from webdancer.tools.toolbox import WebToolbox

WITH_MODEL = frozenset({"quickstart", "sample", "sft", "rl", "evaluate", "export", "chat", "demo"})
WITH_WEB = frozenset({"quickstart", "synthesize", "sample", "rl", "evaluate", "chat", "demo"})
WITH_JUDGE = frozenset({"quickstart", "sample", "rl", "evaluate"})
WITH_LEARNER = frozenset({"quickstart", "sft", "rl"})
HEADER_BYTES = 64
"""More than what ChatML writes around a message."""


async def check(config: Config, program: str) -> None:
    """Raises ConfigError, DataError or ServiceError, of one line, for the first thing that keeps `program` from working."""
    _check_files(config, program)
    if program in WITH_MODEL:
        check_model(config.model.path)
    if program == "sft":
        _check_demonstrations(config)  # after the model, whose tokenizer says how long they are
    elif program == "rl":
        _check_prompts(config)
    if program in WITH_WEB:
        await _check_web(config)
    if program in WITH_JUDGE and config.judge.backend == "openai":
        await _check_judge(config)
    elif program in WITH_JUDGE and config.judge.backend == "vllm":
        check_model(config.judge.model, field="judge.model")
    if program == "sample" and config.sample.backend == "openai":
        await _check_teacher(config)
    if program in WITH_LEARNER:
        _check_memory(config)


def _check_files(config: Config, program: str) -> None:
    run_dir = Path(config.run_dir)
    if program == "sample":
        rule = "sample.data: must name a file of questions where the run directory has none of `webdancer synthesize`"
        _require(Path(config.sample.data or run_dir / "questions" / "sft.jsonl"), rule, config.sample.data)
        read_tasks(config.sample.data or run_dir / "questions" / "sft.jsonl")
    elif program == "rl":
        if not config.rl.data:
            rule = "rl.data: must name a file of questions where the run directory has no RL pool of `webdancer sample`"
            _require(run_dir / "questions" / "rl_pool.jsonl", rule, config.rl.data)
        read_tasks(config.rl.data or run_dir / "questions" / "rl_pool.jsonl")
    elif program == "export" and not any((run_dir / "checkpoints").glob("step_*")):
        raise ConfigError(f"run_dir: must hold a checkpoint to export, got {config.run_dir!r}")
    if config.evaluation.benchmark and program in ("rl", "evaluate"):
        load_benchmark(config.evaluation.benchmark, config.evaluation.data)
    elif config.evaluation.data and program in ("quickstart", "rl", "evaluate"):
        read_tasks(config.evaluation.data)
    elif program == "evaluate":
        rule = "evaluation.data: must name a file of questions where the run directory has no held-out ones"
        _require(run_dir / "questions" / "heldout.jsonl", rule, config.evaluation.data)


def _check_demonstrations(config: Config) -> None:
    written = Path(config.run_dir) / "demonstrations.jsonl"
    if not config.sft.data:
        _require(written, "sft.data: must name a file of demonstrations where the run directory has none of `webdancer sample`", "")
    shown = read_demonstrations(config.sft.data or written, strict=config.sft.strict)
    budget = config.learner.token_budget
    # A token is a byte at least, so that only what might be too long is encoded here; the warm start looks at all of them.
    long = [one for one in shown if sum(len(m["content"].encode()) + HEADER_BYTES for m in one.messages) > budget]
    if long and config.learner.too_long == "error":
        tokenizer = load_tokenizer(model_path(config.model.path))
        for one in long:
            fitting([demonstration_sample(one, tokenizer)], budget)


def _check_prompts(config: Config) -> None:
    """Every question of RL with its prompt must leave room for an episode, in the context and in what is trained on."""
    tasks = read_tasks(config.rl.data or Path(config.run_dir) / "questions" / "rl_pool.jsonl")
    limit, key = min((config.episode.max_tokens, "episode.max_tokens"), (config.learner.token_budget, "learner.token_budget"))
    prompts = [prompt_messages(task, config.prompt) for task in tasks]
    sizes = [sum(len(message["content"].encode()) + HEADER_BYTES for message in prompt) for prompt in prompts]
    long = [prompt for prompt, size in zip(prompts, sizes, strict=True) if size > limit]  # a token is a byte at least
    tokenizer = load_tokenizer(model_path(config.model.path)) if long else None
    longest = max((len(Transcript(tokenizer, prompt)) for prompt in long if tokenizer), default=0)
    if longest >= limit:
        raise ConfigError(f"{key}: must hold the longest prompt and an episode, got {limit} for a prompt of {longest} tokens")


def _check_memory(config: Config) -> None:
    """`webdancer plan`, in a process of its own: what it imports would stay with the driver for the whole run."""
    command = (sys.executable, "-m", "webdancer.cli", "plan", "--config", "/dev/stdin")
    done = subprocess.run(command, input=resolved_yaml(config), text=True, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"webdancer plan ended with {done.returncode}"]
        raise ConfigError(lines[-1].removeprefix("webdancer: "))


def _require(path: Path, rule: str, value: str) -> None:
    if not path.exists():
        raise ConfigError(f"{rule}, got {value!r}")


async def _check_web(config: Config) -> None:
    """A search that the caller named must answer; the offline web is the program's own, and needs its port; a recording must be one."""
    search, replay = config.tools.search, config.tools.replay
    if replay.mode != "live":
        with closing(RecordingFile(replay.path, writable=replay.mode == "record")):
            pass
    if replay.mode == "replay":
        return
    if search.backend == "retrieve" and not search.url:
        check_port(config.web.port)
        return
    tools_here = config.tools
    if tools_here.visit.summarizer.backend == "engine":  # which is the cluster's
        tools_here = replace(tools_here, visit=replace(tools_here.visit, summarizer=SummarizerConfig()))
    try:
        tools = WebToolbox(tools_here)
    except MissingKey:
        if config.cluster.address == "local":
            raise
        return  # a cluster's tool actors may well have it, and check as they start
    async with tools as toolbox:
        await toolbox.check()


async def _check_teacher(config: Config) -> None:
    model = ChatModel(replace(config.sample.llm, max_attempts=3))
    try:
        await model.chat([{"role": "user", "content": "Say yes."}], temperature=0.0, max_tokens=16)
    except ChatRefused as error:
        raise ServiceError(f"sample.llm.base_url: must be an endpoint that answers, got {config.sample.llm.base_url!r}: {error}") from error
    finally:
        await model.aclose()


async def _check_judge(config: Config) -> None:
    judge = OpenAIJudge(config.judge)
    try:
        await judge.check()
    finally:
        await judge.aclose()
