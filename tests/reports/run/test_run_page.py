"""The page: what it says, what it leaves out, and that nothing from data acts in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trimtab.errors import RunError
from trimtab.reports.run.run_page import write_run_page
from trimtab.runs.rate_record import ChosenRate, RateTrial

_VOID = {"meta", "br", "hr", "img", "link", "input"}
# Elements that begin a new piece of text for a reader.
_BLOCKS = {"p", "div", "li", "dt", "dd", "th", "td", "small", "h1", "h2", "h3", "h4", "pre", "summary", "time"}


class Page(HTMLParser):
    """The elements of a page: checks that tags are balanced and collects ids, references and text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)
        if tag in _BLOCKS:
            self.words.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader sees, with every run of spaces as one."""
        return " ".join("".join(self.words).split())

    def all(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def page(run: Path) -> Page:
    return Page(write_run_page(run).read_text(encoding="utf-8"))


def test_the_page_says_what_the_run_was_worth(run: Path) -> None:
    target = write_run_page(run)
    assert target == run / "report.html"
    text = Page(target.read_text(encoding="utf-8")).text
    assert "kind: 33.3 % before, 66.7 % after; always answering 'no' would give 50.0 %" in text
    for wanted in (
        "tiny-model",
        "dora + mora",
        "4 March 2025, 05:06 UTC",
        "Trained parameters 700 3.50 % of 20,000",
        "123 kB",
        "1 min 15 s",
        "1.2 GiB",
        "of 7.5 GiB",
        "1,020",  # the median of 1001 ... 1040 tokens per second, rounded to even
        "2 epochs of 320 rows",
        "An Honest Processor",
        "seed: 7",
    ):
        assert wanted in text, wanted


def test_measures_before_after_and_change(run: Path) -> None:
    source = page(run).source
    row = r'<th scope="row">{}</th><td>{}</td><td><strong>{}</strong></td><td>{}</td>'
    assert row.format("Accuracy", "33.3 %", "66.7 %", "+33.3") in source
    assert row.format("Macro F1", "25.0 %", "62.5 %", "+37.5") in source
    assert row.format("Perplexity of the true answers", "4.000", "2.000", "−50.0 %") in source


def test_the_confusion_table_is_shaded_by_the_share_of_the_row(run: Path) -> None:
    cells = re.findall(
        r'<td class="(right|wrong)" style="--share: ([\d.]+)">(\d+)<small>(\d+) %</small>', page(run).source
    )
    after, before = cells[:4], cells[4:]
    assert after == [
        ("right", "0.333", "1", "33"),
        ("wrong", "0.667", "2", "67"),
        ("wrong", "0.000", "0", "0"),
        ("right", "1.000", "3", "100"),
    ]
    assert before == [
        ("right", "0.667", "2", "67"),
        ("wrong", "0.333", "1", "33"),
        ("wrong", "1.000", "3", "100"),
        ("right", "0.000", "0", "0"),
    ]


def test_the_plan_by_rule_and_by_module(run: Path) -> None:
    text = page(run).text
    assert "rank 4" in text
    assert "alpha 8" in text
    assert "detach_norm on" in text
    assert "*.v_proj *.o_proj" in text
    assert "layers.0.v_proj" in text
    assert "3.00 %" in text
    assert "0.50 %" in text


def test_answers_carry_a_sign_and_not_only_a_colour(run: Path) -> None:
    text = page(run).text
    assert "row 1 A warm little film true yes before ✗ no after ✓ yes" in text
    assert "row 4 It has an ending true no before ✓ no after ✗ yes" in text
    assert "✗→✓ 3 wrong before, right now 50.0 %" in text
    assert "Is the review kind?" in text  # once, as the example
    assert text.count("Is the review kind?") == 1


def test_pictures_are_described_and_take_their_colours_from_the_page(run: Path) -> None:
    found = page(run)
    pictures = re.findall(r"<svg.*?</svg>", found.source, re.DOTALL)
    assert len(pictures) == 3  # one test set, and the curves for a wide and a narrow screen
    for picture in pictures:
        assert 'role="img"' in picture
        assert re.search(r'aria-label="[^"]{20,}"', picture)
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r"(url\(|href=\")#[\w-]+", "", picture))
        assert "<style" not in picture
    assert "commonest answer 50.0 %" in pictures[0]
    assert ">66.7 %<" in pictures[0]
    for text in (
        "loss (nats per token)",
        "validation accuracy (%)",
        "learning rate",
        "step",
        "kept: 0.500 at step 20",
        "epoch 1",
    ):
        assert f">{text}<" in pictures[1]
    assert "prefers-color-scheme: dark" in found.source
    assert "@media print" in found.source


def test_the_page_needs_nothing_but_itself(run: Path) -> None:
    found = page(run)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(found.tags)
    assert all(value.startswith("#") for name in ("href", "src", "xlink:href") for value in found.all(name))
    assert not re.search(r"url\((?!#)|@import|https?:", found.source)
    assert "default-src 'none'" in found.source
    ids = found.all("id")
    assert len(ids) == len(set(ids))
    # What is referred to is there.
    wanted = set(re.findall(r"url\(#([^)]+)\)", found.source)) | {value[1:] for value in found.all("href")}
    assert wanted | set(found.all("aria-labelledby")) <= set(ids)


def test_a_process_without_torch_writes_the_same_page(run: Path) -> None:
    write_run_page(run)
    here = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    code = """
