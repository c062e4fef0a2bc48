"""Which site a server serves: the encyclopedia, a folder of HTML pages that somebody already has, or what `web build --from` made."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from webdancer.errors import DataError
from webdancer.offline_web.documents import Document, StoredPage
from webdancer.offline_web.encyclopedia import Encyclopedia
from webdancer.offline_web.index import MANIFEST, SearchIndex
from webdancer.offline_web.pages import EncyclopediaSite, link_page, text_page

if TYPE_CHECKING:
    from lxml.html import HtmlElement

_HTML = (".html", ".htm")
_LISTED = 1_000  # documents a listing page
_MAX_PAGE_BYTES = 5_000_000
_FRAME = ("script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form")
_BLOCKS = ("h2", "h3", "h4", "p", "div", "section", "li", "table", "tr", "br", "dt", "dd", "pre", "blockquote", "figure")


class FolderSite:
    """`folder/a/b.html` is `/a/b.html`, and also `/a/b`; `folder/a/index.html` is also `/a/` and `/a`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        if not self._folder.is_dir():
            raise DataError(f"dir: must be a folder of HTML pages, got {str(folder)!r}")
        if next(self._files(), None) is None:
            raise DataError(f"dir: must hold at least one .html page, got none in {str(folder)!r}")

    def documents(self) -> Iterable[Document]:
        """One document a page: its title and its text. Pages without text are left out."""
        return (document for _, document, _ in self.pages() if document.text)

    def pages(self) -> Iterator[tuple[Path, Document, StoredPage]]:
        """Every file with its document, whose text may be empty."""
        for file in self._files():
            body = file.read_bytes()[:_MAX_PAGE_BYTES]
            title, text = _read(body)
            url = "/" + file.relative_to(self._folder).as_posix()
            document = Document(url=url, title=title or file.stem.replace("_", " "), text=text)
            yield file, document, StoredPage(content_type=_type(file), body=body)

    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._files())

    def get(self, path: str) -> tuple[bytes, str] | None:
        """Body and content type; None if there is no such file, or if the path leads out of the folder or to what is hidden in it."""
        relative = unquote(path).strip("/")
        if any(part.startswith(".") for part in relative.split("/")):
            return None
        for candidate in (relative, *(relative + suffix for suffix in _HTML), f"{relative}/index.html"):
            try:
                file = (self._folder / candidate.lstrip("/")).resolve()
                if file.is_file() and file.is_relative_to(self._folder):
                    return file.read_bytes(), _type(file)
            except (OSError, ValueError):  # too long, a NUL byte, not readable: no such page
                continue
        return None if relative else (self._contents().encode(), "text/html; charset=utf-8")

    def _contents(self) -> str:
        """A front page for a folder that has none, so that a crawl from `/` finds every page."""
        paths = [file.relative_to(self._folder).as_posix() for file in self._files()]
        return link_page("Contents", [(quote(f"/{path}"), path) for path in paths])

    def _files(self) -> Iterator[Path]:
        """Pages inside the folder; a link that leads out of it is none."""
        files = (file for file in sorted(self._folder.rglob("*")) if file.suffix.lower() in _HTML and file.is_file())
        return (file for file in files if file.resolve().is_relative_to(self._folder))


def _type(file: Path) -> str:
    return mimetypes.guess_type(file.name)[0] or "application/octet-stream"


def _read(html: bytes) -> tuple[str, str]:
    """Title and text of a page for the index: no frame, and rows of a key and a value as `key: value.`

    Not the extractor of the visit tool, which takes 10 ms a page: an index needs less, of thousands of pages at once.
    """
    import lxml.html
    from lxml.etree import ParserError, strip_elements

    parser = lxml.html.HTMLParser(encoding=_encoding(html), remove_comments=True, remove_pis=True)
    try:
        tree = lxml.html.document_fromstring(html, parser=parser)
    except (ParserError, ValueError):  # an empty or binary file is a page without text
        return "", ""
    title = " ".join((tree.findtext(".//title") or "").split()) or next(map(_text, tree.iterfind(".//h1")), "")
    strip_elements(tree, "head", "h1", *_FRAME, with_tail=False)
    for row in tree.iter("tr"):
        if [cell.tag for cell in row] == ["th", "td"]:
            key, value = row
            key.tail, value.tail = ": ", "."
    for block in tree.iter(*_BLOCKS):
        block.tail = " " + (block.tail or "")
    return title, _text(tree)


def _encoding(html: bytes) -> str | None:
    """UTF-8 where it decodes, whatever the page says; else what the page says."""
    try:
        html.decode()
    except UnicodeDecodeError:
        return None
    return "utf-8"


def _text(element: HtmlElement) -> str:
    return " ".join(element.text_content().split())


class StoredSite:
    """What `web build --from` made. A document without a page of its own gets one of its title and text.

    A page of an absolute address is at `/https://example.com/a?b=c`. `/` lists the pages, more of them at `/pages/2` and so on, so that a
    crawl from `/` finds them all; a stored page of such an address comes first.
    """

    def __init__(self, index: SearchIndex) -> None:
        self.index = index

    def get(self, path: str) -> tuple[bytes, str] | None:
        for url in address_forms(path.removeprefix("/") if path.startswith(("/http://", "/https://")) else path):
            for candidate in (url, *(url + suffix for suffix in _HTML), f"{url.rstrip('/')}/index.html"):
                if page := self._page(candidate):
                    return page
        number = _listing_number(path)
        return None if number is None else self._listing(number)

    def _page(self, url: str) -> tuple[bytes, str] | None:
        page = self.index.documents.page(url)
        if page is not None:
            return page.body, page.content_type
        document = self.index.get(url)
        return None if document is None else (text_page(document.title, document.text).encode(), "text/html; charset=utf-8")

    def _listing(self, number: int) -> tuple[bytes, str] | None:
        start = (number - 1) * _LISTED + 1
        listed = self.index.documents.listed(start, _LISTED)
        if not listed:
            return None
        links = [(url if url.startswith("/") else f"/{url}", title or url) for url, title in listed]
        more = [(f"/pages/{number + 1}", "More")] if start + _LISTED <= len(self.index) else []
        return link_page(f"Pages, {number}", links + more).encode(), "text/html; charset=utf-8"


def address_forms(url: str) -> tuple[str, ...]:
    """The spellings under which a page may be stored: as it is, without percent-encoding, and with all of it."""
    return tuple(dict.fromkeys((url, unquote(url), quote(unquote(url), safe="/:?&=@!$'()*+,;~"))))


def _listing_number(path: str) -> int | None:
    if path == "/":
        return 1
    found = re.fullmatch(r"/pages/([1-9][0-9]{0,9})", path)
    return None if found is None else int(found[1])


def open_site(*, seed: int = 0, num_entities: int = 5800, directory: Path | None = None) -> EncyclopediaSite | FolderSite | StoredSite:
    """The folder's site if one is given, pages or a built web, else the encyclopedia's. Raises ConfigError or DataError."""
    if directory is None:
        return EncyclopediaSite(Encyclopedia.generate(seed, num_entities))
    return StoredSite(SearchIndex(directory)) if (directory / MANIFEST).is_file() else FolderSite(directory)
