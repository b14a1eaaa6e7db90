"""Mutates recipes, rows, model folders and stores at random, and asks the command line about each.

Whatever the input is, it ends with 0, 1 or 2, says no traceback, and takes neither more than ten seconds nor more than
a gigabyte. Run as ``python tests/fuzz.py --count 1000 --seed 7``; failures are shown, with what made them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SECONDS = 10
KILOBYTES = 1_000_000
RAW = re.compile(r"(?<![\w.])(Type|Key|Attribute|Value|Index|Recursion|Assertion|Unicode\w*|Name|Overflow)Error\b")
RECIPE = """\
luthier: 1
name: fuzzed
seed: 3
stages:
  chats: {uses: data, source: chats.jsonl, split: {test: 0.2, validation: 0.1}, keep: [slice]}
  more:
    uses: augment
    data: chats
    method:
      uses: template
      count: 4
      templates: [{messages: [{role: user, content: "{{ verb }} it"}, {role: assistant, content: "{{ verb }}"}]}]
      slots: {verb: [say, do, make, take], number: {range: [1, 9]}}
  base: {uses: base}
  other: {uses: base, source: model}
  tuned: {uses: sft, model: base, data: [chats, more], adapter: {uses: lora, r: 4, target_modules: [q_proj]}, steps: 2}
  pairs: {uses: data, source: pairs.jsonl}
  aligned: {uses: dpo, model: tuned, data: pairs, beta: 0.2, epochs: 1}
  merged: {uses: merge, models: [tuned, base], weights: [0.5, 0.5], method: {uses: slerp, t: 0.4}}
  scored: {uses: evaluate, model: merged, against: [base], data: chats, by: slice, require: {exact_match: ">= base"}}
  small: {uses: quantize, model: merged, method: {uses: int8}}
  out: {uses: export, model: merged, format: {uses: gguf, types: [F16, Q8_0]}, after: [scored]}
"""
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, 1e400, 10**30, -0.0, "", " ", "x", "chats", "base", "none", "/", "..", ".",
    "hf:a/b", "hf:", "embedded:", "embedded:x", "~", "\x00", "a\nb", "é" * 300, [], {}, [[]], [None], {"uses": "base"},
    {"uses": None}, {"uses": {"uses": "lora"}}, ["chats", "chats"], {"": 1}, list(range(50)), "1e3", "NaN", "!!int x",
)  # fmt: skip
SNIPPETS = (
    "&a ", "*a", "<<: *a", "<<: {a: 1}", "&s {x: *s}", "!!int x", "!!float x", "!!null x", "!!set {x}", "!!binary x",
    "!!timestamp 2024-99-99", "!!python/name:x", "!", ".inf", "0o9", "2024-13-45", "\t", "{", "}", "[", "]", ":", "- ",
    "? ", "|", ">", "'", '"', "#", "%", "@", "`", "---\n", "{{", "}}", "\u2028", "\ufeff",
)  # fmt: skip


def run_forked(arguments: list[str], folder: Path, output: Path) -> tuple[int, float, int]:
    """Exit code, seconds and kilobytes of the command line in a process of its own, forked from this one."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        handle = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # A limit of the system's own, for what grows faster than it is looked at.
        resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
        sys.argv = ["luthier", *arguments]
        code = 70
        try:
            from luthier.cli.main import main

            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > SECONDS:
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started, usage.ru_maxrss


@dataclass(frozen=True, slots=True)
class Case:
    """A mutated input: what was done, and what is asked about it."""

    kind: str
    about: str
    commands: list[list[str]]


# -- mutations -------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return found
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


def mutate_value(value: Any, draw: random.Random, odd: tuple[Any, ...] = ODD) -> tuple[Any, str]:
    """A plain value changed in one to three places, and what was done."""
    value = copy.deepcopy(value)
    said: list[str] = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places:
            break
        *parents, last = draw.choice(places)
        holder = _at(value, tuple(parents))
        match draw.choice(("odd", "odd", "odd", "delete", "rename", "swap", "wrap")):
            case "odd":
                holder[last] = copy.deepcopy(draw.choice(odd))
            case "delete":
                del holder[last]
            case "rename" if isinstance(holder, dict):
                holder[f"{last}x"] = holder.pop(last)
            case "swap":
                holder[last] = copy.deepcopy(_at(value, draw.choice(places))) if len(places) > 1 else None
            case _:
                holder[last] = [holder[last]]
        said.append(".".join(map(str, (*parents, last))))
    return value, f"changed {', '.join(said)}"


