"""Run the study of learning rates: each method at each of its ranks over a grid of rates, from the same starts.

    python studies/rates/run.py studies/rates/study.yaml [key=value ...]
    python studies/rates/run.py studies/rates/study.yaml --results [key=value ...]

The first form runs whatever is missing, cell after cell on one loaded model, and goes on where it stopped; the second
runs nothing. Both write ``rates.json``, ``rates.csv``, pictures and ``rates.html`` of what there is into the output
folder. ``state=FOLDER`` says where rows and cells lie (by default ``state`` beside the YAML), ``output=FOLDER`` where
the results go.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from trimtab.cli.exits import exit_code
from trimtab.machine import keep_few_products


def main(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    file, *rest = [argument for argument in arguments if argument != "--results"]
    return exit_code(lambda: run(file, *rest, only_results="--results" in arguments))


def run(file: str, *overrides: str, only_results: bool = False) -> None:
    from rates_study import load_rates_study
    from trimtab.errors import Interrupted
    from trimtab.files import write_json
    from trimtab.runs.lock import locked

    study = load_rates_study(file, overrides)
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
            except KeyboardInterrupt:
                raise Interrupted("stopped; every finished cell is kept. Go on with the same command.") from None
    from rates_page import write_rates_page
    from rates_results import write_results

    results = write_results(study)
    page = write_rates_page(study.output, results)
    print(f"{results['done']} of {results['of']} cells; results: {study.output / 'rates.json'}; page: {page}")


if __name__ == "__main__":
    keep_few_products()
    sys.exit(main(sys.argv[1:]))
