"""What a task has to say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trimtab.config.resolve import Job
from trimtab.config.run import EvaluationConfig
from trimtab.data.rows import Row, Source as RowSource
from trimtab.errors import ConfigError
from trimtab.evaluation.evaluate import Evaluation, Progress
from trimtab.metrics import Metric, best_by, of_validation
from trimtab.models.heads import Family
from trimtab.models.locate import ModelHead
from trimtab.notes import Notes
from trimtab.runs.events import Listener
from trimtab.tasks._answer import Answer
from trimtab.tasks._inputs import Inputs
from trimtab.tasks._sizes import Batch, RowSizes


@dataclass(frozen=True)
class Measurement:
    """How a model is measured on rows.

    Attributes:
        name: of the data set.
        choices: the closed set of answers or labels; None where there is none.
        evaluation: the settings of the run.
        max_length: most tokens of a row; None: what the model was made for.
        progress: called as the rows get done.
    """

    name: str
    choices: Sequence[str] | None
    evaluation: EvaluationConfig
    max_length: int | None
    progress: Progress | None = None


class Task(ABC):
    """What a model is asked for. The name of a task is that of its file.

    A *reader* is what makes tensors of rows: the model's tokenizer, or its image processor. A *head* is the model as
    the task runs it.
    """

    model_class: ClassVar[str]
    """The class of transformers that reads the folder of such a model."""
    metrics: ClassVar[tuple[str, ...]]
    """The metrics by which a step can be chosen as the best, by name."""
    precedence: ClassVar[int] = 50
    """Tasks of lower numbers are asked first whether a model and rows are theirs."""
    precision: ClassVar[str | None] = None
    """What a run computes in that says nothing of it; None: what the machine is best at."""
    counted: ClassVar[str] = "tokens"
    """What the speed of training is counted in."""
    loss_unit: ClassVar[str] = "nats per token"
    """What the loss of training is counted in."""
    writes: ClassVar[bool] = False
    """Whether the model writes its answers."""
    checked_as_texts: ClassVar[bool] = False
    """Whether rows are texts with parts that are learnt, as those that a decoder writes; else the task has ``held``."""

    answer_keys: ClassVar[tuple[str, ...]] = ("label", "labels")
    """Under which keys a row holds its answer."""
    input_key: ClassVar[str] = "text"
    """Under which key a row holds what is asked for, where that is a text by itself."""

    @property
    def name(self) -> str:
        """The name of the task."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def suits(self, family: Family, classes: Sequence[str], row: Mapping[str, Any] | None) -> bool:
        """Whether this is what someone means who says no task.

        Args:
            family: of the model; ``classes``: as what its configuration says that it was saved.
            row: the first one; None where there is none to be read.
        """

    def serves(self, head: ModelHead) -> bool:
        """Whether a model that was read for ``head`` is asked for this."""
        return head.model_class == self.model_class

    @abstractmethod
    def read(self, job: Job, reader: Any, listener: Listener) -> Inputs:
        """The rows that ``job`` names, in the forms that the task takes, checked, cut and encoded."""

    def head_for(self, job: Job, inputs: Inputs) -> ModelHead:
        """What the model is read for, now that the rows are known."""
        return ModelHead(self.model_class)

    @abstractmethod
    def collator(self, reader: Any, *, prompts: bool = False) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """What makes a batch of rows; with ``prompts``, of their prompts' tokens too, for a loss that counts them."""

    def packer(
        self, reader: Any, *, prompts: bool = False, flash: bool = False
    ) -> Callable[[Sequence[Any]], dict[str, Any]] | None:
        """What makes a batch whose rows lie one behind the other, without padding; ``flash``: for flash attention. None
        where a batch of the task has its rows apart."""
        return None

    def head(self, model: Any) -> Any:
        """The model as training and evaluation run it. Made once; adapters may come onto the model later."""
        return model

    @abstractmethod
    def loss(
        self, head: Any, batch: Mapping[str, Tensor], *, count: int | Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        """The training loss of ``batch``: a sum over what carries loss, divided by ``count`` (None: by its number)."""

    @abstractmethod
    def evaluate(self, head: Any, reader: Any, examples: Sequence[Any], how: Measurement) -> Evaluation:
        """Measure the model on rows as ``read`` gives them."""

    def rows(self, sources: Sequence[RowSource], reader: Any, notes: Notes) -> list[Any]:
        """The rows of ``sources`` as ``evaluate`` takes them. Raises DataError, which names the row, for a bad one."""
        raise ConfigError(f"{self.name}: its rows are read by a run alone")

    def known(self, head: ModelHead, rows: list[Any], *, numbered: bool) -> list[Any]:
        """``rows`` with answers as the model of ``head`` has them; where they are ``numbered``, numbers may stand for
        its labels. Raises DataError for one that it does not have."""
        return rows

    def asked(self, row: Row, head: ModelHead) -> Any:
        """What the model of ``head`` is asked by ``row``, which may have no answer. Raises DataError, which names the
        row, for one that asks nothing."""
        raise ConfigError(f"{self.name}: ask such a model with trimtab generate")

    def as_row(self, text: str) -> dict[str, Any]:
        """The row that asks for ``text`` by itself."""
        return {self.input_key: text}

    def told(self, row: Mapping[str, Any]) -> str:
        """What a row asks, in a line."""
        said = row.get(self.input_key)
        return " ".join(str(row if said is None else said).split())

    def answers(
        self,
        model: Any,
        reader: Any,
        asked: Sequence[Any],
        *,
        head: ModelHead,
        evaluation: EvaluationConfig,
        max_length: int | None,
    ) -> list[Answer]:
        """What the model answers to rows that ``asked`` gives."""
        raise ConfigError(f"{self.name}: ask such a model with trimtab generate")

    def compared(self, model: Any, reader: Any, rows: Sequence[Any], *, head: ModelHead, length: int | None) -> Tensor:
        """By what two states of a model are compared on ``rows``: logits ``[n, answers]``, in float32 on the
        processor."""
        raise ConfigError(f"{self.name}: such models are compared by the tokens that they predict")

    def validation(
        self, head: Any, reader: Any, examples: Sequence[Any], *, inputs: Inputs, job: Job, progress: Progress
    ) -> Mapping[str, float]:
        """The metrics of validation rows that can choose the best step, the loss among them."""
        how = Measurement("validation", inputs.choices, job.config.evaluation, job.reading_length, progress)
        return of_validation(self.evaluate(head, reader, examples, how).record.figures)

    def validation_loss(self, head: Any, reader: Any, examples: Sequence[Any], *, inputs: Inputs, job: Job) -> float:
        """The loss of validation rows by itself."""
        return self.validation(head, reader, examples, inputs=inputs, job=job, progress=_unseen)["loss"]

    def nats(self, loss: float) -> float:
        """``loss`` in nats, up to a constant: the one unit for all tasks in which two trainings differ."""
        return loss

    def best(self, said: str, inputs: Inputs) -> Metric:
        """What ``train.metric`` means."""
        return best_by(said, scored=inputs.scored)

    def held(self, job: Job, inputs: Inputs, reader: Any) -> Sequence[str]:
        """Hold rows that are no ``checked_as_texts`` against the model, before anything is trained; gives what the user
        should know, a sentence each, such as how many test rows will be cut. Raises DataError for a row that cannot be
        read, ModelError for tokens that the model does not have."""
        return ()

    @abstractmethod
    def preview(self, inputs: Inputs, reader: Any) -> Any:
        """A few training rows as the model will see them, to print."""

    def tokens(self, row: Mapping[str, Any]) -> int:
        """What a row of a batch counts in the speed of training."""
        return len(row["input_ids"])

    def tokens_of_all(self, rows: Any) -> int:
        """What all ``rows`` of a run's `Inputs` count together."""
        return sum(rows.lengths)

    @abstractmethod
    def sizes(self, job: Job, inputs: Inputs) -> RowSizes:
        """All that the rows mean for the memory of a run."""

    def largest(self, job: Job) -> RowSizes:
        """The same before any row is known: the longest that a row may be."""
        data = job.config.data
        return RowSizes(job.max_length, job.max_length - 1, bool(data.test or data.validation))

    @abstractmethod
    def sample(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """A batch of that size, whatever its values are; called under fake tensors."""

    def logits_at_once(self, model: Any, labels: int) -> int:
        """How many logits stand in one block of memory where ``labels`` tokens have a label; 0 where they are few."""
        return 0

    def foresee(self, head: Any, batch: Mapping[str, Tensor], *, generates: bool) -> Any:
        """Run ``batch`` as an evaluation would, so that its memory can be seen; gives what stays while it is looked
        at. Called without gradients."""
        return self.loss(head, batch, count=1)


def _unseen(done: int, total: int) -> None:
    pass
