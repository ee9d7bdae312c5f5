"""Notebooks as pages: their text, their code, and what is stored of their outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours of a terminal


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        page = "\n\n".join(part for cell in cells for part in _parts(cell))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
    return files


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![what the cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
        elif text := _ESCAPES.sub("", "".join(output.get("text") or data.get("text/plain", ""))).strip("\n"):
            yield f"```text\n{text}\n```"
