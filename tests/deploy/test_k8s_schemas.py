"""Every object of deploy/k8s fits its schema: Kubernetes' own, or ours for others' kinds."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest

from tests.deploy.manifests import BASE, K8S, Combination, Object, overlays, render, supported

OLDEST, NEWEST = "1.31", kubernetes_validate.latest_version()


def check(item: Object, version: str) -> None:
    """Compare an object with its schema, once for each that is alike."""
    _check(json.dumps(item, sort_keys=True), version)


@functools.cache
def _check(text: str, version: str) -> None:
    item = json.loads(text)
    group, _, of_group = item["apiVersion"].rpartition("/")
    ours = K8S / "schemas" / f"{item['kind'].lower()}.{group}_{of_group}.json"
    if ours.exists():
        jsonschema.Draft202012Validator(json.loads(ours.read_text())).validate(item)
    else:
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("combination", supported(), ids=str)
def test_objects_fit_their_schemas(combination: Combination) -> None:
    objects = render(combination)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(names)) == len(names) > 15
    for item in objects:
        check(item, OLDEST)


@pytest.mark.parametrize("directory", overlays(), ids=lambda path: path.name)
def test_the_newest_kubernetes_takes_them_too(directory: Any) -> None:
    for item in render(directory):
        check(item, NEWEST)


def test_our_schemas_are_used_and_closed() -> None:
    kinds = {item["kind"].lower() for combination in supported() for item in render(combination)}
    found = sorted((K8S / "schemas").glob("*.json"))
    assert {path.name.partition(".")[0] for path in found} <= kinds
    for path in found:
        schema = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["additionalProperties"] is False, path
        assert schema["properties"]["spec"]["additionalProperties"] is False, path


KEDA = Combination(BASE, ("autoscale-keda",))
PRODUCTION = Combination(K8S / "overlays" / "production")


@pytest.mark.parametrize(
    ("combination", "kind", "breaks"),
    [
        (PRODUCTION, "Deployment", lambda spec: spec.update(replica=2)),
        (PRODUCTION, "StatefulSet", lambda spec: spec.update(replicas="2")),
        (PRODUCTION, "NetworkPolicy", lambda spec: spec.pop("podSelector")),
        (PRODUCTION, "Certificate", lambda spec: spec.update(dnsName=["a"])),
        (PRODUCTION, "Certificate", lambda spec: spec.update(usages=["serverAuth"])),
        (PRODUCTION, "Issuer", lambda spec: spec.clear()),
        (PRODUCTION, "PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].pop("port")),
        (PRODUCTION, "PrometheusRule", lambda spec: spec["groups"][0].update(rules=[])),
        (KEDA, "ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(threshold=32)),
    ],
)
def test_an_object_that_does_not_fit_is_found_out(
    combination: Combination, kind: str, breaks: Callable[[Any], Any]
) -> None:
    item = next(item for item in render(combination) if item["kind"] == kind)
    breaks(item["spec"])
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(item, OLDEST)
