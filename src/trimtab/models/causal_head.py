"""Logits only where somebody reads them.

The loss of an answer of two tokens after a prompt of sixty needs logits at two positions, and the product with the
vocabulary is a fifth of a small model's work. `Head` runs a causal language model's decoder over the whole batch and
its output head at the chosen positions only. Some models do more than that around the head: Gemma 2 squashes its
logits, Granite and Cohere scale them. `Head` finds out by a probe and takes the model's own full logits for those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils

from trimtab.models.earlier_tokens import cache_of, with_cache
from trimtab.models.head_loss import head_loss, wide
from trimtab.surgery.contexts import evaluating

IGNORED = -100
"""The label of a position that carries no loss, as in Hugging Face's models."""

SCORED_AT_ONCE = 128
"""Positions whose logits exist at once while tokens are scored: 26 MB in float32 for a vocabulary of 49,152."""


TIE_STEPS = 80
"""A tie in units of the coarsest dtype's step at 1 (``torch.finfo.eps``), which makes 0.625 nats in bfloat16.

Measured on SmolLM2-135M in bfloat16: between a padded batch (of 8, 16, 32 or 64 rows) and the row alone, the difference
of two answers' log-likelihoods moves by 0.11 nats (standard deviation) and by at most 0.45, since each of its thirty
layers rounds differently. 0.625 is more than five standard deviations.
"""

SMALLEST_TIE = 1e-3
"""Never less than this many nats: a hundred times what float32 needs, and ties are as rare as before."""


