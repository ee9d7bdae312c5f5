"""Train a DoRA adapter whose magnitudes move far, turn it into plain LoRA in three ways, and see what is left of it.

    python studies/conversion/run.py studies/conversion/study.yaml [key.sub=value ...]

The YAML is that of a run. A run that is finished is not trained again. The three ways, at the ranks 8, 16, 32 and 64:
``trimtab.convert_to_lora`` weighed by 64 training rows, the same without rows (the truncated singular value
decomposition of each weight's change), and PEFT's own ``convert_to_lora``. Each is put beside the exact adapter on the
test rows. The table is printed, and written as ``conversion.json`` into the folder ``results`` beside the YAML.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.exits import program, say

if TYPE_CHECKING:
    from torch import Tensor

RANKS = (8, 16, 32, 64)
WEIGHED_BY = 64  # training rows


@dataclass(frozen=True)
class Line:
    """One way at one rank: accuracy on the test rows, and how far the answers' probabilities are from the adapter's."""

    way: str
    rank: int | None
    accuracy: float
    same: float
    kl: float
    error: float | None
    seconds: float


def main(arguments: Sequence[str]) -> int:
    return program(arguments, __doc__, study)


def study(file: str, *overrides: str, ranks: Sequence[int] = RANKS) -> None:
    from trimtab.config.read import load_config
    from trimtab.files import write_json
    from trimtab.runs.folder import RunFolder
    from trimtab.training.run import finetune

    config = load_config(Path(file), list(overrides))
    folder = RunFolder(config.output)
    if folder.status != "finished":
        folder = finetune(config, resume=folder.is_run)
    lines, magnitudes = _compared(folder.path, ranks)
    for line in lines:
        said = "" if line.rank is None else f" {line.rank}"
        say(
            f"{line.way + said:24} accuracy {100 * line.accuracy:5.1f} %   same answer {100 * line.same:5.1f} %   "
            f"KL {line.kl:.1e}   {line.seconds:5.0f} s"
        )
    results = Path(file).parent / "results"
    results.mkdir(exist_ok=True)
    found = {"magnitudes": magnitudes, "weighed_by": WEIGHED_BY, "lines": [asdict(line) for line in lines]}
    write_json(results / "conversion.json", found)
    say(f"written to {results / 'conversion.json'}")


def _compared(run: Path, ranks: Sequence[int]) -> tuple[list[Line], dict[str, float]]:
    """Every way at every rank, and how far the magnitudes moved."""
    import trimtab
    from trimtab.runs.load import load_run
    from trimtab.surgery.adapted import adapted_modules

    loaded = load_run(run)
    test, labels = _rows(loaded, next(iter(loaded.config.data.test.values())))
    training = _rows(loaded, loaded.config.data.train)[0][:WEIGHED_BY]
    exact = _answers(loaded.model, test)
    lines = [_line("exact", None, exact, exact, labels, seconds=0.0)]
    smallest = min(min(module.handle.shape) for _, module in adapted_modules(loaded.model) if module.method == "dora")
    for rank in (one for one in ranks if one <= smallest):  # PEFT takes no higher one
        for way, given in (("weighed", training), ("plain SVD", None)):
            model = load_run(run).model
            began = time.perf_counter()
            report = trimtab.convert_to_lora(model, rank, given)
            seconds = time.perf_counter() - began
            lines.append(_line(way, rank, _answers(model, test), exact, labels, seconds=seconds, error=report.error))
        began = time.perf_counter()
        model = _by_peft(run, rank)
        seconds = time.perf_counter() - began
        lines.append(_line("PEFT", rank, _answers(model, test), exact, labels, seconds=seconds))
    return lines, _magnitudes(loaded.model)


def _rows(loaded: Any, sources: Any) -> tuple[list[dict[str, Tensor]], list[int]]:
    """The rows as inputs of the model, and the number of each row's label."""
    from trimtab.data.sources import rows_of

    found = [row.value for one in loaded.config.data.settled(sources) for row in rows_of(one, root=Path.cwd())]
    inputs = [dict(loaded.reader(row["text"], return_tensors="pt", truncation=True)) for row in found]
    return inputs, [loaded.model.config.label2id[row["label"].strip()] for row in found]


def _answers(model: Any, rows: Sequence[dict[str, Tensor]]) -> Tensor:
    """The log-probabilities of the labels ``[rows, labels]``."""
    import torch

    with torch.no_grad():
        return torch.cat([model(**row).logits for row in rows]).double().log_softmax(-1)


def _line(
    way: str,
    rank: int | None,
    found: Tensor,
    exact: Tensor,
    labels: Sequence[int],
    *,
    seconds: float,
    error: float | None = None,
) -> Line:
    import torch

    return Line(
        way=way,
        rank=rank,
        accuracy=float((found.argmax(-1) == torch.tensor(labels)).double().mean()),
        same=float((found.argmax(-1) == exact.argmax(-1)).double().mean()),
        kl=float((exact.exp() * (exact - found)).sum(-1).mean()),
        error=error,
        seconds=round(seconds, 1),
    )


def _magnitudes(model: Any) -> dict[str, float]:
    """How far the magnitudes moved from the norms that they began at: ``|m / ||W|| - 1|``, in the mean and at most."""
    import torch

    from trimtab.surgery.adapted import adapted_modules

    moved = []
    for _, module in adapted_modules(model):
        if module.method == "dora":
            handle: Any = module.handle
            norms = handle.weight().detach().double().norm(dim=1)
            moved.append((module.current_adapter.magnitude.detach().double() / norms - 1).abs())
    every = torch.cat(moved)
    return {"mean": float(every.mean()), "largest": float(every.max())}


def _by_peft(run: Path, rank: int) -> Any:
    """The run's model with what PEFT's conversion makes of its DoRA modules; all else is as it was trained."""
    import warnings

    import torch
    from peft import PeftModel, convert_to_lora

    import trimtab
    from trimtab.runs.load import load_run

    bare = load_run(run, adapter=False).model
    weights = {name: parameter.detach().clone() for name, parameter in bare.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the adapter is LoRA already, which it says of DoRA, too
        _, tensors = convert_to_lora(PeftModel.from_pretrained(bare, run / "adapter"), rank)
    model = load_run(run).model
    trimtab.merge(model)
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                change = tensors[key.replace("lora_A", "lora_B")] @ a
                model.get_submodule(name).weight.copy_(weights[f"{name}.weight"] + change)
    return model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
