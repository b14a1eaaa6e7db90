"""Stages side by side on slots, stages of several ranks, and executors, trackers and components that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
from inline_plugins import put_on_path
from luthier import run

SLEEPER = """
import time
from typing import ClassVar


class C(StageConfig):
    \"\"\"Takes its time.\"\"\"

    kind_made: ClassVar = "report"
    seconds: float = 1.0
    \"\"\"How long.\"\"\"


class I(Stage):
    def run(self):
        time.sleep(self.config.seconds)
        return {"slept": self.config.seconds}
"""
RANKED = """
import json
import os
from typing import ClassVar


class C(StageConfig):
    \"\"\"Adds up the ranks.\"\"\"

    kind_made: ClassVar = "report"
    seeded: ClassVar = False
    several_ranks: ClassVar = True
    failing: int = -1
    \"\"\"Which rank fails.\"\"\"


class I(Stage):
    def run(self):
        import torch
        import torch.distributed as dist

        context = self.context
        dist.init_process_group("gloo")
        if context.rank == self.config.failing:
            raise DataError("this rank cannot go on", hint="ask another")
        total = torch.tensor([context.rank + 1.0])
        dist.all_reduce(total)
        context.log(f"rank {context.rank} of {context.world}")
        context.progress(1, 1, "sums")
        if context.rank == 0:
            (context.out / "sum.json").write_text(json.dumps(total.tolist()))
        else:
            try:
                context.out
            except LuthierError:
                pass
            else:
                raise AssertionError("only rank 0 may write")
        dist.barrier()
        dist.destroy_process_group()
        return {"total": float(total), "pid": os.getpid()}
"""


def events_of(folder: Path) -> list[dict[str, Any]]:
    (run_folder,) = (folder / ".luthier" / "run").iterdir()
    return [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]


def most_at_once(events: Iterable[dict[str, Any]]) -> int:
    running, most = set(), 0
    for event in events:
        if event["event"] == "stage_started":
            running.add(event["stage"])
        elif event["event"] in ("stage_finished", "stage_failed", "stage_interrupted"):
            running.discard(event["stage"])
        most = max(most, len(running))
    return most


@pytest.mark.parametrize("slots", [1, 2])
def test_independent_stages_run_on_as_many_slots_as_there_are(
    slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    put_on_path(tmp_path, monkeypatch, "stage", "sleeper", SLEEPER)
    (tmp_path / "r.yaml").write_text(f"""\
luthier: 1
executor: {{uses: local, slots: {slots}}}
stages:
  a: {{uses: sleeper, seconds: 1.0}}
  b: {{uses: sleeper, seconds: 1.1}}
  same: {{uses: sleeper, seconds: 1.0}}
""")
    done = cli("run", "r.yaml")
    assert done.returncode == 0, done.stderr
    events = events_of(tmp_path)
    assert most_at_once(events) == slots
    started = [event["stage"] for event in events if event["event"] == "stage_started"]
    assert sorted(started) == ["a", "b"], "the same stage under another name is made once"
    assert [event["stage"] for event in events if event["event"] == "stage_cached"] == ["same"]


def test_a_failure_on_one_slot_lets_the_other_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    put_on_path(tmp_path, monkeypatch, "stage", "sleeper", SLEEPER)
    (tmp_path / "r.yaml").write_text("""\
luthier: 1
executor: {uses: local, slots: 2}
stages:
  slow: {uses: sleeper, seconds: 2.0}
  bad: {uses: sleeper, seconds: -1}
  later: {uses: sleeper, seconds: 0.1, after: [slow]}
""")
    done = cli("run", "r.yaml")
    assert done.returncode == 1
    ends = {
        event["stage"]: event["event"]
        for event in events_of(tmp_path)
        if "stage" in event and event["event"] in ("stage_finished", "stage_failed", "stage_skipped")
    }
    assert ends == {"bad": "stage_failed", "slow": "stage_finished", "later": "stage_skipped"}


def test_two_ranks_compute_together_and_commit_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    put_on_path(tmp_path, monkeypatch, "stage", "ranked", RANKED)
    (tmp_path / "r.yaml").write_text("""\
luthier: 1
name: ranks
stages:
  two: {uses: ranked, resources: {processes: 2}}
""")
    done = cli("run", "r.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(cli("show", "ranks/two", "--json").stdout)
    assert made["facts"]["total"] == 3.0
    assert list(made["files"]) == ["sum.json"]
    logs = [event["message"] for event in events_of(tmp_path) if event["event"] == "log"]
    assert logs == ["rank 0 of 2"], "the others are silent"
    assert len(list((tmp_path / ".luthier" / "store").iterdir())) == 1
    assert "cached" in cli("run", "r.yaml", "--set", "stages.two.resources.processes=1").stdout, "no identity"


def test_a_rank_that_fails_ends_the_stage_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    put_on_path(tmp_path, monkeypatch, "stage", "ranked", RANKED)
    (tmp_path / "r.yaml").write_text(
        "luthier: 1\nstages:\n  two: {uses: ranked, failing: 1, resources: {processes: 2}}\n"
    )
    done = cli("run", "r.yaml")
    assert done.returncode == 1
    assert "rank 1: this rank cannot go on" in done.stderr
    assert "ask another" in done.stderr


def test_training_in_several_processes_is_refused(tmp_path: Path, chats: Path, cli) -> None:
    (tmp_path / "r.yaml").write_text(
        "luthier: 1\nstages:\n  base: {uses: base}\n"
        "  t: {uses: sft, model: base, data: ./chats.jsonl, resources: {processes: 2}}\n"
    )
    done = cli("plan", "r.yaml")
    assert done.returncode == 2
    assert "the stage is computed by one process: leave `resources.processes` out" in done.stderr


BAD_EXECUTOR = """
class C(Config):
    \"\"\"Nothing to choose.\"\"\"


