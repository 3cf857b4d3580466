"""OpenAI's SDK for Python, unchanged: a conversation of two responses, the second one streamed.

    pip install openai
    python examples/openai-python/responses.py

PENSTOCK_URL names another server than http://127.0.0.1:8000.
"""

from __future__ import annotations

import os

from openai import NotFoundError, OpenAI

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="unused")
model = client.models.list().data[0].id

first = client.responses.create(model=model, input="What is a river?", max_output_tokens=60)
print(first.output_text)

# The server keeps the conversation: what was said before need not be sent again.
shown = ""
with client.responses.stream(
    model=model, input="And what is a lake?", previous_response_id=first.id, max_output_tokens=60
) as stream:
    for event in stream:
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
            shown += event.delta
    print()
    second = stream.get_final_response()
assert second.output_text == shown

# Everything that the second response answered: question, answer, question. The SDK fetches page after page.
items = client.responses.input_items.list(second.id, order="asc", limit=2)
asked = [item.content[0].text for item in items if item.type == "message"]
assert asked == ["What is a river?", first.output_text, "And what is a lake?"], asked

# They are kept for a while (`result_ttl`, an hour), or until they are deleted.
client.responses.delete(first.id)
client.responses.delete(second.id)
try:
    client.responses.retrieve(second.id)
except NotFoundError:
    pass
else:
    raise AssertionError("a deleted response is still there")
