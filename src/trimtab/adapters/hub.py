"""Where an adapter is: a folder of this machine, or one on the Hugging Face hub, which is fetched."""

from __future__ import annotations

import re
from pathlib import Path

from trimtab.adapters.formats import all_formats
from trimtab.errors import AdapterError

# A hub id has an owner: a single word that is no folder is a folder misspelt.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
