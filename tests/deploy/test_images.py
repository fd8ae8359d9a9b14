"""The Dockerfile and the pins it installs from: nothing names a host, what lies together agrees, stages stay light."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PINS = ROOT / "deploy" / "requirements"
DOCKERFILE = (ROOT / "deploy" / "images" / "Dockerfile").read_text()
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "cvxpy", "docker"}
ADDRESS = re.compile(r"https?://|\b[a-z0-9-]+\.(?:io|org|com|net)\b")


def pins(name: str) -> dict[str, str]:
    """Package -> version, of one requirement file."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*])?==(\S+)", (PINS / f"{name}.txt").read_text(), re.MULTILINE))


def installed(target: str) -> list[str]:
    """Requirement files that an image's packages come from, its parents' first."""
    stages = {
        name: (parent, body)
        for parent, name, body in re.findall(r"^FROM (\S+) AS (\S+)$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    }
    parent, body = stages[f"{target}-packages"]
    above = installed(parent.removesuffix("-packages")) if parent != "tools" else []
    return above + re.findall(r"-r /pins/(\S+)\.txt", body)


def test_the_dockerfile_names_no_host_and_no_frontend() -> None:
    instructions = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    assert not [line for line in instructions if ADDRESS.search(line)]
    assert not re.search(r"^#\s*syntax\s*=", DOCKERFILE, re.MULTILINE)


def test_every_target_of_compose_is_in_the_dockerfile() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    wanted = {service["build"]["target"] for service in services.values() if "build" in service}
    assert wanted == {"gateway", "stage", "stage-gpu", "orchestrator", "loadgen", "models", "prometheus"}
    assert wanted <= set(re.findall(r"^FROM runtime AS (\S+)$", DOCKERFILE, re.MULTILINE))


def test_every_install_checks_hashes_or_takes_only_our_wheel() -> None:
    installs = re.findall(r"pip (?:--python \S+ )?install .*", DOCKERFILE)
    assert len(installs) >= 10
    assert all("--no-deps --require-hashes" in line or "--no-deps --no-index /wheel/" in line for line in installs)


@pytest.mark.parametrize("target", ["gateway", "stage", "stage-gpu", "orchestrator", "loadgen", "models"])
def test_the_pins_of_one_image_agree(target: str) -> None:
    files = installed(target)
    assert target in files
    together: dict[str, set[str]] = {}
    for name in files:
        for package, version in pins(name).items():
            together.setdefault(package, set()).add(version)
    assert {package: versions for package, versions in together.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("target", ["stage", "stage-gpu", "gateway"])
def test_the_data_planes_images_are_light(target: str) -> None:
    assert not HEAVY & {package for name in installed(target) for package in pins(name)}


def test_the_stages_differ_in_their_runtime_only() -> None:
    cpu, gpu = pins("stage"), pins("stage-gpu")
    assert {package: version for package, version in gpu.items() if not package.startswith(("nvidia-", "onnxruntime-"))} == {
        package: version for package, version in cpu.items() if package != "onnxruntime"
    }
    assert "onnxruntime-gpu" in gpu


@pytest.mark.parametrize("path", sorted(PINS.glob("*.txt")), ids=lambda path: path.name)
def test_requirement_files_hold_hashes_and_no_addresses(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if ADDRESS.search(line) or line.startswith("-")]
    requirements = "\n".join(lines).replace("\\\n", " ").splitlines()
    assert all("==" in line and "--hash=sha256:" in line for line in requirements)


def test_libraries_are_told_not_to_report_home() -> None:
    assert "ORT_DISABLE_TELEMETRY=1" in DOCKERFILE
    assert "HF_HUB_DISABLE_TELEMETRY=1" in DOCKERFILE
