"""A whole search: within the budget, nothing twice, resumed where it stopped, and a best plan that runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import event
from sqlalchemy.engine import Engine

from source_paths import paths
from tiny_runs import cell_of, rows, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.config.search import load_explore
from trimtab.errors import ConfigError, Interrupted, PlanError, RunError
from trimtab.files import read_json
from trimtab.runs.folder import RunFolder
from trimtab.runs.study_records import CellRecord
from trimtab.studies import cell, explore as whole, plan_search
from trimtab.studies.explore import explore
from trimtab.studies.places import Errand, Outcome
from trimtab.studies.plan_search import SearchListener
from trimtab.studies.process import run_here
from trimtab.training.run import finetune

Make = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("bare_runs")


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, so that there are inner ones."""
    return write_model(tmp_path_factory.mktemp("deep") / "tiny", num_hidden_layers=4)


@pytest.fixture
def make_search(tmp_path: Path, deep_model: Path) -> Make:
    """A search's configuration; ``base`` sections are merged into a short run's, other keywords replace."""

    def make(*overrides: str, base: dict[str, Any] | None = None, **said: Any) -> Any:
        run: dict[str, Any] = {
            "model": str(deep_model),
            "data": {"train": "rows.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
            "train": {
                "epochs": 1,
                "batch_size": 8,
                "learning_rate": 5e-3,
                "precision": "float32",
                "metric": "loss",
                "validate_every": 1,
            },
            "evaluation": {"before": False},
        }
        for name, section in (base or {}).items():
            run[name] = {**run[name], **section} if isinstance(section, dict) else section
        for name, count in (("rows", 24), ("validation", 9), ("test", 9)):
            write_rows(tmp_path / f"{name}.jsonl", rows(count))
        settings = {"base": run, "budget": "lora:6", "trials": 6, "output": str(tmp_path / "out"), **said}
        (tmp_path / "explore.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return load_explore(tmp_path / "explore.yaml", overrides)

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs take place here, which spares the start of a process; gives the names of the cells that ran."""
    ran: list[str] = []

    def run(config: Any, listener: Any) -> None:
        ran.append(config.output.parent.name)
        run_here(config, listener)

    monkeypatch.setattr(cell, "run_apart", run)
    return ran


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs of three validations that train nothing. The score is the share of MoRA among the groups, less 0.5 at the
    first step; ``ran`` holds the plans in order, and ``hook`` is called before every validation."""

    class Pretend:
        ran: list[str] = []  # noqa: RUF012 -- of this test alone, the class being made anew
        done: dict[str, Any] = {}  # noqa: RUF012
        hook: Callable[[str, int], None] = staticmethod(lambda name, step: None)

        score: Callable[[Any], float | None] = staticmethod(
            lambda config: sum(rule["method"] == "mora" for rule in config.plan) / 4
        )

        def cell(self, config: Any, listener: Any, **_: Any) -> CellRecord:
            name = config.output.name
            if name in self.done:
                return self.done[name]
            self.ran.append(name)
            listener.training_began(0, 3)
            lines = []
            for step in (1, 2, 3):
                self.hook(name, step)
                score = self.score(config)
                found = None if score is None else score - (0.5 if step == 1 else 0)
                lines.append({"kind": "validation", "step": step, "loss": 1.0, "accuracy": found})
                listener.metrics(lines[-1])
            self.done[name] = cell_of(lines)
            return self.done[name]

    made = Pretend()
    monkeypatch.setattr(plan_search, "run_cell", made.cell)
    monkeypatch.setattr(whole, "write_explore_page", lambda folder: None)
    return made


@pytest.fixture(autouse=True)
def hasty_sqlite() -> Iterator[None]:
    """SQLite that does not wait for the disk after every line."""

    def hasten(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hasten)
    yield
    event.remove(Engine, "connect", hasten)


def found_in(folder: Path) -> Any:
    return read_json(folder / "explore.json")


ACCURACY = {"train": {"metric": "accuracy"}}


@pytest.mark.full
def test_a_search_and_its_best_plan(make_search: Make, in_process: list[str], tmp_path: Path) -> None:
    config = make_search("confirm=2", prune=None)
    folder = explore(config)
    found = found_in(folder)
    own = [row for row in found["trials"] if row["same_as"] is None]
    assert [row["kind"] for row in own] == ["uniform"] * 3 + ["mixed"] * 3
    assert [row["state"] for row in own] == ["complete"] * 6
    for row in own:
        (run,) = (folder / "trials").glob(".".join(f"{p['method']}{p['rank'] or ''}" for p in row["parts"]) + "/run")
        assert read_json(run / "summary.json")["trainable_parameters"] == row["parameters"] <= found["budget"]
        assert row["kind"] == "uniform" or row["parameters"] >= 0.95 * found["budget"]
        assert row["score"] == min(value for _, value in row["validations"])
        assert not (run / "evaluation").exists()  # nothing is chosen by test rows
    best = min(own, key=lambda row: row["score"])
    assert found["best"] == best["number"]
    assert found["best"] in (found["best_mixed"], found["best_uniform"])

    # The best plan, as it is handed out, is a whole run that gives the score that it was chosen for.
    loaded = load_config(folder / "best.yaml")
    assert str(tmp_path) not in (folder / "best.yaml").read_text(encoding="utf-8")
    assert loaded.output == Path.cwd() / "runs" / f"{folder.name}-best"
    assert list(loaded.data.test) == ["test"]
    run = finetune(loaded.model_copy(update={"output": tmp_path / "again"}))
    assert min(row.loss for row in run.read_metrics() if row.kind == "validation") == best["score"]
    assert run.evaluation("test", "after").is_file()

    # The confirmation: the two best plans, two new seeds, on the test rows.
    said = found["confirmation"]
    assert [row["seed"] for row in said["rows"]] == [1, 2]
    assert said["on"] == ["test"]
    assert said["low"] < said["difference"] < said["high"]
    assert len(in_process) == 6 + 4
    for name in ("explore.html", "explore_trials.svg", "explore_shared.png", "explore_confirmed.png"):
        assert (folder / name).stat().st_size > 1000

    # The same command again runs nothing, and more trials run only those.
    explore(config)
    assert len(in_process) == 10
    explore(make_search("trials=7", "confirm=0", prune=None))
    assert len(in_process) == 11


@pytest.mark.full
def test_the_sampler_learns_what_scores(make_search: Make, pretend: Any) -> None:
    explore(make_search("trials=20", "prune=null", base=ACCURACY, methods=["lora", "mora"], budget="mora:8"))
    scores = [pretend.done[name].kept.figures["accuracy"] for name in pretend.ran]
    assert sum(scores[-6:]) / 6 > sum(scores[2:8]) / 6 + 0.2


@pytest.mark.full
def test_what_is_known_is_told_and_not_run(make_search: Make, pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "_IDLE", 12)
    groups = {"attention": {"match": "*attn.*"}, "mlp": {"match": "*.mlp.*"}}
    kept: list[str] = []

    class Notes(SearchListener):
        def note(self, text: str) -> None:
            kept.append(text)

    config = make_search("trials=500", base=ACCURACY, methods=["mora", "none"], groups=groups, prune="median")
    found = found_in(explore(config, Notes()))
    assert len(pretend.ran) == len(set(pretend.ran)) == found["runs"]
    repeated = [row for row in found["trials"] if row["same_as"] is not None]
    assert repeated
    by_number = {row["number"]: row for row in found["trials"]}
    for row in repeated:
        same = by_number[row["same_as"]]
        for key in ("parts", "score", "state", "validations", "learning_rate"):
            assert row[key] == same[key]
    assert found["unfit"] > 0  # both groups none
    assert any("the last 12 proposals were known already" in text for text in kept)


@pytest.mark.parametrize("pruner", ["median", pytest.param("hyperband", marks=pytest.mark.full)])
def test_what_is_behind_is_left(make_search: Make, pretend: Any, pruner: str) -> None:
    pretend.score = lambda config: zlib.crc32(config.output.name.encode()) % 100 / 100
    # Nine uniform plans: more than it takes for the first pruning.
    found = found_in(explore(make_search("trials=18", base=ACCURACY, prune=pruner, learning_rates=[1e-3, 2e-3, 4e-3])))
    states = {(row["kind"], row["state"]) for row in found["trials"]}
    assert ("mixed", "pruned") in states
    assert ("mixed", "complete") in states
    assert ("uniform", "pruned") not in states
    for row in found["trials"]:
        if row["state"] == "pruned":
            assert row["score"] == row["validations"][-1][1]
    assert (
        found["best"]
        == max((row for row in found["trials"] if row["state"] == "complete"), key=lambda row: row["score"])["number"]
    )


@pytest.mark.full
def test_a_pruned_run_is_left_in_order(make_search: Make, in_process: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(plan_search.Search, "_pruner", lambda self: _Impatient())
    folder = explore(make_search("trials=4"))
    (row,) = [row for row in found_in(folder)["trials"] if row["state"] == "pruned"]
    assert [step for step, _ in row["validations"]] == [1]
    run = RunFolder(folder / "trials" / in_process[-1] / "run")
    assert run.read_summary().status == "interrupted"
    assert [line.step for line in run.read_metrics() if line.kind == "validation"] == [1]
    assert not run.checkpoints.exists()
    assert run.report.is_file()


class _Impatient:
    def prune(self, study: Any, trial: Any) -> bool:
        return True


def test_trials_of_other_rows_are_not_compared_with_new_ones(
    make_search: Make, in_process: list[str], tmp_path: Path
) -> None:
    folder = explore(make_search("trials=1", methods=["lora"]))
    config = load_explore(tmp_path / "explore.yaml", ["trials=2"])
    write_rows(tmp_path / "validation.jsonl", rows(12))
    with pytest.raises(
        RunError, match="the rows have changed since the search began, so its trials cannot be compared"
    ):
        explore(config)
    (folder / "trials" / in_process[0] / "cell.json").unlink()  # whoever clears the runs away goes on with the scores
    assert found_in(explore(config))["runs"] == 2


def test_a_database_that_is_damaged_or_full_is_told(make_search: Make, pretend: Any) -> None:
    config = make_search("trials=1", base=ACCURACY)
    file = explore(config) / "study.db"
    whole_one = file.read_bytes()
    for damage in (b"no database" * 100, whole_one[: len(whole_one) // 2]):
        file.write_bytes(damage)
        with pytest.raises(RunError, match=r"study\.db: .* damaged\. Remove it and go on: .* nothing is run again"):
            explore(config)
    file.unlink()
    assert found_in(explore(config))["runs"] == 1
    assert len(pretend.ran) == 1

    def limit(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")

    event.listen(Engine, "connect", limit)
    try:
        with pytest.raises(RunError, match=r"study\.db: .*\(database or disk is full\); see that there is room"):
            explore(make_search("trials=30", base=ACCURACY))
    finally:
        event.remove(Engine, "connect", limit)


def test_it_goes_on_where_it_stopped(make_search: Make, pretend: Any, tmp_path: Path) -> None:
    uncut = found_in(explore(make_search("trials=10", f"output={tmp_path / 'uncut'}", base=ACCURACY)))
    pretend.ran.clear()
    pretend.done.clear()

    def stop(name: str, step: int) -> None:
        if len(pretend.ran) in (2, 7) and step == 2 and name not in stopped:
            stopped.append(name)
            raise KeyboardInterrupt

    stopped: list[str] = []
    pretend.hook = stop
    config = make_search("trials=10", base=ACCURACY)
    for _ in range(2):
        with pytest.raises(Interrupted, match=r"Go on with: trimtab explore .*out/explore.yaml"):
            explore(config)
    # As the message says: the file in the folder is the same search.
    found = found_in(explore(load_explore(config.output / "explore.yaml")))
    assert found["runs"] == 10
    again = [name for name in pretend.ran if pretend.ran.count(name) > 1]
    assert sorted(set(again)) == sorted(stopped)  # only what was cut off was begun twice
    assert all(pretend.ran.count(name) <= 2 for name in pretend.ran)

    def plans(said: Any) -> Any:
        return [(row["parts"], row["state"], row["score"], row["validations"]) for row in said["trials"]]

    assert plans(found) == plans(uncut)


def test_a_run_that_was_cut_off_continues_from_its_checkpoint(
    make_search: Make, in_process: list[str], monkeypatch: Any
) -> None:
    config = make_search("trials=1", "base.train.save_every=1")
    steps: list[int] = []

    class Stopping(SearchListener):
        def step(self, step: int, steps_: int) -> None:
            steps.append(step)
            if len(steps) == 2:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        explore(config, Stopping())
    found = found_in(explore(config, Stopping()))
    assert steps == [1, 2, 2, 3]  # step 2 had no checkpoint yet when it was cut off
    (row,) = found["trials"]
    assert [step for step, _ in row["validations"]] == [1, 2, 3]


def test_a_run_that_fails_is_no_reason_to_stop(make_search: Make, pretend: Any) -> None:
    def fail(name: str, step: int) -> None:
        if name.startswith("dora"):
            raise RunError("training has diverged")

    pretend.hook = fail
    found = found_in(explore(make_search("trials=8", base=ACCURACY)))
    failed = [row for row in found["trials"] if row["state"] == "failed"]
    assert failed[0]["why"] == "training has diverged"
    assert failed[0]["kind"] == "uniform"
    assert found["runs"] == 8


def test_a_plan_without_a_score_has_failed(make_search: Make, pretend: Any) -> None:
    """As a correlation is not there where all answers are alike."""
    pretend.score = lambda config: None if config.output.name.startswith("dora") else 0.5
    found = found_in(explore(make_search("trials=8", base=ACCURACY)))
    failed = [row for row in found["trials"] if row["state"] == "failed"]
    assert failed[0]["why"].startswith("train.metric: accuracy: the validation has no figure of it")
    assert found["runs"] == 8


def test_a_first_run_that_fails_is_one(make_search: Make, pretend: Any) -> None:
    def fail(name: str, step: int) -> None:
        raise RunError("training has diverged")

    pretend.hook = fail
    with pytest.raises(RunError, match="diverged"):
        explore(make_search(base=ACCURACY))
    assert len(pretend.ran) == 1


def test_a_search_that_ends_in_an_error_has_its_page(
    make_search: Make, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[Path] = []
    monkeypatch.setattr(whole, "write_explore_page", pages.append)
    config = make_search("trials=2", "confirm=1", base=ACCURACY)
    with pytest.raises(RunError, match="no mixed plan beside a uniform one"):
        explore(config)
    assert pages == [config.output]


@pytest.mark.full
def test_learning_rates_are_searched_and_uniform_plans_get_each(make_search: Make, pretend: Any) -> None:
    found = found_in(explore(make_search("trials=12", base=ACCURACY, learning_rates=[1e-3, 5e-3])))
    first = [(row["kind"], row["parts"][0]["method"], row["learning_rate"]) for row in found["trials"][:6]]
    assert first == [("uniform", method, rate) for method in ("lora", "dora", "mora") for rate in (1e-3, 5e-3)]
    assert {row["learning_rate"] for row in found["trials"][6:]} == {1e-3, 5e-3}


# --- what is wrong is said


@pytest.mark.parametrize(
    ("overrides", "said", "kind", "message"),
    [
        (["budget=1000"], {}, ConfigError, "budget: no uniform plan fits into 1,000 trained parameters; at rank 1"),
        (["base.data.validation=null"], {}, ConfigError, "base.data.validation: is null, but plans are chosen by"),
        (["base.train.metric=auto"], {}, ConfigError, "base.train.metric: name what is to be improved"),
        (["base.train.lerning_rate=1"], {}, ConfigError, "command line: base.train.lerning_rate: unknown key. Did you"),
        (["base.plan=[]"], {}, ConfigError, "base.plan: is what is searched; leave it out"),
        (["trails=3"], {}, ConfigError, "command line: trails: unknown key. Did you mean 'trials'"),
        (["budget=lora8"], {}, ConfigError, 'budget: expected a number of trained parameters, or .*"lora:8"'),
        (["methods=[none]"], {}, ConfigError, "methods: expected a method beside none"),
        (["outer=2"], {}, PlanError, "outer: 2 blocks at each end leave none between, the model has 4"),
        ([], {"groups": {"heads": {"match": "*.q_prof"}}}, PlanError, r"groups.heads: .*Near misses: \*.q_proj"),
        ([], {"groups": {"a": {"match": "*", "layer": "all"}}}, ConfigError, "groups.a.layer: unknown key"),
        (["outer=1"], {"groups": {"a": {"match": "*attn*"}}}, ConfigError, "outer: belongs to the default groups"),
    ],
)
def test_a_search_that_cannot_be(
    make_search: Make, overrides: list[str], said: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        explore(make_search(*overrides, **said))


def test_a_base_key_of_the_file_is_named_in_full(make_search: Make) -> None:
    with pytest.raises(ConfigError, match=r"explore.yaml: base.train.epoch: unknown key. Did you mean 'epochs'"):
        make_search(base={"train": {"epoch": 3}})


def test_without_optuna(make_search: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_search()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    with pytest.raises(RunError, match=r"needs optuna.*pip install 'trimtab\[explore\]'"):
        explore(config)


def test_other_settings_are_refused(make_search: Make, pretend: Any) -> None:
    explore(make_search("trials=3", base=ACCURACY))
    with pytest.raises(RunError, match=r"began with other settings \(base.train.learning_rate, budget\)"):
        explore(make_search("budget=lora:5", "base.train.learning_rate=1e-3", base=ACCURACY))


def test_a_folder_of_something_else_is_left_alone(make_search: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty, and holds no search"):
        explore(make_search())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_at_once_are_refused(make_search: Make, pretend: Any) -> None:
    config = make_search("trials=3", base=ACCURACY)

    def again(name: str, step: int) -> None:
        with pytest.raises(RunError, match=r"another process .* is at work here"):
            explore(config)

    pretend.hook = again
    assert found_in(explore(config))["runs"] == 3


def test_the_resolved_file_gives_the_same_search(make_search: Make, pretend: Any) -> None:
    config = make_search("trials=3", base=ACCURACY, methods={"lora": {"alpha": 3.0}, "mora": None})
    explore(config)
    again = load_explore(config.output / "explore.yaml")
    assert json.dumps(again.model_dump(mode="json", exclude={"base": {"output"}})) == json.dumps(
        config.model_dump(mode="json", exclude={"base": {"output"}})
    )


def test_a_search_goes_on_where_it_was_moved_to(make_search: Make, pretend: Any, tmp_path: Path) -> None:
    """With its rows, at the same depth as before, where the model is seen the same way."""
    config = make_search("trials=3", base=ACCURACY)
    explore(config)
    assert str(tmp_path) not in (config.output / "explore.yaml").read_text(encoding="utf-8")
    there = Path(shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved")))
    moved = load_explore(there / "out" / "explore.yaml", ["trials=4"])
    assert moved.output == there / "out"
    assert paths(moved.base.data.train) == (str(there / "rows.jsonl"),)
    pretend.ran.clear()
    assert found_in(explore(moved))["runs"] == 4
    assert len(pretend.ran) == 1


def test_published_results_without_the_search_are_begun_anew(make_search: Make, pretend: Any) -> None:
    """As a repository ships them: the settings, the findings and the page, but neither optuna's file nor the runs."""
    config = make_search("trials=3", base=ACCURACY)
    before = found_in(explore(config))
    (config.output / "study.db").unlink()
    pretend.ran.clear()
    pretend.done.clear()
    again = found_in(explore(load_explore(config.output / "explore.yaml")))
    assert len(pretend.ran) == 3
    first, second = ([{**trial, "seconds": 0} for trial in found["trials"]] for found in (before, again))
    assert first == second


class Backwards:
    """A place where the runs that are sent together end the other way round."""

    several = True

    def __init__(self, fails: int | None = None) -> None:
        self.together: list[int] = []
        self.left = fails

    def bring(self, errands: Sequence[Errand]) -> Iterator[Outcome]:
        self.together.append(len(errands))
        for number in reversed(range(len(errands))):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            errands[number].began("elsewhere")
            yield number, None


@pytest.mark.full
def test_what_is_proposed_together_does_not_depend_on_where_it_runs(
    make_search: Make, pretend: Any, tmp_path: Path
) -> None:
    said = {"base": ACCURACY, "methods": ["lora", "mora"], "budget": "mora:8"}

    def trials(name: str, **how: Any) -> list[Any]:
        if not (tmp_path / name).exists():
            pretend.done.clear()
        folder = explore(make_search("trials=12", "at_once=4", output=str(tmp_path / name), **said), **how)
        # A trial that was cut off has a new number when it is run again.
        left_out = ("seconds", "number", "same_as")
        return [{key: row[key] for key in row if key not in left_out} for row in found_in(folder)["trials"]]

    here = trials("here")
    there = Backwards()
    assert trials("there", on=there) == here
    assert there.together == [4, 4, 4]
    assert sum(row["state"] == "pruned" for row in here) > 0
    with pytest.raises(Interrupted):
        trials("stopped", on=Backwards(fails=6))  # in the middle of the second round
    assert trials("stopped") == here
