"""The parts of ``python -m penstock.testing``: which rules there are, and how strictly a stream is read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.testing.protocol import NOT_CHECKED, RULES
from penstock.testing.protocol.run import chosen
from penstock.testing.protocol.stream import read

SPECIFICATION = Path(__file__).parents[3] / "docs/protocol.md"


def specified() -> set[str]:
    """Every rule of the specification: its section, the heading within it, its number there."""
    rules: set[str] = set()
    section = heading = ""
    for line in SPECIFICATION.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"## (\d+)\.", line):
            section, heading = found[1], ""
        elif found := re.match(r"### (\w+)", line):
            heading = f".{found[1].lower()}"
        elif (found := re.match(r"(\d+)\. ", line)) and section:
            rules.add(f"{section}{heading}.{found[1]}")
    return rules


def test_every_rule_of_the_specification_has_its_check_or_says_why_not() -> None:
    checked = {rule.id for rule in RULES}
    assert specified() - checked - NOT_CHECKED.keys() == set()
    unnumbered = {"3.headers", "3.terminal", "3.heartbeat"}
    assert {rule for rule in checked - specified() if not rule.startswith("api.")} == unnumbered
    assert not checked & NOT_CHECKED.keys()


def test_rules_are_chosen_by_name_or_section() -> None:
    assert [rule.id for rule in chosen(["4.2", "6.responses"])] == ["4.2", *(f"6.responses.{i}" for i in range(1, 5))]
    assert chosen([]) == RULES
    with pytest.raises(LookupError, match=r"'4\.22'"):
        chosen(["4.22"])


def test_the_rules_need_nothing_of_the_extra() -> None:
    """Whoever only checks a server has neither pytest nor hypothesis."""
    without = "import sys; sys.modules.update(pytest=None, hypothesis=None); import penstock.testing.__main__"
    subprocess.run([sys.executable, "-c", without], check=True, timeout=60)


BLOCK = b"id: 1\nevent: token\ndata: {}\n\n"


def test_a_stream_as_it_should_be() -> None:
    text = read(b"retry: 1000\n" + BLOCK + b": ping\n" + BLOCK + b"retry: 700\n", whole=True)
    assert [(block.retry, block.id, block.event, block.data) for block in text.blocks] == [
        ("1000", "1", "token", "{}"),
        (None, "1", "token", "{}"),
    ]
    assert (text.comments, text.goodbye, text.problems) == (["ping"], "700", [])


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (BLOCK + b"\n", "two blank lines"),
        (b": ping\n\n" + BLOCK, "a blank line after a comment"),
        (b"id: 1\n: ping\ndata: {}\n\n", "a comment inside a block"),
        (BLOCK.replace(b"\n", b"\r\n"), "a CR or a NUL"),
        (b"id: 1\ndata: \xc3\xa9\n\n", "not ASCII"),
        (b"id:1\ndata: {}\n\n", "a line that is no field"),
        (b"name: x\ndata: {}\n\n", "a line that is no field"),
        (BLOCK[:-1], "ends inside a block"),
        (BLOCK + b"id: 2", "ends inside a block"),
    ],
)
def test_what_is_not_as_the_specification_says(raw: bytes, problem: str) -> None:
    assert problem in "; ".join(read(raw, whole=True).problems)


def test_a_stream_that_goes_on_may_be_cut_anywhere() -> None:
    for cut in range(len(BLOCK)):
        text = read(BLOCK + BLOCK[:cut], whole=False)
        assert (len(text.blocks), text.problems) == (1, [])
