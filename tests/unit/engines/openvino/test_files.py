"""From what the operator typed to files."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from tests.support import tiny_models as tiny
from tests.support.gguf import bundled_gguf

from penstock.core.errors import ModelLoadError
from penstock.engines.models import find_gguf, find_weights
from penstock.engines.openvino.files import find, resolve
from penstock.models.catalogue import PACKAGED


def ignore(what: str, fraction: float | None) -> None:
    pass


def test_a_folder_with_an_openvino_model_is_used_as_it_is(tmp_path: Path) -> None:
    for name in ("openvino_model.xml", "openvino_model.bin", "tokenizer.json"):
        (tmp_path / name).touch()
    found = resolve("any", str(tmp_path), ignore)
    assert (found.ir, found.text, found.precision) == (tmp_path / "openvino_model.xml", tmp_path, "f32")
    with pytest.raises(ModelLoadError, match="--weight-format int4"):
        resolve("any", str(tmp_path), ignore, "int4-fast")


def test_a_safetensors_folder_is_converted_into_the_cache(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model")
    found = resolve("any", str(folder), ignore, cache=tmp_path / "cache")
    assert found.ir.is_file()
    assert found.ir.is_relative_to(tmp_path / "cache")
    assert (found.text / "tokenizer.json").is_file()


def test_a_folder_without_a_tokenizer_is_refused_before_it_is_converted(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        resolve("any", str(folder), ignore, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_short_name_is_the_folder_in_the_package_or_the_one_it_was_pulled_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    assert find("millrace", None) == PACKAGED / "millrace"
    assert find("mine", "millrace") == PACKAGED / "millrace"
    assert find("smollm2", None) is None  # to be pulled
    pulled = tmp_path / "models" / "smollm2"
    pulled.mkdir(parents=True)
    file = bundled_gguf(tmp_path, "q8_0").rename(pulled / "some.gguf")
    assert find("smollm2", None) == find("mine", "smollm2") == file
    assert find_gguf("smollm2", None) == file
    with pytest.raises(ModelLoadError, match="engine openvino or llama"):
        find_weights("smollm2", None)
    with pytest.raises(ModelLoadError, match="or smollm2 or"):
        find("nothing", None)


def test_a_path_that_exists_wins_over_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    tiny.llama(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    assert find("mine", "minilm") == Path("minilm")
    assert find("minilm", None) is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "no model 'nowhere'"),
        ("/nowhere/model.gguf", "no file"),
        ("../..", "neither openvino_model.xml"),
        ("org/../../x", "no model"),
    ],
)
def test_what_is_not_there(path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(ModelLoadError, match=words):
        resolve("any", path, ignore)


def test_a_gguf_file_is_converted_with_its_tokenizer(tmp_path: Path) -> None:
    file = bundled_gguf(tmp_path, "q8_0")
    found = resolve("any", str(file), ignore, cache=tmp_path / "cache")
    assert found.ir.is_relative_to(tmp_path / "cache")
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= {each.name for each in found.text.iterdir()}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_hub")
def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.llama(tmp_path / "snapshot")
    asked: list[object] = []

    def snapshot(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, "*.bin" in allow_patterns, "*.py" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("any", "org/model", ignore, cache=tmp_path / "cache").ir.is_file()
    assert asked == [("org/model", False, False)]


@pytest.mark.usefixtures("no_hub")
def test_without_a_network_the_error_says_how_to_get_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"the hub cannot be reached.*hf download org/model"):
        resolve("org/model", None, ignore)
