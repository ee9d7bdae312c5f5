"""The fixtures of tests of the command line."""

from __future__ import annotations

from command_line import Result, cli
from run_fixtures import bare_runs, make_yaml, model_folder, own_cache, two_blocks

__all__ = ["Result", "bare_runs", "cli", "make_yaml", "model_folder", "own_cache", "two_blocks"]
