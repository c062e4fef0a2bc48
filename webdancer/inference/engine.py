"""One vLLM engine as the policy: token ids in, token ids with processed log-probabilities and weight versions out.

A plain class; a rollout worker holds one. The same code serves a laptop (vLLM's CPU build, on a thread) and a GPU (processes).
What it does not do: routing, retries, the canary (cluster/).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import pickle
import time
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from webdancer.config import EngineConfig
from webdancer.errors import EngineFault
from webdancer.inference.manifest import read_verified
from webdancer.interfaces import OnTokens, Tokenizer
from webdancer.types import Completion, FinishReason, Sampling, VersionSpan

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

    from webdancer.inference.cores import Core

REMEMBERED_SESSIONS = 65_536
"""Far more than have keys and values left in any cache."""

_FINISH: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length", "repetition": "length"}


class VllmEngine:
    """`start` first. After `broken` is set every call raises EngineFault: the engine is to be quarantined and replaced."""

    def __init__(
        self,
        model_path: str,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        dtype: str,
        max_model_len: int,
        version: int = 0,
        in_process: bool | None = None,
        weight_backend: str = "file",
        sleeps: bool = False,
    ) -> None:
        """`version` labels the weights at `model_path`. `in_process`: see `cores`; None: on CPU, unless tensor parallel.
        `sleeps`: `sleep` will be called, for which a GPU's memory has to be taken in another way."""
        self._model_path = model_path
        self._tokenizer = tokenizer
        self._config = config
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._in_process = in_process
        self._requests = itertools.count()
        self._updating = asyncio.Lock()
        self._update_began = self._paused_at = 0.0
        self._weight_backend = weight_backend
        self._sleeps = sleeps
        self._asleep = False
        self._keeps_cache = config.kv_cache_on_update == "keep"
        self._first_versions: OrderedDict[str, int] = OrderedDict()
        self._counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self._core: Core | None = None
        self.version = version
        self.broken: str | None = None

    async def start(self) -> None:
        """Load the model and be ready to generate. Raises what vLLM raises; then nothing is left running."""
        core = await asyncio.to_thread(self._make_core)
        try:
            await core.start()
            await core.set_version(str(self.version))
        except BaseException:
            await core.stop()
            raise
        self._core = core

    async def complete(self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str) -> Completion:
        """One generation, ended by the end-of-turn token or after `max_tokens` (or at the end of the context, whichever is first).

        Raises EngineFault when the engine aborted or failed, ValueError when the prompt leaves no room.
        """
        return await self._complete(prompt_ids, sampling, max_tokens, session, None)

    async def stream(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str, on_tokens: OnTokens
    ) -> Completion:
        """`complete` that tells of the ids as they are sampled. Who is cancelled meanwhile ends the generation."""
        return await self._complete(prompt_ids, sampling, max_tokens, session, on_tokens)

    async def _complete(
        self, prompt_ids: Sequence[int], sampling: Sampling, max_tokens: int, session: str, on_tokens: OnTokens | None
    ) -> Completion:
        if not 0 < len(prompt_ids) < self._max_model_len:
            raise ValueError(f"prompt_ids: must be 1 to {self._max_model_len - 1} tokens, got {len(prompt_ids)}")
        params = _sampling_params(sampling, max_tokens, eos_id=self._tokenizer.eos_id, streams=on_tokens is not None)
        output = await self._generate(prompt_ids, params, session, salt=self._salt(session), on_tokens=on_tokens)
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(prompt_ids)
        self._counts["cached_tokens"] += output.num_cached_tokens or 0
        self._counts["generated_tokens"] += len(output.outputs[0].token_ids)
        return self._completion(output.outputs[0])

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probability of every token given those before it, at temperature 1: [T - 1] for a sequence of T >= 2 tokens."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = await asyncio.gather(*(self._generate(ids, params, "score") for ids in sequences))
        return [_prompt_logprobs(output.prompt_logprobs, ids) for output, ids in zip(outputs, sequences, strict=True)]

    async def load_weights(self, manifest_path: Path | str, version: int) -> Mapping[str, float]:
        """Take the learner's weights between two tokens of the running requests, which then go on under the new version.

        Their keys and values are computed anew from the token ids, so nothing of the old weights is left; with
        `kv_cache_on_update: keep` they stay, and the tokens that follow are of no version exactly. Returns the seconds of each part;
        requests stand still for `pause_s`. Raises errors.DataError, without having touched anything, when the export does not match
        its manifest or version; EngineFault when the update itself failed: the engine is `broken` from then on.
        """
        self._ready()
        began = time.perf_counter()
        manifest = await asyncio.to_thread(read_verified, manifest_path, version)
        verify_s = time.perf_counter() - began
        await self.begin_update()
        await self.receive_weights({"path": str(manifest_path)})
        return {"verify_s": verify_s, "bytes": float(manifest.num_bytes), **await self.finish_update(version)}

    async def connect_weights(self, init_info: Mapping[str, Any]) -> None:
        """Meet the learner's end of `nccl` or `ipc`; `init_info` is vLLM's."""
        await self._ready().rpc("init_weight_transfer_engine", init_info=dict(init_info))

    async def begin_update(self) -> None:
        """Wake up, or freeze the running requests. Weights come by `receive_weights`, in as many parts as they like, and `finish_update`
        ends it; any of the three that fails breaks the engine. An update under way is waited for."""
        await self._updating.acquire()
        self._update_began = time.perf_counter()
        async with self._or_broken():
            core = self._ready()
            if self._asleep:
                await core.wake("weights")
            else:
                await core.pause(clear=not self._keeps_cache)
            self._paused_at = time.perf_counter()
            await core.rpc("start_weight_update")

    async def receive_weights(self, update_info: Mapping[str, Any]) -> None:
        """A part of the weights: the path of an export, or what vLLM's trainer engine sends."""
        async with self._or_broken():
            await self._ready().rpc("update_weights", update_info=_plain(update_info))

    async def finish_update(self, version: int, checksums: Mapping[str, int] | None = None) -> Mapping[str, float]:
        """All weights have come, and are `version`'s: the requests go on. Seconds, see `load_weights`. `checksums`: the sender's, of what
        came directly; bytes that differ from what was sent break the engine."""
        async with self._or_broken():
            core = self._ready()
            if checksums is not None:
                await core.rpc("update_weights", update_info={"checksums": dict(checksums)})
            await core.rpc("finish_weight_update")
            await core.set_version(str(version))
            if self._asleep:
                await core.wake("kv_cache")  # vLLM then goes on by itself: everything else has to be as it should
                self._asleep = False
            if not self._keeps_cache:
                await core.reset_prefix_cache()
            self.version = version
            await core.resume()
        self._updating.release()
        ended = time.perf_counter()
        return {"pause_s": ended - self._update_began, "load_s": ended - self._paused_at}

    @asynccontextmanager
    async def _or_broken(self) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:  # whatever it was, the weights are now a mixture: nothing may be sampled from them
            self.broken = self.broken or f"the update after version {self.version} failed: {type(error).__name__}: {error}"
            self._updating.release()
            if self._core is not None:
                await self._core.stop()
            raise EngineFault(self.broken) from error

    async def sleep(self) -> Mapping[str, float]:
        """Give the GPU's memory back until the next weights come, which wake it up: weights, keys and values are forgotten, requests wait
        and go on from their token ids. On a CPU requests wait, and no memory is given back. Needs `sleeps`. Not yet run on a GPU.

        `gpu/awake_gib` and `gpu/asleep_gib`: in use on the GPU by all processes, before and after. A failure breaks the engine.
        """
        await self._updating.acquire()
        async with self._or_broken():
            core = self._ready()
            awake = await core.rpc("gpu_used_gib")
            if not self._asleep:
                await core.sleep()
                self._asleep = True
            asleep = await core.rpc("gpu_used_gib")
        self._updating.release()
        return {} if None in awake else {"gpu/awake_gib": max(awake), "gpu/asleep_gib": max(asleep)}

    async def stats(self) -> Mapping[str, float]:
        """Requests running and waiting now, KV cache usage (0 to 1), and since the start: preemptions, requests and tokens."""
        now = await self._ready().stats()
        queried = max(self._counts["prompt_tokens"], 1)
        return {
            "running": float(now.running),
            "waiting": float(now.waiting),
            "kv_usage": now.kv_usage,
            "preemptions": float(now.preemptions),
            "prefix_hit_rate": self._counts["cached_tokens"] / queried,
            **{name: float(count) for name, count in self._counts.items()},
        }

    async def stop(self) -> None:
        core, self._core = self._core, None
        if core is not None:
            await core.stop()

    def _salt(self, session: str) -> str:
        """Kept keys and values are for the sessions that were there already: newcomers do not inherit those of old weights."""
        if not self._keeps_cache:
            return ""
        first = self._first_versions.setdefault(session, self.version)
        self._first_versions.move_to_end(session)
        if len(self._first_versions) > REMEMBERED_SESSIONS:
            self._first_versions.popitem(last=False)
        return str(first)

    async def _generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, session: str, *, salt: str = "", on_tokens: OnTokens | None = None
    ) -> RequestOutput:
        core = self._ready()
        try:
            return await core.generate(prompt_ids, params, f"{session}.{next(self._requests)}", salt=salt, on_tokens=on_tokens)
        except EngineFault:
            self.broken = self.broken or core.fault
            raise

    def _ready(self) -> Core:
        if self.broken is not None:
            raise EngineFault(self.broken)
        if self._core is None:
            raise EngineFault("the engine is not running")
        return self._core

    def _completion(self, output: CompletionOutput) -> Completion:
        token_ids = tuple(output.token_ids)
        finish = _FINISH.get(output.finish_reason)
        if finish is None:
            raise EngineFault(f"the engine ended a request with {output.finish_reason!r} after {len(token_ids)} tokens")
        logprobs: Any = output.logprobs
        if logprobs is None or len(logprobs.logprobs) != len(token_ids):
            found = 0 if logprobs is None else len(logprobs.logprobs)
            raise EngineFault(f"the engine gave {found} log-probabilities for {len(token_ids)} tokens")
        spans = output.weight_versions or []
        return Completion(
            token_ids=token_ids,
            text=self._tokenizer.decode(token_ids),
            logprobs=tuple(logprobs.logprobs),
            finish=finish,
            versions=tuple(VersionSpan(version=int(span.version), start=span.start, end=span.end) for span in spans),
        )

    def _make_core(self) -> Core:
        """Imports vLLM (about 10 s), for which the environment has to be set first."""
        _set_environment(self._config, self._model_path)
        # vLLM looks at every attribute of torch.distributed when it is imported, this one included.
        warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated", category=FutureWarning)
        import torch
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.platforms import current_platform

        from webdancer.inference.cores import InProcessCore, ProcessCore

        on_cpu: bool = current_platform.is_cpu()
        alone = on_cpu and self._config.tensor_parallel_size == 1
        in_process = alone if self._in_process is None else self._in_process
        if on_cpu:
            _set_cpu_environment()
            torch.set_num_threads(self._config.threads)  # if torch was imported before OMP_NUM_THREADS was set
        args = _engine_args(self._config, self._model_path, dtype=self._dtype, max_model_len=self._max_model_len, on_cpu=on_cpu)
        args.weight_transfer_config = WeightTransferConfig(backend=f"webdancer_{self._weight_backend}")
        args.enable_sleep_mode = self._sleeps and not on_cpu
        if self._weight_backend == "ipc":
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles on GPU memory travel pickled, between this run's own processes
        return InProcessCore(args) if in_process else ProcessCore(args)


