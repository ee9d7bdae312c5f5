"""One training step of a model, traced for its memory without weights and without computing.

The step is the library's own code, run on fake tensors, so this file knows nothing of how a block or a method is made.
Of equal blocks in a row only three are run: the first, which may have no gradient to hand on; the last, whose output is
read by a module of another kind; and one that stands for all those between them. These hold what that one held before
its turn, between its forward and its backward pass, or after its turn, according to the moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from trimtab.memory.tracker import OTHER, Label, Ledger
from trimtab.models.quantise import stored_sizes
from trimtab.surgery.adapted import Adapted, block_lists
from trimtab.tasks import Batch, Task

Bytes = Mapping[str, int]
"""Bytes by what they are for: weights, adapters, gradients, optimiser, activations."""


@dataclass
class _Stretch:
    """A part of a pass, from one block's turn to the next: its own peak, and how far each block had come by then."""

    stages: dict[int, str]
    peak: Counter[Label]


@dataclass
class _Pass:
    """What was held before the forward pass, after it and after the backward pass, and at the peak of each stretch."""

    before: Counter[Label]
    stages: dict[int, str]
    kept: Counter[Label] = field(default_factory=Counter)
    after: Counter[Label] = field(default_factory=Counter)
    stretches: list[_Stretch] = field(default_factory=list)


def _grouped_product(one: Tensor, other: Tensor, offs: Tensor | None = None, *_: Any) -> Tensor:
    """In the shape of a product of experts' rows, of any dtype: torch's own for fake tensors knows bfloat16 alone."""
    if one.dim() == other.dim() == 2 and offs is not None:
        return one.new_empty(len(offs), one.shape[0], other.shape[1])
    return one.new_empty(*one.shape[-3 if other.dim() == 3 else -2 : -1], other.shape[-1])


