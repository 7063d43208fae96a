"""Every combination of deploy/k8s holds every policy, and every policy can be broken."""

from __future__ import annotations

import pytest

from tests.deploy import k8s_breaks, k8s_network, k8s_network_breaks, k8s_policies
from tests.deploy.k8s_breaks import SMALL, Break
from tests.deploy.k8s_readme import secrets
from tests.deploy.manifests import Cluster, Combination, render, supported

CHECKS = k8s_policies.CHECKS | k8s_network.CHECKS

BREAKS = k8s_breaks.BREAKS + k8s_network_breaks.BREAKS


@pytest.mark.parametrize("combination", supported(), ids=str)
def test_every_policy_holds(combination: Combination) -> None:
    cluster = Cluster(render(combination), secrets())
    found = [f"{name}: {text}" for name, check in CHECKS.items() for text in check(cluster)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "combination", "broken", "says"),
    BREAKS,
    ids=[f"{name}-{says}" for name, _, _, says in BREAKS],
)
def test_a_policy_that_is_broken_complains(
    name: str, combination: Combination, broken: Break, says: str
) -> None:
    objects = render(combination)
    broken(objects)
    found = list(CHECKS[name](Cluster(objects, secrets())))
    assert any(says in text for text in found), found


def test_a_secret_that_nobody_makes_is_found_out() -> None:
    objects = render(SMALL)
    for name in ("tokens", "redis-acl", "search-credentials"):
        others = {other: values for other, values in secrets().items() if other != name}
        found = list(CHECKS["references_exist"](Cluster(objects, others)))
        assert any(name in text for text in found), found


def test_every_policy_was_broken() -> None:
    assert {name for name, *_ in BREAKS} == set(CHECKS)
