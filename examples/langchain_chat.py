"""LangChain: a chat streamed, a reply as an object, and a tool called.

    pip install langchain-openai        # or, as tested: make sdks, then .venv-examples/bin/python
    python examples/langchain_chat.py

PENSTOCK_URL names another server than http://127.0.0.1:8000. With the small model in the box the answers are no good,
but their form is right: the server holds every token to the schema.
"""

from __future__ import annotations

import os
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
model = ChatOpenAI(base_url=f"{url}/v1", api_key="unused", model=os.environ.get("PENSTOCK_MODEL", "smollm2"))

for chunk in model.stream("What is a river?", max_tokens=40):
    print(chunk.text, end="", flush=True)
print()


class Animal(BaseModel):
    """An animal in one line."""

    kind: Literal["fox", "bear", "owl"]
    legs: int = Field(ge=2, le=4)


print(model.with_structured_output(Animal, method="json_schema").invoke("Which animal hoots?"))


@tool
def weather(city: Literal["Ulm", "Rome"]) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


reply = model.bind_tools([weather], tool_choice="any").invoke("How is the weather in Rome?")
for call in reply.tool_calls:
    print(call["name"], "→", weather.invoke(call["args"]))
