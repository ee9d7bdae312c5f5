"""Pages of the reference that are made from the library itself, while the site is built.

What a YAML may say comes from the pydantic models, a verb from its help, a method from its options, a form of rows from
its file, a metric from the table: a page cannot say what the code does not.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trimtab.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for place, make in PAGES.items():
        files.append(File.generated(config, place, content=make()))
    return files


# What a YAML may say -------------------------------------------------------------------------------------------------


def _run_yaml() -> str:
    from trimtab.data.rows import Source

    sources = ["", "## A source of rows", ""]
    sources += ["What an entry of `data.train`, `data.validation` or `data.test` may say in place of a path. "]
    sources += ["[Rows from several places](../how-to/rows-from-several-places.md) has examples.", ""]
    return _schema(
        "The run's YAML",
        "A run's file, `trimtab finetune run.yaml`. The smallest one names a model and some rows; every key can be "
        "given on the command line, too, as `key.sub=value`. Paths are relative to the file. An unknown key is an "
        "error that names the nearest one.",
        RunConfig,
    ) + "\n".join([*sources, *_table(Source.model_fields), ""])


def _study_yaml() -> str:
    from trimtab.config.study import StudyConfig

    return _schema(
        "A study's YAML", "The file of `trimtab compare`: arms by tasks by seeds, all else equal.", StudyConfig
    )


def _search_yaml() -> str:
    from trimtab.config.search import ExploreConfig

    return _schema("A search's YAML", "The file of `trimtab explore`: which layers want which method.", ExploreConfig)


def _schema(title: str, intro: str, model: type[BaseModel]) -> str:
    lines = [f"# {title}", "", intro, ""]
    top = {name: field for name, field in model.model_fields.items() if _section(field) is None}
    lines += ["## Top level", "", *_table(top), ""]
    for name, field in model.model_fields.items():
        if (section := _section(field)) is not None:
            lines += [f"## `{name}`", "", field.description or "", ""]
            if section is RunConfig:  # the base of a search
                lines += ["All keys are in [the run's YAML](run-yaml.md).", ""]
                continue
            inside = "NAME." if typing.get_origin(field.annotation) is dict else ""
            lines += [*_table(dict(_spelt_out(section, inside)), f"{name}."), ""]
    return "\n".join(lines)


def _spelt_out(section: type[BaseModel], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a section, and of the sections in it."""
    for name, field in section.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from _spelt_out(field.annotation, f"{before}{name}.")
        else:
            yield before + name, field


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section of keys that a field is; None if it is a value."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def _table(fields: Mapping[str, FieldInfo], prefix: str = "") -> list[str]:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        anchor = f"<a id='{prefix}{name}'></a>"
        lines.append(
            f"| {anchor}`{name}` | {_kind(field.annotation)} | {_default(field)} | {_cell(field.description)} |"
        )
    return lines


def _kind(annotation: Any) -> str:
    """A type in the words of a YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in arguments))
    if origin is typing.Literal:
        return ", ".join(f"`{str(one).lower() if isinstance(one, bool) else one}`" for one in arguments)
    if origin in (tuple, list):
        return f"list ({_kind(arguments[0])})" if arguments else "list"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", dict: "mapping"}
    if annotation is Any:
        return "anything"
    if origin is dict or annotation is dict:
        return "mapping"
    return words.get(annotation, "path" if annotation is Path else "mapping")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:  # where the reader of the file has one, the meaning says it
        return "see meaning" if "by default" in (field.description or "") else "required"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value in ({}, (), ""):
        return "none"
    if isinstance(value, tuple):
        shown = ", ".join(_flow(one) for one in value)
        return f"`[{shown}]`"
    return f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(one)}" for key, one in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")


# What else is listed -------------------------------------------------------------------------------------------------


def _methods() -> str:
    from trimtab import methods
    from trimtab.methods._method import TRAINING_ONLY

    lines = [
        "# Methods and their options",
        "",
        "A rule of a plan names a method and gives its options as further keys. Options marked *training* change how "
        "training goes on, and not what the trained tensors compute.",
        "",
    ]
    for name in methods.names():
        options = methods.options_class(name)
        doc = inspect.getdoc(inspect.getmodule(options)) or ""
        lines += [
            f"## `{name}`",
            "",
            *_prose(doc),
            "",
            "| option | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for key, field in options.model_fields.items():
            training = " *(training)*" if TRAINING_ONLY in field.metadata else ""
            meaning = _cell(field.description)
            lines.append(f"| `{key}` | {_kind(field.annotation)} | {_default(field)} | {meaning}{training} |")
        lines.append("")
    return "\n".join(lines)


def _prose(doc: str) -> list[str]:
    """A module's docstring as Markdown: indented lines are formulas."""
    return [line.replace("``", "`") if not line.startswith("    ") else line for line in doc.splitlines()]


