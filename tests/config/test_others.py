"""Files of other tools: what means the same is carried over, and the rest is said key by key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from source_paths import paths
from trimtab.cli.app import app
from trimtab.config import others
from trimtab.config.others import carry_over
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.errors import ConfigError

MODEL = Path(__file__).parents[1] / "data" / "before" / "model"

AXOLOTL = """
base_model: tiny
load_in_8bit: true
adapter: lora
peft_use_dora: true
datasets:
  - {path: rows.jsonl, ds_type: json, type: chat_template}
  - {path: someone/some-rows, split: extra, type: alpaca}
val_set_size: 0.1
sequence_len: 384
lora_r: 4
lora_alpha: 12
lora_dropout: 0.05
lora_target_modules: [q_proj, down_proj]
lora_modules_to_save: [lm_head]
micro_batch_size: 3
gradient_accumulation_steps: 2
num_epochs: 2
evals_per_epoch: 5
save_steps: 50
learning_rate: 2e-4
lr_scheduler: constant
warmup_ratio: 0.1
optimizer: adamw_torch
bf16: auto
train_on_inputs: true
early_stopping_patience: 3
sample_packing: true
"""

LLAMA_FACTORY = """
model_name_or_path: tiny
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 6
lora_alpha: 24
lora_target: q_proj,v_proj
use_rslora: true
quantization_bit: 4
dataset: mine
template: llama3
cutoff_len: 300
max_samples: 20
val_size: 0.2
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 1.5
lr_scheduler_type: cosine
warmup_ratio: 0.05
eval_strategy: steps
eval_steps: 30
bf16: true
output_dir: saves/one
neftune_noise_alpha: 5
"""

MLX = """
model: tiny
train: true
data: folder
fine_tune_type: dora
num_layers: 1
iters: 70
batch_size: 2
learning_rate: 1e-5
lora_parameters: {keys: [self_attn.q_proj], rank: 4, scale: 2.5, dropout: 0.1}
lr_schedule: {name: cosine_decay, warmup: 7, arguments: [1e-5, 70]}
mask_prompt: true
val_batches: 25
"""

PEFT = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny",
    "r": 8,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"^model\\.layers\\.0\\.self_attn\\.q_proj": 2},
    "use_dora": True,
    "use_rslora": False,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 1],
    "task_type": "CAUSAL_LM",
    "init_lora_weights": True,
    "alora_invocation_tokens": [1, 2],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(MODEL, tmp_path / "tiny")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "folder" / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "../rows.jsonl"}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(here: Path, name: str, text: str, *said: str) -> tuple[RunConfig, str]:
    """The run that ``trimtab init --from`` writes, and what it prints."""
    (here / name).write_text(text)
    answer = CliRunner().invoke(app, ["init", "out/run.yaml", "--from", name, *said], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return load_config(here / "out" / "run.yaml"), answer.output


def test_axolotl(here: Path) -> None:
    config, output = converted(here, "ax.yml", AXOLOTL)
    first, second = config.plan
    assert first == {
        **{"match": ["*.q_proj", "*.down_proj"], "method": "dora", "rank": 4},
        **{"alpha": 12, "dropout": 0.05},
    }
    assert second == {"match": ["lm_head", "*.lm_head"], "method": "full"}
    assert config.quantisation == "int8"
    assert Path(config.model.name).resolve() == here / "tiny"
    assert Path(paths(config.data.train)[0]).resolve() == here / "rows.jsonl"
    assert paths(config.data.train)[1] == "someone/some-rows:extra"
    assert (config.data.validation, config.data.max_length) == (0.1, 384)
    train = config.train
    assert (train.batch_size, train.gradient_accumulation, train.epochs, train.learning_rate) == (3, 2, 2.0, 2e-4)
    assert (train.schedule, train.warmup, train.validate_every, train.save_every) == ("constant", 0.1, 0.1, 50)
    assert (train.prompt_loss_weight, train.early_stopping, train.keep_best) == (1.0, 3, False)
    assert "not carried over: sample_packing: true" in output
    assert "optimizer" not in output


def test_llama_factory(here: Path) -> None:
    config, output = converted(here, "lf.yaml", LLAMA_FACTORY)
    expected = {"match": ["*.q_proj", "*.v_proj"], "method": "lora", "rank": 6, "alpha": 24, "rank_stabilised": True}
    assert config.plan == (expected,)
    assert config.quantisation == "nf4"
    assert Path(paths(config.data.train)[0]).resolve() == here / "rows.jsonl"
    assert (config.data.max_length, config.data.train_limit, config.data.validation) == (300, 20, 0.2)
    train = config.train
    assert (train.batch_size, train.gradient_accumulation, train.epochs, train.learning_rate) == (2, 8, 1.5, 1e-4)
    assert (train.schedule, train.warmup, train.validate_every, train.precision) == ("cosine", 0.05, 30, "bfloat16")
    assert config.output == here / "saves" / "one"
    # Their rows go into a chat template, whatever their form; which one, the model says.
    assert config.data.form == "chat"
    assert 'not carried over: template: "llama3"' in output
    assert "not carried over: neftune_noise_alpha: 5" in output


def test_mlx_lm(here: Path) -> None:
    config, output = converted(here, "mlx.yaml", MLX)
    expected = {"match": "*.self_attn.q_proj", "layers": "1-1", "method": "dora", "rank": 4, "alpha": 10.0}
    rule = {**config.plan[0], "match": config.plan[0]["match"][0]}
    assert rule == {**expected, "dropout": 0.1}
    train = config.train
    assert (train.max_steps, train.batch_size, train.learning_rate) == (70, 2, 1e-5)
    assert (train.schedule, train.warmup, train.prompt_loss_weight) == ("cosine", 7, 0.0)
    assert config.data.validation is not None
    assert Path(paths(config.data.test)["test"]).resolve() == here / "folder" / "test.jsonl"
    assert "not carried over: val_batches: 25" in output


def test_steps_are_as_many_as_there(here: Path) -> None:
    """Where they say how many steps, their epochs have no say; ours end a run, too."""
    config, _ = converted(here, "ax.yml", AXOLOTL + "max_steps: 40\nwarmup_steps: 0\n")
    assert (config.train.total_steps(6), config.train.validate_every, config.train.warmup) == (40, 0.1, 0.1)
    config, _ = converted(here, "ax.yml", AXOLOTL + "max_steps: -1\nwarmup_steps: 9\n", "--overwrite")
    assert (config.train.max_steps, config.train.epochs, config.train.warmup) == (None, 2, 9)
    config, _ = converted(here, "ax.yml", AXOLOTL.replace("warmup_ratio: 0.1", ""), "--overwrite")
    assert config.train.warmup == 0.03
    config, _ = converted(here, "lf.yaml", LLAMA_FACTORY + "max_steps: 30\n", "--overwrite")
    assert config.train.total_steps(6) == 30
    # mlx-lm counts passes, and trains after so many of them.
    slower = "grad_accumulation_steps: 4\nsteps_per_eval: 20\nsave_every: 8\nsteps_per_report: 2\n"
    train = converted(here, "mlx.yaml", MLX + slower, "--overwrite")[0].train
    assert (train.total_steps(6), train.gradient_accumulation) == (17, 4)
    assert (train.validate_every, train.save_every, train.log_every) == (5, 2, 1)
    assert converted(here, "mlx.yaml", MLX, "--overwrite")[0].train.total_steps(6) == 70


def test_rows_are_limited_in_each_set(here: Path) -> None:
    (here / "data" / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "../rows.jsonl"}, "hub": {"hf_hub_url": "o/n", "split": "part"}})
    )
    several = LLAMA_FACTORY.replace("dataset: mine", "dataset: mine,hub")
    config, _ = converted(here, "lf.yaml", several)
    assert [path.rpartition("/")[2] for path in paths(config.data.train)] == ["rows.jsonl[:20]", "n:part[:20]"]
    assert config.data.train_limit is None


def test_peft(here: Path) -> None:
    config, output = converted(here, "adapter_config.json", json.dumps(PEFT), "--train", "rows.jsonl")
    rule = {"match": ["*.q_proj", "*.v_proj"], "method": "dora", "rank": 8, "alpha": 32, "layers": "0,1", "bias": True}
    assert config.plan[0] == rule
    assert config.plan[1] == {**rule, "match": "model.layers.0.self_attn.q_proj", "rank": 2}
    assert config.plan[2] == {"match": ["lm_head", "*.lm_head"], "method": "full"}
    assert "not carried over: alora_invocation_tokens: [1, 2]" in output


@pytest.mark.parametrize(
    ("text", "key"), [(AXOLOTL, "lora_model_dir"), (LLAMA_FACTORY, "adapter_name_or_path")], ids=["axolotl", "llama"]
)
def test_a_run_that_began_from_an_adapter_does_so_here(here: Path, text: str, key: str) -> None:
    (here / "before").mkdir()
    config, _ = converted(here, "one.yaml", text + f"{key}: before\n")
    assert config.adapter is not None
    assert Path(config.adapter).resolve() == here / "before"
    assert config.plan is None


def test_trackers_are_carried_over(here: Path) -> None:
    config, output = converted(here, "ax.yml", AXOLOTL + "wandb_project: mine\nuse_mlflow: true\n")
    assert config.report_to == ("wandb", "mlflow")
    assert 'not carried over: wandb_project: "mine": say it in the environment: WANDB_PROJECT' in output


@pytest.mark.parametrize("text", [AXOLOTL, LLAMA_FACTORY, MLX], ids=["axolotl", "llama_factory", "mlx_lm"])
def test_a_key_that_nobody_knows_is_said(here: Path, text: str) -> None:
    _, output = converted(here, "one.yaml", text + "a_new_key: 3\n")
    assert "not carried over: a_new_key: 3: no setting here has this meaning" in output


def test_what_the_user_says_goes_before_the_file(here: Path) -> None:
    (here / "mine.jsonl").write_text('{"text": "b"}\n')
    config, _ = converted(here, "ax.yml", AXOLOTL, "--train", "mine.jsonl", "--model", "other/model")
    assert [Path(name).resolve() for name in paths(config.data.train)] == [here / "mine.jsonl"]
    assert config.model.name == "other/model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: x\ndatasets: []\nrl: dpo\n", "only supervised fine-tuning"),
        ("base_model: x\ndatasets: []\nadapter: llama-adapter\n", "lora and qlora"),
        ("model_name_or_path: x\nstage: dpo\n", "only sft"),
        ("model_name_or_path: x\nstage: sft\nfinetuning_type: freeze\n", "lora and full"),
        ("model: x\nfine_tune_type: prefix\n", "lora, dora and full"),
        ("model: x\niters: 3\nlearning_rate: fast\n", "expected a number"),
        ("peft_type: IA3\n", "only LORA"),
        ("hello: world\n", "not a file of a tool that is known here"),
        ("- 1\n", "expected keys and values"),
        ("a: [\n", "ax.yml"),
    ],
)
def test_what_cannot_be_carried_over_is_an_error_that_names_the_file(here: Path, text: str, message: str) -> None:
    (here / "ax.yml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        carry_over(here / "ax.yml")


def test_every_reader_has_a_label_and_a_way_to_be_known() -> None:
    assert others.names() == ["axolotl", "llama_factory", "mlx_lm", "peft_adapter"]


def test_a_missing_file_names_the_nearest(here: Path) -> None:
    (here / "ax.yml").write_text(AXOLOTL)
    with pytest.raises(ConfigError, match=r"Did you mean 'ax\.yml'"):
        carry_over(here / "ax.yaml")
