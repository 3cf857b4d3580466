"""LoRA adapters as clients see them: models of their own, beside the model that they change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support import tiny_models
from tests.support.api import poll
from tests.support.server import PATIENCE, Server
from tests.support.torch import NO_TORCH, TORCH

if TORCH is None:
    pytest.skip(NO_TORCH, allow_module_level=True)

from tests.support.lora import adapter


async def test_an_adapter_is_a_model_and_its_jobs_load_its_parent(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    base = tiny_models.llama(tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter")
    options = {"adapters": f"tiny-sql={folder}", "slots": "4", "device": "cpu"}
    served = {"name": "tiny", "path": str(base), "engine": "transformers", "options": options, "load": "demand"}
    server = make_server(models=[served])
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        views = {each["id"]: each for each in (await http.get("/v1/models")).json()["data"]}
        assert {name: (each["state"], each["root"], each.get("parent")) for name, each in views.items()} == {
            "tiny": ("unloaded", "tiny", None),
            "tiny-sql": ("unloaded", "tiny", "tiny"),
        }

        async def reply(model: str) -> str:
            body = {"model": model, "prompt": "the mill", "max_tokens": 12, "temperature": 0}
            answer = (await http.post("/v1/completions", json=body)).json()
            assert answer["model"] == model
            text: str = answer["choices"][0]["text"]
            return text

        changed = await reply("tiny-sql")
        assert (await http.get("/v1/models/tiny-sql")).json()["context_length"] == 256
        assert await reply("tiny") != changed
        assert await reply("tiny-sql") == changed
        assert (await http.post("/v1/models/tiny-sql/unload")).status_code == 200
        await poll(lambda: http.get("/v1/models/tiny"), lambda answer: answer.json()["state"] == "unloaded")
