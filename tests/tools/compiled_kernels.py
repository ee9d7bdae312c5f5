"""Compile Triton's programs for GPUs that are not here, with the block sizes and types that our layers start them with,
and print what each takes of a multiprocessor: ``python tests/tools/compiled_kernels.py``.

The launches are recorded from the passes themselves, run on tensors without numbers, so that what is compiled is what
would be started.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from trimtab.ops.kernels import (
    triton as ours,
    triton_dropout as dropping,
    triton_programs as programs,
    triton_segment_gradients as segment_gradients,
    triton_segment_programs as segments,
    triton_square as square,
)

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int8: "*i8",
}
ARCHITECTURES = (80, 90)


class Recorded:
    """Stands for a program, and notes what it is started with."""

    def __init__(self, program: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self._program, self._launches = program, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **given: self._launches.append((self._program, given))


def launches(dtype: torch.dtype, rank: int, tokens: int = 4096, size: int = 4096) -> list[tuple[Any, dict[str, Any]]]:
    """What the passes start for a layer with a magnitude and a bias, its weight ``size`` times ``size``."""
    found: list[tuple[Any, dict[str, Any]]] = []
    kept = [
        (file, name, one)
        for file in (programs, square, dropping, segments, segment_gradients)
        for name, one in vars(file).items()
        if isinstance(one, JITFunction) and not name.startswith("_")
    ]
    for file, name, program in kept:
        setattr(file, name, Recorded(program, found))

    def start(program: Any, *given: Any) -> None:
        program.__wrapped__(*given)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        product, inner, weight = (empty(*one, dtype=dtype) for one in ((tokens, size), (tokens, rank), (size, size)))
        vector, a, b, side = empty(size), empty(rank, size), empty(size, rank), 4 * rank + 2
        tables = empty(math.ceil(size / side), side), empty(math.ceil(size / side), side)
        start(ours._forward_pass, product, None, inner, b, 2.0, vector, vector, False, False)
        start(
            ours._forward_pass,
            product,
            None,
            empty(tokens, 3 * side, dtype=dtype),
            None,
            1.0,
            vector,
            None,
            True,
            False,
        )
        start(ours._backward_pass, product, product, inner, b, 2.0, vector, True, True)
        start(ours._quotients, vector, vector, 2.0**-40)
        start(ours._squared_norms, weight, vector, a, b, 2.0)
        start(ours._forward_pass, weight, empty(size, size, dtype=dtype), b, a.t(), 2.0, vector, None, False, True)
        groups = len(tables[0])
        start(square._compress, product, *tables, side, groups, None)
        expanded, order = empty(tokens, groups, side, dtype=dtype), empty(tokens, dtype=torch.int64)
        start(square._compress, product, None, None, side, groups, order)
        start(square._add_expanded, product, expanded, *tables, side, None)
        start(square._add_expanded, product, expanded, *tables, side, order)
        start(square._squared_norms, weight, vector, empty(side, side), *tables, groups)
        drawn = empty(1, dtype=torch.int64), round(0.05 * 2**32)
        start(dropping._drop, product, *drawn)
        each = (list(one) for one in ((b, b), (vector, vector), (vector, vector)))
        tables = empty(2, 8, dtype=torch.int64), empty(tokens // 32, 3, dtype=torch.int64)
        spread = empty(tokens * 4 * side, dtype=dtype)
        start(segments.multiply, empty(1, tokens, rank), product, order, *tables, [a, a], rank, 32, False)
        matrices, turned = [empty(side, side)] * 2, empty(4 * tokens, side, dtype=dtype)
        for way in (False, True):
            start(segments.multiply, turned.new_empty(1, *turned.shape), turned, None, *tables, matrices, side, 32, way)
        start(segment_gradients.outer, turned, turned, None, tables[1])
        inner_of_all = empty(2, tokens, rank)
        start(segments.add, product, None, inner_of_all, spread, order, *tables, *each, 32, False)
        if rank <= dropping.RANKS:
            given = product, product, inner_of_all, order, *tables
            start(segment_gradients.backward, *given, [b, b], [vector, vector], True)
            start(segment_gradients.outer, empty(tokens, rank), product, order, tables[1])
            start(segment_gradients.add_up, empty(8, rank * size), empty(2, 2, dtype=torch.int64))
            start(dropping._product, product, empty(rank, size, dtype=dtype), *drawn)
            start(dropping._add, product, inner, empty(rank, size, dtype=dtype), *drawn)
            start(dropping._outer, inner, product, *drawn)
    finally:
        for file, name, program in kept:
            setattr(file, name, program)
    assert {program.__name__ for program, _ in found} == {name for _, name, _ in kept} or rank > dropping.RANKS
    return found


def source(program: Any, given: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """``program`` as Triton would compile it for those arguments, and its options."""
    known = {parameter.name for parameter in program.params if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(program.arg_names):
        value = given[name]
        varies = program.params[place].do_not_specialize
        if name in known or (not isinstance(value, Tensor) and value == 1 and not varies):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or (value % 16 == 0 and not varies):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": given["num_warps"]}
    return ASTSource(fn=program, signature=signature, constexprs=constants, attrs=attributes), options


def compiled(dtype: torch.dtype, rank: int, architecture: int) -> Iterator[dict[str, Any]]:
    """What each program takes: registers a thread, bytes of shared memory a block, bytes spilled a thread."""
    for program, given in launches(dtype, rank):
        what, options = source(program, given)
        made = triton.compile(what, target=GPUTarget("cuda", architecture, 32), options=options)
        registers, spilled = assembled(made.asm["ptx"], architecture)
        yield {
            "program": program.__name__,
            "dtype": str(dtype).removeprefix("torch."),
            "rank": rank,
            "architecture": architecture,
            "registers": registers,
            "spilled": spilled,
            "shared": made.metadata.shared,
            "warps": options["num_warps"],
        }


def assembled(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers a thread, and bytes that it spills, by the assembler's own words."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = f"sm_{architecture}a" if architecture == 90 else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.ptx"
        file.write_text(ptx)
        command = [str(assembler), "-v", f"--gpu-name={target}", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(one) for one in re.findall(r"(\d+) bytes spill stores", said)]
    return max(int(one) for one in re.findall(r"Used (\d+) registers", said)), max(spilled, default=0)


if __name__ == "__main__":
    every = [] if len(sys.argv) < 2 else json.loads(sys.argv[1])
    for name, rank, architecture in every or [
        (name, rank, architecture)
        for name in ("bfloat16", "float16", "float32")
        for rank in (16, 32, 64)
        for architecture in ARCHITECTURES
    ]:
        for row in compiled(getattr(torch, name), rank, architecture):
            print(json.dumps(row), flush=True)
