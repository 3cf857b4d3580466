"""The rule of `make check` on how long a file may be."""

from __future__ import annotations

from pathlib import Path

from tools.file_lengths import LIMIT, problems, python_files


def test_a_long_file_and_an_exception_that_nobody_needs_are_named() -> None:
    lengths = {"full.py": LIMIT, "long.py": LIMIT + 1, "known.py": LIMIT + 1, "cut.py": LIMIT}
    assert [line.split()[0] for line in problems(lengths, {"known.py": "", "cut.py": "", "gone.py": ""})] == [
        "long.py",
        "cut.py",
        "gone.py",
    ]


def test_it_counts_the_lines_of_this_repository() -> None:
    root = Path(__file__).parents[2]
    here = str(Path(__file__).relative_to(root))
    assert python_files(root)[here] == len(Path(__file__).read_text().splitlines())
