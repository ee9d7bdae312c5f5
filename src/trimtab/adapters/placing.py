"""How the files of an adapter get to their place, in the stead of those of an earlier save.

They lie complete in a folder of their own before the first is moved, so a save that is killed meanwhile is finished by
whoever comes next, to save or to read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.adapters.formats import all_formats
from trimtab.errors import AdapterError
from trimtab.files import COMPLETE, leftovers, open_to_readers, temporary_folder


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to write an adapter into, whose files take the place of those in ``target`` at the end. If that fails,
    the old ones stay as they are."""
    finish_save(target)
    with temporary_folder(target) as folder:
        (fresh := folder / "new").mkdir()
        yield fresh
        open_to_readers(fresh)
        complete = fresh.rename(folder / COMPLETE)
        try:
            _move(complete, target)
        except BaseException:  # Ctrl-C in the middle, for one
            if any((target / one.files[0]).exists() for one in all_formats()):  # the old one's yet, or the new one's
                shutil.rmtree(complete)
            else:
                _move(complete, target)
            raise


def finish_save(target: Path) -> None:
    """Finish a save into ``target`` that was killed while it moved its files, if there is one.

    Raises AdapterError where nothing can be moved in ``target``.
    """
    for left in leftovers(target):
        if (complete := left / COMPLETE).is_dir():
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
