"""What the learner writes is what it computes with: engines and transformers read the same weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from ranks import make_samples
from safetensors.torch import load_file

from webdancer.algorithm.packing import pack
from webdancer.config import OptimizerConfig
from webdancer.learner.weight_export import set_aside

SEQUENCES = [[5, 9, 2, 200, 17, 3], [1, 2], [7] * 40, list(range(100))]


def _train_and_export(one, root):
    one.configure_phase(loss="sft", optimizer=OptimizerConfig(lr=1e-2), total_steps=2)
    before = one.score(SEQUENCES)
    for _ in range(2):
        one.step(pack(make_samples(6), num_ranks=one.world_size, token_budget=128, loss="sft"))
    one.export_weights(root / "old", 40)
    if one.rank == 0:
        for file in (root / "old").iterdir():
            file.write_bytes(b"x" * (file.stat().st_size + 100))
        set_aside(root / "old")
    manifest = one.export_weights(root / "weights", 41)
    one.export_hf(root / "hf")
    return before, one.score(SEQUENCES, temperature=0.7), manifest


def _hf_logprobs(directory, sequence, temperature=1.0):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence])).logits[0, :-1] / temperature
    picked = torch.log_softmax(logits, -1).gather(-1, torch.tensor(sequence)[1:, None])[:, 0]
    return np.concatenate([[0.0], picked.numpy()])


@pytest.mark.parametrize("which", ["tied_model", "untied_model"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_exports_hold_the_learners_weights(pool, request, tmp_path, which, ranks):
    source = request.getfixturevalue(which)
    answers = pool.run(_train_and_export, ranks, source, tmp_path)
    before, after, manifest = answers[0]
    for sequence, start, trained in zip(SEQUENCES, before, after, strict=True):
        np.testing.assert_allclose(start, _hf_logprobs(source, sequence), atol=1e-5)
        np.testing.assert_allclose(trained, _hf_logprobs(tmp_path / "hf", sequence, 0.7), atol=1e-5)
    assert all(answer[2] == manifest for answer in answers)

    exported = _check_manifest(tmp_path / "weights", manifest)
    hf = load_file(tmp_path / "hf" / "model.safetensors")
    untrained = load_file(source / "model.safetensors")
    assert exported.keys() == hf.keys() == untrained.keys()
    assert not any(torch.equal(untrained[name], hf[name]) for name in hf)
    assert all(torch.equal(exported[name], hf[name]) for name in hf)
    assert ("lm_head.weight" in exported) == (which == "untied_model")
    assert (tmp_path / "hf" / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert not list(tmp_path.rglob(".*"))
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "hf"}, "the old export was written over"


def _check_manifest(directory: Path, manifest):
    assert json.loads((directory / "manifest.json").read_text()) == manifest
    assert manifest["version"] == 41
    tensors = {}
    for entry in manifest["files"]:
        data = (directory / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["xxh3"]) == (len(data), xxhash.xxh3_128_hexdigest(data))
        stored = load_file(directory / entry["file"])
        assert {tensor["name"]: (tuple(tensor["shape"]), tensor["dtype"]) for tensor in entry["tensors"]} == {
            name: (tuple(tensor.shape), "float32") for name, tensor in stored.items()
        }
        tensors |= stored
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *(entry["file"] for entry in manifest["files"])}
    return tensors


def test_large_models_are_written_as_several_files_with_an_index(pool, untied_model, tmp_path):
    pool.run(_export_in_parts, 2, untied_model, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()
    np.testing.assert_allclose(_hf_logprobs(tmp_path, SEQUENCES[0]), _hf_logprobs(untied_model, SEQUENCES[0]), atol=1e-6)


def _export_in_parts(one, directory):
    from unittest.mock import patch

    with patch("webdancer.learner.weight_export.MAX_FILE_BYTES", 100_000):
        one.export_hf(directory)


def _bfloat16(one, root):
    one.configure_phase(loss="sft", optimizer=OptimizerConfig(lr=1e-3), total_steps=2)
    result = one.step(pack(make_samples(6), num_ranks=one.world_size, token_budget=128, loss="sft"))
    one.export_hf(root)
    masters = {str(parameter.dtype) for parameter in one._model.parameters()}
    return result.metrics["loss"], masters, one.score(SEQUENCES)


def test_bfloat16_computes_in_halves_and_keeps_whole_masters(pool, tied_model, tmp_path):
    loss, masters, scores = pool.run(_bfloat16, 2, tied_model, tmp_path, dtype="bfloat16")[0]
    exact = pool.run(_bfloat16, 1, tied_model, tmp_path / "exact")[0]
    assert masters == {"torch.float32"}
    assert loss == pytest.approx(exact[0], rel=0.02)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "model.safetensors").values()} == {"torch.bfloat16"}
    np.testing.assert_allclose(np.concatenate(scores), np.concatenate(exact[2]), atol=0.15)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
