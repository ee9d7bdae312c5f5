"""Run the study of learning rates: each method at each of its ranks over a grid of rates, from the same starts.

    python studies/rates/run.py studies/rates/study.yaml [--restore] [key=value ...]
    python studies/rates/run.py studies/rates/study.yaml --results [--restore] [key=value ...]

The first form runs whatever is missing, cell after cell on one loaded model, and goes on where it stopped; the second
runs nothing. Both write ``rates.json``, ``rates.csv``, pictures and ``rates.html`` of what there is into the output
folder. With --restore the cells that are published there, such as those in the repository, count as done.
``state=FOLDER`` says where rows and cells lie (by default ``state`` beside the YAML), ``output=FOLDER`` where the
results go.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial

from trimtab.cli.exits import program


def main(arguments: Sequence[str]) -> int:
    rest = [argument for argument in arguments if argument not in {"--results", "--restore"}]
    work = partial(run, only_results="--results" in arguments, restored="--restore" in arguments)
    return program(rest, __doc__, work)


def run(file: str, *overrides: str, only_results: bool = False, restored: bool = False) -> None:
    from rates_study import load_rates_study
    from trimtab.errors import STOPS, Interrupted
    from trimtab.files import write_json
    from trimtab.runs.lock import locked

    study = load_rates_study(file, overrides)
    if restored:
        from rates_results import restore

        print(f"{restore(study)} trainings taken from {study.output}", flush=True)
    if not only_results:
        from rates_cell import Trainings

        with locked(study.state / "cells" / ".lock"):
            trainings = None
            try:
                for cell in study.missing():
                    trainings = trainings or Trainings(study)
                    found = trainings.run(cell)
                    write_json(study.file(cell), found)
                    told = f"{found['loss']:.4f}" if found["loss"] is not None else "diverged"
                    seconds = f"{found['processor_seconds']:.0f} of {found['seconds']:.0f} s"
                    print(
                        f"{time.strftime('%H:%M')}  {cell}: {told}, {found['exact']:.0%} exact, {seconds}", flush=True
                    )
            except STOPS as stop:
                raise Interrupted.by(
                    stop, "stopped; every finished cell is kept. Go on with the same command."
                ) from None
    from rates_page import write_rates_page
    from rates_results import write_results
    from trimtab.files import read_json

    results, auto = write_results(study), study.output / "auto.json"
    page = write_rates_page(study.output, results, read_json(auto) if auto.is_file() else None)
    print(f"{results['done']} of {results['of']} cells; results: {study.output / 'rates.json'}; page: {page}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
