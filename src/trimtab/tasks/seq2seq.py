"""Sequence to sequence: an encoder reads the source, and a decoder learns to write the target.

Rows are ``{"source": ..., "target": ...}``, or of any other form in `trimtab.data.forms` with a prompt and an answer.
The loss is the cross-entropy of the target's tokens, the one that ends it among them. Answers are written greedily, and
held against the target as they stand, by chrF (https://aclanthology.org/W15-3049) and by ROUGE-L
(https://aclanthology.org/W04-1013). Nothing is trained beside the adapter: the model brings its own head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from trimtab.config.resolve import Job
from trimtab.config.run import EvaluationConfig
from trimtab.data.batches import by_length
from trimtab.data.forms import read_examples
from trimtab.data.preview import Preview
from trimtab.data.rows import Example, Row, Source
from trimtab.data.unknown import tell_unknown
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.answers import Judged, written_texts
from trimtab.evaluation.evaluate import Evaluation, Progress, checked
from trimtab.evaluation.generation import Generated
from trimtab.metrics import measure
from trimtab.models.causal_head import IGNORED
from trimtab.models.heads import Family
from trimtab.models.languages import first_of_targets
from trimtab.models.locate import ModelHead
from trimtab.models.model_files import require_rows
from trimtab.notes import Notes, rows as counted
from trimtab.processes import divided
from trimtab.runs.events import Listener
from trimtab.runs.results import GenerationResult
from trimtab.surgery.contexts import evaluating
from trimtab.tasks import _read_text, _task
from trimtab.tasks._answer import Answer
from trimtab.tasks._encoded import EncodedTensors, Tensors, token_ids
from trimtab.tasks._inputs import Answers, Inputs, Rows, gather
from trimtab.tasks._sizes import Batch, RowSizes, with_most_characters


class Seq2Seq(_task.Task):
    """A target for each source."""

    model_class = "AutoModelForSeq2SeqLM"
    metrics = ("loss",)
    precedence = 20
    answer_keys = ("target",)
    input_key = "source"
    writes = True

    def suits(self, family: Family, classes: Sequence[str], row: Mapping[str, Any] | None) -> bool:
        return family == "encoder-decoder" and not any("Classification" in name for name in classes)

    def read(self, job: Job, reader: Any, listener: Listener) -> Inputs:
        if job.config.train.prompt_loss_weight:
            raise ConfigError("train.prompt_loss_weight: the decoder does not write the source; leave it at 0")
        if job.config.train.class_weights is not None:
            raise ConfigError("train.class_weights: targets are texts, which are no classes; leave it out")
        return gather(_PairRows(self, job, reader, listener))

    def collator(self, reader: Any, *, prompts: bool = False) -> Callable[[Sequence[Tensors]], dict[str, Tensor]]:
        return partial(_collate, reader=reader)

    def loss(
        self, head: Any, batch: Mapping[str, Tensor], *, count: int | Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        labels = batch["labels"]
        costs = F.cross_entropy(
            self._logits(head, batch).flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return costs / ((labels != IGNORED).sum() if count is None else count)

    def _logits(self, head: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Of each token of the targets: ``[rows, tokens, vocabulary]``."""
        logits: Tensor = head(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=_read_before(head, batch["labels"]),
            use_cache=False,
        ).logits
        return logits

    def evaluate(self, head: Any, reader: Any, examples: Sequence[Example], how: _task.Measurement) -> Evaluation:
        if not examples:
            raise DataError(f"{how.name}: there are no rows to evaluate.")
        started = time.perf_counter()
        rows = _encoded(examples, reader, how.max_length)
        written = self._write(head, reader, rows, how.evaluation, how.progress)
        judged: Judged = written_texts(examples, written)
        loss, tokens = self._losses(head, reader, rows, how.evaluation.batch_size)
        record = GenerationResult(
            kind="generation",
            dataset=how.name,
            rows=len(examples),
            figures=measure("generation", judged.with_loss(checked(loss, tokens), tokens)),
            seconds=round(time.perf_counter() - started, 3),
            **({"cut": cut} if (cut := sum(row["cut"] for row in rows)) else {}),
        )
        return Evaluation(how.name, record, judged.rows)

    def validation(
        self, head: Any, reader: Any, examples: Sequence[Example], *, inputs: Inputs, job: Job, progress: Progress
    ) -> Mapping[str, float]:
        rows = _encoded(examples, reader, job.max_length)
        loss, tokens = self._losses(head, reader, rows, job.config.evaluation.batch_size)
        return {"loss": checked(loss, tokens) / tokens}

    def rows(self, sources: Sequence[Source], reader: Any, notes: Notes) -> list[Example]:
        rows = read_examples(sources, reader, root=Path.cwd(), notes=notes)
        if (plain := next((row for row in rows if row.answer is None), None)) is not None:
            raise DataError(f"{plain.place}: a text alone has no target to write; give rows with source and target.")
        return rows

    def asked(self, row: Row, head: ModelHead) -> str:
        for key in (self.input_key, "prompt", "text"):
            if isinstance(source := row.value.get(key), str) and source.strip():
                return source.strip()
        raise DataError(f"{row.place}: expected a text under 'source'; its keys are {', '.join(row.value) or 'none'}.")

    def answers(
        self,
        model: Any,
        reader: Any,
        asked: Sequence[str],
        *,
        head: ModelHead,
        evaluation: EvaluationConfig,
        max_length: int | None,
    ) -> list[Answer]:
        rows = [{**row, "labels": []} for row in _sources(asked, reader, max_length)]
        written = self._write(self.head(model), reader, rows, evaluation, None)
        return [
            Answer({"target": one.text, "ended": one.usable}, one.text, cut=row["cut"])
            for one, row in zip(written, rows, strict=True)
        ]

    def compared(
        self, model: Any, reader: Any, rows: Sequence[Example], *, head: ModelHead, length: int | None
    ) -> Tensor:
        found = []
        with evaluating(model):
            for row in _encoded(rows, reader, length):
                row.pop("cut")
                batch = {key: value.to(model.device) for key, value in _collate([row], reader).items()}
                found.append(self._logits(model, batch)[0].float().cpu())
        return torch.cat(found)

    def held(self, job: Job, inputs: Inputs, reader: Any) -> list[str]:
        found, used = [], token_ids(inputs.rows)
        table, wanted = job.positions.table, job.config.evaluation.max_new_tokens
        if inputs.tests and table is not None and wanted >= table:
            raise ConfigError(
                f"evaluation.max_new_tokens: {wanted}, but the decoder has {table} positions, the first of them for "
                f"what begins a target. Set it to {table - 1} at most"
            )
        for name, rows in (("", inputs.validation), *inputs.tests.items()):
            encoded = _encoded(rows, reader, job.max_length if not name else job.reading_length)
            used |= token_ids(encoded)
            if name and (cut := sum(row["cut"] for row in encoded)):
                found.append(f"{counted(cut)} of the test set {name} cut to {job.reading_length} tokens")
            if name and (longer := sum(len(row["labels"]) > wanted for row in encoded)):
                found.append(
                    f"{counted(longer)} of the test set {name} with a target of more than evaluation.max_new_tokens = "
                    f"{wanted} tokens, which cannot be written to its end"
                )
        require_rows(job.config.model.name, reader, (), job.embedding_rows, used)
        if job.source.languages is None and (source := getattr(reader, "src_lang", None)):
            target = getattr(reader, "tgt_lang", None) or source
            found.append(
                f"the tokenizer marks sources as {source} and targets as {target}; where they are in other languages, "
                "say model.source_language and model.target_language"
            )
        return found

    def _write(
        self, head: Any, reader: Any, rows: Sequence[Tensors], evaluation: EvaluationConfig, progress: Progress | None
    ) -> list[Generated]:
        found: dict[int, Generated] = {}
        own = head.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), reader.eos_token_id} - {None}

        def write(indices: list[int]) -> Any:
            batch = _read_text.padded([rows[at] for at in indices], reader)
            output = head.generate(
                input_ids=batch["input_ids"].to(head.device), attention_mask=batch["attention_mask"].to(head.device)
            )
            return output[:, 1:].tolist()

        with evaluating(head), _greedy(head, reader, evaluation.max_new_tokens, sorted(ends)):
            batches = by_length([len(row["input_ids"]) for row in rows], evaluation.batch_size)
            for indices, written in divided(batches, write):
                for at, new in zip(indices, written, strict=True):
                    stop = next((place for place, token in enumerate(new) if token in ends), None)
                    text = reader.decode(new[:stop], skip_special_tokens=True).strip()
                    found[at] = Generated(text, stop is not None and text != "")
                if progress is not None:
                    progress(len(found), len(rows))
        return [found[at] for at in range(len(rows))]

    def _losses(self, head: Any, reader: Any, rows: Sequence[Tensors], batch_size: int) -> tuple[float, int]:
        """The summed loss of all targets' tokens, and how many these are."""
        total, tokens = 0.0, 0

        def run(indices: list[int]) -> tuple[float, int]:
            collated = _collate([rows[at] for at in indices], reader)
            batch = {key: value.to(head.device) for key, value in collated.items()}
            return float(self.loss(head, batch, count=1)), int((batch["labels"] != IGNORED).sum())

        with evaluating(head):
            batches = by_length([self.tokens(row) for row in rows], batch_size)
            for _, (loss, count) in divided(batches, run, one_pass=True):
                total, tokens = total + loss, tokens + count
        return total, tokens

    def tokens(self, row: Mapping[str, Any]) -> int:
        return len(row["input_ids"]) + len(row["labels"])

    def tokens_of_all(self, rows: Any) -> int:
        return sum(map(self.tokens, rows))

    def preview(self, inputs: Inputs, reader: Any) -> Preview:
        shown = []
        for (source, number), row in list(zip(inputs.rows.origins, inputs.rows, strict=True))[:2]:
            heading = f"{source}, row {number}: {len(row['input_ids'])} tokens, {len(row['labels'])} trained"
            target = _read_text.decoded({"input_ids": row["labels"]}, reader)
            shown.append((heading, ((_read_text.decoded(row, reader), False), ("\n", False), (target, True))))
        return Preview(tuple(shown))

    def sizes(self, job: Job, inputs: Inputs) -> RowSizes:
        measured = [row for rows in (inputs.validation, *inputs.tests.values()) for row in rows]
        few = with_most_characters(measured, lambda row: len(row.prompt) + len(str(row.answer)))
        encoded = _encoded(few, job.reader, job.reading_length)

        def longest(key: str, rows: Any) -> int:
            return max((len(row[key]) for row in rows), default=0)

        return RowSizes(
            longest("input_ids", inputs.rows),
            longest("labels", inputs.rows),
            bool(measured),
            bool(inputs.tests),
            tested=longest("input_ids", encoded),
            tested_labels=longest("labels", encoded),
        )

    def largest(self, job: Job) -> RowSizes:
        data = job.config.data
        return RowSizes(job.max_length, job.max_length, bool(data.test or data.validation), bool(data.test))

    def sample(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        labels = torch.zeros(batch.rows, max(1, batch.labels // batch.rows), dtype=torch.int64)
        return {**_read_text.sample(batch.rows, batch.length), "labels": labels}

    def logits_at_once(self, model: Any, labels: int) -> int:
        return labels * int(model.config.get_text_config().vocab_size)

    def foresee(self, head: Any, batch: Mapping[str, Tensor], *, generates: bool) -> Any:
        if not generates:
            return super().foresee(head, batch, generates=generates)
        return head(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=torch.zeros_like(batch["labels"]),
            use_cache=True,
        )


class _PairRows(Rows[Example]):
    """Sources and targets."""

    def __init__(self, task: Seq2Seq, job: Job, reader: Any, listener: Listener) -> None:
        super().__init__(job.config, listener)
        self.task = task
        self.max_length = job.max_length
        self.reader = reader

    def read(self, sources: Sequence[Source], notes: Notes) -> list[Example]:
        return self.task.rows(sources, self.reader, notes)

    def answers(self, training: list[Example], notes: Notes) -> Answers:
        if isinstance(self.config.data.choices, tuple):
            raise ConfigError("data.choices: seq2seq writes its targets and scores no choices; leave it at auto")
        return Answers(None, scored=False)

    def check(self, answers: Answers, rows: list[Example]) -> None:
        pass

    def check_metric(self, answers: Answers) -> None:
        if self.config.train.metric not in ("auto", "loss"):
            raise ConfigError(f"train.metric: {self.config.train.metric} is not measured for seq2seq; choose loss")

    def encode(self, training: list[Example], times: Sequence[int], answers: Answers, notes: Notes) -> EncodedTensors:
        rows = _encoded(training, self.reader, self.max_length)
        cut = sum(row.pop("cut") for row in rows)
        if cut:
            notes.add(f"{counted(cut)} cut to data.max_length = {self.max_length} tokens of source or target")
        told = (
            (example.place, [example.prompt, str(example.answer)], [*row["input_ids"], *row["labels"]])
            for example, row in zip(training, rows, strict=True)
        )
        tell_unknown(told, self.reader, notes, written=True)
        return EncodedTensors(rows, training, cut, lambda row: len(row["input_ids"]))


def _sources(texts: Sequence[str], reader: Any, max_length: int | None) -> list[Tensors]:
    whole = reader(list(texts), verbose=False)["input_ids"]
    short = reader(list(texts), truncation=True, max_length=max_length)["input_ids"] if max_length else whole
    return [{"input_ids": ids, "cut": len(ids) < len(all_)} for ids, all_ in zip(short, whole, strict=True)]


def _encoded(examples: Sequence[Example], reader: Any, max_length: int | None) -> list[Tensors]:
    """Source and target of each row as tokens, each with what the tokenizer puts around it, and each cut from the right
    to ``max_length``. Raises DataError for a source without a token."""
    if not examples:  # of which a tokenizer makes nothing
        return []
    rows = _sources([example.prompt.strip() for example in examples], reader, max_length)
    targets = reader(text_target=[str(example.answer) for example in examples], verbose=False)["input_ids"]
    for row, example, target in zip(rows, examples, targets, strict=True):
        if not row["input_ids"]:
            raise DataError(f"{example.place}: the source is empty, and this tokenizer puts nothing after it.")
        row["labels"] = target[:max_length]
        row["cut"] = row["cut"] or len(row["labels"]) < len(target)
    return rows


def _collate(rows: Sequence[Tensors], reader: Any) -> dict[str, Tensor]:
    width = max(len(row["labels"]) for row in rows)
    labels = torch.tensor([[*row["labels"], *[IGNORED] * (width - len(row["labels"]))] for row in rows])
    return {**_read_text.padded(rows, reader), "labels": labels}


@contextmanager
def _greedy(model: Any, reader: Any, max_new_tokens: int, ends: list[int]) -> Iterator[None]:
    """While open, ``model`` writes the likeliest token, whatever settings came with it."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=reader.pad_token_id,
        decoder_start_token_id=_start(model, reader),
        forced_bos_token_id=kept.forced_bos_token_id if (mark := first_of_targets(reader)) is None else mark,
    )
    try:
        yield
    finally:
        model.generation_config = kept


def _start(model: Any, reader: Any) -> int:
    """What a target begins with: as the model's settings say it, else as it begins in training (mBART, T5Gemma), and
    always so where the language of targets is known, which some begin with."""
    for said in () if getattr(reader, "tgt_lang", None) else (model.generation_config, model.config):
        if (start := getattr(said, "decoder_start_token_id", None)) is not None:
            return int(start)
    labels = torch.tensor([reader(text_target="a")["input_ids"]], device=model.device)
    return int(_read_before(model, labels)[0, 0])


def _read_before(model: Any, labels: Tensor) -> Tensor:
    """What the decoder reads while it learns ``labels``: the token before each. Some models have a way of their own to
    say it; the others begin with a token of their configuration (M2M100, NLLB, Blenderbot, SeamlessM4T)."""
    if (own := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        read: Tensor = own(labels=labels)
        return read
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, padding)
