"""A user's mistakes from outside: exit code 1, one message on stderr that says place, expected, got and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import rows, write_config, write_model, write_rows

ROW = {"prompt": "Message: fog\nAnswer: ", "completion": "calm"}


@dataclass
class World:
    """A folder to make mistakes in."""

    path: Path
    model: Path

    def rows(self, *found: Any, name: str = "train.jsonl") -> Path:
        return write_rows(self.path / name, found or rows(24))

    def run(self, *overrides: str, **sections: Any) -> list[str]:
        """``finetune`` of a run that would work, with ``sections`` changed."""
        if not (self.path / "train.jsonl").exists():
            self.rows()
        train = sections.get("data", {}).pop("train", str(self.path / "train.jsonl"))
        return ["finetune", str(write_config(self.path / "run.yaml", self.model, train, **sections)), *overrides]

    def text(self, text: str) -> list[str]:
        (self.path / "run.yaml").write_text(text)
        return ["finetune", str(self.path / "run.yaml")]

    def copy_of_model(self, name: str = "copy") -> Path:
        return Path(shutil.copytree(self.model, self.path / name))


def missing_config(world: World) -> list[str]:
    world.run()
    return ["finetune", str(world.path / "rum.yaml")]


def missing_data(world: World) -> list[str]:
    world.rows()
    return world.run(data={"train": str(world.path / "trian.jsonl")})


def bad_json(world: World) -> list[str]:
    (world.path / "train.jsonl").write_text(json.dumps(ROW) + '\n{"prompt": "Message: ", "completion"\n')
    return world.run()


def another_model(world: World) -> list[str]:
    import torch

    import trimtab
    from trimtab.models.load import load_model
    from trimtab.models.locate import locate

    other = write_model(world.path / "wide", hidden_size=64)
    model = load_model(locate(str(other)), torch.float32)
    trimtab.attach(model, trimtab.Rule(match="*.q_proj", method="lora", rank=2))
    trimtab.save_adapter(model, world.path / "adapter")
    data = world.rows()
    return ["evaluate", str(world.model), "--data", str(data), "--adapter", str(world.path / "adapter")]


def no_config_json(world: World) -> list[str]:
    model = world.copy_of_model()
    (model / "config.json").unlink()
    return world.run(model={"name": str(model)})


def no_weights(world: World) -> list[str]:
    model = world.copy_of_model()
    (model / "model.safetensors").unlink()
    return world.run(model={"name": str(model)})


def damaged_weights(world: World) -> list[str]:
    model = world.copy_of_model()
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    return world.run(model={"name": str(model)})


def not_a_gguf(world: World) -> list[str]:
    (world.path / "m.gguf").write_bytes(b"<html>404</html>")
    return world.run(model={"name": str(world.path / "m.gguf")})


def damaged_gguf(world: World) -> list[str]:
    (world.path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x07" * 40)
    return world.run(model={"name": str(world.path / "m.gguf")})


def no_such_folder(world: World) -> list[str]:
    world.copy_of_model("tiny-2")
    return world.run(model={"name": str(world.path / "tiny-3")})


def open_choice(world: World) -> list[str]:
    test = world.rows(ROW, {**ROW, "completion": "gale"}, name="test.jsonl")
    world.rows()
    return world.run(data={"test": str(test)})


def taken_output(world: World) -> list[str]:
    (world.path / "run").mkdir()
    (world.path / "run" / "thesis.txt").write_text("mine")
    return world.run("output=" + str(world.path / "run"))


def run_without_its_model(w: World) -> list[str]:
    (run := w.path / "old").mkdir()
    (run / "config.yaml").write_text("# The run in this folder.\nmodel: ./gone\ndata: {train: train.jsonl}\n")
    return ["finetune", str(run), "--resume"]


def file_as_output(world: World) -> list[str]:
    (world.path / "out").write_text("")
    return world.run(output=str(world.path / "out"))


def empty_file(world: World) -> list[str]:
    (world.path / "train.jsonl").write_text("\n\n")
    return world.run()


def an_adapter(w: Any) -> list[str]:
    (w.path / "adapter").mkdir()
    (w.path / "adapter" / "adapter_config.json").write_text("{}")
    return ["generate", str(w.path / "adapter"), "hello"]


def two_of_one_name(world: World) -> list[str]:
    (world.path / "a").mkdir()
    return ["evaluate", str(world.model), "--data", str(world.rows(name="a/x.jsonl")), "--data",
            str(world.rows(name="x.jsonl"))]  # fmt: skip


Case = tuple[Callable[[World], list[str]], str]

CASES: dict[str, Case] = {
    "missing config": (missing_config, r"rum\.yaml: no such file\. Did you mean 'run\.yaml'\?"),
    "config that is not YAML": (lambda w: w.text("model: [a\ndata: b\n"), r"run\.yaml:2: "),
    "config without data": (lambda w: w.text("model: m\n"), r"data: missing\. The rows"),
    "unknown key": (lambda w: w.run(train={"learning_rat": 1e-3}), r"unknown key\. Did you mean 'learning_rate'"),
    "key in the wrong section": (lambda w: w.run(data={"epochs": 1}), r"data\.epochs: unknown key.*'train\.epochs'"),
    "unknown key in an override": (lambda w: w.run("train.epoch=1"), r"command line: train\.epoch: .*'epochs'"),
    "an override without =": (lambda w: w.run("train.epochs"), r"command line: expected key\.sub=value"),
    "wrong value": (lambda w: w.run(train={"epochs": "many"}), r'train\.epochs: expected a number, got "many"'),
    "value out of range": (lambda w: w.run(train={"batch_size": 0}), r"train\.batch_size: expected at least 1, got 0"),
    "unknown method": (lambda w: w.run(plan=[{"match": "*", "method": "dorra"}]), r"'dorra'.*'dora'"),
    "unknown option of a method": (
        lambda w: w.run(plan=[{"match": "*", "method": "lora", "rnak": 4}]),
        r"plan\.0: .*unknown option 'rnak' for method lora\. Did you mean 'rank'",
    ),
    "rank larger than the matrix": (
        lambda w: w.run(plan=[{"match": "*.q_proj", "method": "lora", "rank": 64}]),
        r"model\.layers\.0\.self_attn\.q_proj \(rule 1\): .*64",
    ),
    "rule that matches nothing": (
        lambda w: w.run(plan=[{"match": "*.q_porj", "method": "lora"}]),
        r"rule 1 .*nothing has such a name\. Near misses: \*\.q_proj",
    ),
    "rule that is overruled": (
        lambda w: w.run(plan=[{"match": "*.q_proj", "method": "lora"}, {"match": "all-linear", "method": "dora"}]),
        r"rule 1 .*are decided by a later rule \(rule 2\)",
    ),
    "layers that are not there": (
        lambda w: w.run(plan=[{"match": "*", "method": "lora", "layers": "0-7"}]),
        r"names block 7, and the model has blocks 0 to 0",
    ),
    "missing data file": (missing_data, r"There is no data file .*trian\.jsonl .*Did you mean train\.jsonl"),
    "bad JSON": (bad_json, r"train\.jsonl, line 2: expected one JSON object a line, but at column"),
    "row of no known form": (
        lambda w: [w.rows(ROW, {"prompt": "a", "answer": "b"}), w.run()][1],
        r"train\.jsonl, line 2: key 'completion' of the form completion is missing; keys found: prompt, answer",
    ),
    "empty answer": (
        lambda w: [w.rows(ROW, {**ROW, "completion": " "}), w.run()][1],
        r"train\.jsonl, line 2: the answer 'completion' is empty",
    ),
    "data file without rows": (empty_file, r"train\.jsonl holds no rows"),
    "all rows too long": (lambda w: w.run(data={"max_length": 2}), r"None of the 24 rows has a token to train on"),
    "validation that leaves nothing": (
        lambda w: w.run(data={"validation": 0.001}),
        r"data\.validation: 0\.001 of 24 rows leaves 24 to train on and 0 to validate on; give another",
    ),
    "test answer outside the closed set": (
        open_choice,
        r"test\.jsonl, row 2: has the answer 'gale', which is not",
    ),
    "training answer outside the choices": (
        lambda w: w.run(data={"choices": ["calm", "watch"]}),
        r"train\.jsonl, row 3: has the answer 'storm', which is not among the choices \(calm, watch\)",
    ),
    "choices for plain text": (
        lambda w: [w.rows({"text": "fog"}), w.run(data={"choices": ["calm", "watch"]})][1],
        r"data\.choices: these rows are plain text and have no answers",
    ),
    "a metric that open answers do not have": (
        lambda w: w.run(data={"choices": None, "validation": 0.2}, train={"metric": "accuracy"}),
        r"train\.metric: accuracy is for a closed set of answers",
    ),
    "chat rows without a template": (
        lambda w: _without_template(w),
        r"template",
    ),
    "model folder missing": (no_such_folder, r"tiny-3: no such file or folder\. Did you mean 'tiny-2'"),
    "folder without config.json": (no_config_json, r"copy: a folder without config\.json, so not a model"),
    "folder without weights": (no_weights, r"a configuration without weights: expected \*\.safetensors"),
    "damaged weights": (damaged_weights, r"the model cannot be loaded"),
    "file that is no GGUF": (not_a_gguf, r"m\.gguf: not a GGUF file"),
    "damaged GGUF file": (damaged_gguf, r"m\.gguf"),
    "output that is a folder of something else": (taken_output, r"run: a folder that is not empty and holds no run"),
    "output that is a file": (file_as_output, r"out: a file is in the way; choose another output"),
    "output that cannot be written": (
        lambda w: w.run(output="/proc/trimtab"),
        r"/proc/trimtab: the run folder cannot be written \(.*\); choose another output",
    ),
    "resume of nothing": (lambda w: [*w.run(), "--resume"], r"there is no run to resume; start it without --resume"),
    "resume of a run whose model was moved": (
        run_without_its_model,
        r"old: the model of this run is not where it was, .*gone\. If it was moved, say where to: model\.name=WHERE",
    ),
    "adapter of another model": (another_model, r"adapter: this adapter was made for another model: .*q_proj"),
    "adapter that is not there": (
        lambda w: ["evaluate", str(w.model), "--data", str(w.rows()), "--adapter", str(w.path / "none")],
        r"none: no such folder; expected a folder with adapter_config\.json",
    ),
    "nothing to evaluate on": (
        lambda w: ["evaluate", str(w.model)],
        r"nothing to evaluate on; name the rows with",
    ),
    "two test sets of one name": (two_of_one_name, r"two of the files have one name"),
    "--base for a model": (
        lambda w: ["evaluate", str(w.model), "--base", "--data", "x.jsonl"],
        r"--base goes with a run",
    ),
    "generate of no run": (
        lambda w: ["generate", str(w.path), "hello"],
        r"not a run folder \(it has no config\.yaml\), and not a model's.*name the output of trimtab finetune",
    ),
    "generate of an adapter": (
        an_adapter,
        r"adapter: an adapter without its model; name the model, and this folder by",
    ),
    "merge of no run": (lambda w: ["merge", str(w.path), str(w.path / "out")], r"not a run folder"),
    "merge of a file": (
        lambda w: ["merge", w.run()[1], str(w.path / "out")],
        r"run\.yaml: not a run folder \(a file\)",
    ),
    "rows in place of a YAML": (
        lambda w: ["finetune", str(w.rows())],
        r"train\.jsonl: rows, in place of the YAML that names them; trimtab init --train .*train\.jsonl writes one",
    ),
    "a run's YAML in place of a study's": (
        lambda w: ["compare", w.run()[1]],
        r"run\.yaml: the YAML of a run, which is for trimtab finetune .*run\.yaml",
    ),
    "a study's YAML in place of a run's": (
        lambda w: w.text("base: {}\narms: {}\n"),
        r"run\.yaml: the YAML of a study, which is for trimtab compare .*run\.yaml",
    ),
    "a YAML in place of a run's folder": (
        lambda w: ["generate", w.run()[1], "hello"],
        r"run\.yaml: the YAML of a run; name its folder",
    ),
}


def _without_template(world: World) -> list[str]:
    model = world.copy_of_model()
    (model / "chat_template.jinja").unlink()
    world.rows(*rows(12, "chat"))
    return world.run(model={"name": str(model)})


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_in_words(name: str, cli: Any, tmp_path: Path, model_folder: Path) -> None:
    world = World(tmp_path / "world", model_folder)
    world.path.mkdir()
    make, expected = CASES[name]
    result = cli(*make(world))
    assert result.code == 1, result
    assert result.matches(expected), result.err
    assert "Traceback" not in result.err + result.out
    assert not (world.path / "run" / "config.yaml").exists()  # so that the next try needs no --overwrite


def test_a_model_that_does_not_fit(
    cli: Any, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "0.00001")
    monkeypatch.setattr("trimtab.memory.estimate.suggest", lambda *_: [])  # nine more estimates: tests/memory has them
    world = World(tmp_path, model_folder)
    result = cli(*world.run())
    assert result.code == 1
    assert result.matches(r"Training .*tiny needs about .* GiB .*0\.00 GiB of memory are free\. What would help: a")
    result = cli("evaluate", str(model_folder), "--data", str(tmp_path / "train.jsonl"))
    assert result.code == 1
    assert result.matches(r"Loading .*tiny in .* needs about")


@pytest.mark.parametrize(
    "said",
    [["sail"], ["finetune"], ["finetune", "x.yaml", "--resume", "--overwrite"], ["merge", "a", "b", "--dtype", "int3"],
     ["generate", "a"], ["chat", "a", "--seed", str(2**64)], ["evaluate", "a", "--limit", "0"], ["--nothing"]],
)  # fmt: skip
def test_wrong_usage_has_exit_code_2(cli: Any, said: list[str]) -> None:
    result = cli(*said)
    assert result.code == 2
    assert result.err
    assert "Traceback" not in result.err
