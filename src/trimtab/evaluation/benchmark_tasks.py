"""Named tasks of a benchmark: which rows, which labels, how a written answer is read, which figures count.

    task = find_task("finlora/headline")
    evaluate_task(task, Head(model), tokenizer, read_examples("headline_test.jsonl", tokenizer, root=Path.cwd()))

The prompt is the row's context as it stands, for every method and for the untuned model. Labels of a closed set are
scored by their log-likelihood, or generated and read if that is asked for; all other answers are generated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from trimtab.data.rows import Example
from trimtab.errors import ConfigError, did_you_mean
from trimtab.evaluation import answers
from trimtab.evaluation.evaluate import Evaluation, evaluate
from trimtab.metrics import measure
from trimtab.models.causal_head import Head
from trimtab.outcomes import Outcomes
from trimtab.runs.results import Prediction, QuestionScore


@dataclass(frozen=True)
class BenchmarkTask:
    """What one task asks for.

    Attributes:
        name: its name on the command line.
        file: the benchmark's name for the file of its test rows.
        answers: one label of a closed set; several, separated by commas; a number; a formula; or an explanation.
        choices: the labels; if empty, those that occur in the rows.
        max_new_tokens: longest written answer.
        question: where rows ask different things, a pattern whose first group in the prompt is the question.
        permuted: if a file has its labels permuted, how to read each.
        commonest: the most frequent label of a file that is not permuted.
    """

    name: str
    file: str
    answers: Literal["label", "labels", "number", "formula", "text"] = "label"
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 16
    question: str | None = None
    permuted: Mapping[str, str] = field(default_factory=dict)
    commonest: str | None = None

    @property
    def dataset(self) -> str:
        """The name under which results are stored: the task's without the benchmark's."""
        return self.name.rpartition("/")[2]


_SENTIMENT = ("negative", "neutral", "positive")

# FinLoRA's test sets. TFNS stores 0, 1, 2 for bearish, bullish, neutral; its script reads them as negative, neutral,
# positive. Two of three tweets are neutral, so a file where most are positive was made by it.
FINLORA = (
    BenchmarkTask("finlora/fpb", "fpb_test.jsonl", choices=_SENTIMENT),
    BenchmarkTask("finlora/fiqa", "fiqa_test.jsonl", choices=_SENTIMENT),
    BenchmarkTask(
        "finlora/tfns",
        "tfns_test.jsonl",
        choices=_SENTIMENT,
        permuted={"neutral": "positive", "positive": "neutral"},
        commonest="neutral",
    ),
    BenchmarkTask("finlora/nwgi", "nwgi_test.jsonl"),
    BenchmarkTask(
        "finlora/headline",
        "headline_test.jsonl",
        choices=("No", "Yes"),
        question=r"(?s)Instruction:\s*(.*?)\s*(?:Please choose|\nInput:)",
    ),
    BenchmarkTask("finlora/ner", "ner_test.jsonl", choices=("location", "organization", "person")),
    BenchmarkTask("finlora/finer", "finer_test_batched.jsonl", "labels", max_new_tokens=256),
    BenchmarkTask("finlora/fnxl", "fnxl_test_batched.jsonl", "labels", max_new_tokens=256),
    BenchmarkTask("finlora/xbrl_tags", "xbrl_extract_tags_test.jsonl", max_new_tokens=64),
    BenchmarkTask("finlora/xbrl_value", "xbrl_extract_value_test.jsonl", "number", max_new_tokens=32),
    BenchmarkTask("finlora/xbrl_formula", "xbrl_extract_formula_test.jsonl", "formula", max_new_tokens=128),
    BenchmarkTask(
        "finlora/xbrl_formula_calc", "xbrl_extract_formula_calculations_test.jsonl", "formula", max_new_tokens=96
    ),
    BenchmarkTask("finlora/formula", "formula_test.jsonl", "number", max_new_tokens=32),
    BenchmarkTask("finlora/xbrl_term", "xbrl_term_test.jsonl", "text", max_new_tokens=96),
    BenchmarkTask("finlora/financebench", "financebench_test.jsonl", "text", max_new_tokens=96),
    *(
        BenchmarkTask(f"finlora/{exam}", f"{exam}_test.jsonl")
        for exam in ("cfa_level1", "cfa_level2", "cfa_level3", "cpa_reg")
    ),
)

TASKS = {task.name: task for task in FINLORA}


def find_task(name: str) -> BenchmarkTask:
    """The task of that name. Raises ConfigError, which names the nearest, if there is none."""
    if name not in TASKS:
        raise ConfigError(f"no task '{name}'.{did_you_mean(name, TASKS)} The tasks: {', '.join(TASKS)}.")
    return TASKS[name]


def evaluate_task(
    task: BenchmarkTask,
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    generate: bool = False,
    choices: Sequence[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure the model of ``head`` on the rows of ``task``.

    Args:
        task: what they ask for.
        head: as for ``evaluate``, and so are ``tokenizer`` and ``settings`` (``batch_size``, ``progress``, ...).
        tokenizer: the model's.
        examples: all rows of the task's file.
        generate: let the model write its label, and do not score each.
        choices: the labels, in place of the task's.
        limit: measure only so many of the rows; the labels are still taken from all.
        max_new_tokens: in place of the task's.

    The result also has ``task``; ``answered_by``, generation or likelihood; if rows ask different things, figures for
    each of the ``questions`` and their ``mean_weighted_f1``; and ``relabelled``, if the file's labels were permuted.

    Raises DataError if a row's answer is not among the labels, and what ``evaluate`` raises.
    """
    relabelled = _relabelling(task, examples)
    if relabelled:
        answers_read = [relabelled.get(str(row.answer), str(row.answer)) for row in examples]
        examples = [row.with_answer(read, ends=row.ends) for row, read in zip(examples, answers_read, strict=True)]
    labels = list(choices or task.choices or _labels_in(task, examples))
    judges: dict[str, answers.Judge] = {
        "label": answers.exact,  # not used, since `evaluate` reads the labels of a closed set itself
        "labels": partial(answers.labels, known=labels, several=True),
        "number": answers.numbers,
        "formula": answers.formulas,
        "text": answers.texts,
    }
    scored = task.answers == "label" and not generate
    measured = evaluate(
        head,
        tokenizer,
        examples[:limit],
        name=task.dataset,
        choices=labels if task.answers == "label" else None,
        generate=generate,
        judge=judges[task.answers],
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        **settings,
    )
    more: dict[str, Any] = {"task": task.name, "answered_by": "likelihood" if scored else "generation"}
    if relabelled:
        more["relabelled"] = relabelled
    if task.question is not None and task.answers == "label":
        more["questions"] = questions = _by_question(task.question, measured.rows, labels)
        mean = sum(question.figures["weighted_f1"] or 0.0 for question in questions) / len(questions)
        more["figures"] = {**measured.record.figures, "mean_weighted_f1": mean}
    return replace(measured, record=measured.record.updated(**more))


