"""``results.html``: a study as one page that needs no network, from its ``results.json`` alone."""

from __future__ import annotations

from pathlib import Path

from trimtab.config.yaml_text import write_yaml
from trimtab.hints import pasted
from trimtab.metrics import first_in
from trimtab.reports.shared import words
from trimtab.reports.shared.figures import write_picture
from trimtab.reports.shared.shell import write_page
from trimtab.reports.study.comparison import baseline, columns, findings, panel_name, panels, reference_of
from trimtab.reports.study.study_pictures import draw_costs, draw_differences, draw_scores
from trimtab.runs.read import read_study_results
from trimtab.runs.study_records import RunFacts, StudyResults, TriedRate


def write_study_page(folder: Path) -> Path:
    """Write ``results.html`` and its pictures (PNG and SVG) beside the ``results.json`` in ``folder``."""
    results = read_study_results(folder)
    pictures = {}
    if results.runs:
        for name, draw, label in (
            ("scores", draw_scores, "Score of each arm over its trained parameters"),
            ("differences", draw_differences, "Difference of each arm from the reference"),
            ("costs", draw_costs, "Training time and peak memory of each arm"),
        ):
            if (figure := draw(results)) is not None:
                pictures[name] = write_picture(figure, folder, name, label)
    cells: list[RunFacts] = [*results.runs, *results.searches]
    values = {
        "results": results,
        "command": pasted("compare", results.file),
        "pictures": pictures,
        "findings": findings(results),
        "reference": reference_of(results),
        "tables": [
            (panel_name(task, test), columns(lines, reference_of(results)), lines[0].rows, baseline(lines[0]))
            for (task, test), lines in panels(results).items()
        ],
        "rates": _rates(results),
        "found_rates": _finds_rates(results),
        "cells": cells,
        "precisions": list(dict.fromkeys(run.precision for run in cells)),
        "seconds": sum(run.total_seconds for run in cells),
        "yaml": write_yaml(results.said),
    }
    return write_page(folder / "results.html", "study/study.html", values)


def _finds_rates(results: StudyResults) -> bool:
    """Whether runs of the study find their own learning rates."""
    said = results.said
    sections = (said["base"], *said["tasks"].values(), *said["arms"].values())
    return any((section.get("train") or {}).get("learning_rate") == "auto" for section in sections)


def _rates(results: StudyResults) -> tuple[list[list[str]], list[str]]:
    """The learning rates that were tried, a row for each arm, the one that was taken marked; and the arms for which
    that is the lowest or the highest."""
    by_arm: dict[tuple[str, str], list[TriedRate]] = {}
    for run in results.searches:
        by_arm.setdefault((run.task, run.arm), []).append(run)
    rows, at_end = [], []
    for (task, arm), runs in by_arm.items():
        tried = sorted(runs, key=lambda run: run.learning_rate)
        name = arm if len(results.said["tasks"]) == 1 else f"{arm} on {task}"
        rows.append([name, "; ".join(map(_tried, tried))])
        if len(tried) > 1 and (tried[0].taken or tried[-1].taken):
            at_end.append(name)
    return rows, at_end


def _tried(run: TriedRate) -> str:
    measured = run.validation
    scored = first_in(measured.figures)
    score = ""
    if scored is not None:  # a share needs no name: it is that of the tables above
        name = "" if scored.share else f"{scored.label} "
        score = f"{name}{words.figure(scored, measured.figures[scored.name])}, "
    return f"{'→ ' if run.taken else ''}{run.learning_rate:g}: {score}loss {words.number(measured.loss)}"
