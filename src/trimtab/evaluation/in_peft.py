"""What PEFT, where it is installed, makes of an adapter's folder in its layout."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.evaluation.agreement import Comparison, agreement
from trimtab.surgery.attach import detach


class InPeft(NamedTuple):
    """``problem``: what PEFT does but compute what was trained, in words; empty for nothing. ``loads``: whether the
    model has PEFT's layers now in place of ours; it may be in pieces where PEFT failed."""

    problem: str = ""
    loads: bool = False


def in_peft(model: Any, folder: Path, comparison: Comparison) -> InPeft:
    """Take the adapter off ``model``, which is the one in ``folder``, and let PEFT put it on: whether its outputs are
    the same. Without PEFT the model stays as it is."""
    try:
        from peft import PeftModel, __version__

        ours = comparison.of(model)
    except Exception:  # it is not there, does not go with the transformers that is, or the model takes no such rows
        return InPeft()
    detach(model)
    elsewhere = "`trimtab export RUN OUT --to merged` hands it over exactly"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PeftModel.from_pretrained(model, str(folder))
        apart = agreement(ours, comparison.of(model), comparison).difference
    except (MemoryError, torch.OutOfMemoryError):
        return InPeft(f"there is not enough memory to see what PEFT {__version__} makes of the adapter")
    except Exception as error:  # whatever PEFT, or the model among its layers, fails at
        said = " ".join(str(error).split())[:300]
        return InPeft(f"PEFT {__version__} does not load the adapter onto this model ({said}); {elsewhere}")
    if apart <= (1e-3 if model.dtype == torch.float32 else 0.1):
        return InPeft(loads=True)
    return InPeft(
        f"PEFT {__version__} computes something else from the adapter: its outputs are {apart:.0%} apart. It leaves "
        "out layers whose weight a model reads without calling them (state spaces, latent attention), and takes layers "
        f"that are called as the experts of a mixture are for these (gate_proj of a shared expert); {elsewhere}",
        loads=True,
    )
