"""What `deploy/` says, compared with what the code does and what Docker will find: there is no Docker in the tests."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from penstock.cli import app
from penstock.gateway.app import OPERATIONS
from penstock.server import http_server
from penstock.settings import PREFIX, SETTINGS, Settings, load_settings
from tests.support import compose
from tests.support.compose import DEPLOY
from tests.support.redis import STRICT

ROOT = DEPLOY.parent

#: What nginx keeps to itself. A new route is decided upon here, and in penstock.conf.
PRIVATE = {"/metrics", "/health", "/docs", "/openapi.json", "/v1/stats"}


# ---------------------------------------------------------------------------------------------- Dockerfile


class Stage:
    def __init__(self, base: str, name: str) -> None:
        self.base = base
        self.name = name
        self.instructions: list[tuple[str, str]] = []

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.instructions if name == instruction]


def dockerfile() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    for line in text.replace("\\\n", " ").splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            stages[name] = stage = Stage(base, name)
        elif instruction and stages:
            stage.instructions.append((instruction, re.sub(r"\s+", " ", arguments.strip())))
    return stages


def inherited(stages: dict[str, Stage], name: str, instruction: str) -> list[str]:
    """The arguments of an instruction in a stage and in those that it is made from, the own ones first."""
    found: list[str] = []
    while name in stages:
        found += reversed(stages[name].all(instruction))
        name = stages[name].base
    return found


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return dockerfile()


@pytest.fixture(scope="module")
def requirements(stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage of that name, run as the image's build would run it."""
    folder = tmp_path_factory.mktemp("requirements")
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for command in stages["requirements"].all("RUN"):
        command = re.sub(r"^python ", f"{sys.executable} ", command)
        subprocess.run(["sh", "-ec", command], cwd=folder, check=True)
    return folder


IMAGES = ["penstock", "gateway"]


