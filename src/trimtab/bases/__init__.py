"""The kinds of frozen module. One file is one kind; a new file in this folder is found by listing it.

Each file defines one class that ends in ``Base``: a handle on one module of that kind, or on one weight that hangs on a
module (``HeldBase``). On a weight it knows the dense
value, how a batch goes through it, its norms, how a merged weight is written back and how many bytes it takes; on a
block, how wide the hidden state is, and where that stands in a call; on any other module, which tensors it holds. A
kind that a dense layer can be turned into knows how to quantise one, too. No other folder asks what kind of layer it
holds.
"""

from __future__ import annotations

from trimtab.bases._base import (
    Base,
    BlockBase,
    Kind,
    ModuleBase,
    WeightBase,
    can_be_called,
    is_instance_by_name,
    own_parameters,
)
from trimtab.bases._held import HeldBase, HeldWeight
from trimtab.bases._moments import second_moments
from trimtab.bases._offloading import stay
from trimtab.bases._quantised import QuantisedBase
from trimtab.bases._registry import (
    find,
    held_weights,
    named,
    names,
    parts,
    peft_names,
    quantise,
    quantised_base,
    quantised_by_size,
    quantised_names,
)
from trimtab.bases._turned import TurnedBase

__all__ = [
    "Base",
    "BlockBase",
    "HeldBase",
    "HeldWeight",
    "Kind",
    "ModuleBase",
    "QuantisedBase",
    "TurnedBase",
    "WeightBase",
    "can_be_called",
    "find",
    "held_weights",
    "is_instance_by_name",
    "named",
    "names",
    "own_parameters",
    "parts",
    "peft_names",
    "quantise",
    "quantised_base",
    "quantised_by_size",
    "quantised_names",
    "second_moments",
    "stay",
]
