"""The files in deploy/, read by the validators of those who will read them."""

import copy
import importlib
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.37"
OF_KNATIVE = {"containerConcurrency": int, "timeoutSeconds": int}
"""What a revision of Knative has beside a pod's own fields: https://knative.dev/docs/serving/reference/serving-api"""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def containers(name: str) -> list[dict[str, Any]]:
    templates = [
        document["spec"]["template"] for document in documents(name) if "template" in document["spec"]
    ]
    return [container for template in templates for container in template["spec"]["containers"]]


def test_compose_reads_its_file() -> None:
    read = PyCompose.from_yaml((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert read.service_names() == ["japanese-stable-diffusion"]


def test_a_mistake_in_a_compose_file_is_found() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        PyCompose.from_yaml(text.replace("read_only: true", "read_only: perhaps"))


@pytest.mark.parametrize("document", documents("kubernetes.yaml"), ids=lambda document: document["kind"])
def test_kubernetes_knows_every_field(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_knative_knows_every_field() -> None:
    [service] = documents("knative.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.knative.dev/v1", "Service")
    assert list(service["spec"]) == ["template"]
    kubernetes_validate.validate(pod(service), KUBERNETES, strict=True)


def test_a_mistake_in_a_manifest_is_found() -> None:
    [service] = copy.deepcopy(documents("knative.yaml"))
    service["spec"]["template"]["spec"]["containerConcurency"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod(service), KUBERNETES, strict=True)


def pod(service: dict[str, Any]) -> dict[str, Any]:
    """The pod that Knative makes of its template; its own fields are checked here and taken out."""
    template = copy.deepcopy(service["spec"]["template"])
    for name, kind in OF_KNATIVE.items():
        assert type(template["spec"].pop(name)) is kind
    template["spec"]["containers"][0]["name"] = "user-container"
    return {"apiVersion": "v1", "kind": "Pod", **template}


def test_knative_hands_each_container_one_request_and_stops_the_last() -> None:
    [service] = documents("knative.yaml")
    template = service["spec"]["template"]
    assert template["spec"]["containerConcurrency"] == 1
    assert template["metadata"]["annotations"]["autoscaling.knative.dev/min-scale"] == "0"


@pytest.mark.parametrize("name", ["kubernetes.yaml", "knative.yaml"])
def test_every_container_asks_for_a_gpu_and_its_probes_read_the_status(name: str) -> None:
    for container in containers(name):
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert_it_reads_the_status(container[probe]["exec"]["command"])


def test_composes_health_check_reads_the_status() -> None:
    [compose] = documents("compose.yaml")
    kind, *command = compose["services"]["japanese-stable-diffusion"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert_it_reads_the_status(command)


def assert_it_reads_the_status(command: list[str]) -> None:
    assert command[:2] == ["python", "-m"] and command[3:] == ["READY", "BUSY"]
    assert importlib.import_module(command[2]).__doc__


def test_the_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"deploy/([\w.]+)", readme)) == {file.name for file in DEPLOY.iterdir()}
