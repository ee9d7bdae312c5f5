"""Classification of the words of a text: names, parts of speech.

Rows are ``{"tokens": ["Ms", "Kiel", "calls"], "tags": ["O", "B-PER", "O"]}``; a tag is a word or a number. The first
piece of each word carries its tag, the others none, as in transformers' examples. The loss is the cross-entropy of the
tags. Tags such as B-PER and I-PER (BIO, IOBES, BILOU) mark entities, which are measured whole by seqeval; of any others
each word is measured by itself.

The model reads the words with a space between each two, as it reads any text, whatever its tokenizer makes of spaces;
so does transformers' pipeline. A row that is too long is cut behind a word. The words behind it, and words of which a
tokenizer leaves nothing, teach nothing, and in an evaluation they count as tagged O (as the first tag where there is no
O). Both are told of training rows, and a result says how many rows were cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data.forms._form import keys_of
from trimtab.data.labelled import Labelled, name_of_label
from trimtab.data.rows import Row
from trimtab.errors import ConfigError, DataError, printable
from trimtab.evaluation.answers import Judged
from trimtab.metrics import METRICS, Kind, Metric
from trimtab.models.causal_head import IGNORED
from trimtab.models.heads import Family
from trimtab.models.locate import ModelHead
from trimtab.tasks import _labelled, _read_text, _tags
from trimtab.tasks._answer import Answer
from trimtab.tasks._encoded import Tensors
from trimtab.tasks._inputs import Inputs
from trimtab.tasks._sizes import Batch


class TokenClassification(_labelled.LabelledTask):
    """A tag for each word."""

    model_class = "AutoModelForTokenClassification"
    metrics = ("loss", "entity_f1", "accuracy", "macro_f1")
    keys = ("tokens", "tags")
    answer_keys = ("tags",)
    precedence = 20

    def suits(self, family: Family, classes: Sequence[str], row: Mapping[str, Any] | None) -> bool:
        if any(name.endswith("ForTokenClassification") for name in classes):
            return True
        return family == "encoder" and row is not None and ("tags" in row or isinstance(row.get("tokens"), list))

    def example(self, row: Row) -> Labelled:
        words = _words(row)
        tags = row.value.get("tags")
        if not isinstance(tags, list):
            what = "nothing" if tags is None else type(tags).__name__
            hint = f" Its keys are {keys_of(row)}; another column is named data.columns={{tags: its name}}."
            raise DataError(
                f"{row.place}: expected a list of tags under 'tags', one for each token, got {what}.{hint * (not tags)}"
            )
        if len(tags) != len(words):
            raise DataError(f"{row.place}: {len(words)} tokens, but {len(tags)} tags; each token needs one tag.")
        named = tuple(name_of_label(tag, row.place, "tags") for tag in tags)
        if strange := next((tag for tag in named if any(letter.isspace() for letter in tag)), None):
            raise DataError(f"{row.place}: the tag '{strange}' has a space in it; a tag is one word, such as B-PER.")
        return Labelled(row.source, row.number, named, words=words, form="tokens and tags")

    def as_row(self, text: str) -> dict[str, Any]:
        return {"tokens": text.split()}

    def told(self, row: Mapping[str, Any]) -> str:
        said = row.get("tokens", row.get("text"))
        return " ".join(map(str, said)) if isinstance(said, list) else str(said)

    def asked(self, row: Row, head: ModelHead) -> Labelled:
        text = row.value.get("text")
        said = self.as_row(text) if isinstance(text, str) and "tokens" not in row.value else dict(row.value)
        words = _words(replace(row, value=said))
        return self.example(replace(row, value={"tokens": list(words), "tags": [head.labels[0]] * len(words)}))

    def answer(self, row: Labelled, logits: Tensor, head: ModelHead) -> Answer:
        """The tag of each word, and its probability; None for a word that was not read."""
        tags = _tags.likeliest(logits, head.labels)
        shares = [None if share != share else round(share, 6) for share in logits.softmax(-1).amax(-1).tolist()]
        told = " ".join(f"{word}/{tag}" for word, tag in zip(row.words, tags, strict=True))
        return Answer({"tokens": list(row.words), "tags": tags, "probabilities": shares}, told)

    def compared(
        self, model: Any, reader: Any, rows: Sequence[Labelled], *, head: ModelHead, length: int | None
    ) -> Tensor:
        found = super().compared(model, reader, rows, head=head, length=length)
        return found[~found.isnan().any(-1)]  # of the words that are read

    def labels_of(self, training: Sequence[Labelled]) -> list[str]:
        found, words = {tag for row in training for tag in row.labels}, sum(len(row.words) for row in training)
        if len(found) > max(50, words / 2):
            raise DataError(
                f"{training[0].source}: {len(found):,} different tags on {words:,} tokens are no classes; is it the "
                "right column? Name it in data.columns."
            )
        if len(found) == 1:
            raise DataError(f"{training[0].source}: every token has the tag '{found.pop()}': nothing to tell apart.")
        # No entity first, then the kinds of entity.
        return sorted(found, key=lambda tag: (tag != _tags.NONE, int(tag) if tag.isdecimal() else 0, tag))

    def problem(self, inputs: Inputs) -> str:
        return "single_label_classification"

    def kind(self, example: Labelled, labels: Sequence[str] | None) -> Kind:
        return "entities" if _tags.mark_entities(labels or ()) else "tags"

    def best(self, said: str, inputs: Inputs) -> Metric:
        entities = said == "auto" and _tags.mark_entities(inputs.choices or ())
        return METRICS["entity_f1"] if entities else super().best(said, inputs)

    def encode(
        self, examples: Sequence[Labelled], reader: Any, labels: Sequence[str] | None, max_length: int | None
    ) -> list[Tensors]:
        places = {label: number for number, label in enumerate(labels or ())}
        return [self._encoded(example, reader, places, max_length) for example in examples]

    def _encoded(self, example: Labelled, reader: Any, places: Mapping[str, int], max_length: int | None) -> Tensors:
        if not getattr(reader, "is_fast", False):
            raise ConfigError(
                "task: token_classification needs to know which piece comes from which word, which the tokenizer of "
                "this model cannot tell (it has no tokenizer.json)"
            )
        text = " ".join(example.words)
        whole = reader(text, return_offsets_mapping=True, truncation=False, verbose=False)
        firsts = _first_pieces(whole["offset_mapping"], text, example.words)
        row: Tensors = {name: list(whole[name]) for name in _read_text.KEPT if name in whole}
        row["dropped"] = firsts.count(None)
        if max_length is not None and len(row["input_ids"]) > max_length:
            short = reader(text, return_offsets_mapping=True, truncation=True, max_length=max_length)
            row |= {name: list(short[name]) for name in _read_text.KEPT if name in short}
            # A word counts as read where all of it is.
            read = max((end for _, end in short["offset_mapping"]), default=0)
            ends = [end - 1 for end in accumulate(len(word) + 1 for word in example.words)]
            firsts = [at if end <= read else None for at, end in zip(firsts, ends, strict=True)]
            row["cut"] = True
        if all(at is None for at in firsts):
            raise DataError(f"{example.place}: none of its {len(firsts)} tokens is anything that this model can read.")
        row["labels"] = [IGNORED] * len(row["input_ids"])
        for at, tag in zip(firsts, example.labels, strict=True):
            if at is not None:
                row["labels"][at] = places[tag]
        row["firsts"] = firsts
        return row

    def pad(self, rows: Sequence[Tensors], reader: Any) -> dict[str, Tensor]:
        return _read_text.padded(rows, reader)

    def stacked_labels(self, rows: Sequence[Tensors], width: int) -> Tensor:
        return torch.tensor([[*row["labels"], *[IGNORED] * (width - len(row["labels"]))] for row in rows])

    def weigh(self, row: Tensors, example: Labelled, weights: Mapping[str, float]) -> None:
        row["weight"] = [0.0] * len(row["input_ids"])
        for at, tag in zip(row["firsts"], example.labels, strict=True):
            if at is not None:
                row["weight"][at] = weights[tag]

    def stacked_weights(self, rows: Sequence[Tensors], width: int) -> Tensor:
        return torch.tensor([[*row["weight"], *[0.0] * (width - len(row["weight"]))] for row in rows])

    def costs(self, logits: Tensor, labels: Tensor) -> Tensor:
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view_as(labels)

    def picked(self, row: Tensors, logits: Tensor) -> Tensor:
        """``[words, labels]``; NaN for a word that was not read."""
        missing = torch.full_like(logits[0], torch.nan)
        return torch.stack([missing if at is None else logits[at] for at in row["firsts"]])

    def judge(self, logits: Sequence[Tensor], examples: Sequence[Labelled], labels: Sequence[str] | None) -> Judged:
        return _tags.judged(logits, examples, list(labels or ()))

    def shown(self, row: Tensors, reader: Any, labels: Sequence[str] | None) -> tuple[tuple[str, bool], ...]:
        known, pieces = labels or (), []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            pieces.append((printable(reader.decode([token], skip_special_tokens=False)), False))
            pieces += [(known[label], True)] if label != IGNORED else []
            pieces.append((" ", False))
        return tuple(pieces[:600])

    def sample(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        texts = _read_text.sample(batch.rows, batch.length)
        return {**texts, "labels": torch.zeros_like(texts["input_ids"])}


def _words(row: Row) -> tuple[str, ...]:
    words = row.value.get("tokens")
    if not isinstance(words, list):
        what = f"its keys are {keys_of(row)}" if words is None else f"got {type(words).__name__}"
        raise DataError(
            f"{row.place}: expected a list of words under 'tokens', but {what}. If the column has another name, say "
            "so: data.columns={tokens: its name}."
        )
    if not words:
        raise DataError(f"{row.place}: it has no tokens; leave the row out.")
    if strange := next((word for word in words if not isinstance(word, str)), None):
        raise DataError(f"{row.place}: expected words under 'tokens', got {strange!r:.60}.")
    return tuple(words)


def _first_pieces(spans: Sequence[tuple[int, int]], text: str, words: Sequence[str]) -> list[int | None]:
    """The position of the first piece of each word in a tokenised ``text`` of ``words``; None where it has no piece."""
    starts = [0, *accumulate(len(word) + 1 for word in words)][: len(words)]
    firsts: list[int | None] = [None] * len(words)
    for at, (start, end) in enumerate(spans):
        begin = start + len(text[start:end]) - len(text[start:end].lstrip())  # some pieces have the space before a word
        if begin < end:
            word = bisect_right(starts, begin) - 1
            if firsts[word] is None:
                firsts[word] = at
    return firsts
