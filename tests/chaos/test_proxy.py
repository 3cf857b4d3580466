"""The bad network does what it says, to a real redis-server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import redis
from redis.asyncio.connection import Connection

from tests.support.proxy import Frames, Proxy, words_of
from tests.support.redis import RedisServer


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    with contextlib.closing(redis_server.client()) as client:
        client.flushall()
    async with Proxy(redis_server.port) as proxy:
        yield proxy


Connect = Callable[[], Awaitable[Connection]]


@pytest.fixture
async def connect(proxy: Proxy) -> AsyncIterator[Connect]:
    """Connections to the proxy, which neither retry nor reconnect."""
    connections = []

    async def connected() -> Connection:
        connection = Connection(host="127.0.0.1", port=proxy.port, protocol=2, socket_connect_timeout=5)
        connections.append(connection)
        await connection.connect()
        return connection

    yield connected
    for connection in connections:
        await connection.disconnect(nowait=True)


async def ask(connection: Connection, *words: str) -> Any:
    await connection.send_command(*words)
    async with asyncio.timeout(10):
        return await connection.read_response()


def value(server: RedisServer, key: str) -> bytes | None:
    with contextlib.closing(server.client()) as client:
        return client.get(key)  # type: ignore[return-value]


def is_incr(words: list[bytes]) -> bool:
    return words[0] == b"INCR"


async def eventually(look: Any) -> None:
    async with asyncio.timeout(10):
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_everything_passes(proxy: Proxy, connect: Connect, redis_server: RedisServer) -> None:
    connection = await connect()
    assert await ask(connection, "SET", "big", "x" * 3_000_000) == b"OK"
    assert len(await ask(connection, "GET", "big")) == 3_000_000
    assert await ask(connection, "GET", "none") is None
    assert await ask(connection, "EVAL", "return {1, {false, 'two'}, {}}", "0") == [1, [None, b"two"], []]
    await connection.disconnect()
    await eventually(lambda: proxy.connections == 0)


async def test_a_lost_reply_was_executed_once(proxy: Proxy, connect: Connect, redis_server: RedisServer) -> None:
    connection = await connect()
    lost = proxy.lose_reply(is_incr)
    assert await ask(connection, "SET", "a", "1") == b"OK"
    with pytest.raises((redis.ConnectionError, OSError)):
        await ask(connection, "INCR", "a")
    assert (await lost)[:2] == [b"INCR", b"a"]
    assert value(redis_server, "a") == b"2"
    again = await connect()  # only the one reply is lost
    assert await ask(again, "INCR", "a") == 3
    await again.disconnect()


async def test_replies_before_the_lost_one_arrive(proxy: Proxy, connect: Connect, redis_server: RedisServer) -> None:
    connection = await connect()
    proxy.lose_reply(is_incr)
    await connection.send_packed_command(
        connection.pack_commands([("SET", "b", "1"), ("GET", "b"), ("INCR", "b"), ("GET", "b")])
    )
    assert await connection.read_response() == b"OK"
    assert await connection.read_response() == b"1"
    with pytest.raises((redis.ConnectionError, OSError)):
        await connection.read_response()
    assert value(redis_server, "b") == b"2"


async def test_the_lost_reply_can_be_chosen(proxy: Proxy, connect: Connect, redis_server: RedisServer) -> None:
    connection = await connect()
    lost = proxy.lose_reply(is_incr, lambda reply: reply == b":3\r\n")
    assert await ask(connection, "INCR", "c") == 1
    assert await ask(connection, "INCR", "c") == 2
    with pytest.raises((redis.ConnectionError, OSError)):
        await ask(connection, "INCR", "c")
    assert lost.done()


async def test_drop_and_refuse(proxy: Proxy, connect: Connect) -> None:
    connection = await connect()
    proxy.drop()
    with pytest.raises((redis.ConnectionError, OSError)):
        await ask(connection, "PING")
    assert await ask(await connect(), "PING") == b"PONG"
    await proxy.refuse()
    with pytest.raises((redis.ConnectionError, OSError)):
        await connect()
    await proxy.heal()
    assert await ask(await connect(), "PING") == b"PONG"


async def test_delay_keeps_the_order(proxy: Proxy, connect: Connect) -> None:
    connection = await connect()
    loop = asyncio.get_running_loop()
    began = loop.time()
    proxy.delay(0.1)
    await connection.send_packed_command(connection.pack_commands([("ECHO", str(n)) for n in range(50)]))
    assert [await connection.read_response() for _ in range(50)] == [str(n).encode() for n in range(50)]
    assert loop.time() - began >= 0.2  # there and back


async def test_a_stalled_write_comes_late_even_from_a_client_that_is_gone(
    proxy: Proxy, connect: Connect, redis_server: RedisServer
) -> None:
    connection = await connect()
    proxy.stall()
    await connection.send_command("SET", "late", "1")
    await asyncio.sleep(0.05)
    await connection.disconnect()
    assert value(redis_server, "late") is None
    await proxy.heal()
    await eventually(lambda: value(redis_server, "late") == b"1")


async def test_a_black_hole_swallows_and_stays_connected(
    proxy: Proxy, connect: Connect, redis_server: RedisServer
) -> None:
    connection = await connect()
    proxy.blackhole()
    await connection.send_command("SET", "never", "1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await connection.read_response(disconnect_on_error=False)
    assert proxy.connections == 1
    await proxy.heal()
    await eventually(lambda: proxy.connections == 0)
    assert value(redis_server, "never") is None


async def test_subscriptions_pass(proxy: Proxy, connect: Connect, redis_server: RedisServer) -> None:
    """Messages are no replies: nothing is counted there."""
    connection = await connect()
    proxy.lose_reply(is_incr)
    assert await ask(connection, "SSUBSCRIBE", "news") == [b"ssubscribe", b"news", 1]
    with contextlib.closing(redis_server.client()) as client:
        client.execute_command("SPUBLISH", "news", "one")
        client.execute_command("SPUBLISH", "news", "two")
    assert await connection.read_response() == [b"smessage", b"news", b"one"]
    assert await connection.read_response() == [b"smessage", b"news", b"two"]
    assert await ask(connection, "PING") == [b"pong", b""]
    await connection.disconnect()


def test_frames_are_cut_wherever_the_bytes_are_torn() -> None:
    replies = [b"+OK\r\n", b"$-1\r\n", b"$0\r\n\r\n", b"*2\r\n*1\r\n:1\r\n$4\r\na\r\nb\r\n", b"*-1\r\n", b"-ERR no\r\n"]
    data = b"".join(replies)
    for size in range(1, len(data) + 1):
        frames = Frames()
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        assert [frame for part in parts for frame, _ in frames.feed(part)] == replies
    assert words_of(b"*2\r\n$4\r\nECHO\r\n$2\r\n\r\n\r\n") == [b"ECHO", b"\r\n"]
    assert words_of(b"PING\r\n") == [b"PING"]
