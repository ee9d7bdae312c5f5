"""What the YAML file of a run may say, strictly.

    config = load_config(Path("run.yaml"), ["train.learning_rate=1e-4", "plan.0.rank=8"])

An unknown key is an error that names the nearest known one. What ``load_config`` returns is resolved: every local path
in it is absolute, so that ``to_yaml(config)``, kept in the run folder, describes the same run from anywhere.

The smallest file names a model and some rows; everything else has a default:

    model: smollm2-135m
    data:
      train: rows.jsonl
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from trimtab.config.errors import explain
from trimtab.config.yaml_text import parse_override, parse_yaml, set_dotted, show, write_yaml
from trimtab.errors import ConfigError, did_you_mean, nearest

DEFAULT_PLAN = ({"match": "all-linear", "layers": "all", "method": "dora", "rank": 16, "alpha": 32},)

Schema = TypeVar("Schema", bound=BaseModel)

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB_DATA = re.compile(r"\w[\w.-]*/[\w.-]+(/[\w.-]+)?(:.+)?")  # owner/name/config:split


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _paths(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list | tuple) and items and all(isinstance(item, str) and item for item in items):
        return tuple(items)
    raise ValueError("expected a path or a hub id, or a list of them")


def _validation(value: object) -> float | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, str | list | tuple):
        return _paths(value)
    raise ValueError("expected a fraction between 0 and 1, a path or a hub id, a list of them, or null for none")


def _test(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str) and value:
        # The name becomes a file name in the run folder.
        value = {re.sub(r"[^A-Za-z0-9._-]+", "-", Path(value).stem).strip(".-") or "test": value}
    if not isinstance(value, Mapping) or not all(
        isinstance(item, str) and item for pair in value.items() for item in pair
    ):
        raise ValueError("expected a path, a mapping of names to paths, or null for none")
    for name in value:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"expected names made of letters, digits, '.', '_' and '-', not '{name}'")
    return dict(value)


def _choices(value: object) -> Literal["auto"] | tuple[str, ...] | None:
    if value is None or value == "auto":
        return value  # type: ignore[return-value]
    if isinstance(value, list | tuple) and all(isinstance(item, str) and item.strip() for item in value):
        if len(value) > 1 and len(set(value)) == len(value):
            return tuple(value)
        raise ValueError("expected two or more different answers")
    hint = ' (YAML reads yes, no and 1 as other than text: write "yes", "no", "1")' if isinstance(value, list) else ""
    raise ValueError(f"expected auto, null, or a list of answers, each a text{hint}")


def _warmup(value: object) -> float | int:
    if (isinstance(value, float) and 0 <= value < 1) or (value == 0 and value is not False) or _is_count(value):
        return value  # type: ignore[return-value]
    raise ValueError("expected a fraction of all steps below 1, or a whole number of steps")


def _validate_every(value: object) -> Literal["epoch"] | int | float:
    if value == "epoch" or (isinstance(value, float) and 0 < value < 1) or _is_count(value):
        return value  # type: ignore[return-value]
    raise ValueError("expected epoch, a whole number of steps, or a fraction of all steps below 1")


def _save_every(value: object) -> Literal["epoch"] | int:
    if value == "epoch" or _is_count(value):
        return value  # type: ignore[return-value]
    raise ValueError("expected epoch, or a whole number of steps")


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    for key in ("match", "method"):
        if key not in rule:
            close = nearest(key, [other for other in rule if other not in ("match", "layers", "method")], count=1)
            raise ValueError(f"the rule has no '{key}'" + (f" (is '{close[0]}' a slip?)" if close else ""))
    match = rule["match"]
    patterns = match if isinstance(match, list | tuple) else [match]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"'match' is expected to be a pattern of module names or a list of them, got {show(match)}")
    if not isinstance(rule["method"], str):
        raise ValueError(f"'method' is expected to be the name of a method, got {show(rule['method'])}")
    return rule


class Section(BaseModel):
    """Part of a configuration: fixed once made, and strict."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The pretrained model."""

    name: str = Field(
        min_length=1,
        description="A folder of a Hugging Face model, a GGUF file, a hub id, or smollm2-135m. A path is relative to "
        "the YAML's folder.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the frozen weights. auto: the type that train.precision computes in."
    )
    trust_remote_code: bool = Field(
        False, description="Let the model's own Python code run. Only for a model whose code you have read."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; null for its main branch.")
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="How attention is computed. auto: what transformers prefers for the model."
    )


