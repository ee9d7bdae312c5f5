"""Evaluates a finished run, or any model, on any rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.config.resolve import Job
from trimtab.config.run import EvaluationConfig
from trimtab.data.forms import read_examples
from trimtab.data.rows import Source
from trimtab.data.sources import name_of
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.benchmark_tasks import BenchmarkTask, evaluate_task, find_task
from trimtab.evaluation.evaluate import evaluate, write
from trimtab.files import read_json
from trimtab.models.locate import ModelHead
from trimtab.models.model_files import require_rows
from trimtab.models.positions import positions_of
from trimtab.notes import Notes, rows as counted
from trimtab.runs.events import Listener
from trimtab.runs.named import Named
from trimtab.runs.results import OWN_ADAPTER, Measured, Result, read_result
from trimtab.surgery.adapted import bare
from trimtab.tasks import Measurement, Task, of_head

ELSEWHERE = Path("runs/evaluate")
"""Where results go by default, unless they are those of a run on its own test sets."""


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

    Arguments that are None are taken from the run, or for a model from the defaults of a run. On rows that are not the
    run's test sets, the run's choices are used only if all rows are answered by them; otherwise a closed set is looked
    for in the rows. ``form`` is a name in ``trimtab.data.forms``. With ``generate`` the model writes its answers even
    if they are a closed set. With ``tasks``, named as in ``evaluation.benchmark_tasks``, ``data`` is the file of the
    only task or the folders with the tasks' files.

    A model with a head of its own, or with an encoder and a decoder, is measured as its task measures; rows are then
    read by their keys, and their answers are those that the model knows.

    Results and predictions are written into ``out`` under the stage ``after``, or ``before`` for a model without an
    adapter. The default is ``runs/evaluate``, or the run's own folder if its own test sets are measured as in the run;
    the run's page is then out of date. Returns the folder and the results.

    Raises ConfigError if there is nothing to evaluate on or if the arguments contradict each other, and whatever
    loading and evaluating raise.
    """
    listener = listener or Listener()
    named = Named.find(target, adapter=adapter, base=base)
    if (doubt := named.doubt) is not None:
        listener.remark(doubt)
    run, config = named.run, named.config
    task = of_head(named.head)
    own = {name: config.data.settled(test) for name, test in config.data.test.items()} if config is not None else {}
    wanted = [find_task(name) for name in dict.fromkeys(tasks)]
    if named.head != ModelHead():
        _refuse(target, task.name, {"--task": wanted, "--generate": generate, "--choices": choices, "--form": form})
    files = _files(wanted, data, own)
    if not files:
        raise ConfigError(f"{target}: nothing to evaluate on; name the rows with --data FILE")
    defaults = config.evaluation if config is not None else EvaluationConfig()
    own_sets = run is not None and not data and not wanted
    as_in_run = own_sets and choices is None and form is None and limit is None and not generate
    if own_sets and limit is None:
        limit = defaults.limit

    reader = named.reader()
    notes = Notes()
    with notes.told(listener.remark):
        if named.head == ModelHead():
            form = form or (config.data.form if config is not None else "auto")
            read = partial(read_examples, tokenizer=reader, root=Path.cwd(), form=form, notes=notes)
            rows: dict[str, list[Any]] = {name: read(path) for name, path in files.items()}
        else:
            rows = {name: _rows_for(named, task, reader, place=path, notes=notes) for name, path in files.items()}
    listener.stage(f"Loading {target}")
    model = named.load()
    if isinstance(reader, PreTrainedTokenizerBase):
        texts = [row.text or row.prompt for examples in rows.values() for row in examples]
        table: Any = bare(model.get_input_embeddings())
        require_rows(target, reader, texts, len(table.weight))
    folder = out or (run.path if run is not None and as_in_run else ELSEWHERE)
    model_name = config.model.name if config is not None else target
    put_on = named.adapter
    adapter_name = str(put_on.absolute()) if put_on is not None else None
    if run is not None and put_on is not None and folder == run.path:
        adapter_name = OWN_ADAPTER
    label = model_name if put_on is None else str(run.path.absolute() if run is not None else put_on.absolute())
    stage = "before" if put_on is None else "after"
    known = named.summary.choices if named.summary is not None else None
    length = Job.of(config).read_for(named.head).reading_length if config is not None else None
    said = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    evaluation = defaults.model_copy(update={name: value for name, value in said.items() if value is not None})
    head = task.head(model)
    results = []
    for name, examples in rows.items():
        listener.stage(f"Evaluating {name}")
        progress = partial(listener.evaluating, name)
        settings: dict[str, Any] = {"progress": progress, "max_length": length}
        if named.head != ModelHead():
            longest = length if config is not None else positions_of(model).limit()
            how = Measurement(name, list(named.head.labels) or None, evaluation, longest, progress)
            measured = task.evaluate(head, reader, examples[:limit], how)
        elif (benchmark := {one.dataset: one for one in wanted}.get(name)) is not None:
            settings |= {"generate": generate, "batch_size": evaluation.batch_size}
            settings |= {"choices": choices, "limit": limit, "max_new_tokens": max_new_tokens}
            measured = evaluate_task(benchmark, head, reader, examples, **settings)
            if swapped := measured.record.relabelled:
                words = ", ".join(f"'{wrong}' is read as '{right}'" for wrong, right in swapped.items())
                listener.remark(f"the labels of {files[name]} are permuted, as FinLoRA's script writes them: {words}")
        else:
            examples = examples[:limit]
            fits = own_sets or (known and all(example.answer in known for example in examples))
            settings |= {"generate": generate, "batch_size": evaluation.batch_size}
            settings["choices"] = choices or (known if fits else "infer")
            settings["max_new_tokens"] = evaluation.max_new_tokens
            measured = evaluate(head, reader, examples, name=name, **settings)
        place = files[name]
        of = Measured.of(model_name, adapter_name, [place] if isinstance(place, str) else [one.path for one in place])
        if measured.record.cut:
            listener.remark(f"{counted(measured.record.cut)} of {name} cut to what the model reads")
        # A run's own result is made anew, whoever wrote it.
        again = run is not None and as_in_run and folder == run.path
        own_name = name if again else _free_name(folder, name, stage, of, Path(label).name)
        write(replace(measured, name=own_name), folder, stage, of)
        listener.note(f"written to {folder / 'evaluation' / f'{own_name}.{stage}.json'}")
        results.append(measured.record.updated(**of._asdict()))
    return folder, results


