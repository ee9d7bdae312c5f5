"""The run folders that these tests read."""

from known_runs import change, exam_run, open_run, run

__all__ = ["change", "exam_run", "open_run", "run"]
