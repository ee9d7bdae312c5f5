"""How a run begins: in a new folder, in place of a run that is there, or resumed, under settings that may have changed;
and from which adapter.

A run may be killed between any two changes. So what makes a run comes first (``config.yaml``), what says that something
is done comes after it, and an old run is cleared away under a mark: whoever finds that mark finishes the clearing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.adapters.placing import adapter_digest
from trimtab.config.read import load_config, to_yaml
from trimtab.config.resolve import Job, source_of
from trimtab.config.run import RunConfig
from trimtab.config.yaml_text import show
from trimtab.errors import AdapterError, RunError
from trimtab.files import remove_leftovers, write_text
from trimtab.hints import pasted
from trimtab.models.locate import Source
from trimtab.runs.checkpoints import numbered
from trimtab.runs.folder import RECORD, RunFolder
from trimtab.runs.load import changed_adapter, changed_base, doubt_of
from trimtab.runs.lock import locked
from trimtab.runs.records import BeganFrom, RowsDigest, SourceRecord, Summary, same_rows

# Each with all that is below it. None of these changes what is trained.
_FREE = (
    *("output", "evaluation", "data.test", "report_to", "device"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.tensorboard", "train.sharding"),
    *("model.attention", "model.liger", "train.padding_free", "train.tf32"),  # another device may have others
)
_ALL_SETS = ("evaluation.limit", "evaluation.max_new_tokens")
_LONGER = ("train.epochs", "train.max_steps")
_ROWS = ("data.train", "data.validation")
_KNOWN_AGAIN = (*_ROWS, "model.name", "adapter")  # by what they hold, wherever they lie


@dataclass(frozen=True)
class Changes:
    """How a resumed run differs from what it began with.

    Attributes:
        longer: it is to be trained for more steps than before.
        moved: its training or validation rows lie elsewhere; whether they are the same is seen when they are read.
        model_moved: its model lies elsewhere; whether it is the same is seen before it is loaded.
        measured_anew: the test sets whose results no longer say what the settings say.
    """

    longer: bool = False
    moved: bool = False
    model_moved: bool = False
    measured_anew: frozenset[str] = frozenset()


def changes(
    place: str, before: RunConfig, now: RunConfig, resume_command: str, *, knows_model: bool = False
) -> Changes:
    """What ``now`` changes of the run at ``place``, which began as ``before``; ``knows_model``: whether it knows its
    model again by what that holds, so that another folder or file may be named for it.

    Raises RunError if it may not; the message has each key with its old and its new value.
    """
    found = {key: (old, new) for key, old, new in _differences(_plain(before), _plain(now))}
    moved = {key for key in _ROWS if key in found and _same_but_paths(*found[key])}
    for key in moved:
        del found[key]
    model_moved = knows_model and "model.name" in found and Path(now.model.name).exists()
    if model_moved:
        del found["model.name"]
    refused = {
        key: values
        for key, values in found.items()
        if not _is_below(key, _FREE) and not (key in _LONGER and _is_more(*values))
    }
    if refused:
        said = "; ".join(f"{key} was {show(old)}, now {show(new)}" for key, (old, new) in sorted(refused.items()))
        raise RunError(
            f"{place}: the run began with other settings: {said}. Resume it with its own: {resume_command}\n"
            "Evaluation and reports may be set anew at a resume, and train.epochs and train.max_steps may grow; for "
            "anything else, begin another run"
        )
    sets = {key.split(".")[2] for key in found if key.startswith("data.test.")}
    if any(key in found for key in _ALL_SETS):
        sets |= set(now.data.test)
    longer = any(key in found for key in _LONGER)
    return Changes(longer=longer, moved=bool(moved), model_moved=model_moved, measured_anew=frozenset(sets))


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _is_below(key: str, names: Sequence[str]) -> bool:
    """Whether ``key`` is one of ``names``, or of what is below them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_more(old: Any, new: Any) -> bool:
    """Whether a number of epochs or steps grows; None is no limit."""
    return old is not None and (new is None or new > old)


