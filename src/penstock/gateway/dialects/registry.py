"""The dialects that are spoken: one folder and one line each."""

from __future__ import annotations

from penstock.gateway.dialects.anthropic import routes as anthropic
from penstock.gateway.dialects.compat import routes as compat
from penstock.gateway.dialects.native import routes as native
from penstock.gateway.dialects.openai import chat, completions, embeddings
from penstock.gateway.dialects.responses import routes as responses
from penstock.gateway.dialects.tokens import routes as tokens
from penstock.gateway.operation import Batchable, Operation

DIALECTS: list[Operation] = [
    *native.OPERATIONS,
    *chat.OPERATIONS,
    *completions.OPERATIONS,
    *responses.OPERATIONS,
    *embeddings.OPERATIONS,
    *tokens.OPERATIONS,
    *anthropic.OPERATIONS,
    *compat.OPERATIONS,
]

#: What a batch can be made of, by its path.
BATCHABLE: dict[str, Batchable] = {
    operation.path: operation.batch for operation in DIALECTS if operation.batch is not None
}
