"""The passes over ``[tokens, out]`` that an adapter adds to a frozen product, and which set of kernels does them.

``contract.py`` says what the passes are. ``plain.py`` does them by torch's operations, one after the other, on any
device, and ``channels.py`` where the channels come before the places, as they do behind a convolution. A faster set
for one kind of device is one more file, and one more line in ``kernels_for``.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.ops.kernels import channels, plain
from trimtab.ops.kernels.contract import KernelSet


def kernels_for(tensor: Tensor) -> KernelSet:
    """The kernels for ``tensor``, a product or its gradient: for its device, its dtype, and how it is laid out."""
    return plain if tensor.dim() == 2 else channels
