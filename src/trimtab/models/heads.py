"""What kind of model a configuration describes, and its head, what it has on top of its base: of a classifier a layer
or two, with a row for each label.

A head is drawn anew where the model brings none for the labels that it is to learn, and is trained whole beside the
adapter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from trimtab.errors import ModelError
from trimtab.models.locate import ModelHead
from trimtab.surgery.adapted import Adapted, bare_modules

Family = Literal["decoder", "encoder", "encoder-decoder", "image"]


def family(config: Any) -> Family:
    """The family of the model with this configuration; one that none of the others fits is taken for a decoder.

    Several kinds of model (BERT) can be told to write, too: by a flag, without which they read a text in both
    directions, whatever their class is called, and would see the very tokens that they are to write. So does XLNet,
    which is trained to write by masks of its own.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        writes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # XLM calls it causal
        return "decoder" if writes else "encoder"
    if kind == "xlnet":
        return "encoder"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image"
    return "encoder" if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES else "decoder"


POOLER = "pooler"
"""A part of an encoder that its pretraining may have had no use for, so that its files lack it."""


_CLASSES = ("SequenceClassification", "TokenClassification", "ImageClassification")


def own_head(config: Any) -> ModelHead | None:
    """What a model whose files say ``config`` answers with: its own head, or what it writes. None for an encoder whose
    files bring no head."""
    saved = next((name for name in config.architectures or []), "")
    if kind := next((kind for kind in _CLASSES if f"For{kind}" in saved), None):
        return head_for(f"AutoModelFor{kind}", _labels_of(config), config.problem_type)
    if family(config) == "encoder-decoder":
        return ModelHead("AutoModelForSeq2SeqLM")
    return None if family(config) in ("encoder", "image") else ModelHead()


def head_for(model_class: str, labels: Sequence[str], problem: str | None = None) -> ModelHead:
    """The head with a row for each of ``labels``; where its ``problem`` is not said, as transformers takes it."""
    problem = problem or ("single_label_classification" if len(labels) > 1 else "regression")
    return ModelHead(model_class, problem, () if problem == "regression" else tuple(labels))


def is_known(config: Any, labels: Sequence[str]) -> bool:
    """Whether a model whose files say ``config`` has a head for these labels, in this order."""
    return _labels_of(config) == list(labels)


def in_the_order_of(config: Any, labels: Iterable[str]) -> list[str]:
    """``labels`` in the order of the head of a model whose files say ``config``, if it has these very labels."""
    wanted, named = list(labels), _labels_of(config)
    return named if sorted(named) == sorted(wanted) else wanted


def _labels_of(config: Any) -> list[str]:
    known = getattr(config, "id2label", None) or {}
    return [str(known[number]) for number in sorted(known)]


def head_modules(model: Any) -> list[str]:
    """The names of the modules on top of the base of ``model`` that have weights of their own.

    Raises ModelError for a model in which nothing tells its head from its base.
    """
    if (base := _base_of(model)) is not None:
        below = {id(module) for module in base.modules()}
        return [name for name, module in _with_weights(model) if id(module) not in below]
    rows = model.config.num_labels
    if found := [name for name, module in model.named_children() if getattr(module, "out_features", None) == rows]:
        return found
    raise ModelError(
        f"a {type(model).__name__} does not say which of its layers are its head, so none can be trained for other "
        "labels; take another model"
    )


def _base_of(model: Any) -> nn.Module | None:
    """The part of ``model`` below its head; None where it is not held in one piece. Of a model of pictures and texts
    (CLIP, SigLIP) it is the model of pictures alone."""
    named = getattr(model, model.base_model_prefix, None)
    parts = [named, *(part for part in model.children() if isinstance(part, PreTrainedModel))]
    return next((part for part in parts if isinstance(part, nn.Module) and part is not model), None)


def poolers(model: Any) -> list[str]:
    """The names of the layers of ``model`` that its files may lack although they are below its head."""
    return [name for name, _ in _with_weights(model) if POOLER in name.split(".")]


def _with_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters(recurse=False))
    )


def learn_in_units(model: nn.Module, names: Iterable[str], head: ModelHead) -> None:
    """Let the last layer of a head of one number, if it is among the modules ``names`` that carry adapters, be trained
    in steps of ``head.spread`` (of the size of the numbers, where it has no bias).

    An optimiser's steps are as large as its learning rate says, whatever the loss is, so numbers in the thousands would
    take thousands of them. Trained so, the layer moves as one would that learns ``(number - centre) / spread``, its
    gradients (and with them what is clipped) the same.
    """
    modules = dict(bare_modules(model))
    for name in names:
        module = modules.get(name)
        if head.spread and isinstance(module, Adapted) and getattr(module.base, "out_features", None) == 1:
            unit = module.current_adapter.unit = _unit(module.base, head)
            for parameter in module.current_adapter.parameters():
                parameter.register_hook(partial(_times, unit))


def _times(unit: float, gradient: Tensor) -> Tensor:
    return gradient * unit


@torch.no_grad()
def _begin_around(model: Any, names: Iterable[str], head: ModelHead) -> None:
    """Let a new head of one number, whose layers are the modules ``names``, begin around ``head.centre``, as far apart
    as ``head.spread``. A layer without a bias has to learn where the centre is."""
    for module in map(model.get_submodule, names):
        if head.spread and getattr(module, "out_features", None) == 1:
            module.weight.mul_(_unit(module, head))
            if module.bias is not None:
                module.bias.fill_(head.centre)


def _unit(layer: Any, head: ModelHead) -> float:
    """How large the numbers are that the weight of ``layer`` has to give: without a bias, all of them."""
    return head.spread if layer.bias is not None else math.hypot(head.centre, head.spread)


def draw_head(model: Any, head: ModelHead, missing: Collection[str], *, is_known: bool) -> set[str]:
    """Draw the head of ``model`` anew, and what its files lack below it, unless the files bring a head for the very
    labels (``is_known``); gives those of the ``missing`` weights that are none any more."""
    heads, lacking = head_modules(model), {name.rpartition(".")[0] for name in missing}
    wanted = lacking & set(poolers(model))
    if lacking & set(heads) or not is_known:
        wanted |= set(heads)
    _draw(model, sorted(wanted), head.seed)
    _begin_around(model, wanted, head)
    return {name for name in missing if name.rpartition(".")[0] in wanted}


def _draw(model: Any, names: Iterable[str], seed: int) -> None:
    """Draw the weights of the modules ``names`` as transformers draws those of a new model: for one ``seed`` always the
    same."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for name in names:
            module = model.get_submodule(name)
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            model._init_weights(module)
