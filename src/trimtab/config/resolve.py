"""What the configuration of a run names, found once: its model, its plan, and what it leaves to the machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from trimtab.config.run import RunConfig
from trimtab.config.start_from import attach_stored, trains_base
from trimtab.errors import ConfigError, PlanError
from trimtab.machine import best_precision
from trimtab.models.load import empty_model, load_tokenizer
from trimtab.models.locate import Source, locate
from trimtab.models.new_tokens import rule_for
from trimtab.models.positions import Positions, positions_of
from trimtab.surgery.attach import attach
from trimtab.surgery.attach_report import AttachReport
from trimtab.surgery.plan import Plan, Rule

LONGEST_ROW = 1024
"""Tokens of a row, where nothing is said of them."""


@dataclass(frozen=True)
class Job:
    """A run's configuration and all that follows from it before anything is read.

    Attributes:
        config: as it was read.
        source: where the model comes from.
        plan: its rules, checked, without the one about added tokens; None: the adapter that it begins from says them.
        precision: ``bfloat16`` or ``float32``, in which the run computes on this machine.
        dtype: that of the frozen weights.
    """

    config: RunConfig
    source: Source
    plan: Plan | None
    precision: str
    dtype: torch.dtype

    @classmethod
    def of(cls, config: RunConfig) -> Job:
        """Resolve ``config``. Raises ModelError for a model that is not there, PlanError, which names the rule, for a
        plan that cannot be."""
        precision = precision_of(config)
        dtype = precision if config.model.dtype == "auto" else config.model.dtype
        return cls(config, source_of(config), plan_of(config), precision, getattr(torch, dtype))

    @cached_property
    def positions(self) -> Positions:
        """How long a text the model can read."""
        return positions_of(self._empty)

    @property
    def embedding_rows(self) -> int:
        """How many tokens the model knows, added ones included."""
        return len(self._empty.get_input_embeddings().weight)

    @cached_property
    def _empty(self) -> Any:
        return empty_model(self.source)

    @cached_property
    def max_length(self) -> int:
        """Most tokens of a training row. Raises ConfigError if ``data.max_length`` is more than the model can read."""
        said, table = self.config.data.max_length, self.positions.table
        if said == "auto":
            return min(LONGEST_ROW, table or LONGEST_ROW)
        if table is not None and said > table:
            raise ConfigError(
                f"data.max_length: {said} tokens, but {self.config.model.name} has a table of {table} positions and "
                f"cannot read beyond it. Set it to {table} or less, or leave it out: rows are then cut to that"
            )
        return said

    @property
    def reading_length(self) -> int | None:
        """Most tokens of a row that is evaluated: what the model was made for, and no less than it is trained on; None
        for no limit."""
        limit = self.positions.limit()
        return limit if limit is None else max(limit, self.max_length)

    def attach_to(self, model: Any) -> AttachReport:
        """Attach what the run trains to ``model``: its plan with a rule for the rows of added tokens, or the adapter
        that it begins from.

        Raises PlanError or AdapterError for a plan or an adapter that is not of this model.
        """
        tokens = self.source.add_tokens
        more = Rule(**rule_for(model, load_tokenizer(self.source), tokens)) if tokens else None
        if self.config.adapter is not None:
            return attach_stored(model, self.config.adapter, self.plan, more)
        assert self.plan is not None, "a configuration has a plan or an adapter"
        return attach(model, self.plan if more is None else Plan([*self.plan.rules, more]))

    @property
    def trains_base(self) -> bool:
        """Whether tensors of the model itself are trained."""
        if self.plan is None:
            return self.config.adapter is not None and trains_base(self.config.adapter)
        return any(rule.method_class.trains_base for rule in self.plan.rules)


def source_of(config: RunConfig) -> Source:
    """Where the model of ``config`` comes from."""
    said = config.model
    source = locate(said.name, revision=said.revision, trust_remote_code=said.trust_remote_code)
    return replace(source, add_tokens=said.add_tokens, chat_template=said.chat_template or "")


def plan_of(config: RunConfig) -> Plan | None:
    """The plan of ``config``, if it says one. Raises PlanError, which names the rule, for one that cannot be."""
    if config.plan is None:
        return None
    rules = []
    for number, said in enumerate(config.plan):
        try:
            rules.append(Rule(**said))
        except PlanError as error:
            raise PlanError(f"plan.{number}: {error}") from None
    return Plan(rules)


def precision_of(config: RunConfig) -> str:
    """``bfloat16`` or ``float32``: what a run of ``config`` computes in on this machine."""
    return best_precision() if config.train.precision == "auto" else config.train.precision
