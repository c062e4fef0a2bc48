"""The learner's end of vLLM's own weight transfer: `nccl` to engines on other GPUs, `ipc` to engines that share the learner's GPUs.

Every rank opens a sender and calls `send_weights` on it, because gathering is collective; rank 0 alone drives the engines, through the
client that it was given. Weights travel in buffers of BUFFER_BYTES or of the largest tensor, one layer group gathered at a time. What was
sent is proven by the checksums of its tensors (`GatheredWeights.checksums`), which the engines compare with what they received.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from webdancer.inference.checksum import checksum, numbers
from webdancer.inference.manifest import TensorSpec

BUFFER_BYTES = 256 << 20


class GatheredWeights(WeightSource):
    """`specs` by name, in the order in which `gather` gives the tensors, anew at every call."""

    def __init__(self, specs: Mapping[str, TensorSpec], gather: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self._specs = specs
        self._gather = gather
        self._sums: dict[str, torch.Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name=name, dtype=getattr(torch, dtype), shape=shape) for name, (shape, dtype) in self._specs.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._sums = {}
        for name, tensor in self._gather():
            self._sums[name] = checksum(tensor)
            yield name, tensor

    def checksums(self) -> dict[str, int]:
        """By name, of what was iterated last. Waits for the device."""
        return numbers(self._sums)

    def buffer_bytes(self) -> int:
        """Of one buffer: no tensor is split."""
        return max(BUFFER_BYTES, *(math.prod(meta.shape) * meta.dtype.itemsize for meta in self.metadata()))


def open_sender(backend: str, source: GatheredWeights, client: Any, *, rank: int, address: str, port: int, num_engine_ranks: int) -> Any:
    """vLLM's trainer engine, connected to all engines: `send_weights()` on every rank, then `shutdown()`.

    `client` has the four methods of vLLM's VLLMWeightSyncClient. Blocks until all have come; needs a GPU.
    """
    size = source.buffer_bytes()
    if backend == "ipc":
        ipc = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=size)
        return IPCTrainerWeightTransferEngine.trainer_init(ipc, client=client, source=source)
    nccl = NCCLTrainerInitInfo(
        rank=rank,
        master_address=address,
        master_port=port,
        world_size=1 + num_engine_ranks,
        packed=True,
        packed_buffer_size_bytes=size,
    )
    return NCCLTrainerWeightTransferEngine.trainer_init(nccl, client=client, source=source)
