"""Figures and studies on the site: tables from benchmarks/results, the studies' page with theirs inside it.

A page says ``<!-- figures: step -->`` where the table of that name of benchmarks/figures.py belongs. It links to the
studies where they are in the repository; on the site they stand beside the pages.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "studies"
_MARK = re.compile(r"^<!-- figures: (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\(([\w./-]+)(?:#[\w-]+)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the folder of studies, and the files of it that any page links to."""
    pages = sorted(STUDIES.glob("**/README.md"))
    for page in pages:
        paragraphs = (part + _shown(part) for part in page.read_text("utf-8").split("\n\n"))
        files.append(File.generated(config, str(page.relative_to(ROOT)), content="\n\n".join(paragraphs)))
    linked = {
        (page.parent / name).resolve()
        for page in (*pages, *(ROOT / "docs").glob("*/*.md"))
        for name in _LINK.findall(page.read_text("utf-8"))
    }
    for path in sorted(path for path in linked if STUDIES in path.parents and path.suffix != ".md"):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def _shown(paragraph: str) -> str:
    """The pages that a paragraph links to, each in a frame that is loaded when it comes into view."""
    pages = [name for name in _LINK.findall(paragraph) if name.endswith(".html")]
    frame = (
        '\n\n<details markdown="0"><summary>The page of {0}</summary>'
        '<iframe src="{0}" title="{0}" loading="lazy"></iframe></details>'
    )
    return "".join(frame.format(name) for name in pages)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables in, and lead links to the studies to where these are on the site."""
    tables: dict[str, Callable[[], str]] = runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))["TABLES"]

    def table(match: re.Match[str]) -> str:
        if match[1] not in tables:
            raise PluginError(f"{page.file.src_path}: no table is called '{match[1]}'; there are {', '.join(tables)}")
        return tables[match[1]]()

    return _MARK.sub(table, markdown).replace("](../../studies/", "](../studies/")
