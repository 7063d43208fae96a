"""Applies what deploy/k8s renders to a real API server: what it refuses, a cluster would refuse.

``python -m tests.deploy.apiserver`` is what ``make k8s-check`` runs. Each supported combination is
applied, applied again and deleted. No controller runs, so the check does by itself what matters of
their work: the pods of each workload are put before the server, which admits or refuses them.
Then what is rendered is broken in many ways, and the server has to find each; and kubectl does what
the pages of deploy/k8s say.
"""

from __future__ import annotations

import copy
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from tests.deploy import control_plane, manifests
from tests.deploy.api_breaks import BREAKS
from tests.deploy.api_client import (
    Answer,
    Api,
    Object,
    UnknownKindError,
    as_kubectl_sends,
    name_of,
)
from tests.deploy.custom_resources import custom_kinds, definition, schema_path
from tests.deploy.k8s_breaks import PRODUCTION, Break
from tests.deploy.walkthrough import walk

REPOSITORY = Path(__file__).parents[2]
KNOWN_S = 30.0


@dataclass
class Outcome:
    """What became of one combination."""

    name: str
    n_objects: int = 0
    n_custom: int = 0
    n_pods: int = 0
    took_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def check(self, what: str, answer: Answer) -> bool:
        """Note a refusal, or a warning, which is one to come."""
        if not answer.ok:
            self.failures.append(f"{what}: {answer.message}")
        self.failures += [f"{what}: the server warns: {warning}" for warning in answer.warnings]
        return answer.ok


