"""Weights of tuned models against their base: every form of tuned, and each number by another way."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import trimtab
from trimtab.analysis.changes import Change, Extreme, analyse, correlation, effective_rank
from trimtab.analysis.write import write_changes
from trimtab.config.read import load_config
from trimtab.errors import ModelError
from trimtab.models.locate import locate
from trimtab.reports.study.weight_changes import changes_table, correlations_table, write_changes_page
from trimtab.training.run import finetune

RULES = [
    trimtab.Rule(match="*.q_proj", method="dora", rank=2),
    trimtab.Rule(match="*.down_proj", method="mora", rank=2),
]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def stir(model: torch.nn.Module, names: str) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def found(base: Path, *tuned: Path, **options: Any) -> list[Change]:
    return list(analyse(locate(str(base)), tuned, **options))


def test_an_adapter_moves_what_its_effective_weights_say(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trimtab.attach(model, RULES)
    stir(model, "adapter")
    trimtab.save_adapter(model, tmp_path / "adapter")
    changes = found(model_folder, tmp_path / "adapter")
    assert {one.module: one.method for one in changes} == {
        f"model.layers.{block}.{name}": method
        for block in (0, 1)
        for name, method in (("self_attn.q_proj", "dora"), ("mlp.down_proj", "mora"))
    }
    for one in changes:
        old, new = before[f"{one.module}.weight"], trimtab.effective_weight(model, one.module)
        change = trimtab.weight_change(old, new)
        assert one.delta_magnitude == pytest.approx(change.delta_magnitude, rel=1e-5)
        assert one.delta_direction == pytest.approx(change.delta_direction, rel=1e-4)
        assert one.norm == pytest.approx(float(old.norm(dim=1).square().mean().sqrt()), rel=1e-5)
        update = new.double() - old.double()
        assert one.relative == pytest.approx(float(update.norm() / old.double().norm()), rel=1e-5)
        want = torch.linalg.svdvals(update)[:16]
        assert torch.allclose(torch.tensor(one.singular_values).double(), want[: len(one.singular_values)], rtol=1e-4)
        grown = (new.double().norm(dim=1) - old.double().norm(dim=1)).abs()
        assert one.most_grown.row == int(grown.argmax())
        assert one.most_grown.value == pytest.approx(float(grown.max()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(new.double(), old.double())
        assert one.most_turned.row == int((1 - cosine).argmax())
        assert (one.kind, one.block) == (one.module.rsplit(".", 1)[1], int(one.module.split(".")[2]))


def test_a_tuned_folder_and_an_untouched_one(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    stir(model, "layers.1.self_attn.k_proj")
    model.save_pretrained(tmp_path / "tuned")
    changes = {one.module: one for one in found(model_folder, tmp_path / "tuned", match="*.k_proj")}
    still, moved = changes["model.layers.0.self_attn.k_proj"], changes["model.layers.1.self_attn.k_proj"]
    assert (still.delta_magnitude, still.delta_direction, still.relative, still.effective_rank) == (0, 0, 0, 0)
    assert moved.delta_magnitude > 0.01
    assert moved.delta_direction > 0.01
    assert moved.method == "full"
    assert found(model_folder, tmp_path / "tuned", match="*.k_proj", spectra=False)[0].effective_rank is None


def test_a_weight_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]; rows are outputs all the same."""
    config = GPT2Config(vocab_size=50, n_embd=12, n_layer=1, n_head=2, n_positions=16)
    base = GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    tuned = GPT2LMHeadModel(config)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight[:, 7] *= 2  # output 7
    tuned.save_pretrained(tmp_path / "tuned")
    (one,) = found(tmp_path / "base", tmp_path / "tuned", match="*.c_attn")
    assert one.most_grown.row == 7
    assert one.delta_direction == pytest.approx(0, abs=1e-12)
    assert one.effective_rank == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("bare_runs")
