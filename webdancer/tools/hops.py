"""A page that moves from host to host: each host is asked by the tool actor that owns it, with its bucket, breaker, robots.txt and memory.

No actor waits for another. It answers `Moved`, and who asked goes on with the owner of the next host (tools.pieces.ask_owners), so nobody
can wait in a circle, wherever redirects lead.
"""

from __future__ import annotations

from dataclasses import dataclass

from webdancer.config import FetchConfig
from webdancer.tools.gate import BlockedUrl
from webdancer.types import ToolResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """Where a page is looked for next, after so many redirects, which took `elapsed_s` together."""

    url: str
    redirects: int = 0
    elapsed_s: float = 0.0

    def onward(self, url: str, *, took_s: float, limits: FetchConfig) -> Hop:
        """Where this one leads, having taken so long. Raises BlockedUrl where one fetch of the whole way would."""
        # The first request has a deadline of its own, and has kept it.
        elapsed_s = self.elapsed_s + took_s if self.redirects else 0.0
        if self.redirects >= limits.max_redirects:
            raise BlockedUrl("too_many_redirects", f"more than {limits.max_redirects} redirects")
        if elapsed_s > limits.timeout_s:
            raise BlockedUrl("timeout", f"no whole answer within {limits.timeout_s:g} s")
        return Hop(url=url, redirects=self.redirects + 1, elapsed_s=elapsed_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved(ToolResult):
    """No observation yet: the page is to be asked of whoever owns the host of `hop`."""

    hop: Hop
