"""llm-comply's suites against the bundled model: what they find is what ``docs/compliance.md`` says, and why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import compliance
from tests.support.compliance import Outcome
from tests.support.server import Server


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Outcome]]]:
    server = Server(tmp_path_factory.mktemp("comply"), bundled=True)
    try:
        server.start()
        yield {suite: compliance.ask(suite, server.url) for suite in compliance.SUITES}
    finally:
        server.stop()


@pytest.mark.parametrize("suite", compliance.SUITES)
def test_the_page_counts_what_the_tool_finds(suite: str, outcomes: dict[str, list[Outcome]]) -> None:
    assert compliance.tally(suite, outcomes[suite]) in compliance.page_rows()


def test_the_page_names_what_does_not_pass_and_nothing_else(outcomes: dict[str, list[Outcome]]) -> None:
    found = {one.test: one for suite in outcomes.values() for one in suite if one.result != "passed"}
    assert found == compliance.documented()


def test_the_page_is_about_the_version_that_was_asked() -> None:
    assert f"version {compliance.VERSION}," in compliance.PAGE.read_text(encoding="utf-8")
