"""What ``explore.json`` says, in words, in order and as a table: shared by the terminal, the page and the pictures."""

from __future__ import annotations

from rich.table import Table

from trimtab.metrics import Metric
from trimtab.reports.shared import words
from trimtab.runs.study_records import PlanPart, SearchResults, Trial


def part_words(part: PlanPart) -> str:
    """``mora 9``, or ``none``."""
    return f"{part.method} {part.rank}" if part.rank else str(part.method)


def plan_words(row: Trial) -> str:
    """``mora 9, dora 7, none, lora 8``: the parts of a plan in the order of the groups; a uniform plan in one."""
    parts = [part_words(part) for part in row.parts]
    return parts[0] if row.kind == "uniform" else ", ".join(parts)


def score_words(metric: Metric, value: float | None) -> str:
    """A share in percent, a loss as a number."""
    if value is None:
        return words.DASH
    return words.percent(value) if metric.share else f"{value:.4f}"


def confirmation_words(search: SearchResults) -> str:
    """Mixed minus uniform over the new seeds, in one sentence."""
    confirmation = search.confirmation
    assert confirmation is not None, "only a search that was confirmed has words for it"
    metric = search.improved

    def points(value: float) -> str:
        return words.signed(metric.scale * value, 1 if metric.share else 4)

    span, verdict = "(one seed has no interval)", "no difference is shown"
    if confirmation.ends is not None:
        low, high = confirmation.ends
        span = f"(95 % interval over seeds {points(low)} to {points(high)})"
        if low * high > 0:
            verdict = f"{'mixed' if metric.cost(confirmation.difference) < 0 else 'uniform'} is better"
    count, unit = len(confirmation.rows), " points" if metric.share else ""
    return (
        f"best mixed minus best uniform, {metric.label} on {', '.join(confirmation.on)}, "
        f"{count} new seed{'s' if count > 1 else ''}: {points(confirmation.difference)}{unit} {span}; {verdict}"
    )


def own_runs(search: SearchResults) -> list[Trial]:
    """The trials that took a run, in order."""
    return [row for row in search.trials if row.same_as is None]


def by_score(search: SearchResults, kind: str) -> list[Trial]:
    """The runs of one kind (``mixed`` or ``uniform``) that came to their end, the best first."""
    metric = search.improved
    done = [row for row in own_runs(search) if row.kind == kind and row.state == "complete"]
    return sorted(done, key=lambda row: (metric.cost(row.scored), row.number))


def best_uniform_runs(search: SearchResults) -> list[Trial]:
    """The best run of each uniform method, the best first."""
    best: dict[str, Trial] = {}
    for row in by_score(search, "uniform"):
        best.setdefault(row.parts[0].method, row)
    return list(best.values())


def best_quarter(search: SearchResults) -> list[Trial]:
    """The best quarter (three at least) of the mixed plans that came to their end; empty where there are fewer."""
    done = by_score(search, "mixed")
    return done[: max(3, len(done) // 4)] if len(done) >= 3 else []


def heads(search: SearchResults) -> list[str]:
    """The columns of the table of runs; the rate is named only where several were tried."""
    rate = ["rate"] * (len(search.learning_rates) > 1)
    return ["run", *(group.name for group in search.groups), "parameters", *rate, search.metric, "state"]


def ranked_cells(search: SearchResults) -> list[tuple[Trial, list[str]]]:
    """Every run with its cells in that table: the best first, then the pruned and the failed ones."""
    order = {row.number: place for place, row in enumerate(own_runs(search), 1)}

    def rank(row: Trial) -> tuple[int, float]:
        cost = 0.0 if row.score is None else search.improved.cost(row.score)
        return ("complete", "pruned", "failed").index(row.state), cost

    lines = []
    for row in sorted(own_runs(search), key=rank):
        rate = [f"{row.learning_rate:g}"] if len(search.learning_rates) > 1 else []  # the one may be "auto"
        state = row.state if row.state != "complete" else "uniform" if row.kind == "uniform" else ""
        cells = [str(order[row.number]), *map(part_words, row.parts), words.count(row.parameters), *rate]
        lines.append((row, [*cells, score_words(search.improved, row.score), state]))
    return lines


def trials_table(search: SearchResults) -> Table:
    """The table of runs for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = heads(search)
    for place, head in enumerate(columns):
        is_text = 0 < place <= len(search.groups) or place == len(columns) - 1
        table.add_column(head, justify="left" if is_text else "right", no_wrap=not is_text)
    for row, cells in ranked_cells(search):
        table.add_row(*cells, style="bold" if row.number == search.best else "")
    return table
