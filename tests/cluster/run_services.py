"""A program for test_cluster_launch: opens the services, publishes, runs some episodes, says READY, then waits to be told how to end."""

from __future__ import annotations

import asyncio
import signal
import sys

from tests.cluster.fake_engine import make_exact_engine
from tests.fakes import make_task
from webdancer.cluster.launch import services
from webdancer.config import Config, load
from webdancer.offline_web.server import running_server
from webdancer.rollout.group import sample_group
from webdancer.runs.quickstart import with_offline_web
from webdancer.types import Sampling


async def main(model: str, run_dir: str, address: str) -> None:
    config = load(
        [],
        [
            f"model.path={model}",
            "model.dtype=float32",
            f"run_dir={run_dir}",
            "prompt.style=brief",
            "episode.max_turns=2",
            "episode.max_tokens=512",
            "episode.max_turn_tokens=16",
            "tools.num_servers=1",
            "judge.num_servers=1",
            "rollout.num_workers=1",
            "learner.num_ranks=1",
            "learner.token_budget=512",
            f"cluster.address={address}",
            "cluster.shared_gpus=true",  # there are none: engines only stand still while the learner works
            "cluster.object_store_mib=100",
        ],
    )
    with running_server(num_entities=600) as origin:
        await run(with_offline_web(config, origin), address)


async def run(config: Config, address: str) -> None:
    async with services(config, make_engine=make_exact_engine) as live:
        figures = await live.weights.publish(0)
        group = await sample_group(make_task(), live.runner, group_size=2, attempt=0, start_version=0, sampling=Sampling())
        stops = [str(member.trajectory.stop) for member in group.members]
        print(f"READY {figures['canary/max']} {stops}", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        if address != "local":
            return
        raise SystemExit(7)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as webdancer.cli does; in the background it comes ignored
    asyncio.run(main(*sys.argv[1:]))
