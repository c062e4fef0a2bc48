"""The offline web over real HTTP: pages to visit, and the two endpoints that search agents are trained against.

    GET  /wiki/...    any page of the site
    POST /retrieve    {"queries": [...], "topk": 3, "return_scores": true}, as in Search-R1; each document also carries url and title
    POST /access      {"urls": [...]}, as in ASearcher: {"result": [{"url", "contents"} or null, ...]}
    GET  /health      {"status": "ok", "documents": 5800}
    GET  /robots.txt  allows everything

`serve` blocks; `running_server` runs the same in a child process, which ends with its parent. Everybody else knows only its origin.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from webdancer.errors import ServiceError, UserError
from webdancer.offline_web.index import Document, Match, SearchIndex
from webdancer.offline_web.site import StoredSite, address_forms
from webdancer.tools.keys import ALL_KEYS

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_MAX_QUERIES = 512
_MAX_TOPK = 100
_MAX_BODY_BYTES = 1_000_000


class Site(Protocol):
    """Pages and what the index says about them."""

    def documents(self) -> Iterable[Document]: ...

    def get(self, path: str) -> tuple[bytes, str] | None: ...


def build_app(site: Site | StoredSite) -> Starlette:
    """The ASGI application; where the site has no index, one is built of its documents."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    found = site.index if isinstance(site, StoredSite) else SearchIndex.build(site.documents())

    async def retrieve(request: Request) -> Response:
        return await _answer(request, lambda body: _retrieve(found, body), in_thread=not found.in_memory)

    async def access(request: Request) -> Response:
        return await _answer(request, lambda body: _access(found, body), in_thread=not found.in_memory)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "documents": len(found)})

    async def robots(request: Request) -> Response:
        return PlainTextResponse("User-agent: *\nAllow: /\n")

    async def page(request: Request) -> Response:
        path, query = request.scope["raw_path"].decode("latin-1"), request.url.query
        resource = site.get(path) or (site.get(f"{path}?{query}") if query else None)
        if resource is None:
            return PlainTextResponse(f"404: no page {request.url.path}\n", status_code=404)
        return Response(resource[0], headers={"content-type": resource[1]})

    return Starlette(
        routes=[
            Route("/retrieve", retrieve, methods=["POST"]),
            Route("/access", access, methods=["POST"]),
            Route("/health", health),
            Route("/robots.txt", robots),
            Route("/{path:path}", page),
        ]
    )


async def _answer(request: Request, handle: Callable[[dict[str, Any]], Any], *, in_thread: bool) -> Response:
    """Run an endpoint on the request's JSON body; a body that breaks its rules is the caller's error, 400."""
    from starlette.responses import JSONResponse

    try:
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > _MAX_BODY_BYTES:
                raise ValueError(f"body: must be at most {_MAX_BODY_BYTES} bytes, got more")
        body = json.loads(raw)
        if not isinstance(body, dict):
            raise ValueError(f"body: must be a JSON object, got {type(body).__name__}")
        return JSONResponse({"result": await asyncio.to_thread(handle, body) if in_thread else handle(body)})
    except (ValueError, RecursionError) as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
        return JSONResponse({"error": str(error)}, status_code=400)


