"""The files of `deploy/`: valid by the schemas of their kinds, and in step with the package's settings."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import compose_spec
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from deploy.try_image import DOCKERFILE, Image, environment_of, last_of, stages, steps_of

from command_line import REPOSITORY
from omniavatar.cli import app
from omniavatar.serve.settings import IN_FILE, PREFIX, ServeSettings, load_configs, load_settings

DEPLOY = REPOSITORY / "deploy"
PAGE = REPOSITORY / "docs" / "deploy.md"
KUBERNETES = sorted(
    path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml"
)
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
(UNIT,) = (DEPLOY / "systemd").glob("*.service")
CLUSTER = DEPLOY / "ray" / "cluster.yaml"
KUBERNETES_VERSION = "1.31"
PODS = ("Deployment", "Pod")
NO_SYSTEMD = "needs systemd-analyze: apt-get install systemd"
WORST_EXPOSURE = 2.0
"""Of `systemd-analyze security`, from 0 (good) to 10."""


def documents() -> list[dict[str, Any]]:
    return [each for path in KUBERNETES for each in yaml.safe_load_all(path.read_text())]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    found = [each for each in documents() if each["kind"] in kinds]
    assert found
    return found


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["template"]["spec"] if document["kind"] == "Deployment" else document["spec"]


def names(document: dict[str, Any]) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


# Dockerfile


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([program, "-"], input="FROM debian\n", capture_output=True, text=True, check=False)
    assert "DL3006" in done.stdout  # it does look


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_is_small_pinned_and_without_rights(target: str) -> None:
    found = stages(DOCKERFILE.read_text())
    steps = list(steps_of(found, target))
    assert last_of(iter(steps), "USER") == "10001:10001" and steps[-1][0] == "USER"
    for word in ("HEALTHCHECK", "ENTRYPOINT", "CMD", "VOLUME"):
        assert last_of(iter(steps), word)
    assert "/app/pretrained_models" in last_of(iter(steps), "VOLUME")
    assert "pip" not in " ".join(text for word, text in steps if word == "RUN"), "built in another stage"
    installs = [text for stage in found.values() for word, text in stage.steps if "pip install" in text]
    assert len(installs) == 2 and all("-c constraints.txt" in text for text in installs)
    extras = {name for text in installs for name in re.findall(r"\.\[(.*?)\]", text)[0].split(",")}
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras) and "batch" in extras
    python = re.search(r"PYTHON_IMAGE=python:(\d\.\d+)-", DOCKERFILE.read_text())
    assert python is not None and f"(Python {python[1]})" in (REPOSITORY / "constraints.txt").read_text()
    for stage in found.values():
        for word, text in stage.steps:
            if word == "COPY" and not text.startswith("--from"):
                assert all((REPOSITORY / source).exists() for source in text.split()[:-1]), text


def test_no_package_index_is_named() -> None:
    for path in [DOCKERFILE, *COMPOSE, CLUSTER, UNIT, *KUBERNETES]:
        addresses = re.findall(r"https?://[\w.-]+", path.read_text())
        assert set(addresses) <= {"http://127.0.0.1"}, path


@pytest.mark.slow
def test_the_health_check_knows_a_server_from_none(tmp_path: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    command = [sys.executable, *Image(tmp_path, "cpu").health_command()[1:]]
    server = HTTPServer(("127.0.0.1", 0), Handler)
    environment = {"OMNIAVATAR_SERVE_PORT": str(server.server_address[1])}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 1


def test_paths_of_the_image_are_found_in_its_commands(tmp_path: Path) -> None:
    image = Image(tmp_path, "cuda")
    assert image.path("/opt/omniavatar/bin/pip x/app /data:/app") == (
        f"{tmp_path}/opt/omniavatar/bin/pip x/app {tmp_path}/data:{tmp_path}/app"
    )
    environment = image.environment()
    assert environment["PATH"].startswith(f"{tmp_path}/opt/omniavatar/bin:")
    assert environment["OMNIAVATAR_SERVE_DATA_DIR"] == f"{tmp_path}/data/serve"


# compose, Ray, Kubernetes, systemd


def compose(values: dict[str, Any]) -> Any:
    made = compose_spec.PyCompose.from_json(json.dumps(values))
    made.validate()
    return made


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_are_valid(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert compose(values).service_names()
    values["services"]["worker"]["no_such_key"] = 1
    with pytest.raises(Exception, match="no_such_key"):
        compose(values)


def test_compose_keeps_secrets_in_files() -> None:
    values = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in values["services"].items():
        for variable, value in service["environment"].items():
            secret = re.search("PASSWORD|SECRET|DATABASE$|TOKEN|KEY$", variable.removesuffix("_FILE"))
            assert not secret or variable.endswith("_FILE"), (name, variable)
            if variable.endswith("_FILE"):
                assert Path(value).name in service["secrets"], (name, variable)
    assert all(set(each) == {"file"} for each in values["secrets"].values())
    ignored = subprocess.run(
        ["git", "check-ignore", "deploy/secrets/database_url"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    assert ignored.returncode == 0, "the secrets could be committed"


def test_the_ray_cluster_fits_rays_own_schema() -> None:
    found = importlib.util.find_spec("ray")  # importing it takes seconds
    assert found is not None and found.origin is not None
    ray = Path(found.origin).parent
    schema = json.loads((ray / "autoscaler" / "ray-schema.json").read_text())
    values = yaml.safe_load(CLUSTER.read_text())
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError, match="no_such_key"):
        jsonschema.validate({**values, "no_such_key": 1}, schema)
    known = set(re.findall(r'"(--[a-z-]+)"', (ray / "scripts" / "scripts.py").read_text()))
    commands = [*values["head_start_ray_commands"], *values["worker_start_ray_commands"]]
    used = {word.split("=")[0] for text in commands for word in shlex.split(text) if word.startswith("--")}
    assert used and used <= known


@pytest.mark.parametrize("document", documents(), ids=names)
def test_kubernetes_objects_are_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "omniavatar"


def test_a_wrong_kubernetes_object_is_seen() -> None:
    (document, *_) = of_kind("Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["no_such_key"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="no_such_key"):
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("document", of_kind(*PODS), ids=names)
def test_pods_have_no_rights_and_limits(document: dict[str, Any]) -> None:
    pod = pod_of(document)
    assert pod["automountServiceAccountToken"] is False
    context = pod["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    claims = {each["metadata"]["name"] for each in of_kind("PersistentVolumeClaim")}
    volumes = {each["name"]: each for each in pod["volumes"]}
    for each in volumes.values():
        assert each.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
    for container in pod["containers"]:
        inside = container["securityContext"]
        assert inside["readOnlyRootFilesystem"] and not inside["allowPrivilegeEscalation"]
        assert inside["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
        assert {each["name"] for each in container["volumeMounts"]} == set(volumes)
    if document["kind"] == "Deployment":
        (container,) = pod["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            found = container[probe]["httpGet"]
            assert found["path"] in ("/health", "/ready") and found["port"] == "http"
            assert found["httpHeaders"] == [{"name": "Host", "value": "localhost"}]


def test_selectors_find_their_pods() -> None:
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in of_kind("Deployment")
    }

    def chosen(selector: dict[str, str]) -> set[str]:
        return {name for name, own in labels.items() if selector.items() <= own.items()}

    for each in of_kind("Deployment", "PodDisruptionBudget"):
        assert chosen(each["spec"]["selector"]["matchLabels"]) == {each["metadata"]["name"]}
    (service,) = of_kind("Service")
    assert chosen(service["spec"]["selector"]) == {"omniavatar-server"}
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind("NetworkPolicy")}
    assert chosen(policies["omniavatar"]["podSelector"]["matchLabels"]) == set(labels)
    assert policies["omniavatar"]["ingress"] == []
    (admin,) = of_kind("Pod")
    assert (
        not policies["omniavatar"]["podSelector"]["matchLabels"].items()
        <= admin["metadata"]["labels"].items()
    )


def test_everything_that_stops_a_worker_waits_for_its_window() -> None:
    drain = ServeSettings().drain_seconds
    (worker,) = (each for each in of_kind("Deployment") if each["metadata"]["name"] == "omniavatar-worker")
    assert pod_of(worker)["terminationGracePeriodSeconds"] > drain
    values = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert int(values["services"]["worker"]["stop_grace_period"].removesuffix("s")) > drain
    stop = re.search(r"^TimeoutStopSec=(\d+)s$", UNIT.read_text(), re.MULTILINE)
    assert stop is not None and int(stop[1]) > drain
    for values in settings_files().values():
        assert values.get("drain_seconds", drain) == drain


def test_kustomization_has_every_file_but_the_admin_pod() -> None:
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert set(listed) == {path.name for path in KUBERNETES} - {"admin.yaml"}


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip(NO_SYSTEMD)
    text = UNIT.read_text().replace("/opt/omniavatar/bin/omniavatar", shutil.which("true") or "")
    (tmp_path / UNIT.name).write_text(text)
    return tmp_path / UNIT.name


def test_systemd_accepts_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHomes=yes"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "ProtectHomes" in done.stderr


def test_the_unit_is_hardened(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert level is not None and float(level[1]) <= WORST_EXPOSURE, done.stdout[-300:]


# in step with the package


def test_every_variable_exists() -> None:
    found = {}
    for path in [DOCKERFILE, *COMPOSE, *KUBERNETES, UNIT, CLUSTER, PAGE]:
        for variable in re.findall(rf"{PREFIX}[A-Z_]+", path.read_text()):
            found[variable] = path
    assert len(found) > 6
    for variable, path in found.items():
        name = variable.removeprefix(PREFIX).lower()
        plain = name.removesuffix(IN_FILE)
        assert name == "config" or plain in ServeSettings.model_fields, f"{path}: {variable}"


def settings_files() -> dict[str, dict[str, Any]]:
    """The settings of every example, by its place."""
    (map_,) = of_kind("ConfigMap")
    found = {
        "deploy/server.yaml": (DEPLOY / "server.yaml").read_text(),
        "ConfigMap": map_["data"]["server.yaml"],
    }
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found |= {f"docs/deploy.md {number}": text for number, text in enumerate(blocks)}
    return {place: yaml.safe_load(text) for place, text in found.items()}


def test_every_settings_file_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert len(settings_files()) >= 2
    for place, values in settings_files().items():
        path = tmp_path / "server.yaml"
        path.write_text(yaml.safe_dump(values))
        loaded = load_settings(path, environment={})
        assert loaded.settings.models, place
        if "models" in values:
            assert load_configs(loaded.settings)


def command_lines() -> dict[str, list[str]]:
    """Every command of the package that a file of `deploy/` starts, by its place."""
    found = {}
    for name in ("cpu", "cuda"):
        found[f"Dockerfile {name}"] = json.loads(
            last_of(steps_of(stages(DOCKERFILE.read_text()), name), "CMD")
        )
    for path in COMPOSE:
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            if name != "postgres" and "command" in service:
                found[f"{path.name} {name}"] = service["command"]
    for each in of_kind("Deployment"):
        (container,) = pod_of(each)["containers"]
        found[names(each)] = container["args"]
    (start,) = re.findall(r"^ExecStart=\S+/omniavatar (.*)$", UNIT.read_text(), re.MULTILINE)
    found["systemd"] = shlex.split(start)
    texts = [path.read_text() for path in (DEPLOY / "compose.yaml", DEPLOY / "kubernetes" / "admin.yaml")]
    inside = re.findall(r"(?:run --rm server|-- omniavatar) (.+)$", "\n".join(texts), re.MULTILINE)
    page = re.findall(
        r"^(?:.*\bserver |.*-- omniavatar |omniavatar )(serve .+|download .+)$",
        PAGE.read_text(),
        re.MULTILINE,
    )
    found |= {
        f"text {number}": shlex.split(text, comments=True) for number, text in enumerate([*inside, *page])
    }
    return found


@pytest.mark.parametrize(("place", "words"), command_lines().items())
def test_every_command_and_option_exists(place: str, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"{place}: no command {name}"
        command = command.commands[name]
    options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    used = [word.split("=")[0] for word in rest if word.startswith("-")]
    assert set(used) <= options, f"{place}: {used}"
    needed = [each for each in command.params if each.param_type_name == "argument" and each.required]
    assert len([word for word in rest if not word.startswith("-")]) >= len(needed), place


def test_images_set_variables_that_settings_accept() -> None:
    for target in ("cpu", "cuda"):
        values = environment_of(steps_of(stages(DOCKERFILE.read_text()), target))
        settings = load_settings(
            environment={k: v for k, v in values.items() if k.startswith(PREFIX)}
        ).settings
        assert (settings.host, settings.port, str(settings.data_dir)) == ("0.0.0.0", 8000, "/data/serve")
        assert settings.gpus == ("all" if target == "cuda" else "cpu")
