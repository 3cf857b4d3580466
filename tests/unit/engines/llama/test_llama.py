"""What the llama engine adds to the engine contract: GGUF vocabularies, characters of several tokens, quantisation."""

from __future__ import annotations

import json
import re
import select
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file
from tests.support import tiny_models
from tests.support.encoder import encoder
from tests.support.gguf import bundled_gguf, convert, encoder_gguf, lora_gguf

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.core.events import Prefix
from penstock.core.job import Message, Request, ResponseFormat, Sampling
from penstock.core.ports import Output
from penstock.engines.child.backend import load_backend
from penstock.engines.llama.engine import LlamaBackend, _ChoiceThread
from penstock.engines.llama.gguf_text import UNKNOWN_ID
from penstock.engines.text.model import TextModel
from penstock.models.catalogue import PACKAGED

GREEDY = Sampling(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled_gguf(tmp_path_factory.mktemp("gguf"), "q8_0")


@pytest.fixture(scope="module")
def backend(file: Path) -> LlamaBackend:
    return loaded(file)


def loaded(file: Path, **options: str) -> LlamaBackend:
    given = {"slots": "4", "context": "256", **options}
    backend = load_backend("llama", "m", str(file), given, lambda what, fraction: None)
    assert isinstance(backend, LlamaBackend)
    return backend


def generate(backend: LlamaBackend, request: Request, prefix: Prefix | None = None) -> list[Output]:
    backend.add(1, request, [prefix or Prefix() for _ in range(request.n)], 1)
    outputs: list[Output] = []
    while backend.busy:
        assert backend.wakeup is not None
        select.select([backend.wakeup], [], [], 60)
        outputs += backend.step()
    return outputs


def told(outputs: list[Output]) -> tuple[list[int], str]:
    return [id for each in outputs for id in each.ids], "".join(text for each in outputs for text in each.texts)


def test_it_tells_precision_context_and_chat(backend: LlamaBackend) -> None:
    assert backend.info.context_length == 256
    assert backend.info.precision == "q8_0"
    assert backend.info.chat
    assert backend.info.vocab_size == 4096


def test_prompts_are_cut_as_by_the_tokenizer_of_the_same_model(backend: LlamaBackend) -> None:
    text = TextModel.load(PACKAGED / "millrace")
    for prompt in ("Once upon a time", "What is 12 + 7? It's easy!", "größer, 水車が回る 🚰"):
        outputs = generate(backend, Request("m", prompt=prompt, sampling=GREEDY))
        assert outputs[0].prompt_tokens == len(text.encode(prompt)), prompt
    messages = (Message("user", "Hello there"),)
    outputs = generate(backend, Request("m", messages=messages, sampling=GREEDY))
    assert outputs[0].prompt_tokens == len(text.encode_request(Request("m", messages=messages)))


def test_a_character_of_several_tokens_has_all_its_ids(backend: LlamaBackend) -> None:
    """llama.cpp swallows the tokens that leave a character incomplete."""
    wanted = '"水車が回る 🚰"'
    form = ResponseFormat("json_schema", {"const": wanted[1:-1]})
    request = Request("m", prompt="x", sampling=Sampling(max_tokens=60, temperature=0.0), response_format=form)
    outputs = generate(backend, request)
    ids, text = told(outputs)
    assert text == wanted
    assert UNKNOWN_ID not in ids
    model = TextModel.load(PACKAGED / "millrace")
    assert model.tokenizer.decode([id for id in ids if id not in model.eos_ids]) == wanted
    # Cut in the middle of a character, and continued: the grammar knows what it has already seen.
    for cut in range(1, len(ids)):
        texts = [text for output in outputs for text in output.texts]
        rest_ids, rest = told(generate(backend, request, Prefix(ids[:cut], texts[:cut])))
        assert "".join(texts[:cut]) + rest == wanted, cut
        assert len(rest_ids) == len(ids) - cut


def test_bytes_that_never_become_a_character_are_counted_all_the_same(backend: LlamaBackend) -> None:
    model = TextModel.load(PACKAGED / "millrace")
    half = model.tokenizer.encode("水", add_special_tokens=False).ids[0]
    sampling = Sampling(max_tokens=5, temperature=0.0, logit_bias={half: 100.0}, ignore_eos=True)
    outputs = generate(backend, Request("m", prompt="x", sampling=sampling))
    ids, text = told(outputs)
    assert len(ids) == 5
    assert set(text) == {"\N{REPLACEMENT CHARACTER}"}
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.finish_reasons == ("length",)


def test_forged_special_tokens_are_plain_text(backend: LlamaBackend) -> None:
    honest = Request("m", messages=(Message("user", "a <|end|> b"),), sampling=GREEDY)
    pieces = backend.text.pieces(honest)
    assert all(not isinstance(piece, str) or "<|end|> b" not in piece for piece in pieces)
    special = Request("m", prompt="a <|end|> b", sampling=GREEDY)
    (tokens_in_chat,) = {o.prompt_tokens for o in generate(backend, honest) if o.prompt_tokens is not None}
    (tokens_raw,) = {o.prompt_tokens for o in generate(backend, special) if o.prompt_tokens is not None}
    assert tokens_in_chat > tokens_raw + 2  # <|end|> in letters, not as one token


def test_every_choice_has_its_own_seed_and_its_logprobs(backend: LlamaBackend) -> None:
    sampling = Sampling(max_tokens=8, temperature=1.5, seed=3, logprobs=2)
    outputs = generate(backend, Request("m", prompt="Once", sampling=sampling, n=2))
    assert [o.prompt_tokens is not None for o in outputs] == [True] + [False] * (len(outputs) - 1)
    by_choice = [
        [id for o in outputs for id, c in zip(o.ids, o.choices or [], strict=True) if c == choice] for choice in (0, 1)
    ]
    assert [len(ids) for ids in by_choice] == [8, 8]
    assert by_choice[0] != by_choice[1]
    logprobs = [each for o in outputs for each in o.logprobs or []]
    assert len(logprobs) == 16
    assert all(each is not None and len(each.top) in (2, 3) for each in logprobs)


def test_what_llama_cpp_had_of_a_prompt_is_told_with_its_count(backend: LlamaBackend) -> None:
    prompt = tuple(range(100, 180))

    def counts(ids: tuple[int, ...], prefix: Prefix | None = None, **sampling: int) -> tuple[int | None, int]:
        asked = Request("m", prompt_ids=ids, sampling=Sampling(5, temperature=0.0, **sampling))
        first, *others = generate(backend, asked, prefix)
        assert {output.cached_tokens for output in others} <= {0}
        return first.prompt_tokens, first.cached_tokens

    assert counts(prompt) == (80, 0)
    assert counts(prompt) == (80, 79)
    assert counts((*prompt[:60], 7, 8, 9)) == (63, 60)
    assert counts((*prompt[:60], 7, 8, 9), min_tokens=2) == (63, 62), "of the first of many calls"
    assert counts((*prompt[:60], 7, 8, 9), Prefix([200, 201], ["", ""])) == (63, 63), "of the prompt, not the reply"


def test_what_cannot_be_served_says_why(tmp_path: Path, backend: LlamaBackend) -> None:
    with pytest.raises(InvalidRequest, match="4095"):
        backend.add(9, Request("m", prompt_ids=(5000,), sampling=GREEDY), [Prefix()], 1)
    with pytest.raises(InvalidRequest, match="4095"):
        backend.add(9, Request("m", prompt="x", sampling=Sampling(logit_bias={5000: 1.0})), [Prefix()], 1)
    assert not backend.busy
    bad: list[tuple[dict[str, Any], str]] = [
        ({"path": None}, "--model m=FILE"),
        ({"path": "/nowhere.gguf"}, "no file /nowhere.gguf"),
        ({"path": str(tiny_models.llama(tmp_path / "hf") / "config.json")}, "not a GGUF file"),
        ({"path": "/nowhere.gguf", "slot": "3"}, "slots"),
    ]
    for given, words in bad:
        path = given.pop("path")
        with pytest.raises(ModelLoadError, match=words):
            load_backend("llama", "m", path, given, lambda what, fraction: None)


def test_it_listens_for_nobody(backend: LlamaBackend) -> None:
    """llama.cpp always opens its own HTTP port; it answers only who knows this process's key."""
    url = backend.server.listening_address
    assert "127.0.0.1" in url
    reply = httpx.post(f"{url}/completion", json={"prompt": "x"}, timeout=10)
    assert reply.status_code == 401


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ({"type": "string", "format": "uri", "maxLength": 20}, r'"[A-Za-z][A-Za-z0-9+.-]*:.*"'),
        ({"type": "array", "items": {"format": "uri", "type": "string", "maxLength": 9}, "maxItems": 2}, r"\[.*\]"),
        ({"type": "string", "format": "password", "maxLength": 5}, r'".{0,5}"'),
    ],
)
def test_what_its_own_library_cannot_compile_is_guided_here(
    backend: LlamaBackend, capfd: pytest.CaptureFixture[str], schema: dict[str, Any], pattern: str
) -> None:
    form = ResponseFormat("json_schema", schema)
    for sampling in (Sampling(max_tokens=80, temperature=1.0, seed=2), Sampling(80, temperature=0, logprobs=1)):
        outputs = generate(backend, Request("m", prompt="Once", sampling=sampling, response_format=form))
        _, text = told(outputs)
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.finish_reasons == ("stop",)
        assert re.fullmatch(pattern, text)
        json.loads(text)
    assert ("llg error" in capfd.readouterr().err) == ("uri" in json.dumps(schema)), "does it still not know it?"


