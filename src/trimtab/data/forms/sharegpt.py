"""ShareGPT's rows, ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}``.

Read as ``chat`` is. ``role`` and ``content`` are taken for ``from`` and ``value``, too.
"""

from __future__ import annotations

from trimtab.data.forms.chat import Chat


class ShareGPT(Chat):
    """Conversations; the assistant's turns carry loss."""

    keys = ("conversations",)
    precedence = 7
