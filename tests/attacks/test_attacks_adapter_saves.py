"""Saves that are cut off, and saves that meet: the folder then holds one whole adapter, or none that anybody loads."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import pairwise
import sampling
import trimtab
from adapter_tools import (
    OUR_FILES,
    PEFT_FILES,
    adapter_tensors,
    assert_unchanged,
    refused,
    same_tensors,
    state_of,
    trained,
)
from trimtab import AdapterError, Rule
from trimtab.adapters.formats import native, peft
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]
FILES = {"peft": PEFT_FILES, "ours": OUR_FILES}
CUTS = (
    list(itertools.product(FILES, FILES, ["before", "after"]))
    if sampling.everything
    else [
        tuple(row.values())
        for row in pairwise.cover({"old": list(FILES), "new": list(FILES), "cut": ["before", "after"]})
    ]
)


def adapter(make: Make, layout: str, alpha: float, seed: int = 5) -> nn.Module:
    """Two adapters of one layout differ in a setting that the tensors do not show, and in every tensor."""
    axis = "output" if layout == "peft" else "input"
    rule = Rule(match=["*.q_proj", "*.v_proj"], method="dora", rank=2, alpha=alpha, magnitude_axis=axis)
    return trained(make(), rule, seed=seed)


def meaning(model: nn.Module) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors, and what decides how they are used."""
    options: dict[str, Any] = {name: module.adapter.options for name, module in adapted_modules(model)}
    return adapter_tensors(model), [(name, one.scale, one.magnitude_axis) for name, one in options.items()]


def same(one: tuple[dict[str, Tensor], list[Any]], other: tuple[dict[str, Tensor], list[Any]]) -> bool:
    return same_tensors(one[0], other[0]) and one[1] == other[1]


class Cut(BaseException):
    """Ctrl-C in the middle. (Processes that are killed: see tests/faults.)"""


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int, *, done: bool) -> list[str]:
    """Interrupt the save at the ``step``-th change of the folder, after it was made (``done``) or before; returns what
    was called."""
    calls: list[str] = []

    def failing(kind: str) -> Callable[..., Any]:
        original = getattr(Path, kind)

        def call(self: Path, *arguments: Any, **keywords: Any) -> Any:
            if any(part.startswith(".saving-") for part in self.parent.parts) and kind == "unlink":
                return original(self, *arguments, **keywords)  # tidying up is no step of a save
            calls.append(f"{kind} {self.name}")
            if len(calls) == step and not done:
                raise Cut
            result = original(self, *arguments, **keywords)
            if len(calls) == step:
                raise Cut
            return result

        return call

    for kind in ("replace", "unlink", "mkdir"):
        monkeypatch.setattr(Path, kind, failing(kind))
    return calls


