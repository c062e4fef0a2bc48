"""What stands in the manifests of made data: what they were made with and of, which files these are, what they cost."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from webdancer.config import Config
from webdancer.synthesis.crawl import Crawl

_HOW_IT_WAS_ASKED = ("base_url", "max_concurrent", "max_attempts", "timeout_s", "budget_usd")
"""Of a model's settings: nothing of it shapes the result."""
_LASTING = ("answers", "prompt_tokens", "completion_tokens", "usd", "malformed")


def described(path: Path) -> dict[str, Any]:
    """The number of rows of a file, and its SHA-256."""
    digest, rows = hashlib.sha256(), 0
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            rows += 1
    return {"rows": rows, "sha256": digest.hexdigest()}


def provenance(config: Config, crawled: Crawl) -> dict[str, Any]:
    """What questions were made with and of."""
    settings = asdict(config.synthesis)
    settings["llm"] = {name: value for name, value in settings["llm"].items() if name not in _HOW_IT_WAS_ASKED}
    reasons = Counter(" ".join(reason.split()[:2]).rstrip(":,") for reason in crawled.failed.values())
    crawl = {"pages": len(crawled.pages), "left_out": dict(sorted(reasons.items())), "not_visited": crawled.left}
    return {"seed": config.seed, "settings": settings, "crawl": crawl}


def lasting(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's usage, what is the same however often the job was killed."""
    return {name: usage[name] for name in _LASTING}


def cost(models: Mapping[str, Mapping[str, Any]], providers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """models: usage of each chat model by its part (llm.client.Usage). providers: requests and money by who was asked (tools.ledger).

    Of a model it is what its answers cost over all starts of the job; of a provider what the run directory has spent on it.
    """
    by_model = {part: dict(usage) for part, usage in sorted(models.items())}
    usd = sum(spent["usd"] for spent in (*by_model.values(), *providers.values()))
    return {"usd": usd, "models": by_model, "providers": {name: dict(spent) for name, spent in sorted(providers.items())}}
