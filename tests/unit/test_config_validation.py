"""Every rule across fields: what breaks it is named; what the edges allow passes."""

from __future__ import annotations

import pytest

from webdancer.config import load
from webdancer.config_loading import leaves
from webdancer.config_validation import BELOW_ONE, CHOICES, FRACTIONS, MAY_BE_ZERO
from webdancer.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["rollout.group_size=1"], "rollout.group_size"),
        (["rollout.num_workers=0"], "rollout.num_workers"),
        (["rollout.temperature=0"], "rollout.temperature"),
        (["rollout.max_staleness=-1"], "rollout.max_staleness"),
        (["rollout.groups_per_step=2", "rollout.group_size=2", "rl.minibatches=5"], "rl.minibatches"),
        (["rollout.max_admitted_per_step=3"], "rollout.max_admitted_per_step"),
        (["rollout.refill=resampel"], "rollout.refill"),
        (["cluster.shared_gpus=true", "rollout.max_staleness=1"], "rollout.max_staleness"),
        (["cluster.shared_gpus=true", "rollout.num_workers=9"], "rollout.num_workers"),
        (["cluster.shared_gpus=true", "engine.tensor_parallel_size=2"], "engine.tensor_parallel_size"),
        (["cluster.shared_gpus=true", "engine.kv_cache_on_update=keep"], "engine.kv_cache_on_update"),
        (["cluster.shared_gpus=true", "rollout.weights.backend=nccl"], "rollout.weights.backend"),
        (["cluster.shared_gpus=true", "cluster.rollout_nodes=a=b"], "cluster.rollout_nodes"),
        (["rollout.staged_groups=true", "rollout.dynamic_sampling=false"], "rollout.staged_groups"),
        (["episode.max_tokens=40000"], "learner.token_budget"),
        (["episode.max_turn_tokens=40000"], "episode.max_turn_tokens"),
        (["sft.batch_tokens=100"], "sft.batch_tokens"),
        (["reward.format_weight=0.2"], "reward"),
        (["prompt.style=short"], "prompt.style"),
        (["prompt.current_date=tomorrow"], "prompt.current_date"),
        (["tools.search.backend=bing"], "tools.search.backend"),
        (["prompt.more_tools={"], "prompt.more_tools"),
        (['prompt.more_tools=\'{"description": "no name"}\''], "prompt.more_tools"),
        (["tools.search.url=127.0.0.1:80"], "tools.search.url"),
        (["tools.search.backend=brave", "tools.search.top_k=21"], "tools.search.top_k"),
        (["tools.search.backend=searxng"], "tools.search.url"),
        (["tools.search.backend=index"], "tools.search.index"),
        (["tools.visit.backend=lynx"], "tools.visit.backend"),
        (["tools.visit.url=http://host/path"], "tools.visit.url"),
        (["tools.visit.summarizer.backend=best"], "tools.visit.summarizer.backend"),
        (["tools.visit.summarizer.backend=openai"], "tools.visit.summarizer.base_url"),
        (["tools.visit.summarizer.backend=engine"], "judge.backend"),
        (["tools.visit.url=http://10.0.0.5:80"], "tools.visit.url"),
        (["tools.visit.usd_per_1000=1"], "tools.visit.usd_per_1000"),
        (["tools.search.backend=index", "tools.search.index=/x", "tools.search.requests_per_s=5"], "tools.search.requests_per_s"),
        (
            ["tools.visit.summarizer.backend=openai", "tools.visit.summarizer.base_url=http://u:p@host/v1"],
            "tools.visit.summarizer.base_url",
        ),
        (["tools.visit.site=http://host/path"], "tools.visit.site"),
        (["tools.fetch.allowed_origins=['']"], "tools.fetch.allowed_origins"),
        (["tools.fetch.allowed_ports=[0]"], "tools.fetch.allowed_ports"),
        (["judge.backend=openai"], "judge.base_url"),
        (["rl.optimizer.schedule=linear"], "rl.optimizer.schedule"),
        (["rl.optimizer.lr=nan"], "rl.optimizer.lr"),
        (["rl.optimizer.lr=2"], "rl.optimizer.lr"),
        (["sft.validation_fraction=1.0"], "sft.validation_fraction"),
        (["engine.gpu_memory_utilization=1.1"], "engine.gpu_memory_utilization"),
        (["evaluation.top_p=0"], "evaluation.top_p"),
        (["web.port=70000"], "web.port"),
        (["cluster.address=head"], "cluster.address"),
        (["cluster.tool_nodes=web"], "cluster.tool_nodes"),
        (["telemetry.wandb_mode=on"], "telemetry.wandb_mode"),
        (["rollout.weights.canary_mean=1", "rollout.weights.canary_max=0.5"], "rollout.weights.canary_mean"),
        (["model.dtype=float32", "rollout.weights.canary_max=0.5"], "rollout.weights.canary_max"),
        (["rl.dual_clip=1.2"], "rl.dual_clip"),
        (["rl.tis_cap=0.5"], "rl.tis_cap"),
        (["rl.clip_low=1.1"], "rl.clip_low"),
        (["rl.loss=gspo"], "rl.loss"),
        (["rl.proximal=old"], "rl.proximal"),
        (["learner.too_long=cut"], "learner.too_long"),
        (["learner.too_long=drop", "learner.token_budget=0"], "learner.token_budget"),
        (["synthesis.hop_shares=[0.5,0.5]"], "synthesis.hop_shares"),
        (["sample.teacher.repeat=1.5"], "sample.teacher.repeat"),
        (["name=a/b"], "name"),
        (["name="], "name"),
        (["run_dir=' '"], "run_dir"),
    ],
)
def test_a_broken_rule_names_its_field(overrides, field):
    with pytest.raises(ConfigError, match=rf"^{field}: must .*, got "):
        load([], overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.groups_per_step=2", "rollout.group_size=2", "rl.minibatches=4", "learner.num_ranks=1"],
        ["rl.evaluate_every=0", "sample.max_demonstrations=0", "web.port=0", "rollout.max_staleness=0"],
        ["judge.backend=openai", "judge.base_url=https://judge.example/v1"],
        ["cluster.address=10.0.0.1:6379"],
        ["cluster.address=auto"],
        ["cluster.shared_gpus=true", "rollout.weights.backend=ipc"],
        ["cluster.rollout_nodes=ray.io/accelerator-type=H100"],
        ["tools.fetch.allowed_origins=[http://127.0.0.1:8080]", "tools.search.url=http://[::1]:9000"],
        ["model.dtype=bfloat16", "rollout.weights.canary_max=0.5"],
        ["rl.loss=cispo", "rl.clip_low=1", "rl.clip_high=20"],
        ["learner.too_long=drop", "learner.token_budget=1000"],
    ],
)
def test_what_the_edges_allow_passes(overrides):
    load([], overrides)


def test_the_tables_of_rules_name_keys_that_exist():
    known = set(leaves(load()))
    assert set(CHOICES) <= known
    assert set(FRACTIONS) | set(BELOW_ONE) <= known
    assert known >= MAY_BE_ZERO


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sample.backend=openai", "sample.llm.base_url: must name the teacher's endpoint when sample.backend is openai, got ''"),
        ("sample.llm.base_url=http://user:key@host/v1", "sample.llm.base_url: must be the URL of an OpenAI-compatible endpoint"),
        ("sample.quality.llm.base_url=host:8000", "sample.quality.llm.base_url: must be the URL of an OpenAI-compatible endpoint"),
        ("sample.accepted_per_question=6", "sample.accepted_per_question: must be at most sample.attempts (5), got 6"),
        ("sample.quality.max_actions=1", "sample.quality.max_actions: must be 0 or at least sample.quality.min_actions (2), got 1"),
        ("sample.quality.min_actions=0", "sample.quality.min_actions: must be positive, got 0"),
        ("sample.keep=good", "sample.keep: must be one of all, valid, correct, quality, got 'good'"),
        ("sample.teacher.malform=1.5", "sample.teacher.malform: must be at most 1, got 1.5"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        load([], [override])
    assert message in str(error.value)