@pytest.mark.parametrize(("old", "new", "cut"), CUTS)
def test_a_save_that_is_cut_off_anywhere(
    old: str, new: str, cut: str, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = tiny_llama().state_dict()

    def fresh() -> nn.Module:
        model = tiny_llama()
        model.load_state_dict(base)
        return model

    before, after = adapter(tiny_llama, old, 4), adapter(tiny_llama, new, 8, seed=6)
    seen = set()
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        trimtab.save_adapter(before, folder)
        finished = False
        with monkeypatch.context() as patch:
            calls = cut_at(patch, step, done=cut == "after")
            try:
                trimtab.save_adapter(after, folder)
                finished = True
            except Cut:
                pass
        model = fresh()
        trimtab.load_adapter(model, folder)
        state = "old" if same(meaning(model), meaning(before)) else "new"
        assert same(meaning(model), meaning(before if state == "old" else after)), calls
        seen.add(state)
        # PEFT, which knows of no checks, must not take a mix either.
        if (folder / PEFT_FILES[0]).exists():
            theirs = PeftModel.from_pretrained(fresh(), folder)
            with torch.no_grad():
                tokens = torch.arange(8).reshape(1, 8)
                assert torch.allclose(theirs(tokens).logits, model(tokens).logits, rtol=0, atol=2e-6), calls
        # And the folder is fit for the next save.
        trimtab.save_adapter(after, folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES[new])
        if finished:
            assert state == "new"
            break
    assert seen == {"old", "new"}
    assert step > 5, "the failures were not where the changes are"


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_a_save_that_fails_while_writing_leaves_the_old_one(
    layout: str, error: type[BaseException], tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, an impatient user: whatever happens while the tensors are written, nothing has been touched."""
    model = tiny_llama()
    before = adapter(tiny_llama, layout, 4)
    trimtab.save_adapter(before, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())

    def half(path: Path, tensors: Any, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error("no space left on device")

    for writer in (native, peft):
        monkeypatch.setattr(writer, "write_tensors", half)
    with pytest.raises(AdapterError if error is OSError else error, match="no space left"):
        trimtab.save_adapter(adapter(tiny_llama, layout, 8, seed=6), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    trimtab.load_adapter(model, tmp_path)
    assert same(meaning(model), meaning(before))


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("mixed", [0, 1], ids=["old configuration", "old tensors"])
def test_a_mix_of_two_saves_is_refused(layout: str, mixed: int, tiny_llama: Make, tmp_path: Path) -> None:
    """As two processes that save into one folder could leave it: names and shapes fit, the scale does not."""
    for place, alpha in (("old", 4), ("new", 8)):
        trimtab.save_adapter(adapter(tiny_llama, layout, alpha), tmp_path / place)
    shutil.copy(tmp_path / "old" / FILES[layout][mixed], tmp_path / "new" / FILES[layout][mixed])
    refused(tiny_llama(), tmp_path / "new", "a save was interrupted, or one of")


def test_new_tensors_under_the_same_configuration_are_a_whole_adapter(tiny_llama: Make, tmp_path: Path) -> None:
    """Two steps of one training: the configuration is the same, whichever of the two wrote it."""
    for layout, files in FILES.items():
        for place, seed in (("old", 5), ("new", 6)):
            trimtab.save_adapter(adapter(tiny_llama, layout, 4, seed=seed), tmp_path / place)
        assert (tmp_path / "old" / files[0]).read_bytes() == (tmp_path / "new" / files[0]).read_bytes()


@pytest.mark.parametrize(("one", "other"), [("peft", "peft"), ("ours", "ours"), ("peft", "ours")])
def test_two_threads_save_into_one_folder(one: str, other: str, tiny_llama: Make, tmp_path: Path) -> None:
    models = [adapter(tiny_llama, one, 4), adapter(tiny_llama, other, 8, seed=6)]
    wanted = [meaning(model) for model in models]
    errors: list[BaseException] = []

    def save(model: nn.Module, start: threading.Barrier) -> None:
        try:
            start.wait()
            trimtab.save_adapter(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    for _ in range(15 if sampling.everything else 5):
        start = threading.Barrier(4)
        threads = [threading.Thread(target=save, args=(model, start)) for model in [*models, *models]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        fresh = tiny_llama()
        trimtab.load_adapter(fresh, tmp_path)
        assert any(same(meaning(fresh), want) for want in wanted)
        assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_save_left_does_no_harm(tiny_llama: Make, tmp_path: Path) -> None:
    model = adapter(tiny_llama, "peft", 4)
    trimtab.save_adapter(model, tmp_path)
    (tmp_path / ".saving-killed").mkdir()
    for name in (*PEFT_FILES, *OUR_FILES):
        (tmp_path / ".saving-killed" / name).write_bytes(b"half")
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, tmp_path)
    assert same(meaning(fresh), meaning(model))
    trimtab.save_adapter(model, tmp_path)


def test_a_failing_load_takes_its_adapters_off(
    tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is cut off after the adapters are in."""
    trimtab.save_adapter(adapter(tiny_llama, "peft", 4), tmp_path)
    model = tiny_llama()
    before = state_of(model)
    monkeypatch.setattr("trimtab.adapters.store._check_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
