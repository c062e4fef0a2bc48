"""What every engine has to do, written once for both: the checks behind tests/unit/test_inference_exact.py and tests/e2e/test_engine_*.py.

The reference is transformers' own forward pass of the model whose weights the engine was given.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save

from webdancer.errors import DataError, EngineFault
from webdancer.inference.canary import compare, probe
from webdancer.inference.checksum import checksum, numbers
from webdancer.inference.exact import processed_logits
from webdancer.types import Sampling

torch.set_num_threads(1)  # the default, a thread a core, is many times slower beside other work

VOCAB = 300
EOS = 1
MAX_LEN = 512
GROUPS = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.self_attn.q_norm.weight",
    "model.layers.1.self_attn.k_norm.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
)
"""One tensor of every kind in a Qwen3."""


class IdTokenizer:
    """Text is the ids in decimal, one word each."""

    eos_id = EOS

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


def make_model(directory: Path, *, tied: bool):
    """A random Qwen3 with spread-out logits, saved as a Hugging Face directory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2 * MAX_LEN,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=2,
        initializer_range=0.15,
    )
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(directory)
    return model


def export(model, directory: Path, version: int) -> Path:
    """What learner.weight_export writes: a file a layer group, the manifest last."""
    directory.mkdir(parents=True)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        groups.setdefault(f"layer_{parts[2]}" if "layers" in parts else parts[-2], {})[name] = tensor.detach().clone()
    files = []
    for group, tensors in groups.items():
        data = save(tensors)
        (directory / f"{group}.safetensors").write_bytes(data)
        described = [{"name": n, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in tensors.items()]
        files.append({"file": f"{group}.safetensors", "xxh3": xxhash.xxh3_128_hexdigest(data), "tensors": described})
    (directory / "manifest.json").write_text(json.dumps({"version": version, "files": files}))
    return directory


def perturb(model, name: str) -> None:
    """Move one tensor by a tenth of its spread; a norm's weights, which are all 1, by a tenth."""
    parameter = dict(model.named_parameters())[name]
    scale = max(float(parameter.std()), 1.0 if parameter.ndim == 1 else 0.0)
    parameter.add_(0.1 * scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))


def prompts(count: int, length: int = 40) -> list[list[int]]:
    generator = np.random.default_rng(count)
    return [generator.integers(3, VOCAB, length + i).tolist() for i in range(count)]


@torch.inference_mode()
def reference_logprobs(model, prompt, token_ids, sampling=None) -> list[float]:
    """Processed log-probability of each generated token."""
    sampling = sampling or Sampling()
    ids = [*prompt, *token_ids]
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    scores = []
    for index, token in enumerate(token_ids):
        position = len(prompt) + index
        scores.append(float(processed_logits(logits[position - 1], ids[:position], sampling).log_softmax(-1)[token]))
    return scores


async def check_sampled_logprobs(engine, model) -> None:
    asked = prompts(6)
    for sampling in (Sampling(seed=5), Sampling(temperature=0.7, top_p=0.9, seed=5), Sampling(top_k=7, repetition_penalty=1.3, seed=5)):
        given = await asyncio.gather(*(engine.complete(p, sampling=sampling, max_tokens=24, session=f"s{i}") for i, p in enumerate(asked)))
        for prompt, completion in zip(asked, given, strict=True):
            assert 1 <= len(completion.token_ids) <= 24
            expected = reference_logprobs(model, prompt, completion.token_ids, sampling)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
            assert completion.text == IdTokenizer().decode(completion.token_ids)
            assert (completion.finish == "stop") == (completion.token_ids[-1] == EOS)
            assert completion.finish == "stop" or len(completion.token_ids) == 24
            assert EOS not in completion.token_ids[:-1]


async def check_greedy(engine, model) -> None:
    (prompt,) = prompts(1)
    completion = await engine.complete(prompt, sampling=Sampling(temperature=0.0), max_tokens=16, session="g")
    ids = list(prompt)
    for token in completion.token_ids:
        with torch.inference_mode():
            assert token == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    np.testing.assert_allclose(completion.logprobs, reference_logprobs(model, prompt, completion.token_ids), atol=1e-4)


