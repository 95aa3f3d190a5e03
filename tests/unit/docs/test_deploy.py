"""Deployment files: they parse, run nothing as root, write one folder; the command line takes their commands."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import assert_understood

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "features" / "deploying.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.+?)```", PAGE, flags=re.DOTALL)
MANIFESTS: list[dict[str, Any]] = [manifest for block in BLOCKS for manifest in yaml.safe_load_all(block)]
PODS = [one["spec"]["template"]["spec"] for one in MANIFESTS if "template" in one["spec"]]
PROGRAM = "/opt/isthmus/bin/isthmus"

each_unit = pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
each_service = pytest.mark.parametrize("name", SERVICES["services"])


def section(path: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser["Service"]


def commands() -> list[str]:
    """Every command of these files, without the program's name."""
    units = [section(path)["ExecStart"].removeprefix(f"{PROGRAM} ").replace("%i", "north") for path in UNITS]
    services = [shlex.join(service["command"]) for service in SERVICES["services"].values()]
    return [*units, *services, *(shlex.join(one["args"]) for pod in PODS for one in pod["containers"])]


def test_there_is_a_file_for_each_way() -> None:
    assert {path.name for path in UNITS} >= {
        *("isthmus-trunk.service", "isthmus-root.service", "isthmus-edge@.service", "isthmus-silo@.service")
    }
    assert set(SERVICES["services"]) == {"trunk", "north", "south"}
    assert {one["kind"] for one in MANIFESTS} == {"StatefulSet", "Service", "Job"}


@pytest.mark.parametrize("line", commands())
def test_command_is_understood(line: str) -> None:
    assert_understood(line)


@each_unit
def test_a_unit_runs_as_a_user_of_its_own_and_writes_one_folder(path: Path) -> None:
    service = section(path)
    assert service["ExecStart"].startswith(f"{PROGRAM} ")
    assert (service["User"], service["ProtectSystem"], service["NoNewPrivileges"]) == ("isthmus", "strict", "yes")
    assert service["ProtectHome"] == "yes"
    assert service["Restart"] == "on-failure"
    folder = service["ReadWritePaths"]
    assert folder == f"/var/lib/{service['StateDirectory']}"
    named = re.findall(r"(/var/lib/[^\s]+)", service["ExecStart"])
    assert named
    assert all(one.startswith(f"{folder}/") for one in named)


@each_unit
def test_systemd_takes_the_unit(path: Path, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not here")
    program = Path(sys.executable).parent / "isthmus"
    name = path.name.replace("@", "@north")
    (tmp_path / name).write_text(path.read_text(encoding="utf-8").replace(PROGRAM, str(program)), encoding="utf-8")
    done = subprocess.run([analyze, "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "isthmus" in line]
    assert not complaints


@each_service
def test_a_service_of_compose_is_read_only_without_privileges(name: str) -> None:
    service = SERVICES["services"][name]
    assert service["read_only"] is True
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    written = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
    assert written == [f"{name}:/state"]
    assert name in SERVICES["volumes"]


@each_service
def test_a_service_of_compose_has_no_certificate_of_another(name: str) -> None:
    mounted = {
        found[1]
        for volume in SERVICES["services"][name]["volumes"]
        if (found := re.search(r":/federation/certificates/(\w+):ro$", volume))
    }
    assert mounted == ({"trunk", "root"} if name == "trunk" else {name})


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["containers"][0]["name"])
def test_a_pod_is_read_only_without_privileges(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = [one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")]
    assert writable == ["/state", "/tmp"]
    secrets = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert secrets
    assert all(one["defaultMode"] == 0o440 for one in secrets)


def test_the_image_has_no_root_and_copies_files_that_exist() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    stages = [line for line in lines if line.startswith("FROM ")]
    assert len(stages) == 2
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert not any(line.startswith("ADD ") or ":latest" in line for line in lines)
    copied = [words[1:-1] for line in lines if (words := line.split())[:1] == ["COPY"] and "--from" not in line]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    assert 'ENTRYPOINT ["isthmus"]' in lines


def test_torch_in_the_image_is_the_one_that_was_tested() -> None:
    pinned = re.search(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned is not None
    assert pinned[0] in (DEPLOY / "Containerfile").read_text(encoding="utf-8")
