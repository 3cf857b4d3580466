"""The documentation says what the code does: everything in it that can be compared is compared here."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import pytest
from prometheus_client import Counter, Gauge, Histogram

from penstock.core.errors import STATUS_OF_CODE
from penstock.core.events import Ended, Tokens
from penstock.core.job import TERMINAL, TRANSITIONS, Status, Usage
from penstock.core.ports import Broker, QueueStats
from penstock.engines.plugin import engine_names, find_engine
from penstock.gateway.app import OPERATIONS
from penstock.gateway.dialects.anthropic.bodies import CreateMessage
from penstock.gateway.dialects.fields import JobBody
from penstock.gateway.dialects.native.bodies import Generate, GenerateJob
from penstock.gateway.dialects.native.stream import complete_frame, end_frame, feed_frames, token_frames
from penstock.gateway.dialects.openai.bodies import ChatCompletion, TextCompletion
from penstock.gateway.dialects.openai.embeddings import CreateEmbeddings
from penstock.gateway.dialects.responses.bodies import CreateResponse
from penstock.gateway.sse import HEADERS
from penstock.observability.metrics import Metrics
from penstock.settings import OTHER_VARIABLES, PREFIX, SETTINGS, ModelSettings, load_settings
from penstock.worker import placement
from tests.support.conformance import document

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OURS = ["*.md", "docs/**/*.md", "benchmarks/*.md", "tools/**/*.md", "src/penstock/bundled/**/*.md"]
PAGES = sorted({page for pattern in OURS for page in ROOT.glob(pattern)})


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def served_routes() -> set[str]:
    """Every route once, whoever may mean another one by a header."""
    return {f"{each.method} {each.path.replace(':path', '')}" for each in OPERATIONS if each.method != "*"}


def rows(name: str) -> Iterator[list[str]]:
    """The cells of every table row of a page."""
    for line in read(name).splitlines():
        if line.startswith("| ") and not line.startswith("|---"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(name: str, width: int) -> dict[str, list[str]]:
    """Rows of that width by each `code` in their first cell."""
    return {code: row for row in rows(name) if len(row) == width for code in re.findall(r"`([^`]+)`", row[0])}


# ---------------------------------------------------------------------------------------------- routes, fields, errors


class TestApi:
    def test_every_route_is_listed_and_no_other(self) -> None:
        served = served_routes()
        listed = {code for code in table("api.md", 3) if re.match(r"(GET|POST|DELETE|PUT) /", code)}
        assert listed == served

    def test_every_route_is_in_the_openapi_document(self) -> None:
        described = {
            f"{method.upper()} {path}" for path, operations in document()["paths"].items() for method in operations
        }
        served = served_routes()
        assert served - described <= {"GET /openapi.json", "GET /docs", "GET /metrics", "GET /", "GET /static/{path}"}
        assert described <= served

    def test_the_tests_that_it_names_exist(self) -> None:
        named = re.findall(r"`(\w+\.py)::(\w+)`", read("api.md"))
        assert len(named) >= len(served_routes())
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests/integration" / file).read_text(encoding="utf-8"), f"{file}::{test}"

    def test_every_request_field_is_explained(self) -> None:
        known = {
            field.encode_name
            for body in (GenerateJob, Generate, ChatCompletion, TextCompletion)
            for field in msgspec.structs.fields(body)
        }
        section = read("api.md").split("## Request fields")[1].split("## Errors")[0]
        assert known <= set(re.findall(r"`(\w+)`", section))

    def test_every_field_of_a_response_is_explained(self) -> None:
        known = {field.encode_name for field in msgspec.structs.fields(CreateResponse)}
        shared = read("api.md").split("## Request fields")[1].split("## Errors")[0]
        own = read("responses.md").split("## Fields")[1].split("## What becomes of it")[0]
        assert known <= set(re.findall(r"`(\w+)`", shared + own))

    @pytest.mark.parametrize(
        ("body", "heading"), [(CreateEmbeddings, "Embeddings"), (CreateMessage, "Anthropic's messages")]
    )
    def test_every_field_of_the_other_dialects_is_explained(self, body: type, heading: str) -> None:
        own = read("api.md").split(f"### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
        shared = {field.encode_name for field in msgspec.structs.fields(JobBody)}
        known = {field.encode_name for field in msgspec.structs.fields(body)} - shared
        assert known
        assert known <= set(re.findall(r"`(\w+)`", own))

    def test_every_error_code_is_listed_with_its_status(self) -> None:
        listed = {code: int(row[1]) for code, row in table("api.md", 3).items() if row[1].isdigit()}
        assert listed == STATUS_OF_CODE


# ---------------------------------------------------------------------------------------------- rules and their tests


@cache
def definitions(file: Path) -> dict[str, ast.AST]:
    """What *file* defines, by ``name`` or ``Class::name``."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{part.name}": part
                for part in node.body
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def is_test(file: Path, name: str) -> bool:
    """Would pytest find *name* in *file*? A class has its own tests, and those of the contract that it takes on."""
    here = definitions(file)
    owner, _, test = name.rpartition("::")
    if not test.startswith("test_"):
        return False
    if name in here or not owner:
        return name in here
    contracts = [file for part in ("broker", "engine") for file in (ROOT / "src/penstock/testing" / part).glob("*.py")]
    bases = [ast.unparse(base) for base in getattr(here.get(owner), "bases", ())]
    return any(
        is_test(other, f"{base}::{test}")
        for base in bases
        for other in (file, *contracts)
        if base in definitions(other)
    )


