"""What every method on a weight shares: its options, its magnitude, and the way from an update to an output.

A method is an update ``dV``, with or without a magnitude (``W' = m * (W + dV) / ||W + dV||``; without: ``W' = W +
dV``). A method file says what ``dV`` is; this file does the rest, so that the magnitude is a switch that any update
can take.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.bases import TurnedBase, WeightBase
from trimtab.errors import PlanError
from trimtab.methods import _effective_stack, _method, _plain, _stack
from trimtab.methods._norms import KeptNorm, SquaredNorms, marks_of, same_values, squares_of
from trimtab.ops.autocast import without_autocast
from trimtab.ops.cost import Compute
from trimtab.ops.decomposition import Axis, magnitude_over_norm
from trimtab.ops.dropout import Drawn, Keep, draw_keep
from trimtab.ops.few_tokens import FewTokensLinear
from trimtab.ops.frozen_linear import Operands, frozen_linear
from trimtab.ops.ratio import ratio_of
from trimtab.ops.reference import effective_weight
from trimtab.ops.traced import seen_through
from trimtab.ops.update import TurnedUpdate, Update


class WeightOptions(_method.Options):
    """What any method on a weight can be told."""

    magnitude: bool = Field(False, description="Train a magnitude per output (or input) beside the update.")
    bias: bool = Field(False, description="Train the layer's bias as well. A layer that has none stays without.")
    magnitude_axis: Axis = Field(
        "output", description="output: one magnitude per output row (the standard); input: one per input column."
    )
    detach_norm: Annotated[bool, _method.TRAINING_ONLY] = Field(
        True,
        description="Treat the norm as a constant in the backward pass (DoRA, section 4.3); false: exact gradient.",
    )
    compute: Compute = Field(
        "auto",
        description=(
            "folded: form the effective weight, then multiply once; factored: multiply by the update apart; auto: "
            "what costs less on the shapes at hand, and never a rounded weight in the forward pass."
        ),
    )
    keep_product: Annotated[bool, _method.TRAINING_ONLY] = Field(
        False,
        description=(
            "Keep one more activation for the magnitude's gradient: for models that change a layer's output in place, "
            "where it is else computed again."
        ),
    )

    @property
    def trains_bias(self) -> bool:
        """Whether a layer's bias is trained, if it has one."""
        return self.bias


