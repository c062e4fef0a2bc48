"""What a web is made of: JSONL of passages or pages, HTML files, or a crawl's output, read one document at a time.

    {"id": "7", "contents": "\\"Title\\"\\ntext"}         a passage, as in Search-R1's wiki-18; those of one title are one page, /wiki/Title
    {"url": "...", "title": "...", "text": "..."}       a page; with "html" too, as a crawl writes it, that is what a visitor gets

A line may have an `id` beside its `url`: then several lines may share the url. JSONL may be gzipped (.gz). In the folder of a crawl
(`crawl/` of a run directory) the pages are read, and not the list of what was left out.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote

from webdancer.errors import DataError
from webdancer.offline_web.documents import Document, StoredPage
from webdancer.offline_web.site import FolderSite

Item = tuple[Document, StoredPage | None]

_JSONL = (".jsonl", ".jsonl.gz")
_CRAWLED, _LEFT_OUT = "pages.jsonl", "left_out.jsonl"
_MAX_LINE_BYTES = 64 << 20
_RESERVED = re.compile(r"[%?#\\\x00-\x1f\x7f]")  # what would end a path or be refused in it; other letters stay, for people to read
_UTF8_HTML = "text/html; charset=utf-8"


class Source:
    """Iterate once. Raises DataError, for a malformed line with its file and number; `where` says what was read last."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.num_without_text = 0
        self.num_bytes_read = 0
        if not path.exists():
            raise DataError(f"--from: must be a file or a folder, got {str(path)!r}")
        self._site = None
        self._files = [path] if path.is_file() else _jsonl_files(path)
        if path.is_file() and not path.name.endswith(_JSONL):
            raise DataError(f"--from: must be .jsonl or .jsonl.gz, or a folder of these or of HTML pages, got {str(path)!r}")
        if not self._files:
            self._site = _html_folder(path)
        self.num_bytes = sum(file.stat().st_size for file in self._files) if self._site is None else self._site.num_bytes()

    def __iter__(self) -> Iterator[Item]:
        items = self._lines() if self._site is None else self._pages(self._site)
        for document, page in items:
            if document.text.strip():
                yield document, page
            else:
                self.num_without_text += 1

    def _lines(self) -> Iterator[Item]:
        finished = 0
        for file in self._files:
            with file.open("rb") as raw:
                for number, line in _numbered(raw, file):
                    self.where = f"{file}:{number}"
                    self.num_bytes_read = finished + raw.tell()
                    if line.strip():
                        yield _parsed(line, self.where)
            finished += file.stat().st_size

    def _pages(self, site: FolderSite) -> Iterator[Item]:
        for file, document, page in site.pages():
            self.where = str(file)
            self.num_bytes_read += len(page.body)
            yield document, page


def _jsonl_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(_JSONL))
    return [file for file in files if file.name != _LEFT_OUT or not file.with_name(_CRAWLED).is_file()]


def _html_folder(path: Path) -> FolderSite:
    try:
        return FolderSite(path)
    except DataError as error:
        raise DataError(f"--from: must hold .jsonl, .jsonl.gz or .html files, got none in {str(path)!r}") from error


def _numbered(raw: IO[bytes], file: Path) -> Iterator[tuple[int, bytes]]:
    lines = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.name.endswith(".gz") else raw
    number = 0
    while True:
        number += 1
        try:
            line = lines.readline(_MAX_LINE_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:  # a gzip file that is cut off, damaged or none
            raise DataError(f"{file}:{number}: must be readable to the end, got {error}") from error
        if len(line) > _MAX_LINE_BYTES:
            raise DataError(f"{file}:{number}: must be a line of at most {_MAX_LINE_BYTES} bytes, got a longer one")
        if not line:
            return
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parsed(line: bytes, where: str) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{where}: must be one JSON object, got {line[:60]!r} ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be one JSON object, got {line[:60]!r}")
    title, text = _text(record, where)
    name = _name(record, where)
    url = _string(record, "url", where) or _derived_url(title, name, where)
    html = _string(record, "html", where)
    page = StoredPage(content_type=_UTF8_HTML, body=html.encode("utf-8", "replace")) if html else None
    return Document(id=name, url=url, title=title, text=text), page


def _text(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    """title, text"""
    title, contents = _string(record, "title", where).strip(), _string(record, "contents", where)
    if "text" in record:
        return title, _string(record, "text", where)
    if "contents" not in record:
        raise DataError(f"{where}: must have `contents` or `text`, got {sorted(record)[:10]}")
    head, line_feed, rest = contents.partition("\n")
    return (title or head.strip().strip('"').strip(), rest) if line_feed else (title, contents)


def _name(record: Mapping[str, Any], where: str) -> str:
    name = record.get("id", "")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"{where}: id must be a string or a whole number, got {str(name)[:60]!r}")
    return str(name)


def _string(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {field} must be a string, got {json.dumps(value)[:60]}")
    return value or ""


def _derived_url(title: str, name: str, where: str) -> str:
    if title:
        return "/wiki/" + _RESERVED.sub(lambda found: quote(found[0]), "_".join(title.split()))
    if name:
        return "/passage/" + quote(name, safe="")
    raise DataError(f"{where}: must have a url, a title or an id, got none")
