"""The configuration tree: one dataclass per part of the system, one line of documentation per knob.

Each class takes its own section; nothing receives the whole tree but the programs in `runs/` and `cluster/launch`.
`load` merges defaults < YAML files < `key=value` overrides and validates; every error names the field, the rule and the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from webdancer.config_data import LlmConfig as LlmConfig
from webdancer.config_data import QualityConfig as QualityConfig
from webdancer.config_data import SampleConfig as SampleConfig
from webdancer.config_data import TeacherConfig as TeacherConfig
from webdancer.config_tools import FetchConfig as FetchConfig
from webdancer.config_tools import PoliteConfig as PoliteConfig
from webdancer.config_tools import ReplayConfig as ReplayConfig
from webdancer.config_tools import SearchConfig as SearchConfig
from webdancer.config_tools import SummarizerConfig as SummarizerConfig
from webdancer.config_tools import ToolsConfig as ToolsConfig
from webdancer.config_tools import VisitConfig as VisitConfig


@dataclass(kw_only=True)
class LoraConfig:
    """Train low-rank adapters beside frozen layers instead of all weights; exports and engines get them merged."""

    rank: int = 0
    """0: no LoRA, all weights train."""
    alpha: int = 32
    """An adapter's output counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    """Linear layers of the decoder, by name, that get one."""


@dataclass(kw_only=True)
class ModelConfig:
    path: str = "Qwen/Qwen2.5-7B-Instruct"
    """Hugging Face id, local directory, or `builtin:tiny` for the shipped tiny base model."""
    dtype: str = "bfloat16"
    """float32 | bfloat16: compute type of learner and engines; master weights are always float32."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(kw_only=True)
class PromptConfig:
    style: str = "released"
    """released: the authors' system prompt and tool block. brief: one line, no schemas (for the tiny model)."""
    current_date: str = ""
    """YYYY-MM-DD in the released prompt; empty: today."""
    more_tools: str = ""
    """JSON schemas of tools besides search and visit, separated by commas, for the released prompt's tool block."""
    tools: bool = True
    """false: the prompt names no tool and asks for an answer at once (evaluation.method direct and rag)."""


@dataclass(kw_only=True)
class EpisodeConfig:
    max_turns: int = 50
    """Model calls in an episode, the forced answer not counted (paper App. E.3: 50)."""
    max_tool_calls: int = 50
    max_tokens: int = 32768
    """Context length: prompt, policy and observation tokens together."""
    max_turn_tokens: int = 8192
    """Policy tokens in one turn."""
    max_malformed: int = 3
    """Malformed actions in a row that end an episode."""
    timeout_s: float = 1800.0
    """An older episode begins neither a turn nor a tool call; what runs then has its own time."""
    turn_timeout_s: float = 900.0
    """A model call that takes longer, queue and weight updates included, is the engine's fault: the turn is done again elsewhere."""
    tool_timeout_s: float = 120.0


@dataclass(kw_only=True)
class RewardConfig:
    format_weight: float = 0.1
    answer_weight: float = 0.9
    overlong_buffer_tokens: int = 0
    """Soft overlong penalty (DAPO Eq. 13) over the last so many of episode.max_tokens policy tokens; 0: off, as in the paper."""


@dataclass(kw_only=True)
class EngineConfig:
    threads: int = 1
    """OpenMP threads of one engine on CPU."""
    kv_cache_gib: float = 1.0
    """KV cache of one engine on CPU, GiB."""
    gpu_memory_utilization: float = 0.85
    tensor_parallel_size: int = 1
    max_num_seqs: int = 64
    """Sequences that decode together."""
    kv_cache_on_update: str = "clear"
    """Keys and values of running requests when new weights arrive. clear: computed anew, exact. keep: faster, a mixture of versions."""
    seed: int = 0
    """Seeds sampling, together with the run's seed and the worker's name."""