async def check_streaming(engine) -> None:
    """Who listens hears every id in its order while the request runs, and gets the completion that nobody's listening would have given; who
    is cancelled in the middle of it ends the request."""
    (prompt,) = prompts(1)
    heard: list[int] = []
    times: list[int] = []

    def on_tokens(token_ids):
        heard.extend(token_ids)
        times.append(len(token_ids))

    settings = {"sampling": Sampling(seed=11), "max_tokens": 40}
    streamed, quiet = await asyncio.gather(
        engine.stream(prompt, session="listened", on_tokens=on_tokens, **settings), engine.complete(prompt, session="quiet", **settings)
    )
    assert streamed.token_ids == quiet.token_ids
    np.testing.assert_allclose(streamed.logprobs, quiet.logprobs, atol=1e-4)
    assert (streamed.text, streamed.finish, streamed.versions) == (quiet.text, quiet.finish, quiet.versions)
    assert tuple(heard) == streamed.token_ids
    assert len(times) > len(heard) / 2, "as they are sampled, not all at the end"

    began = asyncio.Event()
    settings = {"sampling": Sampling(seed=3), "max_tokens": 450}
    running = asyncio.create_task(engine.stream([5] * 10, session="given up", on_tokens=lambda token_ids: began.set(), **settings))
    await asyncio.wait_for(began.wait(), 30)
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until_idle(engine)


async def until_idle(engine) -> None:
    for _ in range(200):
        if (await engine.stats())["running"] == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the cancelled request still runs")


async def check_stop_token(engine) -> None:
    """A vocabulary of 300 and flat sampling: some of 60 short generations end on the end-of-turn token."""
    hot = Sampling(temperature=2.0)
    given = await asyncio.gather(*(engine.complete([5, 6, 7], sampling=hot, max_tokens=20, session=f"h{i}") for i in range(60)))
    stopped = [completion for completion in given if completion.finish == "stop"]
    assert stopped
    assert all(completion.token_ids[-1] == EOS and len(completion.logprobs) == len(completion.token_ids) for completion in stopped)


async def check_limits(engine) -> None:
    prompt = [3 + i % 200 for i in range(MAX_LEN - 4)]
    completion = await engine.complete(prompt, sampling=Sampling(seed=1), max_tokens=50, session="long")
    assert completion.finish == "stop" or len(completion.token_ids) == 4  # the context is full
    for wrong in ([], [3] * MAX_LEN):
        with pytest.raises(ValueError, match="prompt_ids"):
            await engine.complete(wrong, sampling=Sampling(), max_tokens=5, session="x")


async def check_score(engine, model, *, mean=1e-5, most=1e-3) -> None:
    sequences = probe(VOCAB)
    learner = [np.asarray(reference_logprobs(model, ids[:1], ids[1:])) for ids in sequences]
    report = compare(await engine.score(sequences), learner)
    assert report.within(mean=mean, max=most), report


async def check_every_tensor_arrives(engine, model, directory: Path) -> None:
    """Each kind of tensor moves by itself; after every update the engine scores as the model does, and not as it did before."""
    sequences = probe(VOCAB)
    names = dict(model.named_parameters())
    before = await engine.score(sequences)
    for name in (name for name in GROUPS if name in names):
        perturb(model, name)
        version = engine.version + 1
        timings = await engine.load_weights(export(model, directory / f"v{version}", version), version)
        assert engine.version == version
        assert timings["load_s"] > 0
        after = await engine.score(sequences)
        assert compare(before, after).max > 1e-2, f"{name}: the update changed nothing"
        learner = [np.asarray(reference_logprobs(model, ids[:1], ids[1:])) for ids in sequences]
        report = compare(after, learner)
        assert report.within(mean=1e-5, max=1e-3), f"{name}: {report}"
        before = after


