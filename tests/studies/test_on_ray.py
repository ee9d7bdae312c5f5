"""Studies whose runs are done elsewhere: what is sent, what is sent again, and what comes home.

A stand-in for Ray does a task in this process when it is waited for, so that these tests need no Ray; that a real one
does the same is tried in test_ray.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.errors import ConfigError, Interrupted, RunError
from trimtab.machine import GIB
from trimtab.studies import carry, on_ray, ray_task
from trimtab.studies.carry import with_header
from trimtab.studies.cell import run_cell
from trimtab.studies.on_ray import TRIES, Cluster, Needs, place
from trimtab.studies.places import HERE, Errand
from trimtab.studies.process import run_here
from trimtab.studies.ray_task import VERSION, do_run, word

pytestmark = pytest.mark.usefixtures("bare_runs")


class RayError(Exception): ...


class WorkerCrashedError(RayError): ...


class RayTaskError(RayError): ...


class Ref:
    """What is promised; ``told`` is there at once."""

    def __init__(self, make: Callable[[], Any], told: bool = False) -> None:
        self._make, self.told = make, told

    @cached_property
    def result(self) -> Any:
        return self._make()


class FakeRay:
    """As much of Ray as `Cluster` calls. ``results``: what the next tasks give or raise, in place of what they do."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=RayTaskError,
        RuntimeEnvSetupError=type("RuntimeEnvSetupError", (RayError,), {}),
        TaskCancelledError=type("TaskCancelledError", (RayError,), {}),
        RayActorError=type("RayActorError", (RayError,), {}),
    )

    def __init__(self, machines: list[dict[str, float]] | None = None) -> None:
        self.machines = machines or [{"CPU": 2.0, "memory": 8.0 * GIB}]
        self.results: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.cancelled: list[Any] = []
        self.stuck = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": machine} for machine in self.machines]

    def remote(self, subject: Any = None, **settings: Any) -> Any:
        if subject is None:
            return lambda actor: SimpleNamespace(remote=lambda: FakeActor(actor()))

        def options(**asked: Any) -> Any:
            def send(*arguments: Any) -> Any:
                self.asked.append(asked)
                result = self.results.pop(0) if self.results else None
                return Ref(lambda: subject(*arguments) if result is None else result)

            return SimpleNamespace(remote=send)

        return SimpleNamespace(options=options)

    def put(self, value: bytes) -> Any:
        return Ref(lambda: value, told=True)

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float = 0) -> tuple[list[Ref], list[Ref]]:
        if self.stuck and not refs[0].told:
            return [], refs
        refs[0].result  # noqa: B018 -- a task goes on while it is waited for
        return refs[:1], refs[1:]

    def get(self, ref: Ref, timeout: float = 0) -> Any:
        if isinstance(ref.result, Exception):
            raise ref.result
        return ref.result

    def cancel(self, task: Ref, force: bool) -> None:
        self.cancelled.append(task)


class FakeActor:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            result = getattr(self._actor, name)(*arguments)

            return Ref(lambda: result, told=True)

        return SimpleNamespace(remote=call)


class Heard(Errand):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.words: list[str] = []

    def began(self, where: str) -> None:
        self.words.append("began")

    def told(self, words: str) -> None:
        self.words.append(words)

    def training_began(self, step: int, steps: int) -> None:
        self.words.append(f"{step} of {steps}")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A stand-in, in which runs are done in this process."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(ray_task, "run_apart", run_here)
    monkeypatch.setattr(on_ray, "peak_memory", lambda config: GIB)
    monkeypatch.setattr(on_ray, "OFTEN", 0)
    return fake


@pytest.fixture
def config(make_config: Callable[..., Any], tmp_path: Path) -> Any:
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "fog over berth ", "completion": "watch"}) + "\n")
    data = {"test": {"harbour": "test.jsonl"}, "validation": 0.25}
    train = {"max_steps": 2, "batch_size": 4, "precision": "float32"}
    made = make_config(data=data, train=train, evaluation={"before": False})
    return made.model_copy(update={"output": tmp_path / "cells" / "one"})


