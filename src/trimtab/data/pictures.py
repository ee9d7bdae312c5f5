"""Pictures that rows name: files, or their bytes in a table. Everything is looked at before it is trained on."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import DataError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

MOST_PIXELS = 100_000_000
"""A picture of more is refused: decoded, it takes over 300 MB."""


_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def labelled_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The pictures of a folder that has a folder for each label, and that label; sorted. What is hidden, as systems
    leave it behind (``.ipynb_checkpoints``, ``._a.png``), is no picture and no label.

    Raises DataError for a folder whose folders are the parts of a data set.
    """
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry, folder))
    if len(parts := [entry.name for entry in inner if entry.name.lower() in _SPLITS]) > 1 or (
        parts and len(inner) == 1
    ):
        raise DataError(
            f"{folder} has the folders {', '.join(parts)}, which are parts of a data set and no labels; name each by "
            f"itself, such as {folder / parts[-1]}."
        )
    for label in inner:
        for file in sorted(label.rglob("*")):
            if file.suffix.lower() in ENDINGS and not _is_hidden(file, folder):
                yield file, label.name


def left_out(folder: Path) -> list[str]:
    """What in a folder of labels is no part of its rows, a sentence each: pictures without a label, files that are none
    that can be read, labels without a picture."""
    seen = {file for file, _ in labelled_files(folder)}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_hidden(file, folder)]
    loose = [file for file in files if file.parent == folder and file.suffix.lower() in ENDINGS]
    other = [file for file in files if file.parent != folder and file not in seen]
    full = {file.relative_to(folder).parts[0] for file in seen}
    empty = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name not in full]
    told = []
    if loose:
        told.append(f"{folder}: {_some(loose, folder)} in no folder of a label, so not among the rows")
    if other:
        told.append(f"{folder}: {_some(other, folder)} not among the rows: pictures end in {', '.join(ENDINGS)}")
    if empty := [name for name in empty if not name.startswith(_HIDDEN)]:
        told.append(f"{folder}: no picture in the folder {', '.join(empty)}, so it is no label")
    return told


_HIDDEN = (".", "__MACOSX")


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(_HIDDEN) for part in path.relative_to(folder).parts)


def _some(files: list[Path], folder: Path) -> str:
    first = files[0].relative_to(folder)
    return f"{first} is" if len(files) == 1 else f"{len(files):,} files, the first {first}, are"


def picture_of(value: Any, place: str, folder: Path) -> tuple[str, bytes]:
    """Where the picture under a row's ``image`` is, and its bytes where the row itself holds them (else none).

    A relative path starts from ``folder``, that of the rows' file. A table may hold ``{"bytes": ..., "path": ...}``.
    Raises DataError, which names the row, for anything else, a file that is not there, and one that is no picture.
    """
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        name = str(value.get("path") or "") or hashlib.sha256(value["bytes"]).hexdigest()[:12]
        _look(value["bytes"], f"{place}: the picture {printable(name)}")
        return name, value["bytes"]
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value:
        kind = "nothing" if value is None or value == "" else type(value).__name__
        raise DataError(
            f"{place}: expected the path of a picture under 'image', got {kind}. If the column has another name, say "
            "so: data.columns={image: its name}."
        )
    if "://" in value:
        raise DataError(f"{place}: {printable(value)} is an address, and pictures are read from files; fetch it first.")
    path = folder / Path(value).expanduser()
    if not path.is_file():
        raise DataError(f"{place}: no picture {printable(str(path))}; a path starts from the folder of the rows.")
    _look(path, f"{place}: {printable(str(path))}")
    return str(path), b""


def opened(place: str, path: str, content: bytes) -> Image:
    """The picture in three channels. Raises DataError if it cannot be decoded."""
    return _decoded(content or Path(path), f"{place}: {printable(path)}")


def _look(source: Path | bytes, what: str) -> None:
    """Raise DataError unless a file is a picture of no more than ``MOST_PIXELS`` that looks whole: its head, and by
    whatever its format tells without decoding it all that nothing is cut off its end."""
    from PIL import Image

    with _refusing(what), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        _require_small(image, what)
        if image.mode == "F":
            raise DataError(f"{what} has pixels in floating point, whose range nobody says; store it in 8 bits.")
        if image.format == "PNG":
            image.verify()
        elif image.format != "JPEG" or not _has_end(source):
            image.load()


def _has_end(source: Path | bytes) -> bool:
    """Whether a JPEG has the mark of its end, behind which some programs write a little more."""
    if isinstance(source, bytes):
        return b"\xff\xd9" in source[-_TAIL:]
    with source.open("rb") as file:
        file.seek(max(0, source.stat().st_size - _TAIL))
        return b"\xff\xd9" in file.read()


_TAIL = 1024


def _decoded(source: Path | bytes, what: str) -> Image:
    from PIL import Image, ImageOps

    with _refusing(what), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        _require_small(image, what)
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith("I"):  # 16 bits a pixel, of which converting would keep the lower eight
            turned = turned.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return turned.convert("RGBA").convert("RGB") if turned.mode in ("P", "PA") else turned.convert("RGB")


def _require_small(image: Image, what: str) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise DataError(f"{what} has {width:,} x {height:,} pixels; {MOST_PIXELS:,} at most are read. Make it smaller.")


class _refusing:  # noqa: N801 -- a context, used as one
    """Turns what PIL raises about a damaged file into a DataError."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._quiet = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._quiet.__enter__()
        warnings.simplefilter("ignore")  # of a large picture, which is refused in our words

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._quiet.__exit__(None, None, None)
        if isinstance(error, Exception) and not isinstance(error, DataError | MemoryError):
            told = " ".join(str(error).split())[:200]
            raise DataError(f"{self._what} cannot be read as a picture ({type(error).__name__}: {told}).") from None
