"""The fixtures of tests with several processes."""

from __future__ import annotations

from run_fixtures import bare_runs, own_cache

__all__ = ["bare_runs", "own_cache"]
