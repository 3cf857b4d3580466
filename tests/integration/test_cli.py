"""The command line as a person uses it: real processes, pipes, a terminal, signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import Client
from penstock.core.job import Status
from tests.support.server import PATIENCE, Server, wait_for

MakeServer = Callable[..., Server]


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return {**clean, "PYTHONUNBUFFERED": "1", "TERM": "xterm", "COLUMNS": "120", **more}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "penstock", *arguments]


def penstock(
    *arguments: str, url: str = "", input: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(PENSTOCK_URL=url),
        input=input,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=cwd,
    )


def reply(count: int, attempt: int = 1) -> str:
    return "".join(f"{position}@{attempt} " for position in range(1, count + 1))


@contextlib.contextmanager
def running(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


# ---------------------------------------------------------------------------------------------- jobs, models, bench


def test_jobs_from_list_to_cancel(server: Server) -> None:
    with Client(server.url) as client:
        job = client.submit("Hi", max_tokens=4, user_id="cli").id
        client.result(job)
        long = client.submit("Hi", model="crawl", max_tokens=1000, user_id="cli").id
    listed = penstock("jobs", "list", "--user", "cli", url=server.url).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["ID", long, job]
    views = json.loads(
        penstock("jobs", "list", "--user", "cli", "--status", "completed", "--json", url=server.url).stdout
    )
    assert [view["id"] for view in views] == [job]
    shown = penstock("jobs", "show", job, url=server.url).stdout
    assert "completed" in shown
    assert "1 prompt + 4 completion tokens" in shown
    assert shown.endswith(f"\n{reply(4)}\n")
    assert json.loads(penstock("jobs", "show", job, "--json", url=server.url).stdout)["result"]["text"] == reply(4)
    assert penstock("jobs", "cancel", long, job, url=server.url).stdout.split() == [long, "cancelled", job, "completed"]


def test_json_is_one_line_whatever_splits_the_lines(server: Server) -> None:
    note = "a\u2028b\u2029c\x85d é"
    with Client(server.url) as client:
        job = client.submit("Hi", max_tokens=1, user_id="odd", metadata={"note": note}).id
        client.result(job)
    (listed,) = penstock("jobs", "list", "--user", "odd", "--json", url=server.url).stdout.splitlines()
    (shown,) = penstock("jobs", "show", job, "--json", url=server.url).stdout.splitlines()
    assert json.loads(listed)[0]["metadata"] == json.loads(shown)["metadata"] == {"note": note}


def test_jobs_tail(server: Server) -> None:
    with Client(server.url) as client:
        job = client.submit("Hi", model="paced", max_tokens=20).id
        result = penstock("jobs", "tail", job, url=server.url)
        assert (result.stdout, result.stderr, result.returncode) == (reply(20) + "\n", "completed (length)\n", 0)
        assert penstock("jobs", "tail", job, "--after", "18", url=server.url).stdout == "19@1 20@1 \n"
        lines = penstock("jobs", "tail", job, "--json", url=server.url).stdout.splitlines()
        assert [json.loads(line)["position"] for line in lines] == [*range(1, 22)]
        assert json.loads(lines[-1])["event"] == "end"
        cancelled = client.cancel(client.submit("Hi", model="crawl", max_tokens=100))
    result = penstock("jobs", "tail", cancelled.id, url=server.url)
    assert result.returncode == 1
    assert "error: " in result.stderr


def test_an_unknown_job_is_one_line(server: Server) -> None:
    result = penstock("jobs", "tail", "job_0", url=server.url)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: No such job.\n")


def test_tail_survives_a_killed_server(make_server: MakeServer) -> None:
    server = make_server(rate=50)
    with Client(server.url) as client:
        job = client.submit("Hi", max_tokens=150).id
    arguments = command("jobs", "tail", job, "--json")
    tail = subprocess.Popen(arguments, env=environment(PENSTOCK_URL=server.url), stdout=subprocess.PIPE, text=True)
    with running(tail):
        assert tail.stdout is not None
        head = [tail.stdout.readline() for _ in range(20)]
        server.kill9()
        server.restart()
        events = [json.loads(line) for line in [*head, *tail.stdout]]
        assert [event["position"] for event in events] == [*range(1, 152)]
        assert tail.wait(PATIENCE) == 0


def test_ctrl_c_is_quiet(server: Server) -> None:
    with Client(server.url) as client:
        job = client.submit("Hi", model="crawl", max_tokens=1000)
        arguments = command("jobs", "tail", job.id, "--url", server.url)
        tail = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with running(tail):
            assert tail.stdout is not None
            assert tail.stdout.read(4) == "1@1 "
            tail.send_signal(signal.SIGINT)
            _, errors = tail.communicate(timeout=PATIENCE)
        assert (tail.returncode, errors) == (130, "")
        assert client.cancel(job).status is Status.CANCELLED  # following a job is not owning it: it ran on


def test_a_broken_pipe_is_quiet(server: Server) -> None:
    with Client(server.url) as client:
        job = client.submit("Hi", model="paced", max_tokens=100).id
    arguments = command("jobs", "tail", job, "--json", "--url", server.url)
    tail = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with running(tail):
        assert tail.stdout is not None
        assert tail.stderr is not None
        tail.stdout.readline()
        tail.stdout.close()
        assert tail.wait(PATIENCE) == 1
        assert tail.stderr.read() == ""


def test_models(server: Server) -> None:
    lines = penstock("models", url=server.url).stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        [name, "ready", "synthetic"] for name in ("synthetic", "paced", "crawl")
    ]
    assert json.loads(penstock("models", "--json", url=server.url).stdout)[0]["id"] == "synthetic"


def test_bench(server: Server) -> None:
    result = penstock("bench", "-n", "30", "-c", "10", "--max-tokens", "8", "--json", url=server.url)
    report = json.loads(result.stdout)
    assert (report["requests"], report["tokens"], report["failures"]) == (30, 240, {})
    assert 0 < report["time_to_first_token_ms"]["p50"] <= report["latency_ms"]["p99"]
    text = penstock("bench", "-n", "5", "--max-tokens", "8", url=server.url).stdout
    assert "5 requests, 40 tokens" in text
    result = penstock("bench", "--model", "nobody", url=server.url)
    assert (result.returncode, "no model 'nobody'" in result.stderr) == (1, True)


# ---------------------------------------------------------------------------------------------- chat


def test_chat_from_a_pipe_answers_every_line(server: Server) -> None:
    result = penstock("chat", "--max-tokens", "3", url=server.url, input="one two\n\nthree")
    assert (result.stdout, result.stderr, result.returncode) == (f"{reply(3)}\n{reply(3)}\n", "", 0)
    result = penstock("chat", "--max-tokens", "2", "--json", "--model", "paced", url=server.url, input="one\ntwo\n")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"message": message, "reply": reply(2), "model": "paced"} for message in ("one", "two")
    ]
    with Client(server.url) as client:
        # The second turn carried the first: 1 word + 2 tokens of reply + 1 word.
        usage = client.job(next(client.jobs(model="paced", limit=1))).usage
    assert usage is not None
    assert usage.prompt_tokens == 4


def test_chat_refuses_a_model_that_is_not_served(server: Server) -> None:
    result = penstock("chat", "--model", "nobody", url=server.url, input="Hi\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert "It has: synthetic, paced, crawl." in result.stderr


def test_a_piped_reply_survives_a_killed_server(make_server: MakeServer) -> None:
    server = make_server(rate=50)
    arguments = command("chat", "--max-tokens", "150")
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    chat = subprocess.Popen(arguments, env=environment(PENSTOCK_URL=server.url), **pipes)
    with running(chat):
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write("Hi\n")
        chat.stdin.close()
        words = chat.stdout.read(40)
        server.kill9()
        server.restart()
        words += chat.stdout.read()
        assert [int(word.split("@")[0]) for word in words.split()] == [*range(1, 151)]
        assert "Waiting to resume" in chat.stderr.read()
        assert chat.wait(PATIENCE) == 0


class Terminal:
    """A process on a terminal of its own; what it has written so far in ``text``."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def read_until(self, pattern: str, timeout: float = PATIENCE) -> str:
        """What it writes up to *pattern*."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.text)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._ours], [], [], left)[0]:
                raise TimeoutError(f"no {pattern!r} in {self.text!r}")
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                raise EOFError(f"no {pattern!r} in {self.text!r}") from None
            self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def write(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        os.close(self._ours)


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def make(*arguments: str) -> Terminal:
            terminal = Terminal(*arguments, cwd=tmp_path)
            stack.enter_context(running(terminal.process))
            stack.callback(terminal.close)
            return terminal

        yield make


def test_chat_on_a_terminal(server: Server, open_terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_terminal("chat", "--url", server.url, "--max-tokens", "3")
    terminal.read_until("> $")
    terminal.write("/help\n")
    terminal.read_until("Ctrl-C stops a reply")
    terminal.write("Hi\n")
    terminal.read_until("1@1 2@1 3@1 ")
    terminal.read_until("> $")
    terminal.write("/model\n")
    terminal.read_until(r"\* synthetic +ready")
    terminal.write("/model nobody\n")
    terminal.read_until("no model 'nobody'")
    terminal.write("/save talk.json\n")
    terminal.read_until("saved to talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": reply(3)},
    ]
    terminal.write("/clear\n/save\n")
    terminal.read_until("saved to penstock-chat.md")
    assert (tmp_path / "penstock-chat.md").read_text() == ""
    terminal.write("/wrong\n")
    terminal.read_until("There is no /wrong")
    terminal.write("/quit\n")
    assert terminal.process.wait(PATIENCE) == 0


def test_ctrl_c_stops_the_reply_and_keeps_the_session(server: Server, open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("chat", "--url", server.url, "--model", "crawl", "--max-tokens", "1000")
    terminal.read_until("> $")
    terminal.write("Hi\n")
    terminal.read_until("1@1 ")
    terminal.interrupt()
    terminal.read_until(r"\(stopped\)")
    with Client(server.url) as client:
        job = next(client.jobs(model="crawl", limit=1))
        assert client.job(job).status is Status.CANCELLED
    terminal.read_until("> $")
    terminal.interrupt()  # at the prompt it drops the line
    terminal.read_until("> $")
    terminal.write("/model synthetic\nHi again\n")
    terminal.read_until("999@1 1000@1 ")
    terminal.read_until("> $")
    terminal.write("\x04")
    assert terminal.process.wait(PATIENCE) == 0


# ---------------------------------------------------------------------------------------------- serve


def test_serve_tells_where_it_is_and_how_to_use_it(tmp_path: Path) -> None:
    arguments = command("serve", "--engine", "synthetic", "--port", "0", "--data-dir", str(tmp_path / "data"))
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, env=environment(), cwd=tmp_path, **pipes)
    with running(process):
        assert process.stderr is not None
        told = ""
        while "stop" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        url = re.search(r"listens on (http://127\.0\.0\.1:\d+)", told)
        assert url is not None
        assert "ready: synthetic" in told
        assert str(tmp_path / "data") in told
        assert "\x1b" not in told
        curl = re.search(r"(curl .*)", told)
        assert curl is not None
        stream = subprocess.run(
            ["sh", "-c", curl[1] + " -sS"], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        assert "event: done" in stream.stdout
        assert f"penstock chat --url {url[1]}" in told
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    events = [json.loads(line)["event"] for line in output.splitlines()]
    assert events == ["model_loading", "model_loaded", "job_ended", "draining"]


def test_serve_on_a_terminal_shows_progress_and_readable_logs(
    open_terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = open_terminal("serve", "--engine", "synthetic", "--port", "0", "--data-dir", str(tmp_path / "data"))
    terminal.read_until("listens on http")
    terminal.read_until("ready: synthetic")
    terminal.read_until("Ctrl-C")
    terminal.interrupt()
    terminal.read_until("draining")
    assert terminal.process.wait(PATIENCE) == 0


def test_serve_refuses_what_cannot_work_in_one_line(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server()
    cases = {
        f"Cannot listen on 127.0.0.1:{server.port}": ["--port", str(server.port), "--data-dir", str(tmp_path / "a")],
        "Another Penstock": ["--port", "0", "--data-dir", str(server.data_dir)],
        "--insecure-public": ["--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path / "b")],
        "no option 'speed'": ["--option", "speed=9", "--port", "0", "--data-dir", str(tmp_path / "c")],
    }
    for message, arguments in cases.items():
        result = penstock("serve", "--engine", "synthetic", *arguments, cwd=tmp_path)
        assert result.returncode in (1, 2), (message, result)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    wait_for(lambda: server.get("/readyz").status_code == 200, "the first server, still")