class I(Executor):
    def slots(self):
        return [SLOTS]

    def open(self, slot, log):
        return ProcessSession(self.context.worker.on(slot), log)
"""
BAD_TRACKER = """
class C(Config):
    \"\"\"Nothing to choose.\"\"\"


class I(Tracker):
    def start(self, run):
        raise RuntimeError("no such server")

    def log(self, values, step):
        pass
"""
NO_CONTEXT = """
class C(MetricConfig):
    \"\"\"Nothing to choose.\"\"\"


class I(Metric):
    higher_is_better = True
    needs = Needs()

    def __init__(self, config):
        pass

    def score(self, samples, baseline):
        return Score(0.0, [0.0] * len(samples))
"""
LACKING = """
class C(MetricConfig):
    \"\"\"Nothing to choose.\"\"\"


class I:
    def __init__(self, config, context):
        pass

    def score(self, samples, baseline):
        return Score(0.0, [0.0] * len(samples))
"""
WRONG_VALUE = """
from typing import ClassVar


class C(StageConfig):
    \"\"\"Asks for what no field names.\"\"\"

    kind_made: ClassVar = "report"
    data: DatasetInput
    \"\"\"Rows.\"\"\"


class I(Stage):
    def run(self):
        return {"key": self.context.artifact("method.data").key}
"""


def evaluated(metric: str) -> str:
    return f"""\
luthier: 1
stages:
  base: {{uses: base}}
  held: {{uses: data, source: chats.jsonl, split: test}}
  x: {{uses: evaluate, model: base, data: held, metrics: [{metric}]}}
"""


SLEEPING = "luthier: 1\nexecutor: odd\nstages: {x: {uses: data, source: chats.jsonl}}\n"


@pytest.mark.parametrize(
    ("kind", "code", "recipe", "message"),
    [
        (
            "executor",
            BAD_EXECUTOR.replace("SLOTS", "Slot('a', (0,)), Slot('b', (0, 1))"),
            SLEEPING,
            "the executor 'odd' of plugin-odd 1.0 gives GPU 0 to two slots, a and b",
        ),
        (
            "executor",
            BAD_EXECUTOR.replace("SLOTS", "Slot('a'), Slot('a')"),
            SLEEPING,
            "the executor 'odd' of plugin-odd 1.0 has two slots called 'a'",
        ),
        ("executor", BAD_EXECUTOR.replace("SLOTS", ""), SLEEPING, "the executor 'odd' of plugin-odd 1.0 has no slots"),
        (
            "tracker",
            BAD_TRACKER,
            "luthier: 1\ntrackers: [odd]\nstages: {x: {uses: data, source: chats.jsonl}}\n",
            "the tracker 'odd' of plugin-odd 1.0 cannot start: RuntimeError: no such server",
        ),
        (
            "metric",
            NO_CONTEXT,
            evaluated("odd"),
            "the metric 'odd' of plugin-odd 1.0 cannot be made: its class takes (config), not (config, context)",
        ),
        ("metric", LACKING, evaluated("odd"), "the metric 'odd' of plugin-odd 1.0 lacks higher_is_better, needs"),
        (
            "stage",
            WRONG_VALUE,
            "luthier: 1\nstages: {x: {uses: odd, data: ./chats.jsonl}}\n",
            "plugin-odd 1.0 asks for the artifact 'method.data', which no field of the config of 'x' names",
        ),
    ],
    ids=["one GPU twice", "one name twice", "no slots", "tracker", "no context", "lacking", "value"],
)
def test_an_error_in_a_plugin_names_the_plugin(
    kind: str, code: str, recipe: str, message: str, tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    put_on_path(tmp_path, monkeypatch, kind, "odd", code)
    (tmp_path / "r.yaml").write_text(recipe)
    done = cli("run", "r.yaml")
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


SESSION = """
class C(Config):
    \"\"\"Nothing to choose.\"\"\"


class Broken:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    WRONG


class I(Executor):
    def slots(self):
        return [Slot('a')]

    def open(self, slot, log):
        return Broken(ProcessSession(self.context.worker.on(slot), log))
