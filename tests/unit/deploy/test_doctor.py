"""`northstar doctor`: what facts mean. A sound machine gets no complaint, one defect gets its own, always with a fix."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from typer.testing import CliRunner

from deploy.cli import app
from deploy.cluster.placement import placement
from deploy.config import load
from deploy.doctor import checks, fit
from deploy.doctor.checks import Finding, merge
from deploy.doctor.facts import Gpu, NodeFacts
from deploy.doctor.fit import Host, unplaced
from deploy.estimate.memory import memory, peak
from deploy.estimate.parameters import parameters
from rl.device import ordinal
from swarm.run_config import RunConfig

PINS = [Requirement("torch==2.13.0"), Requirement("ray[default]==2.60.0"), Requirement("huggingface_hub>=1,<3")]
SOUND = NodeFacts(
    name="n1",
    python="3.11.9",
    versions={"torch": "2.13.0+cu130", "ray": "2.60.0", "transformers": "5.17.0", "huggingface-hub": "1.2.0"},
    torch_cuda="13.0",
    torch_devices=2,
    nccl="2.29.3",
    driver="580.10",
    gpus=(Gpu("H100", int(80e9)),) * 2,
    interfaces={"lo": "127.0.0.1", "ib0": "10.0.0.1", "docker0": "172.17.0.1"},
    own_address="10.0.0.1",
    env={"RAY_AUTH_MODE": "token"},
    token=True,
    cpus=16,
    memory=int(256e9),
    shm_free=int(64e9),
    disk_free=int(500e9),
    open_files=65536,
)


def all_checks(node: NodeFacts) -> list[Finding]:
    return [
        *checks.versions(node, PINS),
        *checks.imports(node),
        *checks.gpus(node),
        *checks.interfaces(node, several=True),
        *checks.disks(node, checkpoint=20e9, store=4e9),
        *checks.auth(node, connects=True),
    ]


DEFECTS: list[tuple[dict[str, Any], str, str]] = [
    ({"versions": SOUND.versions | {"ray": "2.59.1"}}, "versions", "error"),
    ({"versions": {k: v for k, v in SOUND.versions.items() if k != "huggingface-hub"}}, "versions", "error"),
    ({"broken": {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}}, "imports", "error"),
    ({"broken": {"transformers": "ImportError: x"}}, "imports", "error"),
    ({"torch_cuda": None, "torch_devices": 0}, "GPUs", "error"),
    ({"torch_devices": 0}, "GPUs", "error"),
    ({"env": SOUND.env | {"CUDA_VISIBLE_DEVICES": ""}, "torch_devices": 0}, "GPU mask", "error"),
    ({"env": SOUND.env | {"GLOO_SOCKET_IFNAME": "eth7"}}, "network", "error"),
    ({"own_address": "127.0.1.1"}, "network", "error"),
    ({"interfaces": SOUND.interfaces | {"eno1": "192.168.0.4"}}, "network", "warning"),
    ({"disk_free": int(10e9)}, "disk", "error"),
    ({"disk_free": int(22e9)}, "disk", "warning"),
    ({"shm_free": int(64e6)}, "shared memory", "warning"),
    ({"open_files": 1024}, "open files", "warning"),
    ({"token": False}, "auth", "error"),
    ({"env": {"RAY_AUTH_MODE": "tokens"}}, "auth", "error"),
    ({"env": {"RAY_AUTH_MODE": "disabled"}}, "auth", "warning"),
    ({"env": {}}, "auth", "warning"),
]


def test_a_sound_machine_gets_no_complaint():
    assert {found.level for found in all_checks(SOUND)} == {"ok"}


@pytest.mark.parametrize("change, about, level", DEFECTS, ids=str)
def test_one_defect_is_one_complaint_about_it(change: dict[str, Any], about: str, level: str):
    complaints = [found for found in all_checks(replace(SOUND, **change)) if found.level != "ok"]
    assert [(found.about, found.level) for found in complaints] == [(about, level)]


def test_complaints_and_only_they_come_with_a_fix():
    everything = [found for change, _, _ in DEFECTS for found in all_checks(replace(SOUND, **change))]
    assert all(bool(found.fix) == (found.level != "ok") for found in everything)


@pytest.mark.parametrize(
    ("gpu", "visible", "number"),
    [("3", "", 3), ("0", "0,1", 0), ("3", "2,3", 1), ("0", "1,0", 1), ("GPU-1f3c", "GPU-77aa,GPU-1f3c", 1)],
)
def test_a_worker_takes_its_gpu_by_torchs_number(gpu: str, visible: str, number: int):
    assert ordinal(gpu, visible) == number


@pytest.mark.parametrize(
    "key, value, good",
    [
        ("GLOO_SOCKET_IFNAME", "ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib", False),  # gloo takes whole names
        ("GLOO_SOCKET_IFNAME", "=ib0", False),
        ("NCCL_SOCKET_IFNAME", "ib", True),  # NCCL takes prefixes
        ("NCCL_SOCKET_IFNAME", "=ib0", True),
        ("NCCL_SOCKET_IFNAME", "=ib", False),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "^docker,lo,ib", False),
        ("NCCL_SOCKET_IFNAME", "eth,ib", True),
    ],
)
def test_interfaces_are_read_as_gloo_and_nccl_read_them(key: str, value: str, good: bool):
    found = list(checks.interfaces(replace(SOUND, env={key: value}), several=True))
    assert any(f.level == "error" for f in found) != good


def test_one_machine_alone_needs_neither_interfaces_nor_a_token():
    node = replace(SOUND, own_address="127.0.0.1", env={}, token=False)
    assert {f.level for f in checks.interfaces(node, several=False)} == {"ok"}
    assert {f.level for f in checks.auth(node, connects=False)} == {"ok"}


# --- several machines --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ray", "torch", "Python"])
def test_nodes_that_differ_are_named(name: str):
    other = replace(SOUND, name="n2", versions=SOUND.versions | {"ray": "2.59.1"})
    if name == "torch":
        other = replace(SOUND, name="n2", versions=SOUND.versions | {"torch": "2.12.0"})
    if name == "Python":
        other = replace(SOUND, name="n2", python="3.12.1")
    (found,) = checks.alike([SOUND, other, replace(SOUND, name="n3")])
    assert found.level == "error" and name in found.says and "n1, n3" in found.says and "n2" in found.says
    assert not list(checks.alike([SOUND, replace(SOUND, name="n2", python="3.11.2")]))


def test_a_clock_is_only_wrong_beyond_what_the_round_trip_leaves_open():
    assert [f.level for f in checks.skew({"n1": (2.0, 1.8), "n2": (0.01, 0.001)})] == ["ok"]
    (late,) = checks.skew({"n1": (-2.0, 0.3), "n2": (0.01, 0.001)})
    assert late.level == "warning" and late.where == ("n1",)


def test_what_several_nodes_say_is_said_once():
    findings = [replace(f, where=(n,)) for n in ("a", "b", "c") for f in all_checks(SOUND)]
    merged = merge(findings)
    assert [replace(f, where=()) for f in merged] == list(dict.fromkeys(all_checks(SOUND)))
    assert all(f.where == ("a", "b", "c") for f in merged)
    assert merge(merged) == merged


# --- does a config fit -------------------------------------------------------------------------


def holds(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> bool:
    """By trying every node for every bundle."""
    for chosen in product(range(len(nodes)), repeat=len(bundles)):
        free = [dict(node) for node in nodes]
        for bundle, where in zip(bundles, chosen):
            for name, n in bundle.items():
                free[where][name] = free[where].get(name, 0) - n
        if all(n >= 0 for node in free for n in node.values()):
            return True
    return False


NODE = st.fixed_dictionaries({"CPU": st.integers(0, 4), "GPU": st.integers(0, 2)}, optional={"anchor": st.just(1)})


@given(
    nodes=st.lists(NODE, min_size=1, max_size=3),
    plain=st.integers(0, 3),
    gpus=st.integers(0, 2),
    anchors=st.integers(0, 1),
)
def test_a_config_fits_exactly_where_some_placement_holds_it(
    nodes: list[dict[str, float]], plain: int, gpus: int, anchors: int
):
    bundles: list[dict[str, float]] = [{"CPU": 1, "anchor": 0.001}] * anchors
    bundles += [{"CPU": 1, "GPU": 1}] * gpus + [{"CPU": 1}] * plain
    assert bool(unplaced(bundles, nodes)) != holds(bundles, nodes)


def test_a_plain_bundle_leaves_gpus_and_the_anchors_node_to_those_who_need_them():
    nodes = [{"CPU": 1, "anchor": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1}]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert not unplaced([{"CPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "anchor": 0.001}], [nodes[i] for i in order])


def config(*overrides: str) -> RunConfig:
    return load("k5", [*overrides])


def levels(found: Any) -> set[str]:
    return {f.level for f in found}


def test_room_is_what_the_bundles_ask_for_and_not_a_cpu_less():
    c = config("swarm.dp=2", "swarm.pp=2", "anchor.resource=anchor")
    cpus = placement(c).total["CPU"]
    assert levels(fit.room(c, [Host({"CPU": cpus - 1}), Host({"CPU": 1, "anchor": 1})])) == {"ok"}
    assert levels(fit.room(c, [Host({"CPU": cpus - 2}), Host({"CPU": 1, "anchor": 1})])) == {"error"}
    (found,) = fit.room(c, [Host({"CPU": 100.0})])
    assert found.level == "error" and "ray start --resources" in found.fix


def test_a_replica_that_no_node_holds_is_told_the_key_that_lets_it_run():
    c = config("swarm.pp=2", "swarm.placement=replicas")
    (found,) = fit.room(c, [Host({"CPU": 1})] * 8)
    assert found.level == "error" and "swarm.placement=pack" in found.fix
    assert levels(fit.room(config("swarm.pp=2"), [Host({"CPU": 1})] * 8)) == {"ok"}


def test_memory_is_held_against_the_plans():
    c = config("swarm.device=cuda")
    params = parameters(c)
    needed = peak(memory(c, params), "worker stage 0", "device")
    for size, level in ((needed * 0.99, "error"), (needed * 1.05, "warning"), (needed * 1.2, "ok")):
        node = replace(SOUND, gpus=(Gpu("H100", int(80e9)), Gpu("small", int(size))))
        assert levels(fit.gpu_memory(c, params, [Host({}, node)])) == {level}
    assert levels(fit.ram(c, params, [Host({}, replace(SOUND, memory=int(1e9)))])) == {"error"}
    assert levels(fit.ram(c, params, [Host({}, SOUND)])) == {"ok"}


def test_who_shares_a_gpu_is_held_against_it_together():
    sets = (
        "swarm.device=cuda",
        "swarm.pp=2",
        "swarm.boundaries=[2]",
        "anchor.device=cuda",
        "anchor.placement=colocated",
    )
    c = config(*sets)
    params, parts = parameters(c), memory(c, parameters(c))
    both = sum(peak(parts, role, "device") for role in ("worker stage 0", "anchor worker"))
    node = replace(SOUND, gpus=(Gpu("H100", int(both * 0.99)),) * 2)
    stage0, stage1 = fit.gpu_memory(c, params, [Host({}, node)])
    assert stage0.level == "error" and "worker stage 0 and anchor worker hold" in stage0.says and stage1.level == "ok"
    engine = config("swarm.device=cuda", "rollout.device=cuda", "rollout.placement=colocated", "rollout.replicas=1")
    worker = peak(memory(engine, params), "worker stage 0", "device")
    for times, level in ((1.02, "error"), (1.5, "ok")):
        node = replace(SOUND, gpus=(Gpu("H100", int(worker * times)),))
        assert levels(fit.gpu_memory(engine, params, [Host({}, node)])) == {level}


def test_the_anchor_is_held_against_its_own_node():
    c = config("anchor.device=cuda", "anchor.resource=anchor")
    tiny, large = (replace(SOUND, gpus=(Gpu("g", size),)) for size in (1, int(80e9)))
    swarm, anchor = Host({"CPU": 8}, tiny), Host({"CPU": 1, "anchor": 1}, large)
    assert levels(fit.gpu_memory(c, parameters(c), [swarm, anchor])) == {"ok"}


@pytest.mark.parametrize("every, level", [(0, "ok"), (5, "error")])
def test_a_run_folder_that_a_node_does_not_see_matters_with_checkpoints(every: int, level: str):
    seen, blind = (Host({}, replace(SOUND, name=n, seen={"m": n == "a"})) for n in ("a", "b"))
    c = config(f"run.checkpoint_every={every}")
    assert levels(fit.files(c, [seen], "m")) == {"ok"}
    (found,) = fit.files(c, [seen, blind], "m")
    assert found.level == level and "b" in found.says


# --- the command -------------------------------------------------------------------------------


def test_the_command_exits_1_exactly_if_there_is_an_error_and_writes_what_it_found(tmp_path: Path):
    file = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["doctor", "k5", "--out", str(tmp_path), "--json", str(file)])
    found = json.loads(file.read_text())
    assert result.exit_code == (1 if found["counts"]["error"] else 0), result.output
    assert sum(found["counts"].values()) == len(found["findings"])
    assert {f["about"] for f in found["findings"]} >= {"versions", "GPUs", "disk", "room", "memory", "ports", "auth"}


def test_a_machine_without_gpus_is_told_so_before_a_config_that_wants_them_runs(tmp_path: Path):
    c = config("swarm.device=cuda")
    (found,) = fit.room(c, [Host({"CPU": 99.0, "GPU": 0.0})])
    assert found.level == "error" and "swarm.device" in found.fix


def test_a_config_that_is_refused_exits_2_without_looking_at_anything():
    assert CliRunner().invoke(app, ["doctor", "k5", "--set", "swarm.dp=3000"]).exit_code == 2


def test_checks_and_their_command_import_neither_torch_nor_ray():
    code = "import sys, deploy.cli, deploy.doctor.examine; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cpu_that_multiplies_bf16_is_told_apart():
    without = replace(SOUND, gpus=(), torch_devices=0, torch_cuda=None)
    plain, faster = (next(iter(checks.gpus(replace(without, cpu_bf16=has)))).says for has in (False, True))
    assert "model.dtype=bfloat16" in faster and "bfloat16" not in plain
