"""The adapter that a run begins from: what is kept of it, and what a resumed run does where it is gone or changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab.config.resolve import Job
from trimtab.config.start_from import adapter_digest, base_of
from trimtab.errors import AdapterError, RunError
from trimtab.runs.beginning import Opening
from trimtab.runs.checkpoints import numbered
from trimtab.runs.records import BeganFrom


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        job: what is attached; of a resumed run whose first adapter is gone, the shape of its own.
        record: of the adapter; None for a fresh one.
        lost: whether the first adapter is not there any more, so that nothing can be measured with it.
    """

    job: Job
    record: BeganFrom | None = None
    lost: bool = False

    @classmethod
    def of(cls, job: Job, opening: Opening) -> Origin:
        """The beginning of ``job``.

        Raises AdapterError if there is no such adapter; RunError if a run is resumed that has no checkpoint yet and
        whose adapter has changed.
        """
        name = job.config.adapter
        if name is None:
            return cls(job)
        before = opening.summary.began_from if opening.summary is not None else None
        try:
            record = BeganFrom(adapter=name, sha256=adapter_digest(name))
        except AdapterError:
            if before is None:
                raise
            record = None
        if before is None or (record is not None and record.sha256 == before.sha256):
            return cls(job, record)
        own = [place for _, place in numbered(opening.folder.checkpoints)]
        own += [opening.folder.adapter] if opening.folder.has_adapter else []
        if not own:
            raise RunError(
                f"{name}: the adapter that this run began from is {'gone' if record is None else 'another now'}, and "
                "there is no checkpoint yet; put it back, or begin the run again with --overwrite"
            )
        config = job.config.model_copy(update={"adapter": str(own[-1])})
        return cls(replace(job, config=config), before, lost=True)

    def remarks(self) -> list[str]:
        """What the user should know of it, a sentence each."""
        if self.record is None:
            return []
        name, said = self.record.adapter, self.job.config.model.name
        measured = ": what is measured before training is measured with it" if self.job.config.data.test else ""
        lines = [f"begun from the adapter {name}{measured}"]
        if (base := base_of(name)) is not None and base != said.rstrip("/").rpartition("/")[2]:
            lines.append(f"the adapter says that it was made for {base}, and this run's model is {said}")
        return lines
