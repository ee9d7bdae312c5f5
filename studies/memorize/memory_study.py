"""What a memory study is told: its task, who takes part, and what each may try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.config.read import override, read_mapping, validated
from trimtab.errors import did_you_mean
from trimtab.machine import best_precision

SEARCH_SEED = 0
"""The seed of the search for a learning rate. The curves are of seeds 1, 2, ...: of pairs that the search never saw."""


@dataclass(frozen=True)
class Contender:
    """A method as it takes part in the study.

    Attributes:
        label: its name for people.
        method: its method's name.
        learning_rates: what its search tries, unless the study says otherwise.
        options: the method's own, without a rank.
    """

    label: str
    method: str
    learning_rates: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_budget(self) -> bool:
        """Whether its size follows a budget; full fine-tuning has the size it has."""
        return self.method != "full"


# Tried on one seed: LoRA learns nothing at 3e-2 (rank 4) and 1e-2 (rank 32), MoRA is quickest near 3e-2.
_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CONTENDERS: dict[str, Contender] = {
    "full": Contender("full fine-tuning", "full", (3e-4, 1e-3, 3e-3, 1e-2)),
    "lora": Contender("LoRA", "lora", _RATES),
    "dora": Contender("DoRA", "dora", _RATES),
    "mora-rotation": Contender("MoRA (rotation)", "mora", _RATES, {"form": "rotation"}),
    "mora-sharing": Contender("MoRA (sharing)", "mora", _RATES, {"form": "sharing"}),
    "mora-magnitude": Contender("MoRA + magnitude", "mora", _RATES, {"form": "rotation", "magnitude": True}),
}


@dataclass(frozen=True)
class Arm:
    """A contender at a budget: the rank of the LoRA that costs as much; None for full fine-tuning."""

    contender: str
    budget: int | None

    def __str__(self) -> str:
        return self.contender if self.budget is None else f"{self.contender}-rank{self.budget}"


@dataclass(frozen=True)
class MemoryCell:
    """An arm at a learning rate with a seed: what is trained in one go."""

    arm: Arm
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


class MemoryStudy(BaseModel):
    """What the study's YAML may say.

    The defaults are small, so that a cell takes a minute or two on two cores; all blocks, 10,000 pairs and 32 digits
    would be nearer to the paper.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("smollm2-135m", description="As in a run's YAML: a name, a folder, a .gguf file, a hub id.")
    blocks: int | None = Field(2, ge=1, description="Keep this many of the model's first blocks; null: all.")
    pairs: int = Field(128, ge=1, description="How many pairs are to be memorised.")
    digits: int = Field(8, ge=1, description="Hexadecimal digits of a key, and of a value.")
    batch_size: int = Field(32, ge=1, description="Pairs in a step.")
    steps: int = Field(400, ge=1, description="Optimiser steps of a cell.")
    warmup: int = Field(20, ge=1, description="Steps over which the learning rate rises; then it stays.")
    evaluate_every: int = Field(20, ge=1, description="Steps between two points of a curve.")
    precision: Literal["bfloat16", "float32"] = Field(
        default_factory=best_precision, description="Of the frozen weights. Default: what is fast on this machine."
    )
    methods: tuple[str, ...] = Field(tuple(CONTENDERS), description="Who takes part.")
    budgets: tuple[int, ...] = Field((4, 32), description="Ranks of the LoRA that costs as much.")
    seeds: int = Field(3, ge=1, description="Curves of each arm.")
    learning_rates: tuple[float, ...] | None = Field(
        None, description="What every method's search tries; null: four of its own."
    )
    output: str = Field(
        "results", min_length=1, exclude=True, description="The study's folder, relative to the YAML's."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in self.methods:
            if name not in CONTENDERS:
                raise ValueError(
                    f"methods: unknown '{name}': expected some of {', '.join(CONTENDERS)}."
                    f"{did_you_mean(name, CONTENDERS)}"
                )
        for key in ("methods", "budgets", "learning_rates"):
            said = getattr(self, key)
            if said is not None and not said:
                raise ValueError(f"{key}: expected at least one")
            if said is not None and len(set(said)) < len(said):
                raise ValueError(f"{key}: expected each one once, got {', '.join(map(str, said))}")
        if any(rank < 1 for rank in self.budgets):
            raise ValueError(f"budgets: expected ranks of at least 1, got {', '.join(map(str, self.budgets))}")
        if any(not 0 < rate < float("inf") for rate in self.learning_rates or ()):
            raise ValueError("learning_rates: expected numbers above 0")
        if self.batch_size > self.pairs:
            raise ValueError(f"batch_size: {self.batch_size} is more than there are pairs ({self.pairs})")
        return self

    @property
    def task(self) -> dict[str, Any]:
        """What all cells share. Cells of another task cannot stand beside them; more methods, budgets, learning rates
        and seeds can."""
        return self.model_dump(exclude={"methods", "budgets", "seeds", "learning_rates"})

    @property
    def arms(self) -> list[Arm]:
        """Every contender at every budget, the one without a budget once."""
        arms = [
            Arm(name, budget if CONTENDERS[name].has_budget else None)
            for budget in self.budgets
            for name in self.methods
        ]
        return list(dict.fromkeys(arms))

    def candidates(self, arm: Arm) -> list[MemoryCell]:
        """The cells of the search for the arm's learning rate."""
        rates = self.learning_rates or CONTENDERS[arm.contender].learning_rates
        return [MemoryCell(arm, rate, SEARCH_SEED) for rate in rates]

    def curves(self, arm: Arm, learning_rate: float) -> list[MemoryCell]:
        """The cells that count."""
        return [MemoryCell(arm, learning_rate, SEARCH_SEED + number) for number in range(1, self.seeds + 1)]

    @property
    def size(self) -> int:
        """How many cells there are."""
        return sum(len(self.candidates(arm)) + self.seeds for arm in self.arms)


def load_memory_study(path: Path | str, overrides: Sequence[str] = ()) -> tuple[MemoryStudy, Path]:
    """Read the study's YAML with ``key=value`` in place of its settings; give the study and its folder.

    Paths in the file are relative to its folder, those in ``overrides`` to the working directory. Raises ConfigError:
    the file is missing or not YAML; a key is unknown; a value is not what it should be.
    """
    file = Path(path)
    raw = read_mapping(file, "'model:' and 'pairs:'")
    if isinstance(name := raw.get("model"), str) and name.startswith("."):
        raw["model"] = str((file.parent / name).resolve())
    overridden = [override(raw, text) for text in overrides]
    study = validated(MemoryStudy, raw, str(file), overridden)
    return study, file.parent / study.output
