"""A chat model behind any OpenAI-compatible endpoint, for the programs that make data: questions, rewrites, trajectories, checks.

Failures that may pass (no connection, time-outs, 408, 425, 429, 5xx, a reply that is no chat completion) are tried again with full
jitter; a Retry-After holds back every request, not only the one that met it. What does not pass ends the program with one line
(ServiceError), and the same command goes on later: every answer is in the log. Only an endpoint's refusal of one request (400, 413, 422:
too long, content filter) is that request's own failure.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from webdancer.config import LlmConfig
from webdancer.errors import ServiceError
from webdancer.llm.answers import AnswerLog, request_key
from webdancer.tools import keys
from webdancer.tools.completion import ChatAnswer, read_completion
from webdancer.tools.fetch import BlockedUrl, Fetcher, FetchFailed, FetchPolicy, OpenFetcher, Page
from webdancer.tools.limits import Schedule, wait_for
from webdancer.tools.polite import PASSING, retry_after_s

Message = Mapping[str, str]
T = TypeVar("T")

_REFUSED = frozenset({400, 413, 422})
_ILL_FORMED = ("content_type", "body_too_large")  # of a reply that did come: a proxy's, perhaps, and gone next time
_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 30.0
_MAX_RETRY_AFTER_S = 600.0


class ChatRefused(Exception):
    """The endpoint answers, and not this request. Nothing that asking again could change."""


class NoUsableReply(Exception):
    """The model answered as often as it was asked, and never in the form that it was asked for."""


@dataclass(slots=True)
class Usage:
    """What the answers cost, over all starts of the job (`answers` and after), and what this start saw."""

    requests: int = 0
    """Sent by this start, repetitions included."""
    repeated: int = 0
    """Of them, those sent again after a failure."""
    refused: int = 0
    malformed: int = 0
    """Replies of this start that were not in the form that was asked for, whether another one was in the end or not."""
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


class ChatModel:
    """Asks one model; use it from one event loop and close it. At most `max_concurrent` requests are in flight."""

    def __init__(
        self, config: LlmConfig, *, log: AnswerLog | None = None, open_fetcher: OpenFetcher = Fetcher, variable: str = keys.LLM
    ) -> None:
        """log: where answers are kept, if anywhere; closed with the model. variable: of the environment, with the endpoint's key."""
        origin = "/".join(config.base_url.split("/")[:3])
        policy = FetchPolicy(allowed_origins=(origin,), allowed_ports=(), max_redirects=0, timeout_s=config.timeout_s, max_bytes=20_000_000)
        self.usage = Usage()
        self._config = config
        self._log = log
        self._fetcher = open_fetcher(policy)
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._key = keys.optional_key(variable)
        self._places = asyncio.Semaphore(config.max_concurrent)
        self._pace = Schedule(0.0)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        for answer in log.answers() if log else ():
            self._bill(answer)

    async def chat(
        self, messages: Sequence[Message], *, temperature: float, max_tokens: int, stop: Sequence[str] = (), sample: int = 0
    ) -> ChatAnswer:
        """The answer, from the log where this was asked before. `sample`: another number is another answer to the same request.

        Raises ChatRefused for this request, ServiceError for an endpoint that is down, refuses the key or has cost `budget_usd`.
        """
        payload: dict[str, Any] = {
            "model": self._config.model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if stop:
            payload["stop"] = list(stop)
        request = request_key(payload, sample)
        # Two answers to one request would leave it to chance which of them a resumed job finds in the log.
        async with self._locks.setdefault(request, asyncio.Lock()):
            known = self._log.get(request) if self._log else None
            return known or await self._asked(request, payload)

    async def chat_json(
        self,
        messages: Sequence[Message],
        parse: Callable[[Mapping[str, Any]], T],
        *,
        temperature: float,
        max_tokens: int,
        attempts: int = 3,
        sample: int = 0,
    ) -> T:
        """`parse` of the JSON object in the reply; it raises ValueError, KeyError or TypeError for one of another form.

        A reply that is no such object, or was cut, is counted and asked for again, warmer where the first was asked for at 0. Raises
        NoUsableReply after so many attempts, and what `chat` raises.
        """
        wrong = ""
        for attempt in range(attempts):
            warmth = temperature if attempt == 0 else max(temperature, 0.7)  # at 0 it would only say the same again
            answer = await self.chat(messages, temperature=warmth, max_tokens=max_tokens, sample=sample * attempts + attempt)
            try:
                if answer.finish == "length":  # what is whole in it may be a draft
                    raise ValueError("the reply was cut")
                return parse(json_object(answer.text))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.usage.malformed += 1
                wrong = f"{type(error).__name__}: {error}"
        raise NoUsableReply(f"no reply of {attempts} was what was asked for ({wrong[:200]})")

    async def aclose(self) -> None:
        await self._fetcher.aclose()
        if self._log:
            self._log.close()

    async def _asked(self, request: str, payload: Mapping[str, Any]) -> ChatAnswer:
        async with self._places:
            if 0 < self._config.budget_usd <= self.usage.usd:
                raise ServiceError(f"budget_usd: must pay for the whole job, got {self._config.budget_usd:g}, which is spent")
            answer = await self._persistently(payload)
        if self._log:
            self._log.add(request, answer)
        self._bill(answer)
        return answer

    async def _persistently(self, payload: Mapping[str, Any]) -> ChatAnswer:
        failure = ""
        for attempt in range(self._config.max_attempts):
            await wait_for(self._pace, patience_s=float("inf"))
            self.usage.requests += 1
            self.usage.repeated += attempt > 0
            asked_for_s = 0.0
            try:
                page = await self._post(payload)
                if page.ok:
                    return _read(page)
                failure = f"status {page.status}"
                asked_for_s = min(retry_after_s(page.retry_after), _MAX_RETRY_AFTER_S)
            except _Passing as error:
                failure = str(error)
            if asked_for_s:
                self._pace.pause(asyncio.get_running_loop().time() + asked_for_s)
            elif attempt + 1 < self._config.max_attempts:
                await asyncio.sleep(random.uniform(0, min(_MAX_BACKOFF_S, _BACKOFF_S * 2**attempt)))
        raise ServiceError(f"base_url: must be an endpoint that answers, got {failure} from {self._where()}, {attempt + 1} times")

    async def _post(self, payload: Mapping[str, Any]) -> Page:
        """The reply, good or passing; everything else is raised."""
        headers = {"Authorization": f"Bearer {self._key.reveal()}"} if self._key else {}
        try:
            page = await self._fetcher.post_json(self._url, payload, headers=headers)
        except FetchFailed as error:
            raise _Passing(str(error)) from error
        except BlockedUrl as error:
            if error.code in ("timeout", "dns_failure", *_ILL_FORMED):
                raise _Passing(str(error)) from error
            raise ServiceError(f"base_url: must be the URL of an endpoint, got {self._where()}: {error}") from error
        if page.ok or page.status in PASSING:
            return page
        said = keys.redacted(page.text)[:200]
        if page.status in _REFUSED:
            self.usage.refused += 1
            raise ChatRefused(f"status {page.status}: {said}")
        raise ServiceError(f"base_url: must be an endpoint that answers, got status {page.status} from {self._where()}: {said}")

    def _bill(self, answer: ChatAnswer) -> None:
        usage, config = self.usage, self._config
        usage.answers += 1
        usage.prompt_tokens += answer.prompt_tokens
        usage.completion_tokens += answer.completion_tokens
        price = answer.prompt_tokens * config.usd_per_million_prompt + answer.completion_tokens * config.usd_per_million_completion
        usage.usd += price / 1e6

    def _where(self) -> str:
        return f"{self._config.base_url} ({self._config.model})"


class _Passing(Exception):
    """May pass if asked again."""


def _read(page: Page) -> ChatAnswer:
    try:
        return read_completion(json.loads(keys.redacted(page.text)))
    except (ValueError, RecursionError) as error:
        raise _Passing(str(error)) from error


def json_object(reply: str) -> Mapping[str, Any]:
    """The JSON object of a reply: all of it, else from the first `{` to the last `}`. Raises ValueError."""
    for text in (reply, reply[reply.find("{") : reply.rfind("}") + 1]):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise ValueError("the reply holds no JSON object")
