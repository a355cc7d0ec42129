"""Everything in deploy/ that a launcher reads is right by that launcher's own schema or linter, and says the same."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from deploy.cli import app

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
SCHEMAS = json.loads(gzip.decompress((ROOT / "tests" / "data" / "kuberay-v1.7.0.json.gz").read_bytes()))
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
LAUNCHERS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("kuberay", "ray-cluster", "slurm", "docker")
    for path in (DEPLOY / folder).iterdir()
)


def linter(name: str) -> str:
    """A linter of the `dev` extra: beside the interpreter, as the environment need not be active."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is not installed: pip install 'northstar[dev]'"
    return found


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / file).read_text())


# --- KubeRay -----------------------------------------------------------------------------------


def cluster_spec(file: str) -> dict[str, Any]:
    spec = read(file)["spec"]
    return spec.get("rayClusterSpec", spec)


KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]


@pytest.mark.parametrize("file", KUBERAY)
def test_a_manifest_is_valid_by_the_schema_of_its_kind(file: str):
    manifest = read(file)
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]]).validate(manifest)


@pytest.mark.parametrize(
    "path, value",
    [
        (("authOption",), {"mode": "token"}),
        (("authOptions", "mode"), "tokens"),
        (("workerGroupSpecs", 0, "minReplica"), 1),
        (("workerGroupSpecs", 1, "resources", "anchor"), 1),  # must be a string
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMount"), []),
        (("headGroupSpec", "template", "spec", "containers", 0, "env", 0, "valeu"), "x"),
    ],
    ids=str,
)
def test_the_schema_sees_a_slip(path: tuple[Any, ...], value: Any):
    manifest = copy.deepcopy(read("kuberay/raycluster.yaml"))
    *outer, last = path
    inner = manifest["spec"]
    for part in outer:
        inner = inner[part]
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMAS["RayCluster"]).validate(manifest)


def test_the_volume_is_valid_by_the_schema_of_a_pods_own_claims():
    pod = SCHEMAS["RayCluster"]["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    volume = pod["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    claim = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    storage = read("kuberay/storage.yaml")
    jsonschema.Draft202012Validator(claim).validate(storage["spec"])
    names = {v["persistentVolumeClaim"]["claimName"] for v in _pods("kuberay/raycluster.yaml", "volumes")}
    assert names == {storage["metadata"]["name"]}


def _pods(file: str, key: str) -> list[Any]:
    spec = cluster_spec(file)
    return [v for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"]) for v in g["template"]["spec"][key]]


def test_the_job_and_the_standing_cluster_are_the_same_cluster():
    assert cluster_spec(KUBERAY[0]) == cluster_spec(KUBERAY[1])


@pytest.mark.parametrize("file", KUBERAY)
def test_what_the_operator_checks_beyond_the_schema_holds(file: str):
    """`ray-operator/controllers/ray/utils/validation.go` of v1.7.0, as far as it concerns these manifests."""
    spec = cluster_spec(file)
    assert spec["rayVersion"]  # token mode needs it
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["containers"] and pod["restartPolicy"] == "Never"  # the second autoscaler's rule
        assert not (group.get("resources") and group["rayStartParams"])  # one of them
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("file", KUBERAY)
def test_the_anchors_group_alone_has_its_resource_and_room_for_nothing_else(file: str):
    groups = {group["groupName"]: group for group in cluster_spec(file)["workerGroupSpecs"]}
    assert [name for name, group in groups.items() if "anchor" in group.get("resources", {})] == ["anchor"]
    assert groups["anchor"]["resources"]["CPU"] == "1"
    assert groups["swarm"]["minReplicas"] < groups["swarm"]["maxReplicas"]


# --- ray up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["aws", "onprem"])
def test_a_cluster_file_is_what_ray_up_takes(file: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(f"ray-cluster/{file}.yaml"))
    validate_config(prepared)
    prepared["docker"]["imgae"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared)


def test_the_cloud_has_an_anchor_node_type_with_its_resource_and_one_cpu():
    types = read("ray-cluster/aws.yaml")["available_node_types"]
    assert {name for name, kind in types.items() if kind["resources"].get("anchor")} == {"anchor"}
    assert types["anchor"]["resources"]["CPU"] == 1 and types["head"]["resources"]["CPU"] == 0


@pytest.mark.parametrize("file", ["aws", "onprem"])
def test_the_dashboard_of_a_cluster_is_not_on_the_network(file: str):
    (start,) = (c for c in read(f"ray-cluster/{file}.yaml")["head_start_ray_commands"] if "--head" in c)
    assert "--dashboard-host=127.0.0.1" in start


# --- images and scripts ------------------------------------------------------------------------


def test_the_dockerfile_passes_its_linter():
    found = subprocess.run([linter("hadolint"), "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert found.returncode == 0 and not found.stdout, found.stdout


def test_the_slurm_script_is_valid_bash_and_passes_its_linter():
    script = DEPLOY / "slurm" / "northstar.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    found = subprocess.run([linter("shellcheck"), "--shell=bash", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_image_holds_every_package_that_is_installed_and_nothing_beside():
    allowed = {
        line[1:] for line in (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    ours = {name.partition(".")[0] for name in built["packages"]} | {f"{name}.py" for name in built["py-modules"]}
    read = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert allowed == ours | read


def test_versions_are_those_of_the_project():
    args = dict(re.findall(r"^ARG (\w+)=(\S+)", DOCKERFILE.read_text(), re.M))
    assert args["PYTHON"] in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert args["TORCH"] in PINS["torch"].specifier
    for file in KUBERAY:
        assert cluster_spec(file)["rayVersion"] in PINS["ray"].specifier
    images = {m for file in LAUNCHERS for m in re.findall(r"northstar:([0-9.]+[0-9])", (ROOT / file).read_text())}
    assert images == {PROJECT["version"]}


def test_every_container_runs_as_the_images_user():
    (uid,) = re.findall(r"^USER (\d+)", DOCKERFILE.read_text(), re.M)
    for file in KUBERAY:
        spec = cluster_spec(file)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert str(group["template"]["spec"]["securityContext"]["runAsUser"]) == uid != "0"


# --- commands ----------------------------------------------------------------------------------


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every `northstar COMMAND … --option` that a text tells to type, continued lines joined."""
    joined = re.sub(r"\\\n#?\s*", " ", text)
    found = re.findall(r"(?<![\w.-])northstar (run|doctor|plan|sweep|simulate|probe|report) ([^\n`\"]*)", joined)
    return [(command, re.findall(r"(?<!\w)--[a-z]+", rest)) for command, rest in found]


@pytest.mark.parametrize("file", [*LAUNCHERS, "docs/deploy.md"])
def test_commands_that_the_files_name_have_the_options_they_are_given(file: str):
    for command, options in commands((ROOT / file).read_text()):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert set(options) <= set(re.findall(r"--[a-z]+", shown)), command


def test_the_pins_that_doctor_holds_against_are_in_the_installed_package():
    installed = {Requirement(r).name for r in requires("northstar") or []}
    assert {"torch", "ray", "transformers"} <= installed
