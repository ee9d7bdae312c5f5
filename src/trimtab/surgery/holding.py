"""Modules on which a weight hangs as a parameter, while that weight has an adapter.

Such a module keeps its parameter, under its name. Only what a look at the attribute gives is changed: the module gets a
subclass of its own class, with a property of that name, and the adapter is a child, ``ATTRIBUTE_adapted``. The subclass
has the name of the class, is the same for all modules of the class, and is made again where a module is copied or
unpickled; ``isinstance`` holds. (``torch.nn.utils.parametrize`` works alike, but moves the parameter, so that names and
``load_state_dict`` change, and refuses to be pickled.)
"""

from __future__ import annotations

import copyreg
from contextlib import ExitStack
from functools import cache, wraps
from typing import Any, NamedTuple

from torch import Tensor, nn

from trimtab.bases._held import stored
from trimtab.errors import SurgeryError

SUFFIX = "_adapted"
"""What the name of an adapted parameter's child is followed by."""


class _Shown(NamedTuple):
    """What is changed about a class."""

    kind: type[nn.Module]
    attributes: tuple[tuple[str, str], ...] = ()
    """Each with that of the weight whose adapter computes what it shows: the weight's own, or that of its bias."""
    wraps_forward: bool = False


def hold(holder: nn.Module, attribute: str, adapted: Any) -> None:
    """Put ``adapted`` onto ``holder``: from now on, ``attribute`` shows the effective weight, and the attribute of a
    bias that is trained with it the trained one."""
    holder._modules[attribute + SUFFIX] = adapted
    bias = adapted.handle.bias_attribute if any(one.bias is not None for one in adapted.every_adapter()) else None
    shown = {attribute} if bias is None else {attribute, bias}
    _show(holder, {*_shown(holder).attributes, *((name, attribute) for name in shown)})


def let_go(holder: nn.Module, attribute: str) -> None:
    """Take the adapter off ``attribute``. The module is of its own class again once the last one is gone."""
    del holder._modules[attribute + SUFFIX]
    _show(holder, {shown for shown in _shown(holder).attributes if shown[1] != attribute})


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without adapters."""
    return _shown(module).kind


def _shown(holder: nn.Module) -> _Shown:
    shown: _Shown = vars(type(holder)).get("_trimtab_shown") or _Shown(type(holder))
    return shown


def _show(holder: nn.Module, attributes: set[tuple[str, str]]) -> None:
    kind = own_class(holder)
    children: list[Any] = [holder._modules[weight + SUFFIX] for _, weight in attributes]
    wanted = _Shown(kind, tuple(sorted(attributes)), any(child.handle.wraps_forward for child in children))
    holder.__class__ = _holder_class(wanted) if attributes else kind


@cache
def _holder_class(shown: _Shown) -> type[nn.Module]:
    """The subclass of a class that shows effective weights."""
    kind = shown.kind

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = kind.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _new, tuple(shown), *reduced[2:]
        return reduced

    members = {
        **{attribute: _effective(attribute, weight) for attribute, weight in shown.attributes},
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": reduce,
        "_trimtab_shown": shown,
    }
    members["forward"] = _wrapped(shown)
    return type(kind.__name__, (kind,), members)


def _new(*shown: Any) -> nn.Module:
    made = _holder_class(_Shown(*shown))
    return made.__new__(made)


def _wrapped(shown: _Shown) -> Any:
    """The forward pass of the class, in the contexts that its held weights ask for. Raises SurgeryError if a weight is
    sharded while the module computes with it."""
    inner: Any = shown.kind.forward

    @wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for attribute, _ in shown.attributes:
            if _is_sharded(stored(self, attribute)):
                raise SurgeryError(
                    f"{attribute} of a {shown.kind.__name__} is sharded while the module computes with it (tensor "
                    "parallelism), so its adapter cannot act. Shard with fully_shard, or leave this weight out"
                )
        if not shown.wraps_forward:
            return inner(self, *args, **kwargs)
        with ExitStack() as around:
            for weight in {weight: None for _, weight in shown.attributes}:
                adapted: Any = self._modules[weight + SUFFIX]
                around.enter_context(adapted.around_forward(self))
            return inner(self, *args, **kwargs)

    return forward


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def _effective(attribute: str, weight: str) -> property:
    """A property that shows what the parameter ``attribute`` is with the adapter of ``weight``."""

    def read(self: nn.Module) -> Tensor:
        own = stored(self, attribute)
        if _is_sharded(own):  # between passes, when fully_shard asks for what it shards
            return own  # type: ignore[no-any-return]
        adapted: Any = self._modules[weight + SUFFIX]
        try:
            shown: Tensor = adapted.read(self) if attribute == weight else adapted.read_bias(self)
        except AttributeError as error:  # nn.Module would go on to look for the name, and find the frozen parameter
            raise RuntimeError(f"{attribute}: the effective weight cannot be computed: {error}") from error
        return shown

    def write(self: nn.Module, value: Any) -> None:
        vars(self)[attribute] = value  # a plain tensor, which DataParallel puts into its replicas

    return property(read, write)
