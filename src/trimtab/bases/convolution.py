"""Convolutions over one, two or three dimensions: ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``.

As a matrix the weight is ``[out, in / groups * kernel]``, a row for each output channel. A factor ``A [rank, in *
kernel]`` is then a convolution to ``rank`` channels, and ``B [out, rank]`` one with a kernel of 1 behind it.

With groups, each output channel reads the channels of its own group, and so does its update: ``B A`` is a matrix of low
rank in the shape of the weight, which every group shares its A of, and which merges like any other.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.bases import _base

_KINDS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CALLS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution:
    """How a batch goes through the weight of one convolution. Its input is padded already, where zeros on both sides
    alike are not all there is to it."""

    reads_features = False
    follows_autocast = True

    def __init__(self, layer: Any, padding: tuple[int, ...]) -> None:
        self.kernel, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.groups, self.padding = layer.groups, padding
        self.dimensions = len(self.kernel)
        order = {2: torch.channels_last, 3: torch.channels_last_3d}.get(self.dimensions, torch.contiguous_format)
        self.order = order if _lies_in(layer.weight, order) else torch.contiguous_format

    @property
    def takes_factors(self) -> bool:
        return bool(self.groups == 1)

    @property
    def ungrouped(self) -> Convolution:
        other = copy.copy(self)
        other.groups = 1
        return other

    def _size(self, places: Sequence[int]) -> list[int]:
        """The places of the output for those of the input."""
        spans = (step * (kernel - 1) + 1 for step, kernel in zip(self.dilation, self.kernel, strict=True))
        sides = zip(places, self.padding, spans, self.stride, strict=True)
        return [(length + 2 * padding - span) // stride + 1 for length, padding, span, stride in sides]

    def _shaped(self, weight: Tensor) -> Tensor:
        """A kernel in the order in which the layer has its own, which the output takes over."""
        rows, features, size = weight.shape[0], weight.shape[1] // math.prod(self.kernel), math.prod(self.kernel)
        if self.order != torch.contiguous_format and 1 in (features, size):
            # The numbers lie in one order either way, and the strides say which is meant.
            return weight.reshape(rows, *self.kernel, features).contiguous().movedim(-1, 1)
        return weight.reshape(rows, features, *self.kernel).contiguous(memory_format=self.order)

    def _how(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def _backward(self, grad: Tensor, rows: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        """The gradients of the rows and of the weight, those of them that ``mask`` asks for."""
        grad = grad.unflatten(2, self._size(rows.shape[2:]))
        more = {"bias_sizes": None, "transposed": False, "output_padding": [0] * self.dimensions, "output_mask": mask}
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(grad, rows, weight, **more, **self._how())
        return found

    def rows(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == self.dimensions + 1 else x

    def tokens(self, rows: Tensor) -> int:
        return rows.shape[0] * math.prod(self._size(rows.shape[2:]))

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        call: Any = _CALLS[self.dimensions]
        y: Tensor = call(rows, self._shaped(weight), bias, **self._how())
        return y.flatten(2)

    def output(self, product: Tensor, shape: Sequence[int]) -> Tensor:
        batch = [] if len(shape) == self.dimensions + 1 else [product.shape[0]]
        # Not a view: autograd refuses to change a view that a custom function returned in place, and models do.
        shaped: Tensor = torch.ops.aten._unsafe_view(
            product, [*batch, product.shape[1], *self._size(shape[-self.dimensions :])]
        )
        return shaped

    def product_gradient(self, grad_output: Tensor) -> Tensor:
        return self.rows(grad_output).flatten(2)

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        batched = shape if len(shape) == self.dimensions + 2 else [1, *shape]
        rows = grad.new_empty(1).expand(batched)
        return self._backward(grad, rows, self._shaped(weight), [True, False, False])[0]

    def add_input_gradient(self, target: Tensor, grad: Tensor, weight: Tensor) -> None:
        target.add_(self.input_gradient(grad, weight, target.shape))

    def weight_gradient(self, grad: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
        depthwise = rows.shape[1] == self.groups > 1
        if depthwise and grad.numel() and grad.device.type == "cpu" and grad.dtype == torch.float32:
            return self._depthwise_gradient(grad, rows)
        weight = grad.new_empty(1).expand(shape[0], shape[1] // math.prod(self.kernel), *self.kernel)
        return self._backward(grad, rows, weight, [False, True, False])[1].flatten(1)

    def _depthwise_gradient(self, grad: Tensor, rows: Tensor) -> Tensor:
        """``weight_gradient`` of a convolution whose groups have one channel each, as a convolution itself, with the
        gradient for its kernel. On a processor it takes a seventh of the time of torch's own."""
        call: Any = _CALLS[self.dimensions]
        batch, features = grad.shape[:2]
        kernels = grad.reshape(batch * features, 1, *self._size(rows.shape[2:]))
        found: Tensor = call(
            rows.reshape(1, -1, *rows.shape[2:]),
            kernels,
            stride=self.dilation,
            padding=self.padding,
            dilation=self.stride,
            groups=batch * self.groups,
        )
        found = found.unflatten(1, (batch, features)).sum((0, 1))
        for axis, length in enumerate(self.kernel, 1):  # places at the end that no stride reaches
            found = found.narrow(axis, 0, length)
        return found.flatten(1)


