"""A tiny model as a folder, and its source."""

from __future__ import annotations

from run_fixtures import bare_runs, make_yaml, own_cache, two_blocks as model_folder

__all__ = ["bare_runs", "make_yaml", "model_folder", "own_cache"]
