"""One HTML page as the question makers read it: title, infobox, links and text.

An infobox is a table of class `infobox`, as on Wikipedia and its relatives; where a page has none, the first table that is a list of keys
and values (one head and one cell a row) counts as one. Pages are hostile: nothing here raises, whatever the markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urldefrag, urljoin, urlsplit

if TYPE_CHECKING:
    from lxml.html import HtmlElement

_MAX_TEXT_CHARS = 20_000
_BLOCKS = ("title", "h1", "h2", "h3", "h4", "p", "div", "section", "ul", "ol", "li", "table", "tr", "th", "td", "br", "dt", "dd", "pre")
_MIN_ROWS, _PAIRED_SHARE = 3, 0.8  # of a table that is an infobox without saying so
_JOINING = re.compile(r"\b(?:and|or)\b|[^\w]")
_NOTE = re.compile(r"\[.*\]|\W*|\d{1,3}|[a-z]")  # what a link to a footnote of the page may be called


@dataclass(frozen=True, slots=True, kw_only=True)
class FactValue:
    """One value of an infobox row; `url` is None if it is no link."""

    text: str
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrawledPage:
    """`url` is a path for pages of the crawl's own site, absolute for others. `kind` and `split` are empty where the page names none."""

    url: str
    title: str
    kind: str
    split: str
    aliases: tuple[str, ...]
    facts: Mapping[str, tuple[FactValue, ...]]
    links: tuple[str, ...]
    text: str
    link_texts: tuple[str, ...] = ()
    """What the first link to each of `links` is called."""


def parse_page(html: str, *, url: str, site: str = "") -> CrawledPage:
    """Title, infobox, links and text of a page; never raises, whatever the markup."""
    import lxml.html
    from lxml.etree import ParserError, strip_elements

    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        tree = lxml.html.document_fromstring(html.encode("utf-8", "replace"), parser=parser)
    except (ParserError, ValueError):  # an empty document
        tree = lxml.html.document_fromstring("<html><body></body></html>")
    strip_elements(tree, "script", "style", with_tail=False)
    for block in tree.iter(*_BLOCKS):  # else the text of two cells would be one word
        block.tail = " " + (block.tail or "")
    headings = [_text(heading).rstrip("¶ ").removesuffix(" #") for heading in tree.iterfind(".//h1")]  # C# keeps its name
    tables = tree.xpath("//table[contains(concat(' ', normalize-space(@class), ' '), ' infobox ')]")
    tables = tables or next(([table] for table in tree.iterfind(".//table") if _is_paired(table)), [])
    linked: dict[str, str] = {}
    for anchor in tree.iterfind(".//a[@href]"):
        if link := _link(url, anchor, site):
            linked.setdefault(link, _text(anchor))
    return CrawledPage(
        url=site_path(url, site),
        title=next(filter(None, headings), "") or " ".join((tree.findtext(".//title") or "").split()),
        kind=next((table.get("data-kind", "") for table in tables), ""),
        split=next(iter(tree.xpath("//meta[@name='split']/@content")), ""),
        aliases=tuple(alias.strip() for span in tree.find_class("alias") for alias in _text(span).split(";") if alias.strip()),
        facts=_merged(row for table in tables for row in _facts(table, url, site)),
        links=tuple(linked),
        text=_text(tree)[:_MAX_TEXT_CHARS],
        link_texts=tuple(linked.values()),
    )


def _is_paired(table: HtmlElement) -> bool:
    rows = table.findall(".//tr")
    paired = sum(len(row.findall("th")) == len(row.findall("td")) == 1 for row in rows)
    return paired >= _MIN_ROWS and paired >= _PAIRED_SHARE * len(rows)


def _facts(table: HtmlElement, url: str, site: str) -> list[tuple[str, tuple[FactValue, ...]]]:
    """The rows that have one head and one cell: a cell of links alone is a list of them, any other is one value, its text."""
    rows = []
    for row in table.iterfind(".//tr"):
        heads, cells = row.findall("th"), row.findall("td")
        if len(heads) == 1 and len(cells) == 1:
            head, cell = _without_notes(heads[0]), _without_notes(cells[0])
            linked = ((_text(anchor), _link(url, anchor, site)) for anchor in cell.iterfind(".//a[@href]") if not _is_fragment(anchor))
            values = tuple(FactValue(text=text, url=link) for text, link in linked if text and link)
            plain = _text(cell)
            if not _is_all(plain, [value.text for value in values]):
                values = (FactValue(text=plain),) if plain else ()
            rows.append((_text(head).rstrip(": "), values))
    return rows


def _merged(rows: Iterable[tuple[str, tuple[FactValue, ...]]]) -> dict[str, tuple[FactValue, ...]]:
    """What stands under one key in several rows is several values of it."""
    facts: dict[str, tuple[FactValue, ...]] = {}
    for key, values in rows:
        if values:
            facts[key] = tuple(dict.fromkeys((*facts.get(key, ()), *values)))
    return facts


def _without_notes(element: HtmlElement) -> HtmlElement:
    """Itself, or a copy without the footnotes, which are no part of what it says: `[1]`, `[citation needed]`, a raised 2."""
    if any(map(_is_note, element.iter("sup", "a"))):
        element = deepcopy(element)
        for note in [found for found in element.iter("sup", "a") if _is_note(found)]:
            note.drop_tree()
    return element


def _is_note(element: HtmlElement) -> bool:
    text = _text(element)
    if element.tag == "a":
        return _is_fragment(element) and _NOTE.fullmatch(text) is not None
    anchors = element.findall(".//a[@href]")
    return (text.startswith("[") and text.endswith("]")) or (bool(anchors) and all(map(_is_fragment, anchors)))


def _is_fragment(anchor: HtmlElement) -> bool:
    """Whether it leads to a place in its own page."""
    return bool(anchor.get("href", "").strip().startswith("#"))


def _is_all(text: str, parts: Sequence[str]) -> bool:
    """Whether the text says nothing besides its parts."""
    for part in parts:
        text = text.replace(part, " ", 1)
    return bool(parts) and not _JOINING.sub("", text)


def _link(base: str, anchor: HtmlElement, site: str) -> str | None:
    href = anchor.get("href", "").strip()
    if href.startswith("/") and not href.startswith("//"):
        base = origin_of(base)  # all that such a link depends on, so that most are in the cache
    return _resolved(base, href, site)


@lru_cache(maxsize=65_536)
def _resolved(base: str, href: str, site: str) -> str | None:
    try:
        target = urldefrag(urljoin(base, href)).url
        if urlsplit(target).scheme not in ("http", "https", urlsplit(base).scheme):
            return None
    except ValueError:  # a malformed address is no link
        return None
    return site_path(target, site)


def _text(element: HtmlElement) -> str:
    return " ".join(element.text_content().split())


@lru_cache(maxsize=65_536)
def origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else ""


def site_path(url: str, site: str) -> str:
    return url[len(site) :] or "/" if site and origin_of(url) == site else url