def _refuse(target: str, task: str, said: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option that means nothing where a head of the model's own answers."""
    if option := next((name for name, value in said.items() if value), None):
        raise ConfigError(
            f"{option}: {target} is a model of {task}, whose answers are those of its head or its targets; leave it out"
        )


def _rows_for(named: Named, task: Task, reader: Any, *, place: str | Sequence[Source], notes: Notes) -> list[Any]:
    """The rows at ``place`` as ``task`` takes them, with labels that the model has."""
    sources = [named.source_of_rows(place)] if isinstance(place, str) else place
    numbered = named.config is None or isinstance(named.config.data.choices, tuple)
    return task.known(named.head, task.rows(sources, reader, notes), numbered=numbered)


def _free_name(folder: Path, name: str, stage: str, of: Measured, label: str) -> str:
    """``name``; or where the result of another model, another adapter or other rows has it already, ``name`` and
    ``label``, with a number if need be. What is measured again takes the place that it had."""

    def may_take(name: str) -> bool:
        try:
            before = read_result(read_json(folder / "evaluation" / f"{name}.{stage}.json")).measured
        except FileNotFoundError:
            return True
        except (OSError, ValueError, RecursionError):  # damaged; whatever it was, it is not ours to replace
            return False
        return before == of

    label = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip(".-") or "other"
    names = chain([name, f"{name}-{label}"], (f"{name}-{label}-{number}" for number in count(2)))
    return next(filter(may_take, names))


def _files(
    tasks: Sequence[BenchmarkTask], data: Sequence[str], own: Mapping[str, Sequence[Source]]
) -> Mapping[str, str | Sequence[Source]]:
    """The files of rows to evaluate on, by the names of the data sets; ``own`` are the run's test sets."""
    if tasks:
        places = data or [source.path for sources in own.values() for source in sources]
        files: dict[str, str | Sequence[Source]] = {
            task.dataset: _rows_of(task, places, alone=len(tasks) == 1) for task in tasks
        }
    else:
        files = {name_of(name): name for name in data} or dict(own)
    if len(files) < len(tasks or data):
        raise ConfigError("two of the files have one name, and would overwrite each other's results; rename one")
    return files


def _rows_of(task: BenchmarkTask, places: Sequence[str], *, alone: bool) -> str:
    """The file with the rows of ``task``, among files and folders. If the task is ``alone``, it may have any name.

    Raises DataError, which names the file, if it is not there.
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