@dataclass(kw_only=True)
class JudgeConfig:
    backend: str = "match"
    """match: exact, of text with aliases, numbers, dates and lists; offline. openai: a model behind an OpenAI-compatible endpoint.
    vllm: a model on engines of the cluster, one in each judge actor."""
    base_url: str = ""
    """openai: what stands before /chat/completions."""
    model: str = "Qwen/Qwen2.5-72B-Instruct"
    prompt: str = "auto"
    """auto: that of the question's benchmark, else hle. Or for all: hle, equivalence, browsecomp, simpleqa, xbench."""
    num_servers: int = 2
    """Judge actors; they share max_concurrent and requests_per_s evenly."""
    max_concurrent: int = 64
    """Requests in flight."""
    requests_per_s: float = 0.0
    """0: as fast as they come."""
    max_attempts: int = 3
    """Of a request that fails, or whose reply holds no verdict; then the verdict is unknown, never wrong."""
    max_reply_tokens: int = 1024
    """A reply that is cut there is no verdict; a reasoning judge thinks before it gives one, and needs several times as many."""
    timeout_s: float = 60.0
    usd_per_million_prompt: float = 0.0
    """Price of a million prompt tokens; judges spend from tools.budget_usd, as everything that is priced."""
    usd_per_million_completion: float = 0.0
    cache_entries: int = 20_000
    """Verdicts that an actor remembers, by question, gold, answer and judge."""
    context_tokens: int = 16384
    """vllm: context length of the engine."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """vllm: the engine."""


@dataclass(kw_only=True)
class WeightSyncConfig:
    backend: str = "file"
    """file: safetensors by layer group, works everywhere. nccl: to engines on GPUs of their own. ipc: to engines on the learner's GPUs."""
    directory: str = ""
    """Where they are written; empty: /dev/shm where it exists and has room, else the run directory."""
    canary_mean: float = 1e-5
    """Largest mean |log p engine - log p learner| on the probe; float32. bfloat16 needs a looser bound."""
    canary_max: float = 1e-3
    timeout_s: float = 600.0


@dataclass(kw_only=True)
class RolloutConfig:
    num_workers: int = 8
    """Rollout workers: one actor and one engine each."""
    groups_per_step: int = 64
    """P: groups in a training batch (DAPO: prompts a step)."""
    group_size: int = 16
    """G: rollouts a question (paper: 16)."""
    max_staleness: int = 0
    """Learner versions a trained group may be behind. 0: synchronous DAPO."""
    dynamic_sampling: bool = True
    """Groups whose members all agree are dropped and replaced (DAPO). false: they are trained on as well (GRPO)."""
    refill: str = "resample"
    """resample: other questions replace dropped groups. duplicate: kept groups of the same batch do (WebSailor's DUPO)."""
    curriculum: bool = False
    """Questions are asked as often as their group is likely to be mixed, by what was seen of them (rollout/curriculum.py)."""
    staged_groups: bool = False
    """A group starts with a few members where the rest may not be worth it, and goes on unless they agree (rollout/stages.py)."""
    temperature: float = 1.0
    episodes_per_worker: int = 0
    """Episodes in flight in one worker; 0: what its engine has room for, found out while it runs (inference/concurrency.py)."""
    max_lost: int = 3
    """Times a lost episode is run again before its member counts as invalid."""
    max_admitted_per_step: int = 0
    """Groups admitted for one batch before the run stops for want of mixed ones; 0: 10 x groups_per_step (as verl does)."""
    stall_timeout_s: float = 3600.0
    """No finished episode for so long ends the run and names the stage."""
    start_timeout_s: float = 900.0
    """For an engine to load its model, downloads and the wait for a free node included."""
    heartbeat_timeout_s: float = 60.0
    """A worker that says nothing for so long, not even that it lives, is replaced. At least 10: a heartbeat comes every 5 s."""
    drain_timeout_s: float = 120.0
    """For the turns that run in a worker that is to leave (`webdancer scale`); what is cut off is done again elsewhere."""
    weights: WeightSyncConfig = field(default_factory=WeightSyncConfig)


