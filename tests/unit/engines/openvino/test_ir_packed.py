"""Weights in 8 and 4 bits: what they stand for, which of them, and what is computed with them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import tiny_models as tiny
from tests.unit.engines.openvino.test_ir import EXACT, ignore

from penstock.core.errors import ModelLoadError
from penstock.core.events import Prefix
from penstock.core.job import Request, Sampling
from penstock.core.ports import Output
from penstock.engines.child.backend import load_backend
from penstock.engines.openvino.ir import built
from penstock.engines.openvino.ir.packed import GROUP, Packed, int4, int8, smaller, with_minimum
from penstock.engines.openvino.ir.weights import Plain, Safetensors, Weights
from penstock.engines.openvino.ov import ov
from penstock.engines.openvino.precision import SMALL, automatic

Array = np.ndarray[Any, Any]


def matrix(rows: int = 24, columns: int = 96) -> Array:
    return np.random.default_rng(5).normal(0, 1, (rows, columns)).astype(np.float32)


def computed(packed: Packed, x: Array) -> tuple[Array, set[str]]:
    """``x @ weights.T`` on the device, and the types of the constants that it kept."""
    op = ov.opset13
    given = op.parameter([-1, x.shape[1]], ov.Type.f32)
    model = ov.Model([op.result(op.matmul(given, packed.node(), False, True))], [given], "product")
    compiled = ov.Core().compile_model(model, "CPU", EXACT)
    result: Array = compiled([x])[0]
    nodes = compiled.get_runtime_model().get_ops()
    return result, {node.get_rt_info()["outputPrecisions"].astype(str) for node in nodes}


FORMS = {
    "i8": int8(matrix()),
    "u4": int4(matrix()),
    "i4": Packed((np.arange(24 * 96).reshape(24, 96) % 16 - 8).astype(np.int8), 4, np.full((24, 3), 0.5, np.float32)),
    "u8": with_minimum(
        (np.arange(24 * 96).reshape(24, 96) % 32).astype(np.uint8),
        8,
        np.linspace(0, 1, 24 * 6, dtype=np.float32).reshape(24, 6),  # one group has no scale
        np.linspace(-2, 3, 24 * 6, dtype=np.float32).reshape(24, 6),
    ),
}


@pytest.mark.parametrize("kind", FORMS)
def test_the_device_multiplies_with_the_codes(kind: str) -> None:
    packed, x = FORMS[kind], matrix(5)
    found, types = computed(packed, x)
    np.testing.assert_allclose(found, x @ packed.widened().T, rtol=1e-5, atol=1e-4)
    assert kind in types


def test_8_bits_are_off_by_half_a_step_at_most() -> None:
    weights = matrix()
    step = np.abs(weights).max(-1, keepdims=True) / 127
    assert (np.abs(int8(weights).widened() - weights) <= step * 0.501).all()


def test_4_bits_are_closer_than_the_nearest_of_16_even_steps() -> None:
    weights = matrix()
    groups = weights.reshape(24, -1, GROUP)
    low = groups.min(-1, keepdims=True)
    step = (groups.max(-1, keepdims=True) - low) / 15
    even = np.round((groups - low) / step) * step + low
    ours = int4(weights).widened()
    assert ((ours - weights) ** 2).sum() < 0.99 * ((even - groups) ** 2).sum()
    assert (np.abs(ours.reshape(groups.shape) - groups) < step).all()


def test_4_bits_find_weights_again_that_had_no_more() -> None:
    """Those of a Q4_1 file, widened, are the same numbers."""
    weights = int4(matrix()).widened()
    np.testing.assert_allclose(int4(weights).widened(), weights, atol=1e-5)


def test_weights_of_zero_stay_zero() -> None:
    for make in (int8, int4):
        assert not make(np.zeros((3, 64), np.float32)).widened().any()


def test_rows_that_no_groups_fit_have_8_bits() -> None:
    assert int4(matrix(4, 40)).bits == 8


def test_a_large_matrix_is_made_smaller_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = matrix()
    whole = int4(weights)
    monkeypatch.setattr("penstock.engines.openvino.ir.packed._AT_ONCE", 5 * 96)
    parts = smaller(Plain(weights), 4)
    for name in ("codes", "scale", "zero"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


class _Source:
    kind = ""
    tensors: dict[str, Plain | Packed] = {  # noqa: RUF012
        "embed.weight": Plain(matrix(100)),
        "proj.weight": Plain(matrix()),
        "norm.weight": Plain(matrix()[0]),
        "embed_positions.weight": Plain(matrix()),
        "mlp.gate.weight": Plain(matrix()),
        "packed.weight": int4(matrix()),
        "wide.weight": int8(matrix()),
    }

    def names(self) -> Iterable[str]:
        return self.tensors

    def read(self, name: str) -> Plain | Packed:
        return self.tensors[name]


@pytest.mark.parametrize(
    ("stored", "bits"),
    [
        ("as they are", [32, 32, 32, 32, 32, 4, 8]),
        ("int8", [8, 8, 32, 32, 32, 4, 8]),
        ("int4", [8, 4, 32, 32, 32, 4, 4]),  # the embedding has as many rows as there are tokens
    ],
)
def test_which_weights_are_made_smaller(stored: Any, bits: list[int]) -> None:
    weights = Weights(_Source(), stored, 100, ignore)
    found = []
    for name in _Source.tensors:
        node = weights.constant(name)
        while node.get_input_size():
            node = node.input_value(0).get_node()
        found.append(node.get_output_element_type(0).bitwidth)
    assert found == bits


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[float | None] = []
    built(tiny.llama(tmp_path / "model"), tmp_path / "cache", lambda what, fraction: told.append(fraction))
    assert told[0] == 0
    assert told[-1] == 1
    assert told == sorted(told)  # type: ignore[type-var]


def test_a_network_of_another_precision_is_another_network(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model")
    places = {built(folder, tmp_path / "cache", ignore, stored) for stored in ("as they are", "int8", "int4")}
    assert len(places) == 3
    sizes = sorted((place / "openvino_model.bin").stat().st_size for place in places)
    assert sizes[0] < sizes[1] < sizes[2] / 2


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelLoadError, match="cannot be read"):
        Safetensors(folder)


# ------------------------------------------------------------------------------------------ what it costs


def finished(precision: str, request: Request) -> list[Output]:
    backend = load_backend("openvino", "millrace", None, {"precision": precision}, ignore)
    backend.add(0, request, [Prefix()], 1)
    outputs = []
    while backend.busy:
        outputs += backend.step()
    return outputs


def test_what_a_precision_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The perplexity of what the model itself writes."""
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    sampling = Sampling(max_tokens=300, seed=3, ignore_eos=True)
    written = finished("f32", Request("millrace", prompt="Once upon a time", sampling=sampling))
    ids = tuple(id for output in written for id in output.ids)

    def perplexity(precision: str) -> float:
        asked = Request("millrace", prompt_ids=ids, task="score", sampling=Sampling(logprobs=0))
        told = [score for output in finished(precision, asked) for score in output.logprobs or ()]
        scores = [score.logprob for score in told if score is not None]
        return math.exp(-sum(scores) / len(scores))

    exact = perplexity("f32")
    assert perplexity("int8") == pytest.approx(exact, rel=0.01)
    assert perplexity("int4") == pytest.approx(exact, rel=0.05)
    assert perplexity("int4") != exact


@pytest.mark.parametrize(
    ("size", "memory", "packed", "chosen"),
    [
        (SMALL, 8e9, False, "f32"),
        (SMALL + 1, 8e9, False, "int8"),
        (14e9, 16e9, False, "int8"),
        (14e9, 8e9, False, "int4"),
        (14e9, 8e9, True, "f32"),
    ],
)
def test_auto_goes_by_size(size: float, memory: float, packed: bool, chosen: str) -> None:
    assert automatic(int(size), int(memory), lambda: packed) == chosen
