"""Makes models of their files: with their weights, or empty, with every shape and no weights.

    model = load_model(locate("smollm2-135m"), torch.bfloat16)

A missing weight is an error, since transformers would fill it with random values. Only a head for other labels, and the
rows of tokens that a run adds, are drawn, as transformers draws them, and the same ones at every load.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from trimtab.errors import ModelError
from trimtab.models.heads import POOLER, draw_head, head_modules, is_known, poolers
from trimtab.models.locate import Source
from trimtab.models.model_files import ModelFiles, loading
from trimtab.reading import within
from trimtab.surgery.adapted import bare_modules
from trimtab.surgery.plan import Rule

_SEED = 0  # of the rows of added tokens: the same ones at every load
_SECONDS = 300.0  # for a model without weights; one of 47,000 layers takes ten


def load_model(
    source: Source | ModelFiles,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    quantisation: str = "none",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model in ``dtype``, in eval mode, on ``device``.

    Args:
        source: from ``locate``, or its files where some are read already; its ``head`` says what the model is read for.
        dtype: the floating point type of the weights.
        attention: ``sdpa`` or ``eager``. All else is what transformers prefers: what takes a GPU, a run sets once the
            model is there.
        quantisation: ``none``, or the quantised base that its linear layers are packed as while they are read; on
            ``device``, which makes short work of it.
        device: where it is put.

    Raises:
        ModelError: it cannot be fetched or read, has no safetensors, lacks weights, is no model of the class that is
            asked for, or cannot be quantised.
    """
    files = ModelFiles.of(source)
    source = files.source
    options = files.options | _attention(attention)
    with loading(source, "model"):
        files.check_weights()
        if source.head.problem:
            options |= {"config": files.config_with_head, "ignore_mismatched_sizes": True}
        loaded: Any = getattr(transformers, source.head.model_class).from_pretrained(
            files.place,
            # In the dtype of the files, weights are only mapped, and are read one by one while they are quantised.
            dtype=dtype if quantisation == "none" else "auto",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        model: PreTrainedModel
        model, report = loaded
        if source.kind == "hub":
            files.check_weights()  # what has been fetched only now
        missing = {*report["missing_keys"], *(one[0] for one in report["mismatched_keys"])}
        if source.head.problem:
            missing -= draw_head(model, source.head, missing, is_known=is_known(files.config, source.head.names))
        if missing:
            shown = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ModelError(
                f"{source.name}: {len(missing)} weights of a {type(model).__name__} are not in its files ({shown}). "
                f"The files are incomplete, or belong to another kind of model."
            )
        if quantisation != "none":
            from trimtab.models.quantise import quantise_model

            quantise_model(model, quantisation, dtype, files.weights, source.name, device=device)
        if source.add_tokens:
            _add_rows(model, files)
    model.eval().to(device)
    return model


def _add_rows(model: Any, files: ModelFiles) -> None:
    """Make room in ``model`` for the tokens that are added to it, of which one may be what rows are padded with."""
    make_room(model, len(files.tokenizer))
    if files.source.head.problem and model.config.pad_token_id is None:
        model.config.pad_token_id = files.tokenizer.pad_token_id


@dataclass(frozen=True)
class Beside:
    """What is trained beside a plan.

    Attributes:
        whole: the modules that are trained whole: the model's head, and what its files lack below it.
        rules: a rule for those, and one for the rows of added tokens, as far as there are any.
    """

    whole: tuple[str, ...]
    rules: tuple[Rule, ...]


def beside_the_plan(files: ModelFiles, model: Any, decided: Callable[[str, Collection[str]], bool]) -> Beside:
    """What is trained of ``model`` beside a plan, but for modules that the plan itself says (``decided``, by their name
    and the names of all modules that would not be trained whole)."""
    rules, tokens = [], files.source.add_tokens
    if tokens:
        rules.append(_rows_rule(model, files.tokenizer, tokens))
    found = whole_modules(files, model)
    others = [name for name, _ in bare_modules(model) if name not in found] if found else []
    whole = tuple(name for name in found if not decided(name, others))
    if whole:
        rules.append(Rule(match=[glob.escape(name) for name in whole], method="full"))
    return Beside(whole, tuple(rules))


def whole_modules(files: ModelFiles, model: Any) -> list[str]:
    """The head of ``model``, if it is one for a run's labels, and the modules below it that the files lack."""
    if not files.source.head.problem:
        return []
    unfetched = files.source.kind == "hub" and model.device.type == "meta"
    return [*head_modules(model), *(poolers(model) if unfetched else _lacking(files, model))]


def drawn_modules(source: Source, model: Any) -> list[str]:
    """The modules of ``model`` that its files have no weights for, or none for the labels that it is read for: until
    something is trained or loaded into them, what they compute is by chance."""
    if not source.head.problem:
        return []
    files = ModelFiles(source)
    known = is_known(files.config, source.head.names)
    heads = [name for name in head_modules(model) if not (known and _has(files, name))]
    return [*heads, *_lacking(files, model)]


def _lacking(files: ModelFiles, model: Any) -> list[str]:
    """The layers of ``model`` below its head that its files have no weights for."""
    return [name for name in poolers(model) if not _has(files, name[name.index(POOLER) :])]


def _has(files: ModelFiles, module: str) -> bool:
    """Whether the files have the weight of ``module``, whatever stands before its name."""
    return any(key.endswith(f"{module}.weight") for key in files.weights)


def empty_model(
    source: Source | ModelFiles, dtype: torch.dtype = torch.float32, attention: str = "auto"
) -> PreTrainedModel:
    """The model on the meta device, made from its configuration: with every shape, and without weights.

    Raises ModelError as ``ModelFiles.config`` does, or if it is no model of the class that is asked for.
    """
    files = ModelFiles.of(source)
    source = files.source
    config = files.config_with_head
    options = _attention(attention)
    if source.add_tokens:
        _ = files.tokenizer  # a GGUF file is dequantised for it: not on meta
    building = within("making it from its configuration", seconds=_SECONDS)
    with loading(source, "model"), building, torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, source.head.model_class).from_config(
            config, dtype=dtype, trust_remote_code=source.trust_remote_code, **options
        )
        if source.add_tokens:
            _add_rows(model, files)
        return model


