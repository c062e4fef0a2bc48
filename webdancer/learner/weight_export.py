"""The learner's weights as files: for the engines after every step, and as a Hugging Face directory.

Weights are gathered one layer group at a time, in one collective each, and rank 0 writes the group before the next is gathered: no rank
ever holds the whole model. They are written in the compute type, in which the learner itself runs them. A tied head is not written, as
Hugging Face has it. LoRA's adapters are added to the weights beside which they lie. Functions here are collective.

For the engines, `export_weights(directory)` writes one safetensors file a group and, last and by rename, `manifest.json`:

    {"version": 3, "files": [{"file": "layer_000.safetensors", "xxh3": "...", "bytes": 123,
                              "tensors": [{"name": "model.layers.0.mlp.up_proj.weight", "shape": [512, 192], "dtype": "float32"}]}]}
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from webdancer.learner.hf_files import INDEX, copy_tokenizer
from webdancer.learner.lora import is_adapter, merged
from webdancer.learner.model import PolicyModel, hf_name

MANIFEST = "manifest.json"
SPARE = "spare"
CHUNK = 1 << 20
"""Bytes that are hashed and then written out of a cache."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_FILE_BYTES = 4 << 30
"""Size from which a Hugging Face export begins another file."""


def export_weights(model: PolicyModel, directory: Path, version: int) -> dict[str, Any]:
    """Write the weights and their manifest; the manifest comes back on every rank."""
    files = []
    if dist.get_rank() == 0:
        _take_spare(directory)
    for group, tensors in gathered_groups(model, lent=True):
        if dist.get_rank() == 0:
            files.append(_write_over(directory / f"{group}.safetensors", tensors))
    if dist.get_rank() == 0:
        _replace(directory / MANIFEST, json.dumps({"version": version, "files": files}).encode())
    box = [{"version": version, "files": files}]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def set_aside(directory: Path) -> None:
    """An export that nobody reads any more becomes the next one's: to write over memory that is there already takes half the time. As
    much of it is in use between two exports as an export needs anyway, for the new and the old."""
    spare = directory.with_name(SPARE)
    shutil.rmtree(spare, ignore_errors=True)
    try:
        directory.rename(spare)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)


def _take_spare(directory: Path) -> None:
    """Without a manifest: until that is written, last, nobody takes the files for an export."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        directory.with_name(SPARE).rename(directory)
    directory.mkdir(exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)


def export_hf(model: PolicyModel, source: Path, directory: Path, dtype: str) -> None:
    """config.json, tokenizer files as they were in `source`, and the weights: model.safetensors, or several files with an index."""
    writer = _HfWriter(directory)
    for _, tensors in gathered_groups(model):
        if dist.get_rank() == 0:
            writer.add(tensors)
    if dist.get_rank() == 0:
        writer.finish()
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)  # the older name, which would contradict
        _replace(directory / "config.json", json.dumps(config | {"dtype": dtype}, indent=2).encode())
        copy_tokenizer(source, directory)
    dist.barrier()


def gathered_groups(model: PolicyModel, *, on_device: bool = False, lent: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(group name, full tensors on CPU by Hugging Face name), on rank 0; the others take part in the gathering and get no tensors.

    on_device: every rank gets them, on its own device. lent: without a copy of their own where they lie on the CPU, until the next group.
    """
    wanted = on_device or dist.get_rank() == 0
    for group, module, named in _named_groups(model):
        assert isinstance(module, FSDPModule)
        module.unshard()
        parameters = dict(module.named_parameters()) if wanted else {}
        target = next(model.parameters()).device if on_device else torch.device("cpu")
        tensors = {name: merged(module, key, parameters[key]).to(target, copy=not lent) for name, key in named.items() if wanted}
        if not lent:
            module.reshard()
        yield group, tensors
        if lent:
            module.reshard()


def tensor_specs(model: PolicyModel, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of all that `gathered_groups` gives, in its order, without gathering."""
    specs: dict[str, tuple[tuple[int, ...], str]] = {}
    for _, module, named in _named_groups(model):
        parameters = dict(module.named_parameters())
        specs |= {name: (tuple(parameters[key].shape), dtype) for name, key in named.items()}
    return specs


def _named_groups(model: PolicyModel) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """(group name, module, its parameters' own names by Hugging Face name), every parameter in one group only, adapters in none."""
    full_names = {id(module): prefix for prefix, module in model.named_modules()}
    taken: set[str] = set()
    for group, module in model.layer_groups():
        names = {hf_name(f"{full_names[id(module)]}.{key}".removeprefix(".")): key for key, _ in module.named_parameters()}
        yield group, module, {name: key for name, key in names.items() if name not in taken and not is_adapter(name)}
        taken |= names.keys()


class _HfWriter:
    """Tensors into files of bounded size. Names of the files are known only once all are written, so they are renamed at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and sum(tensor.nbytes for tensor in self._pending.values()) + size > MAX_FILE_BYTES:
            self._flush()
        self._pending |= tensors

    def finish(self) -> None:
        self._flush()
        if len(self._files) == 1:
            self._part(0).replace(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._files):
            file = f"model-{index + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._part(index).replace(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        _replace(self.directory / INDEX, json.dumps(content, indent=2).encode())

    def _flush(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        _write_tensors(self._part(len(self._files)), self._pending)
        self._files.append(list(self._pending))
        self._bytes += sum(tensor.nbytes for tensor in self._pending.values())
        self._pending = {}

    def _part(self, index: int) -> Path:
        return self.directory / f"part-{index:05d}.tmp"


def _write_over(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write one safetensors file into whatever file is there, and describe it. What is hashed is what is written, on its way."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    parts = [_memory(tensor) for tensor in tensors.values()]
    ends = list(itertools.accumulate(map(len, parts), initial=0))
    about: dict[str, Any] = {
        name: {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [ends[index], ends[index + 1]]}
        for index, (name, tensor) in enumerate(tensors.items())
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **about}).encode()
    header += b" " * (-len(header) % 8)
    digest = xxhash.xxh3_128()
    with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644), "wb") as file:
        for part in (memoryview(struct.pack("<Q", len(header)) + header), *parts):
            for start in range(0, len(part), CHUNK):
                digest.update(part[start : start + CHUNK])
                file.write(part[start : start + CHUNK])
        file.truncate()
    described = [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")} for name, tensor in tensors.items()
    ]
    return {"file": path.name, "bytes": path.stat().st_size, "xxh3": digest.hexdigest(), "tensors": described}


def _memory(tensor: Tensor) -> memoryview:
    """Its bytes, on the CPU, while it lives. (FSDP could not free again what numpy has looked at.)"""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, which is there whole or not at all."""
    temporary = _beside(path)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _replace(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never half of one."""
    temporary = _beside(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
