"""No Python file is longer than 600 lines: past that, a file is several things (``make check``).

The exceptions are below, each with its reason. One that is not needed any more is an error too: the list only shrinks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT = 600

EXCEPTIONS = {
    "tests/clients/scripted.py": "one perfect model, in one file for all clients",
    "tests/integration/test_responses_sdk.py": "to be cut: streams, state, tools",
    "tests/unit/gateway/test_app.py": "to follow the rooms of the gateway",
    "tools/train/chats.py": "training text",
    "tools/train/stories.py": "training text",
}


def problems(lengths: dict[str, int], exceptions: dict[str, str]) -> list[str]:
    """What is wrong with *lengths* (lines by path), one sentence each."""
    return [
        f"{path} has {lines} lines: split it ({LIMIT} at most)"
        for path, lines in sorted(lengths.items())
        if lines > LIMIT and path not in exceptions
    ] + [
        f"{path} needs no exception any more: remove it from {Path(__file__).name}"
        for path in sorted(exceptions)
        if lengths.get(path, 0) <= LIMIT
    ]


def python_files(root: Path) -> dict[str, int]:
    """Lines of each Python file that git knows or would take, by path below *root*."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    paths = [path for path in listed.split("\0") if path and (root / path).is_file()]
    return {path: len((root / path).read_bytes().splitlines()) for path in paths}


if __name__ == "__main__":
    found = problems(python_files(Path(__file__).parents[1]), EXCEPTIONS)
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    sys.exit(bool(found))
