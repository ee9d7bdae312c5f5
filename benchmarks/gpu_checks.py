"""The checks of `benchmarks/gpu.py`: what the device computes, held against the formulas in float64.

The contract's own cases (``tests/contract_cases.py``: every method on every base, every pair of options, dtypes and
shapes) run on the device; the formulas beside them are those of ``tests/plain_formula.py``, in float64 on the
processor. Layers of real sizes follow, with the formulas of ``trimtab.ops.reference`` in float64 on the device, and a
tiny model whose rows go through adapters of their own. A check gives the worst error in units of its tolerance.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gpu_record import Record

TESTS = Path(__file__).resolve().parents[1] / "tests"
LARGE = {"tiny": (48, 80, 33), "real": (1000, 1536, 777)}
"""Out, in and tokens of a layer of real size; no multiple of any kernel's block."""


def run(record: Record, device: torch.device, *, tiny: bool, late: Callable[[], bool]) -> None:
    """Add a row for each method on each base, and for rows through adapters of their own."""
    # A convolution of float32 would be in TF32, torch's default there: ten digits, and not the dtype's.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not TESTS.is_dir():
        record.note("the contract's cases are not checked: there is no tests folder beside benchmarks")
    else:
        _contract(record, device, tiny=tiny, late=late)
    for dtype in (torch.bfloat16,) if tiny else (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("linear", *_quantised()):
            for method in ("lora", "dora", "mora"):
                if late():
                    record.note("the checks ran out of time: layers of real sizes are not all checked")
                    return
                _large(record, device, tiny=tiny, method=method, kind=kind, dtype=dtype)
    _per_row(record, device)
    for dtype in (torch.bfloat16,) if tiny else (torch.float32, torch.bfloat16, torch.float16):
        _rows_of_a_layer(record, device, dtype, tiny=tiny)
        _rows_that_train(record, device, dtype, tiny=tiny)
    for method in ("lora", "dora"):
        _dropped(record, device, method, tiny=tiny)


def _quantised() -> list[str]:
    from trimtab import bases

    return [name for name in bases.quantised_names() if importlib.util.find_spec(bases.quantised_base(name).package)]


def _contract(record: Record, device: torch.device, *, tiny: bool, late: Callable[[], bool]) -> None:
    sys.path.insert(0, str(TESTS))
    import contract_cases

    here = _quantised()
    if missing := sorted(contract_cases.QUANTISED - {*here}):
        record.note(f"not checked, since the package is not installed: bases {', '.join(missing)}")
    grouped: dict[str, list[Any]] = defaultdict(list)
    for case in contract_cases.cases(contract_cases.DTYPES):
        if case.base not in contract_cases.QUANTISED or case.base in here:
            grouped[f"{case.method} on {case.base}"].append(case)
    for name, cases in grouped.items():
        if late():
            record.note("the checks ran out of time: the contract's cases are not all checked")
            return
        worst, failed = 0.0, []
        for case in cases[:1] if tiny else cases:
            torch.manual_seed(0)
            try:
                errors = _case(contract_cases, case, device)
            except Exception as error:  # whatever it is, the next case is asked, too
                failed.append(f"{case}: {_told(error)}")
                continue
            worst = max(worst, *errors.values())
            failed += [
                f"{case}: {what} is off by {found:.2f} tolerances" for what, found in errors.items() if found > 1
            ]
        record.add("checks", name=name, cases=len(cases[:1] if tiny else cases), worst=worst, failed=failed)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _case(contract: Any, case: Any, device: torch.device) -> dict[str, float]:
    """The errors of one case on ``device`` in units of the contract's tolerances."""
    import trimtab

    model = case.trained()
    reference = contract.Reference(model.adapted, case)
    x = case.input()
    x64 = x.double().requires_grad_()
    expected = reference(x64)
    upstream = torch.randn(expected.shape).to(case.dtype)
    expected.backward(upstream.double())
    model = model.to(device)
    given = x.to(device).requires_grad_()
    loose, tight = ((3, 2) if case.half else (6, 4)) if case.dtype != torch.float64 else (12, 8)
    eps = case.eps
    with torch.device(device):
        output = model(given)
        output.backward(upstream.to(device))
    errors = {"output": _error(output, expected, tight * eps)}
    errors["gradient of the input"] = _error(given.grad, x64.grad, loose * eps)
    for name, parameter in model.adapted.adapter.named_parameters():
        errors[f"gradient of {name}"] = _error(parameter.grad, reference.tensors[name].grad, loose * eps)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != device.type:
            raise AssertionError(f"{name} stays on {tensor.device}")
    if case.sits_on == "weight" and case.base not in contract.QUANTISED:
        with torch.no_grad(), torch.device(device):
            before = model.eval()(given)
            trimtab.merge(model)
            # Merging rounds the weight once more, to its own digits, and a sum of products sees that.
            errors["merged"] = _error(model(given), before, 4 * tight * eps)
    return errors


def _error(got: Tensor | None, want: Tensor | None, tolerance: float) -> float:
    assert got is not None, "there is no gradient"
    assert want is not None, "the formula has no gradient"
    assert got.shape == want.shape, f"the shape is {list(got.shape)}, expected {list(want.shape)}"
    want = want.detach().double()
    largest = float(want.abs().max()) if want.numel() else 0.0
    if not largest:
        return 0.0
    found = float((got.detach().double().to(want.device) - want).abs().max())
    return found / (largest * tolerance) if found == found else float("inf")


def _large(record: Record, device: torch.device, *, tiny: bool, method: str, kind: str, dtype: torch.dtype) -> None:
    """A layer of real size: its output and gradients against float64 on the device."""
    import trimtab
    from trimtab import bases
    from trimtab.ops import reference

    out_features, in_features, tokens = LARGE["tiny" if tiny else "real"]
    name = f"{out_features} x {in_features}, {tokens} tokens, {str(dtype)[6:]}: {method} on {kind}"
    torch.manual_seed(0)
    try:
        dense = nn.Linear(in_features, out_features, dtype=dtype, device=device)
        handle = bases.find(dense)
        assert handle is not None
        holder = nn.Sequential(dense if kind == "linear" else bases.quantise(handle, kind))
        options = {"rank": 16} if method == "mora" else {"rank": 16, "alpha": 32}
        trimtab.attach(holder, trimtab.Rule(match="0", method=method, **options))
        with torch.no_grad():
            for parameter in trimtab.trainable_parameters(holder).values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        x = torch.randn(tokens, in_features, dtype=dtype, device=device, requires_grad=True)
        upstream = torch.randn(tokens, out_features, dtype=dtype, device=device)
        output = holder(x)
        output.backward(upstream)

        adapted: Any = holder[0]
        frozen = bases.find(adapted.base)
        assert frozen is not None
        weight = frozen.weight().detach().double()
        tensors = {key: value.detach().double() for key, value in adapted.adapter.named_parameters()}
        if "M" in tensors:
            delta = reference.square_delta(tensors["M"], (out_features, in_features), turn=True)
        else:
            delta = reference.low_rank_delta(tensors["A"], tensors["B"], 2.0)
        magnitude, total = tensors.get("magnitude"), weight + delta
        dy, flat = upstream.double(), x.detach().double()
        found = reference.gradients(dy, flat, total, magnitude=magnitude)
        effective = reference.effective_weight(weight, delta, magnitude=magnitude)
        expected = reference.output(flat, effective, None if adapted.bias is None else adapted.bias.double())
        wanted = {"x": found.x, "magnitude": found.magnitude}
        if "M" in tensors:
            wanted["M"] = reference.square_gradient(found.total, tensors["M"].shape[0], turn=True)
        else:
            wanted["A"], wanted["B"] = reference.low_rank_gradients(found.total, tensors["A"], tensors["B"], 2.0)
        half = dtype != torch.float32
        eps = torch.finfo(dtype).eps
        errors = {"output": _error(output, expected, (2 if half else 16) * eps)}
        got = {"x": x.grad, **{key: value.grad for key, value in adapted.adapter.named_parameters()}}
        for key, gradient in got.items():
            errors[f"gradient of {key}"] = _error(gradient, wanted[key], (4 if half else 32) * eps)
        failed = [f"{what} is off by {one:.2f} tolerances" for what, one in errors.items() if one > 1]
        record.add("checks", name=name, cases=1, worst=max(errors.values()), failed=failed)
    except Exception as error:  # the next one is asked, too
        record.add("checks", name=name, cases=1, failed=[_told(error)])


def _dropped(record: Record, device: torch.device, method: str, *, tiny: bool) -> None:
    """A layer with dropout: what it drops is asked of it, and the formula in float64 drops the same."""
    import trimtab
    from trimtab.ops.dropout import draw_keep

    out_features, in_features, tokens = LARGE["tiny" if tiny else "real"]
    name = f"{out_features} x {in_features}, {tokens} tokens, bfloat16: {method} with dropout"
    torch.manual_seed(0)
    drawn: list[Any] = []
    try:
        layer = nn.Linear(in_features, out_features, dtype=torch.bfloat16, device=device)
        holder = nn.Sequential(layer)
        trimtab.attach(holder, trimtab.Rule(match="0", method=method, rank=16, alpha=32, dropout=0.25))
        trained = trimtab.trainable_parameters(holder)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=device, requires_grad=True)
        upstream = torch.randn(tokens, out_features, dtype=torch.bfloat16, device=device)

        def watched(*given: Any) -> Any:
            drawn.append(draw_keep(*given))
            return drawn[-1]

        with patch("trimtab.methods._weight.draw_keep", watched):
            output = holder(x)
            output.backward(upstream)
        kept = drawn[0].of(torch.ones_like(x)).double() * drawn[0].scale
        share = float(kept.count_nonzero()) / kept.numel()

        x64, wide = x.detach().double().requires_grad_(), {key: one.detach().double() for key, one in trained.items()}
        leaves = {key.rpartition(".")[2]: one.requires_grad_() for key, one in wide.items()}
        weight, delta = layer.weight.double(), 2.0 * leaves["B"] @ leaves["A"]
        product = x64 @ weight.t() + (x64 * kept) @ delta.t()
        if "magnitude" in leaves:
            product = product * (leaves["magnitude"] / (weight + delta).detach().norm(dim=1))
        expected = product + layer.bias.double()
        expected.backward(upstream.double())
        eps = torch.finfo(torch.bfloat16).eps
        errors = {"output": _error(output, expected, 2 * eps), "share": abs(share - 0.75) * kept.numel() ** 0.5 / 5}
        errors["gradient of x"] = _error(x.grad, x64.grad, 4 * eps)
        for (key, one), other in zip(trained.items(), wide.values(), strict=True):
            errors[f"gradient of {key}"] = _error(one.grad, other.grad, 4 * eps)
        failed = [f"{what} is off by {one:.2f} tolerances" for what, one in errors.items() if one > 1]
        record.add("checks", name=name, cases=1, worst=max(errors.values()), failed=failed)
    except Exception as error:
        record.add("checks", name=name, cases=1, failed=[_told(error)])


_ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"method": "lora", "rank": 4},
    "two": {"method": "dora", "rank": 20},
    "three": {"method": "mora", "rank": 4},
    "four": {"method": "dora", "rank": 8},
}
_NAMES: list[str | None] = ["one", None, "two", "four", "one", "three", "two"]
"""The adapter of each row."""


def _attach(model: nn.Module, names: Iterable[str], match: str) -> None:
    """Attach adapters of these names to ``model``, each away from where it starts."""
    import trimtab

    for name in names:
        trimtab.attach(model, trimtab.Rule(match=match, **_ADAPTERS[name]), name=name)
        with torch.no_grad():
            for parameter in trimtab.trainable_parameters(model).values():
                parameter.add_(0.05 * torch.randn_like(parameter))


def _per_row(record: Record, device: torch.device) -> None:
    """Rows of one batch through adapters of their own, in a model, against each adapter by itself."""
    import trimtab
    from gpu_steps import TINY, llama_blocks

    name = "per_row: a model"
    try:
        model: Any = llama_blocks(TINY, "bf16", 2, device, torch.float32)
        _attach(model, _ADAPTERS, "all-linear")
        x = torch.randn(len(_NAMES), 24, model.config.hidden_size, device=device)
        with torch.no_grad():
            with trimtab.per_row(model.eval(), _NAMES):
                mixed = model(inputs_embeds=x).last_hidden_state
            worst = 0.0
            for row, adapter in enumerate(_NAMES):
                trimtab.set_adapter(model, adapter)
                alone = model(inputs_embeds=x[row : row + 1]).last_hidden_state[0]
                worst = max(worst, _error(mixed[row], alone, 64 * torch.finfo(torch.float32).eps))
        record.add("checks", name=name, cases=len(_NAMES), worst=worst, failed=["rows differ"] if worst > 1 else [])
    except Exception as error:
        record.add("checks", name=name, cases=1, failed=[_told(error)])