def _set_environment(config: EngineConfig, model_path: str) -> None:
    """What vLLM and OpenMP read when they are imported."""
    os.environ["OMP_NUM_THREADS"] = str(config.threads)  # Ray sets one of its own
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if Path(model_path).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _set_cpu_environment() -> None:
    import torch._dynamo.config

    # Read by vLLM's CPU platform only: 0 lets the worker share the core's process, whose threads are set by then.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # One sampling kernel would be compiled by the C++ compiler at the first request: 17 s, for no measurable gain.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True


def _engine_args(config: EngineConfig, model_path: str, *, dtype: Any, max_model_len: int, on_cpu: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    device: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if on_cpu:
        device = {
            "enforce_eager": True,
            "block_size": 32,  # the smallest: only whole blocks are found again, and the default of 128 misses most of a short turn
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        }
    return AsyncEngineArgs(
        model=model_path,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        seed=config.seed,
        tensor_parallel_size=config.tensor_parallel_size,
        skip_tokenizer_init=True,
        generation_config="vllm",  # no sampling defaults from the model's directory
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        worker_extension_cls="webdancer.inference.weight_import.WorkerExtension",
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **device,
    )


def _sampling_params(sampling: Sampling, max_tokens: int, *, eos_id: int, streams: bool) -> SamplingParams:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        max_tokens=max_tokens,
        ignore_eos=True,  # the checkpoint's own list of end tokens: only ours counts
        stop_token_ids=[eos_id],
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if streams else RequestOutputKind.FINAL_ONLY,  # either way the last one is whole
    )


def _plain(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """As it can travel to vLLM's processes: handles on GPU memory are pickled, as vLLM itself does over HTTP."""
    plain = dict(update_info)
    if plain.get("ipc_handles") is not None:
        plain["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(plain.pop("ipc_handles"))).decode()
    return plain


def _prompt_logprobs(logprobs: Any, token_ids: Sequence[int]) -> NDArray[np.float32]:
    if logprobs is None or len(logprobs.logprobs) != len(token_ids) - 1:
        raise EngineFault(f"the engine scored {0 if logprobs is None else len(logprobs.logprobs)} of {len(token_ids) - 1} tokens")
    return np.asarray(logprobs.logprobs, dtype=np.float32)
