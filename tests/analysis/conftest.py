"""A tiny model as a folder, and its source."""

from __future__ import annotations

from run_fixtures import make_yaml, model_folder, own_cache

__all__ = ["make_yaml", "model_folder", "own_cache"]
