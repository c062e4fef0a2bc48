"""The two ways of running one vLLM engine behind one small interface: on a thread of this process, or in processes of its own.

    InProcessCore   `LLMEngine` stepped by a thread. For CPU: vLLM is imported once instead of three times (a start of 12 s instead of
                    35 s), nothing is serialised between processes, and a pause is simply not stepping.
    ProcessCore     `AsyncLLM`, for GPUs: scheduling and tensor parallel workers have processes of their own.

Both take token ids and `SamplingParams` and give the finished `RequestOutput`; neither knows about policies, versions or manifests.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from webdancer.errors import EngineFault
from webdancer.interfaces import OnTokens

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreStats:
    """What vLLM's scheduler says now. `kv_usage` is a fraction of 1; `preemptions` counts since the start."""

    running: int
    waiting: int
    kv_usage: float
    preemptions: int


class Core(Protocol):
    @property
    def fault(self) -> str | None:
        """Why the engine died, if it did."""
        ...

    async def start(self) -> None: ...

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, *, salt: str = "", on_tokens: OnTokens | None = None
    ) -> RequestOutput:
        """The finished request. Keys and values are shared among requests of one `salt` only. `on_tokens` hears of all ids, for `params`
        of cumulative outputs.

        Raises EngineFault when the engine fails; a cancelled caller aborts its request.
        """
        ...

    async def pause(self, *, clear: bool) -> None:
        """Freeze the running requests between two steps ("keep"); `clear`: forget every key and value."""
        ...

    async def resume(self) -> None: ...

    async def reset_prefix_cache(self) -> None: ...

    async def sleep(self) -> None:
        """Freeze the running requests, forget weights, keys and values, and free their memory. On a CPU only the keys and values go."""
        ...

    async def wake(self, tag: str) -> None:
        """Have memory for `weights`, then for `kv_cache`, again; after both the requests may go on."""
        ...

    async def rpc(self, method: str, **kwargs: Any) -> Sequence[Any]:
        """Call a method of every vLLM worker."""
        ...

    async def set_version(self, version: str) -> None:
        """The label of the tokens sampled from now on."""
        ...

    async def stats(self) -> CoreStats: ...

    async def stop(self) -> None: ...


