"""``luthier clean``: remove what no recipe needs any more."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from luthier.api.artifact import MANIFEST
from luthier.artifacts.answers import ANSWERS
from luthier.artifacts.checkpoints import checkpoints
from luthier.artifacts.digest import digest_value
from luthier.artifacts.store import UNFINISHED, Store
from luthier.running.lock import is_held


@click.command("clean", epilog="Example: luthier clean --dry-run")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--scratch", is_flag=True, help="Also remove scratch folders that a stage could resume from.")
@click.option(
    "--cache", is_flag=True, help="Also remove what can be made again: tokens, log-probabilities of references."
)
@click.option("--answers", is_flag=True, help="Also remove what generators answered, which may have been paid for.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def clean_command(dry_run: bool, scratch: bool, cache: bool, answers: bool, store: Path | None) -> None:
    """Remove artifacts that no recipe's last run made or used, and scratch folders without a checkpoint.

    What is being made right now is left alone.
    """
    place = Store.at(store)
    total = 0
    for path in garbage(place, scratch=scratch, cache=cache, answers=answers):
        size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
        total += size
        click.echo(f"{size / 1e6:10.1f} MB  {path.relative_to(place.root)}")
        if not dry_run:
            # Without its manifest a folder is no longer an artifact, should this be interrupted.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
    click.echo(f"{'would free' if dry_run else 'freed'} {total / 1e6:.1f} MB")


def garbage(store: Store, *, scratch: bool = False, cache: bool = False, answers: bool = False) -> list[Path]:
    """The folders that can go: unused and damaged artifacts, scratch folders that no run is working in, and what was
    left half written; the cache, and the answers in it, where they are asked for and no stage is being made."""
    needed = _needed(store)
    locked = {path.stem for path in store.locks.glob("*.lock") if is_held(path)}
    found = [store.folder(key) for key in store.stored_keys() if key not in locked and _is_useless(store, key, needed)]
    for path in sorted((store.root / "work").glob("*")):
        # Once a stage is done, nothing resumes from what its last run left.
        resumable = bool(checkpoints(path)[0]) and store.find(path.name) is None
        if path.name not in locked and (scratch or not resumable):
            found.append(path)
    if not locked:
        found += _of_cache(store.cache, cache, answers)
    return found


def _of_cache(folder: Path, cache: bool, answers: bool) -> list[Path]:
    """What goes of the cache. Answers may have been paid for: they go only where they are meant."""
    kept = folder / ANSWERS
    if not folder.exists():
        return []
    if cache and (answers or not kept.exists()):
        return [folder]
    if cache:
        return [path for path in sorted(folder.glob("*")) if path != kept]
    return sorted(folder.glob(f"*/{UNFINISHED}*")) + ([kept] if answers and kept.exists() else [])


def _is_useless(store: Store, key: str, needed: set[str]) -> bool:
    return key not in needed or store.broken(key) is not None


def _needed(store: Store) -> set[str]:
    """The keys of every recipe's last run, and of all they were made from."""
    payloads = [payload for name in store.recipes() for payload in store.last_keys(name).values()]
    pending = [digest_value(payload) for payload in payloads]
    needed: set[str] = set()
    while pending:
        key = pending.pop()
        artifact = store.find(key) if key not in needed else None
        needed.add(key)
        if artifact is not None:
            pending += [item for items in artifact.manifest["inputs"].values() for item in items]
            # An adapter is worthless without the model it sits on, however it came to it.
            pending += [artifact.facts["base"]] if artifact.kind == "adapter" else []
    return needed
