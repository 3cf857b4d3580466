"""Submit a prompt, poll for its result, print the metrics: the plainest way to use a task queue.

    python examples/client_example.py --url http://127.0.0.1:8000 "Once upon a time"

It asks again at growing intervals, waits as long as the server says where that is busy or away for a moment, and sends
an idempotency key, so that a submit whose answer was lost can be repeated without generating twice.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import uuid
from typing import Any

import httpx

#: Seconds between two looks at a task: from the first one on, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


def send(client: httpx.Client, until: float, method: str, path: str, **options: Any) -> httpx.Response:
    """Send a request, again while the server is away or busy. Raises if it is refused, or not taken before *until*."""
    pause = FIRST_PAUSE
    while True:
        try:
            reply = client.request(method, path, **options)
            if reply.status_code not in (429, 502, 503):
                reply.raise_for_status()
                return reply
            problem = f"{reply.status_code}: {reply.text}"
            wait = float(reply.headers.get("retry-after-ms", pause * 1000)) / 1000
        except httpx.TransportError as error:
            problem, wait = str(error), pause
        if time.monotonic() + wait > until:
            raise TimeoutError(f"{method} {path} was not answered in time. {problem}")
        time.sleep(wait)
        pause = longer(pause)


def longer(pause: float) -> float:
    """The next pause: half as long again, at random, so that many clients don't come back at once."""
    return min(LONGEST_PAUSE, pause * random.uniform(1.3, 1.7))


def generate(client: httpx.Client, prompt: str, timeout: float, **sampling: Any) -> dict[str, Any]:
    """Submit *prompt*, and look at ``/result`` until the task has ended."""
    until = time.monotonic() + timeout
    key = {"idempotency-key": str(uuid.uuid4())}
    task = send(client, until, "POST", "/generate", json={"prompt": prompt, **sampling}, headers=key).json()["task_id"]
    pause = FIRST_PAUSE
    while True:
        reply = send(client, until, "GET", f"/result/{task}")
        answer: dict[str, Any] = reply.json()
        if reply.status_code != 202:
            return answer
        state = send(client, until, "GET", f"/status/{task}").json()
        place = state["position_in_queue"]
        print(f"{task} is {state['status']}" + (f", number {place} in the queue" if place else ""), file=sys.stderr)
        if time.monotonic() + pause > until:
            raise TimeoutError(f"{task} has not ended in time; it goes on: ask for /result/{task} later.")
        time.sleep(pause)
        pause = longer(pause)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--url", default=os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--model", help="the server's first one, if left out")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait altogether")
    options = parser.parse_args()
    sampling = {"model": options.model, "max_tokens": options.max_tokens}
    try:
        with httpx.Client(base_url=options.url, timeout=30) as client:
            answer = generate(client, options.prompt, options.timeout, **sampling)
    except httpx.HTTPStatusError as error:
        sys.exit(f"The server refused it: {error.response.text}")
    except TimeoutError as error:
        sys.exit(str(error))
    if answer["status"] != "completed":
        sys.exit(f"{answer['task_id']} {answer['status']}: {answer['error_message']}")
    print(answer["result"])
    for name, value in answer["metrics"].items():
        print(f"{name:>20}: {value:.3f}" if isinstance(value, float) else f"{name:>20}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
