"""``trimtab merge``: a model folder that loads without trimtab."""

from __future__ import annotations

from trimtab.cli.verbs._arguments import Overwrite, RunPath
from trimtab.cli.verbs._hand_out import Dtype, MergedOnto, Onto, OutFolder, Rows, StoredDtype, dtype_of, hand_out

SHORT_HELP = "Write a model folder that loads without trimtab."


def command(
    run: RunPath,
    out: OutFolder,
    dtype: StoredDtype = Dtype.auto,
    onto: MergedOnto = Onto.dequantised,
    rows: Rows = None,
    overwrite: Overwrite = False,
) -> None:
    """Fold the adapter of a run into its model and write an ordinary Hugging Face folder, with a model card."""
    hand_out(run, out, "merged", overwrite=overwrite, dtype=dtype_of(dtype), onto=onto.value, rows=rows)