TIMED = ("seconds", "memory", "tokens_per_second", "created")


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not any(word in key for word in TIMED)}
    return [untimed(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("links", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_cell_that_was_done_elsewhere_is_the_cell_that_would_be_done_here(
    ray: FakeRay, config: Any, links: bool, here: None, tmp_path: Path
) -> None:
    errand = Heard(config)
    (outcome,) = Cluster(ray, links=links).bring([errand])
    assert outcome == (0, None)
    assert errand.words == ["began", "0 of 2"]
    there = run_cell(config)
    for file in config.output.rglob("*.json"):
        assert "trimtab-" not in file.read_text(), file
    alone = run_cell(config.model_copy(update={"output": tmp_path / "cells" / "two"}))
    assert untimed(there.plain()) == untimed(alone.plain())
    assert ray.asked == [
        {"num_cpus": int(on_ray.os.environ.get("OMP_NUM_THREADS", 2)), "num_gpus": 0, "memory": GIB, "max_retries": 0}
    ]


def test_what_is_done_is_not_sent(ray: FakeRay, config: Any, here: None) -> None:
    run_cell(config)
    assert list(Cluster(ray).bring([Heard(config)])) == [(0, None)]
    assert ray.asked == []


def test_a_run_whose_worker_is_lost_is_sent_again(ray: FakeRay, config: Any) -> None:
    ray.results = [WorkerCrashedError("the worker died"), with_header({"failed": "but it came to an end"})]
    errand = Heard(config)
    ((_, failure),) = Cluster(ray).bring([errand])
    assert len(ray.asked) == 2
    assert errand.words == ["its worker was lost (its process ended); it is begun again", "began"]
    assert str(failure) == "but it came to an end"


def test_it_is_not_sent_for_ever(ray: FakeRay, config: Any) -> None:
    ray.results = [WorkerCrashedError("the worker died")] * TRIES
    ((_, failure),) = Cluster(ray).bring([Heard(config)])
    assert isinstance(failure, RunError)
    assert f"its worker was lost {TRIES} times" in str(failure)
    assert len(ray.asked) == TRIES


def test_a_run_that_fails_by_itself_is_not_sent_again(ray: FakeRay, config: Any, here: None) -> None:
    wrong = config.model_copy(update={"plan": ({"match": "*.x_proj", "method": "lora", "rank": 2},)})
    ((_, failure),) = Cluster(ray).bring([Heard(wrong)])
    assert len(ray.asked) == 1
    with pytest.raises(RunError) as alone:
        run_cell(wrong)
    assert str(failure) == str(alone.value)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (
            RayTaskError("x\nNo module named 'trimtab'"),
            r"No module named .* install trimtab\[ray\]",
        ),
        (b"\x80\x05cposix\nsystem\n.", "no parcel of ours"),
        (with_header({"files": [["../../x", 0]]}), "none of a run's"),
        (with_header({"failed": "\x1b[2Jno"}), r"\\x1b\[2Jno"),
    ],
)
def test_what_comes_home_in_place_of_a_run_is_a_failure(ray: FakeRay, config: Any, result: Any, said: str) -> None:
    ray.results = [result]
    ((_, failure),) = Cluster(ray).bring([Heard(config)])
    with pytest.raises(RunError, match=said):
        raise failure or AssertionError
    assert not (config.output / "run").exists()


def test_a_listener_that_has_enough_ends_its_run(ray: FakeRay, config: Any) -> None:
    class Enough(Heard):
        def training_began(self, step: int, steps: int) -> None:
            raise Interrupted("behind the others")

    ((_, failure),) = Cluster(ray).bring([Enough(config)])
    assert str(failure) == "behind the others"
    assert len(ray.cancelled) == 1


def test_when_the_study_is_stopped_its_tasks_are_cancelled(ray: FakeRay, config: Any) -> None:
    cluster = Cluster(ray)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    ray.wait = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(cluster.bring([Heard(config)]))
    assert len(ray.cancelled) == 1


def test_what_no_machine_can_take_is_refused(ray: FakeRay, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "peak_memory", lambda config: 9 * GIB)
    ray.stuck = True
    ((_, failure),) = Cluster(ray, carries=False).bring([Heard(config)])
    assert "9.00 GiB, and no machine of the Ray cluster has that; the largest of 1 has 8.00 GiB" in str(failure)
    assert len(ray.cancelled) == 1


@pytest.mark.parametrize(
    ("memory", "machines", "runs", "threads", "needs"),
    [
        (GIB, [{"CPU": 2, "memory": 8 * GIB}], 5, None, Needs(1, GIB)),
        (GIB, [{"CPU": 2, "memory": 8 * GIB}], 1, None, Needs(2, GIB)),
        (5 * GIB, [{"CPU": 8, "memory": 11 * GIB}], 9, None, Needs(4, 5 * GIB)),
        (GIB, [{"CPU": 4, "memory": 8 * GIB}] * 2, 1, None, Needs(4, GIB)),  # no more than one machine has
        (GIB, [{"CPU": 8, "memory": 8 * GIB}], 1, "3", Needs(3, GIB)),
        (GIB, [{"CPU": 8, "memory": 8 * GIB}], 1, "many", Needs(8, GIB)),
        (GIB, [{"CPU": 8, "memory": 8 * GIB, "GPU": 2}, {"CPU": 64}], 1, None, Needs(4, 0, 1)),
        (0, [], 1, None, Needs(1, 0)),
    ],
)
def test_what_a_run_asks_for(memory: int, machines: Any, runs: int, threads: str | None, needs: Needs) -> None:
    assert Needs.of(memory, machines, runs, threads) == needs


def test_a_gpu_that_is_named_is_refused(ray: FakeRay, config: Any) -> None:
    ((_, failure),) = Cluster(ray).bring([Heard(config.model_copy(update={"device": "cuda:1"}))])
    assert "Ray gives each run one of its own; set device: cuda" in str(failure)
    assert not ray.asked


def test_a_run_on_the_processor_asks_for_no_gpu(ray: FakeRay, config: Any) -> None:
    ray.machines = [{"CPU": 4.0, "memory": 8.0 * GIB, "GPU": 2.0}]
    ray.results = [with_header({"failed": "no"})] * 2
    cluster = Cluster(ray)
    for device in ("auto", "cpu"):
        list(cluster.bring([Heard(config.model_copy(update={"device": device}))]))
    assert [(asked["num_gpus"], asked["memory"]) for asked in ray.asked] == [(1, None), (0, GIB)]


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[1]", '["a", "note", "b"]', '[1, "__init__", "b"]', '[1, "note", {}]', '[1, "step", 1]', "[1, [], 1]"],
)
def test_only_what_a_listener_hears_is_a_word(line: str) -> None:
    assert word(line) is None
    assert word('[1, "step", 1, 2]') == (1, "step", [1, 2])


def test_another_version_over_there_is_refused(ray: FakeRay) -> None:
    parcel = do_run(json.dumps({"version": "0.0.1", "number": 0}), {}, None)
    said = carry.header_of(parcel)["failed"]
    assert f"has trimtab {VERSION}, and the study is run by 0.0.1" in said


def test_a_model_of_that_name_with_other_weights_is_refused(
    ray: FakeRay, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(ray)
    meanings = iter(["the weights from a wheel, a", "the weights from the hub"])
    monkeypatch.setattr(carry, "model_words", lambda config: next(meanings))
    ((_, failure),) = cluster.bring([Heard(config)])
    assert "from the hub on the machine" in str(failure)


@pytest.mark.parametrize("said", ["rey", "ray:7", "http://host", ""])
def test_another_place_is_a_mistake(said: str) -> None:
    with pytest.raises(ConfigError, match="expected ray"), place(said):
        pass


def test_without_a_word_runs_are_done_here() -> None:
    with place(None) as there:
        assert there is HERE


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'trimtab\[ray\]'"), place("ray"):
        pass