def _retrieve(index: SearchIndex, body: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    queries = _strings(body, "queries")
    topk = body.get("topk", 3)
    if topk is None:  # Search-R1's clients send null for the server's default
        topk = 3
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= _MAX_TOPK:
        raise ValueError(f"topk: must be an integer from 1 to {_MAX_TOPK}, got {topk!r}")
    with_scores = body.get("return_scores", False)
    if not isinstance(with_scores, bool):
        raise ValueError(f"return_scores: must be true or false, got {with_scores!r}")
    return [[_hit(match, with_scores) for match in index.search(query, topk)] for query in queries]


def _hit(match: Match, with_score: bool) -> dict[str, Any]:
    document = {
        "id": match.id,
        "contents": f'"{match.document.title}"\n{match.document.text}',
        "url": match.document.url,
        "title": match.document.title,
    }
    return {"document": document, "score": match.score} if with_score else document


def _access(index: SearchIndex, body: Mapping[str, Any]) -> list[dict[str, str] | None]:
    """A url may be site-relative or absolute; the index knows the paths of its own site only."""
    return [_contents(index, url) for url in _strings(body, "urls")]


def _contents(index: SearchIndex, url: str) -> dict[str, str] | None:
    try:
        path = urlsplit(url).path
    except ValueError:  # a malformed address is a page that is not there
        return None
    document = next(filter(None, map(index.get, (*address_forms(url), *address_forms(path)))), None)
    return None if document is None else {"url": url, "contents": f"{document.title}\n{document.text}"}


def _strings(body: Mapping[str, Any], field: str) -> list[str]:
    if field not in body:
        raise ValueError(f"{field}: is required, got {sorted(body)}")
    values = body[field]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{field}: must be a list of strings, got {json.dumps(values)[:200]}")
    if len(values) > _MAX_QUERIES:
        raise ValueError(f"{field}: must have at most {_MAX_QUERIES} entries, got {len(values)}")
    return values


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Raises ServiceError if the port is taken."""
    _listen(host, port).close()


def serve(site: Site | StoredSite, *, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serve until a signal ends the process; prints the origin once. Raises ServiceError if the port is taken."""
    with _listen(host, port) as listening:
        print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
        _serve_on(listening, site)


def _serve_on(listening: socket.socket, site: Site | StoredSite) -> None:
    import uvicorn

    config = uvicorn.Config(build_app(site), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(512)
    except (OSError, OverflowError) as error:
        listening.close()
        raise ServiceError(f"web.port: must be a port that is free on {host}, got {port} ({error})") from error
    return listening


@contextlib.contextmanager
def running_server(
    *, seed: int = 0, num_entities: int = 5800, directory: Path | None = None, port: int = 0, timeout_s: float = 60.0
) -> Iterator[str]:
    """A server in a child process; gives its origin, `http://127.0.0.1:PORT`, once it answers.

    Serves the encyclopedia of this seed and size, or `directory`: HTML pages, or what `web build --from` made. The child is stopped on
    leaving, and ends by itself within a second if this process dies.

    Raises ServiceError if the port is taken or the child does not come up.
    """
    with _listen("127.0.0.1", port) as listening, tempfile.TemporaryFile() as stderr:
        child = _spawn(listening, stderr, seed=seed, num_entities=num_entities, directory=directory)
        origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.close()  # the child has its own copy; with ours open, connections to a dead child would hang
        try:
            _await_health(origin, child, stderr, timeout_s)
            yield origin
        finally:
            _stop(child)


def _spawn(listening: socket.socket, stderr: IO[bytes], *, seed: int, num_entities: int, directory: Path | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "webdancer.offline_web.server", "--fd", str(listening.fileno()), "--parent", str(os.getpid())]
    command += ["--seed", str(seed), "--num-entities", str(num_entities)]
    if directory is not None:
        command += ["--dir", str(directory.resolve())]
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (package_root, os.environ.get("PYTHONPATH", "")) if part)
    return subprocess.Popen(
        command,
        pass_fds=[listening.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        env={**{name: value for name, value in os.environ.items() if name not in ALL_KEYS}, "PYTHONPATH": path},  # it parses foreign pages
        start_new_session=True,  # Ctrl-C reaches this process only, which then stops the child in order
    )


def _await_health(origin: str, child: subprocess.Popen[bytes], stderr: IO[bytes], timeout_s: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy from the environment is not for this machine
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if child.poll() is not None:
            stderr.seek(0)
            last = stderr.read().decode(errors="replace").strip().rpartition("\n")[2] or "no message"
            raise ServiceError(f"web: the server must come up, but ended with code {child.returncode}: {last}")
        with contextlib.suppress(OSError), opener.open(f"{origin}/health", timeout=5) as response:
            if response.status == 200:
                return
        time.sleep(0.05)
    raise ServiceError(f"web: the server must answer {origin}/health within {timeout_s} s, got no answer")


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _end_with_parent(parent: int) -> None:
    """End this process when its parent does.

    Watching the parent's id, not PR_SET_PDEATHSIG: that signal comes already when the *thread* that started the child ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _child() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--fd", "--parent", "--seed", "--num-entities"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--dir", type=Path)
    arguments = parser.parse_args()
    _end_with_parent(arguments.parent)
    from webdancer.offline_web.site import open_site

    try:
        site = open_site(seed=arguments.seed, num_entities=arguments.num_entities, directory=arguments.dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    _serve_on(socket.socket(fileno=arguments.fd), site)
    return 0


if __name__ == "__main__":
    sys.exit(_child())
