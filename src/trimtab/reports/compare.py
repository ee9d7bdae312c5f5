"""A study as a table for the terminal and as one page that needs no network, from its ``results.json`` alone."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.config.yaml_text import write_yaml
from trimtab.files import read_json, write_text
from trimtab.reports import words
from trimtab.reports.compare_plots import baseline, draw_costs, draw_differences, draw_scores, panel_name, panels
from trimtab.reports.html_table import html_table
from trimtab.reports.pictures import page, write_picture


def study_tables(results: Mapping[str, Any]) -> list[Table]:
    """For the terminal: a table for each test set."""
    tables = []
    for (task, test), lines in panels(results).items():
        columns = _columns(lines, _reference(results))
        for head in ("rate", "runs", "macro F1"):  # on the page; a terminal has not the width
            columns.pop(head, None)
        title = f"{panel_name(task, test)}, {words.count(lines[0]['rows'])} rows"
        table = Table(
            box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left"
        )
        longest = max(len(word) for arm in columns["arm"] for word in arm.split())
        for head in columns:
            if head == "arm":
                table.add_column(head, min_width=longest)
            else:  # wide headings in two lines, so that names have room
                table.add_column(head.replace("above ", "above\n"), justify="right", no_wrap=True)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        tables.append(table)
    return tables


def findings(results: Mapping[str, Any]) -> list[str]:
    """What may be said: a sentence for each difference that the test holds up, and what it leaves open."""
    said = []
    for (task, test), lines in panels(results).items():
        place = panel_name(task, test)
        near: list[str] = []
        unknown: list[str] = []
        for line in lines:
            if (found := line["difference"]) is None:
                continue
            if found["p_holm"] < 0.05:
                side = "above" if found["mean"] > 0 else "below"
                said.append(
                    f"{place}: {line['arm']} is {100 * abs(found['mean']):.1f} points {side} {line['against']} "
                    f"(95 % interval {_ends(found)}; p {_p(found['p_holm'], '= ')} after correction)."
                )
            else:
                beside_zero = found["low"] > 0 or found["high"] < 0
                (near if beside_zero else unknown).append(f"{_pair(line, results)} ({_ends(found)})")
        if near:
            said.append(
                f"{place}: for {', '.join(near)} the interval of the difference leaves zero out, but among so many "
                "comparisons that may be chance."
            )
        if unknown:
            said.append(
                f"{place}: no difference from {_reference(results)} can be told for {', '.join(unknown)}. In brackets: "
                "what remains possible, in points."
            )
    return said


def _pair(line: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The arm, and what it is compared with where that is not the same for all."""
    return line["arm"] if len(_others(results)) == 1 else f"{line['arm']} against {line['against']}"


def _reference(results: Mapping[str, Any]) -> str:
    others = _others(results)
    return others[0] if len(others) == 1 else "its own reference"


def _others(results: Mapping[str, Any]) -> list[str]:
    """The arms that others are compared with."""
    return list(dict.fromkeys(line["against"] for line in results["summary"] if line["difference"] is not None))


def write_study_page(folder: Path) -> Path:
    """Write ``results.html`` and its pictures (PNG and SVG) beside the ``results.json`` in ``folder``."""
    results = read_json(folder / "results.json")
    write_text(folder / "results.html", _page(results, folder))
    return folder / "results.html"


def _page(results: Mapping[str, Any], folder: Path) -> str:
    title = html.escape(results["title"])
    body = f"""<h1>{title}</h1>
<p class="about">{html.escape(results["question"])}</p>
{"".join(_sections(results, folder))}"""
    return page(
        results["title"],
        body,
        "\n.picture { margin: 1rem 0; } li { margin-bottom: .4rem; } section p + p { margin-top: .6rem; }",
    )


def _sections(results: Mapping[str, Any], folder: Path) -> Iterable[str]:
    if results["missing"] or results["failed"]:
        yield _unfinished(results)
    if results["runs"]:
        said = "".join(f"<li>{html.escape(one)}</li>" for one in findings(results))
        yield _section(
            "What was found",
            f"<ul>{said}</ul>",
            write_picture(draw_scores(results), folder, "scores", "Score of each arm over its trained parameters"),
            _fine(
                "A mark is the mean over runs with different seeds, the diamond the reference; the line is Student's "
                "95 % interval of that mean; that of a share is cut at 0 and 100 %. Points of like size are set a "
                "little apart."
            ),
        )
        if (differences := draw_differences(results)) is not None:
            yield _section(
                f"Against {_reference(results)}",
                write_picture(differences, folder, "differences", "Difference of each arm from the reference"),
                _fine("Filled where p is below 0.05 after correction. The line is the 95 % interval, not corrected."),
            )
        yield _section(
            "Time and memory",
            write_picture(draw_costs(results), folder, "costs", "Training time and peak memory of each arm"),
            _fine(
                "A ring is a run, the bar their mean. Each run is a process of its own; its peak is of resident memory "
                "and includes the evaluation."
            ),
        )
        for (task, test), lines in panels(results).items():
            columns = _columns(lines, _reference(results))
            blind = baseline(lines[0])
            told = "" if blind is None else f" {blind[0]} alone gives {words.percent(blind[1])}."
            yield _section(
                panel_name(task, test),
                html_table(list(columns), list(zip(*columns.values(), strict=True))),
                _fine(f"{words.count(lines[0]['rows'])} test rows.{told} Intervals of 95 %; p after correction."),
            )
    if results["searches"]:
        yield _searches(results)
    if results["machines"]:
        yield _method(results)
    yield _section("The study", f"<pre>{html.escape(write_yaml(results['said']))}</pre>")


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def _fine(text: str) -> str:
    return f'<p class="fine">{html.escape(text)}</p>'


