"""``explore``: search for the plan that does best on the validation rows within one budget of trained parameters.

    folder = explore(load_explore(Path("explore.yaml")))

optuna's TPE proposes a method and a weight for each group of modules; ``search_space`` makes ranks of them that
spend the budget. Uniform plans of the same budget run first. The output folder holds

    explore.yaml        the resolved configuration
    study.db            optuna's study (SQLite), written after every step of the search
    trials/NAME/        a cell for each plan that was run; see ``cell``
    confirm/NAME/       runs with new seeds
    explore.json        the trials, the best ones and what the new seeds gave
    best.yaml, best_mixed.yaml, best_uniform.yaml    runs for ``trimtab finetune``

A search that was cut off goes on: what is done is read from disk, and the run at hand continues from its checkpoint.
The draws depend on the seed and the number of proposals so far, so that a search that was interrupted proposes what an
uninterrupted one does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimtab.config.search import ExploreConfig, load_explore, search_to_yaml
from trimtab.errors import STOPS, Interrupted, RunError, TrimtabError
from trimtab.files import write_text
from trimtab.hints import pasted
from trimtab.models.load import empty_model
from trimtab.reports.search.search_page import write_explore_page
from trimtab.runs.beginning import differences
from trimtab.runs.lock import locked
from trimtab.studies.places import HERE, Place
from trimtab.studies.plan_search import Search, SearchListener
from trimtab.studies.search_space import Space, default_groups, find_groups
from trimtab.tasks import job_of


def explore(config: ExploreConfig, listener: SearchListener | None = None, *, on: Place = HERE) -> Path:
    """Do the whole search, or what is left of it, and return its folder. Its runs are done ``on`` this machine or
    elsewhere, ``at_once`` of them at a time.

    Raises:
        TrimtabError: any mistake in the configuration, the data or the model; optuna is not installed; the folder
            holds something else.
        Interrupted: by the user; the same command goes on.
    """
    if importlib.util.find_spec("optuna") is None:
        raise RunError("trimtab explore needs optuna, which is not installed: pip install 'trimtab[explore]'")
    listener = listener or SearchListener()
    model = empty_model(job_of(config.base).source)
    said = {name: (group.match, group.layers) for name, group in config.groups.items()}
    groups = find_groups(model, said or default_groups(model, config.outer))
    space = Space(groups, config.methods, config.budget, config.at_least)
    _introduce(space, listener)
    with _alone(config), _database(config.output / "study.db") as database:
        search = Search(config, space, database, listener, on)
        search.require_same_files()
        try:
            search.run()
            search.write(search.confirm() if config.confirm else None)
            write_explore_page(config.output)
        except (Interrupted, *STOPS) as stop:
            search.write()
            write_explore_page(config.output)
            raise Interrupted.by(
                stop,
                f"interrupted; everything so far is in {config.output}\nGo on with: "
                f"{pasted('explore', config.output / 'explore.yaml')}",
            ) from None
        except TrimtabError:
            with suppress(OSError, TrimtabError):  # the first error is the one to tell
                search.write()
                write_explore_page(config.output)
            raise
    return config.output


def _introduce(space: Space, listener: SearchListener) -> None:
    """Say what is searched."""
    listener.stage(f"Plans of at most {space.budget:,} trained parameters")
    listener.note("groups: " + ", ".join(f"{group.name} ({group.modules} modules)" for group in space.groups))
    for method in space.trained:
        if (plan := space.uniform(method)) is not None:
            listener.note(f"uniform {method} of rank {plan[0].rank}: {space.parameters(plan):,} parameters")


@contextmanager
def _database(file: Path) -> Iterator[Any]:
    """The database ``file`` as optuna's storage, closed at the end. What SQLite raises of it becomes a RunError that
    says what to do."""
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    try:
        database = RDBStorage(f"sqlite:///{file}")
        try:
            yield database
        finally:
            database.remove_session()
            database.engine.dispose()
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        said = str(getattr(cause, "orig", None) or cause or error)
        if "malformed" in said or "not a database" in said:
            helps = "it is damaged. Remove it and go on: of what is done, nothing is run again"
        else:
            helps = "see that there is room and that it can be written, and go on with the same command"
        raise RunError(f"{file}: the search's database refuses ({said}); {helps}") from error


@contextmanager
def _alone(config: ExploreConfig) -> Iterator[None]:
    """Make the folder of the search, or go on with the one that is there, and keep other processes out of it."""
    folder, file = config.output, config.output / "explore.yaml"
    if file.is_file():
        free: Any = {"trials": True, "confirm": True, "at_once": True, "output": True, "base": {"plan", "output"}}
        before, now = (one.model_dump(mode="json", exclude=free) for one in (load_explore(file), config))
        if changed := sorted(differences(before, now)):
            raise RunError(
                f"{folder}: the search there began with other settings ({', '.join(changed)}); choose another output, "
                f"or go on with its own: {pasted('explore', file)}"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: not empty, and holds no search; choose another output")
    with locked(folder / "study.lock"):
        write_text(file, search_to_yaml(config))
        yield
