"""What the configuration of a run names, found once: its model, its plan, and what it leaves to the machine."""

from __future__ import annotations

import glob
import sys
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch, fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trimtab.adapters.placing import read_adapter
from trimtab.adapters.store import OthersThereError, load_adapter
from trimtab.config.run import RunConfig
from trimtab.errors import ConfigError, PlanError
from trimtab.machine import best_precision, device
from trimtab.methods import Method, Options
from trimtab.models.heads import learn_in_units
from trimtab.models.load import beside_the_plan, empty_model
from trimtab.models.locate import ModelHead, Source, locate
from trimtab.models.model_files import ModelFiles
from trimtab.models.positions import Positions, positions_of, words_of
from trimtab.surgery.adapted import bare_modules
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
        files: of the model, and where it comes from; what is read of them is kept.
        plan: its rules, checked, without the one about added tokens; None: the adapter that it begins from says them.
        precision: ``bfloat16`` or ``float32``, in which the run computes on this machine.
        dtype: that of the frozen weights.
        task: the name of what the model is asked for; `trimtab.tasks.job_of` finds it where ``config`` says none.
    """

    config: RunConfig
    files: ModelFiles
    plan: Plan | None
    precision: str
    dtype: torch.dtype
    task: str = "causal_lm"

    @classmethod
    def of(cls, config: RunConfig) -> Job:
        """Resolve ``config``. Raises ModelError for a model that is not there, PlanError, which names the rule, for a
        plan that cannot be."""
        precision = precision_of(config)
        dtype = precision if config.model.dtype == "auto" else config.model.dtype
        return cls(config, ModelFiles(source_of(config)), plan_of(config), precision, getattr(torch, dtype))

    @property
    def source(self) -> Source:
        """Where the model comes from, and what it is read for."""
        return self.files.source

    @property
    def reader(self) -> Any:
        """What makes tensors of the run's rows: a tokenizer, or an image processor."""
        return self.files.reader

    @property
    def device(self) -> torch.device:
        """Where the run computes. Raises ModelError where that is not here."""
        return device(self.config.device)

    def computing_in(self, precision: str) -> Job:
        """The same run in ``precision``, where its configuration leaves that to us."""
        if self.config.train.precision != "auto":
            return self
        dtype = getattr(torch, precision) if self.config.model.dtype == "auto" else self.dtype
        return replace(self, precision=precision, dtype=dtype)

    def read_for(self, head: ModelHead) -> Job:
        """The same run of a model that is read for ``head``."""
        return replace(self, files=self.files.read_for(head))

    @cached_property
    def positions(self) -> Positions:
        """How long a text the model can read."""
        return positions_of(self._empty)

    @property
    def embedding_rows(self) -> int:
        """How many tokens the model knows, added ones included."""
        weight = getattr(words_of(self._empty), "weight", None)
        if weight is None:  # Perceiver gives something else, and Canine has no table: it reads any character
            return int(getattr(self._empty.config.get_text_config(), "vocab_size", sys.maxsize))
        return len(weight)

    @cached_property
    def _empty(self) -> Any:
        return empty_model(self.files)

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
        """Attach what the run trains to ``model``: its plan with rules for the rows of added tokens and for a head of
        its own, or the adapter that it begins from.

        Raises PlanError or AdapterError for a plan or an adapter that is not of this model.
        """
        beside, report = beside_the_plan(self.files, model, self._names), None
        if self.plan is not None:
            report = attach(model, [*self._rules_for(self.plan, model, beside.whole), *beside.rules])
        if self.config.adapter is not None:
            report = _begin_from(self.config.adapter, model, report, beside.rules)
        assert report is not None, "a configuration has a plan or an adapter"
        learn_in_units(model, beside.whole, self.source.head)
        return report

    @staticmethod
    def _rules_for(plan: Plan, model: Any, whole: Collection[str]) -> Sequence[Rule]:
        """The rules of ``plan``; where ``model`` has no linear layer but its head, ``all-linear`` means its
        convolutions, each with a rank that fits it."""
        layers = {name: module for name, module in model.named_modules() if name not in whole}
        convolutions = {name: module for name, module in layers.items() if isinstance(module, nn.Conv2d)}
        if not convolutions or any(isinstance(module, nn.Linear) for module in layers.values()):
            return plan.rules
        rules: list[Rule] = []
        for rule in plan.rules:
            if not rule.all_linear:
                rules.append(rule)
                continue
            by_options = defaultdict(list)
            for name, module in convolutions.items():
                shape = len(module.weight), module.weight[0].numel()
                by_options[rule.method_class.fitted(rule.options, shape)].append(glob.escape(name))
            said = rule.describe()
            rules += [Rule(**{**said, **options.said(), "match": names}) for options, names in by_options.items()]
        return rules

    def _names(self, module: str, others: Collection[str]) -> bool:
        """Whether a rule of the plan names ``module``, and none of the ``others`` by the same pattern: what becomes of
        it is then as the user says. ``*.dense`` means the layers of an encoder, and not a head that is drawn."""
        rules = self.plan.rules if self.plan is not None else ()
        last = module.rpartition(".")[2]
        mine = [one for rule in rules for one in rule.match if last in one and fnmatchcase(module, one)]
        return any(not any(fnmatchcase(other, one) for other in others) for one in mine)

    @cached_property
    def _methods(self) -> list[tuple[type[Method], Options]]:
        """Each method that is trained, with its options: those of the plan, else those of the adapter that it begins
        from."""
        if self.plan is None and self.config.adapter is not None:
            return [(entry.method_class, entry.options) for entry in read_adapter(self.config.adapter).values()]
        return [(rule.method_class, rule.options) for rule in (self.plan.rules if self.plan is not None else ())]

    @property
    def trains_base(self) -> bool:
        """Whether tensors of the model itself are trained."""
        return any(method.trains_base for method, _ in self._methods)

    @property
    def trains_magnitudes(self) -> bool:
        """Whether the magnitude of some weight is trained."""
        return any(getattr(options, "magnitude", False) for _, options in self._methods)


