"""Background responses over a fleet: any gateway counts the same events, whichever worker, engine or gateway dies."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.fleet import GatewayProcess, WorkerProcess
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Process, wait_for

STREAMS = 6
TOKENS = 150
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[list[GatewayProcess], list[WorkerProcess]]]:
    """Two gateways and two workers over one Redis; leases of a second, 50 tokens/s."""
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    settings = {"lease_ttl": 1}
    gateways = [GatewayProcess(tmp_path / f"gateway{n}", redis.url, settings=settings) for n in range(2)]
    workers = [WorkerProcess(tmp_path / f"worker{n}", redis.url, rate=50, settings=settings) for n in range(2)]
    processes: list[Process] = [*gateways, *workers]
    try:
        for process in processes:
            process.start()
        for gateway in gateways:
            wait_for(gateway.is_served, "a worker behind the gateway")
        yield gateways, workers
    finally:
        for process in processes:
            process.stop()
        redis.stop()


def connect(gateway: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)


class Reader(threading.Thread):
    """Starts a response and follows it to its end; whenever its connection breaks, it goes on at any gateway."""

    def __init__(self, gateways: list[GatewayProcess], dice: random.Random) -> None:
        super().__init__(daemon=True)
        self.gateways = gateways
        self.dice = dice
        self.events: list[Any] = []
        self.connections = 0

    def run(self) -> None:
        self._read(self._create)
        while self.events[-1].type not in TERMINAL:
            self._read(self._resume)

    def _create(self, sdk: openai.OpenAI) -> Any:
        return sdk.responses.create(
            model="synthetic", input="x", max_output_tokens=TOKENS, background=True, stream=True
        )

    def _resume(self, sdk: openai.OpenAI) -> Any:
        last = self.events[-1].sequence_number
        return sdk.responses.retrieve(self.events[0].response.id, stream=True, starting_after=last)

    def _read(self, ask: Callable[[openai.OpenAI], Any]) -> None:
        """One connection, that ends by itself, is cut, or is dropped after some events."""
        left = self.dice.randint(5, TOKENS)
        with (
            contextlib.suppress(openai.APIConnectionError, openai.InternalServerError),
            connect(self.dice.choice(self.gateways)) as sdk,
            contextlib.closing(ask(sdk)) as stream,
        ):
            self.connections += 1
            for event in stream:
                self.events.append(event)
                left -= 1
                if left == 0:
                    return


def test_every_reader_sees_the_same_sequence(
    fleet: tuple[list[GatewayProcess], list[WorkerProcess]], seed: int
) -> None:
    gateways, workers = fleet
    dice = random.Random(seed)
    readers = [Reader(gateways, random.Random(dice.random())) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    wait_for(lambda: all(len(reader.events) > 20 for reader in readers), "streams that flow")
    victims: list[Process] = [*workers, gateways[1]]  # either worker may have claimed all of them
    for victim in victims:
        victim.kill9()  # all of them at once: a restart takes as long as a stream
    for victim in victims:
        victim.restart()
    for reader in readers:
        reader.join(PATIENCE)
        assert not reader.is_alive(), f"{len(reader.events)} events, then nothing"
    interrupted = 0
    for reader in readers:
        events = reader.events
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
        words = "".join(event.delta for event in events if event.type == "response.output_text.delta").split()
        assert [word.split("@")[0] for word in words] == [str(position) for position in range(1, TOKENS + 1)]
        interrupted += len({word.split("@")[1] for word in words}) > 1
        for gateway in gateways:  # whatever is there from the beginning is what was seen
            with connect(gateway) as sdk:
                response = events[0].response.id
                assert list(sdk.responses.retrieve(response, stream=True)) == events
                assert sdk.responses.retrieve(response).to_dict() == events[-1].response.to_dict()
    assert interrupted >= 1, "a storm that hit nothing proves nothing"
    assert sum(reader.connections for reader in readers) > STREAMS
