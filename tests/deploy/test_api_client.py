"""The client of the API server, against a server that answers as that one does."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.deploy import apiserver
from tests.deploy.api_client import Api, Object, UnknownKindError
from tests.deploy.control_plane import Binaries, ControlPlane
from tests.deploy.k8s_breaks import Break

NAMESPACE: Object = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "hashlens"},
    "spec": {},
}
CLAIM: Object = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "data", "namespace": "hashlens"},
    "spec": {"size": 1},
}
PODS: Object = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "encoder", "namespace": "hashlens"},
    "spec": {"template": {"spec": {"containers": [{"name": "c"}]}}},
}
DISCOVERY: dict[str, list[Object]] = {
    "/api/v1": [
        {"name": "namespaces", "kind": "Namespace", "namespaced": False},
        {"name": "namespaces/finalize", "kind": "Namespace", "namespaced": False},
        {"name": "serviceaccounts", "kind": "ServiceAccount", "namespaced": True},
        {"name": "persistentvolumeclaims", "kind": "PersistentVolumeClaim", "namespaced": True},
        {"name": "pods", "kind": "Pod", "namespaced": True},
    ],
    "/apis/apps/v1": [{"name": "deployments", "kind": "Deployment", "namespaced": True}],
}
ON_CLAIM = "/api/v1/namespaces/hashlens/persistentvolumeclaims/data"


class Fake(ControlPlane):
    """Keeps objects in memory and lets some go only without their finalizers."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(Binaries(tmp_path, tmp_path, tmp_path), tmp_path)
        self.objects: dict[str, Object] = {}
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        self.enforces = True
        self.strict = True
        self.changes = False
        self.keeps = True
        self.stuck = False
        self.immutable = False
        self.warning = ""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                assert self.headers["Authorization"] == f"Bearer {fake.token}"
                parts = urlsplit(self.path)
                fake.asked.append((self.command, parts.path, parse_qs(parts.query)))
                status, said = fake.answer(self.command, parts.path, body)
                text = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                if fake.warning and self.command == "PATCH":
                    self.send_header("Warning", f'299 - "{fake.warning}"')
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def connection(self, *, timeout_s: float) -> Any:
        return http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=timeout_s)

    def answer(self, method: str, path: str, body: Object) -> tuple[int, Object]:
        if path == "/version":
            return 200, {"gitVersion": "v1.99.0"}
        if path in DISCOVERY:
            return 200, {"resources": DISCOVERY[path]}
        if method == "POST":
            return self.admit(body)
        if method == "PUT":
            assert path.endswith("/finalize")
            assert body["spec"]["finalizers"] == []
            return 200, self.objects.pop(path.removesuffix("/finalize"))
        found = self.objects.get(path)
        if method == "PATCH" and "finalizers" in body.get("metadata", {}):
            return 200, self.objects.pop(path)
        if method == "PATCH":
            if self.immutable and found and found["spec"] != body["spec"]:
                return 422, {"message": "field is immutable"}
            number = int((found or body)["metadata"].get("resourceVersion", 0)) + 1
            metadata = {**body["metadata"], "resourceVersion": str(number)}
            if self.changes:
                metadata["labels"] = {"applied": str(number)}
            if path == ON_CLAIM:
                metadata["finalizers"] = ["kubernetes.io/pvc-protection"]
            made = {**body, "metadata": metadata}
            if not self.keeps:
                made.pop("spec", None)
            self.objects[path] = made
            return 201, made
        if found is None:
            return 404, {"message": "not found"}
        waits = found["kind"] == "Namespace" or "finalizers" in found["metadata"]
        if method == "DELETE" and not waits and not self.stuck:
            del self.objects[path]
        return 200, found

    def admit(self, body: Object) -> tuple[int, Object]:
        if self.strict and "hashlensMisspelt" in body.get("spec", {}):
            return 400, {"message": 'unknown field "spec.hashlensMisspelt"'}
        if self.enforces and body["metadata"]["name"] == "must-be-refused":
            return 403, {"message": 'violates PodSecurity "restricted:latest": privileged'}
        return 201, body


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    fake = Fake(tmp_path)
    thread = Thread(target=fake.server.serve_forever, args=(0.02,))
    thread.start()
    yield fake
    fake.server.shutdown()
    thread.join(10)
    fake.server.server_close()
    fake.stop()


@pytest.fixture
def api(fake: Fake) -> Iterator[Api]:
    api = Api(fake)
    yield api
    api.close()


def tried(api: Api, *objects: Object) -> apiserver.Outcome:
    return apiserver.try_combination(api, "one", list(objects), None, keep=False)


def test_a_combination_is_applied_with_strict_validation_and_leaves_nothing(
    fake: Fake, api: Api
) -> None:
    outcome = tried(api, NAMESPACE, CLAIM, PODS)
    assert outcome.failures == []
    assert (outcome.n_objects, outcome.n_custom, outcome.n_pods) == (3, 0, 1)
    assert fake.objects == {}
    written = [(path, query) for method, path, query in fake.asked if method == "POST"]
    assert [path for path, _ in written] == [
        "/api/v1/namespaces",
        "/api/v1/namespaces/hashlens/persistentvolumeclaims",
        "/apis/apps/v1/namespaces/hashlens/deployments",
        *["/api/v1/namespaces/hashlens/pods"] * 3,
    ]
    assert all(query["dryRun"] == ["All"] for _, query in written)
    patched = [query for method, _, query in fake.asked if method in ("POST", "PATCH") and query]
    assert all(query["fieldValidation"] == ["Strict"] for query in patched)


