"""The cells of `benchmarks.findings`: which commands each one is. All are the quickstart's own settings but for what a cell is about.

A cell trains (or not) from the seed's warm start and is evaluated on the 300 questions; cells that only evaluate name whose model it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NUM_QUESTIONS = 300
NUM_SAMPLES = 3
RL_STEPS = 13
POOL = 2400
SHORT = 200
"""Demonstrations in the rows about short data; the quickstart has 900."""
SHORT_EPOCHS = ("sft.epochs=9",)
"""As many steps of SFT as 900 demonstrations get in 2 epochs; in 2 epochs of 200 the model learns no format, whatever they are."""
VERBOSE_TURN = "episode.max_turn_tokens=256"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`train`: rl or sft, or nothing. `model_of`: the cell whose model it starts from, or evaluates where it trains nothing."""

    name: str
    train: str = ""
    model_of: str = "warm"
    train_settings: tuple[str, ...] = ()
    evaluate_settings: tuple[str, ...] = ()
    alter: str = ""
    """all-tokens or no-correction: `benchmarks.altered_program`."""
    demonstrations: str = ""
    """Of an SFT cell: which of `benchmarks.findings_data`."""
    web_seed: int | None = None
    """Evaluated on `benchmarks.shaky_web` of this seed."""
    pool: str = ""
    """Of an RL cell: crawlqa, e2hqa, or both, 2,400 questions each; empty: the quickstart's pool, CRAWLQA with what the teacher left."""
    rollouts_of: str = ""
    """As many RL steps as come to this cell's number of rollouts."""


def rl(name: str, *settings: str, **others: str) -> Cell:
    return Cell(name=name, train="rl", train_settings=settings, **others)  # type: ignore[arg-type]  # all fields given so are strings


def sft(name: str, demonstrations: str, **others: Any) -> Cell:
    return Cell(name=name, train="sft", model_of="base", demonstrations=demonstrations, **others)


def at_temperature(temperature: float) -> Cell:
    return Cell(name=f"temperature_{temperature:g}", model_of="sft_rl", evaluate_settings=(f"evaluation.temperature={temperature:g}",))


CELLS = (
    Cell(name="sft"),
    rl("sft_rl"),
    # Asked for at least as many rollouts as SFT + RL has, although no group of it is mixed.
    rl("rl_only", "rollout.max_admitted_per_step=320", model_of="base"),
    rl("no_dynamic", "rollout.dynamic_sampling=false"),
    rl("no_dynamic_rollouts", "rollout.dynamic_sampling=false", rollouts_of="sft_rl"),
    rl("curriculum", "rollout.curriculum=true", "rollout.staged_groups=true"),
    rl("rl_all_tokens", "rl.tis_cap=1", alter="all-tokens"),
    sft("sft_all_tokens", "filtered", alter="all-tokens"),
    sft("filtered_short", "filtered_short", train_settings=SHORT_EPOCHS),
    sft("unfiltered_short", "unfiltered_short", train_settings=SHORT_EPOCHS),
    sft("unfiltered", "unfiltered"),
    at_temperature(0.3),
    at_temperature(0.6),
    rl("stale_1", "rollout.max_staleness=1"),
    rl("stale_4", "rollout.max_staleness=4"),
    rl("stale_1_uncorrected", "rollout.max_staleness=1", "rl.tis_cap=1", alter="no-correction"),
    rl("stale_4_clipped", "rollout.max_staleness=4", "rl.proximal=rollout"),
    rl("stale_4_uncorrected", "rollout.max_staleness=4", "rl.tis_cap=1", alter="no-correction"),
    *(Cell(name=f"web_{draw}", model_of="sft_rl", web_seed=draw, evaluate_settings=("evaluation.num_samples=1",)) for draw in (1, 2, 3)),
    rl("rl_crawlqa", pool="crawlqa"),
    rl("rl_e2hqa", "rollout.max_admitted_per_step=320", pool="e2hqa"),
    rl("rl_both_sets", pool="both"),
    Cell(name="sft_verbose", train="sft", model_of="base", demonstrations="verbose", evaluate_settings=(VERBOSE_TURN,)),
)
BY_NAME = {cell.name: cell for cell in CELLS}
