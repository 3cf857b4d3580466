"""Anthropic's SDK for Python, unchanged: tokens counted, a message streamed, and a tool called.

    pip install anthropic
    python examples/anthropic_python.py

PENSTOCK_URL names another server than http://127.0.0.1:8000. With the small model in the box the choice of a city is
arbitrary, but the form of the call is right: the server holds every token to the schema.
"""

from __future__ import annotations

import os

from anthropic import Anthropic

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
client = Anthropic(base_url=url, api_key="unused")
model = client.models.list().data[0].id

question = {"role": "user", "content": "What is a river?"}
counted = client.messages.count_tokens(model=model, messages=[question]).input_tokens

shown = ""
with client.messages.stream(model=model, max_tokens=60, messages=[question]) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
        shown += text
    print()
    message = stream.get_final_message()
assert message.content[0].text == shown
assert message.usage.input_tokens == counted
print("job:", stream.response.headers["x-penstock-job"])

weather = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Ulm", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
asked = [{"role": "user", "content": "How is the weather in Rome?"}]
called = client.messages.create(
    model=model,
    max_tokens=100,
    messages=asked,
    tools=[weather],
    tool_choice={"type": "any"},  # with "auto" a model decides by itself
)
assert called.stop_reason == "tool_use"
(call,) = called.content
result = f"Rain in {call.input['city']}."
print(call.name, call.input, "→", result)

answer = client.messages.create(
    model=model,
    max_tokens=60,
    messages=[
        *asked,
        called.to_param(),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": result}]},
    ],
    tools=[weather],
    tool_choice={"type": "none"},
)
assert answer.content[0].text
print(answer.content[0].text)