def side_files(source: Source) -> Path | None:
    """The folder with what the model has besides weights. That of a hub model is fetched, as far as it is small files;
    None if it cannot be."""
    if source.kind != "hub":
        return Path(ModelFiles(source).place)
    from huggingface_hub import snapshot_download

    weights = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ckpt", "*/*"]
    try:
        return Path(snapshot_download(source.location, revision=source.revision, ignore_patterns=weights))
    except Exception:  # offline, taken down, not allowed: nothing of that spoils the model that was loaded already
        return None


def module_folder(source: Source, origin: Path, name: str) -> Path | None:
    """The folder ``name`` of a model of sentence-transformers, whose other files lie in ``origin``; that of a hub model
    is fetched. None if there is none."""
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        patterns = [f"{name}/*.json", f"{name}/*.safetensors"]
        with contextlib.suppress(Exception):  # as for other side files
            origin = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
    return origin / name if (origin / name).is_dir() else None


def _attention(said: str) -> dict[str, Any]:
    return {"attn_implementation": said} if said in ("sdpa", "eager") else {}


def make_room(model: Any, tokens: int) -> None:
    """Give the embedding and the output head of ``model`` rows for so many ``tokens``, if they have fewer."""
    weight = model.get_input_embeddings().weight
    if tokens <= len(weight):
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        model.resize_token_embeddings(tokens, mean_resizing=not weight.is_meta)


def _rows_rule(model: Any, tokenizer: Any, tokens: Sequence[str]) -> Rule:
    """The rule of a plan by which the rows of ``tokens`` are trained, in the embedding, the output head and whatever
    else shares their weights."""
    tables = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    weights = {id(table.weight) for table in tables}
    names = [name for name, module in bare_modules(model) if _is_one_of(module, weights)]
    rows = tokenizer.convert_tokens_to_ids(list(tokens))
    return Rule(match=[glob.escape(name) for name in dict.fromkeys(names)], method="full", rows=rows)


def _is_one_of(module: nn.Module, weights: set[int]) -> bool:
    return isinstance(module, (nn.Embedding, nn.Linear)) and id(module._parameters.get("weight")) in weights
