"""The process of one learner rank: finds the rendezvous, then passes every call on to LearnerRank. Imports torch only when it sets up."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from webdancer.cluster.scratch import WEIGHTS, make_scratch, remove_orphans
from webdancer.config import LearnerConfig, ModelConfig, RlConfig

if TYPE_CHECKING:
    from webdancer.learner.rank import LearnerRank


class LearnerActor:
    CALLS_ASIDE: ClassVar = {"disk": 1, "files": 1}
    """Threads of their own for calls that must not wait for a step (see calls.spawn); all others come one by one, on one thread."""

    def __init__(
        self, *, rank: int, world_size: int, model: ModelConfig, learner: LearnerConfig, rl: RlConfig, seed: int, shares_gpu: bool = False
    ) -> None:
        """`shares_gpu`: what a call leaves unused is given back, for the engine that wakes up next."""
        self._settings: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "model": model,
            "learner": learner,
            "rl": rl,
            "seed": seed,
        }
        self._shares_gpu = shares_gpu
        self._rank: LearnerRank | None = None
        self._sender: Any = None
        self._source: Any = None
        self._weights: Path | None = None

    def place(self) -> tuple[str, str, int]:
        """Node id, address of the node, and a port that is free on it now."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return ray.get_runtime_context().get_node_id(), address, port

    def setup(self, init_method: str) -> None:
        """Join the other ranks and load the model; blocks until all have come."""
        from webdancer.learner.rank import LearnerRank

        self._rank = LearnerRank(init_method=init_method, **self._settings)
        self._rank.setup()

    def call(self, method: str, *arguments: Any, **settings: Any) -> Any:
        assert self._rank is not None, "setup comes first"
        if method == "get_version":
            return self._rank.version
        result = getattr(self._rank, method)(*arguments, **settings)
        self._give_back()
        return result

    def connect_engines(
        self, workers: Sequence[Any], *, backend: str, address: str, port: int, ranks_per_engine: int, timeout_s: float
    ) -> None:
        """Open this rank's end of `nccl` or `ipc`; rank 0 meets the workers, the others only gather with it."""
        from webdancer.cluster.engine_client import EngineClient
        from webdancer.inference.weight_send import GatheredWeights, open_sender

        assert self._rank is not None, "setup comes first"
        if self._sender is not None:
            self._sender.shutdown()
        self._source = source = GatheredWeights(self._rank.tensor_specs(), self._rank.gathered_weights)
        client = EngineClient(workers, ranks_per_engine=ranks_per_engine, timeout_s=timeout_s)
        num_engine_ranks = ranks_per_engine * len(workers)
        self._sender = open_sender(
            backend, source, client, rank=self._rank.rank, address=address, port=port, num_engine_ranks=num_engine_ranks
        )

    def send_weights(self) -> dict[str, int]:
        """To all engines that were connected; they stand still until the publisher ends their update with the checksums given here."""
        assert self._sender is not None, "connect_engines comes first"
        self._sender.send_weights()
        checksums: dict[str, int] = self._source.checksums()
        self._give_back()
        return checksums

    def _give_back(self) -> None:
        """Torch keeps what was freed for itself otherwise."""
        if self._shares_gpu:
            import torch

            torch.cuda.empty_cache()  # nothing where there is no GPU

    def wait_for_disk(self) -> None:
        """Until the checkpoint in flight is written. In the group `disk`."""
        if self._rank is not None:
            self._rank.wait_for_disk()

    def make_weights_directory(self, configured: str, fallback: str) -> str:
        """Where this node writes weights for the engines: as configured, else in memory if two versions fit, else `fallback`."""
        from webdancer.learner.hf_files import model_directory

        base = configured
        if not base:
            size = sum(file.stat().st_size for file in model_directory(self._settings["model"].path).glob("*.safetensors"))
            in_memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4 * size
            base = "/dev/shm" if in_memory else fallback
        Path(base).mkdir(parents=True, exist_ok=True)
        remove_orphans(WEIGHTS, base)
        self._weights = make_scratch(WEIGHTS, base)
        return str(self._weights)

    def read_file(self, path: str) -> bytes:
        """In the group `files`."""
        return Path(path).read_bytes()

    def remove(self, path: str) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, path: str) -> None:
        """Remove an export, its memory kept for the next one."""
        from webdancer.learner.weight_export import set_aside

        set_aside(Path(path))

    def close(self) -> None:
        """Leave the process group, the checkpoint in flight written, and remove what was written for the engines."""
        if self._weights is not None:
            shutil.rmtree(self._weights, ignore_errors=True)
        if self._rank is not None:
            self._rank.close()
