"""The rules that a configuration must keep, beyond names and types: all of them, in one place.

Each broken rule is a `ConfigError` that names the field, the rule and the value; the first one found is raised.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from webdancer.config import Config, LlmConfig
from webdancer.errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "prompt.style": ("released", "brief"),
    "tools.search.backend": ("retrieve", "index", "serper", "brave", "tavily", "searxng"),
    "tools.visit.backend": ("direct", "jina", "access"),
    "tools.visit.summarizer.backend": ("extractive", "openai", "engine"),
    "tools.search.snippets": ("all", "first"),
    "tools.replay.mode": ("live", "record", "replay", "replay_or_live"),
    "judge.backend": ("match", "openai", "vllm"),
    "judge.prompt": ("auto", "hle", "equivalence", "browsecomp", "simpleqa", "xbench"),
    "engine.kv_cache_on_update": ("clear", "keep"),
    "evaluation.method": ("react", "direct", "rag"),
    "rollout.weights.backend": ("file", "nccl", "ipc"),
    "rollout.refill": ("resample", "duplicate"),
    "learner.too_long": ("error", "drop"),
    "rl.loss": ("dapo", "cispo"),
    "rl.proximal": ("recomputed", "rollout"),
    "sft.optimizer.schedule": ("constant", "cosine"),
    "rl.optimizer.schedule": ("constant", "cosine"),
    "sample.backend": ("scripted", "openai", "engine"),
    "sample.style": ("instruct", "reasoning"),
    "sample.keep": ("all", "valid", "correct", "quality"),
    "telemetry.wandb_mode": ("offline", "online", "disabled"),
}

MAY_BE_ZERO = {
    "seed",
    "engine.seed",
    "judge.engine.seed",
    "judge.requests_per_s",
    "judge.usd_per_million_prompt",
    "judge.usd_per_million_completion",
    "judge.cache_entries",
    "model.lora.rank",
    "web.seed",
    "web.port",
    "tools.cache_entries",
    "tools.visit.extraction_processes",
    "tools.budget_usd",
    "tools.search.snippet_sentences",
    "tools.search.requests_per_s",
    "tools.search.usd_per_1000",
    "tools.visit.requests_per_s",
    "tools.visit.usd_per_1000",
    "tools.polite.host_requests_per_s",
    "tools.fetch.max_redirects",
    "reward.format_weight",
    "reward.answer_weight",
    "reward.overlong_buffer_tokens",
    "rollout.episodes_per_worker",
    "rollout.max_staleness",
    "rollout.temperature",
    "rollout.max_lost",
    "rollout.max_admitted_per_step",
    "learner.max_skipped_steps",
    "learner.gpu_memory_gib",
    "sft.validation_fraction",
    "sft.optimizer.weight_decay",
    "sft.optimizer.beta1",
    "sft.optimizer.warmup_steps",
    "rl.optimizer.weight_decay",
    "rl.optimizer.beta1",
    "rl.optimizer.warmup_steps",
    "rl.evaluate_every",
    "sft.epochs",
    "sft.save_every",
    "rl.num_steps",
    "rl.save_every",
    "sample.max_demonstrations",
    "sample.temperature",
    "sample.llm.usd_per_million_prompt",
    "sample.llm.usd_per_million_completion",
    "sample.llm.budget_usd",
    "sample.quality.max_actions",
    "sample.quality.max_redundant_calls",
    "sample.quality.max_calls_after_answer",
    "sample.quality.llm.usd_per_million_prompt",
    "sample.quality.llm.usd_per_million_completion",
    "sample.quality.llm.budget_usd",
    "synthesis.num_rl",
    "synthesis.max_pages_per_site",
    "synthesis.near_duplicate",
    "synthesis.closed_book_attempts",
    "synthesis.llm.usd_per_million_prompt",
    "synthesis.llm.usd_per_million_completion",
    "synthesis.llm.budget_usd",
    "synthesis.num_dev",
    "synthesis.num_count",
    "evaluation.num_tasks",
    "evaluation.num_samples",
    "evaluation.temperature",
    "evaluation.repetition_penalty",
    "cluster.num_cpus",
}
"""Numbers for which 0 means something; every other number must be positive."""

PROBABILITIES = ("sample.teacher.",)
"""Sections of numbers in [0, 1]."""

FRACTIONS = ("engine.gpu_memory_utilization", "judge.engine.gpu_memory_utilization", "evaluation.top_p", "rl.clip_low")
"""In (0, 1]."""

BELOW_ONE = (
    "sft.validation_fraction",
    "sft.optimizer.beta1",
    "sft.optimizer.beta2",
    "rl.optimizer.beta1",
    "rl.optimizer.beta2",
)
"""In [0, 1)."""

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_ADDRESS = re.compile(r"(ray://)?\[?[\w.:-]+\]?:\d+")
_ORIGIN = re.compile(r"https?://[^/\s?#@]+")
_ENDPOINT = re.compile(r"https?://[^/\s?#@]+(?:/[^\s?#@]*)?")
_LABEL = re.compile(r"[A-Za-z0-9][\w./-]*=[A-Za-z0-9][\w.-]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def validate(config: Config) -> None:
    """Raises ConfigError for the first rule that is broken."""
    for key, value in _leaves(config, ""):
        _check_leaf(key, value)
    _check_names(config)
    _check_lora(config)
    _check_tools(config)
    _check_teacher(config)
    _check_tokens(config)
    _check_synthesis(config)
    _check_rollout(config)
    if config.cluster.shared_gpus:
        _check_shared_gpus(config)


def _require(holds: bool, key: str, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{key}: must {rule}, got {value!r}")


def _limit(value: float, key: str, limit: float, named: str) -> None:
    _require(value <= limit, key, f"be at most {named} ({limit:g})", value)


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for knob in dataclasses.fields(section):
        value = getattr(section, knob.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{knob.name}.")
        else:
            yield f"{prefix}{knob.name}", value


def _check_leaf(key: str, value: Any) -> None:
    if key in CHOICES:
        _require(value in CHOICES[key], key, f"be one of {', '.join(CHOICES[key])}", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    _require(math.isfinite(value), key, "be a finite number", value)
    if key in MAY_BE_ZERO or key.startswith(PROBABILITIES):
        _require(value >= 0, key, "be 0 or more", value)
    else:
        _require(value > 0, key, "be positive", value)
    if key in FRACTIONS or key.startswith(PROBABILITIES):
        _require(value <= 1, key, "be at most 1", value)
    if key in BELOW_ONE:
        _require(value < 1, key, "be below 1", value)


def _check_names(config: Config) -> None:
    _require(bool(_NAME.fullmatch(config.name)), "name", "consist of letters, digits, '.', '_' and '-'", config.name)
    _require(bool(config.run_dir.strip()), "run_dir", "name a directory", config.run_dir)
    _require(bool(config.model.path.strip()), "model.path", "name a model", config.model.path)
    date, address = config.prompt.current_date, config.cluster.address
    _require(not date or bool(_DATE.fullmatch(date)), "prompt.current_date", "be a date YYYY-MM-DD or empty", date)
    rule = "be JSON objects with a name, separated by commas"
    _require(_are_schemas(config.prompt.more_tools), "prompt.more_tools", rule, config.prompt.more_tools)
    known = address in ("local", "auto") or bool(_ADDRESS.fullmatch(address))
    _require(known, "cluster.address", "be local, auto, or host:port", address)
    for key in ("rollout_nodes", "learner_nodes", "tool_nodes"):
        label = getattr(config.cluster, key)
        _require(not label or bool(_LABEL.fullmatch(label)), f"cluster.{key}", "be a node label, key=value, or empty", label)


def _are_schemas(text: str) -> bool:
    try:
        schemas = json.loads(f"[{text}]")
    except (ValueError, RecursionError):
        return False
    return all(isinstance(schema, dict) and isinstance(schema.get("name"), str) for schema in schemas)


def _check_lora(config: Config) -> None:
    targets = config.model.lora.targets
    unmergeable = [name for name in targets if name in ("lm_head", "embed_tokens")]
    rule = "name linear layers inside the decoder: an export merges adapters, which a head that may be tied to its embedding cannot take"
    _require(bool(targets) and not unmergeable, "model.lora.targets", rule, targets)
    _require(len(set(targets)) == len(targets), "model.lora.targets", "name each layer once", targets)


def _check_tools(config: Config) -> None:
    tools = config.tools
    origins = [("tools.search.url", tools.search.url), ("tools.visit.url", tools.visit.url), ("tools.visit.site", tools.visit.site)]
    origins = [(key, origin) for key, origin in origins if origin]
    origins += [("tools.fetch.allowed_origins", origin) for origin in tools.fetch.allowed_origins]
    for key, origin in origins:
        _require(bool(_ORIGIN.fullmatch(origin.removesuffix("/"))), key, "be an origin such as http://127.0.0.1:8080", origin)
    _check_providers(config)
    replay = tools.replay
    rule = f"name the file of the recording when tools.replay.mode is {replay.mode}"
    _require(replay.mode == "live" or bool(replay.path.strip()), "tools.replay.path", rule, replay.path)
    for port in tools.fetch.allowed_ports:
        _require(1 <= port <= 65535, "tools.fetch.allowed_ports", "hold ports from 1 to 65535", port)
    _require(config.web.port <= 65535, "web.port", "be 0 or a port up to 65535", config.web.port)
    if config.judge.backend == "openai":
        rule = "be the URL of an OpenAI-compatible endpoint when judge.backend is openai"
        _require(config.judge.base_url.startswith(("http://", "https://")), "judge.base_url", rule, config.judge.base_url)


def _check_providers(config: Config) -> None:
    search, visit, summarizer = config.tools.search, config.tools.visit, config.tools.visit.summarizer
    for section, service, asks_none in (("search", search, search.backend == "index"), ("visit", visit, visit.backend == "direct")):
        for name in ("url", "requests_per_s", "usd_per_1000") if asks_none else ():
            rule = f"be unset when tools.{section}.backend is {service.backend}, which asks no service"
            _require(not getattr(service, name), f"tools.{section}.{name}", rule, getattr(service, name))
    if search.backend in ("brave", "tavily"):
        _limit(search.top_k, "tools.search.top_k", 20, f"what {search.backend} gives")
    if search.backend == "searxng":
        _require(bool(search.url), "tools.search.url", "be the origin of the instance when tools.search.backend is searxng", search.url)
    if search.backend == "index":
        _require(
            bool(search.index), "tools.search.index", "name the folder of a built web when tools.search.backend is index", search.index
        )
    if summarizer.backend == "engine":
        rule = "be vllm when tools.visit.summarizer.backend is engine, as the judges' engines are what it asks"
        _require(config.judge.backend == "vllm", "judge.backend", rule, config.judge.backend)
    if summarizer.backend == "openai":
        rule = "be the URL of an OpenAI-compatible endpoint, without credentials, when the summarizer's backend is openai"
        _require(bool(_ENDPOINT.fullmatch(summarizer.base_url)), "tools.visit.summarizer.base_url", rule, summarizer.base_url)


def _check_teacher(config: Config) -> None:
    sample = config.sample
    _check_llm("sample.llm", sample.llm)
    _check_llm("sample.quality.llm", sample.quality.llm)
    rule = "name the teacher's endpoint when sample.backend is openai"
    _require(sample.backend != "openai" or bool(sample.llm.base_url), "sample.llm.base_url", rule, sample.llm.base_url)
    rule = f"be at most sample.attempts ({sample.attempts})"
    _require(sample.accepted_per_question <= sample.attempts, "sample.accepted_per_question", rule, sample.accepted_per_question)
    most, least = sample.quality.max_actions, sample.quality.min_actions
    _require(most == 0 or most >= least, "sample.quality.max_actions", f"be 0 or at least sample.quality.min_actions ({least})", most)


def _check_tokens(config: Config) -> None:
    longest = config.episode.max_tokens
    _limit(config.episode.max_turn_tokens, "episode.max_turn_tokens", longest, "episode.max_tokens")
    _limit(config.reward.overlong_buffer_tokens, "reward.overlong_buffer_tokens", longest, "episode.max_tokens")
    rule = f"be at least episode.max_tokens ({longest}), or the longest episode would not fit"
    if config.learner.too_long == "error":
        _require(config.learner.token_budget >= longest, "learner.token_budget", rule, config.learner.token_budget)
    _require(config.sft.batch_tokens >= longest, "sft.batch_tokens", rule, config.sft.batch_tokens)
    weights = config.reward.format_weight + config.reward.answer_weight
    _require(abs(weights - 1.0) < 1e-9, "reward", "have format_weight and answer_weight that add up to 1", weights)


def _check_synthesis(config: Config) -> None:
    synthesis = config.synthesis
    shares = synthesis.hop_shares
    fine = len(shares) in (3, 4) and all(share >= 0 for share in shares) and abs(sum(shares) - 1.0) < 1e-6
    _require(fine, "synthesis.hop_shares", "be three or four shares, of 1 to 4 hops, that add up to 1", shares)
    _limit(synthesis.near_duplicate, "synthesis.near_duplicate", 1, "1")
    for root in synthesis.roots:
        _require(bool(_ENDPOINT.fullmatch(root)), "synthesis.roots", "hold URLs that begin with http:// or https://", root)
    _check_llm("synthesis.llm", synthesis.llm)
    needs = "synthesis.seeds" if synthesis.seeds else "synthesis.closed_book_attempts" if synthesis.closed_book_attempts else ""
    rule = f"be the URL of an OpenAI-compatible endpoint for {needs}"
    _require(not needs or bool(synthesis.llm.base_url), "synthesis.llm.base_url", rule, synthesis.llm.base_url)


def _check_llm(section: str, llm: LlmConfig) -> None:
    rule = "be the URL of an OpenAI-compatible endpoint, without credentials, or empty"
    _require(not llm.base_url or bool(_ENDPOINT.fullmatch(llm.base_url)), f"{section}.base_url", rule, llm.base_url)
    _limit(llm.max_concurrent, f"{section}.max_concurrent", 32, "the connections to one origin")


def _check_shared_gpus(config: Config) -> None:
    """An engine that sleeps gives up weights, keys and values, and its requests stand still."""
    rollout, engine, ranks, nodes = config.rollout, config.engine, config.learner.num_ranks, config.cluster.rollout_nodes
    rules: list[tuple[bool, str, str, Any]] = [
        (rollout.max_staleness == 0, "rollout.max_staleness", "be 0, as nothing is rolled out beside a step,", rollout.max_staleness),
        (rollout.num_workers <= ranks, "rollout.num_workers", f"be at most learner.num_ranks ({ranks})", rollout.num_workers),
        (engine.tensor_parallel_size == 1, "engine.tensor_parallel_size", "be 1", engine.tensor_parallel_size),
        (engine.kv_cache_on_update == "clear", "engine.kv_cache_on_update", "be clear", engine.kv_cache_on_update),
        (rollout.weights.backend != "nccl", "rollout.weights.backend", "be ipc or file", rollout.weights.backend),
        (not nodes, "cluster.rollout_nodes", "be empty, as engines are where the learner is,", nodes),
    ]
    for holds, key, rule, value in rules:
        _require(holds, key, f"{rule} where cluster.shared_gpus is true", value)


def _check_rollout(config: Config) -> None:
    rollout, rl, weights = config.rollout, config.rl, config.rollout.weights
    groups, size = rollout.groups_per_step, rollout.group_size
    _require(size >= 2, "rollout.group_size", "be at least 2, as an advantage is relative to the group", size)
    rollouts = groups * size
    rule = f"divide the rollouts of a batch, rollout.groups_per_step * rollout.group_size ({rollouts})"
    _require(rollouts % rl.minibatches == 0, "rl.minibatches", rule, rl.minibatches)
    share, ranks = rollouts // rl.minibatches, config.learner.num_ranks
    rule = f"be at most the rollouts of a mini-batch ({share}), or a rank would have nothing to do in every optimizer step"
    _require(ranks <= share, "learner.num_ranks", rule, ranks)
    _require(rollout.temperature > 0, "rollout.temperature", "be positive, as equal rollouts teach nothing", rollout.temperature)
    rule = "be false when rollout.dynamic_sampling is false, as every group is trained whole then"
    _require(not rollout.staged_groups or rollout.dynamic_sampling, "rollout.staged_groups", rule, rollout.staged_groups)
    admitted = rollout.max_admitted_per_step
    rule = f"be 0 or at least rollout.groups_per_step ({groups})"
    _require(admitted == 0 or admitted >= groups, "rollout.max_admitted_per_step", rule, admitted)
    _limit(weights.canary_mean, "rollout.weights.canary_mean", weights.canary_max, "rollout.weights.canary_max")
    if config.model.dtype == "float32":
        _limit(weights.canary_max, "rollout.weights.canary_max", 1e-3, "the bound for float32")
    _require(rl.tis_cap >= 1, "rl.tis_cap", "be at least 1", rl.tis_cap)
    if rl.loss == "dapo":
        _require(rl.dual_clip > 1 + rl.clip_high, "rl.dual_clip", f"be above 1 + rl.clip_high ({1 + rl.clip_high:g})", rl.dual_clip)
    _limit(config.sft.optimizer.lr, "sft.optimizer.lr", 1, "1")
    _limit(rl.optimizer.lr, "rl.optimizer.lr", 1, "1")
