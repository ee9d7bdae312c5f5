"""What a configuration names, and what it leaves to the machine."""

from __future__ import annotations

from trimtab.config.run import RunConfig
from trimtab.errors import PlanError
from trimtab.machine import best_precision
from trimtab.models.locate import Source, resolve
from trimtab.surgery.plan import Plan, Rule


def source_of(config: RunConfig) -> Source:
    """Where the model of ``config`` comes from."""
    said = config.model
    return resolve(said.name, revision=said.revision, trust_remote_code=said.trust_remote_code)


def plan_of(config: RunConfig) -> Plan:
    """The plan of ``config``. Raises PlanError, which names the rule, for one that cannot be."""
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


def model_dtype_of(config: RunConfig) -> str:
    """The type of the frozen weights of a run of ``config`` on this machine."""
    return precision_of(config) if config.model.dtype == "auto" else config.model.dtype
