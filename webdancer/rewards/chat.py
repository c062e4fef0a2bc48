"""How a judge asks its model: one reply to a few messages, from an OpenAI-compatible endpoint or from an engine of the cluster.

Unlike `llm.client`, which serves jobs that end when their model is gone, a failure here is one verdict's, and nothing is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from webdancer.tools import keys
from webdancer.tools.completion import read_completion

if TYPE_CHECKING:
    import httpx


class ChatFailed(Exception):
    """May pass if asked again."""


class ChatRefused(Exception):
    """Will not pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model said, and the tokens of it as the endpoint counts them (0 where it does not)."""

    text: str
    is_cut: bool = False
    """It had more to say than max_tokens."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chat(Protocol):
    """`reply` raises ChatFailed, ChatRefused, or errors.EngineFault for an engine, which counts as failed."""

    async def reply(self, messages: Sequence[dict[str, str]], *, temperature: float, max_tokens: int) -> Reply: ...

    async def aclose(self) -> None: ...


class HttpChat:
    """`base_url` is what stands before /chat/completions; the key is in WEBDANCER_JUDGE_API_KEY."""

    def __init__(self, base_url: str, model: str, *, timeout_s: float, transport: httpx.AsyncBaseTransport | None = None) -> None:
        import httpx

        key = keys.optional_key(keys.JUDGE)
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model = model
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {key.reveal()}"} if key else {},
            trust_env=False,  # neither proxies nor netrc credentials that nobody named
        )

    async def reply(self, messages: Sequence[dict[str, str]], *, temperature: float, max_tokens: int) -> Reply:
        import httpx

        request: dict[str, Any] = {"model": self._model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens}
        try:
            response = await self._client.post(self._url, json=request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatFailed(f"{type(error).__name__}: {error}") from error
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            raise ChatFailed(f"status {response.status_code}")
        if response.status_code != 200:
            raise ChatRefused(f"status {response.status_code}: {_quoted(response.text)}")
        try:
            said = read_completion(response.json())
        except (ValueError, RecursionError) as error:
            raise ChatFailed(f"the reply is not a chat completion: {_quoted(response.text)}") from error
        is_cut = said.finish == "length"
        return Reply(text=said.text, is_cut=is_cut, prompt_tokens=said.prompt_tokens, completion_tokens=said.completion_tokens)

    async def aclose(self) -> None:
        await self._client.aclose()


def _quoted(text: str) -> str:
    """Endpoints repeat the key that they refuse."""
    return keys.redacted(text)[:200]