@dataclass(kw_only=True)
class OptimizerConfig:
    lr: float = 1e-6
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: str = "constant"
    """constant | cosine (to zero over the planned optimizer steps)."""


@dataclass(kw_only=True)
class LearnerConfig:
    num_ranks: int = 8
    threads: int = 1
    """CPU threads of one rank."""
    token_budget: int = 32768
    """Tokens of one packed microbatch."""
    too_long: str = "error"
    """A sample of more tokens than token_budget. error: nothing is trained. drop: it is left out and counted (dropped_too_long)."""
    activation_checkpointing: bool = True
    """Keep a layer's input alone for the backward pass, and run the layer again there."""
    gpu_memory_gib: float = 0.0
    """What `webdancer plan` and every start check a rank's memory against; 0: this machine's GPU, or its free memory."""
    max_skipped_steps: int = 3
    """Updates in a row skipped for a non-finite loss or gradient before the run stops."""
    keep_checkpoints: int = 2
    timeout_s: float = 1800.0


@dataclass(kw_only=True)
class SftConfig:
    data: str = ""
    """Demonstrations, JSONL in the released layout; empty: what `sample` wrote into the run directory."""
    strict: bool = True
    """A demonstration that is not in the protocol is an error; false: it is trained on as it is (to see what the funnel is worth)."""
    epochs: int = 3
    batch_tokens: int = 262_144
    """Tokens of one optimizer step, about."""
    validation_fraction: float = 0.05
    save_every: int = 100
    """Optimizer steps between checkpoints; 0: only at the end."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6, schedule="cosine"))


@dataclass(kw_only=True)
class RlConfig:
    data: str = ""
    """Questions, JSONL in the released layout; empty: the run directory's RL pool."""
    num_steps: int = 50
    minibatches: int = 1
    """Optimizer steps a rollout batch."""
    loss: str = "dapo"
    """dapo | cispo (MiniMax-M1: clips the weight, never the gradient; its own bounds are clip_low 1 and a clip_high far above DAPO's)."""
    proximal: str = "recomputed"
    """What pi_old is. recomputed: the learner's own at the start of the batch, decoupled from the rollouts'. rollout: the rollouts'."""
    normalize_std: bool = True
    """Advantages divided by the group's standard deviation; false: R - mean (Dr. GRPO)."""
    evaluate_every: int = 10
    """Steps between evaluations on the held-out questions, if there are any; 0: only before and after."""
    save_every: int = 5
    """Steps between checkpoints; 0: only after the last one."""
    clip_low: float = 0.2
    """Ratios are clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.28
    dual_clip: float = 10.0
    """dapo: largest ratio for a negative advantage."""
    tis_cap: float = 2.0
    """recomputed: a token counts min(pi_old / pi_rollout, tis_cap) times."""
    drift_alarm: float = 0.05
    """Mean |log p rollout - log p learner| over the fresh tokens of a step (train/drift_0) above which the run says so."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(kw_only=True)
