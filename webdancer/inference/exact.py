"""A small deterministic engine on transformers: the same interface as `VllmEngine`, for tests.

Requests take turns on the event loop, one token each, and share nothing: what a request samples depends on its prompt, its sampling
parameters, the weights and its seed, never on what else is running. Without a seed of its own, a request's seed comes from its session's
name and its number within the session.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from webdancer.errors import EngineFault
from webdancer.inference.checksum import check, checksum, numbers
from webdancer.inference.manifest import read_manifest, read_verified
from webdancer.interfaces import OnTokens, Tokenizer
from webdancer.types import Completion, FinishReason, Sampling, VersionSpan


@dataclass
class _Request:
    """A generation under way. `cache` holds keys and values of the tokens fed so far, all of them computed by `cache_version`."""

    prompt: list[int]
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    cache: Any = None
    cache_version: int = -1
    sleeps: int = 0


class ExactEngine:
    """See `VllmEngine` for the contract of every method."""

    def __init__(
        self,
        model_path: str,
        tokenizer: Tokenizer,
        *,
        dtype: str = "float32",
        max_model_len: int,
        seed: int = 0,
        version: int = 0,
        keeps_cache: bool = False,
    ) -> None:
        """`keeps_cache`: a weight update leaves keys and values as they are (engine.kv_cache_on_update: keep)."""
        self._model_path = model_path
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._seed = seed
        self._keeps_cache = keeps_cache
        self._session_requests: Counter[str] = Counter()
        self._running = 0
        self._moving = asyncio.Event()
        self._moving.set()
        self._update_began = 0.0
        self._sleeps = 0
        self._received: set[str] = set()
        self._sums: dict[str, torch.Tensor] = {}
        self._counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self._model: Any = None
        self.version = version
        self.broken: str | None = None

    async def start(self) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self._model_path, dtype=getattr(torch, self._dtype))
        self._model = model.eval().requires_grad_(False)

    async def complete(self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str) -> Completion:
        return await self.stream(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=session, on_tokens=lambda token_ids: None)

    async def stream(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str, on_tokens: OnTokens
    ) -> Completion:
        if not 0 < len(prompt_ids) < self._max_model_len:
            raise ValueError(f"prompt_ids: must be 1 to {self._max_model_len - 1} tokens, got {len(prompt_ids)}")
        budget = min(max_tokens, self._max_model_len - len(prompt_ids))
        request = _Request(prompt=list(prompt_ids), generator=self._generator(sampling, session))
        self._running += 1
        try:
            finish: FinishReason = "length"
            for _ in range(budget):
                await self._moving.wait()
                self._sample(request, sampling)
                on_tokens(request.token_ids[-1:])
                await asyncio.sleep(0)
                if request.token_ids[-1] == self._tokenizer.eos_id:
                    finish = "stop"
                    break
        finally:
            self._running -= 1
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(request.prompt)
        self._counts["generated_tokens"] += len(request.token_ids)
        return Completion(
            token_ids=tuple(request.token_ids),
            text=self._tokenizer.decode(request.token_ids),
            logprobs=tuple(request.logprobs),
            finish=finish,
            versions=_spans(request.versions),
        )

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        await self._moving.wait()
        model = self._ready()
        return [token_logprobs(model, ids) for ids in sequences]

    async def load_weights(self, manifest_path: Path | str, version: int) -> Mapping[str, float]:
        self._ready()
        began = time.perf_counter()
        manifest = read_verified(manifest_path, version)
        verify_s = time.perf_counter() - began
        await self.begin_update()
        await self.receive_weights({"path": str(manifest_path)})
        return {"verify_s": verify_s, "bytes": float(manifest.num_bytes), **await self.finish_update(version)}

    async def connect_weights(self, init_info: Mapping[str, Any]) -> None:
        self._ready()

    async def sleep(self) -> Mapping[str, float]:
        """Weights are forgotten for good: nothing may be computed before new ones have come."""
        model = self._ready()
        self._moving.clear()
        self._sleeps += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        return {}

    async def begin_update(self) -> None:
        self._ready()
        self._moving.clear()
        self._update_began = time.perf_counter()
        self._received = set()
        self._sums = {}

    async def receive_weights(self, update_info: Mapping[str, Any]) -> None:
        """The path of an export, or tensors by name."""
        model = self._ready()
        with self._or_broken():
            if "path" in update_info:
                for file in read_manifest(update_info["path"]).files:
                    self._received |= _load(model, load_file(file.path))
            else:
                self._sums |= {name: checksum(tensor) for name, tensor in update_info["tensors"].items()}
                self._received |= _load(model, update_info["tensors"])

    async def finish_update(self, version: int, checksums: Mapping[str, int] | None = None) -> Mapping[str, float]:
        model = self._ready()
        with self._or_broken():
            if checksums is not None:
                check(checksums, numbers(self._sums))
            if missing := {name for name, _ in model.named_parameters()} - self._received:
                raise ValueError(f"the update must hold all of the model's parameters, got none for {sorted(missing)[:3]}")
        self.version = version
        self._moving.set()
        seconds = time.perf_counter() - self._update_began
        return {"pause_s": seconds, "load_s": seconds}

    @contextmanager
    def _or_broken(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as with vLLM: whatever it was, the weights may be a mixture now
            self.broken = f"the update after version {self.version} failed: {type(error).__name__}: {error}"
            self._moving.set()  # who runs finds the engine broken
            raise EngineFault(self.broken) from error

    async def stats(self) -> Mapping[str, float]:
        self._ready()
        state = {"running": float(self._running), "waiting": 0.0, "kv_usage": 0.0, "preemptions": 0.0, "prefix_hit_rate": 0.0}
        return {**state, **{name: float(count) for name, count in self._counts.items()}}

    async def stop(self) -> None:
        self._model = None

    def _ready(self) -> Any:
        if self.broken is not None:
            raise EngineFault(self.broken)
        if self._model is None:
            raise EngineFault("the engine is not running")
        return self._model

    def _generator(self, sampling: Sampling, session: str) -> torch.Generator:
        name = f"{self._seed}/{session}/{self._session_requests[session]}"
        self._session_requests[session] += 1
        derived = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(derived if sampling.seed is None else sampling.seed)

    @torch.inference_mode()
    def _sample(self, request: _Request, sampling: Sampling) -> None:
        """Append one token. After an update everything is fed again, so that no key or value of the old weights is left, unless kept."""
        model = self._ready()
        ids = request.prompt + request.token_ids
        stale = request.cache_version != self.version and not self._keeps_cache
        if request.cache is None or stale or request.sleeps != self._sleeps:
            request.cache, request.cache_version, request.sleeps, fed = None, self.version, self._sleeps, ids
        else:
            fed = ids[-1:]
        output = model(input_ids=torch.tensor([fed]), past_key_values=request.cache, use_cache=True, logits_to_keep=1)
        request.cache = output.past_key_values
        logits_V = processed_logits(output.logits[0, -1].float(), ids, sampling)
        logprobs_V = logits_V.log_softmax(-1)
        greedy = sampling.temperature == 0.0
        token = int(logits_V.argmax() if greedy else torch.multinomial(logprobs_V.exp(), 1, generator=request.generator))
        request.token_ids.append(token)
        request.logprobs.append(float(logprobs_V[token]))
        request.versions.append(self.version)


def processed_logits(logits_V: torch.Tensor, token_ids: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Repetition penalty, temperature (0: as 1), top-k, top-p, in vLLM's order; what was cut is -inf."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(token_ids)))
        penalty = torch.where(logits_V[seen] > 0, 1.0 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits_V = logits_V.index_copy(0, seen, logits_V[seen] * penalty)
    if sampling.temperature > 0.0:
        logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1.0:
        descending, order = logits_V.softmax(-1).sort(descending=True)
        outside = order[descending.cumsum(-1) - descending >= sampling.top_p]
        logits_V = logits_V.index_fill(0, outside, -torch.inf)
    return logits_V


@torch.inference_mode()
def token_logprobs(model: Any, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Log-probability of every token given those before it, [T - 1] float32, from one forward pass of a transformers model."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    logprobs_TV = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    scores: NDArray[np.float32] = logprobs_TV.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()
    return scores


def _load(model: Any, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The names that were loaded."""
    wanted = dict(model.named_parameters())  # without the head when it is tied
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in wanted or tensor.shape != wanted[name].shape:
                shape = tuple(wanted[name].shape) if name in wanted else "no shape: the model has no such parameter"
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
            wanted[name].copy_(tensor)
    return set(tensors)


def _spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    starts = [index for index in range(len(versions)) if index == 0 or versions[index] != versions[index - 1]]
    ends = [*starts[1:], len(versions)]
    return tuple(VersionSpan(version=versions[start], start=start, end=end) for start, end in zip(starts, ends, strict=True))
