"""What outlives a tool actor: kept on disk, found by the next one, and never a wrong answer from a file that is old, broken or full."""

from __future__ import annotations

import json
import sqlite3
import time

import pytest

from tests.hostile_server import hostile_server, response
from webdancer.config import SearchConfig, ToolsConfig, VisitConfig
from webdancer.errors import ConfigError
from webdancer.offline_web.index import Document, SearchIndex
from webdancer.tools.cache import Kept
from webdancer.tools.shelf import Memory, ShelfFile, Space, is_local
from webdancer.tools.toolbox import open_toolbox
from webdancer.types import ToolCall


def plain(file: ShelfFile, name: str = "texts") -> Space[str]:
    return Space(file, name, lambda text: [text], lambda row: row[0], lambda key: True)


async def test_kept_beyond_the_process_and_by_kind(tmp_path):
    path = tmp_path / "deep" / "shard-0.sqlite"
    file = ShelfFile(path)
    text = "naïve \u4f60\u597d \udc80" + "x" * 10_000
    await plain(file).put("k", Kept(text, 9e9))
    await file.aclose()
    assert path.stat().st_size < 40_000, "it is compressed"
    file = ShelfFile(path)
    assert await plain(file).get("k") == Kept(text, 9e9)
    assert await plain(file, "hits").get("k") is None
    assert await plain(file).get("K") is None
    await file.aclose()


async def test_a_file_that_is_no_database_is_begun_anew(tmp_path):
    path = tmp_path / "shard-0.sqlite"
    path.write_bytes(b"not a database, and long enough to be taken for one" * 100)
    file = ShelfFile(path)
    assert await plain(file).get("k") is None
    await plain(file).put("k", Kept("v", 9e9))
    assert await plain(file).get("k") == Kept("v", 9e9)
    await file.aclose()


async def test_what_may_pass_costs_no_cache(tmp_path, monkeypatch):
    """Days of paid results stay where they are; the run that cannot open them says so."""
    monkeypatch.setattr("webdancer.tools.shelf._PATIENCE_S", 0.01)
    path = tmp_path / "shard-0.sqlite"
    file = ShelfFile(path)
    await plain(file).put("k", Kept("v", 9e9))
    await file.aclose()
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=r"tools\.cache_dir: .* is locked"):
            ShelfFile(path)
    other.close()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"tools\.cache_dir: .*unable to open"):
        ShelfFile(tmp_path / "folder")
    file = ShelfFile(path)
    assert await plain(file).get("k") == Kept("v", 9e9)
    await file.aclose()


async def test_a_value_that_cannot_be_read_is_a_miss(tmp_path):
    path = tmp_path / "shard-0.sqlite"
    file = ShelfFile(path)
    for key in ("torn", "foreign"):
        await plain(file).put(key, Kept("v" * 100, 1.0))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE kept SET body = substr(body, 1, 12) WHERE key = 'torn'")
    assert await plain(file).get("torn") is None
    other_code = Space(file, "texts", lambda row: row, lambda row: row["text"], lambda key: True)
    assert await other_code.get("foreign") is None
    await file.aclose()


async def test_a_disk_that_fails_costs_memory_only(tmp_path):
    file = ShelfFile(tmp_path / "shard-0.sqlite")
    await plain(file).put("k", Kept("v", 9e9))
    file._db.execute("PRAGMA max_page_count = 1")
    await plain(file).put("large", Kept("\n".join(str(n) for n in range(200_000)), 1.0))
    assert await plain(file).get("large") is None
    assert await plain(file).get("k") is None, "what has failed once is left alone"
    await file.aclose()


async def test_what_is_no_directory_is_an_error_with_a_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"tools\.cache_dir"):
        ShelfFile(tmp_path / "file" / "shard-0.sqlite")


async def test_what_has_expired_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr("webdancer.tools.shelf._PUTS_BETWEEN_CLEANINGS", 10)
    file = ShelfFile(tmp_path / "shard-0.sqlite")
    for number in range(10):
        await plain(file).put(str(number), Kept("v", time.time() + (100 if number < 3 else -100)))
    (count,) = file._db.execute("SELECT count(*) FROM kept").fetchone()
    assert count == 3
    file._db.execute("UPDATE kept SET expires = 1 WHERE key != '0'")
    await file.aclose()
    file = ShelfFile(tmp_path / "shard-0.sqlite")
    assert file._db.execute("SELECT key FROM kept").fetchall() == [("0",)], "by a run of fewer puts, as it begins"
    await file.aclose()


async def test_a_server_of_this_machine_is_not_remembered_beyond_the_run(tmp_path):
    """Another one may listen on its port tomorrow, and a wrong page would be found."""
    asked = []

    async def compute():
        asked.append(1)
        return "page"

    for _ in range(2):
        file = ShelfFile(tmp_path / "shard-0.sqlite")
        cache = Memory(ToolsConfig(), file).of(
            "pages",
            provider="web",
            max_size=1000,
            size_of=len,
            encode=str,
            decode=str,
            on_shelf=lambda place: not is_local(place),
        )
        for url in ("http://127.0.0.1:8000/wiki/A", "https://site.org/A"):
            await cache.get(url, compute)
        await file.aclose()
    assert len(asked) == 3


async def test_what_is_on_this_machine_is_asked_again_by_the_next_run(tmp_path):
    """An index that was built anew, and an /access server whose port another one has by now."""
    for word in ("old", "new"):
        SearchIndex.build([Document(url="/wiki/Owl", title="Owl", text=f"The {word} owl.")], tmp_path / "web.db").close()
        access = response(json.dumps({"result": [{"url": "/wiki/Owl", "contents": f"The {word} owl."}]}), content_type="application/json")
        async with hostile_server({"/access": access}) as server:
            config = ToolsConfig(
                cache_dir=str(tmp_path / "cache"),
                search=SearchConfig(backend="index", index=str(tmp_path / "web.db")),
                visit=VisitConfig(backend="access", url=server.origin, extraction_processes=0),
            )
            async with open_toolbox(config) as toolbox:
                found = await toolbox.call(ToolCall(name="search", arguments={"query": "owl"}))
                read = await toolbox.call(ToolCall(name="visit", arguments={"url": "/wiki/Owl", "goal": "owl"}))
        assert f"The {word} owl." in found.text
        assert f"The {word} owl." in read.text
    with sqlite3.connect(tmp_path / "cache" / "shard-0.sqlite") as db:
        assert db.execute("SELECT count(*) FROM kept").fetchone() == (0,)


@pytest.mark.parametrize(
    "url", ["http://localhost:1/", "http://127.0.0.9/x", "http://[::1]:80/", "http://10.0.0.5:8000", "http://a.corp./x"]
)
def test_local(url):
    assert is_local(url)


@pytest.mark.parametrize("url", ["https://site.org/localhost", "https://93.184.216.34/", "", "http://[::1", "/wiki/A"])
def test_not_local(url):
    assert not is_local(url)
