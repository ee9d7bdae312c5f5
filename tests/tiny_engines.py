"""Tiny models with adapters in folders, and an engine over them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import trimtab
from tiny_runs import tiny_tokenizer
from trimtab.asking import Asked, Drawing
from trimtab.models.locate import Source
from trimtab.serving.engine import Engine
from trimtab.serving.requests import Limits, Piece, Request
from trimtab.serving.ticket import Ticket

METHODS = {
    "lora": {"method": "lora", "rank": 2},
    "dora": {"method": "dora", "rank": 2},
    "mora": {"method": "mora", "rank": 4},
    "words": {"method": "lora", "rank": 2, "match": ["*embed_tokens", "*q_proj"]},
}


def saved_adapters(model: Any, folder: Path, names: Mapping[str, Mapping[str, Any]] = METHODS) -> dict[str, Path]:
    """A folder for each adapter, far enough from the model that they answer differently."""
    found = {}
    for number, (name, options) in enumerate(names.items()):
        one = copy.deepcopy(model)
        torch.manual_seed(number)
        trimtab.attach(one, trimtab.Rule(**{"match": "all-linear", **options}))
        with torch.no_grad():
            for parameter in trimtab.trainable_parameters(one).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        found[name] = trimtab.save_adapter(one, folder / name)
    return found


def engine_of(model: Any, folders: Mapping[str, Path] | None = None, **limits: Any) -> Engine:
    """An engine over a copy of ``model``."""
    engine = Engine(
        copy.deepcopy(model).eval(),
        tiny_tokenizer(),
        name="base",
        source=Source("base", "folder", "base"),
        limits=Limits(**limits),
    )
    for name, folder in (folders or {}).items():
        engine.add_adapter(name, folder)
    return engine


def alone(model: Any, folder: Path | None, prompt: str, drawing: Drawing) -> str:
    """What ``trimtab generate`` says."""
    model = copy.deepcopy(model).eval()
    if folder is not None:
        trimtab.load_adapter(model, folder)
    return Asked(model, tiny_tokenizer()).write(prompt, drawing, lambda _: None).text


def pieces(ticket: Ticket) -> list[Piece]:
    return list(ticket)


def text_of(ticket: Ticket) -> str:
    return "".join(piece.text for piece in ticket)


def asked(engine: Engine, model: str, prompt: str, **options: Any) -> Request:
    return Request(model, tuple(engine.encode(prompt, model)), **options)


def said_by(engine: Engine, model: str, prompt: str, **options: Any) -> str:
    return text_of(engine.submit(asked(engine, model, prompt, **options)))
