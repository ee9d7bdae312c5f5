"""How rows with labels are read for a run: which labels there are, in which order, and what each row counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trimtab.adapters.placing import adapter_files
from trimtab.adapters.stored_head import read_head
from trimtab.config.resolve import Job
from trimtab.data.choices import check_choices
from trimtab.data.labelled import Labelled, called, is_whole
from trimtab.data.rows import Source
from trimtab.data.unknown import tell_unknown
from trimtab.errors import ConfigError, DataError
from trimtab.metrics import Kind, choosing
from trimtab.models.heads import in_the_order_of
from trimtab.notes import Notes, rows as counted
from trimtab.runs.events import Listener
from trimtab.tasks._encoded import EncodedTensors
from trimtab.tasks._inputs import Answers, Rows, note_alike

COUNTED = 5
"""More labels than these that are all whole numbers may be amounts, and no names."""


class LabelledRows(Rows[Labelled]):
    """Rows with labels, of a ``task`` that is a LabelledTask."""

    def __init__(self, task: Any, job: Job, reader: Any, listener: Listener) -> None:
        super().__init__(job.config, listener)
        self.task, self.job, self.reader = task, job, reader
        self.kind: Kind = "number"

    def read(self, sources: Sequence[Source], notes: Notes) -> list[Labelled]:
        if named := next((one.form for one in sources if one.form not in (None, "auto")), None):
            raise ConfigError(
                f"data.form: {named} is a form for causal_lm; the rows of {self.task.name} are read by their keys "
                f"({', '.join(self.task.keys)})"
            )
        rows: list[Labelled] = self.task.rows(sources, self.reader, notes)
        said = self.config.data.choices
        return [called(row, said) for row in rows] if isinstance(said, tuple) else rows

    def answers(self, training: list[Labelled], notes: Notes) -> Answers:
        found = self.task.labels_of(training)
        said = self.config.data.choices
        if said not in (None, "auto") and found is None:
            raise ConfigError(f"data.choices: the rows of {self.task.name} are labelled with numbers; leave it at auto")
        if found is None:
            return Answers(None, scored=False)
        if isinstance(said, tuple):
            check_choices(said, [])
            labels = [label.strip() for label in said]
        else:
            labels = in_the_order_of(self.job.files.config, found)
        labels = self._as_begun(labels, found, said, notes)
        if len(labels) < (1 if isinstance(training[0].label, tuple) else 2):
            only = f"'{labels[0]}' is the only label" if labels else "no row has a label"
            raise DataError(f"{training[0].source}: {only}, so there is nothing to tell apart.")
        answers = Answers(labels, scored=True)
        self.check(answers, training)
        self.kind = self.task.kind(training[0], labels)
        self.listener.note(f"{len(labels)} labels: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}")
        if said == "auto" and len(labels) > COUNTED and all(map(is_whole, labels)):
            notes.add(
                f"the labels are {len(labels)} whole numbers, and each is taken for a class of its own; if a near "
                "label is better than one that is far, say task: regression"
            )
        if "-1" in labels and all(map(is_whole, labels)) and min(map(int, labels)) == -1:
            notes.add(
                "-1 is learned as a label like any other; where it marks rows without a label, as in data sets on the "
                "hub, leave these rows out"
            )
        note_alike(found, "labels", notes)
        if unseen := [label for label in labels if label not in found]:
            notes.add(f"no training row has the label {', '.join(unseen)}, which cannot be learned then")
        return answers

    def _as_begun(self, labels: list[str], found: list[str], said: object, notes: Notes) -> list[str]:
        """``labels`` in the order of the head that the run begins from: a head whose labels are others, or stand in
        another order, has learnt something else."""
        adapter = self.config.adapter
        head = read_head(*adapter_files(adapter)) if adapter is not None else None
        known = head.labels if head is not None else ()
        if head is not None and not known and not isinstance(said, tuple):
            notes.add(
                f"the head of {adapter} does not say what its rows mean: they are taken for {', '.join(labels[:20])}, "
                "in this order; data.choices says another"
            )
        if not known or (set(found) <= set(known) and not isinstance(said, tuple)):
            return list(known) or labels
        if list(known) != labels:
            raise ConfigError(
                f"adapter: {adapter}: its head has the labels {', '.join(known[:20])}, and this run needs "
                f"{', '.join(labels[:20])}; give rows of its labels and no data.choices, or begin without adapter"
            )
        return labels

    def check(self, answers: Answers, rows: list[Labelled]) -> None:
        known = set(answers.choices or ())
        named = isinstance(self.config.data.choices, tuple)
        whose = "in data.choices" if named else "among those of the training rows"
        cure = "name it there" if named else "name all labels in data.choices"
        for row in rows:
            if (strange := [label for label in row.labels if label not in known]) and answers.choices is not None:
                raise DataError(
                    f"{row.place}: the label '{strange[0]}' is not {whose} ({', '.join(answers.choices[:20])}), so it "
                    f"cannot be learned; {cure}, or repair the row (upper and lower case differ)."
                )

    def check_metric(self, answers: Answers) -> None:
        metric, known = self.config.train.metric, choosing(self.kind)
        if metric not in ("auto", *known):
            raise ConfigError(
                f"train.metric: {metric} is not measured for these rows of {self.task.name}; choose one of "
                f"{', '.join(known)}"
            )

    def encode(self, training: list[Labelled], times: Sequence[int], answers: Answers, notes: Notes) -> EncodedTensors:
        weights = self._weights(training, times, answers)
        rows = self.task.encode(training, self.reader, answers.choices, self.job.max_length)
        for example, row in zip(training, rows, strict=True):
            if weights:
                self.task.weigh(row, example, weights)
        cut = sum(row.pop("cut", False) for row in rows)
        if cut:
            notes.add(f"{counted(cut)} cut to data.max_length = {self.job.max_length} tokens")
        if dropped := [
            (example, count) for example, row in zip(training, rows, strict=True) if (count := row.pop("dropped", 0))
        ]:
            words = sum(count for _, count in dropped)
            first = dropped[0][0].place
            notes.add(f"{words:,} word{'s' * (words != 1)} of which the tokenizer leaves nothing, the first in {first}")
        if empty := [example for example in training if not example.prompt.strip()]:
            notes.add(f"{counted(len(empty))} to train on without any text, the first in {empty[0].place}")
        told = (
            (example.place, [example.prompt], row.get("input_ids", ()))
            for example, row in zip(training, rows, strict=True)
        )
        tell_unknown(told, self.reader, notes, written=False)
        return EncodedTensors(rows, training, cut, self.task.tokens)

    def _weights(self, training: list[Labelled], times: Sequence[int], answers: Answers) -> dict[str, float]:
        """What a row of each label counts, 1 on average over the rows of an epoch; empty where all count alike."""
        said = self.config.train.class_weights
        if said is None:
            return {}
        if answers.choices is None or not self.task.weighs:
            raise ConfigError(f"train.class_weights: the rows of {self.task.name} have no classes to weigh")
        counts: Counter[str] = Counter()
        for row, count in zip(training, times, strict=True):
            for label in row.labels:
                counts[label] += count
        if said == "balanced":
            weights = {label: 1 / counts[label] if counts[label] else 0.0 for label in answers.choices}
        else:
            if strange := [label for label in said if label not in answers.choices]:
                raise ConfigError(
                    f"train.class_weights: '{strange[0]}' is not a label; expected some of {', '.join(answers.choices)}"
                )
            weights = {label: said.get(label, 1.0) for label in answers.choices}
        mean = sum(weights[label] * count for label, count in counts.items()) / counts.total()
        return {label: weight / mean for label, weight in weights.items()}