class InProcessCore:
    """Everything that touches the engine runs on its one thread; other threads only queue calls for it."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        self._args = args
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Used on the event loop only: requests by id, and calls that the engine's thread has not answered.
        self._waiting: dict[str, asyncio.Future[RequestOutput]] = {}
        self._listeners: dict[str, _NewTokens] = {}
        self._pending: set[asyncio.Future[Any]] = set()
        self.fault: str | None = None
        self._paused = False
        self._preemptions = 0
        self._engine: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()
        await self._call(self._build)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, *, salt: str = "", on_tokens: OnTokens | None = None
    ) -> RequestOutput:
        from vllm.inputs import tokens_input

        assert self._loop is not None
        finished: asyncio.Future[RequestOutput] = self._loop.create_future()
        self._waiting[request_id] = finished
        if on_tokens is not None:
            self._listeners[request_id] = _NewTokens(on_tokens)
        prompt = tokens_input(list(prompt_ids), cache_salt=salt or None)
        try:
            await self._call(lambda: self._engine.add_request(request_id, prompt, params))
            return await finished
        except asyncio.CancelledError:
            self._calls.put(lambda: self._engine.abort_request([request_id]))
            raise
        finally:
            self._waiting.pop(request_id, None)
            self._listeners.pop(request_id, None)

    async def pause(self, *, clear: bool) -> None:
        def freeze() -> None:
            self._paused = True
            if clear:
                self._engine.reset_prefix_cache(reset_running_requests=True)

        await self._call(freeze)

    async def resume(self) -> None:
        await self._call(lambda: setattr(self, "_paused", False))

    async def reset_prefix_cache(self) -> None:
        await self._call(lambda: self._engine.reset_prefix_cache())

    async def sleep(self) -> None:
        await self.pause(clear=True)  # vLLM's own sleep does nothing on a CPU, and says that it sleeps

    async def wake(self, tag: str) -> None: ...

    async def rpc(self, method: str, **kwargs: Any) -> Sequence[Any]:
        results: Sequence[Any] = await self._call(lambda: self._engine.collective_rpc(method, kwargs=kwargs))
        return results

    async def set_version(self, version: str) -> None:
        await self._call(lambda: self._engine.set_weight_version(version))

    async def stats(self) -> CoreStats:
        return await self._call(self._read_stats)

    async def stop(self) -> None:
        if self._thread is None:
            return
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)
        self._thread = None
        self._break("the engine was stopped")

    async def _call(self, function: Callable[[], T]) -> T:
        """Run the function on the engine's thread, between two steps."""
        if self.fault is not None:
            raise EngineFault(self.fault)
        assert self._loop is not None
        done: asyncio.Future[T] = self._loop.create_future()
        self._pending.add(done)
        done.add_done_callback(self._pending.discard)

        def run() -> None:
            try:
                result = function()
            except BaseException as error:  # handed to the caller whatever it is; the thread lives on
                self._post(_fail, done, error)
            else:
                self._post(_resolve, done, result)

        self._calls.put(run)
        return await done

    def _run(self) -> None:
        """The engine's thread: queued calls first, then one step; asleep when there is nothing to do."""
        while True:
            busy = self._engine is not None and not self._paused and self._engine.has_unfinished_requests()
            with suppress(queue.Empty):
                while True:
                    call = self._calls.get(block=not busy)
                    if call is None:
                        self._shut_down()
                        return
                    call()
                    busy = True  # look again before sleeping
            if self._engine is None or self._paused or self.fault is not None:
                continue
            try:
                outputs = self._engine.step()  # of unfinished requests only where somebody listens
            except Exception as error:  # whatever broke the engine: every request is queued again elsewhere
                self._post(self._break, f"the engine failed: {type(error).__name__}: {error}")
                self._shut_down()
                return
            if outputs:
                # The ids so far are the engine's own list, which grows with its next step: their number belongs to this one.
                self._post(self._deliver, [(output, len(output.outputs[0].token_ids)) for output in outputs])

    def _build(self) -> None:
        import torch
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps a number for every thread: give this one the process's
        config = self._args.create_engine_config(UsageContext.LLM_CLASS)
        self._engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
        self._count_preemptions()

    def _read_stats(self) -> CoreStats:
        scheduler = self._engine.engine_core.engine_core.scheduler
        running, waiting = scheduler.get_request_counts()
        usage = float(scheduler.get_kv_cache_usage())
        return CoreStats(running=running, waiting=waiting, kv_usage=usage, preemptions=self._preemptions)

    def _count_preemptions(self) -> None:
        scheduler = self._engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._preemptions += not self._paused  # a pause preempts everything on purpose
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def _shut_down(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()

    def _post(self, function: Callable[..., object], *args: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, outputs: list[tuple[RequestOutput, int]]) -> None:
        for output, num_tokens in outputs:
            if (listener := self._listeners.get(output.request_id)) is not None:
                listener.hear(output.outputs[0].token_ids[:num_tokens])
            future = self._waiting.pop(output.request_id, None) if output.finished else None
            if future is not None:
                _resolve(future, output)

    def _break(self, reason: str) -> None:
        self.fault = reason
        for future in [*self._waiting.values(), *self._pending]:
            _fail(future, EngineFault(reason))


class ProcessCore:
    """vLLM's own asynchronous engine, its core and workers in other processes."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        self._args = args
        self._engine: Any = None
        self._scheduler_stats: Any = None
        self._preemptions = 0

    @property
    def fault(self) -> str | None:
        return "the engine's process died" if self._engine is not None and self._engine.errored else None

    async def start(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        core = self

        class Recorder(StatLoggerBase):
            """Keeps the scheduler's last figures where `stats` finds them."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def log_engine_initialized(self) -> None: ...

            def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
                if scheduler_stats is not None:
                    core._scheduler_stats = scheduler_stats
                if iteration_stats is not None:
                    core._preemptions += iteration_stats.num_preempted_reqs

        # The output handler must live on this loop, so the constructor runs here and blocks it while the processes start.
        self._engine = AsyncLLM.from_engine_args(self._args, stat_loggers=[Recorder])

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, *, salt: str = "", on_tokens: OnTokens | None = None
    ) -> RequestOutput:
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        last: RequestOutput | None = None
        listener = _NewTokens(on_tokens) if on_tokens is not None else None
        try:
            prompt = tokens_input(list(prompt_ids), cache_salt=salt or None)
            async for last in self._engine.generate(prompt, params, request_id):
                if listener is not None:
                    listener.hear(last.outputs[0].token_ids)
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFault(f"the engine failed: {error}") from error
        if last is None:
            raise EngineFault(f"request {request_id} ended without an output")
        return last

    async def pause(self, *, clear: bool) -> None:
        await self._engine.pause_generation(mode="keep", clear_cache=clear)

    async def resume(self) -> None:
        await self._engine.resume_generation()

    async def reset_prefix_cache(self) -> None:
        await self._engine.reset_prefix_cache()

    async def sleep(self) -> None:
        """Level 2: the weights are not kept in the host's memory, as new ones come before anything is generated."""
        if self._args.enable_sleep_mode:
            await self._engine.sleep(level=2, mode="keep")
        else:
            await self.pause(clear=True)

    async def wake(self, tag: str) -> None:
        if self._args.enable_sleep_mode:
            await self._engine.wake_up([tag])

    async def rpc(self, method: str, **kwargs: Any) -> Sequence[Any]:
        results: Sequence[Any] = await self._engine.collective_rpc(method, kwargs=kwargs)
        return results

    async def set_version(self, version: str) -> None:
        await self._engine.update_weight_version(version)

    async def stats(self) -> CoreStats:
        now = self._scheduler_stats
        if now is None:
            return CoreStats(running=0, waiting=0, kv_usage=0.0, preemptions=0)
        return CoreStats(
            running=now.num_running_reqs, waiting=now.num_waiting_reqs, kv_usage=now.kv_cache_usage, preemptions=self._preemptions
        )

    async def stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.output_processor.propagate_error(EngineFault("the engine was stopped"))
            await asyncio.to_thread(engine.shutdown)


class _NewTokens:
    """Of outputs that hold all ids so far, those that are new."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self._on_tokens = on_tokens
        self._num_told = 0

    def hear(self, token_ids: Sequence[int]) -> None:
        if new := list(token_ids[self._num_told :]):
            self._num_told = len(token_ids)
            self._on_tokens(new)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
