"""OpenAI's SDK for Python, unchanged: a response in the background, its stream lost in the middle and gone on with.

    pip install openai
    python examples/openai-python/background_streaming.py

PENSTOCK_URL names another server than http://127.0.0.1:8000. Kill the server while this runs, and start it again: the
text comes to its end all the same.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from openai import APIConnectionError, InternalServerError, OpenAI
from openai.types.responses import ResponseStreamEvent

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="unused")
model = client.models.list().data[0].id

ENDS = ("response.completed", "response.incomplete", "response.failed")


def events(**request: Any) -> Iterator[tuple[ResponseStreamEvent, Callable[[], None]]]:
    """The events of a new background response, each exactly once, whatever becomes of connections and servers.

    With each comes what drops the connection.
    """
    # With a key the request can be sent again when its answer was lost: it does not begin a second response.
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    response, last = "", -1
    while True:
        try:
            stream = (
                client.responses.create(**request, background=True, stream=True, extra_headers=headers)
                if last < 0
                else client.responses.retrieve(response, stream=True, starting_after=last)
            )
            with stream:
                for event in stream:
                    if event.type == "response.created":
                        response = event.response.id
                    last = event.sequence_number
                    yield event, stream.close
                    if event.type in ENDS:
                        return
        except InternalServerError as error:
            if error.status_code != 503:  # 503: it is going down
                raise
        except APIConnectionError:
            pass
        time.sleep(0.5)


shown = ""
final = None
dropped = False
story = events(model=model, input="Tell me a story about a fox.", max_output_tokens=80)
for number, (event, drop) in enumerate(story):
    assert event.sequence_number == number, "an event was lost or repeated"
    if event.type == "response.created":
        print("response:", event.response.id)
    elif event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
        shown += event.delta
        if len(shown) > 40 and not dropped:
            dropped = True
            drop()  # as if the network had gone; the response goes on, whether or not anybody reads it
    elif event.type in ("response.completed", "response.incomplete"):
        final = event.response
print()

assert final is not None, "it failed"
assert final.output_text == shown
assert client.responses.retrieve(final.id).output == final.output
