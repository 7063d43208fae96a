"""What must hold of rendered manifests: pods, their programs, and what both refer to.

Each check takes a cluster and yields a sentence for what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import click

from hashlens import __version__
from hashlens.errors import HashlensError
from tests.deploy.k8s_programs import (
    OUTSIDE,
    arguments,
    config_of,
    environment,
    files_read,
    known_variables,
    parse,
    quantity,
    service_of,
)
from tests.deploy.manifests import Cluster, Container, Pods

Check = Callable[[Cluster], Iterator[str]]

CLAIMS_OF_USERS = frozenset(["images"])
"""Volumes that a README tells the user to bring."""

_MARGIN_S = 2
_PIXEL_BYTES = 16
_ENCODER_BYTES = 1 << 30
"""What an encoder needs beside its pictures (docs/operations.md, Hostile input)."""


def config(cluster: Cluster, container: Container) -> Any:
    """Return a service's configuration, or None where there is none to be had."""
    if service_of(container) is None:
        return None
    if container.name not in cluster.configs:
        try:
            cluster.configs[container.name] = config_of(cluster, container)
        except (click.ClickException, HashlensError):
            cluster.configs[container.name] = None  # `programs_start` says so.
    return cluster.configs[container.name]


def programs_start(cluster: Cluster) -> Iterator[str]:
    """Each of our programs parses its environment and arguments."""
    for container in cluster.containers():
        if container.image.startswith("hashlens-"):
            try:
                parse(cluster, container)
                if service_of(container) is not None:
                    config_of(cluster, container)
            except (click.ClickException, HashlensError) as error:
                yield f"{container.name}: {error}"


def variables_are_known(cluster: Cluster) -> Iterator[str]:
    """Each HASHLENS_ variable is one that the program reads; others are listed here."""
    for container in cluster.containers():
        if not container.image.startswith("hashlens-"):
            continue
        used = environment(cluster, container)
        words = " ".join(
            str(text)
            for text in (
                *(container.spec.get("command", ())),
                *(container.spec.get("args", ())),
                *(variable.get("value", "") for variable in container.spec.get("env", ())),
            )
        )
        known = known_variables(cluster, container)
        for name in used:
            is_read = name in known or name in OUTSIDE or f"$({name})" in words
            if not is_read:
                yield f"{container.name}: {name} is read by nobody"


def references_exist(cluster: Cluster) -> Iterator[str]:
    """ConfigMaps, secrets and volumes that are named are there, and so are their keys."""
    for pods in cluster.pods():
        for kind, name in _references(pods):
            is_secret = kind == "Secret"
            is_made = name in cluster.secrets if is_secret else cluster.config(name) is not None
            if not is_made:
                yield f"{pods.name}: {kind} {name} is nowhere made"
        for volume in pods.spec.get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            made = cluster.get("PersistentVolumeClaim", claim) if claim else None
            if claim and made is None and claim not in CLAIMS_OF_USERS:
                yield f"{pods.name}: claim {claim} is nowhere made"
    for container in cluster.containers():
        for variable in container.spec.get("env", ()):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference and reference["key"] not in cluster.secrets.get(reference["name"], {}):
                yield f"{container.name}: {reference['name']} has no key {reference['key']}"


def _references(pods: Pods) -> Iterator[tuple[str, str]]:
    for volume in pods.spec.get("volumes", ()):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
    for container in pods.containers():
        sources = [*container.get("envFrom", ())]
        sources += [variable.get("valueFrom", {}) for variable in container.get("env", ())]
        for source in sources:
            for kind in ("configMap", "secret"):
                for suffix in ("Ref", "KeyRef"):
                    if found := source.get(kind + suffix):
                        yield kind[0].upper() + kind[1:], found["name"]


@dataclass(frozen=True)
class Mount:
    """A volume where a container sees it."""

    path: PurePosixPath
    is_writable: bool
    is_kept: bool
    """Outlives the pod."""
    files: frozenset[str] | None
    """What is in it, if that is known."""


def mounts(cluster: Cluster, container: Container) -> list[Mount]:
    """Return a container's mounts of volumes that are there, the innermost first."""
    volumes = {volume["name"]: volume for volume in container.pods.spec.get("volumes", ())}
    claims = container.pods.owner["spec"].get("volumeClaimTemplates", ())
    volumes |= {claim["metadata"]["name"]: {"persistentVolumeClaim": {}} for claim in claims}
    found = []
    for mount in container.spec.get("volumeMounts", ()):
        volume = volumes.get(mount["name"], {})
        files = None
        if "secret" in volume:
            files = frozenset(cluster.secrets.get(volume["secret"]["secretName"], ()))
        elif "configMap" in volume:
            files = frozenset(cluster.config(volume["configMap"]["name"]) or ())
        is_volume = "emptyDir" in volume or "persistentVolumeClaim" in volume
        found.append(
            Mount(
                PurePosixPath(mount["mountPath"]),
                is_volume and not mount.get("readOnly", False),
                "persistentVolumeClaim" in volume,
                files,
            )
        )
    return sorted(found, key=lambda mount: -len(mount.path.parts))


