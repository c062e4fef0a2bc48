"""A step of RL with a slow tool, ours over TRL's GRPOTrainer: same tiny model, same completions, same script of turns.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout_trl --out benchmarks/baselines/rollout_trl.json

4 questions x 8 completions; every completion is one call of an asynchronous tool and an answer. The tool takes a constant time, or one that
is log-normal (p99 = 8 x mean). Both sides sample as many tokens as the script has and put the script's in their place, then train one
optimizer step on all of them in float32. Seconds are means of the steps after the first.

    trl            GRPOTrainer in an environment of its own (benchmarks/sft_trl.py makes it), generating with transformers: on a CPU it must
    staleness 0    rollout worker and vLLM engine, collector, learner and weight update in this process, one after the other
    staleness 1    the same, the next episodes running while the learner trains

GRPOTrainer's tool calls wait for each other, sample by sample. It is TRL's synchronous trainer: its asynchronous one needs a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.rollout_fixture import OBSERVATION, Bench, SlowTools, make_task, script
from benchmarks.sft_trl import TRL, environment
from webdancer.agent.tokenizer import load_tokenizer
from webdancer.offline_web.base_model import TINY_BASE
from webdancer.types import Group

PROMPTS, SIZE, CALLS = 4, 8, 1
LOG_NORMAL = "log-normal"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>{% endgeneration %}\n"
    "{% elif m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


async def ours(tools: SlowTools, steps: int, staleness: int) -> list[float]:
    """Seconds of every step: 32 episodes, one optimizer step, the new weights in the engine."""
    from benchmarks.learner_fixture import open_learner
    from benchmarks.rollout_throughput import Forgetful, flights
    from webdancer.algorithm.advantages import samples_from
    from webdancer.algorithm.packing import pack
    from webdancer.config import RolloutConfig
    from webdancer.data.tasks import TaskStream
    from webdancer.rollout.collector import GroupCollector

    bench = Bench(str(TINY_BASE), calls=CALLS)
    learner = open_learner(TINY_BASE, loss="dapo", token_budget=4096, threads=1)
    await bench.engine.start()
    config = RolloutConfig(groups_per_step=PROMPTS, group_size=SIZE, max_staleness=staleness, dynamic_sampling=False)
    tasks = TaskStream([make_task(number) for number in range(PROMPTS * (steps + 2))], 0)
    times = []

    def train(groups: Sequence[Group], directory: Path) -> int:
        result = learner.step(pack(samples_from(groups), num_ranks=1, token_budget=4096, minibatches=1, loss="dapo"))
        learner.export_weights(directory, result.version)
        version: int = result.version
        return version

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        async with flights(bench, tools, adapts=False) as flight, GroupCollector(config, tasks, flight, Forgetful()) as collector:
            for step in range(steps):
                began = time.perf_counter()
                groups = await collector.next_batch()
                directory = Path(folder) / f"v{step}"
                version = await asyncio.get_running_loop().run_in_executor(thread, train, groups, directory)
                await bench.engine.load_weights(directory, version)
                collector.release(groups, version=version)
                times.append(time.perf_counter() - began)
    await bench.engine.stop()
    learner.close()
    return times


def theirs(tools: SlowTools, steps: int) -> list[float]:
    """Seconds of every step but the last, which nothing ends. Runs in TRL's environment."""
    checks: Any = importlib.import_module("trl.import_utils")
    checks.is_vllm_available = lambda *_, **__: False  # it would import the vLLM that it sees, of a version it does not know
    import trl.trainer.grpo_trainer as grpo
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TINY_BASE / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.response_template = {}  # ours parses: `parse` below
    own = load_tokenizer(TINY_BASE)
    turns = script(own, CALLS)
    begins: list[float] = []

    async def search(query: str) -> str:
        """Search the web.

        Args:
            query: what to search for
        """
        await tools.wait()
        return OBSERVATION

    def parse(tokenizer: Any, ids: list[int], prefix: Any = None, tools: Any = None) -> dict[str, Any]:
        content = own.decode(ids).removesuffix("<|im_end|>")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if "<tool_call>" in content:
            message["content"] = content.partition("<tool_call>")[0]
            message["tool_calls"] = [{"type": "function", "function": {"name": "search", "arguments": {"query": "Karo Mil"}}}]
        return message

    class Scripted(grpo.GRPOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            self._turn = 0
            return super()._generate(prompts)

        def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **settings: Any) -> Any:
            ids = list(turns[self._turn])
            self._turn += 1
            self.generation_config.max_new_tokens = self.generation_config.min_new_tokens = len(ids)
            completions, logprobs = super()._generate_single_turn(prompt_ids, *arguments, **settings)[:2]
            return [ids for _ in completions], logprobs

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begins.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            begins.append(time.perf_counter())

    grpo.parse_response = parse
    config = grpo.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS * SIZE,
        num_generations=SIZE,
        max_completion_length=256,
        max_steps=steps,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    prompts = [[{"role": "user", "content": make_task(number).question}] for number in range(PROMPTS)]
    trainer = Scripted(
        model=str(TINY_BASE),
        reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        tools=[search],
        callbacks=[Clock()],
    )
    trainer.train()
    return [end - begin for begin, end in zip(begins[::2], begins[1::2], strict=True)]


def run(python: Path | str, arm: str, latency: str, steps: int) -> float:
    """Seconds of a step."""
    command = [str(python), "-m", "benchmarks.rollout_trl", "--arm", arm, "--latencies", latency, "--steps", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]).stdout
    times: list[float] = json.loads(output.splitlines()[-1])
    return statistics.fmean(times[1:])


def slow_tools(latency: str) -> SlowTools:
    """`1` or `1 log-normal`: seconds, constant or the mean."""
    seconds, _, kind = latency.partition(" ")
    return SlowTools(float(seconds), constant=kind != LOG_NORMAL)


def measured(python: Path, latency: str, steps: int) -> dict[str, Any]:
    trl_s = run(python, "trl", latency, steps)
    row: dict[str, Any] = {"latency_s": latency, "trl_step_s": trl_s}
    for staleness in (0, 1):
        row[f"stale_{staleness}_step_s"] = run(sys.executable, f"staleness-{staleness}", latency, 2 * steps)
    return row | {"ratio_stale_1": trl_s / row["stale_1_step_s"], "ratio": trl_s / row["stale_0_step_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=("staleness-0", "staleness-1", "trl"), help="alone, in this process: the last line is its seconds")
    parser.add_argument("--latencies", nargs="+", default=["0", "1", f"1 {LOG_NORMAL}"])
    parser.add_argument("--steps", type=int, default=4, help="of TRL, twice as many of ours; the first, which warms up, does not count")
    parser.add_argument("--environment", type=Path, default=Path("runs/trl-environment"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.arm:
        tools = slow_tools(arguments.latencies[0])
        own = arguments.arm != "trl"
        print(json.dumps(asyncio.run(ours(tools, arguments.steps, int(arguments.arm[-1]))) if own else theirs(tools, arguments.steps)))
        return
    python = environment(arguments.environment.absolute())
    rows = []
    for latency in arguments.latencies:
        rows.append(measured(python, latency, arguments.steps))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps({"trl": TRL, "completions": PROMPTS * SIZE, "calls": CALLS, "rows": rows}, indent=1) + "\n")
    print("  ".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>16.3f}" if isinstance(value, float) else f"{value:>16}" for value in row.values()))


if __name__ == "__main__":
    main()