class Head:
    """A causal language model, asked only for what is needed of its output.

    Batches are padded on the right and carry no attention mask: in a causal model padding there reaches nothing that is
    read. The output head is looked up at each call, so an adapter may come onto it later.

    Args:
        model: a transformers causal language model. It is run twice on 18 tokens; its mode and state stay as they are.

    Attributes:
        sparse: whether the head is applied to chosen positions only; False: the model's full logits are computed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._body = _separable_body(model)
        self.sparse = self._body is not None

    @property
    def tie_margin(self) -> float:
        """Nats below which the difference of two log-probabilities may be an accident of how the batch was made up."""
        types = {parameter.dtype for parameter in self.model.parameters()}
        device = next(self.model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            types.add(torch.get_autocast_dtype(device))
        if torch.get_float32_matmul_precision() != "highest":
            types.add(torch.bfloat16)
        # Weights stored in fewer bits are multiplied in one of these; the other parameters tell which.
        computed = types & {torch.bfloat16, torch.float16, torch.float32, torch.float64}
        return max(SMALLEST_TIE, TIE_STEPS * max((torch.finfo(kind).eps for kind in computed), default=0.0))

    def loss_at_labels(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        num_items: int | Tensor | None = None,
        lesser: Tensor | None = None,
        weight: float = 1.0,
        layout: Mapping[str, Any] | None = None,
        at: Tensor | None = None,
        lesser_at: Tensor | None = None,
    ) -> Tensor:
        """Token cross-entropy, as ``model(input_ids, labels=labels).loss``; a scalar in float32 (or float64).

        Args:
            input_ids: ``[rows, tokens]``, padded on the right.
            labels: ``[rows, tokens]``, not shifted: position ``t`` is scored on predicting ``labels[:, t + 1]``;
                -100 carries no loss.
            num_items: what the sum over positions is divided by; None: their number, so the loss is the mean. A batch
                without labels has the loss 0.
            lesser: more labels, laid out as ``labels``. Each counts ``weight``, and none among ``num_items``.
            weight: see ``lesser``.
            layout: what else the model is called with, where rows lie one behind the other (``position_ids`` and more).
            at: where ``labels`` are (`label_positions`), and ``lesser_at`` where ``lesser`` are. To look
                for them on an accelerator makes it wait.
        """
        layout = layout or {}
        positions, targets = _labelled(labels, at)
        denominator = max(positions.numel(), 1) if num_items is None else num_items
        others = None if lesser is None else _labelled(lesser, lesser_at)
        if self._body is None:
            more: Any = {"denominator": denominator, "others": others, "weight": weight, "layout": layout}
            return self._own_loss(input_ids, labels, positions.numel(), **more)
        head = self.model.get_output_embeddings()
        if others is None:
            return head_loss(head, self._hidden(self._body, input_ids, positions, **layout), targets, denominator)
        states = self._hidden(self._body, input_ids, torch.cat([positions, others[0]]), **layout)
        loss = head_loss(head, states[: positions.numel()], targets, denominator)
        return loss + weight * head_loss(head, states[positions.numel() :], others[1], denominator)

    def logits_at(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[n, vocabulary]`` at ``positions`` ``[n]``, which count through the flattened ``input_ids``."""
        states, apply = self._states(input_ids, positions)
        return apply(states)

    def remember(self, ids: Sequence[int]) -> Any:
        """The keys and values of tokens that several sequences begin with, as ``log_probabilities`` takes them; None
        where the model has none that can be repeated."""
        device = self.model.get_input_embeddings().weight.device
        with torch.no_grad():
            output = (self._body or self.model)(input_ids=torch.tensor([list(ids)], device=device), use_cache=True)
        past = cache_of(output)
        return past if hasattr(past, "batch_repeat_interleave") else None

    def log_probabilities(
        self, input_ids: Tensor, positions: Tensor, tokens: Tensor, past: Any | None = None
    ) -> Tensor:
        """Log-probability of each of ``tokens`` as the next one after each position. Not differentiable.

        The logits of ``tokens`` themselves are computed in float32 where that is possible. In bfloat16 the logits of a
        real model are multiples of 1/8, and of two answers that the model tells apart one in a hundred pairs would tie.

        Args:
            input_ids: ``[rows, tokens]``, padded on the right.
            positions: ``[n]``, int64, through the flattened ``input_ids``.
            tokens: ``[n, k]``, int64.
            past: the keys and values of what comes before each row; the pass adds its own to them.

        Returns:
            ``[n, k]``, float32 (float64 for a float64 model), in nats.
        """
        with torch.no_grad():
            states, apply = self._states(input_ids, positions, past)
            chunks = []
            for chunk, wanted in zip(states.split(SCORED_AT_ONCE), tokens.split(SCORED_AT_ONCE), strict=True):
                raw = apply(chunk)
                logits = wide(raw)
                linear = self.model.get_output_embeddings()
                if logits is not raw and self.sparse and _is_plain(linear):
                    weight = linear.weight[wanted].float()
                    exact = torch.bmm(weight, chunk.float().unsqueeze(2)).squeeze(2)
                    if linear.bias is not None:
                        exact += linear.bias[wanted]
                    logits.scatter_(1, wanted, exact)
                chunks.append(logits.gather(1, wanted) - logits.logsumexp(1, keepdim=True))
        return torch.cat(chunks)

    def _states(
        self, input_ids: Tensor, positions: Tensor, past: Any | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Something per position, and the function that makes logits of it."""
        if self._body is None:
            logits = self.model(input_ids=input_ids, use_cache=past is not None, **with_cache(self.model, past)).logits
            return logits.flatten(0, 1).index_select(0, positions), lambda picked: picked
        return self._hidden(self._body, input_ids, positions, past), self.model.get_output_embeddings()

    @staticmethod
    def _hidden(
        body: nn.Module, input_ids: Tensor, positions: Tensor, past: Any | None = None, **layout: Any
    ) -> Tensor:
        with nullcontext() if layout else _rows_apart(input_ids):
            output = body(input_ids=input_ids, use_cache=past is not None, **with_cache(body, past), **layout)
        states: Tensor = output.last_hidden_state
        return states.flatten(0, 1).index_select(0, positions)

    def _own_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        count: int,
        denominator: int | Tensor,
        others: tuple[Tensor, Tensor] | None,
        weight: float,
        layout: Mapping[str, Any],
    ) -> Tensor:
        output = self.model(input_ids=input_ids, labels=labels, use_cache=False, **layout)
        loss: Tensor = output.loss if count else output.logits.sum() * 0.0  # the mean of nothing is NaN
        if isinstance(denominator, Tensor):
            denominator = denominator.to(loss.device)
        if count:
            loss = loss * (count / denominator)
        if others is not None:
            logits = output.logits.flatten(0, 1).index_select(0, others[0])
            loss = loss + weight * F.cross_entropy(wide(logits), others[1], reduction="sum") / denominator
        return loss


def label_positions(labels: Tensor) -> Tensor:
    """Through the flattened batch, the positions ``[n]`` that are scored on their next token: those before each label
    of ``labels [rows, tokens]`` that is not the first of its row."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    return (targets != IGNORED).nonzero().squeeze(1)


def _labelled(labels: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions, through the flattened batch, that are scored on their next token, and these tokens."""
    positions = label_positions(labels) if positions is None else positions
    return positions, F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().index_select(0, positions)


@contextmanager
def _rows_apart(ids: Tensor) -> Iterator[None]:
    """While open, transformers does not look for rows that are packed into one. There are none, and to find that out it
    would wait for an accelerator in every pass."""
    look = masking_utils.find_packed_sequence_indices
    if ids.device.type != "cpu":
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _separable_body(model: Any) -> nn.Module | None:
    """The decoder, if ``model`` is that and then the output head on each position, and nothing else; or None.

    Comparing logits would not do: the squashing of Gemma 2 is below rounding while logits are small, as in a model that
    is not trained yet. So the probe looks at both sides of the head: what goes in must be what the decoder gives, and
    what comes out, replaced by large known numbers on the way, must arrive unchanged as the model's logits.
    """
    head = model.get_output_embeddings()
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    if head is None or body is None or body is model:
        return None
    if getattr(model.config, "output_router_logits", False):  # a mixture of experts with a loss of its own
        return None
    embeddings = model.get_input_embeddings()
    ids = (torch.arange(18, device=embeddings.weight.device).reshape(2, 9) * 7919 + 13) % embeddings.num_embeddings
    inputs: list[tuple[Any, ...]] = []
    marks: list[Tensor] = []

    def replace(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs.append(given)
        marks.append(torch.linspace(-100, 100, output.numel(), device=output.device).to(output.dtype).view_as(output))
        return marks[-1]

    with evaluating(model):
        handle = head.register_forward_hook(replace)
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        if len(inputs) != 1 or len(inputs[0]) != 1:
            return None
        if logits.shape != marks[0].shape or not torch.equal(logits.to(marks[0].dtype), marks[0]):
            return None
        try:
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        except (AttributeError, TypeError, ValueError):  # a decoder that does not run by itself
            return None
    expected = inputs[0][0]
    if hidden.shape != expected.shape:
        return None
    slack = 16 * torch.finfo(hidden.dtype).eps * float(expected.nan_to_num().abs().max())
    # A broken model, all NaN, passes: whoever reads its scores says so better than an error here.
    return body if torch.allclose(hidden, expected.to(hidden.dtype), rtol=0, atol=slack, equal_nan=True) else None


def _is_plain(head: nn.Module) -> bool:
    """Whether ``head`` is a linear layer that nobody has changed, so that rows of its weight can be used alone."""
    hooks = len(head._forward_hooks) + len(head._forward_pre_hooks)
    return type(head) is nn.Linear and not hooks and "forward" not in vars(head) and head.weight.is_floating_point()