def mount_of(cluster: Cluster, container: Container, path: PurePosixPath) -> Mount | None:
    """Return the mount that a path is in."""
    for mount in mounts(cluster, container):
        if path.is_relative_to(mount.path):
            return mount
    return None


def mounts_are_volumes(cluster: Cluster) -> Iterator[str]:
    """Each mount has its volume, and each volume is mounted."""
    for pods in cluster.pods():
        claims = pods.owner["spec"].get("volumeClaimTemplates", ())
        volumes = {volume["name"] for volume in pods.spec.get("volumes", ())}
        volumes |= {claim["metadata"]["name"] for claim in claims}
        used = {m["name"] for spec in pods.containers() for m in spec.get("volumeMounts", ())}
        for name in sorted(volumes ^ used):
            yield f"{pods.name}: {name} is a volume or a mount, not both"


def files_are_there(cluster: Cluster) -> Iterator[str]:
    """Each file that a program is told to read is a key of what is mounted there."""
    for container in cluster.containers():
        is_ours = container.image.startswith("hashlens-")
        for path in files_read(cluster, container) if is_ours else ():
            mount = mount_of(cluster, container, PurePosixPath(path))
            if mount is None or mount.files is None or path.name not in mount.files:
                yield f"{container.name}: nothing puts {path} there"
    for container in cluster.containers():
        for option, value in redis_options(cluster, container).items():
            if option.endswith("file"):
                mount = mount_of(cluster, container, PurePosixPath(value))
                if mount is None or PurePosixPath(value).name not in (mount.files or ()):
                    yield f"{container.name}: nothing puts {value} there"


def written_is_writable(cluster: Cluster) -> Iterator[str]:
    """Where programs write is a volume that lets them, and nothing else does."""
    for container in cluster.containers():
        for path, must_stay in _written(cluster, container):
            mount = mount_of(cluster, container, PurePosixPath(path))
            if mount is None or not mount.is_writable:
                yield f"{container.name}: {path} is not writable"
            elif must_stay and not mount.is_kept:
                yield f"{container.name}: what is in {path} is lost with the pod"
        if service_of(container) is not None or container.image == "valkey":
            wanted = [PurePosixPath(path) for path, _ in _written(cluster, container)]
            for mount in mounts(cluster, container):
                if mount.is_writable and not any(p.is_relative_to(mount.path) for p in wanted):
                    yield f"{container.name}: nothing is written to {mount.path}"
        has_group = "fsGroup" in container.pods.spec.get("securityContext", {})
        if not has_group and any(m.is_kept for m in mounts(cluster, container)):
            yield f"{container.name}: without fsGroup its volume is root's"


def _written(cluster: Cluster, container: Container) -> Iterator[tuple[str, bool]]:
    told = config(cluster, container)
    if told is not None:
        yield "/tmp", False
        if hasattr(told, "data_dir"):
            yield str(told.data_dir), True
            yield environment(cluster, container).get("NUMBA_CACHE_DIR", "/nowhere"), True
    elif container.image == "valkey":
        yield redis_options(cluster, container).get("dir", "/nowhere"), True


def redis_options(cluster: Cluster, container: Container) -> dict[str, str]:
    """Return what a Redis container is started with: its file, then its command line."""
    if container.image != "valkey":
        return {}
    words = arguments(cluster, container)
    found: dict[str, str] = {}
    for volume in container.pods.spec.get("volumes", ()):
        if "configMap" in volume:
            text = (cluster.config(volume["configMap"]["name"]) or {}).get("redis.conf", "")
            for line in text.splitlines():
                name, _, value = line.partition(" ")
                if name and name != "#":
                    found[name] = value
    options = [word for word in words if word.startswith("--")]
    return found | {option[2:]: words[words.index(option) + 1] for option in options}


def redis_keeps_what_it_acknowledged(cluster: Cluster) -> Iterator[str]:
    """Redis writes before it answers, and leaves room to rewrite its file."""
    for container in cluster.containers():
        if container.image != "valkey":
            continue
        options = redis_options(cluster, container)
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        for name, value in wanted.items():
            if options.get(name) != value:
                yield f"{container.name}: {name} is {options.get(name)}, not {value}"
        most = options.get("maxmemory", "1024gb").replace("mb", "Mi").replace("gb", "Gi")
        limit = quantity(container.spec["resources"]["limits"]["memory"])
        if quantity(most) > limit / 2:
            yield f"{container.name}: maxmemory is more than half of the limit"


