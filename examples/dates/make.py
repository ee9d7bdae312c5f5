"""Makes the dates: a small T5 that was pretrained to write spoken dates in two styles, and rows of a third style.

    python examples/dates/make.py              # about 90 seconds on one core; writes examples/dates/made/

It is pretrained on "iso: May the third, nineteen oh-five" -> "1905-05-03" and "us: ..." -> "May 3, 1905"; the rows ask
for "3 May 05" and have no prefix. Nothing is downloaded, not even a tokenizer, and the same seed makes the same files.
"""

from __future__ import annotations

import argparse
import calendar
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from trimtab.files import write_jsonl

MADE = Path(__file__).resolve().parent / "made"
NUMBERS = {
    "small": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
    "tens": "zero ten twenty thirty forty fifty sixty seventy eighty ninety",
    "ordinals": "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth",
}
SMALL, TENS, ORDINALS = (words.split() for words in NUMBERS.values())
MONTHS = calendar.month_name
YEARS = (1700, 2060)
PAIRS, STEPS, BATCH = 20_000, 1200, 64  # of the pretraining
PARTS = {"train": 300, "validation": 100, "test": 500}
Row = dict[str, str]


class Date(NamedTuple):
    day: int
    month: int
    year: int


def spoken_number(number: int) -> str:
    """0 to 99 in words."""
    if number < 20:
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{SMALL[ones]}" if ones else "")


def spoken_day(number: int) -> str:
    """1 to 31 as a word of order."""
    if number <= 20:
        return ORDINALS[number]
    return "thirtieth" if number == 30 else f"{TENS[number // 10]}-{ORDINALS[number % 10]}"


def spoken_year(number: int) -> str:
    """1100 to 2099 as one says it."""
    if number // 10 == 200:
        return "two thousand" + (f" and {SMALL[number - 2000]}" if number > 2000 else "")
    hundreds, rest = divmod(number, 100)
    end = "hundred" if rest == 0 else f"oh-{SMALL[rest]}" if rest < 10 else spoken_number(rest)
    return f"{spoken_number(hundreds)} {end}"


def draw(chance: random.Random) -> tuple[Date, str]:
    """A date, and how somebody says it."""
    year, month = chance.randint(*YEARS), chance.randint(1, 12)
    date = Date(chance.randint(1, calendar.monthrange(year, month)[1]), month, year)
    day, name, spoken = spoken_day(date.day), MONTHS[month], spoken_year(year)
    return date, chance.choice(
        [f"the {day} of {name} {spoken}", f"{name} the {day}, {spoken}", f"{name} {day} {spoken}"]
    )


def pretraining_rows(count: int) -> list[Row]:
    """Two styles of writing, told by a prefix, as T5 was pretrained."""
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        date, spoken = draw(chance)
        if chance.random() < 0.5:
            rows.append({"source": f"iso: {spoken}", "target": f"{date.year}-{date.month:02}-{date.day:02}"})
        else:
            rows.append({"source": f"us: {spoken}", "target": f"{MONTHS[date.month]} {date.day}, {date.year}"})
    return rows


def written(date: Date) -> str:
    """The third style, which drops the century."""
    return f"{date.day} {MONTHS[date.month]} {date.year % 100:02}"


def rows_of_the_third_style() -> dict[str, list[Row]]:
    """Train, validation and test; no date is in it twice."""
    chance, dates = random.Random(1), {}
    while len(dates) < sum(PARTS.values()):
        date, spoken = draw(chance)
        dates.setdefault(date, {"source": spoken, "target": written(date)})
    rows = iter(dates.values())
    return {part: [next(rows) for _ in range(count)] for part, count in PARTS.items()}


def train_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """Byte pairs of words, and each digit by itself, with ``</s>`` at the end, as T5's tokenizer has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    parts = [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=256, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def network(tokenizer: Any) -> Any:
    """A T5 of two blocks on either side with random weights: 213,000 numbers."""
    width = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), **width, **ids, dropout_rate=0.0, feed_forward_proj="gated-gelu")
    )


def batch(tokenizer: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The tokens of ``rows``, padded; a label of padding is -100, which carries no loss."""
    read = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
    labels = tokenizer([row["target"] for row in rows], padding=True, return_tensors="pt").input_ids
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    return {"input_ids": read.input_ids, "attention_mask": read.attention_mask, "labels": labels}


def pretrain(model: Any, tokenizer: Any, rows: Sequence[Row], steps: int) -> None:
    """AdamW on batches drawn at random, the rate going down to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1, (at + 1) / 20) * (1 - at / steps))
    chance = random.Random(0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(tokenizer, chance.sample(rows, BATCH))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def exact(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """The share of rows whose target is written to the letter."""
    read = {key: value for key, value in batch(tokenizer, rows).items() if key != "labels"}
    answers = tokenizer.batch_decode(model.generate(**read, max_new_tokens=16), skip_special_tokens=True)
    return sum(text == row["target"] for text, row in zip(answers, rows, strict=True)) / len(rows)


def make(folder: Path, steps: int = STEPS) -> dict[str, float]:
    """Write the T5 and the rows to ``folder``; gives the share of exact answers on what it was pretrained for, on 200
    rows kept back, and on 200 rows of the third style."""
    rows = pretraining_rows(PAIRS)
    tokenizer = train_tokenizer(rows)
    torch.manual_seed(0)
    model = network(tokenizer)
    pretrain(model, tokenizer, rows[200:], steps)
    model.save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    parts = rows_of_the_third_style()
    for part, those in parts.items():
        write_jsonl(folder / f"{part}.jsonl", those)
    tests = {"iso and us": rows[:200], "the third style": parts["test"][:200]}
    return {name: exact(model, tokenizer, those) for name, those in tests.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=MADE, metavar="FOLDER", help="where to write (default: %(default)s)")
    said = parser.parse_args()
    for name, share in make(said.to).items():
        print(f"{said.to / 't5'}: {share:.0%} of 200 rows of {name} exact")
    print(f"{said.to}: PART.jsonl, with PART one of {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
