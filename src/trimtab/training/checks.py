"""What is held against the model before anything runs: tokens, lengths, the schedule, settings that are known to hurt.

Each check is a small function. What cannot work is an error that says what to change. What works otherwise than one may
think, and what is known to hurt (and where from), is a sentence among the notes. ``trimtab plan`` says the same as
``trimtab finetune``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.config.run import TrainConfig
from trimtab.data import forms
from trimtab.data.forms.chat import Chat
from trimtab.data.rows import Example
from trimtab.data.tokens import encode_prompt
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.shortened import shortened
from trimtab.memory.estimate import check_run
from trimtab.models.chat_template import unknown_marks
from trimtab.models.model_files import require_rows
from trimtab.notes import Notes, rows
from trimtab.runs.events import Listener
from trimtab.surgery.attach_report import AttachReport, usually_frozen
from trimtab.tasks import Inputs
from trimtab.training.compiling import choose

REGRET = "Schulman et al., LoRA Without Regret, thinkingmachines.ai 2025"
LEARNS_LESS = "Biderman et al., arXiv 2405.09673"
MEMORIZE = "studies/memorize"

USUAL_SCALE = 0.25, 8.0
"""alpha/rank; the field has 1 or 2."""
LARGE_BATCH = 128
FULL_RATE, ADAPTER_RATE, MORA_RATE = 2e-4, 5e-5, 1e-4
"""Full fine-tuning from the first on, adapters up to the second, and MoRA up to the third are at a rate of the
others."""


def check_before(job: Job, inputs: Inputs | None, attached: AttachReport) -> list[str]:
    """Hold a run against its model, before weights are read; gives what the user should know, a sentence each.

    Args:
        inputs: its rows; None where they are not here to be read, and only the rest is checked.
        attached: what the plan will do to the model.

    Raises ConfigError, DataError, ModelError for what cannot work.
    """
    notes = Notes()
    if inputs is not None:
        task = tasks.of(job)
        looked = _Looked(job, inputs)
        if task.checked_as_texts:
            for check in (_tokens, _template, _training_rows, _validation_rows, _room_to_write, _test_rows):
                check(looked, notes)
        else:
            for sentence in task.held(job, inputs, job.reader):
                notes.add(sentence)
        _schedule(looked, notes)
    if job.config.train.epochs:
        caution(job.config.train, attached, notes)
        if inputs is not None and (choice := choose(job, inputs, attached)).pays:
            notes.add(choice.why)
    return list(notes)


def planned(job: Job, inputs: Inputs | None, attached: AttachReport) -> list[str]:
    """``check_before`` for `trimtab plan`, which also says why blocks are not compiled where that would not pay."""
    found = check_before(job, inputs, attached)
    if inputs is None or not job.config.train.epochs or (why := choose(job, inputs, attached).why) in found:
        return found
    return [*found, why]


def checked_inputs(job: Job, inputs: Inputs, listener: Listener) -> Inputs:
    """``inputs`` of a run that may begin, with what the user should know of it, which ``listener`` is told. Raises as
    ``check_run`` and ``check_before`` do."""
    found = check_before(job, inputs, check_run(job, tasks.of(job).sizes(job, inputs)))
    for sentence in found:
        listener.remark(sentence)
    return replace(inputs, notes=(*inputs.notes, *found))


@dataclass(frozen=True)
class _Looked:
    """What the checks look at."""

    job: Job
    inputs: Inputs

    @property
    def tokenizer(self) -> Any:
        """What encoded the rows."""
        return self.job.reader

    @property
    def written(self) -> dict[str, list[Example]]:
        """The test sets whose answers the model writes."""
        if self.inputs.scored:
            return {}
        tests = self.inputs.tests.items()
        return {name: tested for name, tested in tests if tested and all(row.answer is not None for row in tested)}


def _tokens(looked: _Looked, notes: Notes) -> None:
    """Every token that a batch can hold has a row of the embedding."""
    job, inputs = looked.job, looked.inputs
    texts = [row.text for row in (*inputs.validation, *(row for tests in inputs.tests.values() for row in tests))]
    used = inputs.rows.vocabulary()
    require_rows(job.config.model.name, looked.tokenizer, texts, job.embedding_rows, used)


def _template(looked: _Looked, notes: Notes) -> None:
    """The marks of a chat template of the run's own are tokens."""
    said = looked.job.source.chat_template
    chats = said and isinstance(forms.find(looked.inputs.form), Chat)
    marks = unknown_marks(looked.tokenizer) if chats else []
    if marks:
        quoted = ", ".join(f'"{mark}"' for mark in marks)
        notes.add(
            f"model.chat_template writes {', '.join(marks)}, which the tokenizer takes to pieces. With "
            f"model.add_tokens: [{quoted}] each is one token, and its row is trained"
        )