class Trace:
    """A model made ready to be traced, once.

    Args:
        model: a transformers model on the meta device, with its adapters. It cannot be used afterwards.
        task: what it is asked for.
        quantisation: how the base weights of linear layers other than the head are stored.
        device: where it runs; what is kept, and which kernels are taken, hangs on that.

    Attributes:
        standing: what is held whatever the batch is: weights, adapters, their gradients and AdamW's moments.
    """

    def __init__(
        self, model: Any, task: Task, *, quantisation: str = "none", device: torch.device | str = "cpu"
    ) -> None:
        self._model = model
        self._device = torch.device(device)
        self._task = task
        self._packed = stored_sizes(model, quantisation)
        self._unpacked = max((weight.nbytes for weight in model.parameters() if id(weight) in self._packed), default=0)
        self.standing = self._standing()
        self._copies = _shorten(model)
        self._blocks = [block for blocks in block_lists(model) for block in blocks]
        self._labels = 0
        aten = torch.ops.aten
        self._ledger = Ledger(
            {
                # When training starts, updates are zero and magnitudes equal the norms: a number that the code looks at
                # is 0, and a check (that rows are not packed, that a mask hides nothing) comes out as it should.
                aten._local_scalar_dense.default: lambda value: value.dtype == torch.bool or 0.0,
                aten.nonzero.default: lambda mask: mask.new_empty((self._labels, mask.dim()), dtype=torch.int64),
                # `Head` probes what a model does around its output head: whether a tensor was handed on as it is.
                aten.equal.default: lambda one, other: one.untyped_storage()._cdata == other.untyped_storage()._cdata,
                aten.allclose.default: lambda *_: True,
                aten._grouped_mm.default: _grouped_product,
                torch.ops.prim.device.default: lambda _: self._device,  # half of all calls: a quick way
            }
        )
        self._pass: _Pass | None = None

    def _standing(self) -> Bytes:
        parameters = list(self._model.parameters())
        trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        weights = sum(self._packed.get(id(parameter), parameter.nbytes) for parameter in frozen)
        return {"weights": weights, "adapters": trained, "gradients": trained, "optimiser": 2 * trained}

    def run(
        self,
        batch: Batch,
        *,
        gradient_checkpointing: bool = False,
        accumulates: bool = False,
        averages: bool = False,
        evaluated: Batch | None = None,
        generates: bool = False,
    ) -> dict[str, Bytes]:
        """What is held at the highest moment of ``training``, and of ``evaluating``, by what the bytes are for.

        Args:
            batch: of one forward pass in training.
            gradient_checkpointing: whether blocks are recomputed.
            accumulates: whether gradients are held already when the forward pass begins.
            averages: whether a second copy of what is trained is held.
            evaluated: a batch that is evaluated between two steps; None: nothing is.
            generates: whether evaluation keeps keys and values.
        """
        ledger, model = self._ledger, self._model
        with ExitStack() as stack:
            # transformers leaves out a mask that hides nothing, but not while it believes to be traced for a graph.
            stack.callback(setattr, masking_utils, "is_tracing", masking_utils.is_tracing)
            masking_utils.is_tracing = lambda tensor=None: False
            stack.enter_context(FakeTensorMode())
            stack.enter_context(ledger)
            trained = self._materialise()
            for hook in self._hooks():
                stack.callback(hook.remove)
            head = self._head()
            optimiser = self._optimiser(trained, accumulates)
            means = [self._like(parameter, "optimiser", block) for parameter, block in trained.items() if averages]
            peaks: dict[str, Bytes] = {}
            if evaluated is not None:
                # Answers are written, and their loss is measured after that.
                ways = [self._evaluate(head, evaluated, way) for way in {generates, False}]
                peaks["evaluating"] = max(ways, key=lambda held: sum(held.values()))
            model.train()
            if gradient_checkpointing:
                model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            peaks["training"] = self._train(head, batch, list(trained), optimiser)
            del means
        return peaks

    def _head(self) -> Any:
        """Probed without blocks, which take no part in what it finds out."""
        lists = [(blocks, list(blocks)) for blocks in block_lists(self._model)]
        for blocks, _ in lists:
            del blocks[:]
        head = self._task.head(self._model)
        for blocks, kept in lists:
            blocks.extend(kept)
        return head

    def _materialise(self) -> dict[nn.Parameter, int | None]:
        """Give every module fake tensors on the device in place of those on the meta device.

        Returns:
            The parameters that are trained, each with the number of its block.
        """
        modules = list(self._model.modules())
        block_of = {id(inner): number for number, block in enumerate(self._blocks) for inner in block.modules()}
        adapters = {
            id(inner) for each in modules if isinstance(each, Adapted) for inner in each.current_adapter.modules()
        }
        done: dict[int, tuple[Tensor, Tensor]] = {}
        trained: dict[nn.Parameter, int | None] = {}
        for module in modules:
            block = block_of.get(id(module))
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, old in table.items():
                    if old is None:
                        continue
                    if id(old) not in done:  # tied weights stay tied
                        with self._ledger.labelled("adapters" if id(module) in adapters else "weights", block):
                            new: Tensor = torch.empty(old.shape, dtype=old.dtype, device=self._device)
                        if isinstance(old, nn.Parameter):
                            new = parameter = nn.Parameter(new, old.requires_grad)
                            if old.requires_grad:
                                trained[parameter] = block
                        if id(old) in self._packed:
                            self._ledger.resize(new, self._packed[id(old)])
                        done[id(old)] = (old, new)
                    table[name] = done[id(old)][1]
        for module in modules:
            if isinstance(module, Adapted):
                with self._ledger.labelled("adapters", block_of.get(id(module))), torch.no_grad():
                    module.current_adapter.prepare(module.handle)
        return trained

    def _like(self, parameter: Tensor, kind: str, block: int | None) -> Tensor:
        with self._ledger.labelled(kind, block):
            return torch.zeros_like(parameter, requires_grad=False)

    def _optimiser(self, trained: Mapping[nn.Parameter, int | None], accumulates: bool) -> torch.optim.Optimizer:
        """AdamW after a first step, with its states in place, as every later step meets it."""
        optimiser = torch.optim.AdamW(list(trained), fused=True)
        for parameter, block in trained.items():
            parameter.grad = self._like(parameter, "gradients", block)
        optimiser.step()
        for parameter, block in trained.items():
            for tensor in optimiser.state[parameter].values():
                self._ledger.relabel(tensor, "optimiser", block)
        if not accumulates:
            optimiser.zero_grad()
        for parameter, block in trained.items():
            parameter.register_post_accumulate_grad_hook(
                lambda owner, block=block: self._ledger.relabel(owner.grad, "gradients", block)
            )
        return optimiser

    def _evaluate(self, head: Any, batch: Batch, generates: bool) -> Bytes:
        self._model.eval()
        tensors = self._begin(batch)
        with torch.no_grad():
            held = self._task.foresee(head, tensors, generates=generates)
            self._kept()
            del held
        return self._end()

    def _train(self, head: Any, batch: Batch, trained: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> Bytes:
        tensors = self._begin(batch)
        loss = self._task.loss(head, tensors, count=torch.tensor(batch.labels))
        self._kept()
        loss.backward()
        del loss
        self._turn(dict.fromkeys(range(len(self._blocks)), "done"))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        return self._end()

    # The turns of the blocks ---------------------------------------------------------------------------------------

    def _begin(self, batch: Batch) -> dict[str, Tensor]:
        self._labels = batch.labels
        sample = self._task.sample(self._model, batch)
        tensors = {name: tensor.to(self._device) for name, tensor in sample.items()}
        self._pass = _Pass(self._ledger.held.copy(), dict.fromkeys(range(len(self._blocks)), "waiting"))
        self._ledger.mark()
        return tensors

    def _turn(self, stages: Mapping[int, str]) -> None:
        """Some blocks enter another stage, so a new stretch begins."""
        if self._pass is not None:
            self._pass.stretches.append(_Stretch(dict(self._pass.stages), self._ledger.peak))
            self._pass.stages.update(stages)
            self._ledger.mark()

    def _kept(self) -> None:
        assert self._pass is not None
        self._pass.kept = self._ledger.held.copy()

    def _end(self) -> Bytes:
        assert self._pass is not None
        self._turn({})
        done, self._pass = self._pass, None
        done.after = self._ledger.held.copy()
        self._ledger.within(None)
        peaks = (self._whole(done, stretch) for stretch in done.stretches)
        highest = max(peaks, key=lambda held: sum(held.values()))
        highest[OTHER] += self._unpacked  # one weight at a time is dequantised for a product
        return highest

    def _whole(self, done: _Pass, stretch: _Stretch) -> Counter[str]:
        """The peak of ``stretch``, with all the blocks that were not run."""
        whole: Counter[str] = Counter()
        for (kind, _), size in stretch.peak.items():
            whole[kind] += size
        for number, stage in stretch.stages.items():
            choices = {
                "waiting": [done.before],
                "forward": [
                    done.before,
                    done.kept,
                ],  # blocks before it had their turn, those after it not yet
                "kept": [done.kept],
                "backward": [done.kept, done.after],
                "done": [done.after],
            }[stage]
            shares = [
                {kind: size for (kind, block), size in held.items() if block == number and size} for held in choices
            ]
            for kind, size in max(shares, key=lambda share: sum(share.values())).items():
                whole[kind] += (self._copies[number] - 1) * size
        return whole

    def _hooks(self) -> Iterator[Any]:
        for number, block in enumerate(self._blocks):
            yield block.register_forward_pre_hook(self._entering(number))
            yield block.register_forward_hook(self._leaving(number))

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._turn({number: "forward"})
            self._ledger.within(number)

        return enter

    def _leaving(self, number: int) -> Callable[..., None]:
        def back(_: Tensor) -> None:
            later = dict.fromkeys(range(number + 1, len(self._blocks)), "done")
            self._turn({**later, number: "backward"})
            self._ledger.within(number)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._ledger.within(None)
            self._turn({number: "kept"})
            states = output if isinstance(output, Tensor) else output[0]
            if states.requires_grad:
                states.register_hook(back)

        return leave


def _shorten(model: nn.Module) -> list[int]:
    """Leave three of each row of equal blocks. Gives, for each block that is left, how many it stands for."""
    counts: list[int] = []
    for blocks in block_lists(model):
        kept: list[nn.Module] = []
        for _, equal in groupby(list(blocks), key=repr):
            run = list(equal)
            kept += run if len(run) < 3 else [run[0], run[1], run[-1]]
            counts += [1] * len(run) if len(run) < 3 else [1, len(run) - 2, 1]
        del blocks[:]
        blocks.extend(kept)
    return counts
