"""``python studies/conversion/run.py`` on a tiny encoder: every way at every rank, and no run trained twice."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from tiny_encoders import write_encoder
from tiny_runs import labelled, write_rows
from trimtab.files import read_json
from trimtab.runs.folder import RunFolder

STUDY = Path(__file__).resolve().parents[3] / "studies" / "conversion" / "study.yaml"


@pytest.mark.full
def test_the_study_compares_each_way_at_each_rank(
    program: Callable[[str], Callable[[Sequence[str]], int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = yaml.safe_load(STUDY.read_text())
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in labelled(24)]
    said["data"] |= {
        "train": str(write_rows(tmp_path / "train.jsonl", rows)),
        "test": {"harbour": str(write_rows(tmp_path / "test.jsonl", rows[:6]))},
    }
    said |= {"model": str(write_encoder(tmp_path / "encoder", kind="BertForMaskedLM")), "output": str(tmp_path / "run")}
    said["train"] |= {"epochs": 1, "batch_size": 8}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said))
    main = program("conversion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "link_adapter", lambda _: signal.raise_signal(signal.SIGTERM))  # once it is trained
        assert main([str(tmp_path / "study.yaml")]) == 143
    assert "Go on with" in capsys.readouterr().err
    assert main([str(tmp_path / "study.yaml")]) == 0, capsys.readouterr()
    found = read_json(tmp_path / "results" / "conversion.json")
    first = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    lines = {(line["way"], line["rank"]): line for line in found["lines"]}
    ways = [(way, rank) for rank in (8, 16, 32) for way in ("weighed", "plain SVD", "PEFT")]
    assert list(lines) == [("exact", None), *ways]
    assert lines["exact", None]["kl"] == 0
    # At rank 32 the tiny weights lack nothing, and PEFT's way still lacks the magnitudes.
    assert lines["weighed", 32]["kl"] < 1e-9 < lines["PEFT", 32]["kl"]
    assert lines["plain SVD", 32]["error"] < 1e-5 < lines["plain SVD", 8]["error"]
    assert found["magnitudes"]["largest"] >= found["magnitudes"]["mean"] > 0
    assert main([str(tmp_path / "study.yaml")]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == first
    assert main([]) == 2