def resources_fit(cluster: Cluster) -> Iterator[str]:
    """Requests and limits are there; whole CPUs are threads; pictures fit the memory."""
    for container in cluster.containers():
        resources = container.spec.get("resources", {})
        for kind in ("requests", "limits"):
            for name in ("cpu", "memory"):
                if name not in resources.get(kind, {}):
                    yield f"{container.name}: no {name} in {kind}"
                    return
        told = config(cluster, container)
        if told is None:
            continue
        cpus = quantity(resources["limits"]["cpu"])
        for name in ("n_threads", "n_decode_threads"):
            if hasattr(told, name) and getattr(told, name) != cpus:
                yield f"{container.name}: {name} is {getattr(told, name)} of {cpus} CPUs"
        if hasattr(told, "max_image_pixels"):
            pictures = _PIXEL_BYTES * told.max_image_pixels * told.n_decode_threads
            pictures += _ENCODER_BYTES + told.max_bytes_in_flight
            if pictures > quantity(resources["limits"]["memory"]):
                yield f"{container.name}: the largest pictures do not fit the memory limit"


def probes_name_what_exists(cluster: Cluster) -> Iterator[str]:
    """Each service has three probes, on its health port, by names that are answered."""
    for container in cluster.containers():
        service, told = service_of(container), config(cluster, container)
        if service is None or told is None:
            continue
        port = int(told.health_listen.rpartition(":")[2] or 0)
        wanted = {"startupProbe": service.names[0], "readinessProbe": "readiness"}
        wanted["livenessProbe"] = "liveness"
        for kind, name in wanted.items():
            probe = container.spec.get(kind, {}).get("grpc", {})
            if probe.get("port") != port:
                yield f"{container.name}: {kind} is not by gRPC on port {port}"
            elif probe.get("service") not in service.health_names():
                yield f"{container.name}: {kind} asks for {probe.get('service')}: unknown"
            elif probe["service"] != name:
                yield f"{container.name}: {kind} asks for {probe['service']}, not {name}"


def grace_is_enough(cluster: Cluster) -> Iterator[str]:
    """A pod is killed only after its program would have ended by itself."""
    for container in cluster.containers():
        told = config(cluster, container)
        if told is None:
            continue
        before = container.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        if not before.get("seconds"):
            yield f"{container.name}: no preStop: traffic comes to a server that stops"
        needed = told.grace_s + told.flush_s + before.get("seconds", 0) + _MARGIN_S
        given = container.pods.spec.get("terminationGracePeriodSeconds", 30)
        if given < needed:
            yield f"{container.name}: has {given} s to end, and needs {needed:g}"


def pods_are_restricted(cluster: Cluster) -> Iterator[str]:
    """Pods fit the standard `restricted`, and read-only root file systems beside it."""
    for pods in cluster.pods():
        context = pods.spec.get("securityContext", {})
        wanted: dict[str, Any] = {"runAsNonRoot": True}
        for name, value in wanted.items():
            if context.get(name) != value:
                yield f"{pods.name}: {name} is not {value}"
        if not context.get("runAsUser"):
            yield f"{pods.name}: no numeric user"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pods.name}: seccompProfile is not RuntimeDefault"
        if pods.spec.get("automountServiceAccountToken") is not False:
            yield f"{pods.name}: gets a token of the cluster"
        if pods.spec.get("enableServiceLinks") is not False:
            yield f"{pods.name}: gets variables for every Service"
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if pods.spec.get(name):
                yield f"{pods.name}: {name}"
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected", "name"}
        for volume in pods.spec.get("volumes", ()):
            if set(volume) - allowed:
                yield f"{pods.name}: volume {volume['name']} is of a kind that is not allowed"
        for spec in pods.containers():
            own = spec.get("securityContext", {})
            name = f"{pods.name}, container {spec['name']}"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{name}: may gain privileges"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name}: keeps capabilities"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{name}: its root file system is writable"
            if own.get("runAsUser", 1) == 0 or own.get("runAsNonRoot", True) is not True:
                yield f"{name}: may be root"


def images_are_pinned(cluster: Cluster) -> Iterator[str]:
    """Images have tags; ours that of this version."""
    for container in cluster.containers():
        tag = str(container.spec["image"]).rsplit("/", 1)[-1].partition(":")[2]
        if not tag or tag == "latest":
            yield f"{container.name}: {container.spec['image']} is not pinned"
        elif container.image.startswith("hashlens-") and tag != __version__:
            yield f"{container.name}: {container.spec['image']} is not version {__version__}"


def is_defended(cluster: Cluster) -> Iterator[str]:
    """Services ask for tokens, do not describe themselves, and say --insecure or have TLS."""
    for container in cluster.containers():
        told = config(cluster, container)
        if told is None:
            continue
        if told.tokens is None:
            yield f"{container.name}: asks nobody for a token"
        if told.reflection or told.admin_listen:
            yield f"{container.name}: describes itself to strangers"
        if told.insecure and told.tls_cert is not None:
            yield f"{container.name}: has TLS and is still --insecure"


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        *(programs_start, variables_are_known, references_exist, mounts_are_volumes),
        *(files_are_there, written_is_writable, redis_keeps_what_it_acknowledged, resources_fit),
        *(probes_name_what_exists, grace_is_enough, pods_are_restricted, images_are_pinned),
        is_defended,
    )
}