import json, sys
from pathlib import Path
import trimtab.reports
import trimtab.reports.run.run_tables as tables
import trimtab.reports.search.search_words, trimtab.reports.study.comparison
run = Path(sys.argv[1])
assert "matplotlib" not in sys.modules, "tables wait for matplotlib"
from trimtab.runs.read import read_run
from trimtab.runs.records import PlanRecord
plan = PlanRecord.read(json.loads((run / "plan.json").read_text()))
tables.results_table(read_run(run)), tables.answers_table(read_run(run)), tables.plan_table(plan)
from trimtab.reports.run.run_page import write_run_page
from trimtab.runs.rate_record import ChosenRate, RateTrial
write_run_page(run)
assert "torch" not in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    seed = {"PYTHONHASHSEED": "1"}  # another order of every set than here
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, env={**os.environ, **seed})
    assert (run / "report.html").read_bytes() == here


EVIL = "<script>alert(1)</script>"


def test_text_from_data_is_only_text(run: Path) -> None:
    """Every string of every file is hostile, the names of the test set and of the run folder among them."""

    def poison(value):  # type: ignore[no-untyped-def]
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return value + EVIL + "'\"><b x=" if isinstance(value, str) else value

    for file in [run / "plan.json", *run.glob("evaluation/*.json")]:
        known = json.loads(file.read_text())
        bad = poison(known) | {key: known[key] for key in ("kind",) if key in known}
        if "per_class" in bad:
            bad["per_class"] = {key + EVIL: value for key, value in known["per_class"].items()}
        file.write_text(json.dumps(bad))
    summary = json.loads((run / "summary.json").read_text())
    for key in ("model", "precision", "versions", "machine"):
        summary[key] = poison(summary[key])
    summary["versions"][EVIL] = EVIL
    (run / "summary.json").write_text(json.dumps(summary))
    for file in run.glob("predictions/*.jsonl"):
        lines = [json.dumps(poison(json.loads(line))) for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines))
    (run / "config.yaml").write_text(f"a: {EVIL}\nb: </code></pre>{EVIL}")
    for file in [*run.glob("evaluation/*"), *run.glob("predictions/*")]:
        file.rename(file.with_name(file.name.replace("kind", "<b>&amp;")))
    evil = run.rename(run.with_name("run <b> & 'co'"))

    found = page(evil)
    assert "script" not in found.tags
    assert "b" not in found.tags
    assert "<b>&amp;: 33.3 % before" in found.text
    assert f"a: {EVIL} b: </code></pre>{EVIL}" in found.text
    assert found.text.count(EVIL) > 30
    assert "run <b> & '\"'\"'co'\"'\"''" in found.text  # quoted for a shell


