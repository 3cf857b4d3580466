from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("penstock.testing.broker")

if TYPE_CHECKING:
    from penstock.brokers.embedded import EmbeddedBroker
    from penstock.core.ports import QueuePolicy
    from penstock.testing.broker import BrokerHarness


def embedded_harness(folder: Path) -> BrokerHarness:
    from penstock.brokers.embedded import EmbeddedBroker
    from penstock.core.ports import QueuePolicy
    from penstock.testing.broker import BrokerHarness
    from penstock.testing.clock import ManualClock

    class EmbeddedHarness(BrokerHarness):
        """A crash copies the files as they lie while the broker is still open: what a kill -9 leaves behind."""

        def __init__(self) -> None:
            self.clock = ManualClock()
            self._generations = itertools.count(1)
            self._store = folder / "0"
            self._store.mkdir()
            self._open: list[EmbeddedBroker] = []

        async def broker(self, policy: QueuePolicy | None = None) -> EmbeddedBroker:
            broker = EmbeddedBroker(self._store / "store", clock=self.clock, policy=policy or QueuePolicy())
            self._open.append(broker)
            await broker.open()
            return broker

        async def crash(self) -> None:
            left = folder / str(next(self._generations))
            shutil.copytree(self._store, left)
            await self.close()
            shutil.rmtree(self._store)
            self._store = left

        async def close(self) -> None:
            while self._open:
                await self._open.pop().close()

        async def stored_bytes(self) -> int | None:
            """Bytes in used pages: SQLite keeps freed pages for what comes next."""
            for path in self._store.rglob("*"):
                if path.is_file() and path.read_bytes()[:15] == b"SQLite format 3":
                    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                        sizes = [
                            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
                        ]
                        return int((sizes[0] - sizes[1]) * db.execute("PRAGMA page_size").fetchone()[0])
            return None

    return EmbeddedHarness()


@pytest.fixture
def make_embedded_harness(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], BrokerHarness]:
    return lambda: embedded_harness(tmp_path_factory.mktemp("embedded"))