"""
HERE = "the executor 'odd' of plugin-odd 1.0"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("def events(self):\n        return iter(())", f"{HERE} ended its events without saying how"),
        ("def events(self):\n        yield 3", f"{HERE} cannot read its worker's events: TypeError"),
        ("def events(self):\n        yield {}", f"{HERE} cannot read its worker's events: KeyError"),
        ("def send(self, job):\n        raise OSError('gone')", f"{HERE} cannot reach its worker on a: OSError: gone"),
    ],
    ids=["no events", "no mapping", "no event", "send"],
)
def test_a_session_that_breaks_ends_the_stage(
    wrong: str, message: str, tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    put_on_path(tmp_path, monkeypatch, "executor", "odd", SESSION.replace("WRONG", wrong))
    (tmp_path / "r.yaml").write_text(SLEEPING)
    done = cli("run", "r.yaml")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_launcher_prints_goes_to_the_log(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    code = BAD_EXECUTOR.replace("[SLOTS]", "[Slot('a')]").replace(
        "ProcessSession(self.context.worker.on(slot), log)",
        "ProcessSession(WorkerLaunch(['sh', '-c', 'echo Welcome; exec \"$@\"', 'sh', *self.context.worker.command], "
        "self.context.worker.environment), log)",
    )
    put_on_path(tmp_path, monkeypatch, "executor", "odd", code)
    (tmp_path / "r.yaml").write_text(SLEEPING)
    done = cli("run", "r.yaml")
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / ".luthier" / "run").glob("*/worker.log")
    assert "Welcome" in log.read_text()


SEEING = """
import os
from typing import ClassVar


class C(StageConfig):
    \"\"\"Says what it sees.\"\"\"

    kind_made: ClassVar = "report"
    number: int = 0
    \"\"\"Any.\"\"\"


class I(Stage):
    def run(self):
        return {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "device": self.context.device}
"""


def test_a_stage_that_wants_no_gpu_sees_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_on_path(tmp_path, monkeypatch, "stage", "seeing", SEEING)
    (tmp_path / "r.yaml").write_text("""\
luthier: 1
name: r
stages:
  before: {uses: seeing, number: 1}
  none: {uses: seeing, number: 2, resources: {gpus: 0}, after: [before]}
  behind: {uses: seeing, number: 3, after: [none]}
""")
    done = cli("run", "r.yaml")
    assert done.returncode == 0, done.stderr
    seen = [json.loads(cli("show", f"r/{name}", "--json").stdout)["facts"] for name in ("before", "none", "behind")]
    assert [facts["gpus"] for facts in seen] == [None, "", None]
    assert seen[1]["device"] == "cpu"


ENDLESS = RANKED.replace("total = torch", "__import__('time').sleep(600)\n        total = torch")


def test_ranks_end_with_the_run_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(tmp_path, monkeypatch, "stage", "ranked", ENDLESS)
    (tmp_path / "r.yaml").write_text("luthier: 1\nstages:\n  two: {uses: ranked, resources: {processes: 2}}\n")
    command = [sys.executable, "-c", "from luthier.cli.main import main; main()", "run", "r.yaml"]
    runner = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ranks() -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if {"luthier.worker.ranks"} & set(process.info["cmdline"] or [])
            and any(str(tmp_path) in word for word in process.info["cmdline"])
        ]

    def wait_for(reached: Callable[[], bool]) -> None:
        for _ in range(600):
            if reached():
                return
            time.sleep(0.1)
        raise AssertionError([process.cmdline() for process in ranks()])

    # torchrun and two ranks.
    wait_for(lambda: len(ranks()) == 3)
    runner.kill()
    runner.wait()
    wait_for(lambda: not ranks())
    assert not ranks()


def test_more_gpus_than_any_slot_has_are_refused_at_once(tmp_path: Path, chats: Path, cli) -> None:
    (tmp_path / "r.yaml").write_text("""\
luthier: 1
executor: {uses: local, gpus: [[0], [1]]}
stages:
  x: {uses: data, source: chats.jsonl, resources: {gpus: 2}}
""")
    done = cli("run", "r.yaml")
    assert done.returncode == 2
    assert "the stage 'x' asks for 2 GPUs, and no slot of the executor 'local' has that many" in done.stderr


def test_one_slot_and_two_make_the_same(tmp_path: Path, chats: Path) -> None:
    recipe = """\
luthier: 1
executor: {uses: local, slots: SLOTS}
stages:
  chats: {uses: data, source: chats.jsonl}
  base: {uses: init, data: [chats], vocab_size: 300, hidden_size: 32, layers: 1, heads: 2}
  one: {uses: sft, model: base, data: chats, steps: 3, learning_rate: 1e-3, seed: 1}
  two: {uses: sft, model: base, data: chats, steps: 3, learning_rate: 1e-3, seed: 2}
  soup: {uses: merge, models: [one, two]}
"""
    files = []
    for slots in ("1", "2"):
        (tmp_path / "r.yaml").write_text(recipe.replace("SLOTS", slots))
        result = run(tmp_path / "r.yaml", store=tmp_path / slots)
        assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
        files.append([result.artifact(name).manifest["files"]["model.safetensors"] for name in ("one", "two", "soup")])
    assert files[0] == files[1]
    assert files[0][0] != files[0][1], "two seeds make two models"
