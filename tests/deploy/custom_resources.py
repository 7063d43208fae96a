"""Definitions of the custom resources of deploy/k8s, for a server that has no operator."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.api_client import Object

SCHEMAS = Path(__file__).parents[2] / "deploy" / "k8s" / "schemas"

GROUPS = ("cert-manager.io", "keda.sh", "monitoring.coreos.com")
"""Those of the operators that the components are written for."""

_KEPT = frozenset(
    (
        *("type", "format", "enum", "pattern", "required", "nullable", "default"),
        *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"),
        *("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"),
        *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type"),
    )
)
"""What a definition's schema may say, and needs to, to tell right fields from wrong ones."""


@dataclass(frozen=True, order=True)
class CustomKind:
    """A kind that an operator adds."""

    group: str
    version: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"

    @property
    def plural(self) -> str:
        """Its plural, which is regular for every kind of `GROUPS` that is used."""
        return f"{self.kind.lower()}s"


def custom_kinds(objects: Iterable[Object]) -> list[CustomKind]:
    """Return the kinds among objects that need a definition."""
    found = set()
    for each in objects:
        group, _, version = each["apiVersion"].rpartition("/")
        if group in GROUPS:
            found.add(CustomKind(group, version, each["kind"]))
    return sorted(found)


def definition(kind: CustomKind, schemas: Path = SCHEMAS) -> Object:
    """Return a definition of a kind, by its schema in deploy/k8s/schemas."""
    schema = structural(json.loads(schema_path(kind, schemas).read_text()))
    for given in ("apiVersion", "kind", "metadata"):
        schema.get("properties", {}).pop(given, None)
    version = {
        "name": kind.version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
    }
    names = {"kind": kind.kind, "plural": kind.plural, "singular": kind.kind.lower()}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{kind.group}"},
        "spec": {
            "group": kind.group,
            "names": names,
            "scope": "Cluster" if kind.kind.startswith("Cluster") else "Namespaced",
            "versions": [version],
        },
    }


def schema_path(kind: CustomKind, schemas: Path = SCHEMAS) -> Path:
    """Return the file of a kind's schema."""
    return schemas / f"{kind.kind.lower()}.{kind.group}_{kind.version}.json"


def structural(schema: Any) -> Any:
    """Turn a JSON schema into what a definition takes: the same fields, less is said of them."""
    if not isinstance(schema, dict):
        return {"x-kubernetes-preserve-unknown-fields": True}
    out = {name: value for name, value in schema.items() if name in _KEPT}
    if isinstance(out.get("type"), list):
        types = [each for each in out["type"] if each != "null"]
        out.pop("type")
        if len(types) == 1:
            out["type"] = types[0]
        elif set(types) == {"integer", "string"}:
            out["x-kubernetes-int-or-string"] = True
    if "properties" in schema:
        out["properties"] = {
            name: structural(value) for name, value in schema["properties"].items()
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = structural(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = structural(schema["items"])
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    elif "type" not in out:
        if "properties" in out or "additionalProperties" in out:
            out["type"] = "object"
        else:
            out["x-kubernetes-preserve-unknown-fields"] = True
    if out.get("type") == "object" and not {"properties", "additionalProperties"} & out.keys():
        out["x-kubernetes-preserve-unknown-fields"] = True
    return out
