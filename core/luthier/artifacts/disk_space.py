"""Whether the disk has room for what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier.api.errors import StoreError


def check_disk_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: Where it goes.
        needed: Its size in bytes.
        what: What to call it, such as ``the merged model``.

    Raises:
        StoreError: there is too little room.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{what} takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left",
            where=str(folder),
            hint="free some space (`luthier clean`) or choose another store with --store",
        )
