"""Runs that begin from an adapter that is there, and what becomes of them where it is gone, changed or another's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from run_fixtures import make_bare, two_blocks as model_folder
from stopped_runs import adapter_of, interrupt, metrics_of, signals_are_heard
from tiny_runs import Kept, rows, write_config, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.errors import AdapterError, ConfigError, PlanError, RunError
from trimtab.files import read_json
from trimtab.memory.described import describe_run
from trimtab.training.run import finetune

__all__ = ["model_folder", "signals_are_heard"]
pytestmark = pytest.mark.usefixtures("bare_runs")
MIXED = [
    {"match": "*.q_proj", "method": "mora", "rank": 4},
    {"match": ["*.up_proj", "*.down_proj"], "method": "dora", "rank": 2, "alpha": 4},
]


@pytest.fixture
def begun(make_yaml: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """A configuration with a test set, whose YAML says what the keywords say; ``plan`` None leaves it out."""
    import yaml

    test = str(write_rows(tmp_path / "test.jsonl", rows(9)))

    def make(name: str, plan: Any = None, overrides: tuple[str, ...] = (), **sections: Any) -> RunConfig:
        sections = {"data": {"test": {"one": test}}, **sections}
        file = make_yaml(name, plan=plan, **sections)
        said = yaml.safe_load(file.read_text())
        if plan is None:
            del said["plan"]
        file.write_text(yaml.safe_dump(said))
        return load_config(file, list(overrides))

    return make


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> RunConfig:
    """A finished run."""
    root = tmp_path_factory.mktemp("first")
    train, test = write_rows(root / "completion.jsonl", rows(24)), str(write_rows(root / "test.jsonl", rows(9)))
    said = {"plan": MIXED, "data": {"test": {"one": test}}, "train": {"epochs": 2}}
    config = load_config(write_config(root / "first.yaml", model_folder, train, **said))
    with pytest.MonkeyPatch.context() as patch:
        make_bare(patch)
        finetune(config)
    return config


def measured(config: RunConfig, stage: str) -> Any:
    return read_json(config.output / "evaluation" / f"one.{stage}.json")


def test_a_run_goes_on_from_what_was_learnt(begun: Callable[..., RunConfig], first: RunConfig) -> None:
    config = begun("second", adapter=str(first.output))
    assert config.plan is None
    listener = Kept()
    finetune(config, listener=listener)
    before, after = measured(config, "before"), measured(config, "after")
    ended = measured(first, "after")
    assert {key: before[key] for key in ("accuracy", "perplexity")} == {
        key: ended[key] for key in ("accuracy", "perplexity")
    }
    assert after["perplexity"] != before["perplexity"]
    one, other = adapter_of(first), adapter_of(config)
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    plan = read_json(config.output / "plan.json")
    assert [rule["match"] for rule in plan["rules"]] == ["*.q_proj", "*.down_proj, *.up_proj"]
    assert plan["trainable_parameters"] == read_json(first.output / "plan.json")["trainable_parameters"]
    summary = read_json(config.output / "summary.json")
    assert summary["began_from"]["adapter"] == str(first.output)
    assert len(summary["began_from"]["sha256"]) == 64
    assert any("begun from the adapter" in note for note in summary["notes"])


def test_the_same_plan_may_be_said_and_another_may_not(begun: Callable[..., RunConfig], first: RunConfig) -> None:
    same = begun("same", MIXED, adapter=str(first.output / "adapter"), train={"max_steps": 1})
    finetune(same)
    assert measured(same, "before")["perplexity"] == measured(first, "after")["perplexity"]
    for plan, wrong in (
        ([*MIXED, {"match": "*.v_proj", "method": "lora", "rank": 2}], "differ at 2 modules, such as .*v_proj"),
        ([MIXED[0], {**MIXED[1], "alpha": 8}], "differ at 4 modules"),
    ):
        other = begun(f"other-{len(plan)}", plan, adapter=str(first.output))
        with pytest.raises(PlanError, match=rf"plan: it says other than the adapter .*{wrong}.*Leave plan out"):
            finetune(other)
        with pytest.raises(PlanError, match="it says other than the adapter"):
            describe_run(Job.of(other), 64)  # as a run does before it reads a weight


def test_adapters_that_cannot_be_begun_from(begun: Callable[..., RunConfig], first: RunConfig, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", num_hidden_layers=1)
    narrow = write_model(tmp_path / "narrow", hidden_size=16)
    for model, wrong in ((small, "made for another model"), (narrow, "does not fit|made for another model")):
        config = begun("other", adapter=str(first.output), model={"name": str(model)})
        with pytest.raises(AdapterError, match=wrong):
            finetune(config)
        with pytest.raises(AdapterError, match=wrong):
            describe_run(Job.of(config), 64)
    with pytest.raises(AdapterError, match=r"nowhere: no such folder"):
        finetune(begun("other", adapter="./nowhere"))
    with pytest.raises(ConfigError, match=r"plan: expected a list of rules, got null"):
        begun("other", plan=[], overrides=("plan=null",))


def test_an_override_takes_the_place_of_the_default_plan(begun: Callable[..., RunConfig], first: RunConfig) -> None:
    config = begun("over", overrides=(f"adapter={first.output}",))
    assert config.plan is None
    described = describe_run(Job.of(config), 64)
    assert [rule["method"] for rule in described["rules"]] == ["mora", "dora"]
    assert load_config(_written(config)) == config


def _written(config: RunConfig) -> Path:
    from trimtab.config.read import to_yaml

    file = config.output.with_suffix(".again.yaml")
    file.write_text(to_yaml(config))
    return file


def test_a_folder_of_peft(begun: Callable[..., RunConfig], tmp_path: Path, model_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    model.save_pretrained(tmp_path / "peft")
    run = begun("after_peft", adapter="peft", train={"max_steps": 2})
    finetune(run)
    assert "q_proj" in read_json(run.output / "adapter" / "adapter_config.json")["target_modules"]
    base = begun("measured", adapter="peft", train={"epochs": 0})
    finetune(base)  # measured as it is
    assert measured(base, "before")["perplexity"] == measured(run, "before")["perplexity"]


def test_a_folder_of_peft_with_the_embedding_beside(begun: Callable[..., RunConfig], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = write_model(tmp_path / "untied", tie_word_embeddings=False)
    said = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    peft: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), said)
    peft.save_pretrained(tmp_path / "peft", save_embedding_layers=True)  # the frozen embedding, too
    sections = {"model": {"name": str(model)}, "train": {"max_steps": 1}}
    run = finetune(begun("after_peft", adapter="peft", **sections))
    assert run.read_summary().trainable_parameters == 2 * (peft.config.vocab_size + 32) + 2 * 2 * (32 + 32)
    with torch.no_grad():
        peft.get_input_embeddings().base_layer.weight.add_(1)
    peft.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    with pytest.raises(AdapterError, match=r"model\.embed_tokens: trained on another weight than the model's"):
        finetune(begun("after_other", adapter="other", **sections))


@pytest.mark.full
def test_a_resumed_run_ends_as_it_would_have(begun: Callable[..., RunConfig], first: RunConfig) -> None:
    whole, parts, early = (begun(name, adapter=str(first.output)) for name in ("whole", "parts", "early"))
    finetune(whole)
    interrupt(parts, step=3)
    interrupt(early, stage="Evaluating one before")
    moved = first.output.rename(first.output.with_name("moved"))
    with pytest.raises(RunError, match=r"the adapter that this run began from is gone.*no checkpoint yet"):
        finetune(early, resume=True)
    finetune(parts, resume=True)  # its checkpoint has all that it needs
    assert metrics_of(parts) == metrics_of(whole)
    one, other = adapter_of(whole), adapter_of(parts)
    assert all(torch.equal(one[name], other[name]) for name in one)
    shutil.copytree(moved, first.output)
    finetune(early, resume=True)
    assert metrics_of(early) == metrics_of(whole)


def test_the_rows_of_added_tokens_have_to_be_trained(begun: Callable[..., RunConfig], first: RunConfig) -> None:
    model = {"add_tokens": ["<tide>"]}
    config = begun("tokens", adapter=str(first.output), model=model)
    with pytest.raises(PlanError, match=r"does not train .*model\.add_tokens"):
        finetune(config)
    taught = begun("taught", MIXED, model=model, train={"max_steps": 1})
    finetune(taught)
    finetune(begun("tokens", adapter=str(taught.output), model=model, train={"max_steps": 1}))
