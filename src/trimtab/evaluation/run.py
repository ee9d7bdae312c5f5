"""Evaluation outside a run: of a finished run's adapter, or of any model, on any rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trimtab.adapters.store import load_adapter
from trimtab.config.read import load_config
from trimtab.config.resolve import source_of
from trimtab.config.run import EvaluationConfig
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.benchmark_tasks import BenchmarkTask, evaluate_task, find_task
from trimtab.evaluation.evaluate import evaluate, write
from trimtab.machine import best_precision, device
from trimtab.models.load import load_tokenizer
from trimtab.models.locate import locate
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import is_run, load_fitting, load_run_model
from trimtab.runs.results import Result
from trimtab.tasks import Head

ELSEWHERE = Path("runs/evaluate")
"""Where results go by default that are not those of a run on its own test sets."""


def measure(
    target: str,
    data: Sequence[str],
    *,
    adapter: Path | None = None,
    base: bool = False,
    tasks: Sequence[str] = (),
    generate: bool = False,
    choices: list[str] | None = None,
    form: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    out: Path | None = None,
    listener: Listener | None = None,
) -> tuple[Path, list[Result]]:
    """Evaluate ``target``, a run folder or the name of a model, on the files ``data`` (default: the run's test sets).

    What is None is as in the run; for a model: the defaults of a run. Choices on other rows than the run's test sets:
    the run's, if these rows are answered so, else a closed set is looked for in the rows. ``form`` is a name in
    ``trimtab.data.forms``. With ``generate`` the model writes its answer also where the answers are a closed set.
    With ``tasks``, named as in ``evaluation.benchmark_tasks``, ``data`` is the file of a single one or the folders that
    hold their files, and each is measured as it asks for.

    Results and predictions go into ``out`` under the stage ``after``, or ``before`` for a model without an adapter. By
    default that is ``runs/evaluate``; but the run's own folder, whose page is out of date then, where its own test sets
    are measured as they were in the run. Gives the folder and the results.

    Raises ConfigError if there is nothing to evaluate on or if the arguments contradict each other, and what loading
    and evaluating raise.
    """
    listener = listener or Listener()
    run = RunFolder(Path(target)) if is_run(Path(target)) else None
    if run is not None and adapter is not None:
        raise ConfigError("--adapter goes with the name of a model; a run has its own adapter")
    if run is None and base:
        raise ConfigError("--base goes with a run; a model named as it is has no adapter")
    config = load_config(run.config) if run is not None else None
    own = dict(config.data.test) if config is not None else {}
    wanted = [find_task(name) for name in dict.fromkeys(tasks)]
    named = {task.dataset: task for task in wanted}
    if wanted:
        sets = {task.dataset: _rows_of(task, data or list(own.values()), alone=len(wanted) == 1) for task in wanted}
    else:
        sets = {Path(name).stem: name for name in data} or own
    if len(sets) < len(wanted or data):
        raise ConfigError("two of the files have one name, and would overwrite each other's results; rename one")
    if not sets:
        raise ConfigError(f"{target}: nothing to evaluate on; name the rows with --data FILE")
    said = config.evaluation if config is not None else EvaluationConfig()
    own_sets = run is not None and not data and not wanted
    as_in_run = own_sets and choices is None and form is None and limit is None and not generate
    if own_sets and limit is None:
        limit = said.limit

    source = source_of(config) if config is not None else locate(target)
    tokenizer = load_tokenizer(source)
    form = form or (config.data.form if config is not None else "auto")
    rows = {name: read_examples(path, tokenizer, root=Path.cwd(), form=form) for name, path in sets.items()}
    listener.stage(f"Loading {target}")
    if run is not None and config is not None:
        model: Any = load_run_model(run, config, adapter=not base)
    else:
        model = load_fitting(source, best_precision())
        if adapter is not None:
            load_adapter(model, adapter)
        model = model.to(device()).eval()

    folder = out or (run.path if run is not None and as_in_run else ELSEWHERE)
    stage = "after" if (run is not None and not base) or adapter is not None else "before"
    summary = run.read_summary() if run is not None else None
    known = summary.choices if summary is not None else None
    head = Head(model)
    results = []
    for name, examples in rows.items():
        listener.stage(f"Evaluating {name}")
        settings: dict[str, Any] = {
            "generate": generate,
            "batch_size": batch_size or said.batch_size,
            "progress": partial(listener.evaluating, name),
        }
        if (task := named.get(name)) is not None:
            settings |= {"choices": choices, "limit": limit, "max_new_tokens": max_new_tokens}
            measured = evaluate_task(task, head, tokenizer, examples, **settings)
            if swapped := measured.record.relabelled:
                words = ", ".join(f"'{wrong}' is read as '{right}'" for wrong, right in swapped.items())
                listener.note(f"the labels of {sets[name]} are permuted, as FinLoRA's script writes them: {words}")
        else:
            examples = examples[:limit]
            settings["choices"] = choices or (known if own_sets else _fitting_choices(examples, known))
            settings["max_new_tokens"] = max_new_tokens or said.max_new_tokens
            measured = evaluate(head, tokenizer, examples, name=name, **settings)
        write(measured, folder, stage)
        results.append(measured.record)
    return folder, results


def _fitting_choices(examples: Sequence[Example], known: list[str] | None) -> list[str] | Literal["infer"]:
    """``known``, if all of ``examples`` have one of these answers; else what is found in them."""
    return known if known and all(example.answer in known for example in examples) else "infer"


def _rows_of(task: BenchmarkTask, places: Sequence[str], *, alone: bool) -> str:
    """The file with the rows of ``task`` among files and folders; where it is the only task, a file by any name.

    Raises DataError, which names the file that is looked for, if it is not there.
    """
    if alone and len(places) == 1 and not Path(places[0]).is_dir():
        return places[0]
    files = [str(Path(place) / task.file) if Path(place).is_dir() else place for place in places]
    for file in files:
        if Path(file).name == task.file and Path(file).is_file():
            return file
    raise DataError(
        f"{task.name}: its rows, {task.file}, are not among the data ({', '.join(places) or 'none was named'}); name "
        "the file, or the folder that holds it, with --data."
    )