def test_what_is_kept_is_not_deleted(fake: Fake, api: Api) -> None:
    outcome = apiserver.try_combination(api, "one", [NAMESPACE, CLAIM], None, keep=True)
    assert outcome.failures == []
    assert ON_CLAIM in fake.objects


def test_a_namespace_that_admits_anything_fails(fake: Fake, api: Api) -> None:
    fake.enforces = False
    (failure,) = tried(api, NAMESPACE, PODS).failures
    assert failure.startswith("Namespace/hashlens does not enforce restricted pods")


def test_a_server_that_takes_misspelt_fields_fails(fake: Fake, api: Api) -> None:
    fake.strict = False
    assert tried(api, NAMESPACE, PODS).failures == [
        "pod of Deployment/encoder: a misspelt field is not refused"
    ]


def test_an_object_that_changes_when_it_is_applied_again_fails(fake: Fake, api: Api) -> None:
    fake.changes = True
    assert "PersistentVolumeClaim/data: applied again, it changes" in tried(api, CLAIM).failures


def test_a_dropped_field_fails(fake: Fake, api: Api) -> None:
    fake.keeps = False
    assert tried(api, CLAIM).failures == ["PersistentVolumeClaim/data: lost .spec"]


def test_a_warning_fails(fake: Fake, api: Api) -> None:
    fake.warning = "would violate PodSecurity"
    first, *_ = tried(api, CLAIM).failures
    assert first == "PersistentVolumeClaim/data: the server warns: would violate PodSecurity"


def test_an_object_without_a_namespace_fails(api: Api) -> None:
    homeless = {**CLAIM, "metadata": {"name": "data"}}
    assert tried(api, homeless).failures == ["PersistentVolumeClaim/data: has no namespace"]


def test_a_kind_that_the_server_does_not_know_fails(api: Api) -> None:
    unknown = {"apiVersion": "apps/v1", "kind": "Deploymint", "metadata": {"name": "a"}}
    assert tried(api, unknown).failures == ["Deploymint/a: the server has no Deploymint of apps/v1"]
    with pytest.raises(UnknownKindError):
        api.path(unknown)


def test_what_cannot_be_deleted_is_told(
    fake: Fake, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.deploy.api_client.GONE_S", 0.2)
    fake.stuck = True
    assert tried(api, PODS).failures == [
        "Deployment/encoder is still there 0 s after it was deleted"
    ]


def test_components_are_taken_away_and_added_again(fake: Fake, api: Api) -> None:
    outcome = apiserver.try_combination(
        api, "one+tls", [NAMESPACE, PODS], [NAMESPACE, CLAIM], keep=False
    )
    assert outcome.failures == []
    assert fake.objects == {}
    patched = [path.rpartition("/")[2] for method, path, _ in fake.asked if method == "PATCH"]
    applied_twice = ["hashlens", "default", "encoder"] * 2
    assert patched[:10] == [*applied_twice, "hashlens", "data", "hashlens", "encoder"]


def test_a_field_that_cannot_be_changed_is_in_the_way(fake: Fake, api: Api) -> None:
    fake.immutable = True
    plain: Object = {**PODS, "spec": {}}
    outcome = apiserver.try_combination(api, "one+tls", [PODS], [plain], keep=False)
    assert outcome.failures == [
        "Deployment/encoder (without components): field is immutable",
    ]


def test_only_what_is_asked_for_is_tried_and_told(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.enforces = False
    combinations: dict[str, list[Object]] = {"base": [NAMESPACE], "gpu": [], "gpu+tls": [CLAIM]}
    (failure,) = apiserver.check(fake, combinations, "base")
    assert failure.startswith("base: Namespace/hashlens does not enforce")
    assert apiserver.check(fake, combinations, "gpu", keep=True) == []
    assert list(fake.objects) == [ON_CLAIM]
    told = capsys.readouterr().out
    assert "kube-apiserver v1.99.0, etcd" in told
    assert [line.split()[-1] for line in told.splitlines() if line.startswith("gpu")] == ["ok"] * 2


def test_a_break_that_is_not_found_is_told(fake: Fake, api: Api) -> None:
    unknown = {"apiVersion": "apps/v1", "kind": "Deploymint", "metadata": {"name": "a"}}
    breaks: list[tuple[str, Break, str]] = [
        ("a kind", lambda objects: objects.append(unknown), "has no Deploymint"),
        ("nothing", lambda objects: None, "refused"),
    ]
    objects: list[Object] = [NAMESPACE]
    assert apiserver.overlooked(api, objects, breaks) == [
        "nothing is not found: no 'refused' in []"
    ]
    assert objects == [NAMESPACE]
    assert fake.objects == {}


def test_a_kind_of_an_operator_without_a_schema_is_told(api: Api) -> None:
    rule = {"apiVersion": "keda.sh/v9", "kind": "ScaledObject"}
    assert apiserver.define(api, [rule]) == [
        "ScaledObject: deploy/k8s/schemas has no scaledobject.keda.sh_v9.json"
    ]


def test_a_connection_that_the_server_closed_is_opened_again(fake: Fake, api: Api) -> None:
    assert api.request("GET", "/api/v1").ok
    api._connection.sock.close()
    api.close()
    assert api.request("GET", "/api/v1").ok
