"""Quantises a model while its weights are read: only one of them is in memory in full at a time.

    model = load_model(locate("smollm2-135m"), torch.bfloat16, quantisation="nf4")

Every linear layer except the output head is quantised; embeddings, norms and biases are not.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab import bases
from trimtab.errors import ModelError
from trimtab.models.model_files import Weights
from trimtab.surgery.adapted import owners, weights_elsewhere
from trimtab.surgery.targets import output_heads


@torch.no_grad()
def quantise_model(
    model: PreTrainedModel,
    kind: str,
    dtype: torch.dtype,
    stored: Weights,
    name: str,
    device: torch.device | str = "cpu",
) -> None:
    """Quantise the linear layers of ``model`` in place as ``kind``, a quantised base, and cast the rest to ``dtype``.

    ``model`` must have been loaded in the dtype of its files, so that its weights are mapped from ``stored`` and take
    no memory before they are read. Each weight is read through a map of its own, and its pages go with that map;
    through the model's own map, the whole file would be in memory at the end. It is packed on ``device``, where the
    packed layers stay. Messages call the model ``name``.

    Raises ModelError if it is quantised already, has no layer to quantise, or the package of ``kind`` is missing.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{name}: its weights are quantised already; leave out quantisation: {kind}.")
    heads = output_heads(model)
    made: dict[int, nn.Module] = {}
    left = []
    for place, parent, attribute, child in list(owners(model)):
        base = bases.find(child)
        if base is None or not base.is_linear:
            continue
        if id(child) in heads or not base.is_called:  # a weight that is read has to be there as it multiplies
            left.append(place)
            continue
        if id(child) not in made:
            _map_anew(base.parameter, stored, f"{place}.weight")
            made[id(child)] = bases.quantise(base, kind, dtype, device)
            if not weights_elsewhere(model, base.parameter, {id(child)}):
                base.parameter.data = torch.empty(0)  # the list that this loop walks keeps the module alive
        parent._modules[attribute] = made[id(child)]
    if not made:
        raise ModelError(f"{name}: a {type(model).__name__} has no linear layer that could be quantised.")
    _narrow(model, dtype)
    bases.quantised_base(kind).describe(model, dtype, left)


def stored_sizes(model: nn.Module, kind: str) -> dict[int, int]:
    """Bytes that each weight would take once `quantise_model` has packed it as ``kind``, by the parameter's id."""
    if kind == "none":
        return {}
    base = bases.quantised_base(kind)
    return {id(weight): base.stored_bytes(shape, weight.dtype) for weight, shape in _weights_to_pack(model)}


def weight_bytes(model: nn.Module, kind: str = "none") -> int:
    """Bytes of all weights of ``model``, once it is quantised as ``kind``. The model may be on the meta device."""
    packed = stored_sizes(model, kind)
    return sum(packed.get(id(parameter), parameter.nbytes) for parameter in model.parameters())


def quantising_bytes(model: nn.Module, kind: str) -> int:
    """Bytes that `quantise_model` needs at its peak, beside the weights that remain: the largest dense layer, and the
    temporary tensors while it is quantised."""
    if kind == "none":
        return 0
    base, weights = bases.quantised_base(kind), _weights_to_pack(model)
    return max((weight.nbytes + base.quantising_bytes(shape, weight.dtype) for weight, shape in weights), default=0)


def _weights_to_pack(model: nn.Module) -> list[tuple[nn.Parameter, tuple[int, int]]]:
    """The weights that `quantise_model` packs, with their shapes ``(out, in)``."""
    heads = output_heads(model)
    handles = [bases.find(module) for module in model.modules() if id(module) not in heads]
    return [(one.parameter, one.shape) for one in handles if one is not None and one.is_linear and one.is_called]


def _map_anew(parameter: nn.Parameter, stored: Weights, name: str) -> None:
    """Map the tensor of ``parameter`` from its file again, if the file has it under ``name`` in the same layout."""
    if name not in stored:
        return
    mapped = stored[name]
    same = mapped.shape == parameter.shape and mapped.dtype == parameter.dtype
    if same and torch.equal(mapped[0], parameter[0]) and torch.equal(mapped[-1], parameter[-1]):
        parameter.data = mapped


def _narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not quantised to ``dtype``; a model in half precision keeps what its files store in float32."""
    numbers = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    mixed = {parameter.dtype for parameter in numbers} != {torch.float32}
    for parameter in numbers:
        if not (mixed and parameter.dtype == torch.float32):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
