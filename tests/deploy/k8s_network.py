"""What must hold of rendered manifests: who reaches whom, what is watched, scaled and certified."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.deploy.k8s_policies import Check, config, redis_options
from tests.deploy.k8s_programs import environment
from tests.deploy.manifests import ROOT, Cluster, Container, Pods, matches
from tests.support.promql import parse

NAMESPACE = "hashlens"
_CLIENT = {"hashlens-client": "true"}
_OF_OPERATOR = frozenset(["namespace", "pod", "container", "job", "instance"])
"""Labels that Prometheus and its operator add."""


def listened(cluster: Cluster, container: Container) -> set[int]:
    """Return the ports that a container's program listens on for others."""
    told = config(cluster, container)
    if told is not None:
        listeners = (told.listen, told.health_listen, told.metrics_listen)
        pairs = [text.rpartition(":") for text in listeners if text]
        return {int(port) for host, _, port in pairs if host in ("0.0.0.0", "[::]")}
    options = redis_options(cluster, container)
    return {int(options[name]) for name in ("port", "tls-port") if name in options} - {0}


def ports_are_listened_on(cluster: Cluster) -> Iterator[str]:
    """containerPorts are what the program listens on, by the right names."""
    for container in cluster.containers():
        ports = container.ports()
        if set(ports.values()) != listened(cluster, container):
            heard = sorted(listened(cluster, container))
            yield f"{container.name}: ports are {ports}, and it listens on {heard}"
        told = config(cluster, container)
        if told is not None:
            named = {
                name: int(getattr(told, field).rpartition(":")[2] or 0)
                for name, field in (
                    *(("grpc", "listen"), ("health", "health_listen")),
                    ("metrics", "metrics_listen"),
                )
            }
            for name in sorted(set(ports) & set(named)):
                if ports[name] != named[name]:
                    yield f"{container.name}: {name} is not {ports[name]}"


