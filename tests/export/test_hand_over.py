"""``trimtab export``: every format from outside, with its card, its figures and its refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from run_fixtures import make_bare
from tiny_encoders import write_encoder
from tiny_runs import rows, write_config, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.errors import ModelError
from trimtab.export import names
from trimtab.export._hand_over import write_whole
from trimtab.runs.load import load_run
from trimtab.training.run import finetune

LORA = [{"match": "all-linear", "method": "lora", "rank": 4, "alpha": 8}]
DORA = [{"match": "*.q_proj", "method": "dora", "rank": 2}]
IDS = torch.tensor([[5, 40, 60, 7, 80, 33], [9, 12, 300, 200, 4, 50]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a model card."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_merged_is_what_merge_writes_and_has_a_card(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("dora", DORA)
    assert cli("merge", run, tmp_path / "a").code == 0
    result = cli("export", run, tmp_path / "b", "--to", "merged")
    assert result.code == 0, result
    assert re.search(r"merged against unmerged, on \d+ answer tokens of 6 rows of kind: logits differ by", result.out)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    head, text = card(tmp_path / "b")
    assert head["library_name"] == "transformers"
    assert head["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    assert "method: dora on `*.q_proj` (2 modules)" in text
    assert "| kind (6 rows) | accuracy (%) |" in text
    assert "KL" in text
    assert str(tmp_path.parent) not in text  # no place on this machine
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(load_run(run).model)
    )


def test_lora_is_a_folder_that_peft_loads(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run, out = trained("lora", LORA), tmp_path / "out"
    result = cli("export", run, out, "--to", "lora")
    assert result.code == 0, result
    loaded = load_run(run)
    base = AutoModelForCausalLM.from_pretrained(loaded.config.model.name)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, out)), logits(loaded.model))
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 28
    assert len(AutoTokenizer.from_pretrained(out)) == len(loaded.reader)
    config = json.loads((out / "adapter_config.json").read_text())
    assert not config["use_dora"]
    assert card(out)[0]["library_name"] == "peft"
    assert "likeliest next token is the same for 100 %" in result.out


def test_a_lora_for_vllm_has_one_scale_and_the_command_its_rank(
    cli: Any, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM passes over ``alpha_pattern``, takes no rank above 16 unless told, and no layers that are kept whole."""
    scales = [
        {"match": "all-linear", "method": "lora", "rank": 20, "alpha": 20},
        {"match": "*.q_proj", "method": "lora", "rank": 2, "alpha": 8},
    ]
    run, out = trained("scales", scales), tmp_path / "out"
    assert cli("export", run, out, "--to", "lora").code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    ranks, alphas = (config[f"{name}_pattern"] for name in ("rank", "alpha"))
    scale = config["lora_alpha"] / config["r"]
    assert {alphas.get(key, scale) / ranks.get(key, 1) for key in {*ranks, *alphas}} <= {scale}
    assert "--enable-lora --max-lora-rank 32 --lora-modules" in (out / "README.md").read_text()
    wanted = logits(load_run(run).model)
    base = AutoModelForCausalLM.from_pretrained(load_run(run).config.model.name)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, out)), wanted, rtol=1e-4, atol=1e-4)
    words = [{"match": ["*.embed_tokens", "*.q_proj"], "method": "dora", "rank": 2}]
    for name, plan in (("kept", [*LORA, {"match": "*.norm", "method": "full"}]), ("words", words)):
        result = cli("export", trained(name, plan), tmp_path / name, "--to", "lora")
        assert result.code == 0
        assert "vLLM and others load" not in result.out
        assert "vllm serve" not in (tmp_path / name / "README.md").read_text()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    said = [{"text": f"the {word} is free", "label": word} for word in ("crane", "tug", "berth") * 4]
    rows = write_rows(root / "rows.jsonl", said)
    plan = [{"match": "*.query", "method": "dora", "rank": 2}]
    yaml = write_config(root / "run.yaml", write_encoder(root / "bert"), rows, plan=plan)
    with pytest.MonkeyPatch.context() as patch:
        make_bare(patch)
        return finetune(load_config(yaml)).path


