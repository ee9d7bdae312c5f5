"""What is told of a folder for PEFT from which PEFT itself computes something else than was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_runs import Kept, rows, tiny_tokenizer, write_config, write_rows
from trimtab.config.read import load_config
from trimtab.export import export_format, hand_over
from trimtab.export._subject import Wishes
from trimtab.files import read_json
from trimtab.runs.events import Listener
from trimtab.studies.process import run_here
from trimtab.training.run import finetune

pytest.importorskip("peft")

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
DOTS: dict[str, Any] = {**EXPERTS, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
STRONG = {"max_steps": 3, "learning_rate": 5e-2, "precision": "float32"}


@pytest.mark.parametrize(
    ("kind", "sizes", "match", "said"),
    [
        ("dots1", DOTS, "all-linear", "computes something else"),
        ("dots1", DOTS, "*.q_proj", ""),
        ("mamba", {"state_size": 4}, "all-linear", "does not load the adapter onto this model"),
    ],
)
def test_it_is_told_what_peft_makes_of_it(
    kind: str, sizes: dict[str, Any], match: str, said: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(kind, **{**SIZES, **HEADS, **sizes, "pad_token_id": 1, "eos_token_id": 0})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plan = [{"match": match, "method": "lora", "rank": 2, "alpha": 8}]
    data = write_rows(tmp_path / "rows.jsonl", rows(8))
    yaml, heard = write_config(tmp_path / "run.yaml", tmp_path / "model", data, plan=plan, train=STRONG), Kept()
    run = finetune(load_config(yaml), listener=heard)
    ours = [remark for remark in heard.remarks if "PEFT" in remark]
    assert [said in remark for remark in ours] == ([True] if said else [])
    assert ours == [note for note in read_json(run.summary)["notes"] if "PEFT" in note]
    assert read_json(run.summary)["status"] == "finished"
    handed = hand_over(export_format("lora"), run.path, tmp_path / "out", Wishes())
    told = [note for note in handed.notes if "PEFT" in note]
    assert [said in note for note in told] == ([True] if said else [])
    assert ("that PEFT, vLLM and others load" in handed.done[-1]) == (not said)
    assert handed.agreement is not None
    assert (handed.agreement.difference > 1e-2) == (said == "computes something else")


def test_a_run_is_finished_where_looking_at_peft_is_stopped_and_a_study_does_not_look(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def stopped(_: Any, folder: Path) -> str:
        asked.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.training.work.Work.problem_in_peft", stopped)
    data = write_rows(tmp_path / "rows.jsonl", rows(8))
    config = load_config(write_config(tmp_path / "run.yaml", model_folder, data, train={"max_steps": 1}))
    run_here(config.model_copy(update={"output": tmp_path / "cell"}), Listener())
    assert asked == []
    run = finetune(config)
    assert asked == [run.adapter]
    assert read_json(run.summary)["status"] == "finished"