def _lies_in(weight: Tensor, order: torch.memory_format) -> bool:
    """Whether torch takes ``weight`` for one that lies in ``order``; its strides decide where sides of one leave it
    open."""
    if not (weight.is_contiguous() and weight.is_contiguous(memory_format=order)):
        return weight.is_contiguous(memory_format=order)
    orders = torch.contiguous_format, order
    usual, other = (torch.empty(weight.shape, device="meta", memory_format=one).stride() for one in orders)
    return usual != weight.stride() == other


class ConvolutionBase(_base.WeightBase):
    """A dense convolution."""

    is_linear = False

    @staticmethod
    def knows(module: nn.Module) -> bool:
        plain = isinstance(module, _KINDS) and _base.holds_plain_weight(module)
        return plain and (type(module) in _KINDS or _computes_what_its_parent_does(module))

    @property
    def through(self) -> Convolution:  # type: ignore[override]
        layer: Any = self.module
        inside = layer.padding if self._pads_inside else (0,) * len(layer.kernel_size)
        if inside == "same":
            sides = zip(layer.dilation, layer.kernel_size, strict=True)
            inside = tuple(step * (kernel - 1) // 2 for step, kernel in sides)
        return Convolution(layer, (0,) * len(layer.kernel_size) if inside == "valid" else inside)

    @property
    def _pads_inside(self) -> bool:
        """Whether the convolution itself pads: with zeros, as many on one side as on the other."""
        layer: Any = self.module
        if layer.padding_mode != "zeros" or layer.padding != "same":
            return bool(layer.padding_mode == "zeros")
        sides: list[int] = layer._reversed_padding_repeated_twice
        return sides[::2] == sides[1::2]

    def prepared(self, x: Tensor) -> Tensor:
        if self._pads_inside:
            return x
        layer: Any = self.module
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)

    @property
    def shape(self) -> tuple[int, int]:
        return self.parameter.shape[0], math.prod(self.parameter.shape[1:])

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.at_hand().flatten(1)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.parameter.shape)

    def as_weight(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    @property
    def groups(self) -> int:
        return int(self.module.groups)  # type: ignore[arg-type]

    def peft_options(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        layer: Any = self.module
        reads_all = "A" in tensors and tensors["A"].shape[1:2] == (layer.in_channels,)
        return {"across_groups": True} if layer.groups > 1 and reads_all else {}

    def peft_differs(self, options: Any) -> str:
        layer: Any = self.module
        if layer.padding_mode != "zeros":
            return f"PEFT pads the update's input with zeros, and this convolution in mode '{layer.padding_mode}'"
        if any(step != 1 for step in layer.dilation):
            return f"PEFT leaves the dilation {tuple(layer.dilation)} of this convolution out of the update"
        if layer.groups > 1 and not options.across_groups:
            return "PEFT's update of a convolution with groups reads the channels of all groups"
        return ""

    def in_layout(self, name: str, tensor: Tensor) -> Tensor:
        ones = [1] * (self.parameter.dim() - 2)
        if name == "magnitude":
            return tensor.reshape(1, -1, *ones)
        if name == "B":
            return tensor.reshape(*tensor.shape, *ones)
        return tensor.reshape(len(tensor), -1, *self.parameter.shape[2:]) if name == "A" else tensor

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        if name not in ("A", "B"):
            return tensor.flatten()
        fits = tensor.shape[2:] == self.parameter.shape[2:] if name == "A" else tensor.shape[2:].numel() == 1
        return tensor.flatten(1) if fits else tensor


def _computes_what_its_parent_does(module: Any) -> bool:
    """Whether a class derived from a convolution computes what the convolution would, asked with a few channels and
    places in float64."""
    kind: Any = type(module)
    parent: Any = next(one for one in kind.__mro__ if one in _KINDS)
    if kind.forward is parent.forward and kind._conv_forward is parent._conv_forward:
        return True
    if len(inspect.signature(kind.forward).parameters) != 2:  # besides itself it takes the input, no more
        return False
    draw, sides = torch.Generator(), zip(module.kernel_size, module.dilation, module.stride, strict=True)
    groups, kernel = module.groups, module.kernel_size
    weight = torch.randn(groups, 1, *kernel, dtype=torch.float64, generator=draw)
    bias = None if module.bias is None else torch.randn(groups, dtype=torch.float64, generator=draw)
    places = [step * (length - 1) + 2 * stride + 2 for length, step, stride in sides]
    x = torch.randn(2, groups, *places, dtype=torch.float64, generator=draw)
    tensors = {"weight": nn.Parameter(weight, requires_grad=False), "bias": bias}
    small = object.__new__(kind)
    small.__dict__.update(module.__dict__ | {"_parameters": tensors, "in_channels": groups, "out_channels": groups})
    try:
        with torch.no_grad():
            return torch.equal(kind.forward(small, x), parent.forward(small, x))
    except Exception:  # it asks for something else than an image
        return False