def test_a_classifier_is_handed_over_with_its_head(cli: Any, classifier: Path, tmp_path: Path) -> None:
    result = cli("export", classifier, "merged", "--to", "merged")
    assert result.code == 0, result
    assert "on 12 rows of rows: logits differ by" in result.out
    assert "likeliest answer is the same for 100 %" in result.out
    head, text = card(tmp_path / "merged")
    assert head["pipeline_tag"] == "text-classification"
    assert 'pipeline("text-classification", "THIS_FOLDER")' in text
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert set(merged.config.id2label.values()) == {"crane", "tug", "berth"}
    loaded, inputs = load_run(classifier), {"input_ids": torch.tensor([[2, 9, 30, 3]])}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, loaded.model(**inputs).logits, rtol=1e-4, atol=1e-5)
    result = cli("export", classifier, "peft", "--to", "lora", "--rank", 16, "--rows", classifier.parent / "rows.jsonl")
    assert result.code == 0, result
    assert "weighed by" in result.out
    for form in ("gguf", "gguf-lora", "mlx"):
        result = cli("export", classifier, "out", "--to", form)
        assert result.code == 1
        assert "this run trained a model for SequenceClassification" in result.err
    assert not (tmp_path / "out").exists()


# Refusals


def test_a_run_whose_base_is_gone_says_where_to_name_it(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained("lora", LORA), tmp_path / "copy"))
    said = yaml.safe_load((run / "config.yaml").read_text())
    said["model"]["name"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(said))
    for words in (("export", run, "out", "--to", "lora"), ("generate", run, "fog")):
        result = cli(*words)
        assert result.code == 1
        assert f"{run}: the model that this run was trained on is not where it was: {tmp_path / 'gone'}" in result.err
        assert "config.yaml" in result.err


def test_an_unknown_format_names_the_known_ones(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    result = cli("export", trained("lora", LORA), tmp_path / "out", "--to", "ggfu")
    assert result.code == 1
    assert "unknown export format 'ggfu': expected one of" in result.err


def test_an_option_of_another_format_is_refused(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    result = cli("export", trained("lora", LORA), tmp_path / "out", "--to", "lora", "--dtype", "float16")
    assert result.code == 1
    assert "--dtype means nothing in this format" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", names())
def test_a_folder_that_holds_something_stays(form: str, cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run, out = trained("lora", LORA), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "not empty" in cli("export", run, out, "--to", form).err
    assert "something other than" in cli("export", run, out, "--to", form, "--overwrite").err
    assert [file.name for file in tmp_path.iterdir()] == ["out"] or (out / "thesis.tex").is_file()


def test_what_another_process_wrote_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "merged"

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("ours")
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text("theirs")

    with pytest.raises(ModelError, match="merged: another process wrote here meanwhile, and that stays"):
        write_whole(target, fill, lambda: 0, overwrite=False)
    assert (target / "config.json").read_text() == "theirs"
    assert [one.name for one in tmp_path.iterdir()] == ["merged"]
    write_whole(target, fill, lambda: 0, overwrite=True)
    assert (target / "config.json").read_text() == "ours"


def test_rows_that_are_gone_are_told(cli: Any, make_yaml: Callable[..., Path], tmp_path: Path) -> None:
    run = finetune(load_config(make_yaml(plan=LORA, train={"max_steps": 1}))).path
    (tmp_path / "completion.jsonl").unlink()
    result = cli("export", run, "out", "--to", "lora")
    assert "on 64 random tokens" in result.out, result
    assert "the run's rows cannot be read" in result.out


def test_what_the_run_is_made_of_is_not_replaced(cli: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    file = write_config(tmp_path / "run.yaml", model, write_rows(tmp_path / "rows.jsonl", rows(8)), plan=DORA)
    run = finetune(load_config(file)).path
    later = finetune(
        load_config(write_config(tmp_path / "later.yaml", model, tmp_path / "rows.jsonl", plan=None, adapter=str(run)))
    ).path
    (tmp_path / "link").symlink_to(model)
    weights = {place: place.read_bytes() for place in tmp_path.glob("**/*.safetensors")}
    checkpoint = next((run / "checkpoints").glob("checkpoint-*"))
    for words, said in [
        (("merge", run, model), "holds the model that the run was trained on"),
        (("merge", run, tmp_path / "link"), "holds the model that the run was trained on"),
        (("convert", run, run / "adapter", "--to", "lora"), "holds the adapter of the run"),
        (("export", run, checkpoint, "--to", "lora"), "holds a checkpoint of the run"),
        (("convert", later, run / "adapter", "--to", "lora"), "holds the adapter that the run began from"),
    ]:
        result = cli(*words, "--overwrite")
        assert result.code == 1, result
        assert said in result.err
    assert weights == {place: place.read_bytes() for place in tmp_path.glob("**/*.safetensors")}