def _training_rows(looked: _Looked, notes: Notes) -> None:
    """Rows are within what the model was made for."""
    trained = looked.job.positions.trained
    if trained is not None and (long := sum(length > trained for length in looked.inputs.rows.lengths)):
        notes.add(
            f"{rows(long)} to train on with more than the {trained:,} tokens that the model was made for; nothing is "
            f"cut off, since it can read them. data.max_length={trained} cuts them"
        )


def _validation_rows(looked: _Looked, notes: Notes) -> None:
    """Some validation row has a token that is validated on."""
    inputs, length = looked.inputs, looked.job.max_length
    if not inputs.validation or inputs.scored or not looked.job.config.train.epochs:
        return
    try:
        short = shortened(inputs.validation, looked.tokenizer, length)
    except DataError as error:
        raise DataError(f"data.validation: {error} Raise data.max_length, or give other rows") from None
    for place, reason in short.left_out:
        notes.row(place, f"left out of the validation ({reason})")


def _room_to_write(looked: _Looked, notes: Notes) -> None:
    """A prompt has room before the tokens that the model may write."""
    limit, wanted = looked.job.reading_length, looked.job.config.evaluation.max_new_tokens
    if limit is None or not looked.written:
        return
    most = limit - len(encode_prompt("", looked.tokenizer)) - 1
    if wanted > most:
        raise ConfigError(
            f"evaluation.max_new_tokens: {wanted} leaves no room for a prompt: the model has {limit} positions for "
            f"both. Set it to {most} at most; less leaves longer prompts whole"
        )


def _test_rows(looked: _Looked, notes: Notes) -> None:
    """Test rows are read whole, or it is told which are not."""
    limit, config = looked.job.reading_length, looked.job.config
    if limit is None:
        return
    for name, tested in looked.inputs.tests.items():
        if not tested:
            continue
        new = config.evaluation.max_new_tokens if name in looked.written else None
        try:
            short = shortened(tested, looked.tokenizer, limit, new)
        except DataError as error:
            raise DataError(f"data.test: {name}: {error}") from None
        if short.cut and new is not None:
            notes.add(
                f"{rows(short.cut)} of the test set {name} cut: only the last {limit - new} tokens of a prompt are "
                f"read, before {new} new ones (evaluation.max_new_tokens)"
            )
        elif short.cut:
            notes.add(f"{rows(short.cut)} of the test set {name} cut to {limit} tokens")
        for place, reason in short.left_out:
            notes.row(place, f"left out of the loss of the test set {name} ({reason})")


def _schedule(looked: _Looked, notes: Notes) -> None:
    """What is to happen after some number of steps happens within the run."""
    train, count = looked.job.config.train, len(looked.inputs.rows)
    if not train.epochs:
        return
    steps = train.total_steps(count)
    if isinstance(train.warmup, int) and train.warmup >= steps:
        rate = f"{train.learning_rate:g}" if isinstance(train.learning_rate, float) else "the rate"
        share = (steps - 1) / train.warmup
        notes.add(
            f"train.warmup: {train.warmup} steps of warmup, but the run has {steps}: the learning rate ends at "
            f"{100 * share:.2g} % of {rate}. A fraction (0.03) follows the length of the run"
        )
    if isinstance(train.save_every, int) and train.save_every > steps:
        notes.add(
            f"train.save_every: {train.save_every} steps, but the run has {steps}: no checkpoint before its end, so a "
            "run that is killed begins again"
        )
    if not looked.inputs.validation:
        return
    every = train.steps_between(train.validate_every, count)
    if every > steps:
        notes.add(
            f"train.validate_every: {every} steps, but the run has {steps}: it is validated once, at its end, and "
            "there is no better step to keep"
        )
    elif train.early_stopping is not None and train.early_stopping >= (checks := math.ceil(steps / every)):
        notes.add(
            f"train.early_stopping: {train.early_stopping} validations without improvement, but the run has "
            f"{checks}: it cannot stop early"
        )


