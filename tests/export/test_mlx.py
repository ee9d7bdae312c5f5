"""``--to mlx``, held against mlx-lm itself where it is installed (on Linux it computes on the processor)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from trimtab.errors import ModelError, SurgeryError
from trimtab.export import Wishes, export_format, hand_over
from trimtab.runs.load import load_run

MIXED = [
    {"match": "*.q_proj", "method": "lora", "rank": 2, "alpha": 8},
    {"match": "*.0.*.down_proj", "method": "lora", "rank": 4, "alpha": 4},
]
DORA = [{"match": ["*.q_proj", "*.1.*.up_proj"], "method": "dora", "rank": 2}]
IDS = [[5, 40, 60, 7, 80, 33]]


@pytest.mark.parametrize(
    "plan", [pytest.param(MIXED, id="lora", marks=pytest.mark.full), pytest.param(DORA, id="dora")]
)
def test_mlx_lm_computes_what_the_run_does(plan: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    loading = pytest.importorskip("mlx_lm.utils")
    from mlx_lm.tuner.utils import load_adapters

    run = trained(f"mlx-{plan[0]['method']}", plan)
    handed = hand_over(export_format("mlx"), run, tmp_path / "out", Wishes())
    assert handed.agreement.kl < 1e-9
    loaded = load_run(run)
    model, _ = loading.load_model(Path(loaded.config.model.name))
    bare = np.array(model(mx.array(IDS)))
    tuned = np.array(load_adapters(model, str(tmp_path / "out"))(mx.array(IDS)))
    with torch.no_grad():
        expected = loaded.model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(bare - expected).max() > 0.05
    np.testing.assert_allclose(tuned, expected, atol=2e-4)


def test_one_rank_and_one_scale_for_all(trained: Callable[..., Path], tmp_path: Path) -> None:
    hand_over(export_format("mlx"), trained("mlx-lora", MIXED), tmp_path / "out", Wishes())
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["lora_parameters"] == {
        **{"rank": 4, "scale": 1.0, "dropout": 0.0},
        "keys": ["mlp.down_proj", "self_attn.q_proj"],
    }
    with safe_open(tmp_path / "out" / "adapters.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.1.self_attn.q_proj.lora_a").shape == (32, 4)
        assert "model.layers.1.mlp.down_proj.lora_a" not in file.keys()  # noqa: SIM118 -- no mapping


def test_what_is_outside_of_the_layers_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("mlx-head", [{"match": "lm_head", "method": "lora", "rank": 2}])
    with pytest.raises(SurgeryError, match="lm_head: mlx-lm adapts what is inside the layers"):
        hand_over(export_format("mlx"), run, tmp_path / "out", Wishes())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_mlx_lm_is_not_taken_for_one_of_peft(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("mlx-lora", MIXED)
    hand_over(export_format("mlx"), run, tmp_path / "out", Wishes())
    with pytest.raises(ModelError, match="something other than a model"):
        hand_over(export_format("lora"), run, tmp_path / "out", Wishes(), overwrite=True)
    hand_over(export_format("mlx"), run, tmp_path / "out", Wishes(), overwrite=True)