def test_every_checkpoint_of_a_run(make_yaml: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    config = load_config(make_yaml(train={"max_steps": 6, "save_every": 2, "keep_checkpoints": 5}))
    finetune(config)
    changes = found(model_folder, config.output, match="*.v_proj")
    assert list(dict.fromkeys((one.state, one.step) for one in changes)) == [
        ("checkpoint-2", 2),
        ("checkpoint-4", 4),
        ("checkpoint-6", 6),
        ("adapter", 6),
    ]
    by_state = {one.state: one for one in changes if one.block == 0}
    assert by_state["checkpoint-2"].delta_direction < by_state["checkpoint-6"].delta_direction
    assert by_state["adapter"].delta_direction == by_state["checkpoint-6"].delta_direction

    write_changes(tmp_path / "out", "tiny", changes)
    page = write_changes_page(tmp_path / "out")
    assert (tmp_path / "out" / "changes.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "changes.svg").read_text()
    text = page.read_text()
    assert "v_proj" in text
    assert not re.search(r"https?:", text)
    with (tmp_path / "out" / "changes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["delta_magnitude"]) for row in rows] == [one.delta_magnitude for one in changes]
    analysis = json.loads((tmp_path / "out" / "changes.json").read_text())
    (whole,) = [row for row in analysis["correlations"] if row["kind"] is None]
    assert whole["points"] == len(changes) == 8
    assert whole["correlation"] == correlation(changes)
    assert changes_table(analysis).row_count == 4
    assert correlations_table(analysis).row_count == 1


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    shared = {"state": "adapter", "method": "lora", "kind": "q", "block": 0, "effective_rank": 1.0, "relative": 0.1}
    folders = ("runs/a/out", "runs/b/out")
    analysis = {
        "base": "tiny",
        "changes": [
            {**shared, "tuned": folder, "delta_magnitude": moved, "delta_direction": moved}
            for folder, moved in zip(folders, (0.1, 0.3), strict=True)
        ],
        "correlations": [
            {"tuned": folder, "method": "lora", "kind": None, "points": 1, "correlation": None} for folder in folders
        ],
    }
    table = changes_table(analysis)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == [str(Path("a", "out")), str(Path("b", "out"))]
    assert cells[5] == ["0.1", "0.3"]  # and not their mean
    assert list(correlations_table(analysis).columns[0].cells) == cells[0]
    (tmp_path / "changes.json").write_text(json.dumps(analysis))
    page = write_changes_page(tmp_path).read_text(encoding="utf-8")
    assert all(f'<th scope="row">{name}</th>' in page and f">{name}, lora: correlation -<" in page for name in cells[0])


def test_wrong_folders_are_named(model_folder: Path, tmp_path: Path) -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=12, n_layer=1, n_head=2, n_positions=16))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="another model"):
        found(model_folder, tmp_path / "other")
    trimtab.attach(other, trimtab.Rule(match="*.c_attn", method="lora", rank=2))
    trimtab.save_adapter(other, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"made for another model: 1 of its 1 modules.*c_attn"):
        found(model_folder, tmp_path / "adapter")
    with pytest.raises(ModelError, match="expected a model folder"):
        found(model_folder, tmp_path)
    with pytest.raises(ModelError, match=r"no tuned weight matches '\*.z_proj'"):
        found(model_folder, model_folder, match="*.z_proj")


def test_adapters_on_blocks_are_left_out_and_named(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    blocks = trimtab.Rule(match="*.mlp", method="serial", bottleneck=2)
    trimtab.attach(model, trimtab.Plan([blocks, trimtab.Rule(match="*.down_proj", method="lora", rank=2)]))
    trimtab.save_adapter(model, tmp_path / "both")
    notes: list[str] = []
    changes = found(model_folder, tmp_path / "both", note=notes.append)
    assert [one.module for one in changes] == [f"model.layers.{block}.mlp.down_proj" for block in (0, 1)]
    (note,) = notes
    assert "2 adapters on blocks, such as model.layers.0.mlp, change no weight and are left out" in note

    trimtab.detach(model)
    trimtab.attach(model, blocks)
    trimtab.save_adapter(model, tmp_path / "blocks")
    with pytest.raises(ModelError, match=r"all of its 2 adapters \(serial\) sit on blocks and change no weight"):
        found(model_folder, tmp_path / "blocks")


def test_a_larger_model_of_the_same_names_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 49, bias=False)
    model.config.intermediate_size = 49
    model.save_pretrained(tmp_path / "wider")
    with pytest.raises(ModelError, match=r"up_proj is \[49, 32\], the base's is \[48, 32\]"):
        found(model_folder, tmp_path / "wider", match="*.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("values", "rank"), [([3.0, 3.0, 3.0], 3.0), ([5.0, 0.0], 1.0), ([0.0, 0.0], 0.0), ([2.0, 1.0], 3 / 4 ** (1 / 3))]
)
def test_effective_rank_by_hand(values: list[float], rank: float) -> None:
    """Shares 2/3 and 1/3: exp(-2/3 ln 2/3 - 1/3 ln 1/3) = 3 / 4^(1/3)."""
    assert effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(rank, rel=1e-12)


def test_correlation_by_hand() -> None:
    def change(magnitude: float, direction: float) -> Change:
        extreme = Extreme(0, 0.0)
        return Change(
            "t", "s", 1, "lora", "m", "q", 0, 1.0, magnitude, direction, 0.1, extreme, extreme, None, ()
        )  # fmt: skip

    assert correlation([change(1, 2), change(2, 4), change(3, 6)]) == pytest.approx(1)
    assert correlation([change(1, 3), change(2, 2), change(3, 1)]) == pytest.approx(-1)
    assert correlation([change(0, 1), change(1, 0), change(0, 0), change(1, 1)]) == pytest.approx(0, abs=1e-15)
    assert correlation([change(1, 2), change(2, 4)]) is None
    assert correlation([change(1, 2)] * 4) is None
    assert not math.isnan(correlation([change(1, 1), change(2, 1), change(3, 5)]) or 0)
