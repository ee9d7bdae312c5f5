"""The rows that are answered together, and the model's passes over them.

Newcomers are read in passes of their own, a long prompt in several, between two of which the others go a step; then
they join the rows that are being written in the next step: one token of every row, whatever adapter it goes through
(``trimtab.per_row``).

transformers has a continuous batching of its own (``generate_batch``). It packs the tokens of all requests into one
row, for which a processor has no kernels: there each query is multiplied with the keys of all requests, and 16 rows of
SmolLM2-135M take at least three times as long as padded ones (``benchmarks/serving.py --transformers``). It also knows
neither seeds of requests nor the likeliest tokens, so it is not used here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from trimtab.errors import SurgeryError
from trimtab.evaluation.generation import contiguous_input, padded_left
from trimtab.models.earlier_tokens import cache_argument, cache_name, with_cache
from trimtab.serving.row_cache import RowCache
from trimtab.serving.writing import Row
from trimtab.surgery.contexts import for_inference
from trimtab.surgery.names import adapters
from trimtab.surgery.per_row import per_row
from trimtab.surgery.row_plan import RowPlan

_PROBES = ([3, 5, 7, 11, 13, 17, 19], [23, 29, 31])


class Adapters:
    """Rows of a model through their adapters, from one pass to the next. Adapters come and go only while this context
    is left (``leave``); the next pass enters it again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.why_apart: str | None = None
        """Why rows of different adapters cannot share a pass; None where they can."""
        self._is_inside = False
        self._plan: RowPlan | None = None
        self._names: list[str | None] | None = None
        self._entered, self._own = ExitStack(), ExitStack()  # until `leave`; and until the next pass of other rows

    def enter(self) -> None:
        """Find out whether rows of all adapters can share a pass, for those that there are now."""
        present = adapters(self.model)
        if self._is_inside or not present:
            return
        self._is_inside = True
        self._entered.enter_context(for_inference(self.model))
        try:
            self._plan = self._entered.enter_context(per_row(self.model, [*present, None]))
            self.why_apart = None
        except SurgeryError as error:
            self.why_apart = str(error)

    def through(self, names: list[str | None]) -> None:
        """Let the rows of the next pass go through ``names``. Raises SurgeryError where they cannot be told apart."""
        self.enter()
        if self._plan is not None:
            self._plan.deal(names)
        elif self._is_inside and names != self._names:
            self._own.close()
            self._own.enter_context(per_row(self.model, names))
            self._names = names

    def leave(self) -> None:
        self._own.close()
        self._entered.close()
        self._plan, self._names, self._is_inside = None, None, False


