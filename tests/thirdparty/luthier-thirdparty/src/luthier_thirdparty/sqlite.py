"""A tracker that writes config and outcome."""

import json
import os
import sqlite3
from collections.abc import Mapping
from typing import Any

from luthier.api import Outcome, RunInfo, Tracker

from luthier_thirdparty.config import SqliteConfig


class Sqlite(Tracker[SqliteConfig]):
    """Two tables: the runs, and their metrics."""

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._database = sqlite3.connect(run.folder / self.config.file)
        self._database.execute("create table if not exists metrics (run, step, name, value)")
        self._database.execute("create table if not exists runs (run, stage, key, config, nice, outcome, facts)")
        self._database.execute(
            "insert into runs values (?, ?, ?, ?, ?, null, null)",
            (run.run, run.stage, run.key, json.dumps(run.config), os.nice(0)),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        rows = [(self._run.run, step, name, value) for name, value in values.items()]
        self._database.executemany("insert into metrics values (?, ?, ?, ?)", rows)

    def finish(self, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        self._database.execute(
            "update runs set outcome = ?, facts = ? where run = ?", (outcome, json.dumps(facts), self._run.run)
        )
        self._database.commit()
        self._database.close()