def _rows() -> str:
    from trimtab import listing
    from trimtab.data import forms

    lines = [
        "# Forms of rows",
        "",
        "Rows are recognised by their keys, and the form is printed. `data.form` names one where that is not enough. "
        "[Rows from several places](../how-to/rows-from-several-places.md) lists the kinds of file. These are the "
        "forms of `causal_lm`; rows of the other tasks are [below](#rows-of-the-other-tasks).",
        "",
    ]
    for name in sorted(forms.names(), key=lambda one: forms.find(one).precedence):
        form = forms.find(name)
        module = inspect.getmodule(type(form))
        keys = ", ".join(f"`{key}`" for key in form.keys)
        more = ", ".join(f"`{key}`" for key in (*form.optional, "weight"))
        used = f"Keys: {keys}. Used where they are there: {more}."
        lines += [f"## `{name}`", "", used, "", *_prose(inspect.getdoc(module) or ""), ""]
    lines += ["## Rows of the other tasks", ""]
    lines += ["They are read by their keys; `data.form` is for `seq2seq` alone, which takes the forms above, too.", ""]
    for name in listing.names_of("tasks"):
        if name != "causal_lm":
            module = importlib.import_module(f"trimtab.tasks.{name}")
            lines += [f"### `{name}`", "", *_prose(inspect.getdoc(module) or ""), ""]
    return "\n".join(lines)


def _command_line() -> str:
    from trimtab.cli.app import app

    lines = [
        "# Command line",
        "",
        "`trimtab VERB --help` prints the same. [Exit codes](files.md#exit-codes) and [variables of the environment]"
        "(files.md#environment) are told beside the files.",
        "",
    ]
    verbs: Any = typer.main.get_command(app)
    for name, verb in verbs.commands.items():
        lines += [f"## `trimtab {name}`", "", inspect.cleandoc(verb.help or ""), ""]
        if verb.params:
            lines += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
            lines += [*map(_parameter, verb.params), ""]
    return "\n".join(lines)


def _parameter(parameter: Any) -> str:
    """A row about an argument or an option."""
    if not hasattr(parameter, "is_flag"):
        shown = parameter.metavar or parameter.name.upper()
    else:
        shown = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if not parameter.is_flag:
            kind = parameter.type_descriptor.annotation
            shown += f" {parameter.metavar or {int: 'INTEGER', float: 'NUMBER', Path: 'PATH'}.get(kind, 'TEXT')}"
    default = parameter.default
    told = "" if default in (None, "", ()) else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    return f"| `{shown}` | {'required' if parameter.required else told} | {_cell(parameter.help)} |"


def _metrics() -> str:
    from trimtab import metrics

    lines = [
        "# Metrics",
        "",
        "One table in the library. `train.metric` takes those that can choose the best step.",
        "",
        "| name | label | better | kinds of result | can choose |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in metrics.METRICS.values():
        better = "higher" if metric.higher_is_better else "lower"
        chooses = "yes" if metric.name in metrics.choosing() else ""
        lines.append(f"| `{metric.name}` | {metric.label} | {better} | {', '.join(metric.kinds)} | {chooses} |")
    return "\n".join([*lines, ""])


def _changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text("utf-8")


def _support() -> str:
    return (ROOT / "tests" / "architectures" / "README.md").read_text("utf-8")


def _library() -> str:
    import trimtab

    groups: dict[str, Iterable[str]] = {
        "Plans and surgery": [name for name, place in trimtab._PUBLIC.items() if place.startswith("surgery")],
        "Adapters on disk": [name for name, place in trimtab._PUBLIC.items() if place.startswith("adapters")],
        "Weights": [name for name, place in trimtab._PUBLIC.items() if place.startswith("ops")],
        "Errors": [name for name, place in trimtab._PUBLIC.items() if place == "errors"],
    }
    rest = set(trimtab._PUBLIC).difference(*groups.values())
    if rest:
        groups["More"] = sorted(rest)
    lines = ["# Library", "", "Every public name of `import trimtab`.", ""]
    for title, names in groups.items():
        lines += [f"## {title}", ""]
        for name in names:
            place = trimtab._PUBLIC[name]  # of a package that can be called, the function lies elsewhere
            lines += [f"::: trimtab.{'surgery.names' if place == name else place}.{name}", ""]
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "reference/run-yaml.md": _run_yaml,
    "reference/study-yaml.md": _study_yaml,
    "reference/search-yaml.md": _search_yaml,
    "reference/methods.md": _methods,
    "reference/rows.md": _rows,
    "reference/command-line.md": _command_line,
    "reference/metrics.md": _metrics,
    "reference/library.md": _library,
    "reference/support.md": _support,
    "changelog.md": _changelog,
}
