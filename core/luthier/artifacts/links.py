"""Large files by reference instead of by copy: what is in the store takes no second place on the disk."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Literal

How = Literal["reflink", "hard link", "link"]
CLONE = 0x40049409
"""The request FICLONE of Linux: a file shares another's blocks until one of them is written (ioctl_ficlone(2))."""


def refer(source: Path, target: Path) -> How:
    """Make a file be another one's content without copying it.

    Blocks are shared where the file system can do that, which is a file of its own. Else it is a hard link, which
    outlives the source, if the user owns that file and has it in one place; what others own, or a cache has, is only
    linked to. Of these two the content may change: whoever reads them looks at size, time and inode first.

    Args:
        source: The file; links are followed.
        target: Where it is to be; nothing is there.

    Raises:
        OSError: not even a link can be made.
    """
    # A cache of content, such as the hub's, has its files behind links and removes them as it likes.
    cached = source.is_symlink()
    source = source.resolve()
    if _cloned(source, target):
        return "reflink"
    if not cached and source.stat().st_uid == os.geteuid():
        try:
            os.link(source, target)
        except OSError:
            # Another file system, or one without hard links.
            target.unlink(missing_ok=True)
        else:
            return "hard link"
    target.symlink_to(source)
    return "link"


def _cloned(source: Path, target: Path) -> bool:
    """Whether the target shares the source's blocks now."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as read, target.open("xb") as write:
            fcntl.ioctl(write.fileno(), CLONE, read.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def bring(source: Path, target: Path, *, copied: bool) -> dict[str, str] | None:
    """Have a file of weights in a folder of the store.

    Returns:
        What the fact ``references`` says of it, see `luthier.api.artifact`; None where its content is its own.
    """
    if copied:
        shutil.copyfile(source, target)
        return None
    how = refer(source, target)
    return None if how == "reflink" else {"how": how, "place": str(source.resolve())}
