"""`web build --from`: every source becomes an index and a page store that is served; what is malformed is named, and leaves nothing."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_offline_web_server import get, post
from webdancer.cli import main
from webdancer.errors import DataError, ServiceError, UserError
from webdancer.offline_web.build import build_web
from webdancer.offline_web.index import ENGINES, SearchIndex
from webdancer.offline_web.server import running_server
from webdancer.offline_web.site import StoredSite, open_site
from webdancer.offline_web.sources import Source
from webdancer.synthesis.page import parse_page

WIKI_18 = [
    {"id": "0", "contents": '"Deep sea"\nThe squid lives in the deep sea.'},
    {"id": "1", "contents": '"Deep sea"\nIt eats many fish there.'},
    {"id": "2", "contents": '"Moss & stone"\nMoss grows on stones in the shade of trees, naïve café.'},
    {"id": "3", "contents": '"What is 100%?"\nA question about shares.'},
]
PAGES = [
    {"url": "https://example.com/a?b=1", "title": "Away", "text": "A page of another host about herons."},
    {"url": "/notes/owl", "title": "Owl", "text": "Owls hunt by night.\nThey turn.", "html": "<title>Owl</title><p>Owls <b>hunt</b></p>"},
    {"url": "/empty", "title": "Empty", "text": "  "},
]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "tantivy":
        pytest.importorskip("tantivy")
    return request.param


def found(index, query, limit=10):
    return [match.id for match in index.search(query, limit)]


def test_passages_as_in_wiki_18(tmp_path, engine):
    built = build_web(write_lines(tmp_path / "wiki.jsonl", WIKI_18), tmp_path / "web", engine=engine)
    assert (built.num_documents, built.num_without_text) == (4, 0)
    index = SearchIndex(tmp_path / "web")
    assert found(index, "squid") == ["0"]
    assert found(index, "deep sea") == ["0", "1"]
    assert found(index, "fishes in stone CAFE")[0] == "2"
    assert found(index, "?!") == found(index, "zzzz") == []
    (match, *_) = index.search("moss stone")
    assert (match.document.url, match.document.title) == ("/wiki/Moss_&_stone", "Moss & stone")
    assert match.score > 1000
    assert index.get("/wiki/Deep_sea").text == "The squid lives in the deep sea.\nIt eats many fish there."
    index.close()


def test_pages_with_and_without_html(tmp_path, engine):
    built = build_web(write_lines(tmp_path / "crawl.jsonl", PAGES), tmp_path / "web", engine=engine)
    assert (built.num_documents, built.num_without_text) == (2, 1)
    site = StoredSite(SearchIndex(tmp_path / "web"))
    assert found(site.index, "herons") == ["https://example.com/a?b=1"]
    assert site.get("/notes/owl") == (PAGES[1]["html"].encode(), "text/html; charset=utf-8")
    assert b"<p>A page of another host about herons.</p>" in site.get("/https://example.com/a?b=1")[0]
    assert site.get("/empty") is site.get("/pages/2") is site.get("/pages/0") is None
    assert parse_page(site.get("/")[0].decode(), url="/").links == ("/https://example.com/a?b=1", "/notes/owl")


def test_a_folder_of_html(tmp_path, engine):
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "squid one.html").write_bytes("<meta charset=latin-1><title>Squid</title><p>Squids é</p>".encode("latin-1"))
    (tmp_path / "src" / "sub" / "index.html").write_text("<title>Sub</title><p>Moss</p>")
    (tmp_path / "src" / "empty.html").write_bytes(b"")
    built = build_web(tmp_path / "src", tmp_path / "web", engine=engine)
    assert (built.num_documents, built.num_without_text) == (2, 1)
    site = open_site(directory=tmp_path / "web")
    assert found(site.index, "squid") == ["/squid one.html"]
    for path in ("/squid one.html", "/squid%20one.html", "/squid one", "/squid%20one"):
        assert site.get(path)[0].startswith(b"<meta charset=latin-1>")
    assert site.get("/sub") == site.get("/sub/") == site.get("/sub/index.html")


def test_a_folder_of_gzipped_parts_and_ids_beside_urls(tmp_path):
    (tmp_path / "parts").mkdir()
    same = [{"id": f"{i}", "url": "/w", "title": "W", "text": f"part{i} word"} for i in range(4)]
    for i in range(2):
        data = "\ufeff" + "\n\n".join(json.dumps(record) for record in same[2 * i : 2 * i + 2])
        (tmp_path / "parts" / f"{i}.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    build_web(tmp_path / "parts", tmp_path / "web")
    index = SearchIndex(tmp_path / "web")
    assert found(index, "part3") == ["3"]
    assert index.get("/w").text.split("\n") == [record["text"] for record in same]


def test_the_folder_that_a_crawl_leaves(tmp_path):
    (tmp_path / "crawl").mkdir()
    page = {"url": "/owl", "title": "Owl", "kind": "", "facts": {}, "links": ["/gone"], "text": "Owls hunt by night.", "depth": 0}
    write_lines(tmp_path / "crawl" / "pages.jsonl", [page])
    write_lines(tmp_path / "crawl" / "left_out.jsonl", [{"url": "/gone", "reason": "status 404"}])
    assert build_web(tmp_path / "crawl", tmp_path / "web").num_documents == 1
    assert found(SearchIndex(tmp_path / "web"), "night owls") == ["/owl"]


def test_the_same_query_gives_the_same_order_whichever_engine(tmp_path):
    pytest.importorskip("tantivy")
    passages = [{"id": str(i), "contents": f'"T{i}"\nword {"rare" if i % 7 == 0 else "common"}'} for i in range(50)]
    source = write_lines(tmp_path / "w.jsonl", passages)
    for engine in ENGINES:
        build_web(source, tmp_path / engine, engine=engine)
    expected = [str(i) for i in range(0, 50, 7)]
    assert [found(SearchIndex(tmp_path / engine), "rare") for engine in ENGINES] == [expected, expected]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "must be one JSON object"),
        (b"[1]", "must be one JSON object"),
        (b'"x"', "must be one JSON object"),
        (b'{"text": "\xff"}', "must be one JSON object"),
        (b"[" * 100_000, "must be one JSON object"),
        (b"{}", "must have `contents` or `text`"),
        (b'{"id": "5"}', "must have `contents` or `text`"),
        (b'{"id": "5", "contents": 7}', "contents must be a string, got 7"),
        (b'{"id": [5], "contents": "x"}', "id must be a string or a whole number"),
        (b'{"id": true, "contents": "x"}', "id must be a string or a whole number"),
        (b'{"text": "x"}', "must have a url, a title or an id"),
        (b'{"url": {}, "text": "x"}', "url must be a string"),
        (b'{"url": "/a", "text": "x", "title": 1}', "title must be a string"),
        (b'{"url": "/a", "text": "x", "html": []}', "html must be a string"),
        (b'{"id": "0", "contents": "again"}', "ids must be unique, got '0' again"),
        (b'{"url": "/u", "text": "once"}\n{"url": "/u", "text": "twice"}', "urls must be unique, got '/u' again"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_left(tmp_path, line, said):
    source = tmp_path / "bad.jsonl"
    source.write_bytes(json.dumps(WIKI_18[0]).encode() + b"\n\n" + line + b"\n" + json.dumps(WIKI_18[1]).encode())
    number = 3 + line.count(b"\n")
    with pytest.raises(DataError, match=re.escape(f"bad.jsonl:{number}: ") + ".*" + re.escape(said)):
        build_web(source, tmp_path / "web")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("damage", [lambda data: b"not gzip", lambda data: data[:40], lambda data: data[:20] + b"\xff" * 40 + data[60:]])
def test_a_gzip_file_that_is_broken_or_cut_off_is_named(tmp_path, damage):
    data = gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in WIKI_18))
    (tmp_path / "a.jsonl.gz").write_bytes(damage(data))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: must be readable to the end"):
        build_web(tmp_path / "a.jsonl.gz", tmp_path / "web")
    assert not (tmp_path / "web").exists()


def test_sources_that_are_none(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "none.jsonl").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    reasons = {"gone": "must be a file or a folder", "x.txt": "must be .jsonl", "none.jsonl": "at least one", "folder": "got none"}
    for source, said in reasons.items():
        with pytest.raises(DataError, match=f"--from: .*{said}"):
            build_web(tmp_path / source, tmp_path / "web")
    assert not (tmp_path / "web").exists()


def test_the_target_must_be_new_or_empty_and_writable(tmp_path):
    source = write_lines(tmp_path / "wiki.jsonl", WIKI_18)
    (tmp_path / "empty").mkdir()
    build_web(source, tmp_path / "empty")
    with pytest.raises(UserError, match="--to: must be a new or empty directory"):
        build_web(source, tmp_path / "empty")
    with pytest.raises(ServiceError, match="--to: must be writable"):
        build_web(source, tmp_path / "wiki.jsonl" / "web")
    assert len(SearchIndex(tmp_path / "empty")) == 4


def test_folders_that_are_no_web(tmp_path):
    for content in ("", "{}", '{"engine": "lucene"}'):
        (tmp_path / "web.json").write_text(content)
        with pytest.raises(DataError, match="index: must"):
            SearchIndex(tmp_path)
    (tmp_path / "web.json").write_text('{"engine": "fts5"}')
    with pytest.raises(DataError, match="no such file"):
        SearchIndex(tmp_path)
    (tmp_path / "pages.db").write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match="must be a file that"):
        SearchIndex(tmp_path)


def test_a_long_list_is_in_pages_that_link_on(tmp_path):
    build_web(write_lines(tmp_path / "many.jsonl", [{"url": f"/{i}", "text": "x"} for i in range(2_001)]), tmp_path / "web")
    site = open_site(directory=tmp_path / "web")
    seen, queue = set(), ["/"]
    while queue:
        for link in parse_page(site.get(queue.pop())[0].decode(), url="/").links:
            if link not in seen:
                seen.add(link)
                queue += [link] if link.startswith("/pages/") else []
    assert {f"/{i}" for i in range(2_001)} | {"/pages/2", "/pages/3"} == seen


def test_from_the_command_to_the_three_ways_of_asking(tmp_path, capsys):
    source = write_lines(tmp_path / "all.jsonl", [*WIKI_18, *PAGES])
    assert main(["web", "build", "--from", str(source), "--to", str(tmp_path / "web")]) == 0
    assert "6 documents in" in capsys.readouterr().out
    assert main(["web", "build", "--from", str(source), "--to", str(tmp_path / "web")]) == 2
    with running_server(directory=tmp_path / "web") as origin:
        (document,) = post(f"{origin}/retrieve", {"queries": ["squid"], "topk": 1})[1]["result"][0]
        assert document == {**WIKI_18[0], "url": "/wiki/Deep_sea", "title": "Deep sea"}
        asked = ["/wiki/Deep_sea", f"{origin}/wiki/Deep_sea", "https://example.com/a?b=1", "/wiki/Moss_%26_stone", "/none"]
        contents = [page and page["contents"] for page in post(f"{origin}/access", {"urls": asked})[1]["result"]]
        article = "Deep sea\nThe squid lives in the deep sea.\nIt eats many fish there."
        assert contents[:3] == [article, article, f"Away\n{PAGES[0]['text']}"]
        assert contents[3].startswith("Moss & stone\n")
        assert contents[4] is None
        assert "<p>It eats many fish there.</p>" in get(f"{origin}/wiki/Deep_sea")[2]
        assert "herons" in get(f"{origin}/https://example.com/a?b=1")[2]
        question = next(one["url"] for one in post(f"{origin}/retrieve", {"queries": ["shares"]})[1]["result"][0])
        assert "A question about shares." in get(f"{origin}{question}")[2]
        assert get(f"{origin}/wiki/None")[0] == 404


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(alphabet='ab \n"\t?%#/\\é\x00\ud800'))
def test_any_text_is_stored_and_found_again_under_its_url(tmp_path_factory, title, text):
    folder = tmp_path_factory.mktemp("any")
    record = {"id": "x", "title": title, "text": text}
    source = write_lines(folder / "a.jsonl", [record])
    if not text.strip():
        assert list(Source(source)) == []
        return
    build_web(source, folder / "web")
    index = SearchIndex(folder / "web")
    (url,) = (row[0] for row in index.documents.database.execute("SELECT url FROM documents"))
    assert index.get(url) is not None
    assert StoredSite(index).get(url) is not None
    index.close()
