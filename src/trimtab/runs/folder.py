"""The folder of a run: where everything lies. See `trimtab.runs.beginning` for how it is begun and gone on with."""

from __future__ import annotations

import contextlib
import filecmp
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from trimtab.errors import RunError
from trimtab.files import read_json, read_jsonl, write_jsonl
from trimtab.hints import pasted
from trimtab.reading import read_text
from trimtab.runs.rate_record import read_rate
from trimtab.runs.read import first_complaint, read_metrics
from trimtab.runs.records import MetricsLine, Summary
from trimtab.runs.results import read_result

RECORD = "# The run in this folder.\n"
"""The first line of a run's ``config.yaml``, by which it is told from a YAML of that name that somebody wrote."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def clearing(self) -> Path:
        """Is there while an old run is cleared away for a new one."""
        return self.path / ".clearing"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def rate(self) -> Path:
        return self.path / "rate.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def is_run(self) -> bool:
        """Whether there is a run, of which nothing may be there yet but its settings."""
        return self.config.is_file() and (self.summary.is_file() or self.written_config().startswith(RECORD))

    @property
    def is_cleared_away(self) -> bool:
        """Whether a process was ended while it cleared an old run away."""
        return self.clearing.exists()

    @property
    def is_empty(self) -> bool:
        """Whether nothing but the lock lies in the folder."""
        return not self.path.is_dir() or all(entry == self.lock for entry in self.path.iterdir())

    @property
    def is_set_up_alone(self) -> bool:
        """Whether the run has not yet made anything that would have to be made again."""
        made = (self.path / "adapter", self.checkpoints, self.path / "evaluation")
        has_metrics = self.metrics.is_file() and self.metrics.stat().st_size > 0
        if has_metrics or any(folder.is_dir() and any(folder.iterdir()) for folder in made):
            return False
        rate = read_rate(self.rate)
        return rate is None or not rate.trials

    @property
    def is_linked(self) -> bool:
        """Whether the files of the adapter can be found in the run folder, too."""
        return all((self.path / file.name).exists() for file in self._files_of_adapter())

    def written_config(self) -> str:
        """The text of ``config.yaml``; an empty one where there is none, or none that is text."""
        try:
            return read_text(self.config)
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    @property
    def resume_command(self) -> str:
        """What goes on with this run, to be pasted into a shell."""
        return pasted("finetune", self.config, "--resume")

    @property
    def has_adapter(self) -> bool:
        """Whether training is over: the adapter is written then, its JSON file last, and linked to afterwards. None of
        these files is gone."""
        links = [link for name in _adapter_files() if (link := self.path / name).is_symlink()]
        kinds = (self.adapter.glob("*.safetensors"), self.adapter.glob("*.json"))
        return all(map(any, kinds)) and all(link.exists() for link in links)

    def link_adapter(self) -> None:
        """Make the run folder an adapter folder, too, for PEFT and all who look for the files there: links, or copies
        where there are no links. A file of another's stays as it is."""
        for file in self._files_of_adapter():
            link = self.path / file.name
            if link.exists() and not self._is_copy(link):
                continue
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(Path(self.adapter.name, file.name))
            except OSError:
                shutil.copyfile(file, link)

    def _is_copy(self, file: Path) -> bool:
        """Whether ``file`` is what `link_adapter` makes of a file of the adapter."""
        origin = self.adapter / file.name
        return file.is_symlink() or (file.is_file() and origin.is_file() and filecmp.cmp(file, origin, shallow=False))

    def _files_of_adapter(self) -> list[Path]:
        return [file for name in sorted(_adapter_files()) if (file := self.adapter / name).is_file()]

    def evaluation(self, name: str, stage: str) -> Path:
        """The result of one test set; ``stage`` is ``before`` or ``after``."""
        return self.path / "evaluation" / f"{name}.{stage}.json"

    def predictions(self, name: str, stage: str) -> Path:
        """What the model made of each row of a test set."""
        return self.path / "predictions" / f"{name}.{stage}.jsonl"

    def is_evaluated(self, name: str, stage: str) -> bool:
        """Whether there is a whole result of that test set, with all of its predictions where it has any."""
        try:
            result = read_result(read_json(self.evaluation(name, stage)))
            if result.kind == "perplexity":
                return True
            return result.rows == sum(1 for _ in read_jsonl(self.predictions(name, stage)))
        except (OSError, ValueError):
            return False

    def forget_evaluation(self, name: str, *stages: str) -> None:
        """Remove results that do not hold any more."""
        for stage in stages:
            self.evaluation(name, stage).unlink(missing_ok=True)
            self.predictions(name, stage).unlink(missing_ok=True)

    def read_summary(self) -> Summary | None:
        """The run's summary; None where there is none yet. Raises RunError if it is damaged."""
        if not self.summary.is_file():
            return None
        try:
            return Summary.read(read_json(self.summary))
        except (OSError, ValueError, RecursionError) as error:
            reason = first_complaint(error) if isinstance(error, ValidationError) else error
            raise RunError(
                f"{self.summary}: a damaged file ({reason}); put it back, or remove it and go on with the run: "
                f"{self.resume_command}"
            ) from None

    @property
    def status(self) -> str | None:
        """``interrupted``, ``diverged`` or ``finished``; None where there is no run. Raises as ``read_summary``
        does."""
        summary = self.read_summary()
        return summary.status if summary is not None else None

    def read_metrics(self) -> list[MetricsLine]:
        """The lines of ``metrics.jsonl``, without one that was cut off when the run was killed."""
        return read_metrics(self.metrics)

    def cut_metrics(self, step: int) -> list[MetricsLine]:
        """Drop the metrics after ``step``, which a resumed run writes again; gives those that are left."""
        lines = [line for line in self.read_metrics() if line.step <= step]
        write_jsonl(self.metrics, [line.plain() for line in lines])
        return lines

    def clear(self) -> None:
        """Remove what a run wrote; whatever else lies in the folder, or in those that a run makes in it, stays."""
        known = _adapter_files()
        for name in known:
            if self._is_copy(self.path / name):
                (self.path / name).unlink()
        for folder, written in [*_WRITTEN.items(), ("adapter", "|".join(map(re.escape, known)))]:
            for path in list((self.path / folder).glob("*")):
                if re.fullmatch(written, path.name) is not None:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            with contextlib.suppress(OSError):  # another's file is in it, or there was none
                (self.path / folder).rmdir()
        for file in (self.plan, self.rate, self.metrics, self.report, self.summary, self.config):
            file.unlink(missing_ok=True)


def run_at(path: Path) -> RunFolder | None:
    """The run that ``path`` names, by its folder or by the ``config.yaml`` in that; None where it names something else,
    such as a YAML of that name that somebody wrote."""
    folder = RunFolder(path if path.is_dir() else path.parent)
    return folder if folder.is_run and (path.is_dir() or path.name == folder.config.name) else None


_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_WRITTEN = {
    "checkpoints": r"checkpoint-\d+|damaged-checkpoint-\d+(-\w+)?|best(-\d+)?|\.saving",
    "evaluation": r".+\.json",
    "predictions": r".+\.jsonl",
    "tensorboard": r"events\.out\.tfevents\..+",
}
"""The folders in a run's folder beside that of the adapter, and the names of what runs write there."""


def _adapter_files() -> set[str]:
    """The names of what runs write as their adapter."""
    from trimtab.adapters.formats import file_names  # torch: only where something is trained

    return {*_TOKENIZER_FILES, *file_names()}
