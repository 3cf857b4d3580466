"""``make clients``: real clients and outside suites against a Penstock before a perfect model.

Each folder beside this file is one: ``requirements.txt`` and ``package.json`` with its lock say what it needs at exact
versions (installed in ``.venv-clients``, and in the folder's ``node_modules``), ``asks.py`` or ``asks.mjs`` what it is
asked, as tests of pytest or ``node --test``. They find the server in ``PENSTOCK_URL``, its models in ``PENSTOCK_MODEL``
(a second one, which says the same, in ``PENSTOCK_OTHER``) and ``PENSTOCK_EMBED``.

Prints one table, and exits with 1 where it is not that of ``docs/compliance.md``, or something did not pass that this
page does not name.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.scripted import CHAT, EMBED, scripted
from tests.support.compliance import PAGE, page_rows
from tests.support.server import Server, free_port, model

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".venv-clients"
RESULTS = ("passed", "failed", "skipped")
#: The chat model's second name.
OTHER = f"{CHAT}-other"
#: Seconds that an installation and the asking may take.
INSTALL_LIMIT, ASK_LIMIT = 1800, 900
#: For suites that bring asynchronous tests: clients may keep connections from one to the next.
PYTEST_OPTIONS = (
    "asyncio_mode=auto",
    "asyncio_default_fixture_loop_scope=session",
    "asyncio_default_test_loop_scope=session",
)


class CannotInstall(Exception):
    """With what the installer said last."""


@dataclass(frozen=True)
class Outcome:
    """What became of a test: one of `RESULTS`, and what is said about it."""

    client: str
    test: str
    result: str
    says: str = ""


@dataclass(frozen=True)
class Client:
    """One of the folders."""

    name: str

    @property
    def folder(self) -> Path:
        return HERE / self.name

    @property
    def home(self) -> Path:
        """Of its environment."""
        return ENVIRONMENTS / self.name

    @property
    def version(self) -> str:
        """What it is: the first package that its folder names, and which."""
        package = self.folder / "package.json"
        if package.exists():
            name, version = next(iter(json.loads(package.read_text())["dependencies"].items()))
            return f"{name} {version}"
        pinned = re.search(
            r"^([\w.-]+)(?:\[.*\])?==(\S+)", (self.folder / "requirements.txt").read_text(), re.MULTILINE
        )
        assert pinned is not None, f"{self.name} pins nothing"
        return f"{pinned[1]} {pinned[2]}"

    def install(self) -> None:
        """What the folder names, unless it is there already. Raises `CannotInstall`."""
        files = [each for each in map(self.folder.joinpath, ("requirements.txt", "package-lock.json")) if each.exists()]
        wanted = hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()
        stamp = self.home / ".installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        print(f"{self.name}: installing {self.version}", flush=True)
        steps: list[list[str]] = []
        if files[0].name == "requirements.txt":
            # It names everything, so nothing has to be worked out; and what is never imported needs no compiling.
            pip = [sys.executable, "-m", "pip", "--python", str(self.home / "bin" / "python"), "install"]
            pip += ["--disable-pip-version-check", "--progress-bar=off", "--no-deps", "--no-compile"]
            steps += [[sys.executable, "-m", "venv", "--clear", "--without-pip", str(self.home)]]
            steps += [[*pip, "--requirement", str(files[0])]]
        if files[-1].name == "package-lock.json":
            steps += [["npm", "ci", "--no-audit", "--no-fund", "--prefix", str(self.folder)]]
        for step in steps:
            self._run(step)
        self.home.mkdir(parents=True, exist_ok=True)
        stamp.write_text(wanted)

    def _run(self, step: list[str]) -> None:
        """A step of the installation; its output goes through. Raises `CannotInstall`."""
        try:
            process = subprocess.Popen(
                step,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PATH": self._path()},
            )
        except OSError as error:
            raise CannotInstall(str(error)) from None
        assert process.stdout is not None
        said: deque[str] = deque(maxlen=3)
        limit = threading.Timer(INSTALL_LIMIT, process.kill)
        limit.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                said.append(line.strip())
            if process.wait():
                raise CannotInstall(" ".join(said) or f"{step[0]} ended with {process.returncode}")
        finally:
            limit.cancel()
            process.kill()

    def ask(self, url: str) -> list[Outcome]:
        """Run its tests against the server at *url*; their output goes through."""
        with tempfile.TemporaryDirectory(prefix=f"{self.name}-", ignore_cleanup_errors=True) as scratch:
            report = Path(scratch) / "report.xml"
            variables = {"PENSTOCK_URL": url, "PENSTOCK_MODEL": CHAT, "PENSTOCK_OTHER": OTHER, "PENSTOCK_EMBED": EMBED}
            variables |= {"HOME": scratch, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
            # In a session of its own, so that what it starts ends with it.
            process = subprocess.Popen(
                self._command(report), cwd=scratch, env={**self._environment(), **variables}, start_new_session=True
            )
            try:
                code = process.wait(ASK_LIMIT)
            except subprocess.TimeoutExpired:
                return [Outcome(self.name, "(all)", "failed", f"not done after {ASK_LIMIT} s")]
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if not report.exists() or not (outcomes := read_report(self.name, report)):
                return [Outcome(self.name, "(all)", "failed", f"exit code {code}, and no report")]
            return outcomes

    def _command(self, report: Path) -> list[str]:
        """What runs its tests, and writes a *report*."""
        if (asks := self.folder / "asks.py").exists():
            command = [str(self.home / "bin" / "python"), "-m", "pytest", str(asks), f"--junitxml={report}"]
            command += ["-c", os.devnull, f"--rootdir={self.folder}", f"--confcutdir={self.folder}"]
            command += ["-p", "no:cacheprovider", "-v", "--tb=native", "--disable-warnings"]
            return command + [word for option in PYTEST_OPTIONS for word in ("-o", option)]
        # The file may be a link to another folder's: its packages are those of this one.
        command = ["node", "--preserve-symlinks", "--preserve-symlinks-main", "--test"]
        command += ["--test-reporter=spec", "--test-reporter-destination=stdout"]
        command += ["--test-reporter=junit", f"--test-reporter-destination={report}"]
        return [*command, str(self.folder / "asks.mjs")]

    def _environment(self) -> dict[str, str]:
        """This process's, without what would point a client elsewhere; the client's own programs come first."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not re.match(r"PENSTOCK_|OPENAI_|ANTHROPIC_|PYTHONPATH$|.*_proxy$", name, re.IGNORECASE)
        }
        return {**kept, "PATH": self._path()}

    def _path(self) -> str:
        return f"{self.home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"


