"""A first YAML for a run: short, commented, and fitted to the rows and to the machine."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import tasks
from trimtab.config.others import Carried
from trimtab.config.read import build_config, override, set_dotted
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.config.yaml_text import parse_yaml
from trimtab.data.choices import closed_set
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example, Source as RowSource
from trimtab.data.sources import is_local
from trimtab.data.tokens import encode_all, encode_pair
from trimtab.errors import ConfigError
from trimtab.machine import device
from trimtab.memory.described import describe_run
from trimtab.models.load import empty_model
from trimtab.models.locate import Source
from trimtab.models.positions import positions_of
from trimtab.runs.events import Listener
from trimtab.tasks import job_of

FEW, MANY = 1_000, 10_000
"""Rows: below the first, steps of fewer rows and no validation; from the second on, one pass over them."""

BEGUN = 30
"""Steps: a shorter run has hardly begun to learn, so a handful of rows is passed over more often."""

SHORT = 256
"""Tokens: up to here, eager attention is faster on a processor than the fused kernel (``benchmarks/``)."""

LONGEST = 2_048
"""Tokens: longer rows are cut unless the file says otherwise, since memory grows with the longest row."""


@dataclass(frozen=True)
class Wish:
    """What the user said.

    Attributes:
        model: as ``model:`` of the YAML takes it.
        train: files or hub ids of rows to train on; paths are relative to the working directory.
        test: rows to evaluate on, before and after; None for none.
        method: a method on weights, such as ``dora``.
        said: ``key.sub=value``, to be looked at the rows with and to stand in the file.
    """

    model: str
    train: Sequence[str]
    test: str | None
    method: str
    said: Sequence[str] = ()


@dataclass(frozen=True)
class Draft:
    """A file and what was seen while it was made.

    Attributes:
        text: the YAML, which reads back without an error.
        notes: a sentence each.
    """

    text: str
    notes: list[str]


@dataclass(frozen=True)
class _Seen:
    """What the rows say."""

    count: int
    form: str
    choices: list[str] | None
    longest: int
    """Tokens of the longest row."""
    answer: int
    """Tokens of the longest answer that has to be written; 0 where answers are scored, or where there are none."""


def draft(wish: Wish, place: Path) -> Draft:
    """A YAML for ``place``, in whose folder it will lie.

    The rows are read and tokenised, and a step is traced for its memory; where that does not fit, the mildest change
    that does is in the file. Raises ModelError or DataError if the model or the rows cannot be had, PlanError for a
    method that there is not.
    """
    data: dict[str, Any] = {"train": list(wish.train), "validation": None}
    if wish.test is not None:
        data["test"] = wish.test
    raw = {"model": wish.model, "data": data, "output": "runs/draft"}
    first = job_of(build_config(raw, Path.cwd(), str(place), wish.said))
    seen, notes = (_look if first.task == "causal_lm" else _look_at_labels)(wish, first)
    settings = _with_said(_settings(wish, seen, first, place), wish.said)
    text = _write(settings)
    job = job_of(build_config(parse_yaml(text, str(place)), place.parent, str(place)))
    memory = describe_run(job)["memory"]
    notes.append(f"needs about {memory['needed']:.1f} GiB of memory, {memory['free']:.1f} are free")
    if not memory["fits"]:
        if not memory["suggestions"]:
            notes.append("no change of settings makes it fit: take a smaller model")
        else:
            change = memory["suggestions"][0]
            fits = f"so that it fits: {change['needed']:.1f} GiB"
            settings = _with_said(settings, change["change"].split(), fits)
            notes.append(f"so the file says {change['change']}: {change['needed']:.1f} GiB")
    return Draft(_write(settings), notes)


def draft_carried(carried: Carried, said: Mapping[str, Any], place: Path, more: Sequence[str] = ()) -> Draft:
    """A YAML for ``place`` from another tool's file, with what the user ``said`` in place of what stands there
    (``dotted.key -> value``), and ``more`` (``key.sub=value``).

    What is not carried over is among the notes. Raises ConfigError if a value is not what it should be here.
    """
    settings: Settings = {key: (value, f"{carried.tool}: {key_}") for key, (value, key_) in carried.settings.items()}
    settings.update({key: (value, "as said") for key, value in said.items()})
    settings.setdefault("output", (f"runs/{place.stem}", "adapter, figures and report.html"))
    for key in ("model.name", "data.train", "data.validation", "data.test", "adapter"):
        value, comment = settings.get(key, (None, ""))
        if isinstance(value, str):
            settings[key] = _moved(value, carried.file.parent, place), comment
        elif isinstance(value, list):
            settings[key] = [_moved(one, carried.file.parent, place) for one in value], comment
    text = _write(settings := _with_said(settings, more))
    build_config(parse_yaml(text, str(place)), place.parent, str(place))
    return Draft(text, [f"not carried over: {key}: {why}" for key, why in carried.untold.items()])


def _moved(name: str, folder: Path, place: Path) -> str:
    """A path as seen from ``place``, for one that a file in ``folder`` or the user names; another name as it is."""
    return _relative(place, str(folder / name) if (folder / name).exists() else name)


def _look_at_labels(wish: Wish, job: Job) -> tuple[_Seen, list[str]]:
    """What the rows of another task than causal language modelling say, and a sentence each on them."""
    task, told = tasks.of(job), _Told()
    inputs = task.read(job, job.reader, told)
    longest = answer = 0
    if task.counted == "tokens":
        sizes = task.sizes(job, inputs)
        longest, answer = max(sizes.length, sizes.labels), sizes.labels if task.writes else 0
    return _Seen(len(inputs.rows), inputs.form, inputs.choices, longest, answer), [f"task: {task.name}", *told.notes]


class _Told(Listener):
    """Keeps what is told of rows."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def remark(self, text: str) -> None:
        self.notes.append(text)