def _begin_from(name: str, model: nn.Module, planned: AttachReport | None, more: Sequence[Rule]) -> AttachReport:
    """Let ``model`` begin from the adapter ``name``, whose tensors are trained on. A model without weights, on the meta
    device, shows what would become of it.

    Args:
        planned: what the plan of the configuration has attached already; None: the adapter says it itself.
        more: rules besides, about modules that the adapter has to train, too.

    Raises:
        AdapterError: there is no such adapter, or it was made for another model.
        PlanError: the adapter is not what the plan, or a rule besides, says.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a model without weights
            stored = load_adapter(model, name)
    except OthersThereError as error:
        if planned is None:
            raise
        raise PlanError(
            f"plan: it says other than the adapter that the run begins from, {name} ({error.how}). Leave plan out, "
            "and it is the adapter's; or begin without adapter"
        ) from None
    if planned is not None:
        return planned
    trained = [known for module in stored.modules for known in (module.name, *module.aliases)]
    for rule in more:
        if not any(fnmatch(module, pattern) for module in trained for pattern in rule.match):
            raise PlanError(
                f"adapter: {name} does not train {', '.join(rule.match)}, which this run needs it to: the rows of "
                "model.add_tokens, or the head of its task. Begin from an adapter that was trained so, or without "
                "adapter"
            )
    return _shortened(model, stored)


def _shortened(model: nn.Module, report: AttachReport) -> AttachReport:
    """``report`` with a pattern for the modules of a rule, ``*.q_proj``, where it means them and no others."""
    known = {name for name, _ in bare_modules(model)}
    rules = []
    for number, rule in enumerate(report.rules, start=1):
        mine = {name for module in report.modules if module.rule == number for name in (module.name, *module.aliases)}
        patterns = sorted({f"*.{name.rpartition('.')[2]}" for name in mine})
        meant = {name for name in known if any(fnmatch(name, pattern) for pattern in patterns)}
        rules.append(rule.model_copy(update={"match": tuple(patterns)}) if meant == mine else rule)
    return replace(report, rules=tuple(rules))


def source_of(config: RunConfig, head: ModelHead | None = None) -> Source:
    """Where the model of ``config`` comes from, read for ``head``; by default as a causal language model."""
    said = config.model
    source = locate(said.name, revision=said.revision, trust_remote_code=said.trust_remote_code)
    languages = (said.source_language, said.target_language) if said.source_language and said.target_language else None
    source = replace(source, add_tokens=said.add_tokens, chat_template=said.chat_template or "", languages=languages)
    return source if head is None else replace(source, head=head)


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
    return best_precision(device(config.device)) if config.train.precision == "auto" else config.train.precision
