"""A weight export is refused by name, whatever is wrong with it."""

import contextlib
import json

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from webdancer.errors import DataError
from webdancer.inference.manifest import read_header, read_manifest, read_verified


def write(directory, change=lambda manifest: None):
    directory.mkdir(parents=True, exist_ok=True)
    data = save({"a.weight": np.zeros((2, 3), np.float32), "a.bias": np.zeros(3, np.float16)})
    (directory / "a.safetensors").write_bytes(data)
    tensors = [{"name": "a.weight", "shape": [2, 3], "dtype": "float32"}, {"name": "a.bias", "shape": [3], "dtype": "float16"}]
    entry = {"file": "a.safetensors", "xxh3": xxhash.xxh3_128_hexdigest(data), "bytes": len(data), "tensors": tensors}
    manifest = {"version": 4, "files": [entry]}
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_a_good_export_is_read_by_directory_or_file(tmp_path):
    path = write(tmp_path)
    manifest = read_verified(path, 4)
    assert manifest == read_verified(path / "manifest.json", 4)
    assert manifest.num_bytes == (path / "a.safetensors").stat().st_size
    assert manifest.files[0].tensors["a.bias"] == ((3,), "float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"][0]["tensors"].pop(), "a.bias besides"),
        (lambda m: m["files"][0]["tensors"].append({"name": "b", "shape": [1], "dtype": "float32"}), "tensor b of"),
        (lambda m: m["files"][0]["tensors"][0].update(shape=[3, 2]), r"a\.weight must be float32\[3, 2\], got float32\[2, 3\]"),
        (lambda m: m["files"][0]["tensors"][0].update(dtype="bfloat16"), r"a\.weight must be bfloat16"),
        (lambda m: m["files"][0].update(xxh3="0" * 32), "xxh3"),
        (lambda m: m["files"][0].update(file="../a.safetensors"), "plain name"),
        (lambda m: m["files"][0].update(file="b.safetensors"), "beside its manifest"),
        (lambda m: m.update(files=m["files"] * 2), "every tensor once"),
        (lambda m: m.update(files=[]), "every tensor once"),
        (lambda m: m.pop("version"), "version"),
        (lambda m: m.update(version=5), "version 4, got version 5"),
    ],
)
def test_a_wrong_export_is_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_verified(write(tmp_path, change), 4)


def test_no_manifest_no_export(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path / "nowhere")


@given(st.binary(max_size=64))
def test_any_bytes_are_a_header_or_a_data_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        read_header(path)
