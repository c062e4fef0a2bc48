"""Requests over connections whose peer address was checked. The only module that imports httpx and httpcore.

Two pools: the guarded one resolves a host once, checks every address and connects to a checked one (no second look-up that could answer
differently); the trusted one is only ever given allowed origins. No proxy, no cookies, no credentials from the environment, no redirects.
Plain httpx, not its successor httpx2: callers may hand in an httpx transport, and the two libraries' exceptions are unrelated classes.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import isawaitable
from ipaddress import ip_address
from ssl import SSLCertVerificationError, SSLContext
from typing import Any

import httpcore
import httpx

from webdancer.errors import WebDancerError
from webdancer.tools.address import IPAddress, is_public
from webdancer.tools.gate import BlockedUrl, Target

Resolve = Callable[[str], Iterable[str] | Awaitable[Iterable[str]]]
"""Host name -> addresses; raises OSError or LookupError for a name that does not exist."""

Transport = httpx.AsyncBaseTransport

# httpcore's pool looks at every idle connection and every waiting request each time: both are kept few, and waiting is done outside.
_MAX_CONNECTIONS = {True: 32, False: 128}  # to the allowed origins, to everywhere else
_MAX_IDLE = 32
_MAX_LOOKUPS = 128
_FAILED_S = 10.0  # a name that failed is not looked up again
_MAX_FAILED = 10_000
_CONNECT_S = 5.0  # to one address; then the next of the host is tried
_KEEPALIVE_S = 4.0  # below the 5 s after which many servers hang up
_TIMEOUTS = (TimeoutError, httpx.TimeoutException, httpcore.TimeoutException)
_FAILURES = (OSError, httpx.HTTPError, httpx.InvalidURL, httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol)
_STALE = (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError)


class FetchFailed(WebDancerError):
    """The request was allowed but no whole response came: refused, reset, broken protocol or encoding."""


class Unreadable(FetchFailed):
    """The server is there, and what it says cannot be read however often it is asked: its certificate, its encoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A response whose body is still to be read: raw chunks, not decoded."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class _Names:
    """The system's resolver, in threads of its own: a name whose servers are dead holds one for 10 s or more, after everybody who asked for
    it has given up. Who asks for a name that is being looked up waits for the same answer."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MAX_LOOKUPS, thread_name_prefix="names")
        self._under_way: dict[str, Future[list[str]]] = {}
        self._failed: dict[str, float] = {}

    async def look_up(self, host: str) -> list[str]:
        if time.monotonic() < self._failed.get(host, 0.0):
            raise OSError(f"{host} could not be resolved a moment ago")
        found = self._under_way.get(host)
        if found is None:
            found = self._under_way[host] = self._threads.submit(_addresses, host)
            found.add_done_callback(partial(self._note, host))
        answer = asyncio.wrap_future(found)
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # read here, or asyncio complains where nobody waits
        return await asyncio.shield(answer)

    def _note(self, host: str, found: Future[list[str]]) -> None:
        """In the thread that looked it up."""
        self._under_way.pop(host, None)
        if found.exception() is not None:
            if len(self._failed) >= _MAX_FAILED:
                self._failed.clear()
            self._failed[host] = time.monotonic() + _FAILED_S


_NAMES = _Names()


async def resolve_name(host: str) -> list[str]:
    """The system resolver."""
    return await _NAMES.look_up(host)


def _addresses(host: str) -> list[str]:
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


async def checked_addresses(resolve: Resolve, host: str) -> list[IPAddress]:
    """All addresses of a host, IPv4 first; raises BlockedUrl if there is none or any is not public."""
    try:
        answer = resolve(host)
        texts = await answer if isawaitable(answer) else answer
        addresses = [ip_address(text) for text in ([texts] if isinstance(texts, str) else texts)]
    except TimeoutError:
        raise
    except (OSError, LookupError, ValueError) as error:
        raise BlockedUrl("dns_failure", f"{host} could not be resolved") from error
    if not addresses:
        raise BlockedUrl("dns_failure", f"{host} has no address")
    if not all(is_public(address) for address in addresses):
        raise BlockedUrl("private_address", f"{host} resolves to an address that is not public")
    return sorted(addresses, key=lambda address: address.version)


async def check_host(target: Target, *, timeout_s: float) -> None:
    """The addresses that a name has now, for a request that somebody else makes. Raises BlockedUrl."""
    if target.trusted or target.address is not None:
        return
    try:
        async with asyncio.timeout(timeout_s):
            await checked_addresses(resolve_name, target.host)
    except TimeoutError:
        raise BlockedUrl("timeout", f"{target.host} could not be resolved within {timeout_s:g} s") from None


class Network:
    """Connection pools of one Fetcher; bound to the event loop of its first request.

    With a `transport` nothing is opened here, but a name's addresses are still checked before the transport sees the request.
    """

    def __init__(self, *, resolve: Resolve, transport: Transport | None) -> None:
        self._resolve = resolve
        self._transport = transport
        self._pools: dict[bool, httpcore.AsyncConnectionPool] = {}
        self._places = {trusted: asyncio.Semaphore(places) for trusted, places in _MAX_CONNECTIONS.items()}

    @asynccontextmanager
    async def exchange(
        self, method: str, target: Target, *, headers: Mapping[str, str], content: bytes | None = None
    ) -> AsyncIterator[Exchange]:
        """One request, no redirects. Raises BlockedUrl (addresses, `timeout`) or FetchFailed, also while the body is read."""
        request = httpx.Request(method, target.url, headers=dict(headers), content=content)
        async with self._places[target.trusted]:
            stream: Any = None
            try:
                response = await self._send(request, target)
                stream = response.stream
                status = response.status_code if isinstance(response, httpx.Response) else response.status
                yield Exchange(status=status, headers=httpx.Headers(response.headers), chunks=_chunks(stream))
            except _TIMEOUTS as error:
                raise BlockedUrl("timeout", f"{target.host} took too long") from error
            except _FAILURES as error:
                kind = Unreadable if _is_certificate(error) else FetchFailed
                raise kind(f"{target.host}: {type(error).__name__} {error}".strip()) from error
            finally:
                if hasattr(stream, "aclose"):
                    await stream.aclose()

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()
        self._pools.clear()
        if self._transport is not None:
            await self._transport.aclose()

    async def _send(self, request: httpx.Request, target: Target) -> httpx.Response | httpcore.Response:
        if self._transport is not None:
            if not target.trusted and target.address is None:
                await checked_addresses(self._resolve, target.host)
            return await self._transport.handle_async_request(request)
        pool, fresh = self._pool(target.trusted), False

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            nonlocal fresh
            fresh = fresh or event == "connection.connect_tcp.started"

        try:
            return await pool.handle_async_request(_core_request(request, trace))
        except _STALE:
            if request.method != "GET" or fresh:
                raise
            # The server closed a kept-alive connection just as it was picked: it has not seen this request.
            return await pool.handle_async_request(_core_request(request, trace))

    def _pool(self, trusted: bool) -> httpcore.AsyncConnectionPool:
        if trusted not in self._pools:
            self._pools[trusted] = httpcore.AsyncConnectionPool(
                ssl_context=_ssl_context(),
                max_connections=_MAX_CONNECTIONS[trusted],
                max_keepalive_connections=_MAX_IDLE,
                keepalive_expiry=_KEEPALIVE_S,
                network_backend=httpcore.AnyIOBackend() if trusted else _GuardedBackend(self._resolve),
            )
        return self._pools[trusted]


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves, checks and connects in one place. TLS still sees the host name: only the TCP peer is replaced."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception | None = None
        for address in await self._addresses(host):
            try:
                return await self._inner.connect_tcp(str(address), port, timeout or _CONNECT_S, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise BlockedUrl("scheme", "unix sockets are never opened")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str) -> list[IPAddress]:
        try:
            literal = ip_address(host.strip("[]"))
        except ValueError:
            return await checked_addresses(self._resolve, host)
        if not is_public(literal):
            raise BlockedUrl("private_address", f"{host} is not a public address")
        return [literal]


async def _chunks(stream: Any) -> AsyncIterator[bytes]:
    if hasattr(stream, "__aiter__"):
        async for chunk in stream:
            yield chunk
    else:
        for chunk in stream:
            yield chunk


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _core_request(request: httpx.Request, trace: Callable[[str, Mapping[str, Any]], Awaitable[None]]) -> httpcore.Request:
    url = request.url
    return httpcore.Request(
        method=request.method,
        url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions={"trace": trace},
    )


@lru_cache(maxsize=1)
def _ssl_context() -> SSLContext:
    return httpx.create_ssl_context(trust_env=False)
