"""A stream that survives ``kill -9`` of its server: ``make demo``.

Starts a server with the model that comes first, submits a story, kills the server in the middle of it, starts it again
on the same data directory, and goes on reading. The client resumes by itself after the last position it saw.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time

from rich.console import Console

from penstock import Client
from penstock.client import End
from penstock.core.errors import PenstockError

console = Console(highlight=False)


def start(port: int, data: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "penstock", "serve", "--port", str(port), "--data-dir", data]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as data:
        server = start(port, data)
        try:
            client = Client(f"http://127.0.0.1:{port}")
            with console.status("Starting a server; the first time it fetches a model (93 MB)…"):
                while not ready(client):
                    if server.poll() is not None:
                        sys.exit("The server did not start: try `penstock serve` to see why.")
                    time.sleep(0.2)
            job = client.submit(
                messages=[{"role": "user", "content": "Tell me a long story about a fox and a lantern."}],
                max_tokens=400,
                temperature=0.7,
                seed=11,
            )
            console.print(f"[dim]{job.id} is durable; its story:[/]\n")
            position, attempts = 0, set[int]()
            for event in client.stream(job):
                if isinstance(event, End):
                    break
                assert event.position == position + 1, "a token was lost or repeated"
                position = event.position
                attempts.add(event.attempt)
                console.print(event.text, end="")
                if position == 40:
                    server.kill()
                    server.wait()
                    console.print("\n\n[bold red]kill -9[/] [dim]of the server; starting it again…[/]\n")
                    server = start(port, data)
            console.print(
                f"\n\n[bold green]Positions 1 to {position}, each once[/], under attempts {sorted(attempts)}."
            )
        finally:
            server.terminate()
            server.wait()


def ready(client: Client) -> bool:
    try:
        return any(model.state == "ready" for model in client.models())
    except PenstockError:
        return False


if __name__ == "__main__":
    main()