async def check_update_in_mid_generation(engine, model, directory: Path) -> None:
    """Running requests go on under the new weights; each version's tokens are scored as that version's model does over the whole prefix."""
    import copy

    old, started = copy.deepcopy(model), engine.version
    version = started + 1
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        perturb(model, name)
    path = export(model, directory / f"v{version}", version)
    asked = prompts(4)
    sampling = Sampling(temperature=0.8)
    tasks = [asyncio.create_task(engine.complete(p, sampling=sampling, max_tokens=200, session=f"m{i}")) for i, p in enumerate(asked)]
    while (await engine.stats())["running"] < len(asked):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.1)
    await engine.load_weights(path, version)
    given = await asyncio.gather(*tasks)
    mixed = 0
    for prompt, completion in zip(asked, given, strict=True):
        spans = completion.versions
        assert [span.version for span in spans] in ([started], [version], [started, version])
        assert spans[0].start == 0
        assert spans[-1].end == len(completion.token_ids)
        scores = {
            started: reference_logprobs(old, prompt, completion.token_ids, sampling),
            version: reference_logprobs(model, prompt, completion.token_ids, sampling),
        }
        for span in spans:
            own = scores[span.version][span.start : span.end]
            np.testing.assert_allclose(completion.logprobs[span.start : span.end], own, atol=1e-4)
        mixed += len(spans) == 2
    assert mixed, "no request was running when the weights changed"


async def check_sleep(engine, model, directory: Path) -> None:
    """From `sleep` on nothing moves, until weights come; then requests go on under these, with nothing left of the old ones."""
    version = engine.version + 1
    (prompt,) = prompts(1)
    sampling = Sampling(temperature=0.8)
    task = asyncio.create_task(engine.complete(prompt, sampling=sampling, max_tokens=200, session="sleeps"))
    while (await engine.stats())["running"] < 1:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    await engine.sleep()
    assert await engine.sleep() == {}, "a second time is nothing, and no memory is given back on a CPU"
    before = (await engine.stats())["generated_tokens"]
    waiting = asyncio.create_task(engine.complete(prompt, sampling=sampling, max_tokens=3, session="waits"))
    await asyncio.sleep(0.3)
    assert not task.done()
    assert not waiting.done()
    assert (await engine.stats())["generated_tokens"] == before
    perturb(model, "model.norm.weight")
    await engine.load_weights(export(model, directory / "awake", version), version)
    completion = await asyncio.wait_for(task, 60)
    assert (await asyncio.wait_for(waiting, 60)).versions[0].version == version
    assert completion.versions[-1].version == version
    span = completion.versions[-1]
    own = reference_logprobs(model, prompt, completion.token_ids, sampling)[span.start : span.end]
    np.testing.assert_allclose(completion.logprobs[span.start : span.end], own, atol=1e-4)
    await check_score(engine, model)


async def check_update_that_keeps_the_cache(engine, model, directory: Path) -> None:
    """Tokens after the update: new weights over old keys and values, those of the token fed last excepted. A newcomer with the same prompt
    gets none of these."""
    import copy

    old, started = copy.deepcopy(model), engine.version
    version = started + 1
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight"):
        perturb(model, name)
    path = export(model, directory / f"v{version}", version)
    (prompt,) = prompts(1, length=70)
    sampling = Sampling(temperature=0.8)
    task = asyncio.create_task(engine.complete(prompt, sampling=sampling, max_tokens=300, session="kept"))
    while (await engine.stats())["running"] < 1:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    await engine.load_weights(path, version)
    completion = await task
    assert [span.version for span in completion.versions] == [started, version], "it ran while the weights changed"
    changed = completion.versions[0].end
    np.testing.assert_allclose(
        completion.logprobs[:changed], reference_logprobs(old, prompt, completion.token_ids, sampling)[:changed], atol=1e-4
    )
    mixed = mixed_logprobs(old, model, [*prompt, *completion.token_ids], len(prompt) + changed, sampling)
    np.testing.assert_allclose(completion.logprobs[changed:], mixed, atol=1e-4)
    exact = reference_logprobs(model, prompt, completion.token_ids, sampling)[changed:]
    assert np.abs(np.subtract(mixed, exact)).max() > 1e-3, "the old keys and values make a difference"
    newcomer = await engine.complete(prompt, sampling=sampling, max_tokens=20, session="new")
    np.testing.assert_allclose(newcomer.logprobs, reference_logprobs(model, prompt, newcomer.token_ids, sampling), atol=1e-4)
    await check_score(engine, model)