def _look(wish: Wish, job: Job) -> tuple[_Seen, list[str]]:
    """What the rows say, and a sentence each on them."""

    def read(names: Sequence[str]) -> list[Example]:
        sources = job.config.data.settled([RowSource(path=name) for name in names])
        return read_examples(sources, tokenizer, root=Path.cwd())

    tokenizer = job.reader
    examples = read(wish.train)
    seen = _measure(examples, tokenizer)
    forms = " and ".join(f"'{form}'" for form in dict.fromkeys(row.form for row in examples))
    notes = [f"{seen.count:,} rows of the form {forms}, the longest of {seen.longest:,} tokens"]
    counted = Counter((row.entry.path if row.entry is not None else row.source, row.form) for row in examples)
    if len(counted) > 1:
        notes += [f"{path}: {count:,} row{'s' * (count != 1)} ({form})" for (path, form), count in counted.items()]
    if seen.choices:
        notes.append(f"answers are a closed set of {len(seen.choices)}, so they are scored, not written")
    if wish.test is not None:
        notes.append(f"{len(read([wish.test])):,} rows to test on")
    return seen, notes


def _measure(examples: list[Example], tokenizer: Any) -> _Seen:
    choices = closed_set("infer", examples)
    rows = encode_all(examples, tokenizer, None)
    longest = max(len(row["input_ids"]) for row in rows)
    answer = 0
    if choices is None and not all(row.choices for row in examples):
        written = sorted((row for row in examples if row.answer), key=lambda row: len(row.answer or ""))[-20:]
        answer = max((_tokens_of_answer(row, tokenizer) for row in written), default=0)
    forms = " and ".join(dict.fromkeys(row.form for row in examples))
    return _Seen(len(examples), forms, choices, longest, answer)


def _tokens_of_answer(row: Example, tokenizer: Any) -> int:
    ids, prompt = encode_pair(row.prompt, row.answer or "", tokenizer, end=True)
    return len(ids) - prompt


Settings = dict[str, tuple[Any, str]]
"""``dotted.key -> (value, comment)``, in the order of the file."""


