"""`webdancer demo`: one page that puts questions to the agent and shows its thoughts, tool calls and sources as they come.

    GET  /             the page; /demo.js, /demo.css and /about beside it
    POST /ask          {"question": "..."} -> text/event-stream: of each turn `writing` while it is written and `turn` when it is
                       finished, and one `end` (webdancer.demo.writing, .turns, .session)

Hanging up ends the episode: the cancel button, a closed tab and a lost connection are one thing.

What the agent read is hostile. The page sets text as text only, the content policy forbids inline scripts, remote loads, frames and
forms, and strings can become markup nowhere (trusted types). A page of another site can neither ask (JSON needs a preflight, which
nothing here answers; the origin is checked besides) nor reach the server under a name of its own (the host is checked).
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from importlib.resources import files
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from webdancer.demo.session import Answered, ask
from webdancer.demo.turns import ShownTurn
from webdancer.demo.writing import Writing, plain
from webdancer.errors import ServiceError, WebDancerError
from webdancer.interfaces import EpisodeRunner
from webdancer.types import Sampling

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_QUESTION_CHARS = 4_000
MAX_BODY_BYTES = 64_000

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_NAMES: Mapping[type, str] = {Writing: "writing", ShownTurn: "turn", Answered: "end"}
_PAGE = {"/": ("index.html", "text/html"), "/demo.js": ("demo.js", "text/javascript"), "/demo.css": ("demo.css", "text/css")}


def build_app(
    runner: EpisodeRunner,
    *,
    model: str,
    sampling: Sampling,
    site: str = "",
    host: str = "127.0.0.1",
    examples: Sequence[str] = (),
) -> Starlette:
    """The ASGI application.

    model: shown on the page, as `examples` of questions are. site: where site-relative sources lead. host: what it listens on.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def page(request: Request) -> Response:
        name, kind = _PAGE[request.url.path]
        content = files("webdancer.demo").joinpath("page", name).read_bytes()
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    async def about(request: Request) -> Response:
        return JSONResponse({"model": model, "examples": list(examples)}, headers=HEADERS)

    async def put_question(request: Request) -> Response:
        try:
            question = await _question(request)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400, headers=HEADERS)
        stream = _events(runner, question, sampling=sampling, site=site)
        return StreamingResponse(stream, media_type="text/event-stream", headers={**HEADERS, "X-Accel-Buffering": "no"})

    return Starlette(
        routes=[*(Route(path, page) for path in _PAGE), Route("/about", about), Route("/ask", put_question, methods=["POST"])],
        middleware=[Middleware(_OwnNamesOnly, host=host)],
    )


class _OwnNamesOnly:
    """Refuses requests to another name than this server's: a page that gives its own name this machine's address gets no answer. Listening
    everywhere, the server is localhost, the machine's names, and any address."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._everywhere = host in ("0.0.0.0", "::")
        self._names = {host, "localhost", "127.0.0.1", "::1"}
        if self._everywhere:
            self._names |= {socket.gethostname().casefold(), socket.getfqdn().casefold()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope["type"] == "http" and not self._is_own(Headers(scope=scope).get("host", "")):
            refusal = PlainTextResponse("host: must be a name of this server", status_code=400, headers=HEADERS)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._names or (self._everywhere and bool(ip_address(name)))
        except ValueError:  # neither a host nor an address
            return False


async def serve(app: Starlette, listening: socket.socket) -> None:
    """Until the task is cancelled; questions in flight end with it."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Generator[None]:
            """Ctrl-C and SIGTERM are the program's, which stops the services as well."""
            yield

    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    await Server(config).serve(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Raises ServiceError where the port is taken or the address is not this machine's. Port 0: a free one."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(64)
    except (OSError, OverflowError) as error:
        listening.close()
        raise ServiceError(f"--port: must be a port that is free on {host}, got {port} ({error})") from error
    return listening


async def _question(request: Request) -> str:
    """Raises ValueError, of one line for whoever sent it."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ValueError(f"origin: must be this page's own, got {origin[:200]!r}")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ValueError(f"content-type: must be application/json, got {request.headers.get('content-type', '')[:200]!r}")
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > MAX_BODY_BYTES:
            raise ValueError(f"body: must be at most {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(raw)
    except RecursionError as error:
        raise ValueError("body: must not be nested so deeply") from error
    question = body.get("question") if isinstance(body, dict) else None
    if not isinstance(question, str) or not question.strip() or len(question) > MAX_QUESTION_CHARS:
        got = f"{len(question)} characters" if isinstance(question, str) else type(question).__name__
        raise ValueError(f"question: must be a text of 1 to {MAX_QUESTION_CHARS} characters, got {got}")
    return question.strip()


async def _events(runner: EpisodeRunner, question: str, *, sampling: Sampling, site: str) -> AsyncIterator[str]:
    async with aclosing(ask(runner, question, sampling=sampling, site=site)) as told:
        try:
            async for one in told:
                yield _event(_NAMES[type(one)], asdict(one))
        except WebDancerError as error:  # of the services: whoever asks is told, and the next question may fare better
            yield _event("end", {"answer": None, "stop": "failed", "problem": plain(str(error)), "sources": []})


def _event(name: str, data: Mapping[str, object]) -> str:
    """JSON holds no newline, so that page text can begin no event of its own."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
