"""Renders deploy/k8s, and finds one's way in what was rendered."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
BASE = K8S / "base"

NEEDS = {"cert-manager": ("tls",)}
"""Components that make sense with others only."""
EXCLUDES = frozenset([frozenset(["autoscale", "autoscale-keda"])])
"""Components that would pull at the same thing."""
LAST = ("external-redis",)
"""Components that come after all others."""

_RENDER_S = 120
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Combination:
    """A base or overlay with components."""

    directory: Path
    components: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join([self.directory.name, *self.components])


def overlays() -> list[Path]:
    """Return the overlays' directories."""
    return sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))


def components() -> list[str]:
    """Return the components' names."""
    return sorted(path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml"))


def supported() -> list[Combination]:
    """Return every combination that is promised to work.

    The base and each overlay, alone and with each component that goes with it; and the base with
    all components at once, once for each way to leave out those that exclude each other. A
    component may hold a part for another, as bulk-encode does for tls: it comes with both.
    """
    found = []
    for directory in (BASE, *overlays()):
        there = _components_of(directory)
        found.append(Combination(directory))
        for name in components():
            if name not in there and not _excluded(name, there):
                wanted = [name, *(need for need in NEEDS.get(name, ()) if need not in there)]
                found.append(Combination(directory, _in_order(wanted, there)))
    everything = set(components())
    either = sorted(name for pair in EXCLUDES for name in pair)
    return found + [Combination(BASE, _in_order(everything - {name})) for name in either]


def kustomize() -> list[str] | None:
    """Return the command that renders a directory; None where there is none."""
    ours = ROOT / ".tools" / "bin" / "kustomize"
    if ours.exists():
        return [str(ours), "build"]
    if path := shutil.which("kustomize"):
        return [path, "build"]
    if path := shutil.which("kubectl"):
        return [path, "kustomize"]
    return None


def render(what: Combination | Path) -> list[Object]:
    """Render a directory or a combination; the caller may change what it gets.

    Skips the test that asks where neither kustomize nor kubectl is installed.
    """
    if kustomize() is None:
        pytest.skip("kustomize is not installed: `make kustomize` does it, where Go is")
    combination = what if isinstance(what, Combination) else Combination(what)
    return copy.deepcopy(_rendered(combination))


@functools.cache
def _rendered(combination: Combination) -> list[Object]:
    if not combination.components:
        return _build(combination.directory)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()

        def relative(path: Path) -> str:
            return os.path.relpath(path.resolve(), here)

        text = yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [relative(combination.directory)],
                "components": [relative(K8S / "components" / n) for n in combination.components],
            }
        )
        (here / "kustomization.yaml").write_text(text)
        return _build(here)


def _build(directory: Path) -> list[Object]:
    command = kustomize()
    assert command is not None
    done = subprocess.run(
        [*command, str(directory)], capture_output=True, text=True, timeout=_RENDER_S
    )
    assert done.returncode == 0, done.stderr
    # A warning is about something that will cease to work.
    assert not done.stderr, done.stderr
    return [item for item in yaml.load_all(done.stdout, _LOADER) if item]


def _components_of(directory: Path) -> set[str]:
    text = yaml.safe_load((directory / "kustomization.yaml").read_text())
    return {Path(path).name for path in text.get("components", ())}


def _excluded(name: str, there: set[str]) -> bool:
    return any(name in pair and pair & there for pair in EXCLUDES)


def _in_order(names: Iterable[str], there: Iterable[str] = ()) -> tuple[str, ...]:
    """Sort components; one that has a part for another gets it where that is used as well."""
    names = set(names)
    together = names | set(there)
    parts = [path.parent for path in (K8S / "components").glob("*/*/kustomization.yaml")]
    names |= {f"{p.parent.name}/{p.name}" for p in parts if {p.parent.name, p.name} <= together}
    return tuple(sorted(names, key=lambda name: (name in LAST, name)))


@dataclass(frozen=True)
class Pods:
    """What a workload's pods are."""

    owner: Object
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


@dataclass(frozen=True)
class Container:
    """A container of a workload's pods."""

    pods: Pods
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.pods.name}, container {self.spec['name']}"

    @property
    def image(self) -> str:
        """The image's name, without registry and tag."""
        return str(self.spec["image"]).rsplit("/", 1)[-1].partition(":")[0]

    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.spec.get("ports", ())}


class Cluster:
    """Rendered objects, to be asked about.

    Parameters
    ----------
    objects
        As `render` returns them.
    secrets
        Keys and values of the secrets that the READMEs' commands make.
    """

    def __init__(
        self, objects: Sequence[Object], secrets: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        self.objects = list(objects)
        self.secrets = {name: dict(values) for name, values in (secrets or {}).items()}
        self.configs: dict[str, Any] = {}
        for certificate in self.of("Certificate"):
            made = dict.fromkeys(("tls.crt", "tls.key", "ca.crt"), "")
            self.secrets[certificate["spec"]["secretName"]] = made

    def of(self, *kinds: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] in kinds]

    def get(self, kind: str, name: str) -> Object | None:
        for item in self.of(kind):
            if item["metadata"]["name"] == name:
                return item
        return None

    def pods(self) -> list[Pods]:
        found = []
        for owner in self.of("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"):
            spec = owner["spec"]
            if owner["kind"] == "CronJob":
                spec = spec["jobTemplate"]["spec"]
            template = spec["template"]
            found.append(Pods(owner, template["metadata"].get("labels", {}), template["spec"]))
        return found

    def containers(self) -> Iterator[Container]:
        for pods in self.pods():
            for spec in pods.containers():
                yield Container(pods, spec)

    def selected(self, selector: Mapping[str, Any]) -> list[Pods]:
        """Return the pods that a label selector matches."""
        return [pods for pods in self.pods() if matches(selector, pods.labels)]

    def config(self, name: str) -> dict[str, str] | None:
        found = self.get("ConfigMap", name)
        return None if found is None else found.get("data", {})


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a label selector of Kubernetes matches labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions", ()):
        has, value = term["key"] in labels, labels.get(term["key"])
        values = term.get("values", ())
        if not {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": has,
            "DoesNotExist": not has,
        }[term["operator"]]:
            return False
    return True
