"""OpenAI's SDK for Python, unchanged: the model calls a function of this program, and is told what came of it.

    pip install openai
    python examples/openai-python/tools.py

PENSTOCK_URL names another server than http://127.0.0.1:8000. With the small model in the box the choice of a city is
arbitrary, but the form of the call is right: the server holds every token to the schema.
"""

from __future__ import annotations

import os
from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="unused")
model = client.models.list().data[0].id


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Ulm", "Rome"]


question = {"role": "user", "content": "How is the weather in Rome?"}
tools = [openai.pydantic_function_tool(Weather)]

# The helper streams the call, and parses its arguments.
with client.chat.completions.stream(
    model=model,
    messages=[question],
    tools=tools,
    tool_choice="required",  # with "auto" a model decides by itself
) as stream:
    for event in stream:
        if event.type == "tool_calls.function.arguments.delta":
            print(event.arguments_delta, end="", flush=True)
    message = stream.get_final_completion().choices[0].message
assert message.tool_calls
call = message.tool_calls[0]
wanted = call.function.parsed_arguments
assert isinstance(wanted, Weather)
result = f"Rain in {wanted.city}."
print(" →", result)

reply = client.chat.completions.create(
    model=model,
    messages=[
        question,
        {"role": "assistant", "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": result},
    ],
    tools=tools,
    tool_choice="none",
    max_completion_tokens=60,
)
print(reply.choices[0].message.content)
assert reply.choices[0].message.content
