"""Reads a run's YAML, strictly, with the command line's overrides; and writes it in full.

    config = load_config(Path("run.yaml"), ["train.learning_rate=1e-4", "plan.0.rank=8"])

An unknown key is an error that names the nearest known one. What ``load_config`` returns is resolved: every local path
in it is absolute, so that ``to_yaml(config)``, kept in the run folder, describes the same run from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trimtab.config.errors import explain
from trimtab.config.run import DEFAULT_PLAN, RunConfig
from trimtab.config.yaml_text import LONGEST, parse_yaml, show, write_yaml
from trimtab.data.opening import is_table
from trimtab.data.sources import is_local
from trimtab.errors import ConfigError, did_you_mean, machine_refusal
from trimtab.hints import pasted
from trimtab.models.chat_template import template_text
from trimtab.reading import read_text

Schema = TypeVar("Schema", bound=BaseModel)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, or that of its folder, apply ``key.sub=value`` overrides in order, and resolve paths.

    Paths in the file are relative to its folder (``output``: to the working directory, but ``.`` is the file's own
    folder), those in overrides to the working directory.

    Raises:
        ConfigError: the file is missing or not YAML; a key is unknown; a value is not what it should be. One line
            for each problem.
    """
    file = Path(path)
    if (kept := file / "config.yaml").is_file():  # the folder of a run
        file = kept
    raw = read_mapping(file)
    raw.setdefault("output", f"runs/{file.stem}")
    return build_config(raw, file.parent, str(file), overrides)


def build_config(
    raw: dict[str, Any], root: Path, place: str, overrides: Sequence[str] = (), within: str = ""
) -> RunConfig:
    """A run's configuration from what its YAML says, ``raw`` (which is changed), with ``overrides`` applied in order.

    Args:
        root: the folder that the paths in ``raw`` are relative to.
        place: where ``raw`` comes from, for errors.
        overrides: ``key.sub=value``; their paths are relative to the working directory.
        within: what goes before a key in errors, such as ``base.``.

    Raises:
        ConfigError: a key is unknown, or a value is not what it should be. One line for each problem.
    """
    spell_out(raw)
    if raw.get("adapter") is None and not any(text.strip().startswith("adapter=") for text in overrides):
        raw.setdefault("plan", deepcopy(list(DEFAULT_PLAN)))
    _resolve_paths(raw, root, place)
    overridden = [override(raw, text) for text in overrides]
    return validated(RunConfig, raw, place, overridden, within)


def spell_out(raw: dict[str, Any]) -> None:
    """Write the short forms in ``raw`` out, so that overrides can reach into them."""
    if isinstance(raw.get("model"), str):
        raw["model"] = {"name": raw["model"]}
    if isinstance(data := raw.get("data"), dict) and isinstance(data.get("train"), str | dict):
        data["train"] = [data["train"]]


def read_mapping(file: Path, keys: str = "'model:' and 'data:'") -> dict[str, Any]:
    """What a YAML file says. Raises ConfigError if it is missing, not YAML, something other than ``keys``, or what
    another verb takes."""
    if file.is_file() and is_table(file):
        raise ConfigError(
            f"{file}: rows, in place of the YAML that names them; {pasted('init', '--train', file)} writes one"
        )
    raw = parse_yaml(config_text(file, "*.y*ml"), str(file))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected keys such as {keys}, got {show(raw)}")
    if not any(key in raw for key, _, _ in _KINDS if f"'{key}:'" in keys):
        for key, what, verb in _KINDS:
            if key in raw:
                raise ConfigError(f"{file}: the YAML of {what}, which is for {pasted(verb, file)}")
    return raw


_KINDS = (
    ("arms", "a study", "compare"),
    ("budget", "a search", "explore"),
    ("model", "a run", "finetune"),
)
"""By which key a YAML is known, what it is, and the verb that takes it."""