CLIENTS = [Client(folder.name) for folder in sorted(HERE.iterdir()) if list(folder.glob("asks.*"))]


def read_report(client: str, report: Path) -> list[Outcome]:
    """The outcomes in a JUnit report, as pytest and node write it."""
    outcomes = []
    for case in ET.parse(report).iter("testcase"):
        class_name = case.get("classname", "").rpartition(".")[2]
        test = f"{class_name}::{case.get('name')}" if class_name not in ("", "asks", "test") else case.get("name", "")
        result, says = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                result = "skipped" if child.tag == "skipped" else "failed"
                says = next(iter((child.get("message") or child.text or "").strip().splitlines()), "")
        outcomes.append(Outcome(client, test, result, says[:300]))
    return outcomes


def tally(client: Client, outcomes: Sequence[Outcome]) -> list[str]:
    """The client's row in the page's table: name, version, tests, and how many of each of `RESULTS`."""
    counts = [sum(one.result == result for one in outcomes) for result in RESULTS]
    return [client.name, client.version, *map(str, (len(outcomes), *counts))]


def is_documented(one: Outcome) -> bool:
    """Does the page name it, with a reason? Its tests may be patterns, for what is the same in several."""
    return any(
        len(row) == 4
        and row[0] == one.client
        and row[2] == one.result
        and fnmatch.fnmatchcase(one.test, row[1].strip("`"))
        for row in page_rows()
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="CLIENT", help=f"some of {', '.join(c.name for c in CLIENTS)}")
    names = parser.parse_args().names
    if unknown := set(names) - {client.name for client in CLIENTS}:
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    asked = [client for client in CLIENTS if not names or client.name in names]
    rows, unnamed = [], []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        upstream = stack.enter_context(scripted(free_port()))
        named = {CHAT: CHAT, OTHER: CHAT, EMBED: EMBED}
        models = [model(name, engine="upstream", path=upstream, model=theirs) for name, theirs in named.items()]
        server = Server(Path(folder), models=models)
        stack.callback(server.stop)
        server.start()
        for client in asked:
            print(f"\n== {client.name}", flush=True)
            try:
                client.install()
            except CannotInstall as error:
                outcomes = [Outcome(client.name, "(install)", "failed", f"cannot be installed: {error}")]
            else:
                outcomes = client.ask(server.url)
            rows.append(tally(client, outcomes))
            unnamed += [one for one in outcomes if one.result != "passed" and not is_documented(one)]
        if server.process is not None and server.process.poll() is not None:
            print(f"The server has died:\n{server.tail()}")
    differing = [row[0] for row in rows if row not in page_rows()]
    print("\n| client | version | tests | passed | failed | skipped |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(f"\nNot counted so in docs/{PAGE.name}: {', '.join(differing) or 'nothing'}")
    print(f"Not named there: {'' if unnamed else 'nothing'}")
    for one in unnamed:
        print(f"  {one.result:8} {one.client:14} {one.test:50} {one.says}")
    return 1 if differing or unnamed else 0


if __name__ == "__main__":
    sys.exit(main())