def _rows_of_a_layer(record: Record, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> None:
    """The same in a layer of real size, for one token a row and for many, against the effective weights in float64."""
    import trimtab
    from trimtab.surgery.names import entries

    out_features, in_features, many = LARGE["tiny" if tiny else "real"]
    name = f"{out_features} x {in_features}, 1 and {many} tokens a row, {str(dtype)[6:]}: per_row"
    torch.manual_seed(0)
    try:
        layer = nn.Linear(in_features, out_features, dtype=dtype, device=device)
        holder = nn.Sequential(layer)
        _attach(holder, _ADAPTERS, "0")
        weights: dict[str | None, Tensor] = {None: layer.weight.double()}
        for own in _ADAPTERS:
            entry = entries(holder, own)["0"]
            weights[own] = entry.adapter.effective_weight(entry.handle, torch.float64)
        worst = 0.0
        for tokens in (1, many):
            x = torch.randn(len(_NAMES), tokens, in_features, dtype=dtype, device=device)
            with torch.no_grad(), trimtab.per_row(holder, _NAMES):
                mixed = holder(x)
            for row, adapter in enumerate(_NAMES):
                expected = x[row].double() @ weights[adapter].t() + layer.bias.double()
                room = 2 if dtype in (torch.bfloat16, torch.float16) else 16
                worst = max(worst, _error(mixed[row], expected, room * torch.finfo(dtype).eps))
        failed = [f"a row is off by {worst:.2f} tolerances"] if worst > 1 else []
        record.add("checks", name=name, cases=2 * len(_NAMES), worst=worst, failed=failed)
    except Exception as error:
        record.add("checks", name=name, cases=1, failed=[_told(error)])


def _rows_that_train(record: Record, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> None:
    """Rows of one batch through adapters of their own that all train, against the formula in float64."""
    import trimtab
    from trimtab.ops.reference import square_delta
    from trimtab.surgery.names import entries

    out_features, in_features, tokens = LARGE["tiny" if tiny else "real"]
    name = f"{out_features} x {in_features}, {tokens} tokens a row, {str(dtype)[6:]}: per_row with gradients"
    torch.manual_seed(0)
    try:
        layer = nn.Linear(in_features, out_features, dtype=dtype, device=device)
        holder = nn.Sequential(layer)
        rows = _NAMES
        _attach(holder, _ADAPTERS, "0")
        trained = {each: dict(entries(holder, each)["0"].adapter.named_parameters()) for each in _ADAPTERS}
        for mine in trained.values():
            for parameter in mine.values():
                parameter.requires_grad_()
        x = torch.randn(len(rows), tokens, in_features, dtype=dtype, device=device, requires_grad=True)
        upstream = torch.randn(len(rows), tokens, out_features, dtype=dtype, device=device)
        with trimtab.per_row(holder, rows):
            output = holder(x)
            output.backward(upstream)
        x64 = x.detach().double().requires_grad_()
        wide = {
            adapter: {key: one.detach().double().requires_grad_() for key, one in mine.items()}
            for adapter, mine in trained.items()
        }
        expected = []
        for row, adapter in enumerate(rows):
            total = layer.weight.double()
            if adapter is not None:
                leaves = wide[adapter]
                found: Any = entries(holder, adapter)["0"].adapter
                update = found.factors()[0]
                if "M" in leaves:
                    total = total + square_delta(leaves["M"], (out_features, in_features), turn=update.turn)
                else:
                    total = total + update.scale * leaves["B"] @ leaves["A"]
                if "magnitude" in leaves:
                    total = total * (leaves["magnitude"] / total.detach().norm(dim=1)).unsqueeze(1)
            expected.append(x64[row] @ total.t() + layer.bias.double())
        torch.stack(expected).backward(upstream.double())
        room = (4 if dtype in (torch.bfloat16, torch.float16) else 32) * torch.finfo(dtype).eps
        errors = {
            "output": _error(output, torch.stack(expected), room),
            "gradient of x": _error(x.grad, x64.grad, room),
        }
        for adapter, mine in trained.items():
            for key, one in mine.items():
                errors[f"gradient of {key} of {adapter}"] = _error(one.grad, wide[adapter][key].grad, room)
        failed = [f"{what} is off by {one:.2f} tolerances" for what, one in errors.items() if one > 1]
        record.add("checks", name=name, cases=len(rows), worst=max(errors.values()), failed=failed)
    except Exception as error:
        record.add("checks", name=name, cases=1, failed=[_told(error)])