class DataConfig(Section):
    """The rows. Paths are relative to the YAML's folder; on the command line, to the working directory."""

    train: Annotated[tuple[str, ...], BeforeValidator(_paths)] = Field(
        description="Rows to train on: one or more files (jsonl, json, csv, tsv, parquet) or hub ids (owner/name)."
    )
    train_limit: int | None = Field(
        None,
        ge=1,
        description="Only so many of these rows, validation rows split off them included: the same ones in every run, "
        "drawn evenly over files, and over answers where they are a closed set. null: all of them.",
    )
    validation: Annotated[float | tuple[str, ...] | None, BeforeValidator(_validation)] = Field(
        0.1,
        description="A fraction to split off train by the seed (evenly over files, and over answers where they are a "
        "closed set), or files, or null for none. It picks the best checkpoint.",
    )
    test: Annotated[dict[str, str], BeforeValidator(_test)] = Field(
        default_factory=dict,
        description="Rows to evaluate on, before and after: a path, or a mapping of names to paths. One path is named "
        "by its file.",
    )
    form: Literal["auto", "finlora", "completion", "alpaca", "multiple_choice", "chat", "text"] = Field(
        "auto",
        description="The form of the rows. auto: recognised by their keys. Rows of multiple_choice bring their own "
        "choices, which are scored as texts; LLM-Adapters' commonsense rows are read so where it is named.",
    )
    choices: Annotated[Literal["auto"] | tuple[str, ...] | None, BeforeValidator(_choices)] = Field(
        "auto",
        description="The closed set of answers, which are then scored instead of generated. auto: found from the "
        "training answers; null: answers are open.",
    )
    max_length: int = Field(
        1024, ge=2, description="Longest row in tokens; what is beyond is cut. Higher: more memory."
    )


class TrainConfig(Section):
    """How to train."""

    epochs: float = Field(
        3.0, ge=0, description="Passes over the training rows; 0: nothing is trained, the model is measured as it is."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps, whatever epochs says.")
    batch_size: int = Field(16, ge=1, description="Rows in one forward pass. Higher: faster, more memory.")
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes to one step: the rows of a step are batch_size times this."
    )
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate.")
    magnitude_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of magnitudes; null: learning_rate."
    )
    b_learning_rate_ratio: float = Field(
        1.0, gt=0, description="The learning rate of B is learning_rate times this (LoRA+ suggests 16)."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of the adapter's matrices.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the learning rate falls after the warmup."
    )
    warmup: Annotated[float | int, BeforeValidator(_warmup)] = Field(
        0.03, description="The learning rate rises over these steps: a fraction of all steps below 1, or a number."
    )
    prompt_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="What a token of the prompt counts in the training loss, beside 1 for one of the answer. Where "
        "answers are a word or two, a little (0.01 to 0.1) lets the texts themselves teach, too.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Type of the computation. auto: bfloat16 where the processor has it."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: about a third slower, much less memory."
    )
    compile: Literal["auto"] | bool = Field(
        False,
        description="Run the blocks under torch.compile: faster steps, after a few plain ones and a minute or so "
        "of compiling. auto: where the run is long enough to win that time back, and as long as it proves faster.",
    )
    group_by_length: bool = Field(True, description="Put rows of like length in one batch, which wastes no padding.")
    average: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Average the adapter over the last part of training: the fraction of steps; null for none.",
    )
    validate_every: Annotated[Literal["epoch"] | int | float, BeforeValidator(_validate_every)] = Field(
        "epoch", description="When to validate: epoch, a number of steps, or a fraction of all steps below 1."
    )
    metric: Literal["auto", "loss", "accuracy", "macro_f1"] = Field(
        "auto", description="What decides which step was best. auto: accuracy where answers are closed, else loss."
    )
    keep_best: bool = Field(True, description="End with the adapter of the best validation, not of the last step.")
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after so many validations without improvement; null: never."
    )
    save_every: Annotated[Literal["epoch"] | int, BeforeValidator(_save_every)] = Field(
        "epoch", description="When to write a checkpoint: epoch, or a number of steps."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept on disk.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initial values, order of rows, dropout and splits.")
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.")
    tensorboard: bool = Field(False, description="Write TensorBoard events, too.")


class EvaluationConfig(Section):
    """How the test rows are evaluated."""

    before: bool = Field(True, description="Evaluate the untuned model, too.")
    batch_size: int = Field(32, ge=1, description="Rows in one forward pass; results do not depend on it.")
    max_new_tokens: int = Field(32, ge=1, description="Longest generated answer, in tokens.")
    limit: int | None = Field(None, ge=1, description="Only the first rows of each test set; null: all of them.")


def _rules(value: object) -> object:
    if isinstance(value, list | tuple) and value:
        return tuple(value)
    raise ValueError("expected a list of rules")


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value):
        return Path(value)
    raise ValueError("expected a path")


