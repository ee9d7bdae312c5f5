"""How a run takes up its folder: new, resumed, or in place of one that is there; and the order in which it changes it.

A run may be killed between any two changes. So what makes a run comes first (``config.yaml``), what says that something
is done comes after it, and an old run is cleared away under a mark: whoever finds that mark finishes the clearing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.config.read import load_config, to_yaml
from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.files import remove_leftovers, write_text
from trimtab.runs.folder import RECORD, RunFolder
from trimtab.runs.lock import locked
from trimtab.runs.records import Summary
from trimtab.runs.resumed_settings import Changes, changes


@dataclass(frozen=True)
class Opening:
    """A folder that a run may be begun in, or gone on with; nothing in it is changed before `begin`.

    Attributes:
        resumes: whether a run that is there goes on.
        summary: of that run, if it has one yet.
        changes: how its settings differ from those it began with.
    """

    folder: RunFolder
    resumes: bool = False
    summary: Summary | None = None
    changes: Changes = field(default_factory=Changes)

    @property
    def trained(self) -> bool:
        """Whether training is over, and the adapter there that it ended with."""
        if self.summary is None or self.changes.longer or not self.folder.has_adapter:
            return False
        return self.summary.trained is not False  # None: by an earlier version, which wrote an adapter at the end only

    def is_measured(self, config: RunConfig) -> bool:
        """Whether the run is trained and every test set evaluated, as its settings say now."""
        trains = bool(config.train.epochs)
        stages = ["before"] * (config.evaluation.before or not trains) + ["after"] * trains
        # A run that trains nothing has counted its parameters right before its end.
        counted = not trains and self.summary is not None and self.summary.trainable_parameters is not None
        return (self.trained or counted) and not any(
            name in self.changes.measured_anew or not self.folder.is_evaluated(name, stage)
            for name in config.data.test
            for stage in stages
        )

    def begin(self, config: RunConfig) -> None:
        """Write what the run is, in the folder that is cleared first if the run is a new one.

        Raises RunError if it cannot be written.
        """
        folder = self.folder
        try:
            if self.resumes:
                if self.summary is not None and (self.changes.longer or self.changes.measured_anew):
                    said = {"status": "interrupted"} | ({"trained": False} if self.changes.longer else {})
                    self.summary.updated(**said).write_to(folder.summary)
                for name in self.changes.measured_anew:
                    folder.forget_evaluation(name, "before", "after")
            elif folder.is_cleared_away or folder.is_run:
                folder.clearing.touch()
                folder.clear()
            text = RECORD + to_yaml(config.model_copy(update={"output": Path()}))
            if folder.written_config() != text:
                write_text(folder.config, text)
            folder.clearing.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"{folder.path}: the run folder cannot be written ({error.strerror}); choose another output"
            ) from None


@contextmanager
def opened(config: RunConfig, *, resume: bool, overwrite: bool) -> Iterator[Opening]:
    """Hold the run folder that ``config`` names while the context is open; no other process works there meanwhile.

    Raises RunError if the folder holds a run already and neither ``resume`` nor ``overwrite`` is asked for, if it
    holds something else, if there is nothing to resume, or if another process is at work there.
    """
    folder = RunFolder(config.output)
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"{folder.path}: a file is in the way; choose another output")
    if resume and not (folder.is_run or folder.is_cleared_away):
        raise RunError(f"{folder.path}: there is no run to resume; start it without --resume")
    with locked(folder.lock, "run folder"):
        remove_leftovers(folder.path, alone=True)
        yield _look(config, folder, resume=resume, overwrite=overwrite)


def _look(config: RunConfig, folder: RunFolder, *, resume: bool, overwrite: bool) -> Opening:
    if folder.is_cleared_away:
        return Opening(folder)
    summary = folder.read_summary()
    if not folder.is_run:
        if not folder.is_empty:
            raise RunError(f"{folder.path}: a folder that is not empty and holds no run; choose another output")
        return Opening(folder)
    finished = summary is not None and summary.status == "finished"
    if resume:
        changed = changes(str(folder.path), load_config(folder.config), config, folder.resume_command)
        opening = Opening(folder, resumes=True, summary=summary, changes=changed)
        whole = opening.is_measured(config) and folder.is_linked and folder.report.is_file()
        if finished and whole:
            raise RunError(
                f"{folder.path}: this run is finished; there is nothing to resume. To train it further, add "
                "train.epochs=N"
            )
        return opening
    if not overwrite and (finished or not folder.is_set_up_alone):
        advice = "" if finished else f"go on with it: {folder.resume_command}; or "
        raise RunError(
            f"{folder.path}: this folder holds a run already ({'finished' if finished else 'interrupted'}). To keep "
            f"both, choose another output; {advice}to replace it, add --overwrite"
        )
    return Opening(folder)