class WeightMethod(_method.Method):
    """The trained tensors of one method on one frozen weight, and what they do.

    Args:
        base: the frozen weight ``[out, in]``; read here for its shape, its dtype and its norms, and not kept.
        options: the method's options.
    """

    magnitude: nn.Parameter | None
    bias: nn.Parameter | None
    stack_pass: _stack.StackPass | None = None
    was_read = False
    """Whether somebody has read the numbers of the effective weight, who may assign what was computed from them."""
    told_of_no_gradient = False
    kept_since = 0
    """How often what was kept of the trained tensors has been dropped."""
    sits_on = "weight"
    options_type = WeightOptions
    options: WeightOptions
    rate_groups: Mapping[str, _method.RateGroup] = {"magnitude": "magnitude", "bias": "bias"}

    def __init__(self, base: WeightBase, options: WeightOptions) -> None:
        base.require()
        if options.dropout and not base.is_called:
            raise PlanError(
                f"dropout {options.dropout}: this weight is read by the module that holds it, so there is no input to "
                "drop; set dropout: 0 for it, by a rule of its own behind the others"
            )
        super().__init__(base, options)
        self.frozen_column = base.frozen_column
        self.stored_transposed = base.stored_transposed
        self.squares: SquaredNorms | None = None
        self._kept: KeptNorm | None = None
        self._few_tokens: FewTokensLinear | None = None
        if options.magnitude:
            squares = self.square_norms(base)
            self.magnitude = nn.Parameter(squares.sqrt().to(self.dtype))
            self.zero_rows = 0 if squares.is_meta else int((squares == 0).sum())
        else:
            self.register_parameter("magnitude", None)
        bias = base.bias if options.trains_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(self.dtype, copy=True)))

    # What a method file says -------------------------------------------------------------------------------------

    def weight_tensors(self) -> tuple[Tensor, ...]:
        """The trained tensors that the weight is computed from, in a replica of ``nn.DataParallel`` as well."""
        held = self.__dict__.get("_former_parameters") or self._parameters
        return tuple(tensor for name, tensor in held.items() if tensor is not None and name != "bias")

    def factors(self) -> tuple[Update | None, tuple[Tensor, ...]]:
        """The update and its trained tensors; None and nothing where only a magnitude is trained."""
        raise NotImplementedError

    def delta(self, dtype: torch.dtype) -> Tensor | None:
        """``dV [out, in]`` built in full in ``dtype``, by the plain formula, differentiable; None where there is no
        update."""
        update, tensors = self.factors()
        return None if update is None else update.delta(tuple(tensor.to(dtype) for tensor in tensors))

    def total(self, weight: Tensor) -> Tensor:
        """``W + dV [out, in]`` in the dtype of ``weight``, which is W."""
        delta = self.delta(weight.dtype)
        return weight if delta is None else weight + delta

    def squared_norms(self, weight: Tensor, squares: Tensor) -> Tensor:
        """``||W + dV||^2`` along the magnitude's axis in the dtype of ``squares``, differentiable in the trained
        tensors; ``weight`` is W in its own dtype, ``squares`` its ``||W||^2``."""
        total = self.total(weight.to(squares.dtype))
        return total.square().sum(-1 if self.options.magnitude_axis == "output" else -2)

    def held(self, tensor: Tensor) -> Tensor:
        """``tensor [..., in]``, from which no gradient goes back to the column that the base keeps as it is."""
        if self.frozen_column is None or not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        columns = torch.arange(tensor.shape[-1], device=tensor.device)
        return torch.where(columns == self.frozen_column, tensor.detach(), tensor)

    # What follows from it ----------------------------------------------------------------------------------------

    def square_norms(self, base: WeightBase, weight: Tensor | None = None) -> Tensor:
        """``||W||^2`` along the magnitude's axis, float32 or float64, of the weight that ``base`` holds now.

        It is kept, and computed again when the frozen weight is another tensor or was changed (``trimtab.ops.stamp``);
        in a compiled program, which looks at no tensor's history, it is computed from ``weight`` each time.
        """
        axis, dtype = self.options.magnitude_axis, _method.full_dtype(base)
        if torch.compiler.is_compiling() and weight is not None and base.stored_dense:
            return weight.detach().to(dtype).square().sum(-1 if axis == "output" else -2)
        kept = squares_of(base, self.squares, (axis, self.stored_transposed), dtype, quickly=bool(self._holds))
        if kept is not self.squares:
            self.squares, self._few_tokens = kept, None
        return kept.values

    def prepare(self, base: WeightBase) -> None:
        if self.magnitude is not None:
            self.square_norms(base)

    def norm(self, weight: Tensor, base: WeightBase) -> Tensor:
        """``n = ||W + dV||`` for ``weight``, the W of ``base``: a constant for autograd unless ``detach_norm`` is off.

        Without gradients (inference), and while the trained tensors are held (``hold``), the norm is kept, and used
        again as long as they and W hold the same values.
        """
        with without_autocast(weight):
            return self._norm(weight, self.square_norms(base, weight))

    def _norm(self, weight: Tensor, squares: Tensor) -> Tensor:
        trains = torch.is_grad_enabled()
        if trains and not self.options.detach_norm:
            squares = self.squared_norms(weight, squares)
            # The square root has no derivative at 0; a row whose norm is 0 takes no part.
            return torch.where(squares > 0, squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt(), 0.0)
        with torch.no_grad():
            kept = self._what_is_kept(weight, squares) if self._holds or not trains else None
            fits = kept is not None and not (trains and kept.norm.is_inference())
            return kept.norm if kept is not None and fits else self.squared_norms(weight, squares).sqrt()

    def _what_is_kept(self, weight: Tensor, squares: Tensor) -> KeptNorm | None:
        """What passes without gradients share, and all passes while tensors are held: the norm and the ratios made of
        it, with marks of the trained tensors that they belong to. Computed again when one of these or W has changed.
        None where comparing would cost as much.

        Version counters of the tensors would not do: fused optimisers and ``parameter.data`` go round them.
        """
        if torch.compiler.is_compiling() or self._is_replica:
            return None
        kept = self._kept
        if kept is not None and (kept.squares is not squares or kept.dtype != weight.dtype):
            kept = None
        tensors = None if self._holds else self.weight_tensors()
        # An accelerator would be waited for at each comparison, which costs more than the norm.
        waits = weight.device.type != "cpu"
        if tensors is not None and (waits or sum(tensor.numel() for tensor in tensors) >= weight.numel()):
            return None
        if kept is None or not same_values(kept.marks, tensors):
            norm = self.squared_norms(weight, squares).sqrt()
            self._kept = kept = KeptNorm(marks_of(tensors), squares, weight.dtype, norm, {})
        return kept

    def hold(self) -> None:
        if not self._holds:
            self.forget()
        super().hold()

    def forget(self) -> None:
        self._kept = self._few_tokens = None
        self.kept_since += 1

    def rest(self) -> Any:
        known, self.squares = self.squares, None
        self.forget()
        return known

    def resume(self, shared: Any) -> None:
        self.squares = self.squares or shared

    def release(self) -> None:
        super().release()
        self._few_tokens = self._few_tokens if self._holds else None

    def _for_few_tokens(self, base: WeightBase) -> FewTokensLinear | None:
        """The layer for passes over a few tokens while its tensors are held. None where such a pass has to go the
        general way: for a quantised weight, scaled columns, a layer that is no plain matrix, or a form that the user
        chose."""
        options = self.options
        if options.compute == "folded" or options.magnitude_axis == "input":
            return None
        layer = base.module._parameters
        if not (base.stored_dense and base.through.reads_features) or layer.get("weight") is None:
            return None
        weight, ratio = base.weight(), None
        update, tensors = self.factors()
        if any(tensor.is_meta for tensor in tensors):
            return None
        if self.magnitude is not None:
            ratio = ratio_of(self.magnitude, self.norm(weight, base), weight.dtype)
        own = Operands(
            weight=weight, bias=self.bias_of(base), ratio=ratio, update=None, tensors=(), through=base.through
        )
        operands = own._replace(update=update, tensors=tensors)
        return FewTokensLinear(operands, layer)

    def ratio(self, weight: Tensor, base: WeightBase) -> Tensor | None:
        """``m / n`` along the magnitude's axis, differentiable; None without a magnitude."""
        return None if self.magnitude is None else self._over(self.norm(weight, base))

    def _over(self, norm: Tensor) -> Tensor:
        assert self.magnitude is not None
        return magnitude_over_norm(self.magnitude.to(norm.dtype), norm)

    def turned_factors(self) -> tuple[Update | None, tuple[Tensor, ...]]:
        """``factors`` of ``dV^T``."""
        update, tensors = self.factors()
        return None if update is None else TurnedUpdate(update), tensors

    def seen(self, base: WeightBase) -> WeightBase:
        """``base``; or, where another layer is tied to the one that the adapter was made for and multiplies with
        ``W^T``, that layer as one with the weight W."""
        return base if base.stored_transposed == self.stored_transposed else TurnedBase(base)

    def drops(self, x: Tensor) -> bool:
        """Whether the update sees less than all of ``x``."""
        # What a look-up is given are numbers of rows, of which none can be dropped.
        return self.training and bool(self.options.dropout) and x.is_floating_point()

    def draw(self, x: Tensor) -> Drawn | None:
        """What dropout leaves of ``x`` to the update, drawn anew."""
        return draw_keep(x, self.options.dropout)

    def forward(self, x: Tensor, base: WeightBase) -> Tensor:
        """The output ``[..., out]`` for ``x [..., in]`` on the frozen weight of ``base``."""
        if seen_through():
            return _plain.plainly(self, x, base)
        seen, axis = self.seen(base), self.options.magnitude_axis
        if turned := seen is not base:
            axis = "input" if axis == "output" else "output"
        drops = self.drops(x)
        held = self._holds and not (turned or self._is_replica)
        if held and not (drops or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            if self._few_tokens is None or not self._few_tokens.is_true:
                self._few_tokens = self._for_few_tokens(base)
            if self._few_tokens is not None and self._few_tokens.takes(x):
                return self._few_tokens(x)
        update, tensors = self.turned_factors() if turned else self.factors()
        keep = self.draw(x) if drops and update is not None else None
        padded = base.prepared(x)
        if keep is not None and padded is not x:
            keep = Keep(base.prepared(keep.of(torch.ones_like(x))).to(torch.int8).neg_(), keep.scale)
        x, dtype = padded, base.dtype_for(x)
        weight = base.weight(dtype)
        magnitude, norm, ratios = self.magnitude, None, None
        if magnitude is not None:
            norm = self.norm(weight.t() if turned else weight, seen)
            if self._kept is not None and norm is self._kept.norm:
                ratios = self._kept.ratios
            if axis == "input":
                if not base.through.reads_features:
                    return _plain.columns_scaled(self, x, base, ratio=self._over(norm), weight=weight, keep=keep)
                # Columns of the weight scaled are inputs scaled; in half precision the product is taken in full digits.
                x, magnitude, norm, ratios = (x * self._over(norm)).to(x.dtype), None, None, None
        return frozen_linear(
            x,
            weight,
            self.bias_of(base),
            through=base.through,
            update=update,
            tensors=tensors,
            keep=keep,
            magnitude=magnitude,
            norm=norm,
            keep_product=self.options.keep_product,
            compute=self.options.compute,
            again=base.again(dtype),
            ratios=ratios,
        )

    @property
    def changes_weight(self) -> bool:
        """Whether the layer acts with another weight than its own; else its bias alone is trained."""
        return True

    def bias_of(self, base: WeightBase) -> Tensor | None:
        """The bias ``[out]`` that the layer adds, in the dtype of its own: the trained one, or its own."""
        own = base.bias
        if self.bias is None or (own is None and not getattr(self.options, "added_bias", False)):
            return own  # of tied layers, those without a bias stay without
        return self.bias.to(base.dtype if own is None else own.dtype)

    def copies(self, base: WeightBase) -> dict[str, nn.Parameter]:
        own = base.stored_bias
        return {"bias": own} if self.bias is not None and isinstance(own, nn.Parameter) else {}

    @torch.no_grad()
    def effective_weight(self, base: WeightBase, dtype: torch.dtype | None = None) -> Tensor:
        """``W' [out, in]`` by the plain formula, in ``dtype`` (default: the dtype of the norms, float32 or float64)."""
        return self.formula(base, dtype or _method.full_dtype(base))

    def acting_weight(self, base: WeightBase) -> Tensor:
        """``W'`` in the dtype and the layout in which the module stores its weight, differentiable in the trained
        tensors as the output is (``detach_norm``)."""
        self.was_read = True
        return base.as_stored(self.formula(base, _method.full_dtype(base), detach_norm=self.options.detach_norm)).to(
            base.dtype
        )

    def formula(self, base: WeightBase, dtype: torch.dtype, detach_norm: bool = False) -> Tensor:
        """``W'`` by the plain formula in ``dtype``, differentiable."""
        if (seen := self.seen(base)) is not base:
            return self.formula(seen, dtype, detach_norm).t()
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        with without_autocast(base.parameter):
            total = self.total(base.weight().to(dtype))
            axis = self.options.magnitude_axis
            return effective_weight(total, magnitude=magnitude, axis=axis, detach_norm=detach_norm)

    def one_pass(self, base: WeightBase) -> AbstractContextManager[object]:
        """The context of a forward pass of the module that reads the stack of ``base``."""
        return _stack.one_pass(self, base)

    def look(self, base: WeightBase) -> Tensor:
        """What such a module reads: the effective weights, as they are stored."""
        return _effective_stack.look(self, base)

    def starts_at_base(self, name: str) -> bool:
        return name in ("magnitude", "bias")

    def of_base(self, name: str, base: WeightBase) -> Tensor:
        if name == "magnitude":
            return self.square_norms(self.seen(base)).sqrt()
        return torch.zeros(self.out_features, device=base.device) if base.bias is None else base.bias

    @torch.no_grad()
    def ratio_on(self, base: WeightBase) -> Tensor | None:
        seen = self.seen(base)
        return self.ratio(seen.weight(), seen)

    @torch.no_grad()
    def refit(self, base: WeightBase, ratio: Tensor | None) -> None:
        seen = self.seen(base)
        if seen.shape != (self.out_features, self.in_features):
            super().refit(seen, ratio)
            if self.magnitude is not None and ratio is not None and ratio.shape == self.magnitude.shape:
                # Norms over more or fewer numbers than before: what they are divided by must not change what stayed.
                norms = self.norm(seen.weight(), seen)
                self.magnitude.copy_(torch.where(ratio != 0, ratio * norms, self.magnitude))

    def _apply(self, *args: Any, **kwargs: Any) -> WeightMethod:
        self.rest()
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "squares": None, "_kept": None, "_few_tokens": None}
