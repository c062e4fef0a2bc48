"""Response bodies: read under a cap, and decompressed under the same cap. Hostile input is the normal case here."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

from webdancer.tools.gate import BlockedUrl
from webdancer.tools.network import FetchFailed, Unreadable

ACCEPT_ENCODING = "gzip, deflate"
"""Only what can be decompressed step by step under a cap with the standard library."""


async def read_body(chunks: AsyncIterator[bytes], *, encoding: str, max_bytes: int) -> bytes:
    """The decoded body; raises BlockedUrl("body_too_large") as soon as either the wire or the decoded bytes pass the cap, FetchFailed for
    one that is broken or cut off."""
    inflate = _Inflater(encoding)
    parts: list[bytes] = []
    on_wire = decoded = 0
    async for chunk in chunks:
        on_wire += len(chunk)
        part = inflate.feed(chunk, max_bytes - decoded + 1)
        decoded += len(part)
        if on_wire > max_bytes or decoded > max_bytes:
            raise BlockedUrl("body_too_large", f"the page is larger than {max_bytes} bytes")
        parts.append(part)
    inflate.finish()
    return b"".join(parts)


class _Inflater:
    """Incremental gzip (also several members) and deflate (with or without the zlib header); identity passes through."""

    def __init__(self, encoding: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Unreadable(f"the server answered in an encoding that was not asked for: {encoding[:40]}")
        self._deflate = encoding == "deflate"
        self._stream = None if encoding in ("", "identity") else zlib.decompressobj(wbits=47)
        self._began = False

    def feed(self, chunk: bytes, limit: int) -> bytes:
        """At most `limit` decoded bytes; the caller stops at the cap, so what is left over then is never needed."""
        if self._stream is None:
            return chunk
        self._began = self._began or bool(chunk)
        try:
            try:
                output = self._stream.decompress(chunk, limit)
            except zlib.error:
                if not self._deflate:
                    raise
                self._stream = zlib.decompressobj(wbits=-15)  # deflate as some servers understand it, without the zlib header
                output = self._stream.decompress(chunk, limit)
            self._deflate = False
            while self._stream.eof and self._stream.unused_data.strip(b"\0") and len(output) < limit:
                rest, self._stream = self._stream.unused_data, zlib.decompressobj(wbits=47)
                output += self._stream.decompress(rest, limit - len(output))
            return output
        except zlib.error as error:
            raise Unreadable(f"the body is not valid compressed data: {error}") from error

    def finish(self) -> None:
        """There is no more to come."""
        if self._stream is not None and self._began and not self._stream.eof:
            raise FetchFailed("the body is cut off")
