"""Ways to break rendered manifests: pods and their programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.deploy.manifests import BASE, K8S, Combination, Object

Break = Callable[[list[Object]], None]
PRODUCTION = Combination(K8S / "overlays" / "production")
KEDA = Combination(BASE, ("autoscale-keda",))
EXTERNAL = Combination(BASE, ("external-redis",))
SMALL = Combination(BASE)
BULK = Combination(BASE, ("bulk-encode",))


def find(objects: list[Object], kind: str, name: str) -> Object:
    """Find an object; ConfigMaps by their name without its hash."""
    for item in objects:
        own = item["metadata"]["name"]
        if item["kind"] == kind and name in (own, own.rpartition("-")[0]):
            return item
    raise AssertionError(f"no {kind} {name}")


GONE: Any = object()


def put(kind: str, name: str, *path: str | int, to: Any) -> Break:
    """Return what sets a field, or takes it away."""

    def broken(objects: list[Object]) -> None:
        place: Any = find(objects, kind, name)
        for step in path[:-1]:
            place = place.setdefault(step, {}) if isinstance(place, dict) else place[int(step)]
        if to is GONE:
            del place[path[-1]]
        else:
            place[path[-1]] = to

    return broken


def setting(service: str, **values: str) -> Break:
    """Return what sets variables in a ConfigMap."""
    return lambda objects: find(objects, "ConfigMap", service)["data"].update(values)


def without(kind: str, name: str) -> Break:
    """Return what takes an object away."""
    return lambda objects: objects.remove(find(objects, kind, name))


KINDS = {"encoder": "Deployment", "search": "StatefulSet", "redis": "StatefulSet"}
LABEL = "app.kubernetes.io/name"


def pod(service: str, *path: str | int, to: Any) -> Break:
    """Return what sets a field of a service's pods."""
    return put(KINDS[service], service, "spec", "template", "spec", *path, to=to)


def container(service: str, *path: str | int, to: Any) -> Break:
    """Return what sets a field of a service's container."""
    return pod(service, "containers", 0, *path, to=to)


def variable(service: str, name: str, value: str) -> Break:
    """Return what sets a variable of a service's container."""

    def broken(objects: list[Object]) -> None:
        spec = find(objects, KINDS[service], service)["spec"]["template"]["spec"]
        env = spec["containers"][0]["env"]
        env[:] = [item for item in env if item["name"] != name] + [{"name": name, "value": value}]

    return broken


def policy(name: str, *path: str | int, to: Any) -> Break:
    """Return what sets a field of a NetworkPolicy."""
    return put("NetworkPolicy", name, "spec", *path, to=to)


def redis_conf(old: str, new: str) -> Break:
    """Return what changes Redis's file."""

    def broken(objects: list[Object]) -> None:
        data = find(objects, "ConfigMap", "redis")["data"]
        assert old in data["redis.conf"]
        data["redis.conf"] = data["redis.conf"].replace(old, new)

    return broken


def certificate(name: str, *path: str | int, to: Any) -> Break:
    """Return what sets a field of a Certificate."""
    return put("Certificate", name, "spec", *path, to=to)


_INDEX = ("spec", "template", "spec", "containers", 0)