def pod_of(workload: Object) -> Object | None:
    """Return a pod as the controller of a workload would make it; None for what has no pods."""
    spec: Any = workload.get("spec") or {}
    if workload["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    template = spec.get("template") if isinstance(spec, dict) else None
    if not isinstance(template, dict) or "containers" not in (template.get("spec") or {}):
        return None
    pod: Object = copy.deepcopy(template)
    name = f"{workload['metadata']['name']}-0"
    metadata = pod.setdefault("metadata", {})
    metadata["name"] = name
    if "namespace" in workload["metadata"]:
        metadata["namespace"] = workload["metadata"]["namespace"]
    for claim in spec.get("volumeClaimTemplates", ()):
        volume = claim["metadata"]["name"]
        source = {"persistentVolumeClaim": {"claimName": f"{volume}-{name}"}}
        pod["spec"].setdefault("volumes", []).append({"name": volume, **source})
    return {"apiVersion": "v1", "kind": "Pod", **pod}


def lost(sent: object, kept: object, at: str = "") -> Iterator[str]:
    """Yield the fields that were sent and not kept; what is empty need not be kept."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        for name, value in sent.items():
            if name in kept:
                yield from lost(value, kept[name], f"{at}.{name}")
            elif value not in (None, "", 0, False, [], {}):
                yield f"{at}.{name}"
    elif isinstance(sent, list) and isinstance(kept, list):
        if len(sent) != len(kept):
            yield at
        for i, (one, other) in enumerate(zip(sent, kept, strict=False)):
            yield from lost(one, other, f"{at}[{i}]")
    elif isinstance(sent, dict | list) and sent:
        yield at


def privileged(namespace: str) -> Object:
    """Return a pod that no restricted namespace admits."""
    container = {"name": "c", "image": "i", "securityContext": {"privileged": True}}
    metadata = {"name": "must-be-refused", "namespace": namespace}
    spec = {"containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def misspelt(an_object: Object) -> Object:
    """Return an object with a field that does not exist."""
    wrong = copy.deepcopy(an_object)
    wrong["spec"]["hashlensMisspelt"] = 1
    return wrong


def apply(api: Api, objects: list[Object], outcome: Outcome) -> list[Object]:
    """Apply objects in their order; return those that the server has now."""
    applied = []
    for each in objects:
        what = name_of(each)
        try:
            resource = api.resource(each["apiVersion"], each["kind"])
        except UnknownKindError as error:
            outcome.failures.append(f"{what}: {error}")
            continue
        if resource.namespaced and not each["metadata"].get("namespace"):
            outcome.failures.append(f"{what}: has no namespace")
        if not outcome.check(f"{what} (create)", api.try_create(as_kubectl_sends(each))):
            continue
        answer = api.apply(each)
        if not outcome.check(what, answer):
            continue
        applied.append(each)
        # The server moves what stringData holds.
        sent = {name: value for name, value in each.items() if name != "stringData"}
        outcome.failures += [f"{what}: lost {path}" for path in lost(sent, answer.body)]
        if each["kind"] == "Namespace":
            # A controller makes this one; without it the server admits no pod.
            account = service_account(each["metadata"]["name"])
            if outcome.check(name_of(account), api.apply(account)):
                applied.append(account)
    return applied


def service_account(namespace: str) -> Object:
    """Return the account that pods have if they name none."""
    metadata = {"name": "default", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}


def apply_again(api: Api, applied: list[Object], outcome: Outcome) -> None:
    """Apply what is applied once more, which must change nothing."""
    for each in applied:
        before = api.request("GET", api.path(each)).body
        answer = api.apply(each)
        if not outcome.check(f"{name_of(each)} (again)", answer):
            continue
        if without_counts(answer.body) != without_counts(before):
            outcome.failures.append(f"{name_of(each)}: applied again, it changes")


def without_counts(an_object: Object) -> Object:
    """Return an object without what the server counts, which it does for an empty list as well."""
    counts = ("generation", "managedFields", "resourceVersion")
    metadata = {k: v for k, v in an_object["metadata"].items() if k not in counts}
    return {**an_object, "metadata": metadata}


def admit(api: Api, objects: list[Object], outcome: Outcome) -> None:
    """Put the pods of every workload before the server, and what it has to refuse."""
    for each in objects:
        if (pod := pod_of(each)) is None:
            continue
        if outcome.check(f"pod of {name_of(each)}", api.try_create(pod)):
            outcome.n_pods += 1
        refused = api.try_create(misspelt(pod))
        if refused.ok or "hashlensMisspelt" not in refused.message:
            outcome.failures.append(f"pod of {name_of(each)}: a misspelt field is not refused")
    for each in objects:
        if each["kind"] != "Namespace":
            continue
        answer = api.try_create(privileged(each["metadata"]["name"]))
        if answer.ok or 'violates PodSecurity "restricted' not in answer.message:
            outcome.failures.append(
                f"{name_of(each)} does not enforce restricted pods: a privileged one got "
                f"{answer.status} {answer.message if not answer.ok else ''}"
            )


def delete(api: Api, applied: list[Object], outcome: Outcome) -> None:
    """Delete everything, the last first: the next combination finds an empty cluster."""
    for each in reversed(applied):
        if hindrance := api.delete(each):
            outcome.failures.append(hindrance)


def exchange(
    api: Api, plain: list[Object], objects: list[Object], applied: list[Object], outcome: Outcome
) -> None:
    """Take the components away from what runs and add them again: no field is in the way."""
    for what, wanted in (("without components", plain), ("with components again", objects)):
        applied += [
            each for each in wanted if outcome.check(f"{name_of(each)} ({what})", api.apply(each))
        ]


def try_combination(
    api: Api, name: str, objects: list[Object], plain: list[Object] | None, *, keep: bool
) -> Outcome:
    """Apply one combination to an empty cluster; `plain` is it without its components."""
    outcome = Outcome(name, n_objects=len(objects))
    started_s = time.monotonic()
    outcome.n_custom = sum(bool(custom_kinds([each])) for each in objects)
    applied = apply(api, objects, outcome)
    admit(api, objects, outcome)
    apply_again(api, applied, outcome)
    if plain is not None:
        exchange(api, plain, objects, applied, outcome)
    if not keep:
        delete(api, applied, outcome)
    outcome.took_s = time.monotonic() - started_s
    return outcome


def overlooked(
    api: Api, objects: list[Object], breaks: Sequence[tuple[str, Break, str]]
) -> list[str]:
    """Break objects in one way after the other; return the ways that are not found."""
    missed = []
    for name, break_them, answer in breaks:
        broken = copy.deepcopy(objects)
        break_them(broken)
        failures = try_combination(api, name, broken, None, keep=False).failures
        if not any(answer in failure for failure in failures):
            missed.append(f"{name} is not found: no {answer!r} in {failures}")
    print(f"found {len(breaks) - len(missed)} of {len(breaks)} ways to break {PRODUCTION}")
    return missed


def define(api: Api, objects: list[Object]) -> list[str]:
    """Register the kinds that Kubernetes does not have; return what hinders it."""
    outcome = Outcome("definitions")
    for kind in custom_kinds(objects):
        if not schema_path(kind).exists():
            outcome.failures.append(
                f"{kind.kind}: deploy/k8s/schemas has no {schema_path(kind).name}"
            )
            continue
        crd = definition(kind)
        if not outcome.check(name_of(crd), api.apply(crd)):
            continue
        ends_s = time.monotonic() + KNOWN_S
        while True:
            try:
                api.resource(kind.api_version, kind.kind)
                break
            except UnknownKindError as error:
                if time.monotonic() > ends_s:
                    outcome.failures.append(f"{error}, {KNOWN_S:.0f} s after it was defined")
                    break
                time.sleep(0.2)
    return outcome.failures


def table(outcomes: list[Outcome]) -> str:
    """Return a line for each combination."""
    width = max(len("combination"), *(len(outcome.name) for outcome in outcomes))
    lines = [f"{'combination':{width}}  objects  custom  pods  seconds  result"]
    lines += [
        f"{each.name:{width}}  {each.n_objects:7}  {each.n_custom:6}  {each.n_pods:4}  "
        f"{each.took_s:7.1f}  {f'{len(each.failures)} failures' if each.failures else 'ok'}"
        for each in outcomes
    ]
    return "\n".join(lines)


def check(
    server: control_plane.ControlPlane,
    combinations: dict[str, list[Object]],
    only: str = "",
    *,
    keep: bool = False,
) -> list[str]:
    """Try combinations, tell of each and return what failed; with `keep` the last one stays."""
    api = Api(server)
    outcomes = []
    failures = define(api, [each for objects in combinations.values() for each in objects])
    chosen = [name for name in combinations if only in name]
    for name in chosen:
        print(f"applying {name}", flush=True)
        without = name.partition("+")[0]
        plain = combinations[without] if without != name else None
        kept = keep and name == chosen[-1]
        outcomes.append(try_combination(api, name, combinations[name], plain, keep=kept))
    if not (only or keep or failures):
        failures = overlooked(api, combinations[str(PRODUCTION)], BREAKS)
    version = api.request("GET", "/version").body["gitVersion"]
    api.close()
    print(f"\nkube-apiserver {version}, etcd v{control_plane.ETCD}\n{table(outcomes)}")
    failures += [f"{each.name}: {line}" for each in outcomes for line in each.failures]
    return failures


def rendered() -> dict[str, list[Object]]:
    """Render every supported combination."""
    return {str(each): manifests.render(each) for each in manifests.supported()}


@click.command()
@click.option("--only", default="", help="Only combinations whose name contains this.")
@click.option("--kubernetes", default=control_plane.KUBERNETES, show_default=True, help="Version.")
@click.option("--keep", is_flag=True, help="Let the server run, for kubectl, until Ctrl-C.")
@click.option("--folder", type=Path, default=Path("build/k8s-check"), show_default=True)
def main(only: str, kubernetes: str, keep: bool, folder: Path) -> None:
    """Apply what deploy/k8s renders to a real API server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if reason := control_plane.why_not():
        print(f"k8s-check is skipped: {reason}")
        return
    if manifests.kustomize() is None:
        sys.exit("k8s-check needs kustomize: `make kustomize` installs it")
    combinations = rendered()
    if not any(only in name for name in combinations):
        raise click.UsageError(f"no name contains {only!r}: {', '.join(combinations)}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        binaries = control_plane.build(REPOSITORY / ".tools", kubernetes)
        with control_plane.ControlPlane(binaries, folder) as server:
            failures = check(server, combinations, only, keep=keep)
            if not (only or keep):
                failures += walk(server, binaries.kubectl)
            for line in failures:
                print("FAILED", line)
            if keep:
                wait(server, folder / "kubeconfig")
    except control_plane.ControlPlaneError as error:
        sys.exit(f"k8s-check has no server: {error}")
    sys.exit(bool(failures))


def wait(server: control_plane.ControlPlane, kubeconfig: Path) -> None:
    """Let a server run until Ctrl-C."""
    server.kubeconfig(kubeconfig)
    print(f"KUBECONFIG={kubeconfig} kubectl get all -A; Ctrl-C ends it", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        print("ended")
    finally:
        kubeconfig.unlink()


if __name__ == "__main__":
    main()
