"""The vllm engine on a real vLLM: ``make test-vllm`` (opt-in: vLLM is large).

What it asks of vLLM is also tested everywhere, over a recording: tests/unit/engines/vllm/test_vllm.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence

import httpx
import msgspec
import psutil
import pytest
import pytest_asyncio
from tests.support.server import Server, model, wait_for

from penstock.core.errors import EngineDied, ModelLoadError
from penstock.core.job import Request, ResponseFormat, Sampling
from penstock.core.ports import Lease
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.engines.parts.sampling import _Adjustment
from penstock.testing.engine import EngineContract
from penstock.testing.engine.driver import forever, lease, run

pytest.importorskip("vllm", reason="vLLM is not installed here: run make test-vllm")
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # torch's and vLLM's own
]

#: Compiling takes half a minute and changes nothing that is tested here.
OPTIONS = {"dtype": "float32", "enforce_eager": "on", "max_num_seqs": "64", "kv_cache_gb": "0.5"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 16}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(EngineSpec("vllm", "millrace", None, OPTIONS))
    yield engine
    await engine.close()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared: EngineProcess) -> AsyncIterator[EngineProcess]:
    """One process for all tests; one that a test has closed or killed is started again."""
    if shared.pid is None or shared._death is not None:
        await shared.start()
    yield shared
    if shared.pid is not None and shared._death is None:
        # Until everything that was on its way under the test's keys is out.
        shared.add(1 << 40, lease(shared, max_tokens=1))
        while not any(output.key == 1 << 40 for output in await shared.step()):
            pass


class TestVLLM(EngineContract):
    pass


async def test_it_says_what_it_runs(engine: EngineProcess) -> None:
    (info,) = engine.models
    assert (info.engine, info.precision, info.context_length, info.vocab_size) == ("vllm", "float32", 1024, 4096)
    assert info.chat
    assert not info.unsupported


async def test_a_json_reply_is_valid_wherever_it_is_resumed(engine: EngineProcess) -> None:
    request = Request(
        "millrace",
        prompt="Once upon a time",
        sampling=Sampling(max_tokens=80, temperature=0.0),
        response_format=ResponseFormat("json_schema", SCHEMA),
    )
    (whole,) = await run(engine, leased(engine, request))
    assert set(json.loads(whole.text)) == {"name", "age"}
    for cut in range(1, len(whole.ids)):
        (rest,) = await run(engine, leased(engine, request, whole.ids[:cut], whole.texts[:cut]))
        value = json.loads("".join(whole.texts[:cut]) + rest.text)
        assert set(value) == {"name", "age"}
        assert value["age"] <= 99


def leased(engine: EngineProcess, request: Request, ids: Sequence[int] = (), texts: Sequence[str] = ()) -> Lease:
    made = lease(engine, prefix=ids, texts=texts)
    return msgspec.structs.replace(made, job=msgspec.structs.replace(made.job, request=request))


async def test_penalties_of_a_resumed_reply_count_all_of_it(engine: EngineProcess) -> None:
    settings = {"max_tokens": 48, "presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.3}
    (whole,) = await run(engine, lease(engine, **settings))
    for cut in (6, 24, 40):
        (rest,) = await run(engine, lease(engine, prefix=whole.ids[:cut], texts=whole.texts[:cut], **settings))
        assert whole.ids[:cut] + rest.ids == whole.ids


async def test_carried_penalties_are_those_that_our_own_sampler_computes() -> None:
    import numpy as np
    import torch
    from vllm import SamplingParams

    from penstock.engines.vllm.penalties import ContinuedPenalties

    values = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
    prompt, logged, output = [1, 2, 3], [3, 4, 4, 5], [5, 6]
    logits = np.random.default_rng(1).normal(size=10).astype(np.float32)
    processor = ContinuedPenalties(None, torch.device("cpu"), False)
    penalize = processor.new_req_logits_processor(SamplingParams(extra_args={"logged": 4, **values}))
    got = penalize(prompt + logged, output, torch.tensor(logits.copy()))
    expected = logits.copy()
    _Adjustment(Sampling(**values), 10, prompt, logged + output).apply(expected)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
    assert processor.new_req_logits_processor(SamplingParams()) is None


async def test_a_killed_engine_is_noticed_and_goes_on_behind_the_log(engine: EngineProcess) -> None:
    (whole,) = await run(engine, lease(engine, max_tokens=12))
    engine.add(7, lease(engine, max_tokens=900))
    await engine.step()
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDied):
        await forever(engine)
    await engine.start()
    (rest,) = await run(engine, lease(engine, max_tokens=12, prefix=whole.ids[:5], texts=whole.texts[:5], attempt=2))
    assert len(rest.ids) == 7


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
async def test_workers_of_a_killed_engine_die_with_it() -> None:
    """Tensor parallel: vLLM has processes of its own then."""
    engine = EngineProcess(EngineSpec("vllm", "millrace", None, {**OPTIONS, "tensor_parallel_size": "2"}))
    await engine.start()
    try:
        (result,) = await run(engine, lease(engine, max_tokens=4))
        assert len(result.ids) == 4
        family = psutil.Process(engine.pid).children(recursive=True)
        assert family, "it has workers"
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        for _ in range(600):
            alive = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
            if not alive:
                break
            await asyncio.sleep(0.1)
        assert not alive, f"left behind: {alive}"
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_model_len": "100000"}, "max_model_len"), ({"quantization": "nonsense"}, "quantization")],
)
async def test_what_vllm_cannot_load_says_why(options: dict[str, str], message: str) -> None:
    engine = EngineProcess(EngineSpec("vllm", "millrace", None, {**OPTIONS, **options}))
    with pytest.raises(ModelLoadError, match=message):
        await engine.start()
    await engine.close()


async def test_generate_vllm_answers_from_it(make_server: Callable[..., Server]) -> None:
    server = make_server(models=[model("millrace", engine="vllm", **OPTIONS)], start=False)
    server.spawn()
    await asyncio.to_thread(wait_for, lambda: answers(server), "vLLM is up", 300)
    body = {"prompts": ["Once upon a time", "Rain"], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
        answer = (await http.post(f"{server.url}/generate_vllm", json=body)).json()
    assert answer["model"] == "millrace"
    assert [result["finish_reason"] for result in answer["results"]] == ["length", "length"]
    assert all(result["text"] for result in answer["results"])


def answers(server: Server) -> bool:
    try:
        return server.is_ready()
    except httpx.TransportError:
        return False
