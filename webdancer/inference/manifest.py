"""The learner's weight export as an engine sees it: a directory with `manifest.json` and one safetensors file a layer group.

    {"version": 3, "files": [{"file": "group-000.safetensors", "xxh3": "...",
                              "tensors": [{"name": "model.embed_tokens.weight", "shape": [1500, 192], "dtype": "float32"}]}]}

`verify` reads every byte and refuses the first difference by name, before an engine has touched a weight. No torch, no vLLM.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdancer.errors import DataError
from webdancer.whole_file import fast_hash

MANIFEST = "manifest.json"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}

TensorSpec = tuple[tuple[int, ...], str]
"""Shape and dtype, as torch spells it without its prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    path: Path
    xxh3: str
    tensors: Mapping[str, TensorSpec]

    def check_tensors(self, found: Mapping[str, TensorSpec]) -> None:
        """Raises DataError when names, shapes or dtypes differ from the manifest's."""
        for name in sorted(self.tensors.keys() | found.keys()):
            if name not in found:
                raise DataError(f"{self.path.name}: must hold the tensor {name} of its manifest, got none")
            if name not in self.tensors:
                raise DataError(f"{self.path.name}: must hold the tensors of its manifest only, got {name} besides")
            if found[name] != self.tensors[name]:
                raise DataError(f"{self.path.name}: {name} must be {_spell(self.tensors[name])}, got {_spell(found[name])}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    version: int
    files: tuple[WeightFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.path.stat().st_size for file in self.files)


def read_manifest(path: Path | str) -> Manifest:
    """The manifest at `path`, which is the file or its directory. Raises DataError when it is malformed or names a tensor twice."""
    location = Path(path)
    location = location / MANIFEST if location.is_dir() else location
    try:
        raw: dict[str, Any] = json.loads(location.read_text(encoding="utf-8"))
        files = tuple(_weight_file(location.parent, entry) for entry in raw["files"])
        manifest = Manifest(version=int(raw["version"]), files=files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"weights: must be a directory with a readable {MANIFEST}, got {location}: {error!r}") from error
    names = [name for file in manifest.files for name in file.tensors]
    if not names or len(set(names)) != len(names):
        raise DataError(f"{location}: must name every tensor once, got {len(names)} names of {len(set(names))} tensors")
    return manifest


def read_verified(path: Path | str, version: int) -> Manifest:
    """The manifest of this version, every byte of it verified. Raises DataError."""
    manifest = read_manifest(path)
    if manifest.version != version:
        raise DataError(f"{path}: must be the export of version {version}, got version {manifest.version}")
    verify(manifest)
    return manifest


def verify(manifest: Manifest) -> None:
    """Every file against its hash, and its header against the manifest's names, shapes and dtypes. Raises DataError."""
    for file in manifest.files:
        try:
            digest = fast_hash(file.path)
        except (OSError, ValueError) as error:
            raise DataError(f"{file.path.name}: must be beside its manifest, got {error!r}") from error
        if digest != file.xxh3:
            raise DataError(f"{file.path.name}: xxh3 must be {file.xxh3[:12]}..., got {digest[:12]}...")
        file.check_tensors(read_header(file.path))


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes in a safetensors file, without its data. Raises DataError."""
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > path.stat().st_size:
                raise ValueError(f"the header cannot be longer than the file, got {length} bytes")
            entries: dict[str, Any] = dict(json.loads(handle.read(length)))
        return {name: (tuple(spec["shape"]), _DTYPES[spec["dtype"]]) for name, spec in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"{path.name}: must be a safetensors file, got {error!r}") from error


def _weight_file(directory: Path, entry: Mapping[str, Any]) -> WeightFile:
    name = str(entry["file"])
    if Path(name).name != name:
        raise ValueError(f"file: must be a plain name beside the manifest, got {name!r}")
    tensors = {
        str(tensor["name"]): (tuple(int(size) for size in tensor["shape"]), str(tensor["dtype"]).removeprefix("torch."))
        for tensor in entry["tensors"]
    }
    if len(tensors) != len(entry["tensors"]):
        raise ValueError(f"tensors: must have different names, got one twice in {name}")
    return WeightFile(path=directory / name, xxh3=str(entry["xxh3"]), tensors=tensors)


def _spell(spec: TensorSpec) -> str:
    shape, dtype = spec
    return f"{dtype}{list(shape)}"
