"""The `tools` section of the configuration: search, visit, the gate, manners, memory and money. Import it from webdancer.config."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class SearchConfig:
    backend: str = "retrieve"
    """retrieve: a Search-R1 compatible /retrieve server. index: a built web. serper, brave, tavily: that provider, with its key in
    SERPER_API_KEY, BRAVE_API_KEY or TAVILY_API_KEY of the tool actors' environment. searxng: an instance of one's own."""
    url: str = ""
    """Origin of the server; empty: the offline web that the run starts itself, or the provider's own address."""
    index: str = ""
    """Folder of `webdancer web build`, for backend index; on every node with a tool actor."""
    top_k: int = 10
    """Results a query."""
    snippets: str = "all"
    """all: every hit shows its snippet. first: only the first hit does, the others title and kind."""
    snippet_chars: int = 300
    """A snippet is cut at the end of a sentence."""
    snippet_sentences: int = 0
    """Sentences of a snippet at most; 0: as many as fit."""
    timeout_s: float = 30.0
    """Of one request; for its turn under a quota a search waits as long again."""
    requests_per_s: float = 0.0
    """Quota of the provider, over the whole cluster; 0: none."""
    usd_per_1000: float = 0.0
    """Price of a thousand requests."""


@dataclass(kw_only=True)
class SummarizerConfig:
    backend: str = "extractive"
    """extractive: the page's sentences ranked against the goal, no model. openai: a model behind an OpenAI-compatible endpoint, with its
    key, if it has one, in WEBDANCER_SUMMARIZER_API_KEY of the tool actors' environment. engine: the judges' model, on the engines of the
    judge actors (judge.backend vllm)."""
    base_url: str = ""
    """openai: what stands before /chat/completions, e.g. http://10.0.0.5:8000/v1."""
    model: str = "Qwen/Qwen2.5-72B-Instruct"
    """openai: at the endpoint."""
    max_tokens: int = 2048
    """Of a reply; it bounds what the agent reads of a page."""
    timeout_s: float = 60.0


@dataclass(kw_only=True)
class VisitConfig:
    backend: str = "direct"
    """direct: pages are fetched and read here, HTML by trafilatura and PDF by PDFium. jina: r.jina.ai, or an instance of one's own; key in
    JINA_API_KEY of the tool actors' environment. access: an ASearcher compatible /access server."""
    url: str = ""
    """Origin of the jina or access server; empty: Jina's own."""
    site: str = ""
    """Origin that site-relative URLs (`/wiki/X`) are resolved against; empty: the offline web that the run starts itself."""
    max_page_chars: int = 150_000
    extraction_processes: int = 2
    """Processes in which one tool actor reads pages, 40 MiB each and started when needed, killed on a page that stalls or crashes them;
    0: its own threads, for a web that is trusted."""
    max_evidence_chars: int = 2_000
    """Extractive summarizer: sentences ranked against the goal, in page order, up to this many characters."""
    max_evidence_sentences: int = 12
    summarizer: SummarizerConfig = field(default_factory=SummarizerConfig)
    requests_per_s: float = 0.0
    """Quota of a reader service, over the whole cluster; 0: none. Hosts that are visited directly have tools.polite instead."""
    usd_per_1000: float = 0.0
    """Price of a thousand requests to a reader service."""


@dataclass(kw_only=True)
class FetchConfig:
    """The gate of every outgoing request; see tools.fetch.FetchPolicy."""

    allowed_ports: list[int] = field(default_factory=lambda: [80, 443])
    allowed_origins: list[str] = field(default_factory=list)
    """Exact origins allowed besides public addresses, e.g. http://127.0.0.1:8080."""
    max_url_length: int = 2048
    max_redirects: int = 5
    max_bytes: int = 5_000_000
    timeout_s: float = 20.0


@dataclass(kw_only=True)
class PoliteConfig:
    """How the web is asked. Origins allowed by name (tools.fetch.allowed_origins, tools.visit.site) have no robots.txt and no limit."""

    robots: bool = True
    """Pages that robots.txt forbids are not fetched."""
    host_requests_per_s: float = 4.0
    """To one host, over the whole cluster; a larger Crawl-delay of its robots.txt is kept. 0: no limit."""
    max_attempts: int = 3
    """Of one request that meets 408, 425, 429, 5xx or a broken connection; full jitter, Retry-After is kept."""
    breaker_failures: int = 5
    """Failures in a row after which a host or provider is left alone."""
    breaker_open_s: float = 30.0
    """For so long; then one request tries it."""


@dataclass(kw_only=True)
class ReplayConfig:
    """What the tools said, kept by what they were asked."""

    mode: str = "live"
    """live: nothing is kept. record: the first answer to everything that is asked, repeated from then on. replay: answers come from the
    recording only; what it does not have is the error `replay_miss`. replay_or_live: what it does not have is asked live and not added."""
    path: str = ""
    """The recording, one file. record: written where the driver runs. Replay: readable wherever a tool actor runs."""


@dataclass(kw_only=True)
class ToolsConfig:
    num_servers: int = 4
    """Tool actors."""
    max_concurrent: int = 64
    """Calls of one tool in flight in one tool actor: pages do not wait for a search that is throttled."""
    cache_entries: int = 20_000
    """Pages and queries each tool actor remembers for the length of the run; 0: none."""
    cache_dir: str = ""
    """On a local disk (SQLite), remembered beyond the run, a file for each tool actor; empty: memory only."""
    cache_days: float = 7.0
    """How long a page or result list is remembered. What failed for want of a server never is."""
    cache_negative_hours: float = 1.0
    """How long it is remembered that a page is not there or cannot be read, or that nothing was found."""
    budget_usd: float = 0.0
    """Money for priced requests of tools and judge over all starts of the run; once it is spent the run stops, and what is finished is
    kept. 0: no bound."""
    search: SearchConfig = field(default_factory=SearchConfig)
    visit: VisitConfig = field(default_factory=VisitConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    polite: PoliteConfig = field(default_factory=PoliteConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
