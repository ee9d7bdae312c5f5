"""A study that was read from its YAML (see `trimtab.config.study`), and the runs that it is made of.

study = load_study(Path("study.yaml"), ["train.epochs=1"])
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from trimtab.config.read import build_config
from trimtab.config.run import RunConfig
from trimtab.config.study import ONE_TASK, Settings, StudyConfig, merge_settings, read_study
from trimtab.config.values import Rate
from trimtab.errors import ConfigError, did_you_mean
from trimtab.studies.cell import digest


@dataclass(frozen=True)
class Cell:
    """One run of a study; ``searching`` is whether it tries a learning rate."""

    task: str
    arm: str
    seed: int
    searching: bool
    config: RunConfig

    @property
    def name(self) -> str:
        """What the run is called in messages."""
        turn = f"search at rate {self.config.train.rate:g}" if self.searching else f"seed {self.seed}"
        return f"{self.arm} on {self.task}, {turn}" if self.task != ONE_TASK else f"{self.arm}, {turn}"

    @property
    def learning_rate(self) -> Rate:
        """That of its configuration; see the cell's record for the one that was found."""
        return self.config.train.learning_rate


@dataclass(frozen=True)
class Study:
    """A study that was read, with the configuration of each of its runs."""

    file: Path
    folder: Path
    """Where its results go."""
    said: StudyConfig
    configs: dict[tuple[str, str], RunConfig]
    """(task, arm) -> its run, before search and seed."""
    search_configs: dict[tuple[str, str], RunConfig]
    """The same, of the runs that search."""

    @property
    def title(self) -> str:
        return self.said.title or self.file.stem

    def series(self, arm: str) -> str | None:
        """The line that ``arm`` is on."""
        return self.said.arms[arm].get("series")

    def against(self, arm: str) -> str | None:
        """The arm that ``arm`` is compared with; None for none."""
        other: str | None = self.said.arms[arm].get("against", self.said.reference)
        return None if other == arm else other

    def searches(self, task: str, arm: str) -> list[Cell]:
        """The runs that find the learning rate of an arm; none without a search, or of an arm that is not trained."""
        if (task, arm) not in self.search_configs:
            return []
        assert self.said.search is not None
        config, seed = self.search_configs[task, arm], self.said.search.seed
        rates = [float(f"{factor * config.train.rate:.4g}") for factor in self.said.search.factors]
        return [self._cell(task, arm, config, seed, rate, searching=True) for rate in rates]

    def runs(self, task: str, arm: str, learning_rate: Rate | None) -> list[Cell]:
        """The runs of an arm on a task, by seed; one run of an arm that is not trained.

        ``learning_rate``: what the search found; None for the arm's own.
        """
        config = self.configs[task, arm]
        rate = learning_rate or config.train.learning_rate
        seeds = self.said.seeds if config.train.epochs else self.said.seeds[:1]
        return [self._cell(task, arm, config, seed, rate, searching=False) for seed in seeds]

    def _cell(self, task: str, arm: str, config: RunConfig, seed: int, rate: Rate, *, searching: bool) -> Cell:
        train = config.train.model_copy(update={"seed": seed, "learning_rate": rate})
        config = config.model_copy(update={"train": train})
        name = f"rate-{rate:g}" if isinstance(rate, float) and searching else f"seed-{seed}"
        folder = self.folder / "cells" / task.replace(" ", "-") / arm.replace(" ", "-") / f"{name}-{digest(config)}"
        return Cell(task, arm, seed, searching, config.model_copy(update={"output": folder}))


def load_study(path: Path | str, overrides: Sequence[str] = (), *, out: Path | None = None) -> Study:
    """Read a study's YAML and make the configuration of each of its runs.

    Args:
        path: the YAML. Paths in it are relative to its folder.
        overrides: ``key.sub=value``, put into ``base`` in order.
        out: the study's folder in place of what the YAML says.

    Raises:
        ConfigError: the file is missing or not YAML; a key is unknown or a value not what it should be, in the study
            or in the run of one of its arms; names the arm.
    """
    file = Path(path)
    said = read_study(StudyConfig, file, overrides)
    configs: dict[tuple[str, str], RunConfig] = {}
    search_configs: dict[tuple[str, str], RunConfig] = {}
    for task, arm, place, settings in _merged(said, file):
        configs[task, arm] = config = build_config(deepcopy(settings), file.parent, place)
        if not config.data.test:
            raise ConfigError(f"{place}: data.test: missing. A study compares arms on test rows.")
        if said.search is not None and config.train.epochs:
            place = f"{place}, search"
            if configs[task, arm].train.learning_rate == "auto":
                raise ConfigError(
                    f"{place}: factors multiply train.learning_rate, which is auto here; leave the search out, or name "
                    "a rate"
                )
            search = merge_settings(settings, said.search.settings)
            search["data"].pop("test", None)  # no rate is chosen, or even seen, by test rows
            search_configs[task, arm] = build_config(search, file.parent, place)
            if search_configs[task, arm].data.validation is None:
                raise ConfigError(f"{place}: data.validation: missing. The learning rate is chosen on such rows.")
    _check_means(said, file, [config.data.test for config in configs.values()])
    folder = out or file.parent / (said.output or file.stem)
    return Study(file, folder.absolute(), said, configs, search_configs)


def _check_means(said: StudyConfig, file: Path, tested: Sequence[Collection[str]]) -> None:
    known = {test for tests in tested for test in tests}
    for name, sets in said.means.items():
        for test in sets:
            if test not in known:
                raise ConfigError(f"{file}: means: '{name}': '{test}' is no test set.{did_you_mean(test, known)}")
        if name in known:
            raise ConfigError(f"{file}: means: '{name}' is the name of a test set; give the mean another")
        if not any({*sets} <= {*tests} for tests in tested):
            raise ConfigError(f"{file}: means: '{name}': no task has all of {', '.join(sets)} among its test sets")


def _merged(said: StudyConfig, file: Path) -> Iterator[tuple[str, str, str, Settings]]:
    for task, of_task in said.tasks.items():
        for arm, of_arm in said.arms.items():
            run = {key: value for key, value in of_arm.items() if key not in ("series", "against")}
            settings = merge_settings(merge_settings(said.base, of_task), run)
            settings["output"] = str(file.parent)  # each cell has a folder of its own
            place = f"{file}: arm '{arm}'" + (f" on task '{task}'" if len(said.tasks) > 1 else "")
            yield task, arm, place, settings
