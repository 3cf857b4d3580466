"""OpenAI's SDK for Python, unchanged: a chat is streamed, its connection lost in the middle, and gone on with.

    pip install openai
    python examples/openai-python/chat.py

PENSTOCK_URL names another server than http://127.0.0.1:8000.
"""

from __future__ import annotations

import os
import uuid

from openai import OpenAI, Stream
from openai.types.chat import ChatCompletionChunk

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="unused")
model = client.models.list().data[0].id

# With a key a request can be repeated: it finds the reply that it began, instead of beginning another.
key = str(uuid.uuid4())


def ask() -> Stream[ChatCompletionChunk]:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a story about a fox."}],
        max_completion_tokens=60,
        stream=True,
        extra_headers={"Idempotency-Key": key},
    )


shown = ""
with ask() as stream:
    print("job:", stream.response.headers["x-penstock-job"])
    for chunk in stream:
        text = chunk.choices[0].delta.content or ""
        print(text, end="", flush=True)
        shown += text
        if len(shown) > 40:
            break  # as if the network had gone; the job goes on for 10 s without a reader

# The same reply, from its beginning: what was shown already is left out.
skip = len(shown)
with ask() as stream:
    for chunk in stream:
        text = chunk.choices[0].delta.content or ""
        print(text[skip:], end="", flush=True)
        skip = max(0, skip - len(text))
print()