class RunConfig(Section):
    """Everything that decides a run."""

    model: Annotated[ModelConfig, BeforeValidator(_named)] = Field(
        description="The pretrained model: its name, or a mapping."
    )
    quantisation: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="What becomes of the frozen linear layers while the model is loaded. int8: half of bfloat16's "
        "memory; nf4: about a quarter of it (4 bits a weight, doubly quantised scales). The output head and the "
        "embedding stay as they are. Needs bitsandbytes.",
    )
    data: DataConfig = Field(description="The rows.")
    plan: Annotated[tuple[Annotated[dict[str, Any], AfterValidator(_rule)], ...], BeforeValidator(_rules)] = Field(
        DEFAULT_PLAN,
        description="Rules, each a mapping of match, layers, method and the method's options; the last that matches a "
        "module decides.",
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="How to train.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="How to evaluate.")
    output: Annotated[Path, BeforeValidator(_path)] = Field(
        description="The run folder, relative to the working directory; by default runs/ and the YAML's name.",
    )

    @model_validator(mode="after")
    def _validation_is_there_if_needed(self) -> Self:
        if self.data.validation is None and self.train.early_stopping is not None:
            raise ValueError("train.early_stopping: needs validation rows, but data.validation is null")
        return self


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply ``key.sub=value`` overrides in order, and resolve paths.

    Paths in the file are relative to its folder (``output``: to the working directory), those in overrides to the
    working directory.

    Raises:
        ConfigError: the file is missing or not YAML; a key is unknown; a value is not what it should be. One line
            for each problem.
    """
    file = Path(path)
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
    raw.setdefault("plan", deepcopy(list(DEFAULT_PLAN)))
    _resolve_paths(raw, root)
    overridden = [override(raw, text) for text in overrides]
    return validated(RunConfig, raw, place, overridden, within)


def spell_out(raw: dict[str, Any]) -> None:
    """Write the short forms in ``raw`` out, so that overrides can reach into them."""
    if isinstance(raw.get("model"), str):
        raw["model"] = {"name": raw["model"]}
    if isinstance(data := raw.get("data"), dict) and isinstance(data.get("train"), str):
        data["train"] = [data["train"]]


def read_mapping(file: Path, keys: str = "'model:' and 'data:'") -> dict[str, Any]:
    """What a YAML file says. Raises ConfigError if it is missing, not YAML, or something other than ``keys``."""
    if not file.is_file():
        others = [other.name for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise ConfigError(f"{file}: no such file.{did_you_mean(file.name, others)}")
    try:
        raw = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected text in UTF-8 ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected keys such as {keys}, got {show(raw)}")
    return raw


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

        _map_sources(said, seen, seen)
    return said


def override(raw: dict[str, Any], text: str) -> tuple[str, ...]:
    """Set one ``key.sub=value`` in ``raw``, a path in it relative to the working directory; gives the key's parts."""
    keys, value = parse_override(text)
    wrapped: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        wrapped = {key: wrapped}
    _resolve_paths(wrapped, Path.cwd())
    value = wrapped
    for key in keys:
        value = value[key]
    set_dotted(raw, keys, value)
    return keys


def _resolve_paths(raw: dict[str, Any], root: Path) -> None:
    """Make the local paths in ``raw`` absolute; names of hub models and data sets stay as they are."""

    def local(text: str) -> str:
        path = root / Path(text).expanduser()
        # The last part is kept, since a link's target may have lost its suffix, as in the hub's own cache.
        return str(path.parent.resolve() / path.name)

    def data_file(text: str) -> str:
        is_path = (
            not _HUB_DATA.fullmatch(text)
            or text.lower().endswith(_DATA_SUFFIXES)
            or (root / text).exists()
            or (root / text.split("/")[0]).is_dir()
        )
        return local(text) if is_path else text

    def model(text: str) -> str:
        is_path = text.startswith((".", "/", "~")) or text.lower().endswith(".gguf")
        return local(text) if is_path or (root / text / "config.json").is_file() else text

    _map_sources(raw, model, data_file)
    if isinstance(output := raw.get("output"), str) and output:
        raw["output"] = str(Path(output).expanduser().absolute())


def _map_sources(raw: dict[str, Any], model: Callable[[str], str], data_file: Callable[[str], str]) -> None:
    """Change the names of the model and of the rows in ``raw``, wherever they are there."""
    if isinstance(raw.get("model"), dict):
        if "name" in raw["model"]:
            raw["model"]["name"] = _map_texts(raw["model"]["name"], model)
    elif "model" in raw:
        raw["model"] = _map_texts(raw["model"], model)
    if isinstance(data := raw.get("data"), dict):
        for key in ("train", "validation", "test"):
            if key in data:
                data[key] = _map_texts(data[key], data_file)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return value
