"""The page at ``/``: one message goes to two models side by side. One file, which asks nobody but this server."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_REPORTS = _HERE.parent / "reports" / "shared" / "page.css"


@cache
def _parts() -> tuple[str, str]:
    """The style sheet, which begins with that of the reports, and the script."""
    style = _REPORTS.read_text("utf-8") + (_HERE / "chat_page.css").read_text("utf-8")
    return style, (_HERE / "chat_page.js").read_text("utf-8")


@cache
def page() -> str:
    """The whole page."""
    style, script = _parts()
    text = (_HERE / "chat_page.html").read_text("utf-8")
    return text.replace("/* style */", style).replace("/* script */", script)


@cache
def policy() -> str:
    """Its content security policy: this style and this script run, no other; and nothing is asked for elsewhere."""
    style, script = map(_digest, _parts())
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