class Batch:
    """Some rows of one model.

    Args:
        model: a causal language model of which `why_alone` says nothing.
        through: sets the adapters of a pass.
    """

    def __init__(self, model: Any, through: Callable[[list[str | None]], None]) -> None:
        self.model, self.rows = model, list[Row]()
        self._through = through
        self._takes = set(inspect.signature(model.forward).parameters)
        self._cache_name = cache_name(model)
        self._layers = len(_own_cache(model).layers)
        self._cache = RowCache(self._layers)
        self._ends_in_head = model.get_output_embeddings()

    @property
    def width(self) -> int:
        """Columns of the longest row."""
        return max(self._cache.lengths, default=0)

    def read(self, rows: list[Row]) -> tuple[Tensor, Cache]:
        """Read the prompts of newcomers; gives their logits [rows, vocabulary], and what they `join` the others
        with."""
        cache = self.empty_cache()
        ids, mask = padded_left([row.ids for row in rows], 0, self.model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self._through([row.adapter for row in rows])
        logits = self._pass(cache, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        return logits, cache

    def read_on(self, row: Row, cache: Cache, most: int) -> Tensor:
        """Read ``most`` tokens more of a prompt, of which ``cache`` has the beginning; gives the logits [1, vocabulary]
        after the last of them."""
        done = cache.get_seq_length()
        ids = torch.tensor([row.ids[done : done + most]], device=self.model.device)
        end = done + ids.shape[1]
        positions = torch.arange(done, end, device=ids.device)[None]
        self._through([row.adapter])
        inputs = {"input_ids": ids, "attention_mask": ids.new_ones(1, end), "position_ids": positions}
        return self._pass(cache, inputs)

    def empty_cache(self) -> Cache:
        """What newcomers are read into."""
        return Cache(layers=[DynamicLayer() for _ in range(self._layers)])

    def join(self, rows: list[Row], cache: Cache) -> int:
        """Take in rows that were read, before they choose their first token; gives how many there are now."""
        self._cache.join(cache, [len(row.ids) for row in rows])
        self.rows += rows
        return len(self.rows)

    def step(self) -> Tensor:
        """Read the last token of every row; gives the logits [rows, vocabulary] of the next."""
        self._through([row.adapter for row in self.rows])
        return self._pass(self._cache, self._cache.inputs([row.ids[-1] for row in self.rows], self.model.device))

    def leave(self, row: Row) -> None:
        """Let a row go."""
        slot = self.rows.index(row)
        self._cache.leave(slot)
        last = self.rows.pop()
        if last is not row:
            self.rows[slot] = last

    def clear(self) -> list[Row]:
        """Let all rows go, and forget what was computed for them."""
        rows, self.rows = self.rows, []
        self._cache = RowCache(self._layers)
        return rows

    def _pass(self, cache: Cache, inputs: dict[str, Tensor]) -> Tensor:
        taken = {key: one for key, one in inputs.items() if key in self._takes}
        if "logits_to_keep" in self._takes:
            taken["logits_to_keep"] = 1  # type: ignore[assignment]
        hook = self._ends_in_head.register_forward_pre_hook(contiguous_input)
        try:
            output = self.model(**taken, **{self._cache_name: cache}, use_cache=True, return_dict=True)
        finally:
            hook.remove()
        logits: Tensor = output.logits[:, -1]
        return logits


def _own_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.no_grad()
def why_alone(model: Any, make: Callable[[Any], Batch], longest: float = 0) -> str | None:
    """Why rows of ``model``, of ``longest`` tokens at most, cannot share a batch; None where they can.

    They can where all layers keep keys and values of each position and nothing else. Whether the model then gives each
    row what it gets alone is tried: with two rows of different lengths, of which one joins the other.
    """
    takes = inspect.signature(model.forward).parameters
    lacking = [name for name in (cache_argument(model) or "cache", "attention_mask", "use_cache") if name not in takes]
    if lacking or not isinstance(model.get_output_embeddings(), nn.Module):
        return f"it takes no {' and no '.join(lacking) or 'output layer'}"
    try:
        kinds = {type(layer) for layer in _own_cache(model).layers}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"its cache is of a kind of its own ({error})"
    if others := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        return f"its cache holds more than keys and values ({', '.join(sorted(one.__name__ for one in others))})"
    if (known := _turned_alike(model)) is not None and known < longest:
        return (
            f"it turns the positions of all rows by the longest one's length, from {known:,} tokens on; with no more "
            "than that for a prompt and its answer (--max-tokens), they share them"
        )
    probes = _probes(model)
    try:
        together = list(_probed(make(model), probes))
        alone = [[one[0] for one in _alone(model, ids)] for ids in probes]
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, SurgeryError) as error:
        return f"a pass over two rows fails ({error})"
    for mine, own in zip(together, [*alone[0], *alone[1]], strict=True):
        if not (apart := _apart(mine, own)) <= _room(model):
            return f"a row gets something else beside another one than alone (its logits are {apart:.1%} apart)"
    return None


@torch.no_grad()
def reads_in_parts(model: Any, make: Callable[[Any], Batch]) -> bool:
    """Whether a prompt that is read in two parts comes to what it comes to in one."""
    batch, row = make(model), _Probe(_probes(model)[0])
    try:
        cache = batch.empty_cache()
        for most in (3, len(row.ids) - 3):
            parts = batch.read_on(row, cache, most)  # type: ignore[arg-type]
        whole, _ = batch.read([row])  # type: ignore[list-item]
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return False
    return _apart(parts.float(), whole.float()) <= _room(model)


def _turned_alike(model: Any) -> int | None:
    """Up to how many tokens the model turns positions as it was trained, where beyond that it goes by the longest row
    of a pass; None where it never does."""
    config = model.config.get_text_config(decoder=True)
    said = getattr(config, "rope_parameters", None) or {}
    each = [one for one in (said, *said.values()) if isinstance(one, dict)]
    if not any(one.get("rope_type") in ("dynamic", "longrope") for one in each):
        return None
    trained = [one.get("original_max_position_embeddings") for one in each]
    trained.append(getattr(config, "original_max_position_embeddings", None))
    return min((int(one) for one in trained if one), default=int(config.max_position_embeddings))


def _probes(model: Any) -> list[list[int]]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [[token % vocabulary for token in ids] for ids in _PROBES]


def _room(model: Any) -> float:
    """How far logits may be apart by rounding: half precision rounds to 8 or 11 bits at each of many layers."""
    return 1e-3 if model.dtype == torch.float32 else 0.1


def _apart(mine: Tensor, own: Tensor) -> float:
    return float((mine - own).norm() / (own - own.mean()).norm().clamp_min(1e-12))


def _alone(model: Any, ids: list[int]) -> Iterable[Tensor]:
    """Logits of the last two of the tokens, by the model's own cache: as ``generate`` comes to them."""
    cache = _own_cache(model)
    before = torch.tensor([ids[:-1]], device=model.device)
    yield model(input_ids=before, use_cache=True, **with_cache(model, cache)).logits[:, -1].float()
    last = torch.tensor([ids[-1:]], device=model.device)
    whole = torch.ones(1, len(ids), dtype=torch.long, device=model.device)
    yield model(input_ids=last, attention_mask=whole, use_cache=True, **with_cache(model, cache)).logits[:, -1].float()


def _probed(batch: Batch, probes: list[list[int]]) -> Iterable[Tensor]:
    """The same of two rows in a batch: the shorter one joins the longer, and both go one step."""
    rows = [_Probe(ids[:-1]) for ids in probes]
    first = []
    for row in rows:
        logits, cache = batch.read([row])  # type: ignore[list-item]
        batch.join([row], cache)  # type: ignore[list-item]
        first.append(logits.float()[0])
    for row, ids in zip(rows, probes, strict=True):
        row.ids = ids
    second = batch.step().float()
    for one, other in zip(first, second, strict=True):
        yield one
        yield other


class _Probe:
    adapter = None

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