def _unfinished(results: Mapping[str, Any]) -> str:
    missing, failed = results["missing"], results["failed"]
    done = len(results["runs"]) + len(results["searches"])
    lines = "".join(f"<li>{html.escape(_name(one))}: {html.escape(one['reason'])}</li>" for one in failed)
    told = f"<p><strong>Not finished: {done} of {done + len(missing)} runs are done.</strong></p>"
    return f'<div class="notice">{told}{f"<p>Failed:</p><ul>{lines}</ul>" if failed else ""}</div>'


def _name(run: Mapping[str, Any]) -> str:
    return f"{run['arm']} on {run['task']}, " + ("search" if run["searching"] else f"seed {run['seed']}")


def _columns(lines: Sequence[Mapping[str, Any]], reference: str) -> dict[str, list[str]]:
    """Heading -> a cell for each line; columns that would be empty are left out."""
    rows = [_cells(line, reference) for line in lines]
    columns = {head: [row[head] for row in rows] for head in rows[0]}
    return {head: cells for head, cells in columns.items() if any(cells)}


def _cells(line: Mapping[str, Any], reference: str) -> dict[str, str]:
    costs, found, rate = line["costs"], line["difference"], line["learning_rate"]
    return {
        "arm": line["arm"],
        "trained": words.parameters(costs["trainable_parameters"]["mean"]),
        "rate": words.DASH if rate is None else f"{rate:g}",
        "runs": str(line["n"]),
        line["measure"].replace("_", " "): _spread_of(line, 1 if line["measure"] == "perplexity" else 100),
        "macro F1": _spread_of(line["macro_f1"], 100) if line["macro_f1"] else "",
        f"above {reference}": f"{words.signed(100 * found['mean'], 1)} ({_ends(found)})" if found else "",
        "p": _p(found["p_holm"]) if found else "",
        "time": words.duration(costs["training_seconds"]["mean"]),
        "memory": f"{costs['peak_memory_gib']['mean']:.2f} GiB",
    }


def _spread_of(found: Mapping[str, Any], scale: float) -> str:
    """``81.2 ± 1.3``: the mean and half its interval; the mean alone of one run."""
    mean = f"{scale * found['mean']:.1f}"
    return mean if found["low"] is None else f"{mean} ± {scale * (found['high'] - found['mean']):.1f}"


def _ends(found: Mapping[str, Any]) -> str:
    return f"{words.signed(100 * found['low'], 1)} to {words.signed(100 * found['high'], 1)}"


def _p(p: float, equals: str = "") -> str:
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}" if p < 0.1 else f"{equals}{p:.2f}"


def _searches(results: Mapping[str, Any]) -> str:
    """The learning rates that were tried; the one that was taken is marked, and it is said where that is at an end."""
    rows, ends = [], []
    by_arm: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in results["searches"]:
        by_arm.setdefault((run["task"], run["arm"]), []).append(run)
    for (task, arm), runs in by_arm.items():
        tried = sorted(runs, key=lambda run: run["learning_rate"])
        cells = []
        for run in tried:
            found = run["validation"]
            score = words.percent(found["accuracy"]) + ", " if "accuracy" in found else ""
            cells.append(f"{'→ ' if run['taken'] else ''}{run['learning_rate']:g}: {score}loss {found['loss']:.3f}")
        name = arm if len(results["said"]["tasks"]) == 1 else f"{arm} on {task}"
        rows.append([name, "; ".join(cells)])
        if len(tried) > 1 and (tried[0]["taken"] or tried[-1]["taken"]):
            ends.append(name)
    told = (
        f"The rate taken is the lowest or the highest tried for {', '.join(ends)}: a better one may lie beyond."
        if ends
        else ""
    )
    return _section(
        "Learning rates tried",
        html_table(["arm", "rate: result on validation rows"], rows, words=range(2)),
        _fine(
            f"As many for every arm, by runs of seed {results['search']['seed']} that saw no test row; → is the one "
            f"taken. {told}"
        ),
    )


def _method(results: Mapping[str, Any]) -> str:
    cells = [*results["runs"], *results["searches"]]
    seconds = sum(run["total_seconds"] for run in cells)
    machines = "; ".join(
        f"{one['processor']}, {one['cores']} cores, {one['memory_gib']} GiB, "
        f"torch {one['versions']['torch']}, trimtab {one['versions']['trimtab']}"
        for one in results["machines"]
    )
    precision = ", ".join(dict.fromkeys(run["precision"] for run in cells))
    sentences = (
        f"Seeds {', '.join(map(str, results['seeds']))}: each decides initial values, order of rows and dropout, the "
        "same for every arm. A score's interval is Student's t over seeds: how runs differ on these test rows.",
        "An arm and the reference are compared row by row and seed by seed: the mean of the paired differences, its "
        "variance the sum of that over rows and that over seeds, Student's t with Satterthwaite's degrees of freedom; "
        "with one seed McNemar's exact test, which speaks of these runs alone. The p values are corrected for all "
        "comparisons on this page (Holm).",
        f"{len(cells)} runs took {words.duration(seconds)} together, loading and evaluation included, in {precision} "
        f"on {machines}.",
        f"Made by: trimtab compare {results['file']}",
    )
    return _section("How it was done", *(f"<p>{html.escape(one)}</p>" for one in sentences))
