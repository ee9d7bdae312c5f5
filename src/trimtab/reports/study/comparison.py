"""What a study's ``results.json`` says, in words and in tables: shared by the terminal, the page and the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from trimtab.metrics import Metric, compared
from trimtab.reports.shared import words
from trimtab.runs.study_records import CorrectedDifference, MeanInterval, StudyResults, SummaryLine


def panels(results: StudyResults) -> dict[tuple[str, str], list[SummaryLine]]:
    """(task, test set) -> the lines of its summary."""
    lines: dict[tuple[str, str], list[SummaryLine]] = {}
    for line in results.summary:
        lines.setdefault((line.task, line.test), []).append(line)
    return lines


def panel_name(task: str, test: str) -> str:
    """``finance: fpb``, or the test set alone where the task has no name of its own."""
    return test if task in ("all", test) else f"{task}: {test}"


def baseline(line: SummaryLine) -> tuple[str, float] | None:
    """What answers without a look at the rows reach: who gives them, and the share that is right."""
    known = (("The commonest answer", line.majority), ("Guessing", line.chance))
    return next(((name, share) for name, share in known if share is not None), None)


def score_of(line: SummaryLine, value: float) -> str:
    """A score as it is named beside its mark."""
    return words.figure(line.metric, value)


def reference_of(results: StudyResults) -> str:
    """The arm that all others are compared with; in a study of pairs each has its own."""
    others = _references(results)
    return others[0] if len(others) == 1 else "its own reference"


def _references(results: StudyResults) -> list[str]:
    return list(dict.fromkeys(line.against for line in results.summary if line.against and line.difference))


def findings(results: StudyResults) -> list[str]:
    """What may be said: a sentence for each difference that the test holds up, what it leaves open, and what speaks
    against a comparison."""
    sentences = []
    one_reference = len(_references(results)) == 1
    for (task, test), lines in panels(results).items():
        place = panel_name(task, test)
        near: list[str] = []
        few: list[str] = []
        unknown: list[str] = []
        for line in lines:
            if (difference := line.difference) is None:
                continue
            if difference.p_holm < 0.05:
                side = "above" if difference.mean > 0 else "below"
                far = _told(line, difference)[0].lstrip("+−")
                away = f"{far} points {side} {line.against}"
                if not line.metric.share:
                    away = f"{far} {side} {line.against} in {line.metric.label}"
                sentences.append(
                    f"{place}: {line.arm} is {away} (95 % interval {_ends(line, difference)}; "
                    f"p {_p(difference.p_holm, '= ')} after correction)."
                )
                continue
            compared = line.arm if one_reference else f"{line.arm} against {line.against}"
            beside_zero = difference.low > 0 or difference.high < 0
            among = (near if difference.p < 0.05 else few) if beside_zero else unknown
            among.append(f"{compared} ({_ends(line, difference)})")
        if near:
            sentences.append(
                f"{place}: for {', '.join(near)} the interval of the difference leaves zero out, but among so many "
                "comparisons that may be chance."
            )
        if few:
            sentences.append(
                f"{place}: for {', '.join(few)} the interval of the difference leaves zero out, but the exact test of "
                "the rows that differ does not tell it from chance: they are too few."
            )
        if unknown:
            counted = "points" if lines[0].metric.share else lines[0].metric.label
            sentences.append(
                f"{place}: no difference from {reference_of(results)} can be told for {', '.join(unknown)}. In "
                f"brackets: what remains possible, in {counted}."
            )
    return [*sentences, *results.doubts]


def columns(lines: Sequence[SummaryLine], reference: str) -> dict[str, list[str]]:
    """The table of one test set: heading -> a cell for each line. Columns that would be empty are left out."""
    rows = [_cells(line, reference) for line in lines]
    table = {head: [row[head] for row in rows] for head in rows[0]}
    return {head: cells for head, cells in table.items() if any(cells)}


def _cells(line: SummaryLine, reference: str) -> dict[str, str]:
    costs, difference, rate = line.costs, line.difference, line.learning_rate
    above = f"{_told(line, difference)[0]} ({_ends(line, difference)})" if difference else ""
    return {
        "arm": line.arm,
        "trained": words.parameters(costs.trainable_parameters.mean),
        "rate": words.DASH if rate is None else f"{rate:g}",
        "runs": str(line.n),
        line.metric.label: _with_interval(line.metric, line),
        **{
            metric.label: _with_interval(metric, line.figures.get(metric.name))
            for metric in compared()
            if metric is not line.metric
        },
        f"above {reference}": above,
        "p": _p(difference.p_holm) if difference else "",
        "time": words.duration(costs.training_seconds.mean),
        "memory": words.gib(costs.peak_memory_gib.mean),
    }


def _with_interval(metric: Metric, known: MeanInterval | None) -> str:
    """``81.2 ± 1.3``: the mean and half its interval; the mean alone of one run; empty without one."""
    if known is None:
        return ""
    text = words.figure(metric, known.mean).removesuffix(" %")
    if known.ends is None:
        return text
    form = "{:.1f}" if metric.share else words.form_of(known.mean)
    return f"{text} ± {form.format(metric.scale * (known.ends[1] - known.mean))}"


def _told(line: SummaryLine, difference: CorrectedDifference) -> list[str]:
    """The mean of a difference and both ends of its interval, with the digits of the largest."""
    known = (difference.mean, difference.low, difference.high)
    if line.metric.share:
        return [words.change(line.metric, value) for value in known]
    form = words.form_of(max(map(abs, known)))
    texts = [form.format(abs(value)) for value in known]
    return [
        ("−" if value < 0 else "+") * bool(text.strip("0.,")) + text for value, text in zip(known, texts, strict=True)
    ]


def _ends(line: SummaryLine, difference: CorrectedDifference) -> str:
    return " to ".join(_told(line, difference)[1:])


def _p(p: float, equals: str = "") -> str:
    if p < 0.001:
        return "< 0.001"
    if 0.0495 <= p < 0.05:  # it would read as 0.050, though it is told as a difference
        return "< 0.05"
    return f"{equals}{p:.3f}" if p < 0.1 else f"{equals}{p:.2f}"


def study_tables(results: StudyResults) -> list[Table]:
    """For the terminal: a table for each test set."""
    tables = []
    for (task, test), lines in panels(results).items():
        cells = columns(lines, reference_of(results))
        beside = [metric.label for metric in compared() if metric.name in lines[0].figures]
        for head in ("rate", "runs", *beside):  # on the page; a terminal has not the width
            cells.pop(head, None)
        title = f"{panel_name(task, test)}, {words.counted(lines[0].rows, 'row')}"
        table = Table(
            box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left"
        )
        longest = max(len(word) for arm in cells["arm"] for word in arm.split())
        for head in cells:
            if head == "arm":
                table.add_column(head, min_width=longest)
            else:  # wide headings in two lines, so that names have room
                table.add_column(head.replace("above ", "above\n"), justify="right", no_wrap=True)
        for row in zip(*cells.values(), strict=True):
            table.add_row(*row)
        tables.append(table)
    return tables
