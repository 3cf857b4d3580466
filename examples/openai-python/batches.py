"""OpenAI's SDK for Python, unchanged: a file of requests is uploaded, run as a batch, and its results are fetched.

    pip install openai
    python examples/openai-python/batches.py

PENSTOCK_URL names another server than http://127.0.0.1:8000.
"""

from __future__ import annotations

import json
import os
import tempfile
import time

from openai import OpenAI

url = os.environ.get("PENSTOCK_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="unused")
model = client.models.list().data[0].id

# One request a line. Results come in any order, so each has a name.
questions = {"river": "What is a river?", "mill": "What is a mill?", "fox": "What is a fox?"}
with tempfile.NamedTemporaryFile("w+", suffix=".jsonl") as file:
    for name, question in questions.items():
        body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 60}
        line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        file.write(json.dumps(line) + "\n")
    file.flush()
    with open(file.name, "rb") as upload:
        input_file = client.files.create(file=upload, purpose="batch")

batch = client.batches.create(input_file_id=input_file.id, endpoint="/v1/chat/completions", completion_window="24h")
print("batch:", batch.id)
while batch.status in ("validating", "in_progress", "finalizing"):
    time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
assert batch.status == "completed", batch.status
assert batch.request_counts is not None
assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 3, 0)

assert batch.output_file_id is not None
for line in client.files.content(batch.output_file_id).text.splitlines():
    result = json.loads(line)
    assert result["response"]["status_code"] == 200
    print(questions[result["custom_id"]], result["response"]["body"]["choices"][0]["message"]["content"])

# Every batch that there is; the SDK fetches page after page.
assert batch.id in [each.id for each in client.batches.list(limit=2)]

# Files are kept for thirty days, or until they are deleted.
client.files.delete(input_file.id)
client.files.delete(batch.output_file_id)