def _labels_in(task: BenchmarkTask, examples: Sequence[Example]) -> list[str]:
    """Every label that is a true answer of some row."""
    texts = [example.answer for example in examples if example.answer is not None]
    return sorted({label for text in texts for label in (answers.parts(text) if task.answers == "labels" else [text])})


def _relabelling(task: BenchmarkTask, examples: Sequence[Example]) -> dict[str, str]:
    """How to read the labels of ``examples`` if they are permuted; else empty."""
    if len(examples) < 100:  # too few to tell by their commonest label
        return {}
    ((commonest, _),) = Counter(example.answer for example in examples).most_common(1)
    return dict(task.permuted) if task.permuted.get(str(commonest)) == task.commonest else {}


def _by_question(pattern: str, predictions: Sequence[Prediction], labels: Sequence[str]) -> list[QuestionScore]:
    """The figures of each question that the prompts ask."""
    groups: dict[str, list[Prediction]] = {}
    for row in predictions:
        match = re.search(pattern, row.prompt)
        groups.setdefault(match[1] if match else "", []).append(row)
    scores = []
    for question, rows in groups.items():
        # What was written is read as a label; what was scored is one already.
        said = [str(row.read_as if "read_as" in row.model_fields_set else row.predicted) for row in rows]
        outcomes = Outcomes(truth=[row.answer for row in rows], predicted=said, choices=labels)
        scores.append(QuestionScore(question=question, rows=len(rows), figures={**measure("choice", outcomes)}))
    return scores
