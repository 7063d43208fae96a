"""Ways to break what is rendered that an API server finds: each says what it has to answer."""

from __future__ import annotations

from collections.abc import Callable

from tests.deploy.api_client import Object
from tests.deploy.k8s_breaks import GONE, Break, find, pod, put

_CONTAINER = ("containers", 0)
_SECURITY = (*_CONTAINER, "securityContext")
_TOO_LARGE = 270_000
"""`kubectl apply` writes an object a second time, into an annotation of 256 KiB at most."""


def added(place: Callable[[list[Object]], list[Object]], item: Object) -> Break:
    """Return what adds an item to a list of an object."""
    return lambda objects: place(objects).append(item)


def _spec(objects: list[Object]) -> Object:
    spec: Object = find(objects, "Deployment", "encoder")["spec"]["template"]["spec"]
    return spec


def _last(objects: list[Object]) -> None:
    objects.append(objects.pop(objects.index(find(objects, "Namespace", "hashlens"))))


def _large(objects: list[Object]) -> None:
    find(objects, "ConfigMap", "encoder")["data"]["LARGE"] = "x" * _TOO_LARGE


BREAKS: list[tuple[str, Break, str]] = [
    (
        "a container that may escalate",
        pod("encoder", *_SECURITY, "allowPrivilegeEscalation", to=True),
        "violate PodSecurity",
    ),
    ("the host's network", pod("search", "hostNetwork", to=True), "host namespaces"),
    ("no seccomp profile", pod("redis", "securityContext", "seccompProfile", to=GONE), "seccomp"),
    (
        "a directory of the host",
        added(lambda o: _spec(o)["volumes"], {"name": "h", "hostPath": {"path": "/"}}),
        "restricted volume types",
    ),
    (
        "a mount of no volume",
        added(
            lambda o: _spec(o)["containers"][0]["volumeMounts"], {"name": "no", "mountPath": "/x"}
        ),
        'Not found: "no"',
    ),
    (
        "a variable from nowhere",
        added(lambda o: _spec(o)["containers"][0]["env"], {"name": "A", "valueFrom": {}}),
        "must specify one of",
    ),
    ("a misspelt field", pod("search", "hostnetwork", to=False), "unknown field"),
    (
        "a port's name that is too long",
        pod("encoder", *_CONTAINER, "ports", 0, "name", to="the-port-of-the-encoder"),
        "must be no more than 15",
    ),
    (
        "a selector that differs",
        put("Deployment", "encoder", "spec", "selector", "matchLabels", "a", to="b"),
        "selector` does not match",
    ),
    (
        "a version that is gone",
        put("PodDisruptionBudget", "encoder", "apiVersion", to="policy/v1beta1"),
        "the server has no PodDisruptionBudget of policy/v1beta1",
    ),
    (
        "a budget with both bounds",
        put("PodDisruptionBudget", "encoder", "spec", to={"minAvailable": 1, "maxUnavailable": 1}),
        "cannot be both set",
    ),
    (
        "a quantity that is none",
        pod("redis", *_CONTAINER, "resources", "limits", "memory", to="1 GiB"),
        "quantities must match",
    ),
    (
        "a request above the limit",
        pod("redis", *_CONTAINER, "resources", "requests", to={"memory": "900Gi"}),
        "must be less than or equal",
    ),
    (
        "a probe in two ways",
        pod("encoder", *_CONTAINER, "livenessProbe", "exec", to={"command": ["true"]}),
        "may not specify more than 1",
    ),
    (
        "an account that is not there",
        pod("encoder", "serviceAccountName", to="ghost"),
        'serviceaccount "ghost" not found',
    ),
    (
        "a priority that is not there",
        pod("encoder", "priorityClassName", to="ghost"),
        "no PriorityClass with name ghost",
    ),
    (
        "a namespace that admits anything",
        put("Namespace", "hashlens", "metadata", "labels", to={}),
        "does not enforce restricted pods",
    ),
    ("the namespace at the end", _last, 'namespaces "hashlens" not found'),
    (
        "a policy's port that is none",
        put("NetworkPolicy", "default-deny", "spec", "ingress", to=[{"ports": [{"port": 70000}]}]),
        "must be between 1 and 65535",
    ),
    ("a ConfigMap too large for kubectl", _large, "metadata.annotations: Too long"),
    (
        "a field that no PodMonitor has",
        put("PodMonitor", "hashlens", "spec", "podMetricEndpoints", to=[]),
        'unknown field "spec.podMetricEndpoints"',
    ),
    (
        "rules that are no list",
        put("PrometheusRule", "hashlens", "spec", "groups", to={}),
        "must be of type array",
    ),
    (
        "a certificate of nobody",
        put("Certificate", "client-tls", "spec", "issuerRef", to=GONE),
        "spec.issuerRef: Required value",
    ),
    (
        "scaling by nothing",
        put(
            "HorizontalPodAutoscaler",
            "encoder",
            *("spec", "metrics", 0, "containerResource", "target"),
            to=GONE,
        ),
        "target.type: Required value",
    ),
]
