"""Weights from the learner into a running vLLM engine: as files that every engine can read, or by one of vLLM's own ways on GPUs.

    file    a learner's safetensors, checked against their manifest; works everywhere, and always: for engines that join later, too
    nccl    a broadcast from rank 0 of the learner to engines on other GPUs
    ipc     handles on memory of the GPU that engine and learner share

What came directly is compared with the sender's checksums (`checksum`) before the update ends: every tensor's bytes as they were received.

vLLM imports this module in every worker process, because `worker_extension_cls` names it; importing it registers the backends. What they
share is vLLM's layerwise reload: on CPU the linear layers are prepacked, and a tied `lm_head` then gets the new packing, which vLLM 0.32
forgets (an error of 0.7 nats, silently). The layout of the files is `webdancer.inference.manifest`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from webdancer.errors import DataError
from webdancer.inference.checksum import check, checksum, numbers
from webdancer.inference.manifest import read_header, read_manifest


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where the learner's export lies: its directory, or the manifest in it."""

    path: str


@dataclass
class ChecksumInfo(WeightTransferUpdateInfo):
    """What the learner has sent directly in this update, by tensor: the last part of it."""

    checksums: dict[str, int]


class _Noted:
    """Stands before the model where tensors arrive directly, and keeps the checksum of each."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.received: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        return self._model.load_weights((name, self._note(name, tensor)) for name, tensor in weights)

    def _note(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self.received[name] = checksum(tensor)
        return tensor


class WeightTransfer(WeightTransferEngine[Any, Any]):
    """An update is a path, or parts that `direct_cls`, one of vLLM's own engines, takes, and then their checksums."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    direct_cls: ClassVar[type[WeightTransferEngine[Any, Any]] | None] = None

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._direct = self.direct_cls(config, vllm_config, device, model) if self.direct_cls is not None else None
        self._unproven = False
        self._noted = _Noted(model)
        if self._direct is not None:
            self._direct.model = self._noted  # type: ignore[assignment]  # all that these engines ask of it is to load weights

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return self._direct.parse_init_info(init_dict) if self._direct is not None else super().parse_init_info(init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        if "checksums" in update_dict:
            return ChecksumInfo(**update_dict)
        by_file = self._direct is None or "path" in update_dict
        return super().parse_update_info(update_dict) if by_file else self._direct.parse_update_info(update_dict)  # type: ignore[union-attr]

    def init_transfer_engine(self, init_info: Any) -> None:
        if self._direct is not None:
            self._direct.init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._noted.received = {}
        self._unproven = False
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Any) -> None:
        """Files are mapped one by one and loaded in one call, as each call walks over the model. Hashes were checked before the update
        began (`manifest.verify`); here every tensor is compared with the manifest once more. Raises DataError, naming tensor or file."""
        if isinstance(update_info, ChecksumInfo):
            check(update_info.checksums, numbers(self._noted.received))
            self._unproven = False
            return
        if not isinstance(update_info, FileUpdateInfo):
            assert self._direct is not None
            self._unproven = True
            self._direct.receive_weights(update_info)
            return
        model: Any = self.model
        model.load_weights(self._tensors(update_info.path))

    def _tensors(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        for file in read_manifest(path).files:
            file.check_tensors(read_header(file.path))
            yield from load_file(file.path, device=str(self.device)).items()

    def finish_weight_update(self) -> None:
        """Raises DataError where a layer got nothing, or nobody has said what the bytes that came directly should be."""
        if self._unproven:
            raise DataError("weights: what is sent directly must be followed by its checksums, got none")
        _check_complete(self.model)
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        if isinstance(self._direct, IPCWeightTransferEngine):
            self._direct._packed_importer.close()  # the learner's buffer is its own again
        if self.device.type == "cpu":
            _share_tied_head(self.model)

    def shutdown(self) -> None:
        if self._direct is not None:
            self._direct.shutdown()


class NcclTransfer(WeightTransfer):
    direct_cls = NCCLWeightTransferEngine


class IpcTransfer(WeightTransfer):
    direct_cls = IPCWeightTransferEngine


def _check_complete(model: Any) -> None:
    """vLLM keeps the old weights of a layer that got none, with a warning only. Here that is an error."""
    for name, layer in model.named_modules():
        if not any(True for _ in layer.parameters(recurse=False)):
            continue  # buffers only, such as the rotary embedding's: no checkpoint holds them
        info = get_layerwise_info(layer)
        expected = info.load_numel_total or 0
        if not info.can_load() or is_deferred_attention_layer(layer) or info.load_numel >= expected:
            continue
        padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0  # the vocabulary is padded to a multiple of 64
        if not padded and not (name == "lm_head" and model.config.tie_word_embeddings):
            raise DataError(f"weights: must fill every layer, got {info.load_numel} of {expected} numbers for {name}")


def _share_tied_head(model: Any) -> None:
    """Make a tied head compute with the new embeddings: its packed copy is not a parameter, so no loader sees it. vLLM has just packed
    the embeddings as well, which multiply nothing themselves: the head takes theirs."""
    if getattr(model.config, "tie_word_embeddings", False):
        model.lm_head.weight = model.model.embed_tokens.weight
        model.lm_head.cpu_linear = model.model.embed_tokens.cpu_linear


class WorkerExtension:
    """Mixed into vLLM's worker class. Naming it gets this module imported in the worker's process."""

    def gpu_used_gib(self) -> float | None:
        """In use on this worker's GPU, by all processes; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30


BACKENDS: dict[str, type[WeightTransfer]] = {
    "webdancer_file": WeightTransfer,
    "webdancer_nccl": NcclTransfer,
    "webdancer_ipc": IpcTransfer,
}
for _name, _backend in BACKENDS.items():
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _backend)
