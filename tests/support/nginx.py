"""A real nginx for tests: the shipped configuration with other addresses, without root, ended by its pid."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import PATIENCE, free_port, wait_for

SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "nginx"

#: An http block that does to everything what must not be done to streams, as a host's own nginx.conf may.
HOSTILE = """
    gzip            on;
    gzip_types      *;
    gzip_proxied    any;
    gzip_min_length 1;
    proxy_buffering on;
    proxy_cache_path cache keys_zone=cache:1m;
    proxy_cache     cache;
    proxy_cache_valid 1h;
    proxy_ignore_headers Cache-Control X-Accel-Buffering;
"""


def nginx_binary() -> str:
    """Where nginx is; a laptop without one skips the test, CI fails."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        message = "nginx is not installed (on Debian: apt install nginx-light)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


class Nginx:
    """nginx in front of the gateways on these loopback *ports*; *http* is put at the top of its http block."""

    def __init__(self, ports: Sequence[int], *, http: str = "") -> None:
        self.binary = nginx_binary()
        self.ports = list(ports)
        self.http = http
        self.port = free_port()
        # Not pytest's folder: that is closed to the user that nginx runs as when the tests run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="nginx-"))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def configure(self) -> None:
        """Write the shipped files with our addresses in them; nothing else is changed."""
        main = (SHIPPED / "nginx.conf").read_text()
        server = (SHIPPED / "penstock.conf").read_text()
        upstream = (SHIPPED / "upstream.conf").read_text()
        gateways = "".join(rf"\n    server 127.0.0.1:{port}\1" for port in self.ports)
        main = substitute(r"^http \{\n", f"http {{\n{self.http}", main)
        server = substitute(r"^    listen 8080;", f"    listen 127.0.0.1:{self.port};", server)
        upstream = substitute(r"^    resolver [^\n]*\n", "", upstream)
        upstream = substitute(r"\n    server gateway:8000 resolve([^\n]*)", gateways, upstream)
        for name, text in (("nginx.conf", main), ("penstock.conf", server), ("upstream.conf", upstream)):
            (self.folder / name).write_text(text)

    def start(self) -> Nginx:
        self.configure()
        user = "nobody" if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(self.folder, user)
        with (self.folder / "access.log").open("ab") as out, (self.folder / "error.log").open("ab") as err:
            if user is not None:  # the configuration opens /dev/stdout itself
                os.fchown(out.fileno(), pwd.getpwnam(user).pw_uid, -1)
                os.fchown(err.fileno(), pwd.getpwnam(user).pw_uid, -1)
            self.process = subprocess.Popen(
                [self.binary, "-p", str(self.folder), "-c", str(self.folder / "nginx.conf"), "-e", "stderr",
                 "-g", "daemon off;"],
                user=user,
                extra_groups=[] if user is not None else None,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )  # fmt: skip
        wait_for(self.answers, "nginx")
        return self

    def answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"nginx exited with {self.process.returncode}: {self.errors()}")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/nothing", trust_env=False, timeout=PATIENCE).status_code == 404
        return False

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()

    def requests(self) -> list[dict[str, Any]]:
        """The access log: one object a request, written when it ends."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    def reload(self) -> None:
        """Read the configuration again with new processes; the old ones finish what they serve."""
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            finally:
                self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def substitute(pattern: str, replacement: str, text: str) -> str:
    changed, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    assert count == 1, f"{pattern!r} is {count} times in the shipped configuration"
    return changed
