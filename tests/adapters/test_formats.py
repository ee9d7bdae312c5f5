"""The formats of ``adapters/formats``: each keeps its contract, and ``store`` names none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from adapter_tools import PLANS, trained
from trimtab.adapters import formats, placing, store
from trimtab.adapters.formats import AdapterFormat, all_formats
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]


@pytest.mark.parametrize("kept", all_formats(), ids=lambda one: one.files[0])
@pytest.mark.parametrize("plan", PLANS)
def test_a_format_reads_back_what_it_can_express(
    kept: AdapterFormat, plan: str, tiny_llama: Make, tmp_path: Path
) -> None:
    model = trained(tiny_llama(), *PLANS[plan])
    adapted = dict(adapted_modules(model))
    if not kept.can_express(model, adapted):
        assert kept is not all_formats()[-1]  # the last one takes what the others do not
        return
    kept.save(model, adapted, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(kept.files)
    stored = kept.load(tmp_path)
    assert stored.keys() == adapted.keys()
    for name, module in adapted.items():
        assert stored[name].method == module.method
        assert stored[name].options == module.adapter.options
        expected = dict(module.adapter.named_parameters())
        assert stored[name].tensors.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(stored[name].tensors[key], value), (name, key)


def test_no_two_formats_share_a_file_or_a_preference() -> None:
    files = [name for one in all_formats() for name in one.files]
    assert len(set(files)) == len(files)
    assert len({one.preference for one in all_formats()}) == len(all_formats())


def test_a_format_in_the_folder_is_saved_in_loaded_from_and_tidied_away(
    tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``store`` is given one format more, as a file in the folder would give it, and treats it as any other."""
    native = all_formats()[-1]

    class Wrapped(AdapterFormat):
        """Our own format under other names, for adapters on a single module."""

        files = ("third.json", "third.safetensors")
        label = "a third program"
        preference = -1

        def can_express(self, model: Any, adapted: dict[str, Any]) -> bool:
            return len(adapted) == 1

        def save(self, model: Any, adapted: dict[str, Any], folder: Path) -> None:
            native.save(model, adapted, folder)
            for theirs, ours in zip(Wrapped.files, native.files, strict=True):
                (folder / ours).rename(folder / theirs)

        def load(self, folder: Path) -> Any:
            copy = tmp_path / "copy"
            copy.mkdir()
            for theirs, ours in zip(Wrapped.files, native.files, strict=True):
                (copy / ours).write_bytes((folder / theirs).read_bytes())
            return native.load(copy)

    third = Wrapped()
    for module in (store, placing):
        monkeypatch.setattr(module, "all_formats", lambda: (third, *formats.all_formats()))
    one = trained(tiny_llama(), trimtab.Rule(match="*.layers.0.self_attn.q_proj", method="lora", rank=2))
    folder = tmp_path / "adapter"
    trimtab.save_adapter(one, folder)
    assert {file.name for file in folder.iterdir()} == set(Wrapped.files)
    other = tiny_llama()
    trimtab.load_adapter(other, folder)
    for (name, value), (twin, copy) in zip(
        trimtab.trainable_parameters(one).items(), trimtab.trainable_parameters(other).items(), strict=True
    ):
        assert name == twin
        assert torch.equal(value, copy)
    trimtab.save_adapter(trained(tiny_llama(), *PLANS["mora"]), folder)
    assert {file.name for file in folder.iterdir()} == set(native.files)
    with pytest.raises(
        trimtab.AdapterError, match=r"third\.json \(a third program\) or adapter_config\.json \(PEFT\) or"
    ):
        trimtab.load_adapter(tiny_llama(), tmp_path)
