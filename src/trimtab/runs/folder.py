"""The folder of a run: where everything lies, and what may be done with a folder that is there already."""

from __future__ import annotations

import contextlib
import filecmp
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab.config.read import load_config, to_yaml
from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.files import read_json, read_jsonl, write_jsonl, write_text
from trimtab.hints import pasted
from trimtab.runs.records import MetricsLine, Summary


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

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
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def resume_command(self) -> str:
        """What goes on with this run, to be pasted into a shell."""
        return pasted("finetune", self.config, "--resume")

    @property
    def has_adapter(self) -> bool:
        """Whether training is over: the adapter is written then, its JSON file last."""
        return any(self.adapter.glob("*.json"))

    def link_adapter(self) -> None:
        """Make the run folder an adapter folder, too, for PEFT and all who look for the files there: links, or copies
        where there are no links. A file of another's stays as it is."""
        known = _adapter_files()
        for file in self.adapter.iterdir():
            link = self.path / file.name
            if file.name not in known or (link.exists() and not self._is_copy(link)):
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

    def evaluation(self, name: str, stage: str) -> Path:
        """The result of one test set; ``stage`` is ``before`` or ``after``."""
        return self.path / "evaluation" / f"{name}.{stage}.json"

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of every complete checkpoint, the earliest first."""
        return sorted(
            (int(folder.name.rsplit("-", 1)[1]), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if folder.name.rsplit("-", 1)[1].isdigit() and (folder / "trainer_state.json").is_file()
        )

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        found = self.complete_checkpoints()
        return found[-1][1] if found else None

    def read_summary(self) -> Summary | None:
        """The run's summary; None where there is none yet. Raises RunError if it is damaged."""
        if not self.summary.is_file():
            return None
        try:
            return Summary.read(read_json(self.summary))
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise RunError(f"{self.summary}: a damaged file ({error})") from None

    @property
    def status(self) -> str | None:
        """``interrupted`` or ``finished``; None where there is no run. Raises as ``read_summary`` does."""
        summary = self.read_summary()
        return summary.status if summary is not None else None

    def read_metrics(self) -> list[MetricsLine]:
        """The lines of ``metrics.jsonl``, up to one that was cut off when the run was killed."""
        return [MetricsLine.read(row) for row in self._lines_of_metrics()]

    def _lines_of_metrics(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            rows.extend(read_jsonl(self.metrics))
        return rows

    def cut_metrics(self, step: int) -> list[MetricsLine]:
        """Drop the metrics after ``step``, which a resumed run writes again; gives those that are left."""
        rows = [row for row in self._lines_of_metrics() if row["step"] <= step]
        write_jsonl(self.metrics, rows)
        return [MetricsLine.read(row) for row in rows]

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
        for file in (self.plan, self.metrics, self.report, self.summary, self.config):
            file.unlink(missing_ok=True)


_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_WRITTEN = {
    "checkpoints": r"(damaged-)?checkpoint-\d+|best(-\d+)?|\.saving",
    "evaluation": r".+\.json",
    "predictions": r".+\.jsonl",
    "tensorboard": r"events\.out\.tfevents\..+",
}
"""The folders in a run's folder beside that of the adapter, and the names of what runs write there."""


def _adapter_files() -> set[str]:
    """The names of what runs write as their adapter."""
    from trimtab.adapters.formats import all_formats  # torch: only where something is trained

    return {*_TOKENIZER_FILES, *(name for one in all_formats() for name in one.files)}


def find_run(config: RunConfig, *, resume: bool, overwrite: bool) -> tuple[RunFolder, Path | None, Summary | None]:
    """The run folder that ``config`` names; of a run to be resumed also its newest checkpoint, if there is one, and its
    summary. Nothing is changed yet.

    Raises RunError if the folder holds a run already and neither ``resume`` nor ``overwrite`` is asked for, if it
    holds something else, or if there is nothing to resume.
    """
    folder = RunFolder(config.output)
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"{folder.path}: a file is in the way; choose another output")
    summary = folder.read_summary()
    status = summary.status if summary is not None else None
    if resume:
        if status is None or not folder.config.is_file():
            raise RunError(f"{folder.path}: there is no run to resume; start it without --resume")
        if status == "finished":
            raise RunError(f"{folder.path}: this run is finished; there is nothing to resume")
        _check_same(config, folder)
        return folder, folder.latest_checkpoint(), summary
    if folder.path.is_dir() and any(folder.path.iterdir()):
        if status is None:
            raise RunError(f"{folder.path}: a folder that is not empty and holds no run; choose another output")
        if not overwrite:
            advice = "" if status == "finished" else f"go on with it: {folder.resume_command}; or "
            raise RunError(
                f"{folder.path}: this folder holds a run already ({status}). To keep both, choose another output; "
                f"{advice}to replace it, add --overwrite"
            )
    return folder, None, None


def start_run(config: RunConfig, folder: RunFolder) -> None:
    """Make the folder of a new run, in place of the one that is there.

    Raises RunError if it cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.clear()
        write_text(folder.config, to_yaml(config))
    except OSError as error:
        raise RunError(
            f"{folder.path}: the run folder cannot be written ({error.strerror}); choose another output"
        ) from None


def _check_same(config: RunConfig, folder: RunFolder) -> None:
    """Raise RunError if a run would be resumed with settings other than those it began with.

    Its folder may have been moved meanwhile, so ``output`` is no matter.
    """
    before, now = (said.model_dump(mode="json", exclude={"output"}) for said in (load_config(folder.config), config))
    changed = sorted(differences(before, now))
    if changed:
        raise RunError(
            f"{folder.path}: the run began with other settings ({', '.join(changed)}); resume it with its own: "
            f"{folder.resume_command}"
        )


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """The dotted keys in which two nested mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in before.keys() | now.keys()
            for found in differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if before == now else [place]