def _same_but_paths(before: Any, now: Any) -> bool:
    """Whether two lists of sources, as plain values, say the same but for the paths."""
    return isinstance(before, list) and isinstance(now, list) and [*map(_rest, before)] == [*map(_rest, now)]


def _rest(source: Any) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "path"} if isinstance(source, dict) else {}


def deciding(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is trained, by their dotted keys, but for what is read."""
    apart = (*_FREE, *_LONGER, *_KNOWN_AGAIN)
    return {key: value for key, value in _leaves(_plain(config)) if not _is_below(key, apart)}


def _leaves(said: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(said, dict) and said:
        for key, value in said.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, said


def _require_untouched(folder: RunFolder, config: RunConfig, summary: Summary | None) -> None:
    """Raise RunError where ``config``, what the run's own file says, is no longer what the run began with: its
    checkpoints would not fit, or go on as another run."""
    now, then = deciding(config), summary.settings if summary is not None else {}
    edited = {key: (old, now[key]) for key, old in then.items() if key in now and now[key] != old}
    if edited:
        said = "; ".join(f"{key} was {show(old)}, now {show(new)}" for key, (old, new) in sorted(edited.items()))
        raise RunError(
            f"{folder.config}: changed since the run began: {said}. Put it back and resume, or begin a run of its own "
            f"with it: {pasted('finetune', folder.config, 'output=NEW')}"
        )


def differences(before: Any, now: Any) -> list[str]:
    """The dotted keys in which two nested mappings differ."""
    return [key for key, _, _ in _differences(before, now)]


def _differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif before != now:
        yield place, before, now


class Rows(NamedTuple):
    """What a run knows of its rows: the ``digests`` to keep, and the names of test sets that have other rows than when
    it began."""

    digests: RowsDigest
    changed: list[str]


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

    def require_same_rows(self, now: RowsDigest, sources: Sequence[SourceRecord], *, trains: bool) -> Rows:
        """Hold the rows against those that the run began with, by their content and order: they may have moved. A run
        of an older version did not record them.

        Args:
            now: of the rows as they were read now; ``sources``: of the training rows.
            trains: whether there is training left to do.

        Raises RunError if there is, and the training or validation rows are others, whose split and order would be
        others, too.
        """
        before, folder = self.summary, self.folder.path
        if before is None or before.digests is None:
            if before is not None and self.changes.moved:
                raise RunError(
                    f"{folder}: the run began with an earlier version, which did not record its rows; resume it with "
                    f"the paths that it began with: {self.folder.resume_command}"
                )
            return Rows(now, [])
        then = before.digests
        pairs = {"training": (then.train, now.train), "validation": (then.validation, now.validation)}
        which = next((which for which, digests in pairs.items() if not same_rows(*digests)), None)
        if trains and which is not None:
            then_rows, now_rows = (sum(source.rows for source in told) for told in (before.sources, sources))
            if which == "validation":
                told = "other rows, or another order"
            elif then_rows != now_rows:
                told = f"{then_rows:,} rows were read then, {now_rows:,} now"
            elif then.train.split()[0] == now.train.split()[0]:
                told = f"{now_rows:,} rows as then, but their pictures are others"
            else:
                told = f"{now_rows:,} rows as then, but others, or in another order"
            named = ", ".join(source.path for source in sources)
            raise RunError(
                f"{folder}: the {which} rows are not those that the run began with ({told}), so it cannot go on as it "
                f"began. Put the rows back ({named}), or name them where they lie now (data.train=...), and resume; or "
                f"train on the new rows in a run of its own: "
                f"{pasted('finetune', folder / 'config.yaml', 'output=NEW')}"
            )
        changed = sorted(name for name, rows in now.test.items() if not same_rows(then.test.get(name, rows), rows))
        # What was trained on is kept as it was, whatever the files hold now.
        return Rows(then.updated(test=now.test) if self.trained else now, changed)

    def require_same_model(self, source: Source) -> None:
        """Raise RunError if there is training left to do, or the model was named anew, and the model at ``source`` is
        another than the run's; or if there is no training left, and the adapter is."""
        held = self.resumes and (not self.trained or self.changes.model_moved)
        if held and (changed := changed_base(self.folder, source)) is not None:
            raise RunError(
                f"{changed}. Put the model back and resume, or begin a run of its own on this one: "
                f"{pasted('finetune', self.folder.path / 'config.yaml', 'output=NEW')}"
            )
        if self.resumes and self.trained and (changed := changed_adapter(self.folder)) is not None:
            raise RunError(
                f"{changed}. Put the run's own back and resume; or remove {self.folder.adapter}, and it is made again "
                "from the last checkpoint"
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
    ours = folder.is_run or folder.summary.is_file() or folder.is_cleared_away or folder.is_empty
    if not (ours or folder.lock.exists()):
        raise _holds_something_else(folder)  # no lock of ours is left in it
    with locked(folder.lock, "run folder"):
        remove_leftovers(folder.path, alone=True)
        yield _look(config, folder, resume=resume, overwrite=overwrite)


def _holds_something_else(folder: RunFolder) -> RunError:
    return RunError(f"{folder.path}: a folder that is not empty and holds no run; choose another output")


def _look(config: RunConfig, folder: RunFolder, *, resume: bool, overwrite: bool) -> Opening:
    if folder.is_cleared_away:
        return Opening(folder)
    summary = folder.read_summary()
    if not folder.is_run:
        if not folder.is_empty:
            raise _holds_something_else(folder)
        return Opening(folder)
    finished = summary is not None and summary.status == "finished"
    if resume:
        began = load_config(folder.config)
        _require_untouched(folder, began, summary)
        knows_model = summary is not None and summary.model_digest is not None
        changed = changes(str(folder.path), began, config, folder.resume_command, knows_model=knows_model)
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


@dataclass(frozen=True)
class Origin:
    """Which adapter a run begins from.

    Attributes:
        record: of that adapter; None for a fresh one.
        lost: whether it is not there any more, so that nothing can be measured with it.
    """

    record: BeganFrom | None = None
    lost: bool = False

    def remarks(self, config: RunConfig) -> list[str]:
        """What the user should know of it in a run of ``config``, a sentence each."""
        if self.record is None:
            return []
        name = self.record.adapter
        measured = ": what is measured before training is measured with it" if config.data.test else ""
        lines = [f"begun from the adapter {name}{measured}"]
        if (doubt := doubt_of(name, source_of(config))) is not None:
            lines.append(doubt)
        return lines


def begun(job: Job, opening: Opening) -> tuple[Job, Origin]:
    """``job`` with the adapter that it begins from, and what is known of that. Where a resumed run's first adapter is
    gone, its own newest one gives the shape.

    Raises AdapterError if there is no such adapter; RunError if a run is resumed that has no checkpoint yet and whose
    adapter has changed.
    """
    name = job.config.adapter
    if name is None:
        return job, Origin()
    before = opening.summary.began_from if opening.summary is not None else None
    try:
        record = BeganFrom(adapter=name, sha256=adapter_digest(name))
    except AdapterError:
        if before is None:
            raise
        record = None
    if before is None or (record is not None and record.sha256 == before.sha256):
        return job, Origin(record)
    own = [place for _, place in numbered(opening.folder.checkpoints)]
    own += [opening.folder.adapter] if opening.folder.has_adapter else []
    if not own:
        raise RunError(
            f"{name}: the adapter that this run began from is {'gone' if record is None else 'another now'}, and "
            "there is no checkpoint yet; put it back, or begin the run again with --overwrite"
        )
    config = job.config.model_copy(update={"adapter": str(own[-1])})
    return replace(job, config=config), Origin(before, lost=True)
