"""``luthier doctor``: what is installed, what is missing, and what it would add."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement

from luthier.artifacts.store import Store
from luthier.cli import tools
from luthier.registry import default_registry
from luthier.serving.environments import folder_of, is_ready

DEVICES = """
import json, torch
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
print(json.dumps({"cuda": names, "threads": torch.get_num_threads()}))
"""


@click.command("doctor", epilog="Example: luthier doctor --json")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
@click.option("--install", metavar="TOOL", help="Install the environment of a tool.")
@click.option("--yes", is_flag=True, help="Do not ask before installing.")
def doctor_command(store: Path | None, as_json: bool, install: str | None, yes: bool) -> None:
    """Show versions, devices, the store, broken plugins, and what each extra or tool would add.

    Ends with exit code 1 when something that Luthier needs is missing or too old.
    """
    if install is not None:
        known = default_registry().tool_environments()
        if install not in known:
            raise click.BadParameter(f"there is no tool '{install}'; there are: {', '.join(sorted(known)) or 'none'}")
        tools.install(known[install], yes)
        return
    found = _examine(Store.at(store))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    sys.exit(1 if found["problems"] else 0)


def _examine(store: Store) -> dict[str, Any]:
    required, extras = _requirements()
    devices, failure = _devices()
    problems = [
        f"{name} {spec} is needed, {has or 'nothing'} is installed"
        for name, spec, has in required
        if not _fits(spec, has)
    ]
    problems += [f"the plugin {item.provider} cannot be loaded: {item.error}" for item in default_registry().broken]
    problems += [failure] if failure else []
    existing = next(path for path in (store.root, *store.root.parents) if path.exists())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: has for name, _, has in required},
        "extras": {
            extra: [name for name, spec, has in items if not _fits(spec, has)] for extra, items in extras.items()
        },
        "tools": {
            name: str(folder_of(tool)) if is_ready(tool) else None
            for name, tool in default_registry().tool_environments().items()
        },
        "devices": devices,
        "store": {"path": str(store.root), "artifacts": len(list(store)), "free": shutil.disk_usage(existing).free},
        "problems": problems,
    }


def _requirements() -> tuple[list[tuple[str, str, str | None]], dict[str, list[tuple[str, str, str | None]]]]:
    """What luthier needs, and what its extras add: name, range, installed version."""
    required: list[tuple[str, str, str | None]] = []
    extras: dict[str, list[tuple[str, str, str | None]]] = {}
    for text in metadata.requires("luthier") or []:
        requirement = Requirement(text)
        entry = (requirement.name, str(requirement.specifier), _version(requirement.name))
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        if extra:
            extras.setdefault(extra[1], []).append(entry)
        else:
            required.append(entry)
    return required, extras


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(specifier: str, version: str | None) -> bool:
    return version is not None and Requirement(f"x{specifier}").specifier.contains(version, prereleases=True)


def _devices() -> tuple[dict[str, Any], str | None]:
    """What torch sees; asked in a child process, because this one never loads torch."""
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {}, f"torch cannot be loaded: {done.stderr.strip().rpartition(chr(10))[2]}"
    return json.loads(done.stdout), None


def _print(found: dict[str, Any]) -> None:
    click.echo(f"python {found['python']} on {found['platform']}")
    for name, version in found["versions"].items():
        click.echo(f"  {name:<16} {version or 'MISSING'}")
    devices = found["devices"]
    cuda = ", ".join(devices.get("cuda", [])) or "none: everything runs on the CPU"
    click.echo(f"CUDA devices: {cuda}\nCPU threads: {devices.get('threads', '?')}")
    store = found["store"]
    click.echo(f"store: {store['path']}, {store['artifacts']} artifacts, {store['free'] / 1e9:.1f} GB free")
    for extra, missing in found["extras"].items():
        would = f"pip install 'luthier[{extra}]' would add {', '.join(missing)}" if missing else "installed"
        click.echo(f"extra '{extra}': {would}")
    for name, folder in found["tools"].items():
        click.echo(f"tool '{name}': {folder or f'luthier doctor --install {name} would install it'}")
    for problem in found["problems"]:
        click.echo(f"problem: {problem}", err=True)
    if not found["problems"]:
        click.echo("no problems found")