def _settings(wish: Wish, seen: _Seen, job: Job, place: Path) -> Settings:
    source, writes = job.source, job.task == "causal_lm"
    length = min(-(-seen.longest // 64) * 64, LONGEST, positions_of(empty_model(source)).limit() or LONGEST)
    few = seen.count < FEW
    said: Settings = {"model.name": (_from(place, wish.model, source), "also: a model folder, a .gguf file, a hub id")}
    if not writes:
        said["task"] = job.task, "found from the model and the rows"
    if device().type == "cpu" and 0 < length <= SHORT and writes:
        said["model.attention"] = "eager", "for rows this short faster on a processor than the fused kernel"
    train = [_rows_from(place, name) for name in wish.train]
    said["data.train"] = train[0] if len(train) == 1 else train, f"{seen.count:,} rows of the form {seen.form}"
    if few:
        said["data.validation"] = None, f"{seen.count} rows are few: train on all of them, keep the last step"
    else:
        said["data.validation"] = 0.05, "split off the rows; it picks the best checkpoint"
    if wish.test is not None:
        said["data.test"] = _rows_from(place, wish.test), "evaluated before and after"
    cut = f"the longest row has {seen.longest:,} tokens" + (", which is cut" if seen.longest > length else "")
    if seen.longest:
        said["data.max_length"] = length, cut
    rule: dict[str, Any] = {"match": "all-linear", "method": wish.method}
    if wish.method != "full":
        rule["rank"] = 16
    said["plan"] = [rule], "every linear layer but the output head; a higher rank learns more and costs more"
    batch = 8 if few else 16
    epochs = 1 if seen.count >= MANY else min(10, max(3, math.ceil(BEGUN / math.ceil(seen.count / batch))))
    said["train.epochs"] = epochs, f"passes over the rows: {seen.count * epochs:,} rows are seen"
    said["train.batch_size"] = batch, "rows in one step"
    said["train.learning_rate"] = "auto", "what such a run wants, refined by a few short trials; or a number"
    if seen.answer:
        said["evaluation.max_new_tokens"] = max(16, -(-seen.answer * 5 // 32) * 8), "the longest answer, and a quarter"
    said["output"] = f"runs/{place.stem}", "adapter, figures and report.html"
    return said


def _from(place: Path, model: str, source: Source) -> str:
    return _relative(place, model) if source.kind != "hub" and Path(model).exists() else model


def _rows_from(place: Path, name: str) -> str:
    """Where rows are as seen from the folder of ``place``: a file, a pattern or a part of one; a hub id as it is."""
    if not is_local(name, Path.cwd()):
        return name
    return os.path.relpath(Path(name).expanduser(), place.parent)


def _relative(place: Path, name: str) -> str:
    """A path as seen from the folder of ``place``; a hub id as it is."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    return os.path.relpath(path, place.parent)  # Path.relative_to walks upwards from Python 3.12 on only


def _with_said(settings: Settings, said: Sequence[str], why: str = "as said") -> Settings:
    """``settings`` with what is ``said`` (``key.sub=value``) in them; ``why``: the comment of what is another then."""
    nested: dict[str, Any] = {}
    for key, (value, _) in settings.items():
        set_dotted(nested, tuple(key.split(".")), deepcopy(value))
    for text in said:
        override(nested, text)
    found: Settings = {}
    for section, inside in nested.items():
        parts = {f"{section}.{key}": value for key, value in inside.items()} if isinstance(inside, dict) else None
        for key, value in (parts or {section: inside}).items():
            known, comment = settings.get(key, (None, ""))
            found[key] = value, comment if known == value and comment else why
    return found


def _write(settings: Settings) -> str:
    """The settings as YAML, one to a line with its comment. Raises ConfigError should it not read back equal."""
    lines: list[str] = []
    section = ""
    order = {name: place for place, name in enumerate(RunConfig.model_fields)}
    for key, (value, comment) in sorted(settings.items(), key=lambda item: order[item[0].split(".")[0]]):
        head, _, rest = key.rpartition(".")
        if head != section or not head:
            lines += ["", *([f"{head}:"] if head else [])]
            section = head
        if isinstance(value, list) and isinstance(value[0], dict):
            lines += [f"{rest}: # {comment}"]
            lines += [f"  - {_value(rule)}" for rule in value]
        else:
            lines.append(f"{'  ' if head else ''}{rest}: {_value(value)} # {comment}")
    text = "\n".join(lines).strip("\n") + "\n"
    read = parse_yaml(text, "the draft")
    for key, (value, _) in settings.items():
        got: Any = read
        for part in key.split("."):
            got = got[part]
        if got != value:
            raise ConfigError(f"{key}: the draft would read {got!r} where it was to say {value!r}")
    return text


def _value(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_value(key)}: {_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, str) and not _needs_quotes(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _needs_quotes(text: str) -> bool:
    plain = all(letter.isalnum() or letter in "._-/" for letter in text) and text[0].isalpha()
    return not plain or parse_yaml(text, "a value") != text