@torch.inference_mode()
def mixed_logprobs(old, new, ids, first, sampling) -> list[float]:
    """Of the tokens from `first` on: `new` goes on from the keys and values that `old` has of all but the token before."""
    cache = old(input_ids=torch.tensor([ids[: first - 1]]), use_cache=True).past_key_values
    logits = new(input_ids=torch.tensor([ids[first - 1 :]]), past_key_values=cache).logits[0].float()
    scores = [processed_logits(logits[i], ids[: first + i], sampling).log_softmax(-1)[token] for i, token in enumerate(ids[first:])]
    return [float(score) for score in scores]


async def check_refuses_a_corrupt_export(engine, model, directory: Path) -> None:
    """By name, before anything is loaded: the engine goes on with what it had."""
    version = engine.version + 1
    path = export(model, directory / "corrupt", version)
    file = path / "layer_1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"layer_1\.safetensors: xxh3"):
        await engine.load_weights(path, version)
    with pytest.raises(DataError, match="version"):
        await engine.load_weights(export(model, directory / "other", version), version + 1)
    with pytest.raises(DataError, match=r"manifest\.json"):
        await engine.load_weights(directory / "missing", version)
    assert engine.version == version - 1
    assert engine.broken is None
    await check_score(engine, model)


async def check_a_direct_update(engine, model) -> None:
    """Tensors themselves, in parts, and then the sender's checksums: the engine scores as the model does."""
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        perturb(model, name)
    sums = await send_directly(engine, dict(model.named_parameters()))
    await engine.finish_update(engine.version + 1, sums)
    await check_score(engine, model)


async def check_breaks_on_corrupt_bytes(engine, model) -> None:
    """One bit of one tensor fell over on its way, too small for the canary: the update fails by the tensor's name."""
    name, version = "model.layers.1.mlp.up_proj.weight", engine.version
    sums = await send_directly(engine, dict(model.named_parameters()), corrupt=name)
    with pytest.raises(EngineFault, match=f"{name} must have the checksum of what was sent"):
        await engine.finish_update(version + 1, sums)
    assert engine.broken
    assert engine.version == version
    with pytest.raises(EngineFault):
        await engine.complete([5, 6], sampling=Sampling(), max_tokens=3, session="x")


async def send_directly(engine, tensors, *, corrupt: str = "") -> dict[str, int]:
    await engine.begin_update()
    names = list(tensors)
    for part in (names[:3], names[3:]):
        arrived = {name: tensors[name].clone() for name in part}
        if corrupt in arrived:
            arrived[corrupt].view(torch.int32)[0, 0] ^= 1  # the last bit of a mantissa
        await engine.receive_weights({"tensors": arrived})
    return numbers({name: checksum(tensor) for name, tensor in tensors.items()})


async def check_cancel_frees_the_request(engine) -> None:
    task = asyncio.create_task(engine.complete([5] * 10, sampling=Sampling(seed=3), max_tokens=450, session="c"))
    while (await engine.stats())["running"] < 1:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(engine)


async def check_breaks_for_good(engine, model, directory: Path) -> None:
    """An update that fails half-way: its caller, the running requests and all later ones get EngineFault, nobody gets tokens."""
    version = engine.version + 1
    path = export(model, directory / "partial", version)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["file"] != "layer_1.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    running = asyncio.create_task(engine.complete([5] * 10, sampling=Sampling(temperature=0.9), max_tokens=450, session="r"))
    while (await engine.stats())["running"] < 1:
        await asyncio.sleep(0.001)
    with pytest.raises(EngineFault, match="failed"):
        await engine.load_weights(path, version)
    assert engine.broken
    with pytest.raises(EngineFault):
        await asyncio.wait_for(running, 20)
    for call in (
        engine.complete([5, 6], sampling=Sampling(), max_tokens=3, session="x"),
        engine.score([[3, 4, 5]]),
        engine.load_weights(path, version),
        engine.stats(),
    ):
        with pytest.raises(EngineFault):
            await call
