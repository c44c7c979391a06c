"""The Kubernetes files: valid, admitted under the restricted standard, closed to the network."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.programs import find, passes

from fedgraft.client.policy.policy_file import load_policy
from fedgraft.client.site_config import load_site

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
FILES = ("coordinator.yaml", "site.yaml")
CARD = "# nvidia.com/gpu"
Resource = dict[str, Any]
each_file = pytest.mark.parametrize("name", FILES)


def resources(name: str) -> list[Resource]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def one(name: str, kind: str) -> Resource:
    (found,) = [resource for resource in resources(name) if resource["kind"] == kind]
    return found


def pod(name: str) -> Resource:
    """The specification of the file's one pod."""
    kind = "Deployment" if name == "site.yaml" else "StatefulSet"
    specification: Resource = one(name, kind)["spec"]["template"]["spec"]
    return specification


@each_file
def test_kubernetes_would_take_it(name: str) -> None:
    validate = find("kubernetes-validate", source="the extra `dev`")
    passes([validate, "--strict", FOLDER / name])


def test_kubernetes_would_take_the_site_with_a_card(tmp_path: Path) -> None:
    validate = find("kubernetes-validate", source="the extra `dev`")
    text = (FOLDER / "site.yaml").read_text(encoding="utf-8")
    assert text.count(CARD) == 1
    (tmp_path / "site.yaml").write_text(text.replace(CARD, CARD.removeprefix("# ")))
    passes([validate, "--strict", tmp_path / "site.yaml"])


@each_file
def test_the_namespace_demands_what_the_pod_keeps_to(name: str) -> None:
    labels = one(name, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    spec = pod(name)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}


@each_file
def test_everything_is_in_the_files_own_namespace(name: str) -> None:
    own = one(name, "Namespace")["metadata"]["name"]
    for resource in resources(name):
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == own


@each_file
def test_every_mount_has_its_volume(name: str) -> None:
    spec = pod(name)
    there = {volume["name"] for volume in spec["volumes"]}
    if name == "coordinator.yaml":
        claims = one(name, "StatefulSet")["spec"]["volumeClaimTemplates"]
        there |= {claim["metadata"]["name"] for claim in claims}
    containers = [*spec["initContainers"], *spec["containers"]]
    assert {mount["name"] for each in containers for mount in each["volumeMounts"]} == there


@each_file
def test_the_network_policy_is_of_the_pod(name: str) -> None:
    kind = "Deployment" if name == "site.yaml" else "StatefulSet"
    labels = one(name, kind)["spec"]["template"]["metadata"]["labels"]
    policy = one(name, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_a_site_calls_the_coordinator_and_nobody_calls_it() -> None:
    policy = one("site.yaml", "NetworkPolicy")["spec"]
    coordinator, names = policy["egress"]
    assert policy["ingress"] == []
    assert coordinator["ports"] == [{"port": 8443, "protocol": "TCP"}]
    assert {port["port"] for port in names["ports"]} == {53}
    assert one("site.yaml", "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_the_coordinator_is_called_on_one_port_and_calls_nobody() -> None:
    policy = one("coordinator.yaml", "NetworkPolicy")["spec"]
    assert policy["egress"] == []
    assert policy["ingress"] == [{"ports": [{"port": 8443, "protocol": "TCP"}]}]
    assert [port["port"] for port in one("coordinator.yaml", "Service")["spec"]["ports"]] == [8443]


def test_the_sites_files_are_ones_that_a_site_reads(tmp_path: Path) -> None:
    files = one("site.yaml", "ConfigMap")["data"]
    for name in ("site.toml", "policy.toml"):
        (tmp_path / name).write_text(files[name])
    config = load_site(tmp_path / "site.toml")
    assert load_policy(tmp_path / "policy.toml").approval.mode == "ask"
    mounts = {m["mountPath"] for m in pod("site.yaml")["containers"][0]["volumeMounts"]}
    assert str(Path(config.state).parent) in mounts
    assert str(Path(config.data.train).parent) in mounts
