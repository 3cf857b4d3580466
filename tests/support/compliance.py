"""llm-comply's suites asked of a server, and what ``docs/compliance.md`` says of them.

``python -m tests.support.compliance`` (``make comply``) asks the bundled model, prints what became of each test, and
exits with 1 where one failed that the page does not name.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import llm_comply
from llm_comply.config import ComplianceConfig
from llm_comply.http import close_client
from llm_comply.runner import TestRunner
from llm_comply.schema import SpecLoader
from llm_comply.test_case import TestCase
from llm_comply.tests import get_tests

from tests.support.server import PATIENCE, Server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compliance.md"
VERSION = version("llm-comply")
MODEL = "millrace"
RESULTS = ("passed", "warned", "failed", "skipped")
#: The suites that concern Penstock, each with the specification in the tool that it holds replies against.
SUITES = {
    name: SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / file))
    for name, file in (
        ("openai-chat", "openai_chat.json"),
        ("open-responses", "openresponses.json"),
        ("anthropic", "anthropic.json"),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What became of a test: one of `RESULTS`, and the first thing that the tool says about it."""

    test: str
    result: str
    says: str = ""


def ask(suite: str, url: str, model: str = MODEL) -> list[Outcome]:
    """The *suite*'s tests, as llm-comply runs them, of the server at *url*.

    Greedy, so that the outcome is the same each time: of a hundred sampled calls one is as long as the context.
    """
    config = ComplianceConfig(base_url=f"{url}/v1", api_key="none", model=model, timeout=PATIENCE)
    runner = TestRunner(config, [_greedy(case) for case in get_tests(suite)], SUITES[suite])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the tool's use of jsonschema
        found = runner.run_all().results
    close_client()
    return [
        Outcome(
            one.id,
            "warned" if one.warnings and one.status.value == "passed" else one.status.value,
            (one.errors or one.warnings or [""])[0],
        )
        for one in found
    ]


def _greedy(case: TestCase) -> TestCase:
    return replace(case, build_request=lambda config: {**case.build_request(config), "temperature": 0})


def tally(suite: str, outcomes: Sequence[Outcome]) -> list[str]:
    """The suite's row in the page's first table: name, specification, tests, and how many of each of `RESULTS`."""
    counts = [sum(one.result == result for one in outcomes) for result in RESULTS]
    return [f"`{suite}`", SUITES[suite].spec_version, *map(str, (len(outcomes), *counts))]


def page_rows() -> list[list[str]]:
    """The cells of every row of the page's tables."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def documented() -> dict[str, Outcome]:
    """What the page says of each test that does not simply pass."""
    told = {}
    for row in page_rows():
        if len(row) == 4 and row[1] in RESULTS:
            test, says = (re.sub(r"^`|`$", "", cell) for cell in (row[0], row[2]))
            told[test] = Outcome(test, row[1], says)
    return told


def main() -> int:
    known, unknown = documented(), []
    print(f"llm-comply {VERSION} against {MODEL}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder), bundled=True)
        try:
            server.start()
            for suite in SUITES:
                outcomes = ask(suite, server.url)
                _, spec, tests, *counts = tally(suite, outcomes)
                counted = ", ".join(f"{count} {result}" for count, result in zip(counts, RESULTS, strict=True))
                print(f"\n{suite} ({spec}): {tests} tests, {counted}")
                for one in outcomes:
                    print(f"  {one.result:8} {one.test:30} {one.says}")
                unknown += [one for one in outcomes if one.result == "failed" and known.get(one.test) != one]
        finally:
            server.stop()
    print(f"\nNot named in docs/{PAGE.name}: {', '.join(one.test for one in unknown) or 'nothing'}")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
