"""Ways to break rendered manifests: who reaches whom, what is watched and scaled."""

from __future__ import annotations

from tests.deploy.k8s_breaks import (
    GONE,
    KEDA,
    LABEL,
    PRODUCTION,
    SMALL,
    Break,
    certificate,
    container,
    find,
    pod,
    policy,
    put,
    redis_conf,
    setting,
    variable,
    without,
)
from tests.deploy.manifests import BASE, Combination

BULK = Combination(BASE, ("bulk-encode", "tls"))
"""Without what tells the Job of TLS."""
BULK_LABEL = ("Job", "bulk-encode", "spec", "template", "metadata", "labels", "hashlens-client")

BREAKS: list[tuple[str, Combination, Break, str]] = [
    (
        "ports_are_listened_on",
        SMALL,
        variable("search", "HASHLENS_SEARCH_METRICS_LISTEN", ""),
        "50062",
    ),
    (
        "ports_are_listened_on",
        SMALL,
        variable("search", "HASHLENS_SEARCH_HEALTH_LISTEN", "127.0.0.1:50072"),
        "50072",
    ),
    (
        "ports_are_listened_on",
        SMALL,
        container(
            "encoder",
            "ports",
            to=[
                {"name": "health", "containerPort": 50051},
                {"name": "metrics", "containerPort": 50061},
                {"name": "grpc", "containerPort": 50071},
            ],
        ),
        "health is not 50051",
    ),
    ("ports_are_listened_on", SMALL, redis_conf("port 6379", "port 6380"), "6380"),
    (
        "services_reach_pods",
        SMALL,
        put("Service", "search", "spec", "selector", LABEL, to="s"),
        "selects []",
    ),
    (
        "services_reach_pods",
        SMALL,
        put("Service", "encoder", "spec", "ports", 0, "targetPort", to="http"),
        "no port http",
    ),
    (
        "services_reach_pods",
        SMALL,
        put("Service", "search-pods", "spec", "clusterIP", to=GONE),
        "no names",
    ),
    (
        "owners_select_their_pods",
        SMALL,
        put("Deployment", "encoder", "spec", "selector", "matchLabels", LABEL, to="e"),
        "selector",
    ),
    (
        "owners_select_their_pods",
        SMALL,
        pod(
            "search", "topologySpreadConstraints", 0, "labelSelector", "matchLabels", to={"a": "b"}
        ),
        "spreads",
    ),
    (
        "owners_select_their_pods",
        SMALL,
        put("PodDisruptionBudget", "search", "spec", "selector", "matchLabels", to={}),
        "one workload",
    ),
    (
        "owners_select_their_pods",
        SMALL,
        put("PodDisruptionBudget", "search", "spec", "maxUnavailable", to=0),
        "for ever",
    ),
    ("owners_select_their_pods", SMALL, without("PodDisruptionBudget", "encoder"), "has no"),
    ("addresses_exist", SMALL, setting("search", HASHLENS_SEARCH_ENCODER="encoders:50051"), "at"),
    ("addresses_exist", SMALL, setting("search", HASHLENS_SEARCH_REDIS_URL="redis://redis:1"), "1"),
    (
        "addresses_exist",
        SMALL,
        variable("search", "HASHLENS_SEARCH_ADVERTISE", "search:50052"),
        "advertises",
    ),
    (
        "tls_is_whole",
        PRODUCTION,
        setting(
            "search",
            HASHLENS_SEARCH_ENCODER_TLS_CA="",
            HASHLENS_SEARCH_ENCODER_TLS_CERT="",
            HASHLENS_SEARCH_ENCODER_TLS_KEY="",
        ),
        "to encoder",
    ),
    ("tls_is_whole", PRODUCTION, setting("search", HASHLENS_SEARCH_PEER_TLS_CA=""), "to peers"),
    (
        "tls_is_whole",
        PRODUCTION,
        setting(
            "search",
            HASHLENS_SEARCH_REDIS_URL="redis://redis:6379",
            HASHLENS_SEARCH_REDIS_TLS_CA="",
        ),
        "to Redis",
    ),
    ("tls_is_whole", PRODUCTION, container("redis", "command", 3, to="6378"), "without TLS"),
    ("tls_is_whole", PRODUCTION, certificate("search-tls", "dnsNames", to=["search"]), "no name"),
    ("tls_is_whole", PRODUCTION, certificate("redis-tls", "issuerRef", "name", to="x"), "issues"),
    (
        "policies_fence",
        SMALL,
        without("NetworkPolicy", "default-deny"),
        "reaches the world",
    ),
    ("policies_fence", SMALL, without("NetworkPolicy", "dns"), "search does not reach DNS"),
    ("policies_fence", SMALL, without("NetworkPolicy", "search-to-redis"), "not reach redis"),
    ("policies_fence", SMALL, without("NetworkPolicy", "metrics"), "Prometheus does not reach"),
    ("policies_fence", SMALL, policy("redis", "ingress", 0, "from", to=[]), "reaches redis"),
    ("policies_fence", SMALL, policy("clients", "ingress", 0, "ports", to=[]), "reaches encoder"),
    ("policies_fence", SMALL, policy("encoder", "ingress", to=[]), "search does not reach encoder"),
    (
        "policies_fence",
        SMALL,
        policy(
            "search", "egress", 0, "to", 0, "podSelector", to={"matchLabels": {LABEL: "encoder"}}
        ),
        "search does not reach search",
    ),
    ("policies_fence", SMALL, policy("dns", "podSelector", to={}), "encoder reaches DNS"),
    (
        "policies_match_something",
        SMALL,
        policy("redis", "podSelector", "matchLabels", LABEL, to="valkey"),
        "is nobody",
    ),
    (
        "policies_match_something",
        SMALL,
        policy("search", "ingress", 0, "ports", 0, "port", to="rpc"),
        "called rpc",
    ),
    (
        "objects_are_in_the_namespace",
        SMALL,
        put("Namespace", "hashlens", "metadata", "labels", to={}),
        "any kind",
    ),
    (
        "objects_are_in_the_namespace",
        SMALL,
        put("Service", "redis", "metadata", "namespace", to="x"),
        "another",
    ),
    (
        "objects_are_in_the_namespace",
        SMALL,
        lambda objects: objects.append(
            {"kind": "Secret", "metadata": {"name": "s", "namespace": "hashlens"}}
        ),
        "secrets",
    ),
    ("scaling_works", PRODUCTION, without("Deployment", "encoder"), "not there"),
    ("scaling_works", PRODUCTION, put("Deployment", "encoder", "spec", "replicas", to=1), "back"),
    (
        "scaling_works",
        PRODUCTION,
        put(
            "HorizontalPodAutoscaler",
            "encoder",
            "spec",
            "metrics",
            0,
            "containerResource",
            "container",
            to="main",
        ),
        "no container",
    ),
    (
        "scaling_works",
        KEDA,
        put(
            "ScaledObject",
            "encoder",
            "spec",
            "triggers",
            0,
            "metadata",
            "query",
            to="sum(hashlens_encoder_queue)",
        ),
        "no metric",
    ),
    (
        "scaling_works",
        KEDA,
        put(
            "ScaledObject",
            "encoder",
            "spec",
            "triggers",
            0,
            "metadata",
            "query",
            to='sum(hashlens_encoder_admitted_images{app="a"})',
        ),
        "no label",
    ),
    (
        "scaling_works",
        KEDA,
        lambda objects: objects.append(
            find(objects, "ScaledObject", "encoder") | {"kind": "HorizontalPodAutoscaler"}
        ),
        "pull",
    ),
    (
        "monitors_find_pods",
        PRODUCTION,
        put("PodMonitor", "hashlens", "spec", "selector", to={}),
        "selects",
    ),
    (
        "monitors_find_pods",
        PRODUCTION,
        put("PodMonitor", "hashlens", "spec", "jobLabel", to="app"),
        "job",
    ),
    (
        "monitors_find_pods",
        PRODUCTION,
        put("PodMonitor", "hashlens", "spec", "podMetricsEndpoints", 0, "port", to="grpc"),
        "metrics",
    ),
]