def test_a_reply_that_is_drawn_here_ends_where_the_context_does(backend: LlamaBackend) -> None:
    sampling = Sampling(max_tokens=300, temperature=0.0, ignore_eos=True, min_tokens=300)
    outputs = generate(backend, Request("m", prompt="Once upon a time", sampling=sampling))
    ids, _ = told(outputs)
    assert outputs[0].prompt_tokens is not None
    assert len(ids) + outputs[0].prompt_tokens == 256
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.finish_reasons == ("length",)


def test_a_call_that_breaks_costs_its_job_alone(backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(sequence: Any, chunk: Any) -> None:
        if sequence._choices.key == 7:
            raise KeyError("timings")
        whole(sequence, chunk)

    whole = _ChoiceThread._read
    monkeypatch.setattr(_ChoiceThread, "_read", read)
    backend.add(7, Request("m", prompt="x", sampling=GREEDY), [Prefix()], 1)
    outputs = generate(backend, Request("m", prompt="x", sampling=GREEDY))
    ends = {each.key: each.finish for each in outputs if each.finish is not None}
    while 7 not in ends:
        assert backend.wakeup is not None
        assert select.select([backend.wakeup], [], [], 60)[0]
        ends |= {each.key: each.finish for each in backend.step() if each.finish is not None}
    assert ends[1].error is None
    assert ends[7].error is not None
    assert (ends[7].error.code, "KeyError" in ends[7].error.message) == ("engine_error", True)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(max_tokens=16, min_tokens=16)], ids=["drawn there", "drawn here"]
)
def test_a_cancelled_prompt_is_left_at_the_next_batch(
    file: Path, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    """A short request used to wait until the whole prompt of one that nobody wanted any more was computed."""
    monkeypatch.setattr("penstock.engines.llama.engine.BATCH", 32)
    backend = loaded(file, slots="1", context="1024", threads="1")
    complete, begun, processed = backend.server.handle_completions, threading.Event(), [0]

    def watched(body: dict[str, Any], take: Any) -> None:
        def note(chunk: dict[str, Any]) -> bool:
            processed.append(chunk.get("prompt_progress", {}).get("processed", 0))
            if processed[-1] >= 64:
                begun.set()
                cancelled.wait(60)
            wanted: bool = take(chunk)
            return wanted

        complete(body, note)

    cancelled = threading.Event()
    monkeypatch.setattr(backend, "server", SimpleNamespace(handle_completions=watched))
    backend.add(7, Request("m", prompt_ids=tuple(range(100, 1000)), sampling=sampling), [Prefix()], 1)
    assert begun.wait(60)
    backend.abort(7)
    cancelled.set()
    generate(backend, Request("m", prompt_ids=(5, 6), sampling=Sampling(max_tokens=1)))
    assert max(processed) == 64


def test_each_adapter_writes_what_its_merged_weights_write(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    files, adapters = {"m": convert(base, tmp_path / "base.gguf")}, {}
    for seed, name in enumerate(("m-a", "m-b")):
        random = np.random.default_rng(seed)
        matrices, merged = {}, dict(tensors)
        for layer in range(2):
            key = f"model.layers.{layer}.mlp.down_proj.weight"
            down, up = (random.normal(0, 0.4, shape) for shape in ((4, 96), (64, 4)))
            matrices[f"blk.{layer}.ffn_down.weight"] = (down, up)
            merged[key] = (tensors[key] + 2 * up @ down).astype(np.float32)  # alpha 8 over rank 4
        adapters[name] = lora_gguf(tmp_path / f"{name}.gguf", matrices, 8.0)
        folder = shutil.copytree(base, tmp_path / name)
        save_file(merged, folder / "model.safetensors")
        files[name] = convert(folder, tmp_path / f"{name}-merged.gguf")

    def reply(backend: LlamaBackend, model: str, sampling: Sampling) -> list[int]:
        return told(generate(backend, Request(model, prompt_ids=(5, 6, 7), sampling=sampling)))[0]

    backend = loaded(
        files["m"], adapters=",".join(f"{name}={path}" for name, path in adapters.items()), threads="1", slots="2"
    )
    for sampling in (replace(GREEDY, ignore_eos=True), replace(GREEDY, ignore_eos=True, min_tokens=16)):
        right = {name: reply(loaded(file, threads="1", slots="1"), name, sampling) for name, file in files.items()}
        assert len({tuple(ids) for ids in right.values()}) == 3, "an adapter that changes nothing"
        for name in ("m", "m-a", "m-b", "m-a", "m"):  # one after the other in the same slot, with one prompt
            assert reply(backend, name, sampling) == right[name], name
    requests = [Request(name, prompt_ids=(5, 6, 7), sampling=sampling) for name in right]
    found: dict[int, list[int]] = {key: [] for key in range(3)}
    for key, request in enumerate(requests):
        backend.add(key, request, [Prefix()], 1)
    while backend.busy:
        assert backend.wakeup is not None
        select.select([backend.wakeup], [], [], 60)
        for output in backend.step():
            found[output.key] += output.ids
    assert list(found.values()) == list(right.values())


def test_an_adapter_that_is_not_there_is_told(file: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"convert_lora_to_gguf\.py"):
        loaded(file, adapters="a=/nowhere.gguf")


@pytest.mark.parametrize("kind", ["gemma4", "t5", "plamo2", "rwkv"])
def test_tokens_of_every_kind_of_vocabulary_are_the_text_that_llama_cpp_makes_of_them(
    tmp_path: Path, kind: str
) -> None:
    file = convert(tiny_models.llama(tmp_path / "base"), tmp_path / "model.gguf", vocabulary=kind)
    backend = loaded(file, threads="1", slots="1")
    random = np.random.default_rng(0)
    character = [3 + byte for byte in "水".encode()]
    for _ in range(8):
        ids = [*character, *random.integers(259, 275, 6).tolist(), *character]
        answer = httpx.post(
            f"{backend.server.listening_address}/detokenize",
            json={"tokens": ids},
            headers={"Authorization": f"Bearer {backend._key}"},
            trust_env=False,
        )
        detokenizer = backend.text.detokenizer(continuing=True)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == answer.json()["content"]
    ids, _ = told(generate(backend, Request("m", prompt="the water", sampling=replace(GREEDY, ignore_eos=True))))
    assert len(ids) == 16


def test_an_encoder_is_told_where_it_is_served(tmp_path: Path) -> None:
    file = encoder_gguf(encoder(tmp_path / "m"), tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match="is an encoder"):
        loaded(file)
