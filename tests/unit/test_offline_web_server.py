"""The server over real sockets: Search-R1's and ASearcher's forms, errors that say what is wrong, and a child that surely ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from webdancer.errors import ServiceError
from webdancer.offline_web.encyclopedia import Encyclopedia
from webdancer.offline_web.server import running_server
from webdancer.offline_web.site import FolderSite
from webdancer.tools import keys

SMALL = {"seed": 6, "num_entities": 290}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def origin():
    with running_server(**SMALL) as origin:
        yield origin


@pytest.fixture(scope="module")
def person():
    return Encyclopedia.generate(**SMALL).of("train", "person")[0]


def get(url):
    try:
        with OPENER.open(url, timeout=10) as response:
            return response.status, response.headers["content-type"], response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read().decode()


def post(url, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with OPENER.open(urllib.request.Request(url, data=data), timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_pages_health_and_robots(origin, person):
    status, content_type, page = get(origin + person.url)
    assert (status, content_type) == (200, "text/html; charset=utf-8")
    assert f"<h1>{person.title}</h1>" in page
    assert json.loads(get(origin + "/health")[2]) == {"status": "ok", "documents": len(Encyclopedia.generate(**SMALL).entities)}
    assert get(origin + "/robots.txt")[2] == "User-agent: *\nAllow: /\n"
    assert get(origin + "/wiki/No_Body")[0] == 404


def test_retrieve_in_search_r1s_form(origin, person):
    body = {"queries": [person.title, "zzz", ""], "topk": 2, "return_scores": True}
    status, answer = post(origin + "/retrieve", body)
    assert status == 200
    first, none, empty = answer["result"]
    assert (none, empty) == ([], [])
    assert len(first) == 2
    document = first[0]["document"]
    assert set(document) == {"id", "contents", "url", "title"}
    assert document["contents"] == f'"{person.title}"\n{person.text}'
    assert (document["url"], document["title"]) == (person.url, person.title)
    assert first[0]["score"] > first[1]["score"]
    bare = post(origin + "/retrieve", {"queries": [person.title], "topk": 1})[1]
    assert bare == {"result": [[document]]}
    assert len(post(origin + "/retrieve", {"queries": [person.title], "topk": None})[1]["result"][0]) == 3


def test_access_in_asearchers_form(origin, person):
    status, answer = post(origin + "/access", {"urls": [person.url, origin + person.url, "/wiki/No_Body", "http://[", ""]})
    assert status == 200
    contents = f"{person.title}\n{person.text}"
    absolute = {"url": origin + person.url, "contents": contents}
    assert answer["result"] == [{"url": person.url, "contents": contents}, absolute, None, None, None]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/retrieve", b"{", "Expecting"),
        ("/retrieve", b"\xff", "decode"),
        ("/retrieve", b"[" * 100_000, ""),
        ("/retrieve", b'"' + b"x" * 1_100_000 + b'"', "at most 1000000 bytes"),
        ("/retrieve", [], "body: must be a JSON object, got list"),
        ("/retrieve", {}, "queries: is required"),
        ("/retrieve", {"queries": "Karo"}, "queries: must be a list of strings"),
        ("/retrieve", {"queries": [1]}, "queries: must be a list of strings"),
        ("/retrieve", {"queries": ["a"] * 600}, "queries: must have at most 512 entries, got 600"),
        ("/retrieve", {"queries": ["a"], "topk": 0}, "topk: must be an integer from 1 to 100, got 0"),
        ("/retrieve", {"queries": ["a"], "topk": "3"}, "topk: must be"),
        ("/retrieve", {"queries": ["a"], "topk": True}, "topk: must be"),
        ("/retrieve", {"queries": ["a"], "return_scores": "yes"}, "return_scores: must be true or false"),
        ("/access", {"queries": ["a"]}, "urls: is required"),
    ],
)
def test_a_bad_body_is_the_callers_error_and_says_why(origin, path, body, said):
    status, answer = post(origin + path, body)
    assert status == 400
    assert said in answer["error"]


def test_many_clients_at_once(origin, person):
    def one(_):
        return post(origin + "/retrieve", {"queries": [person.title], "topk": 1})[1]["result"][0][0]["url"]

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(one, range(300))) == {person.url}


def test_a_taken_port_is_named_and_a_free_one_is_used():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"got {port}"), running_server(**SMALL, port=port):
            pass
    with running_server(**SMALL, port=port) as origin:
        assert origin == f"http://127.0.0.1:{port}"
    assert not answers(origin)


@pytest.mark.parametrize("port", [-1, 70_000])
def test_a_port_that_is_none_is_named(port):
    with pytest.raises(ServiceError, match=str(port)), running_server(**SMALL, port=port):
        pass


def test_a_child_that_cannot_start_says_why(tmp_path):
    with pytest.raises(ServiceError, match=r"must hold at least one \.html page"), running_server(directory=tmp_path):
        pass
    with pytest.raises(ServiceError, match=r"web\.num_entities"), running_server(num_entities=1):
        pass


def test_a_folder_is_served_and_searched(tmp_path):
    (tmp_path / "squid.html").write_text("<title>Squid</title><p>The squid lives in the deep sea and eats many fish there.</p>")
    with running_server(directory=tmp_path) as origin:
        assert '<a href="/squid.html">' in get(origin + "/")[2]
        assert get(origin + "/squid.html")[0] == 200
        assert post(origin + "/retrieve", {"queries": ["deep sea"], "topk": 1})[1]["result"][0][0]["url"] == "/squid.html"
        assert "deep sea" in post(origin + "/access", {"urls": ["/squid.html"]})[1]["result"][0]["contents"]


def answers(origin):
    try:
        return get(origin + "/health")[0] == 200
    except OSError:
        return False


def wait_gone(origin):
    deadline = time.monotonic() + 10
    while answers(origin):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.1)


def test_leaving_by_an_error_stops_the_child():
    with pytest.raises(RuntimeError, match="boom"), running_server(**SMALL) as origin:
        raise RuntimeError("boom")
    assert not answers(origin)


def test_the_child_ends_with_a_killed_parent():
    code = (
        "import time\nfrom webdancer.offline_web.server import running_server\n"
        "with running_server(seed=6, num_entities=290) as origin:\n    print(origin, flush=True)\n    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as parent:
        origin = parent.stdout.readline().strip()
        assert answers(origin)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_gone(origin)


def test_a_server_outlives_the_thread_that_started_it():
    with ThreadPoolExecutor(1) as pool:
        server = running_server(**SMALL)
        origin = pool.submit(server.__enter__).result()
    time.sleep(0.7)
    assert answers(origin)
    server.__exit__(None, None, None)
    assert not answers(origin)


def test_a_body_is_not_read_beyond_what_is_allowed(origin):
    """A request of a gigabyte costs a megabyte."""
    host, port = origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        chunk, said = b" " * 65_536, b""
        for _ in range(64):
            try:
                connection.sendall(chunk)
            except OSError:
                break
        said = connection.recv(1000)
    assert b"400" in said.split(b"\r\n")[0]


def test_what_is_hidden_in_a_folder_is_not_served(tmp_path):
    (tmp_path / "a.html").write_text("<p>page</p>")
    (tmp_path / ".env").write_text("SECRET=1")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    site = FolderSite(tmp_path)
    assert site.get("/a") is not None
    assert [site.get(path) for path in ("/.env", "/.git/config", "/%2eenv", "/a/../.env")] == [None] * 4


def test_the_child_has_no_keys(monkeypatch):
    monkeypatch.setenv(keys.SERPER, "canary-0123456789")
    with running_server(**SMALL):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        environments = [Path(f"/proc/{child}/environ").read_bytes() for child in children]
    assert any(b"PYTHONPATH" in environment for environment in environments)
    assert not any(b"canary-0123456789" in environment for environment in environments)
