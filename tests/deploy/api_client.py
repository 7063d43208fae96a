"""Asks an API server for what `kubectl apply --server-side` and `kubectl delete` ask."""

from __future__ import annotations

import copy
import http.client
import json
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from tests.deploy.control_plane import ControlPlane

Object = dict[str, Any]
"""A Kubernetes object, as parsed from YAML."""

MANAGER = "hashlens-check"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
REQUEST_S = 60.0
GONE_S = 30.0
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    body: Object
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status < 300

    @property
    def message(self) -> str:
        """Why it refused."""
        return str(self.body.get("message", self.status))


@dataclass(frozen=True)
class Resource:
    """Where objects of a kind are found."""

    plural: str
    namespaced: bool


def name_of(an_object: Object) -> str:
    """Return kind and name, as messages give them."""
    return f"{an_object['kind']}/{an_object['metadata']['name']}"


def warnings_of(headers: list[str]) -> tuple[str, ...]:
    """Return the texts of an answer's `Warning` headers."""
    found = (text for header in headers for text in _WARNING.findall(header))
    return tuple(re.sub(r"\\(.)", r"\1", text) for text in found)


class UnknownKindError(Exception):
    """The server has no such kind."""


class Api:
    """A client of one server: one connection, one request at a time."""

    def __init__(self, server: ControlPlane) -> None:
        self._headers = {"Authorization": f"Bearer {server.token}", "Accept": "application/json"}
        self._connection = server.connection(timeout_s=REQUEST_S)
        self._known: dict[str, dict[str, Resource]] = {}

    def close(self) -> None:
        self._connection.close()

    def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        content_type: str = "application/json",
        **query: str,
    ) -> Answer:
        """Send one request."""
        sent = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": content_type}
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            self._connection.request(method, target, sent, headers)
            answer = self._connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            # The server closes a connection that was idle for long.
            self._connection.close()
            self._connection.request(method, target, sent, headers)
            answer = self._connection.getresponse()
        text = answer.read()
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            parsed = {"message": text.decode(errors="replace")}
        return Answer(answer.status, parsed, warnings_of(answer.headers.get_all("Warning") or []))

    def resource(self, api_version: str, kind: str) -> Resource:
        """Ask the server for the resource of a kind."""
        if kind not in self._known.get(api_version, {}):
            answer = self.request("GET", _root(api_version))
            self._known[api_version] = {
                found["kind"]: Resource(found["name"], found["namespaced"])
                for found in answer.body.get("resources", [])
                if "/" not in found["name"]
            }
        try:
            return self._known[api_version][kind]
        except KeyError:
            raise UnknownKindError(f"the server has no {kind} of {api_version}") from None

    def path(self, an_object: Object, *, of_all: bool = False) -> str:
        """Return the path of an object, or of all objects beside it."""
        api_version, metadata = an_object["apiVersion"], an_object["metadata"]
        resource = self.resource(api_version, an_object["kind"])
        parts = [_root(api_version)]
        if resource.namespaced:
            parts += ["namespaces", quote(metadata.get("namespace", "default"))]
        parts.append(resource.plural)
        return "/".join(parts if of_all else [*parts, quote(metadata["name"])])

    def apply(self, an_object: Object) -> Answer:
        """Apply an object on the server's side; a field it does not know is an error."""
        return self.request(
            "PATCH",
            self.path(an_object),
            an_object,
            "application/apply-patch+yaml",
            fieldManager=MANAGER,
            fieldValidation="Strict",
        )

    def try_create(self, an_object: Object) -> Answer:
        """Ask what creating an object would give, and create nothing."""
        return self.request(
            "POST",
            self.path(an_object, of_all=True),
            an_object,
            dryRun="All",
            fieldManager=MANAGER,
            fieldValidation="Strict",
        )

    def delete(self, an_object: Object) -> str:
        """Delete an object, and say what hinders it.

        No controller runs: what controllers wait for before an object goes is waived.
        """
        path = self.path(an_object)
        answer = self.request("DELETE", path, propagationPolicy="Background")
        if answer.status == 404:
            return ""
        if not answer.ok:
            return f"{name_of(an_object)} cannot be deleted: {answer.message}"
        ends_s = time.monotonic() + GONE_S
        while (left := self.request("GET", path)).status != 404:
            if time.monotonic() > ends_s:
                return f"{name_of(an_object)} is still there {GONE_S:.0f} s after it was deleted"
            if an_object["kind"] == "Namespace":
                left.body["spec"]["finalizers"] = []
                self.request("PUT", f"{path}/finalize", left.body)
            elif left.body["metadata"].get("finalizers"):
                none = {"metadata": {"finalizers": None}}
                self.request("PATCH", path, none, "application/merge-patch+json")
            time.sleep(0.05)
        return ""


def as_kubectl_sends(an_object: Object) -> Object:
    """Return an object with the annotation of `kubectl apply`, which holds it a second time."""
    sent = copy.deepcopy(an_object)
    annotations = sent["metadata"].setdefault("annotations", {})
    annotations[LAST_APPLIED] = json.dumps(an_object, separators=(",", ":"))
    return sent


def _root(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