#: Routes that the specification's sections 3 to 5 don't have.
BEYOND = re.compile(r" /(tokenize|detokenize|v1/(messages|embeddings|models/.*load|responses/compact)|docs|openapi)")


class TestProof:
    def test_every_rule_names_tests_and_each_exists(self) -> None:
        rules = [row for row in rows("proof.md") if len(row) == 2 and row != ["rule", "shown by"]]
        assert len(rules) > 150
        for rule, shown in rules:
            named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)(\[[^`]+\])?`", shown)
            assert named, f"no test shows: {rule}"
            assert len(named) == shown.count("`") // 2, shown
            for file, name, case in named:
                assert is_test(ROOT / file, name), f"{file}::{name}"
                if case:
                    decorators = [
                        ast.unparse(decorator)
                        for part in (name, name.partition("::")[0])
                        for decorator in getattr(definitions(ROOT / file)[part], "decorator_list", ())
                    ]
                    cases = case.strip("[]").split("-")
                    assert all(any(each in decorator for decorator in decorators) for each in cases), f"{name}{case}"

    def test_every_route_field_and_code_has_its_rule(self) -> None:
        told = " ".join(row[0] for row in rows("proof.md") if len(row) == 2)
        served = served_routes()
        missing = {route for route in served if f"`{route}`" not in told and f"`{route}?" not in told}
        assert not {route for route in missing if not BEYOND.search(route)}
        fields = {field.encode_name for body in (GenerateJob, Generate) for field in msgspec.structs.fields(body)}
        assert not {field for field in fields if f"`{field}`" not in told}
        assert not {code for code in STATUS_OF_CODE if f"`{code}`" not in read("proof.md")}


# ---------------------------------------------------------------------------------------------- protocol, states


class TestProtocol:
    def test_the_bytes_of_the_example(self) -> None:
        job = "job_" + "1".zfill(32)
        ended = Ended(3, 1, Status.COMPLETED, ("stop",), Usage(5, 2))
        stream = b"retry: 1000\n" + token_frames(job, Tokens(1, 1, [17, 4], ["Hello", " é"])) + end_frame(job, ended)
        assert f"```text\n{stream.decode()}```" in read("protocol.md")

    def test_the_bytes_of_the_multiplexed_example(self) -> None:
        job = "job_" + "1".zfill(32)
        ended = Ended(2, 1, Status.COMPLETED, ("stop",), Usage(5, 1))
        stream = feed_frames(job, Tokens(1, 1, [17], ["Hello"]), lambda position: f"gqFhAQ.{position}")
        stream += complete_frame(job, ended, "gqFhAg")
        assert f"```text\n{stream.decode()}```" in read("protocol.md")

    def test_the_headers(self) -> None:
        for name, value in HEADERS:
            assert f"{name.decode()}: {value.decode()}\n" in read("protocol.md")


class TestStates:
    def test_the_drawing_has_every_transition_and_no_other(self) -> None:
        drawing = read("state-machine.md").split("```mermaid")[1].split("```")[0]
        drawn = re.findall(r"^ *(\[\*\]|\w+) --> (\[\*\]|\w+)", drawing, re.MULTILINE)
        expected = {(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters}
        expected |= {("[*]", "queued")} | {(status.value, "[*]") for status in TERMINAL}
        assert set(drawn) == expected

    def test_so_has_the_drawing_of_a_model(self) -> None:
        drawing = read("state-machine.md").split("```mermaid")[2].split("```")[0]
        drawn = re.findall(r"^ *(\w+) --> (\w+)", drawing, re.MULTILINE)
        moves = {(before.value, after.value) for before, afters in placement.TRANSITIONS.items() for after in afters}
        assert set(drawn) == moves

    def test_the_table_says_who_causes_each(self) -> None:
        told = {(row[0], row[1]) for row in rows("state-machine.md") if len(row) == 3}
        assert {(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters} <= told


# ---------------------------------------------------------------------------------------------- settings, metrics


class TestConfiguration:
    def test_every_setting_with_its_variable_and_default(self) -> None:
        listed = {name: row for name, row in table("configuration.md", 5).items() if row[1].startswith(f"`{PREFIX}")}
        assert list(listed) == list(SETTINGS)
        for name, setting in SETTINGS.items():
            variable, place, default = listed[name][1:4]
            assert variable == f"`{PREFIX}{name.upper()}`"
            assert place == (f"`[{setting.section}]` `{setting.key}`" if setting.section else f"`[[{name}]]`")
            if isinstance(setting.default, Path):
                continue  # depends on the machine
            if setting.default is None:
                assert default == "none", name
            elif name == "models":
                entries = json.loads(default.strip("`"))
                assert [ModelSettings(**entry) for entry in entries] == setting.default
            else:
                shown = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
                assert default == f"`{shown}`", name

    def test_the_other_variables(self) -> None:
        for name in OTHER_VARIABLES:
            assert f"`{PREFIX}{name.upper()}`" in read("configuration.md")

    def test_the_keys_of_a_model(self) -> None:
        section = read("configuration.md").split("## Models")[1]
        assert set(ModelSettings.__struct_fields__) <= set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))

    def test_the_example_files_are_valid(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        examples = re.findall(r"```toml\n(.*?)```", read("configuration.md"), re.DOTALL)
        assert examples
        for number, example in enumerate(examples):
            (tmp_path / f"{number}.toml").write_text(example)
            monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path / f"{number}.toml"))
            assert {model.engine for model in load_settings().models} <= set(engine_names())


class TestMetricsPage:
    def test_every_metric_with_type_and_labels_and_no_other(self) -> None:
        metrics = Metrics()
        metrics.watch(lambda: QueueStats(depth={}, jobs={}, workers=[]), lambda: 0, lambda: 0)
        metrics.watch_models(list)
        labels = {
            metric._name: metric._labelnames
            for metric in vars(metrics).values()
            if isinstance(metric, Counter | Gauge | Histogram)
        }
        listed = table("metrics.md", 4)
        found = set()
        for family in metrics.registry.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            found.add(name)
            assert name in listed, name
            assert listed[name][1] == family.type, name
            if family.name in labels:
                assert tuple(re.findall(r"`(\w+)`", listed[name][2])) == labels[family.name], name
        assert found == set(listed)


class TestEnginesPage:
    def test_every_engine_has_a_section(self) -> None:
        for name in engine_names():
            assert f"\n## {name}\n" in read("engines.md")

    @pytest.mark.parametrize("engine", ["llama", "openvino", "transformers", "upstream", "vllm"])
    def test_every_option_with_its_default(self, engine: str) -> None:
        section = read("engines.md").split(f"\n## {engine}\n")[1].split("\n## ")[0]
        table = section.split("| option | default |")[1].split("\n\n")[0]
        listed = dict(re.findall(r"^\| `(\w+)` \| (`.*?`|–) \|", table, re.MULTILINE))
        options = msgspec.structs.fields(find_engine(engine).options)
        assert listed == {option.name: "–" if option.default == "" else f"`{option.default}`" for option in options}


class TestArchitecture:
    @pytest.mark.parametrize("page", ["architecture.md", "glossary.md"])
    def test_the_places_that_it_names_exist(self, page: str) -> None:
        places = re.findall(r"`([\w/]+\.py):([\w.]+)`", read(page))
        assert len(places) > 10
        for file, name in places:
            texts = [found.read_text(encoding="utf-8") for found in (ROOT / "src/penstock").rglob(file)]
            assert texts, file
            for part in name.split("."):
                assert any(re.search(rf"(class|def) {part}\b|^{part}\b", text, re.MULTILINE) for text in texts), name


class TestGlossary:
    def test_each_word_is_told_once_and_in_order(self) -> None:
        for part in read("glossary.md").split("\n## ")[1:]:
            words = re.findall(r"^\| ([^|]+) \|", part, re.MULTILINE)[1:]
            assert words == sorted(set(words)), part.splitlines()[0]


class TestDecisions:
    def test_another_broker_verb_needs_a_record(self) -> None:
        verbs = {name for name, member in vars(Broker).items() if inspect.isfunction(member) and name[0] != "_"}
        verbs -= {"open", "close"}
        assert len(verbs) == 13, "write an ADR, and change this number with it"
        record = read("adr/0003-broker-verbs.md")
        assert all(f"`{verb}" in record for verb in verbs)


# ---------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has no such heading"