class TestDockerfile:
    def test_the_images(self, stages: dict[str, Stage]) -> None:
        assert set(IMAGES) <= set(stages)
        assert list(stages)[-1] == "penstock", "what is built without --target"

    @pytest.mark.parametrize("image", IMAGES)
    def test_how_it_runs(self, stages: dict[str, Stage], image: str) -> None:
        user, *_ = inherited(stages, image, "USER")
        assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user), "a user that is a number and not root"
        assert inherited(stages, image, "ENTRYPOINT") == ['["penstock"]']
        assert inherited(stages, image, "STOPSIGNAL") == ["SIGTERM"]
        (check,) = inherited(stages, image, "HEALTHCHECK")
        program, *_, script = json.loads(check.partition("CMD ")[2])
        assert program == "python"
        copied, *_ = [each for each in inherited(stages, image, "COPY") if "healthcheck.py" in each]
        assert script == copied.split()[-1] + "healthcheck.py"
        for name in " ".join(inherited(stages, image, "ENV")).split():
            if name.startswith(PREFIX):
                assert name.partition("=")[0].removeprefix(PREFIX).lower() in {*SETTINGS, "cache"}

    def test_nothing_is_built_in_what_is_shipped(self, stages: dict[str, Stage]) -> None:
        for image in IMAGES:
            name = image
            while name in stages:
                for command in stages[name].all("RUN"):
                    assert not re.search(r"\b(pip|apt-get|apt|curl|gcc|make)\b", command), command
                name = stages[name].base
        installs = [each for stage in stages.values() for each in stage.all("RUN") if "pip --python" in each]
        assert installs
        for command in installs:
            assert "--only-binary :all:" in command or "--no-deps" in command

    def test_the_places_that_it_copies_exist(self, stages: dict[str, Stage]) -> None:
        built = set()
        for stage in stages.values():
            for arguments in stage.all("COPY"):
                option, words = "", arguments.split()
                if words[0].startswith("--from="):
                    option, words = words[0].removeprefix("--from="), words[1:]
                    assert option in built, f"{option} comes later, or never"
                    continue
                for source in words[:-1]:
                    assert (ROOT / source).exists(), source
                    assert not ignored(source), f"{source} is in Dockerfile.dockerignore"
            built.add(stage.name)

    def test_the_build_gets_nothing_else(self) -> None:
        for name in (".git", ".venv", ".env", "deploy/.env", "docs", "tests", "src/penstock/__pycache__"):
            assert ignored(name), name

    def test_dependencies_come_before_the_source(self, stages: dict[str, Stage]) -> None:
        """A changed line of code installs and ships nothing but the package."""
        for name in ("gateway-dependencies", "dependencies"):
            assert not any("src" in each.split() for each in inherited(stages, name, "COPY"))
        for image in IMAGES:
            layers = [each for each in stages[image].all("COPY") if each.startswith("--from=")]
            assert [layer.endswith(" /opt/penstock /opt/penstock") for layer in layers] == [True, True]
            assert layers[-1].startswith("--from=package ")

    def test_the_python_is_one_that_we_support(self) -> None:
        (version,) = re.findall(r"^ARG PYTHON=(\d+\.\d+)-slim", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        assert f"Programming Language :: Python :: {version}" in (ROOT / "pyproject.toml").read_text()

    def test_a_gateway_needs_nothing_of_what_its_image_lacks(self, requirements: Path) -> None:
        """Everything that `penstock gateway` imports, imported without the engine's packages."""
        everything = (requirements / "penstock.txt").read_text().splitlines()
        gateway = (requirements / "gateway.txt").read_text().splitlines()
        lacking = {re.split(r"[^\w.-]", line)[0] for line in everything if line not in gateway}
        assert {"openvino", "tokenizers"} <= lacking, "what weighs most"
        assert len(gateway) + len(lacking) == len(everything)
        modules = sorted(
            module
            for module, owners in importlib.metadata.packages_distributions().items()
            if {re.sub("_", "-", owner.lower()) for owner in owners} & lacking
        )
        assert "openvino" in modules
        program = (
            f"import sys; sys.modules.update(dict.fromkeys({modules!r})); "
            "import penstock.cli, penstock.cli.serve, penstock.wiring.process, penstock.brokers.redis; "
            "print(sum(name.startswith('penstock') for name in sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 20


def ignored(path: str) -> bool:
    """Is it kept out of the build? The last pattern that fits it, or a folder above it, decides."""
    out = False
    places = ["/".join(path.split("/")[: number + 1]) for number in range(path.count("/") + 1)]
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        names = [pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        parts = [place.rpartition("/")[2] if pattern.startswith("**/") else place for place in places]
        if any(fnmatch.fnmatchcase(part, name) for part in parts for name in names):
            out = not line.startswith("!")
    return out


# ---------------------------------------------------------------------------------------------- Compose


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(compose.load({"REDIS_PASSWORD": "secret"})["services"])


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None
    return float(found[1])


def ours(services: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, service) for name, service in services.items() if "build" in service)


class TestCompose:
    def test_it_does_not_start_without_a_password(self) -> None:
        with pytest.raises(KeyError, match="REDIS_PASSWORD"):
            compose.load({})

    def test_its_variables_are_explained(self) -> None:
        explained = set(re.findall(r"^#?(\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
        assert explained == compose.variables()

    def test_the_builds(self, services: dict[str, Any], stages: dict[str, Stage]) -> None:
        targets = set()
        for _, service in ours(services):
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
            targets.add(service["build"]["target"])
        assert targets == set(IMAGES) <= set(stages)

    def test_our_commands_and_their_settings_are_accepted(
        self, services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: Any = typer.main.get_command(app)
        for name, service in ours(services):
            command, *arguments = service["command"]
            assert command == name
            context = commands.commands[command].make_context(command, arguments)
            flags = {key: value for key, value in context.params.items() if key in SETTINGS}
            for variable, value in service["environment"].items():
                assert variable.startswith(PREFIX)
                monkeypatch.setenv(variable, value)
            settings = load_settings(flags)
            assert settings.broker.url == "redis://:secret@redis:6379/0"
            assert settings.broker.durability == "strict"
            assert settings.server.drain_timeout + 2 < seconds(service["stop_grace_period"]), "uvicorn takes 2 s more"
            if command == "gateway":
                assert (settings.server.host, settings.server.insecure_public) == ("0.0.0.0", True)
                assert f"server gateway:{settings.server.port} " in (DEPLOY / "nginx/upstream.conf").read_text()

    def test_redis_keeps_what_strict_promises(self) -> None:
        settings = compose.redis_settings(compose.load({"REDIS_PASSWORD": "secret"}))
        assert settings.items() >= STRICT.items()
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["maxmemory"]
        assert settings["no-appendfsync-on-rewrite"] == "no"
        assert settings["requirepass"] == "secret"

    def test_only_nginx_has_a_public_port(self, services: dict[str, Any]) -> None:
        assert [name for name, service in services.items() if "ports" in service] == ["nginx"]
        assert not any("network_mode" in service for service in services.values())
        (published,) = services["nginx"]["ports"]
        assert published == "127.0.0.1:8000:8080", "on loopback, unless somebody says otherwise"
        assert "listen 8080;" in (DEPLOY / "nginx/penstock.conf").read_text()

    def test_redis_and_workers_are_out_of_reach(self, services: dict[str, Any]) -> None:
        assert services["redis"]["networks"] == services["worker"]["networks"] == ["back"]
        assert services["nginx"]["networks"] == ["front"]
        assert compose.load({"REDIS_PASSWORD": "secret"})["networks"]["back"]["internal"] is True

    def test_everything_restarts_and_may_do_little(self, services: dict[str, Any]) -> None:
        for name, service in services.items():
            assert service["restart"] == "unless-stopped", name
            assert service["cap_drop"] == ["ALL"], name
            assert service["read_only"] is True, name
            assert "build" in service or (service["user"] != "0" and "healthcheck" in service), name

    def test_networks_and_volumes_exist(self, services: dict[str, Any]) -> None:
        whole = compose.load({"REDIS_PASSWORD": "secret"})
        for service in services.values():
            assert set(service["networks"]) <= set(whole["networks"])
            for volume in service.get("volumes", ()):
                source, _, target = volume.partition(":")
                assert source in whole["volumes"] or (source.startswith("./") and (DEPLOY / source).is_dir()), volume
                assert target.startswith("/")
            for each in service.get("depends_on", ()):
                assert each in services

    def test_the_volumes_are_the_images(self, services: dict[str, Any], stages: dict[str, Stage]) -> None:
        (declared,) = inherited(stages, "penstock", "VOLUME")
        for volume in services["worker"]["volumes"]:
            assert volume.partition(":")[2] in json.loads(declared)


# ---------------------------------------------------------------------------------------------- nginx


def directive(name: str, file: str = "penstock.conf") -> str:
    found: list[str] = re.findall(rf"^\s*{name}\s+([^;]+);", (DEPLOY / "nginx" / file).read_text(), re.MULTILINE)
    return found[0]


class TestNginx:
    """What it does is tested in tests/integration/test_nginx.py; here that its figures go with ours."""

    def test_every_route_is_public_or_private_on_purpose(self) -> None:
        text = (DEPLOY / "nginx/penstock.conf").read_text()
        public = re.findall(r"^    location (=?) *(/\S*) *\{ *proxy_pass", text, re.MULTILINE)
        assert public
        kept = re.findall(r"^    location = (/\S*) *\{ *return 404", text, re.MULTILINE)  # an exact one goes first
        routes = {operation.path for operation in OPERATIONS}
        reached = {
            route
            for route in routes.difference(kept)
            for kind, path in public
            if (route == path if kind == "=" else route.startswith(path))
        }
        assert routes - reached == PRIVATE
        for path in PRIVATE:
            assert path in text

    def test_streams_are_silent_for_less_than_it_waits(self) -> None:
        for waits in re.findall(r"proxy_read_timeout +(\d+)s", (DEPLOY / "nginx/penstock.conf").read_text()):
            assert int(waits) > 3 * Settings().http.heartbeat

    def test_bodies_may_be_as_large_as_the_gateways_take(self) -> None:
        kilobytes = int(directive("client_max_body_size").removesuffix("k"))
        assert Settings().http.max_body < kilobytes * 1024 < Settings().http.max_body * 1.1
        assert directive("client_body_buffer_size") == directive("client_max_body_size")
        assert f"larger than {Settings().http.max_body} bytes" in (DEPLOY / "nginx/penstock.conf").read_text()

    def test_it_closes_idle_connections_before_the_gateways_do(self) -> None:
        kept = http_server(lambda *_: None, drain_timeout=5).config.timeout_keep_alive  # type: ignore[arg-type]
        assert seconds(directive("keepalive_timeout", "upstream.conf")) < kept

    def test_it_stops_before_it_is_killed(self, services: dict[str, Any]) -> None:
        shutdown = seconds(directive("worker_shutdown_timeout", "nginx.conf"))
        assert shutdown < seconds(services["nginx"]["stop_grace_period"])

    def test_it_never_repeats_a_post(self) -> None:
        assert "non_idempotent" not in directive("proxy_next_upstream").split()
