"""The folder of an adapter: where it is (on this machine, or on the Hugging Face hub, from which it is fetched), which
format its files have, and how new files get there in the stead of those of an earlier save.

New files lie complete in a folder of their own before the first is moved, so a save that is killed meanwhile is
finished by whoever comes next, to save or to read.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.adapters.formats import AdapterFormat, all_formats
from trimtab.adapters.record import StoredAdapter
from trimtab.errors import AdapterError
from trimtab.files import COMPLETE, open_to_readers, read_json, temporary_folder, unfinished
from trimtab.reading import open_file

# A hub id has an owner: a single word that is no folder is a folder misspelt.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Threads of one process that save into the same folder wait for each other.
_SAVING = threading.Lock()


def local_folder(name: Path | str) -> Path:
    """The folder that ``name`` means: the one of this machine, or else that of the hub id ``OWNER/NAME``. A ``Path`` is
    never a hub id.

    What the hub's cache has is used where the hub cannot be reached. Only the files of the formats are fetched, and no
    pickle. Raises AdapterError if the hub id cannot be resolved, or has no weights in safetensors.
    """
    place = Path(name)
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or _exists(place):
        return place
    from huggingface_hub import snapshot_download

    known = all_formats()
    patterns = [file for one in known for file in one.files]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{name}: no such folder, and the adapter cannot be fetched from the hub under this name "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Check the name and the connection; "
            "a private or gated adapter needs `hf auth login`"
        ) from None
    for one in known:
        if (folder / one.files[0]).is_file() and not (folder / one.files[1]).is_file():
            raise AdapterError(
                f"{name}: on the hub there is {one.files[0]} without {one.files[1]}; adapters are read from "
                "safetensors alone, since a pickle could run code. Load and save it once with PEFT where you trust it"
            )
    return folder


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name that the system cannot look up is reported where the folder is opened
        return True


def read_adapter(folder: Path | str) -> dict[str, StoredAdapter]:
    """The adapter in ``folder``, ours or PEFT's own, by module.

    Raises AdapterError if there is no adapter, or one that is damaged, not supported or empty.
    """
    return read_as(local_folder(folder))[1]


def read_as(place: Path) -> tuple[AdapterFormat, dict[str, StoredAdapter]]:
    """The format of the adapter in ``place``, and what `read_adapter` gives of it. Raises as that does."""
    form = format_of(place)
    stored = form.load(place)
    if not stored:
        raise AdapterError(f"{place}: the adapter is empty")
    return form, stored


def holds_adapter(folder: Path | str) -> bool:
    """Whether there is an adapter in ``folder``, by its description."""
    return any((Path(folder) / one.files[0]).is_file() for one in all_formats())


def format_of(place: Path) -> AdapterFormat:
    """The format of the adapter in ``place``."""
    known = all_formats()
    try:
        with _SAVING:
            _finish_save(place)
        if not place.is_dir():
            what = "a file" if place.exists() else "no such folder"
            expected = " or ".join(one.files[0] for one in known)
            raise AdapterError(f"{place}: {what}; expected a folder with {expected}")
        present = [one for one in known if (place / one.files[0]).is_file()]
    except OSError as error:
        raise AdapterError(f"{place}: cannot be looked into ({error})") from None
    if len(present) > 1:
        files = " and ".join(one.files[0] for one in present)
        raise AdapterError(f"{place}: two adapters in one folder ({files}); remove the files of one")
    if not present:
        expected = " or ".join(f"{one.files[0]} ({one.label})" if one.label else one.files[0] for one in known)
        left = [one.files[1] for one in known if (place / one.files[1]).is_file()]
        hint = f". There is {left[0]} without its configuration: a save that was cut off" if left else ""
        # PEFT keeps an adapter of a name other than "default" in a folder of that name inside.
        inside = sorted(str(found.parent) for one in known for found in place.glob(f"*/{one.files[0]}"))
        hint = f". In folders inside of it there is: {', '.join(inside[:5])}" if inside else hint
        raise AdapterError(f"{place}: no adapter here; expected {expected}{hint}")
    return present[0]


def adapter_files(name: Path | str) -> list[Path]:
    """The description and the tensors of the adapter that ``name`` means. Raises AdapterError if there is none."""
    folder = local_folder(name)
    return [folder / file for file in format_of(folder).files]


def adapter_digest(name: str) -> str:
    """The SHA-256 of the adapter's files, by which it is known again. Raises AdapterError if there is none."""
    digest = hashlib.sha256()
    try:
        for file in adapter_files(name):
            with open_file(file) as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise AdapterError(f"{name}: the adapter cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def base_said_by(name: str) -> str | None:
    """The model that the adapter says it was made for, if it says one."""
    try:
        said: Any = read_json(local_folder(name) / "adapter_config.json").get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return Path(said).name if isinstance(said, str) and said else None


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to write an adapter into, whose files take the place of those in ``target`` at the end. If that fails,
    the old ones stay as they are."""
    with _SAVING:
        _finish_save(target)
        with temporary_folder(target) as folder:
            (fresh := folder / "new").mkdir()
            yield fresh
            open_to_readers(fresh)
            complete = fresh.rename(folder / COMPLETE)
            try:
                _move(complete, target)
            except BaseException:  # Ctrl-C in the middle, for one
                if any((target / one.files[0]).exists() for one in all_formats()):  # the old one's, or the new one's
                    shutil.rmtree(complete)
                else:
                    _move(complete, target)
                raise


def _finish_save(target: Path) -> None:
    """Finish a save into ``target`` that was killed while it moved its files, if there is one.

    Raises AdapterError where nothing can be moved in ``target``.
    """
    for complete in unfinished(target):
        try:
            _move(complete, target)
        except OSError as error:
            raise AdapterError(
                f"{target}: a save was cut off here and cannot be finished now ({error.strerror}). The adapter is "
                f"whole in {complete}; copy that folder to a place of your own"
            ) from error


def _move(complete: Path, target: Path) -> None:
    """Move the files of one adapter from ``complete`` to ``target``, remove those of other formats, then ``complete``.

    The configuration is removed first and written last, so that it is never beside tensors of another save. If it was
    moved before, all is done.
    """
    known = all_formats()
    writer = next((one for one in known if (complete / one.files[0]).exists()), None)
    if writer is not None:
        for one in known:
            (target / one.files[0]).unlink(missing_ok=True)
        for name in {one.files[1] for one in known} - set(writer.files):
            (target / name).unlink(missing_ok=True)
        for name in reversed(writer.files):
            if (complete / name).exists():
                (complete / name).replace(target / name)
    complete.rmdir()