def config_text(file: Path, kin: str = "*") -> str:
    """The text of a configuration. Raises ConfigError if it is no file of text, is too long, or is missing; then one of
    ``kin`` in its folder may be the one that is meant."""
    try:
        return read_text(file, most=4 * LONGEST)
    except FileNotFoundError:
        others = [other.name for other in file.parent.glob(kin)] if file.parent.is_dir() else []
        raise ConfigError(f"{file}: no such file.{did_you_mean(file.name, others)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected text in UTF-8 ({error})") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def validated(
    schema: type[Schema], raw: dict[str, Any], place: str, overridden: Sequence[tuple[str, ...]], within: str = ""
) -> Schema:
    """``raw`` as a ``schema``. Raises ConfigError with a line for each problem; ``overridden`` are the keys that the
    command line set."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            keys = tuple(str(key) for key in problem["loc"])
            # The problem may be within what was set, or, for an unknown section, above it.
            is_ours = any(keys and keys[: len(key)] == key[: len(keys)] for key in overridden)
            lines.append(f"{'command line' if is_ours else place}: {within}{explain(schema, keys, problem)}")
        raise ConfigError("\n".join(lines)) from None


def to_yaml(config: RunConfig, beside: Path | None = None) -> str:
    """``config`` in full as YAML text; ``load_config`` of it gives an equal config.

    ``beside``: the folder of the file that it is for, as in ``to_mapping``.
    """
    return write_yaml(to_mapping(config, beside))


def to_mapping(config: RunConfig, beside: Path | None = None) -> dict[str, Any]:
    """What ``to_yaml`` writes.

    ``beside``: the folder of the file that it is for. The local paths of the model and of the rows are written as seen
    from there, so that the file may be moved together with them.
    """
    said = config.model_dump(mode="json")
    if beside is not None:

        def seen(text: str) -> str:
            if not Path(text).is_absolute():
                return text
            path = os.path.relpath(text, beside.resolve())
            return path if path.startswith(".") else f"./{path}"

        _map_sources(said, seen, seen, seen)
    return said


def with_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """``config`` with ``change`` made to every absolute path of what it reads: its model, its rows, its adapter."""
    said = config.model_dump(mode="json")

    def changed(text: str) -> str:
        return change(text) if Path(text).is_absolute() else text

    _map_sources(said, changed, changed, changed)
    return RunConfig.model_validate(said)


def override(raw: dict[str, Any], text: str) -> tuple[str, ...]:
    """Set one ``key.sub=value`` in ``raw``, a path in it relative to the working directory; gives the key's parts."""
    keys, value = parse_override(text)
    wrapped: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        wrapped = {key: wrapped}
    _resolve_paths(wrapped, Path.cwd(), "command line")
    value = wrapped
    for key in keys:
        value = value[key]
    set_dotted(raw, keys, value)
    return keys


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """``"key.sub=value"`` from the command line -> the key's parts and the value, which is read as YAML.

    Raises:
        ConfigError: there is no key or no ``=``, or the value is not YAML.
    """
    dotted, sign, value = text.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not sign or not all(keys):
        raise ConfigError(f"command line: expected key.sub=value, got '{text}'.")
    # YAML takes a leading * for an alias; here it can only be a pattern such as *.q_proj. Nor is a template YAML.
    return keys, value if value.startswith(("*", "{{", "{%")) else parse_yaml(value, f"command line: {dotted.strip()}")


def set_dotted(mapping: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set what ``keys`` lead to, through mappings and, by number, through lists.

    Raises:
        ConfigError: a list has no such number, or something on the way is neither list nor mapping.
    """
    target: Any = mapping
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        index: Any = key
        if isinstance(target, list):
            if not (key.isdecimal() and len(key) < 10 and int(key) < len(target)):
                raise ConfigError(
                    f"command line: {here} is a list of {len(target)}, counted from 0; it has no '{key}'."
                )
            index = int(key)
        elif not isinstance(target, dict):
            raise ConfigError(f"command line: {here} is {show(target)}, which has no key '{key}'.")
        if depth == len(keys) - 1:
            target[index] = value
            return
        if isinstance(target, dict) and target.get(index) is None:
            target[index] = {}
        target = target[index]


def _resolve_paths(raw: dict[str, Any], root: Path, place: str) -> None:
    """Make the local paths in ``raw`` absolute; names of hub models and data sets stay as they are. Raises ConfigError
    for a path that the system cannot look up; ``place`` says where it came from."""

    def local(text: str) -> str:
        path = root / Path(text).expanduser()
        # The last part is kept, since a link's target may have lost its suffix, as in the hub's own cache.
        return str(path.parent.resolve() / path.name)

    def data_file(text: str) -> str:
        return local(text) if is_local(text, root) else text

    def adapter(text: str) -> str:
        return (
            local(text) if text.startswith((".", "/", "~")) or text.count("/") != 1 or (root / text).exists() else text
        )

    def model(text: str) -> str:
        is_path = text.startswith((".", "/", "~")) or text.lower().endswith(".gguf")
        return local(text) if is_path or (root / text / "config.json").is_file() else text

    try:
        _map_sources(raw, model, data_file, adapter)
        if isinstance(said := raw.get("model"), dict) and isinstance(template := said.get("chat_template"), str):
            said["chat_template"] = template_text(template, root)
        if isinstance(output := raw.get("output"), str) and output:
            # "." is where the file lies: so a run's own config.yaml says it, wherever the run is moved or copied to.
            raw["output"] = str(root.absolute() if output == "." else Path(output).expanduser().absolute())
    except (OSError, ValueError, RuntimeError) as error:  # too long, a loop of links, the home of an unknown user
        said = machine_refusal(error) or " ".join(str(error).split())[:200]
        raise ConfigError(f"{place}: a path cannot be looked up ({said})") from error


_Change = Callable[[str], str]


def _map_sources(raw: dict[str, Any], model: _Change, data_file: _Change, adapter: _Change) -> None:
    """Change the names of the model, of the rows and of the adapter in ``raw``, wherever they are there."""
    if "adapter" in raw:
        raw["adapter"] = _map_texts(raw["adapter"], adapter)
    if isinstance(raw.get("model"), dict):
        if "name" in raw["model"]:
            raw["model"]["name"] = _map_texts(raw["model"]["name"], model)
    elif "model" in raw:
        raw["model"] = _map_texts(raw["model"], model)
    if isinstance(data := raw.get("data"), dict):
        for key in ("train", "validation", "test"):
            if key in data:
                data[key] = _map_paths(data[key], data_file, named=key == "test")


def _map_paths(value: Any, change: Callable[[str], str], *, named: bool) -> Any:
    """Change the paths of sources; what else is said of a source stays. ``named``: a mapping may be one of names."""
    if isinstance(value, dict):
        names = named and "path" not in value
        return {
            key: _map_paths(item, change, named=False) if names or key == "path" or str(key).isdigit() else item
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_map_paths(item, change, named=False) for item in value]
    return change(value) if isinstance(value, str) and value else value


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return value