def test_characters_that_cannot_be_written(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    lines = (run / "predictions" / "kind.after.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace("A warm little film", "A \\ud800 warm \\u0000 \\u001b[2J film")
    (run / "predictions" / "kind.after.jsonl").write_text("\n".join(lines))
    change("summary.json", model="tiny\x1b[2J")
    text = page(run).text
    assert r"A \ud800 warm \x00 \x1b[2J film" in text
    assert r"tiny\x1b[2J" in text


PARTS = {
    "config.yaml": "The whole configuration",
    "plan.json": "What was trained",
    "metrics.jsonl": "How it learned",
    "summary.json": "An Honest Processor",
    "evaluation": "Confusion table",
    "predictions": "Answers before and after",
    "adapter": "Use it",
}


def test_a_whole_run_has_all_parts(run: Path) -> None:
    text = page(run).text
    assert all(part in text for part in PARTS.values())
    assert "None" not in text


@pytest.mark.parametrize("name", PARTS)
def test_what_is_missing_is_left_out(run: Path, name: str) -> None:
    (run / name).rename(run.parent / "taken away")
    text = page(run).text
    for other, part in PARTS.items():
        assert (part in text) == (other != name), part
    assert "None" not in text


def test_a_rate_that_was_found_is_shown_with_its_trials(run: Path) -> None:
    assert "The learning rate" not in page(run).text
    trials = [RateTrial(round=1, rate=rate, steps=5, loss=1 + rate, seconds=0.1) for rate in (1e-3, 2e-3, 4e-3)]
    chosen = ChosenRate(rate=1.2e-3, likely=2e-3, run_steps=48, rows=8, cost=7.0, trials=trials, why="the best")
    chosen.write_to(run / "rate.json")
    text = page(run).text
    assert "The learning rate 0.0012: the best. The trials cost as much as 7 of the run's 48 steps" in text
    assert "it would have been 0.002" in text
    assert 'id="trials-' in (run / "report.html").read_text()
    assert "The dashed line is at the rate of the run" in text
    chosen.updated(rate=1e-4).write_to(run / "rate.json")
    assert "dashed line" not in page(run).text.partition("All trials")[0].partition("The learning rate")[2]


def test_trials_that_all_diverged_are_listed_without_a_picture_of_nothing(run: Path) -> None:
    trials = [RateTrial(round=1, rate=rate, steps=5, loss=None, seconds=0.1) for rate in (1e-3, 2e-3)]
    chosen = ChosenRate(rate=1e-4, likely=2e-3, run_steps=48, rows=8, cost=7.0, trials=trials, why="far below")
    chosen.write_to(run / "rate.json")
    assert "1 0.002 5 diverged" in page(run).text
    assert 'id="trials-' not in (run / "report.html").read_text()


def test_a_run_with_hardly_anything(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    text = page(tmp_path).text
    assert "Nothing is measured yet" in text
    assert "no summary" in text


def test_an_interrupted_run_says_how_to_go_on(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    assert "--resume" not in page(run).text
    change(
        "summary.json",
        status="interrupted",
        steps=17,
        epochs=0.85,
        adapter_bytes=None,
        total_seconds=None,
        best_step=None,
    )
    (run / "evaluation" / "kind.after.json").unlink()
    (run / "predictions" / "kind.after.jsonl").unlink()
    text = page(run).text
    assert "This run was interrupted at step 17 (epoch 0.85)." in text
    assert f"trimtab finetune {run}/config.yaml --resume" in text
    assert "kind: 33.3 % before, not measured after" in text
    assert "None" not in text


def test_a_diverged_run_says_how_to_begin_again(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Going on with it would diverge once more."""
    change("summary.json", status="diverged", steps=17, learning_rate=0.3)
    text = page(run).text
    assert "This run diverged by step 17: its loss, or its adapter, was not a number any more." in text
    assert f"trimtab finetune {run}/config.yaml --overwrite train.learning_rate=0.1" in text
    assert "--resume" not in text
    assert "interrupted" not in text


def test_only_after(run: Path) -> None:
    (run / "evaluation" / "kind.before.json").unlink()
    (run / "predictions" / "kind.before.jsonl").unlink()
    found = page(run)
    assert "kind: 66.7 % after training" in found.text
    assert "Before training" not in found.text
    assert "row 5 A cold soup of a plot true no after ✗ yes" in found.text


def test_a_result_that_the_commonest_answer_would_reach_is_called_so(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    assert "No better than" not in page(run).text
    change("evaluation/kind.after.json", accuracy=0.5)
    assert "No better than always answering 'no' (50.0 %)" in page(run).text


def test_open_answers_and_plain_text(open_run: Path) -> None:
    text = page(open_run).text
    assert "tales: perplexity 20.00 before, 15.00 after" in text
    assert "test: exact match 0.0 % before, 50.0 % after; 25.0 % of the answers cannot be used" in text
    assert "Perplexity 20.00 15.00 −25.0 %" in text
    assert "1,234 tokens" in text
    assert "before ✗ nothing after ✗ blue blue blue (no end)" in text
    assert "Confusion" not in text


def test_rows_with_choices_of_their_own(exam_run: Path) -> None:
    found = page(exam_run)
    assert "exam: 25.0 % before, 75.0 % after; guessing would give 25.0 %" in found.text
    assert "4 rows, choices of their own" in found.text
    assert "Accuracy 25.0 % 75.0 % +50.0" in found.text
    assert "Accuracy per character 50.0 % 100.0 % +50.0" in found.text
    assert "Dashed: guessing." in found.text
    assert "before 25.0 %, after 75.0 %; guessing 25.0 %" in found.source
    assert "Confusion" not in found.text
    assert "No better than" not in found.text
    after = exam_run / "evaluation" / "exam.after.json"
    after.write_text(json.dumps(json.loads(after.read_text()) | {"accuracy": 0.25}))
    assert "No better than guessing (25.0 %)" in page(exam_run).text


def test_many_answers_still_make_a_table(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    names = [f"answer {n}" for n in range(12)]
    square = [[3 if i == j else 0 for j in range(12)] for i in range(12)]
    change("evaluation/kind.after.json", choices=names, confusion=square, per_class={})
    source = page(run).source
    assert source.count('<td class="right" style="--share: 1.000">3<small>100 %</small></td>') == 12
    assert "confusion dense" in source


def test_damage_is_told_and_the_old_page_stays(run: Path) -> None:
    old = write_run_page(run).read_bytes()
    (run / "plan.json").write_text("{")
    with pytest.raises(RunError, match=r"plan\.json is damaged"):
        write_run_page(run)
    assert (run / "report.html").read_bytes() == old
