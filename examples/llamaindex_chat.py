"""LlamaIndex: a chat streamed, and a completion.

    pip install llama-index-llms-openai-like        # or, as tested: make sdks, then .venv-examples/bin/python
    python examples/llamaindex_chat.py

PENSTOCK_URL names another server than http://127.0.0.1:8000.
"""

from __future__ import annotations

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
llm = OpenAILike(
    api_base=f"{url}/v1",
    api_key="unused",
    model=os.environ.get("PENSTOCK_MODEL", "smollm2"),
    is_chat_model=True,  # else it sends everything to /v1/completions
    context_window=1024,
    max_tokens=40,
)

for chunk in llm.stream_chat([ChatMessage(role="user", content="What is a river?")]):
    print(chunk.delta, end="", flush=True)
print()
print(llm.complete("What is a fox?").text)
