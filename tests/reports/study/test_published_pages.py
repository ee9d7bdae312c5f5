"""The pages that are published with their results can be made from these again, and say the same."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import pytest

from sampling import sample
from trimtab.reports.search.search_page import write_explore_page
from trimtab.reports.study.study_page import write_study_page

STUDIES = Path(__file__).resolve().parents[3] / "studies"
# The oldest results, which do not name the chance; a study with searched rates; one whose runs find theirs; one of
# numbers; a search.
PUBLISHED = ["folding", "mixing/memory-rate", "commonsense", "tasks/berths", "mixing/nuance-explore"]
# Said since then.
ADDED = "; that of a share is cut at 0 and 100 %"


def words(page: Path) -> list[str]:
    """The words of a page, without its style and its pictures."""
    text = re.sub(r"<head>.*?</head>|<style>.*?</style>|<title>.*?</title>", " ", page.read_text("utf-8"), flags=re.S)
    text = re.sub(r"<svg.*?</svg>", " ", text, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", " ", text)).replace(ADDED, "").split()


@pytest.mark.parametrize("name", sample(PUBLISHED, 2))
def test_a_published_page_is_made_again_with_the_same_words(name: str, tmp_path: Path) -> None:
    published = STUDIES / name
    for file in published.glob("*.json"):
        shutil.copy(file, tmp_path)
    (old,) = published.glob("*.html")
    page = (write_explore_page if old.stem == "explore" else write_study_page)(tmp_path)
    assert words(page) == words(old)
    pictures = {file.name for file in published.iterdir() if file.suffix in (".png", ".svg")}
    assert pictures == {file.name for file in tmp_path.iterdir() if file.suffix in (".png", ".svg")}
