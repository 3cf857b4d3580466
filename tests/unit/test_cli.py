"""The command line without a server: flags into settings, help, errors and exit codes."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock import __version__
from penstock.api import Links
from penstock.cli import app
from penstock.cli.bench import Sample, summary
from penstock.cli.chat import Chat
from penstock.cli.common import ReplyWriter, choose_model, duration, write
from penstock.cli.flags import STRUCTURES, add_options, choose_models
from penstock.cli.startup import Startup
from penstock.client import End, ModelView, Submitted, Token
from penstock.core.errors import ContextLengthExceeded, ErrorInfo, ModelNotFound, PenstockError
from penstock.core.job import Status
from penstock.models.catalogue import FIRST
from penstock.settings import SETTINGS, BrokerAddress, BrokerSettings, ModelSettings, Settings

NOBODY = "http://127.0.0.1:1"

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PENSTOCK_CONFIG", "")  # restored afterwards, whatever --config makes of it
    monkeypatch.delenv("PENSTOCK_CONFIG")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_version(arguments: list[str]) -> None:
    result = run(app, arguments)
    assert (result.exit_code, result.stdout) == (0, f"penstock {__version__}\n")


def test_help_names_every_command_and_completion() -> None:
    text = run(app, ["--help"]).stdout
    for word in (
        "serve",
        "gateway",
        "worker",
        "chat",
        "jobs",
        "models",
        "bench",
        "config",
        "version",
        "--install-completion",
    ):
        assert word in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["jobs", "list", "--status", "odd"],
        ["serve", "--port", "x"],
        ["jobs", "show"],
        ["bench", "-c", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert run(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [["models"], ["jobs", "list"], ["jobs", "tail", "job_1"], ["jobs", "cancel", "job_1"], ["bench"], ["chat"]],
)
def test_without_a_server_it_says_how_to_start_one(arguments: list[str]) -> None:
    result = run(app, [*arguments, "--url", NOBODY])
    assert result.exit_code == 1
    assert f"Cannot reach {NOBODY}" in result.stderr
    assert "penstock serve" in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_the_server_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_URL", NOBODY)
    assert f"Cannot reach {NOBODY}" in run(app, ["models"]).stderr


def test_what_is_no_url_is_one_line() -> None:
    result = run(app, ["models", "--url", "ftp://x"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


# ---------------------------------------------------------------------------------------------- serve, config


def test_every_setting_has_a_flag_or_is_a_structure() -> None:
    text = run(app, ["config", "--help"]).stdout
    for name in SETTINGS:
        assert (f"--{name.replace('_', '-')} " in text) is (name not in STRUCTURES)


@pytest.mark.parametrize(
    ("command", "has", "lacks"),
    [
        ("serve", ["--port", "--data-dir", "--broker", "--engine", "--model"], ["--metrics-port"]),
        ("gateway", ["--port", "--broker", "--model", "--max-queued"], ["--data-dir", "--engine", "--load-timeout"]),
        ("worker", ["--metrics-port", "--broker", "--engine", "--model"], ["--port ", "--data-dir", "--heartbeat"]),
    ],
)
def test_a_command_shows_the_flags_that_matter_to_it(command: str, has: list[str], lacks: list[str]) -> None:
    text = run(app, [command, "--help"]).stdout
    for flag in has:
        assert flag in text
    for flag in lacks:
        assert flag not in text


@pytest.mark.parametrize("command", ["gateway", "worker"])
def test_gateways_and_workers_need_a_broker_that_can_be_shared(command: str) -> None:
    result = run(app, [command])
    assert result.exit_code == 2
    assert "--broker redis://" in result.stderr
    assert "penstock serve" in result.stderr


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_config_shows_no_key(form: list[str]) -> None:
    arguments = ["--engine", "upstream", "--model", "m=http://me:s3cret@h", "--option", "key=sk-s3cret"]
    shown = run(app, ["config", *form, *arguments]).output
    assert "upstream" in shown
    assert "s3cret" not in shown


def test_config_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_BROKER", "redis://me:s3cret@10.0.0.5:6379/0")
    assert settled()["broker"] == {"value": "redis://me:***@10.0.0.5:6379/0", "source": "PENSTOCK_BROKER"}
    assert "s3cret" not in run(app, ["config"]).output


#: Of a model's entry, where nothing is said of them.
DEFAULTS = {"load": "start", "standby": 0}


def settled(*arguments: str) -> dict[str, Any]:
    result = run(app, ["config", "--json", *arguments])
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_config_prints_value_and_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("penstock.toml").write_text("heartbeat = 5")
    monkeypatch.setenv("PENSTOCK_LEASE_TTL", "7")
    rows = settled("--port", "9", "--insecure-public", "--allowed-hosts", "a", "--allowed-hosts", "b")
    assert rows["port"] == {"value": 9, "source": "flag"}
    assert rows["insecure_public"] == {"value": True, "source": "flag"}
    assert rows["allowed_hosts"] == {"value": ["a", "b"], "source": "flag"}
    assert rows["lease_ttl"] == {"value": 7.0, "source": "PENSTOCK_LEASE_TTL"}
    assert rows["heartbeat"] == {"value": 5.0, "source": "penstock.toml"}
    assert rows["log_dir"] == {"value": None, "source": "default"}
    text = run(app, ["config"]).stdout
    assert "PENSTOCK_LEASE_TTL" in text
    assert f"{FIRST} (openvino)" in text


def test_config_file_by_flag(tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text("port = 5")
    assert settled("--config", str(path))["port"] == {"value": 5, "source": str(path)}


def test_models_engines_and_options_become_the_models_setting() -> None:
    options = ["--option", "rate=5", "--option", "b.slots=2"]
    rows = settled("--engine", "synthetic", "--model", "a", "--model", "b=some/folder", *options)
    assert rows["models"] == {
        "value": [
            {"name": "a", "engine": "synthetic", "path": None, "options": {"rate": "5"}, **DEFAULTS},
            {
                "name": "b",
                "engine": "synthetic",
                "path": "some/folder",
                "options": {"rate": "5", "slots": "2"},
                **DEFAULTS,
            },
        ],
        "source": "flag",
    }


def test_which_models_are_loaded_on_demand_or_have_spares() -> None:
    models = ["--engine", "synthetic", "--model", "a", "--model", "b=1"]
    loads = ["--on-demand", "b", "--standby", "1", "--standby", "b=2", "--memory-budget", "1.5GiB"]
    rows = settled(*models, *loads)
    assert [(each["load"], each["standby"]) for each in rows["models"]["value"]] == [("start", 1), ("demand", 2)]
    assert rows["memory_budget"]["value"] == "1.5GiB"
    rows = settled(*models, "--on-demand", "all")
    assert [each["load"] for each in rows["models"]["value"]] == ["demand"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on-demand", "x"], "no model 'x' among smollm2"),
        (["--standby", "x=1"], "no model 'x' among smollm2"),
        (["--standby", "many"], "not of the form N"),
        (["--memory-budget", "lots"], "no size"),
        (["--memory-budget", "8"], "no size"),
    ],
)
def test_what_is_wrong_with_a_wish_about_models(arguments: list[str], words: str) -> None:
    result = run(app, ["config", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_options_reach_models_of_the_file() -> None:
    Path("penstock.toml").write_text(
        '[[models]]\nname = "a"\nengine = "synthetic"\noptions = { rate = "1", slots = "3" }'
    )
    [model] = settled("--option", "rate=5")["models"]["value"]
    assert model == {
        "name": "a",
        "engine": "synthetic",
        "path": None,
        "options": {"rate": "5", "slots": "3"},
        **DEFAULTS,
    }


def test_engines_pair_up_with_models_in_order() -> None:
    chosen = choose_models(["synthetic", "openvino"], ["a", "b"])
    assert [(each["name"], each["engine"]) for each in chosen] == [("a", "synthetic"), ("b", "openvino")]
    assert [each["engine"] for each in choose_models(["synthetic"], ["a", "b"])] == ["synthetic"] * 2
    assert "engine" not in choose_models([], ["a"])[0]
    assert [each["name"] for each in choose_models(["synthetic"], [])] == ["synthetic"]
    assert [each["name"] for each in choose_models(["openvino"], [])] == [FIRST]


def test_an_option_is_for_the_model_whose_dotted_name_it_has() -> None:
    models = [ModelSettings(name="org/qwen2.5"), ModelSettings(name="b")]
    first, second = add_options(models, ["org/qwen2.5.rate=1", "slots=a=b"])
    assert first["options"] == {"rate": "1", "slots": "a=b"}
    assert second["options"] == {"slots": "a=b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "sinthetic"], "Did you mean synthetic?"),
        (["--engine", "synthetic", "--engine", "openvino", "--model", "a"], "2 engines for 1 models"),
        (["--engine", "synthetic", "--engine", "openvino"], "Say which models"),
        (["--model", "=x"], "NAME=PATH"),
        (["--model", "x="], "NAME=PATH"),
        (["--option", "rate"], "KEY=VALUE"),
        (["--option", "=1"], "KEY=VALUE"),
        (["--option", "nobody.rate=1"], "no model 'nobody'"),
    ],
)
def test_wrong_models_are_usage_errors(arguments: list[str], message: str) -> None:
    result = run(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())


def test_two_models_of_one_name_are_refused() -> None:
    result = run(app, ["serve", "--model", "a", "--model", "a=b"])
    assert (result.exit_code, "Two models are called 'a'" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "port"),
        (["--config", "nowhere.toml"], "not a file"),
    ],
)
def test_settings_that_do_not_work_are_one_clear_message(arguments: list[str], message: str) -> None:
    result = run(app, ["serve", "--engine", "synthetic", "--log-level", "error", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_startup_tells_each_step_once_and_leaves_a_restarted_engine_to_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = Settings(models=[ModelSettings(name="a"), ModelSettings(name="b", engine="synthetic")])
    with Startup(settings) as startup:
        startup.listening("http://127.0.0.1:8000")
        for fraction in (None, 0.1, 0.9):
            startup.progress("a", "loading", fraction)
        startup.ready("b")
        startup.ready("a")
        startup.progress("a", "loading", None)
        startup.ready("a")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[:6] == [
        f"penstock {__version__} listens on http://127.0.0.1:8000",
        "loading a (openvino)",
        "loading b (synthetic)",
        "a: loading",
        "b is ready",
        "ready: a, b",
    ]
    assert told.err.count("ready: a, b") == 1
    assert "penstock chat\n" in told.err


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        (
            {"gateway": True, "workers": True},
            [" listens on http://h:1, broker redis://:***@r (fast)", "loading a (synthetic)", "ready: a"],
        ),
        (
            {"gateway": True, "workers": False},
            [" gateway listens on http://h:1, broker redis://:***@r (fast)", "  stop     Ctrl-C"],
        ),
        (
            {"gateway": False, "workers": True},
            [
                " worker, metrics on http://h:1/metrics, broker redis://:***@r (fast)",
                "loading a (synthetic)",
                "ready: a",
                "  stop     Ctrl-C",
            ],
        ),
    ],
)
def test_startup_tells_what_the_process_is_and_where_its_broker(
    parts: dict[str, bool], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [ModelSettings(name="a", engine="synthetic")]
    broker = BrokerSettings(url=BrokerAddress("redis://:s3cret@r"), durability="fast")
    settings = Settings(models=models, broker=broker)
    with Startup(settings, **parts) as startup:
        startup.waiting("Redis is away.", 1.25)
        startup.listening("http://h:1")
        if parts["workers"]:
            startup.ready("a")
    told = capsys.readouterr().err
    assert "s3cret" not in told
    first, *rest = told.splitlines()
    assert first == "Redis is away. Trying again in 1.2 s."
    assert [rest[0].removeprefix(f"penstock {__version__}"), *rest[1 : len(lines)]] == lines
    assert ("curl" in told) == (parts["gateway"] and parts["workers"])
    assert "data in" not in told


# ---------------------------------------------------------------------------------------------- chat


class Server:
    """As much of a `Client` as a chat uses: a thought and three tokens, and a context of *context* messages."""

    def __init__(self, context: int = 100, error: str | None = None) -> None:
        self.context = context
        self.error = error
        self.seen: list[list[dict[str, str]]] = []
        self.cancelled: list[Submitted] = []

    def submit(self, *, messages: list[dict[str, str]], **options: Any) -> Submitted:
        self.seen.append(list(messages))
        if len(messages) > self.context:
            raise ContextLengthExceeded("too long")
        return Submitted(f"job_{len(self.seen)}", Status.QUEUED, 1, Links("", "", ""))

    def stream(self, job: Submitted) -> Any:
        yield Token(1, "", 1, 1, phase="reasoning", reasoning="Hm.")
        yield Token(2, "one ", 1, 1)
        yield Token(3, "", 1, 1)
        yield Token(4, "two", 1, 1)
        error = ErrorInfo("broken", code=self.error) if self.error else None
        yield End(5, Status.FAILED if error else Status.COMPLETED, ("stop",), None, error)

    def cancel(self, job: Submitted) -> None:
        self.cancelled.append(job)


def conversation(server: Server, system: str | None = None) -> Chat:
    return Chat(server, "m", system, {"max_tokens": 5})  # type: ignore[arg-type]


def test_a_chat_sends_the_whole_conversation() -> None:
    server = Server()
    chat = conversation(server, "Be brief.")
    shown: list[Token] = []
    assert chat.reply("Hi", shown.append) == "one two"
    assert [(token.reasoning, token.text) for token in shown] == [("Hm.", ""), ("", "one "), ("", "two")]
    chat.reply("And?", shown.append)
    assert [(each["role"], each["content"]) for each in server.seen[1]] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "one two"),
        ("user", "And?"),
    ]
    chat.clear()
    assert [each["role"] for each in chat.messages] == ["system"]


def test_an_interrupted_reply_is_cancelled_and_kept_as_far_as_it_came() -> None:
    server = Server()
    chat = conversation(server)

    def interrupt(token: Token) -> None:
        if token.text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.reply("Hi", interrupt)
    assert [job.id for job in server.cancelled] == ["job_1"]
    assert chat.turns[-1] == {"role": "assistant", "content": "one "}


def test_a_message_that_got_no_reply_is_not_part_of_the_conversation() -> None:
    chat = conversation(Server(context=0))
    with pytest.raises(ContextLengthExceeded):
        chat.reply("Hi", print)
    assert chat.turns == []


def test_a_failed_reply_raises_the_jobs_error() -> None:
    with pytest.raises(PenstockError, match="broken"):
        conversation(Server(error="poisoned")).reply("Hi", lambda part: None)


def test_a_conversation_that_outgrows_the_model_forgets_its_oldest_exchange() -> None:
    server = Server(context=3)
    chat = conversation(server)
    for text in ("a", "b", "c"):
        chat.reply(text, lambda part: None)
    assert [each["content"] for each in server.seen[-1]] == ["b", "one two", "c"]


# ---------------------------------------------------------------------------------------------- small things


def test_choose_model() -> None:
    served = [ModelView(name, "model", 0, "penstock", "ready") for name in "ab"]
    assert (choose_model(served, None), choose_model(served, "b")) == ("a", "b")
    with pytest.raises(ModelNotFound, match=r"'c'. It has: a, b\."):
        choose_model(served, "c")
    with pytest.raises(ModelNotFound):
        choose_model([], None)


def test_a_models_text_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "a\x1b]0;owned\x07\tb\x9b2J\r\nc"
    for stream, expected in ((Terminal(), "a]0;owned\tb2J\nc"), (io.StringIO(), text)):
        monkeypatch.setattr("sys.stdout", stream)
        write(text)
        assert stream.getvalue() == expected


@pytest.mark.parametrize("terminal", [True, False])
def test_thoughts_are_for_people_and_replies_for_programs(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    out, err = io.StringIO(), Stream()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    writer = ReplyWriter()
    for token in (
        Token(1, "", 1, 1, phase="reasoning", reasoning="H\x1b[2Jm "),
        Token(2, "Yes", 1, 1, phase="reasoning", reasoning="[so]."),
        Token(3, "!", 1, 1),
        Token(4, "", 1, 1, phase="tool", calls="{…}\n"),
    ):
        writer.write(token)
    assert out.getvalue() == "Yes!{…}\n"
    told = re.sub(r"\x1b\[[0-9;]*m", "", err.getvalue())
    assert told == ("H[2Jm [so].\n\n" if terminal else "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.0123, "12 ms"), (3.14, "3.1 s"), (600, "10 min"), (9000, "2 h")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_the_figures_of_a_benchmark() -> None:
    samples = [Sample(10, i / 100, i / 10) for i in range(1, 101)]
    report = summary(samples, Counter({"overloaded": 2}), 20.0)
    assert report["tokens_per_second"] == 50.0
    assert report["requests_per_second"] == 5.0
    assert report["time_to_first_token_ms"] == {"p50": 500.0, "p95": 950.0, "p99": 990.0}
    assert report["latency_ms"]["p99"] == 9900.0
    assert report["failures"] == {"overloaded": 2}
    assert summary([], Counter(), 1.0)["latency_ms"] == {}


def test_ctrl_c_exits_with_130_and_says_nothing() -> None:

    @app.command(name="interrupted", hidden=True)
    def interrupted() -> None:
        raise KeyboardInterrupt

    try:
        result = run(app, ["interrupted"])
        assert (result.exit_code, result.output) == (130, "")
    finally:
        app.registered_commands.pop()