def caution(train: TrainConfig, attached: AttachReport, notes: Notes) -> None:
    """Add to ``notes`` what is known to hurt in the settings of a training."""
    for check in (_attention_only, _scale, _batch, _rates):
        check(train, attached, notes)


def _attention_only(train: TrainConfig, attached: AttachReport, notes: Notes) -> None:
    modules = [module.name for module in attached.modules if module.method != "full"]
    others = [kind for kind in attached.unreached if not usually_frozen(kind)]
    if modules and others and all(_in_attention(name) for name in modules):
        notes.add(
            "only attention is adapted: adapters on all linear layers have learned more at the same number of trained "
            f"parameters ({REGRET}; QLoRA, arXiv 2305.14314, figure 2). match: all-linear reaches them"
        )


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def _scale(train: TrainConfig, attached: AttachReport, notes: Notes) -> None:
    low, high = USUAL_SCALE
    for number, rule in enumerate(attached.rules):
        rank, alpha = (getattr(rule.options, name, None) for name in ("rank", "alpha"))
        if not rank or not alpha:
            continue
        stabilised = getattr(rule.options, "rank_stabilised", False)
        scale = alpha / (math.sqrt(rank) if stabilised else rank)
        if not low <= scale <= high:
            notes.add(
                f"plan.{number}: alpha {alpha:g} at rank {rank} scales the update by {scale:.3g}; 1 or 2 is usual "
                f"(alpha = rank, arXiv 2106.09685, section 4.1; alpha = 2 rank, {LEARNS_LESS}), and the learning rate "
                f"acts {'weaker' if scale < 1 else 'stronger'} by as much"
            )


def _batch(train: TrainConfig, attached: AttachReport, notes: Notes) -> None:
    rows = train.batch_size * train.gradient_accumulation
    if rows > LARGE_BATCH and any(module.method != "full" for module in attached.modules):
        notes.add(
            f"{rows} rows to a step: low-rank adapters lose more by batches above some {LARGE_BATCH} rows than full "
            f"fine-tuning does, and no rank makes up for it ({REGRET})"
        )


def _rates(train: TrainConfig, attached: AttachReport, notes: Notes) -> None:
    rate = train.learning_rate
    if not isinstance(rate, float):
        return
    whole = {
        number
        for number, rule in enumerate(attached.rules, 1)
        if rule.method == "full" and getattr(rule.options, "rows", None) is None
    }
    methods = {module.method for module in attached.modules if module.rule not in whole}
    # A new head, norms and biases are small, and are trained at any rate.
    matrices = sum(module.parameters for module in attached.modules if module.rule in whole and module.in_features > 1)
    if rate >= FULL_RATE and matrices > attached.trainable_parameters / 2:
        notes.add(
            f"train.learning_rate: {rate:g} is a rate of adapters; the best of full fine-tuning is about a tenth of "
            f"theirs ({REGRET}; {LEARNS_LESS}), often 1e-5 to 1e-4"
        )
    if rate <= MORA_RATE and "mora" in methods:
        notes.add(
            f"train.learning_rate: {rate:g} is low for mora, whose update has no alpha to scale it: its best rates "
            f"were one to ten times LoRA's ({MEMORIZE})"
        )
    # Where B learns faster (LoRA+), the rates of A and B lie around one for both.
    elif rate * math.sqrt(train.b_learning_rate_ratio) <= ADAPTER_RATE and methods - {"full"}:
        notes.add(
            f"train.learning_rate: {rate:g} is a rate of full fine-tuning; the best of adapters is about ten times as "
            f"high ({REGRET}; {LEARNS_LESS}), often 1e-4 to 1e-3"
        )