class SynthesisConfig:
    """Questions made from pages; SFT and RL pools share entities, never a question, and dev and held-out have entities of their own."""

    method: str = "crawlqa"
    """crawlqa: from linked pages. e2hqa: from simple questions, made harder round by round. `webdancer synthesize e2hqa` sets it."""
    roots: list[str] = field(default_factory=list)
    """URLs that the crawl starts from; it stays on their hosts. Empty: the front page of tools.visit.site, or of the offline web."""
    num_sft: int = 1800
    """Questions of 1, 2 and 3 hops offered to the teacher; e2hqa: all of them."""
    num_rl: int = 2400
    num_heldout: int = 300
    num_dev: int = 300
    hop_shares: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.3])
    """Of 1, 2, 3 and, if there is a fourth, 4 hops; sums to 1."""
    num_count: int = 100
    """COUNT questions added to the SFT pool, and as many INTERSECTION ones; held-out and dev get a third of that each."""
    max_rounds: int = 3
    """e2hqa: rounds of replacing an entity by a description; each question gets 1 to so many."""
    seeds: str = ""
    """e2hqa: simple questions, JSONL in the released layout, for a model to make harder; empty: facts of one page."""
    max_pages: int = 20_000
    """Budget of the crawl."""
    max_pages_per_site: int = 0
    """Of one host; 0: no bound of its own."""
    max_depth: int = 6
    """Links from a root."""
    near_duplicate: float = 0.8
    """Similarity (Jaccard, of runs of words) from which two pages, or two questions with the same answer, count as one; 0: none do."""
    evaluation_sets: list[str] = field(default_factory=list)
    """What no question may overlap with, 13 words in a row or a shorter question whole: files in the released layout, or benchmarks as
    NAME=FILE or NAME (docs/evaluation.md)."""
    closed_book_attempts: int = 0
    """Times that the model is asked a question without tools; one right answer, and the question is dropped. 0: it is not asked."""
    llm: LlmConfig = field(default_factory=LlmConfig)


@dataclass(kw_only=True)
class EvaluationConfig:
    benchmark: str = ""
    """Empty: held-out questions, one greedy and num_samples sampled episodes each. Or the name of a benchmark (docs/evaluation.md), in
    rounds; jsonl for any questions of one's own."""
    data: str = ""
    """A file (JSONL in the released layout; a benchmark's in its own), or of a benchmark owner/name of a Hugging Face data set or
    hf://datasets/owner/name/file. Empty: the offline web's held-out split, or where the benchmark is published."""
    method: str = "react"
    """react: the agent. direct: no tools, one answer. rag: the results of one search with the question in the prompt, one answer."""
    num_tasks: int = 0
    """0: all."""
    rounds: int = 3
    """Benchmark: episodes a question."""
    num_samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    repetition_penalty: float = 0.0
    """0: as in the paper, 1.1 for a model whose chat template opens a <think> block and 1.0 for any other in a benchmark; held-out
    questions 1.0."""


@dataclass(kw_only=True)
class WebConfig:
    """The offline web: a seeded encyclopedia; see offline_web/."""

    seed: int = 0
    num_entities: int = 5800
    port: int = 0
    """0: a free one."""


@dataclass(kw_only=True)
class ClusterConfig:
    address: str = "local"
    """local: start Ray here. auto or host:port: join a running cluster."""
    num_cpus: int = 0
    """Logical CPUs of a local Ray; 0: enough for the actors of the run."""
    object_store_mib: int = 256
    """Object store of a local Ray."""
    rollout_nodes: str = ""
    """Rollout workers go to nodes with this label (`ray start --labels key=value`): key=value. Empty: any, and the same below."""
    learner_nodes: str = ""
    tool_nodes: str = ""
    """Tools, and judges without an engine. Empty: Ray takes nodes without GPUs first."""
    shared_gpus: bool = False
    """Engines on the learner's GPUs, one on a rank's, which sleep while it works. false: GPUs of their own, if there are enough."""


@dataclass(kw_only=True)
class TelemetryConfig:
    wandb_mode: str = "offline"
    """offline | online | disabled."""
    wandb_project: str = "webdancer"
    record_token_ids: bool = False
    """Token ids and loss masks in trajectories.jsonl, besides the text."""


@dataclass(kw_only=True)
class Config:
    name: str = "run"
    run_dir: str = "runs/${name}"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    web: WebConfig = field(default_factory=WebConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


def load(files: Sequence[Path | str] = (), overrides: Sequence[str] = ()) -> Config:
    """Defaults < YAML files, left to right < `key=value` overrides, validated; raises ConfigError. See config_loading."""
    from webdancer import config_loading  # it imports this module, and OmegaConf, which the dataclasses alone do not need

    return config_loading.load(files, overrides)