BREAKS: list[tuple[str, Combination, Break, str]] = [
    ("programs_start", SMALL, setting("encoder", HASHLENS_ENCODER_MAX_QUEUE="1"), "max_queue"),
    ("programs_start", SMALL, setting("search", HASHLENS_SEARCH_GRACE_S="soon"), "soon"),
    ("programs_start", SMALL, setting("search", HASHLENS_SEARCH_INSECURE="no"), "--insecure"),
    ("programs_start", SMALL, container("search", "args", to=["--listne=:1"]), "listne"),
    (
        "programs_start",
        BULK,
        put("Job", "bulk-encode", *_INDEX, "args", to=["--shrad=1"]),
        "shrad",
    ),
    ("variables_are_known", BULK, setting("bulk-encode", HASHLENS_TOKEN="x"), "HASHLENS_TOKEN is"),
    ("files_are_there", BULK, setting("bulk-encode", HASHLENS_TOKEN_FILE="/x/y"), "/x/y"),
    ("variables_are_known", SMALL, setting("encoder", HASHLENS_ENCODER_TREADS="2"), "TREADS"),
    ("variables_are_known", SMALL, setting("search", NUMBA_CACHE="/x"), "NUMBA_CACHE"),
    ("references_exist", SMALL, without("ConfigMap", "search"), "ConfigMap search"),
    ("references_exist", SMALL, pod("encoder", "volumes", 1, "secret", "secretName", to="t"), "t"),
    (
        *("references_exist", EXTERNAL),
        container("search", "env", 0, "valueFrom", "secretKeyRef", "key", to="uri"),
        "no key uri",
    ),
    (
        *("references_exist", SMALL),
        pod(
            "encoder", "volumes", 0, to={"name": "tmp", "persistentVolumeClaim": {"claimName": "c"}}
        ),
        "claim c",
    ),
    ("mounts_are_volumes", SMALL, pod("search", "volumes", 0, "name", to="temp"), "temp"),
    ("files_are_there", SMALL, setting("encoder", HASHLENS_ENCODER_TOKENS="/secrets/t"), "/t"),
    ("files_are_there", SMALL, redis_conf("/secrets/acl/users", "/secrets/acl/user"), "user.acl"),
    (
        "files_are_there",
        PRODUCTION,
        container("search", "volumeMounts", 0, to={"name": "certs", "mountPath": "/cert"}),
        "/certs/tls.crt",
    ),
    ("written_is_writable", SMALL, setting("search", HASHLENS_SEARCH_DATA_DIR="/srv"), "/srv"),
    ("written_is_writable", SMALL, setting("search", HASHLENS_SEARCH_DATA_DIR="/tmp/d"), "lost"),
    ("written_is_writable", SMALL, variable("search", "NUMBA_CACHE_DIR", "/opt/k"), "/opt/k"),
    (
        "written_is_writable",
        SMALL,
        container("encoder", "volumeMounts", 0, "readOnly", to=True),
        "/tmp is not",
    ),
    (
        "written_is_writable",
        SMALL,
        container("encoder", "volumeMounts", 0, "mountPath", to="/opt"),
        "nothing is written to /opt",
    ),
    ("written_is_writable", SMALL, redis_conf("dir /data", "dir /redis"), "/redis"),
    ("written_is_writable", SMALL, pod("redis", "securityContext", "fsGroup", to=GONE), "fsGroup"),
    ("redis_keeps_what_it_acknowledged", SMALL, redis_conf("always", "everysec"), "everysec"),
    ("redis_keeps_what_it_acknowledged", SMALL, container("redis", "args", 1, to="2gb"), "half"),
    ("resources_fit", SMALL, container("redis", "resources", "limits", to=GONE), "limits"),
    ("resources_fit", SMALL, variable("search", "HASHLENS_SEARCH_N_THREADS", "8"), "n_threads"),
    ("resources_fit", SMALL, container("encoder", "resources", "limits", "cpu", to="1500m"), "1.5"),
    (
        "resources_fit",
        SMALL,
        container("encoder", "resources", "limits", "memory", to="1Gi"),
        "largest pictures",
    ),
    ("probes_name_what_exists", SMALL, container("search", "livenessProbe", to=GONE), "liveness"),
    (
        "probes_name_what_exists",
        SMALL,
        container("search", "readinessProbe", "grpc", "service", to="ready"),
        "unknown",
    ),
    (
        "probes_name_what_exists",
        SMALL,
        container("search", "livenessProbe", "grpc", "service", to="readiness"),
        "not liveness",
    ),
    (
        "probes_name_what_exists",
        SMALL,
        container("encoder", "startupProbe", "grpc", "port", to=1),
        "on port 50071",
    ),
    ("grace_is_enough", SMALL, setting("encoder", HASHLENS_ENCODER_FLUSH_S="60"), "needs 75"),
    ("grace_is_enough", SMALL, container("search", "lifecycle", to=GONE), "preStop"),
    (
        "pods_are_restricted",
        SMALL,
        pod("redis", "securityContext", "runAsNonRoot", to=GONE),
        "Root",
    ),
    (
        "pods_are_restricted",
        SMALL,
        pod("redis", "securityContext", "runAsUser", to=GONE),
        "numeric",
    ),
    (
        "pods_are_restricted",
        SMALL,
        pod("search", "securityContext", "seccompProfile", to={}),
        "seccomp",
    ),
    ("pods_are_restricted", SMALL, pod("search", "automountServiceAccountToken", to=GONE), "token"),
    ("pods_are_restricted", SMALL, pod("search", "enableServiceLinks", to=True), "variables"),
    ("pods_are_restricted", SMALL, pod("search", "hostNetwork", to=True), "hostNetwork"),
    (
        "pods_are_restricted",
        SMALL,
        pod("encoder", "volumes", 0, to={"name": "tmp", "hostPath": {"path": "/tmp"}}),
        "kind that is not allowed",
    ),
    *(
        (
            "pods_are_restricted",
            SMALL,
            container("encoder", "securityContext", name, to=value),
            text,
        )
        for name, value, text in (
            ("allowPrivilegeEscalation", GONE, "privileges"),
            ("capabilities", {"drop": ["ALL"], "add": ["NET_ADMIN"]}, "capabilities"),
            ("readOnlyRootFilesystem", False, "writable"),
            ("runAsUser", 0, "root"),
        )
    ),
    ("images_are_pinned", SMALL, container("redis", "image", to="valkey/valkey"), "not pinned"),
    ("images_are_pinned", SMALL, container("search", "image", to="hashlens-search:1"), "version"),
    ("is_defended", SMALL, setting("search", HASHLENS_SEARCH_TOKENS=""), "token"),
    ("is_defended", SMALL, setting("search", HASHLENS_SEARCH_REFLECTION="true"), "describes"),
    ("is_defended", PRODUCTION, setting("search", HASHLENS_SEARCH_INSECURE="1"), "--insecure"),
]
