"""aider: an edit of a file in a git repository, asked for in one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

URL, MODEL = os.environ["PENSTOCK_URL"], os.environ["PENSTOCK_MODEL"]
AIDER = Path(sys.executable).with_name("aider")
OPTIONS = ["--yes-always", "--no-check-update", "--no-show-release-notes", "--analytics-disable", "--no-pretty"]
OPTIONS += ["--no-show-model-warnings", "--no-detect-urls", "--no-gitignore"]


def git(folder, *command):
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
    return subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    git(folder, "config", "user.name", "Somebody")
    git(folder, "config", "user.email", "somebody@example.com")
    (folder / "greet.py").write_text('def greet():\n    return "hello"\n')
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--message", "A greeting")
    return folder


def aider(folder, message, *options):
    return subprocess.run(
        [AIDER, "--model", f"openai/{MODEL}", *OPTIONS, *options, "--message", message, "greet.py"],
        cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**os.environ, "OPENAI_API_BASE": f"{URL}/v1", "OPENAI_API_KEY": "none"},
    )  # fmt: skip


EDIT = 'Please replace `    return "hello"` with `    return "good morning"` in `greet.py`'


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_an_edit_is_made_and_committed(repository, stream):
    done = aider(repository, EDIT, "--edit-format", "diff", stream)
    assert 'return "good morning"' in (repository / "greet.py").read_text(), done.stdout + done.stderr
    assert len(git(repository, "log", "--oneline").splitlines()) == 2
    assert "sent" in done.stdout  # how many tokens were


def test_a_prompt_that_is_too_long_is_told_as_such(repository):
    (repository / "greet.py").write_text("word = 1\n" * 20_000)
    done = aider(repository, "Shorten it", "--edit-format", "diff")
    assert "context window" in done.stdout.lower(), done.stdout + done.stderr
    assert "ContextWindowExceededError" in done.stdout or "exceed" in done.stdout