def mutate_text(text: str, draw: random.Random, snippets: tuple[str, ...] = SNIPPETS) -> tuple[str, str]:
    """A text changed in one to four places, and what was done."""
    said: list[str] = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(text) + 1)
        way = draw.choice(("insert", "insert", "delete", "repeat", "cut"))
        if way == "insert":
            snippet = draw.choice(snippets)
            text = text[:place] + snippet + text[place:]
            said.append(f"{snippet!r} at {place}")
        elif way == "delete":
            count = draw.choice((1, 2, 9, 40))
            text = text[:place] + text[place + count :]
            said.append(f"{count} less at {place}")
        elif way == "repeat":
            lines = text.split("\n")
            number = draw.randrange(len(lines))
            text = "\n".join([*lines[: number + 1], *lines[number:]])
            said.append(f"line {number} twice")
        else:
            text = text[:place] if draw.random() < 0.3 else text
            said.append(f"cut at {place}")
    return text, "; ".join(said)


def mutate_bytes(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes cut, changed, or replaced."""
    way = draw.choice(("cut", "flip", "empty", "text", "longer"))
    place = draw.randrange(len(data) + 1)
    if way == "cut":
        return data[:place], f"cut at {place}"
    if way == "flip" and data:
        place = min(place, len(data) - 1)
        return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :], f"a bit at {place}"
    if way == "longer":
        return data + b"x" * 9, "longer"
    return (
        (b"", "empty") if way == "empty" else (draw.choice((b"[]", b"3", b"null", b"{}", b'"x"', b"{")), "other text")
    )


# -- inputs ----------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """What all cases start from: data, a small model folder, a store with finished stages."""
    folder.mkdir(parents=True)
    rows = [
        {"messages": [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number}!"}],
         "slice": "a"}
        for number in range(12)
    ]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"say {number}", "chosen": "yes", "rejected": "no"} for number in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    import luthier

    shutil.copytree(Path(luthier.__file__).parent / "models" / "nano-base", folder / "model")
    (folder / "data.yaml").write_text(
        "luthier: 1\nname: small\nstages:\n  chats: {uses: data, source: chats.jsonl, keep: [slice]}\n"
    )
    (folder / "model.yaml").write_text("luthier: 1\nname: folder\nstages:\n  base: {uses: base, source: model}\n")
    (folder / "made.yaml").write_text(
        "luthier: 1\nname: made\nstages:\n  chats: {uses: data, source: chats.jsonl, keep: [slice]}\n"
        "  more: {uses: augment, data: chats, method: {uses: template, count: 2, templates: "
        '[{messages: [{role: user, content: "{{ x }}"}, {role: assistant, content: y}]}], slots: {x: [a, b, c]}}}\n'
    )
    code, _, _ = run_forked(["run", "made.yaml", "--store", "made"], folder, folder / "made.txt")
    assert code == 0, (folder / "made.txt").read_text()


def recipe_case(folder: Path, draw: random.Random) -> Case:
    """A mutated recipe."""
    if draw.random() < 0.5:
        value, about = mutate_value(yaml.safe_load(RECIPE), draw)
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    else:
        text, about = mutate_text(RECIPE, draw)
    (folder / "fuzzed.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return Case("recipe", about, [["plan", "fuzzed.yaml", "--store", "store"]])


def rows_case(folder: Path, draw: random.Random) -> Case:
    """Mutated rows."""
    path = folder / "chats.jsonl"
    lines = path.read_text().splitlines()
    place = draw.randrange(len(lines))
    way = draw.choice(("value", "value", "text", "deep", "bytes"))
    if way == "value":
        value, about = mutate_value(json.loads(lines[place]), draw)
        lines[place] = json.dumps(value)
        path.write_text("\n".join(lines))
    elif way == "deep":
        depth = draw.choice((50, 500, 5000, 100_000))
        opened, closed = draw.choice((("[", "]"), ('{"a":', "}")))
        inside = opened * depth + "1" + closed * depth
        lines[place] = draw.choice((inside, f'{{"messages": {inside}}}', f'{{"messages": [], "slice": {inside}}}'))
        path.write_text("\n".join(lines))
        about = f"{depth} deep"
    elif way == "text":
        text, about = mutate_text(path.read_text(), draw)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        data, about = mutate_bytes(path.read_bytes(), draw)
        path.write_bytes(data)
    # No fresh worker for each: the plan reads the first rows, the stage itself the rest.
    command = "run" if draw.random() < 0.5 else "plan"
    return Case("rows", f"{about} in row {place}", [[command, "data.yaml", "--store", "store"]])


def model_case(folder: Path, draw: random.Random) -> Case:
    """A mutated model folder."""
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
    path = folder / "model" / draw.choice(names)
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if draw.random() < 0.7:
            header, about = mutate_value(json.loads(data[8 : 8 + length]), draw)
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        else:
            head, about = mutate_bytes(data[: 8 + length], draw)
            path.write_bytes(head + data[8 + length :])
    elif draw.random() < 0.7:
        value, about = mutate_value(json.loads(path.read_text()), draw)
        path.write_text(json.dumps(value))
    else:
        data, about = mutate_bytes(path.read_bytes(), draw)
        path.write_bytes(data)
    command = "run" if draw.random() < 0.3 else "plan"
    return Case("model", f"{path.name}: {about}", [[command, "model.yaml", "--store", "store"]])


def store_case(folder: Path, draw: random.Random) -> Case:
    """A mutated store."""
    store = folder / "made"
    files = sorted(path for path in store.rglob("*") if path.is_file())
    path = draw.choice([*(f for f in files if f.suffix in (".json", ".jsonl")), *files])
    if draw.random() < 0.2:
        path.unlink()
        about = "removed"
    elif path.suffix == ".json" and draw.random() < 0.6:
        value, about = mutate_value(json.loads(path.read_text()), draw)
        path.write_text(json.dumps(value))
    else:
        data, about = mutate_bytes(path.read_bytes(), draw)
        path.write_bytes(data)
    if draw.random() < 0.2:
        key = draw.choice(sorted((store / "store").iterdir())).name if (store / "store").exists() else "x"
        (store / "locks").mkdir(exist_ok=True)
        (store / "locks" / f"{key}.lock").write_text(
            draw.choice(("", "[]", "3", "{", '{"pid": -1}', '{"host": 1}', "null"))
        )
    runs = sorted((store / "run").iterdir()) if (store / "run").exists() else []
    asked = [
        ["show", "--store", "made"],
        ["show", "made/chats", "--store", "made"],
        ["show", "made/more", "--json", "--store", "made"],
        ["plan", "made.yaml", "--store", "made"],
        ["clean", "--dry-run", "--store", "made"],
        ["verify-store", "--store", "made"],
        *([["show", runs[0].name, "--store", "made"]] if runs else []),
    ]
    return Case("store", f"{path.relative_to(store)}: {about}", draw.sample(asked, 3))


KINDS: dict[str, Callable[[Path, random.Random], Case]] = {
    "recipe": recipe_case, "rows": rows_case, "model": model_case, "store": store_case,
}  # fmt: skip


# -- running ---------------------------------------------------------------------------------------


def problem_of(code: int, seconds: float, kilobytes: int, output: str) -> str | None:
    """What is wrong with how the command line ended."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback (most recent call last)" in output:
        return "a traceback"
    if seconds > SECONDS:
        return f"{seconds:.1f} s"
    raw = RAW.search(output)
    if raw:
        return f"a library's own error ({raw[0]})"
    return f"{kilobytes // 1000} MB" if kilobytes > KILOBYTES else None


def fuzz(count: int, seed: int, kinds: list[str], folder: Path) -> tuple[Counter[str], list[str]]:
    """How many cases of each kind were tried, and what failed."""
    inputs = folder / "inputs"
    make_inputs(inputs)
    tried: Counter[str] = Counter()
    failures: list[str] = []
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        kind = kinds[number % len(kinds)]
        place = folder / "case"
        shutil.copytree(inputs, place, symlinks=True)
        case = KINDS[kind](place, draw)
        tried[kind] += 1
        for command in case.commands:
            output = folder / "output.txt"
            code, seconds, kilobytes = run_forked(command, place, output)
            text = output.read_text(errors="replace")
            problem = problem_of(code, seconds, kilobytes, text)
            if problem:
                last = text.strip().splitlines()[-1:] or [""]
                failures.append(f"{number} {kind}: {problem}: {' '.join(command)}: {case.about}: {last[0][:200]}")
        shutil.rmtree(place)
    return tried, failures


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=["recipe", "recipe", "rows", "model", "store"]
    )
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Loaded once: each case is forked from here.
    import luthier.cli.main
    import luthier.cli.run_verbs
    import luthier.cli.show  # noqa: F401
    from luthier.registry import default_registry

    default_registry()
    with tempfile.TemporaryDirectory() as folder:
        tried, failures = fuzz(options.count, options.seed, options.kinds, Path(folder) / "fuzz")
    for failure in failures:
        print(failure)
    counts = ", ".join(f"{number} {kind}" for kind, number in tried.items())
    print(f"{sum(tried.values())} cases ({counts}), {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