def services_reach_pods(cluster: Cluster) -> Iterator[str]:
    """Each Service selects pods, all of which have its ports; StatefulSets have theirs."""
    for service in cluster.of("Service"):
        name = service["metadata"]["name"]
        found = cluster.selected({"matchLabels": service["spec"].get("selector", {"": ""})})
        if len(found) != 1:
            yield f"Service {name}: selects {[pods.name for pods in found]}"
        for pods in found:
            ports = _ports(pods)
            for port in service["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                if target not in ports and target not in ports.values():
                    yield f"Service {name}: {pods.name} has no port {target}"
    for owner in cluster.of("StatefulSet"):
        service = cluster.get("Service", owner["spec"]["serviceName"]) or {"spec": {}}
        labels = owner["spec"]["template"]["metadata"]["labels"]
        is_own = matches({"matchLabels": service["spec"].get("selector", {"": ""})}, labels)
        if service["spec"].get("clusterIP") != "None" or not is_own:
            yield f"StatefulSet {owner['metadata']['name']}: its Service gives pods no names"


def owners_select_their_pods(cluster: Cluster) -> Iterator[str]:
    """Workloads, budgets and spread constraints select the pods that they are about."""
    for pods in cluster.pods():
        if "selector" in pods.owner["spec"] and not matches(
            pods.owner["spec"]["selector"], pods.labels
        ):
            yield f"{pods.name}: its selector does not match its pods"
        for constraint in pods.spec.get("topologySpreadConstraints", ()):
            if not matches(constraint["labelSelector"], pods.labels):
                yield f"{pods.name}: spreads other pods than its own"
    budgets = cluster.of("PodDisruptionBudget")
    for budget in budgets:
        if len(cluster.selected(budget["spec"]["selector"])) != 1:
            yield f"PodDisruptionBudget {budget['metadata']['name']}: selects not one workload"
        if budget["spec"].get("maxUnavailable", 0) in (0, "0%"):
            yield f"PodDisruptionBudget {budget['metadata']['name']}: may hold a drain for ever"
    for name in ("encoder", "search"):
        labels = {"app.kubernetes.io/name": name}
        if not any(matches(budget["spec"]["selector"], labels) for budget in budgets):
            yield f"{name}: has no PodDisruptionBudget"


def addresses_exist(cluster: Cluster) -> Iterator[str]:
    """Where services are told to find others is a Service with that port."""
    for container in cluster.containers():
        told = config(cluster, container)
        if told is None or not hasattr(told, "encoder"):
            continue
        redis = urlsplit(told.redis_url or "")
        addresses = [told.encoder or ":"]
        if cluster.get("StatefulSet", "redis") is not None:
            addresses.append(f"{redis.hostname}:{redis.port}")
        for address in addresses:
            host, _, port = address.rpartition(":")
            service = cluster.get("Service", host)
            if service is None or int(port) not in [p["port"] for p in service["spec"]["ports"]]:
                yield f"{container.name}: nothing is at {address}"
        names = environment(cluster, container)
        own = f"{names.get('POD_NAME')}.{container.pods.owner['spec'].get('serviceName')}"
        own += f".{NAMESPACE}.svc:{told.listen.rpartition(':')[2]}"
        if told.advertise != own:
            yield f"{container.name}: advertises {told.advertise}, not {own}"


def tls_is_whole(cluster: Cluster) -> Iterator[str]:
    """Either everything is encrypted or nothing; certificates have the names that are called."""
    told = {c.pods.name: config(cluster, c) for c in cluster.containers()}
    search, encoder = told.get("StatefulSet search"), told.get("Deployment encoder")
    if search is None or encoder is None:
        return
    links = {
        "encoder": (encoder.tls_cert, search.encoder_tls_ca),
        "peers": (search.tls_cert, search.peer_tls_ca),
    }
    for name, (server, client) in links.items():
        if (server is None) != (client is None):
            yield f"search to {name}: one end speaks TLS"
    for container in cluster.containers():
        options = redis_options(cluster, container)
        if options and ("tls-port" in options) != (search.redis_url or "").startswith("rediss"):
            yield "search to Redis: one end speaks TLS"
        if options and "tls-port" in options and options.get("port") != "0":
            yield "Redis: still listens without TLS"
        if container.spec.get("command", [""])[0] == "hashlens":
            has_tls = bool(environment(cluster, container).get("HASHLENS_TLS_CA"))
            if has_tls != (search.tls_cert is not None):
                yield f"{container.name} to search: one end speaks TLS"
    called = {
        "encoder-tls": search.encoder.rpartition(":")[0],
        "search-tls": (search.advertise or ":").rpartition(":")[0],
        "redis-tls": urlsplit(search.redis_url or "").hostname or "",
    }
    for certificate in cluster.of("Certificate"):
        spec = certificate["spec"]
        host = called.get(spec["secretName"])
        if host and not any(_certifies(name, host) for name in spec.get("dnsNames", ())):
            yield f"Certificate {spec['secretName']}: has no name for {host}"
        issuer = cluster.get("Issuer", spec["issuerRef"]["name"])
        if issuer is None:
            yield f"Certificate {spec['secretName']}: nobody issues it"


def _certifies(name: str, host: str) -> bool:
    return name == host or (name.startswith("*.") and host.partition(".")[2] == name[2:])


@dataclass(frozen=True)
class End:
    """One end of a connection."""

    namespace: str
    labels: Mapping[str, str]


def may_connect(cluster: Cluster, source: End, target: End, port: int | str) -> bool:
    """Return whether NetworkPolicies let a connection through; `port` may be a name."""
    return _lets(cluster, "Egress", source, target, port) and _lets(
        cluster, "Ingress", target, source, port
    )


def _lets(cluster: Cluster, way: str, own: End, other: End, port: int | str) -> bool:
    if own.namespace != NAMESPACE:
        return True
    rules, peers, is_fenced = way.lower(), "to" if way == "Egress" else "from", False
    for policy in cluster.of("NetworkPolicy"):
        spec = policy["spec"]
        if way not in spec["policyTypes"] or not matches(spec["podSelector"], own.labels):
            continue
        is_fenced = True
        for rule in spec.get(rules, ()):
            ports = [item["port"] for item in rule.get("ports", ())]
            fits = not ports or port in ports
            if fits and (not rule.get(peers) or any(_is(p, other) for p in rule[peers])):
                return True
    return not is_fenced


def _is(peer: Mapping[str, Any], end: End) -> bool:
    if "ipBlock" in peer:
        return end.namespace == ""
    if "namespaceSelector" in peer:
        names = {"kubernetes.io/metadata.name": end.namespace}
        labels = names | (_CLIENT if end.namespace == "clients" else {})
        if not matches(peer["namespaceSelector"], labels):
            return False
    elif end.namespace != NAMESPACE:
        return False
    return matches(peer.get("podSelector", {}), end.labels)


def policies_fence(cluster: Cluster) -> Iterator[str]:
    """Needed connections are let through, and no others."""
    own = {
        name: End(NAMESPACE, pods.labels)
        for pods in cluster.pods()
        for name in [pods.owner["metadata"]["name"]]
    }
    ends = own | {
        "client": End(NAMESPACE, _CLIENT),
        "client elsewhere": End("clients", _CLIENT),
        "DNS": End("kube-system", {"k8s-app": "kube-dns"}),
        "Prometheus": End("monitoring", {"app.kubernetes.io/name": "prometheus"}),
        "stranger": End(NAMESPACE, {"app": "other"}),
        "stranger elsewhere": End("other", _CLIENT),
        "the world": End("", {}),
    }
    needed = {
        *(("search", "encoder", "grpc"), ("search", "search", "grpc"), ("search", "DNS", 53)),
        *(("client", "encoder", "grpc"), ("client", "search", "grpc"), ("client", "DNS", 53)),
        *(("client elsewhere", name, "grpc") for name in ("encoder", "search")),
        *(("Prometheus", name, "metrics") for name in ("encoder", "search")),
    }
    if "redis" in own:
        needed.add(("search", "redis", "redis"))
    elif cluster.get("NetworkPolicy", "search-to-external-redis") is not None:
        needed.add(("search", "the world", 6379))
    if "bulk-encode" in own:
        needed |= {("bulk-encode", name, "grpc") for name in ("encoder", "search")}
        needed.add(("bulk-encode", "DNS", 53))
    ports: tuple[int | str, ...] = ("grpc", "metrics", "health", "redis", 53, 443, 6379)
    for source, end in ends.items():
        for target, other in ends.items():
            if end.namespace != NAMESPACE != other.namespace:
                continue
            for port in ports:
                lets = may_connect(cluster, end, other, port)
                if lets != ((source, target, port) in needed):
                    yield f"{source} {'reaches' if lets else 'does not reach'} {target}: {port}"


def policies_match_something(cluster: Cluster) -> Iterator[str]:
    """No selector of a NetworkPolicy is about pods that are not there; ports are names there."""
    names = {name for pods in cluster.pods() for name in _ports(pods)}
    for policy in cluster.of("NetworkPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        rules = [*spec.get("ingress", ()), *spec.get("egress", ())]
        peers = [p for rule in rules for p in (*rule.get("from", ()), *rule.get("to", ()))]
        selectors = [spec["podSelector"]]
        selectors += [p["podSelector"] for p in peers if set(p) == {"podSelector"}]
        for selector in selectors:
            if not cluster.selected(selector) and not matches(selector, _CLIENT):
                yield f"NetworkPolicy {name}: {json.dumps(selector)} is nobody"
        for rule in rules:
            for port in rule.get("ports", ()):
                if isinstance(port["port"], str) and port["port"] not in names:
                    yield f"NetworkPolicy {name}: no port is called {port['port']}"


def _ports(pods: Pods) -> dict[str, int]:
    return {
        name: port
        for spec in pods.containers()
        for name, port in Container(pods, spec).ports().items()
    }


def objects_are_in_the_namespace(cluster: Cluster) -> Iterator[str]:
    """Everything is in the one namespace, which asks for restricted pods."""
    space = cluster.get("Namespace", NAMESPACE) or {"metadata": {}}
    enforced = space["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
    if enforced != "restricted":
        yield "the namespace takes pods of any kind"
    for item in cluster.objects:
        if item["kind"] == "Secret":
            yield f"Secret {item['metadata']['name']}: secrets do not belong into manifests"
        if item["kind"] != "Namespace" and item["metadata"].get("namespace") != NAMESPACE:
            yield f"{item['kind']} {item['metadata']['name']}: is in another namespace"


def scaling_works(cluster: Cluster) -> Iterator[str]:
    """An autoscaler has its target for itself, and asks for metrics that exist."""
    targets = []
    for scaler in cluster.of("HorizontalPodAutoscaler", "ScaledObject"):
        reference = scaler["spec"]["scaleTargetRef"]
        target = cluster.get(reference["kind"], reference["name"])
        targets.append((reference["kind"], reference["name"]))
        if target is None:
            yield f"{scaler['kind']}: {reference['name']} is not there"
        elif "replicas" in target["spec"]:
            yield f"{scaler['kind']}: each apply sets the number of pods back"
        if target is not None:
            names = {c["name"] for c in target["spec"]["template"]["spec"]["containers"]}
            for metric in scaler["spec"].get("metrics", ()):
                if metric.get("containerResource", {"container": ""})["container"] not in names:
                    yield f"{scaler['kind']}: measures no container of its target"
        for trigger in scaler["spec"].get("triggers", ()):
            yield from _query_is_known(trigger["metadata"]["query"])
    if len(set(targets)) != len(targets):
        yield "two autoscalers pull at one thing"


def _query_is_known(query: str) -> Iterator[str]:
    known = metrics_of_dashboard()
    for name, matchers in parse(query).metrics:
        if name not in known:
            yield f"{name} is no metric of the dashboard's: {query}"
        for label, _, _ in matchers:
            if label not in _OF_OPERATOR:
                yield f"{label} is no label that Prometheus' operator adds: {query}"


@functools.cache
def metrics_of_dashboard() -> frozenset[str]:
    """Return the metrics of the dashboard, which a test compares with the running services."""
    board = json.loads((ROOT / "deploy" / "grafana" / "hashlens.json").read_text())
    return frozenset(
        name
        for panel in board["panels"]
        for target in panel.get("targets", ())
        for name, _ in parse(target["expr"]).metrics
    )


def monitors_find_pods(cluster: Cluster) -> Iterator[str]:
    """A PodMonitor selects pods that all have its port, and a label for `job`."""
    for monitor in cluster.of("PodMonitor"):
        found = cluster.selected(monitor["spec"]["selector"])
        if {pods.owner["metadata"]["name"] for pods in found} != {"encoder", "search"}:
            yield f"PodMonitor: selects {[pods.name for pods in found]}"
        for pods in found:
            if monitor["spec"].get("jobLabel") not in pods.labels:
                yield f"PodMonitor: {pods.name} has no label for job"
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if not re.fullmatch("metrics", endpoint["port"]) or "metrics" not in _ports(pods):
                    yield f"PodMonitor: {pods.name} has no metrics on {endpoint['port']}"


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        *(ports_are_listened_on, services_reach_pods, owners_select_their_pods, addresses_exist),
        *(tls_is_whole, policies_fence, policies_match_something, objects_are_in_the_namespace),
        *(scaling_works, monitors_find_pods),
    )
}
