"""The overlay that the README of bulk-encode shows, on top of the one of docs/operations.md."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import hashlens
from tests.deploy.manifests import K8S, ROOT, Cluster, render

README = (K8S / "components" / "bulk-encode" / "README.md").read_text()
PAGE = (ROOT / "docs" / "operations.md").read_text()

(LOAD,) = re.findall(
    r"^```yaml\n# deploy/k8s/overlays/load/kustomization.yaml\n(.*?)^```$", README, re.M | re.S
)
(MINE,) = re.findall(
    r"^cat > deploy/k8s/overlays/mine/kustomization.yaml <<'END'\n(.*?)^END$", PAGE, re.M | re.S
)


def images_of(cluster: Cluster) -> dict[str, str]:
    """Return the images by the names of workloads."""
    return {container.pods.name: container.spec["image"] for container in cluster.containers()}


def overlay(folder: Path, name: str, text: str) -> Path:
    path = folder / "overlays" / name
    path.mkdir()
    (path / "kustomization.yaml").write_text(text)
    return path


def with_component(text: str, name: str) -> str:
    written: dict[str, Any] = yaml.safe_load(text)
    written["components"] = [*written.get("components", ()), f"../../components/{name}"]
    return yaml.safe_dump(written)


@pytest.mark.parametrize("tls", [False, True])
def test_the_overlay_renders_as_the_readme_says(tmp_path: Path, tls: bool) -> None:
    here = tmp_path / "deploy" / "k8s"
    shutil.copytree(K8S, here, ignore=shutil.ignore_patterns("mine", "load", "schemas"))
    # Another name than the Job's: an image that the overlay took from `mine` would be seen.
    mine, load = MINE.replace("images.example", "mine.example"), LOAD
    assert mine != MINE
    if tls:
        mine, load = with_component(mine, "tls"), with_component(load, "bulk-encode/tls")
    services = images_of(Cluster(render(overlay(here, "mine", mine))))
    assert services["Deployment encoder"] == "mine.example/hashlens-encoder:0.1.0"
    assert services["StatefulSet search"] == "mine.example/hashlens-search:0.1.0"

    cluster = Cluster(render(overlay(here, "load", load)))
    job = {"Job bulk-encode": "images.example/hashlens-search:0.1.0"}
    assert images_of(cluster) == services | job
    (pods,) = [pods for pods in cluster.pods() if pods.owner["kind"] == "Job"]
    (source,) = pods.spec["containers"][0]["envFrom"]
    settings = cluster.config(source["configMapRef"]["name"])
    assert settings is not None
    assert settings["COLLECTION"] == "archive"
    assert settings["EXPECTED_ROWS"] == "5000000"
    assert settings["HASHLENS_SEARCH"] == "search:50052"
    assert settings["HASHLENS_INSECURE"] == ("false" if tls else "true")


def test_the_job_leaves_the_services_images_alone(tmp_path: Path) -> None:
    """Also those whose name is as it comes: built for one machine, say, with a tag of its own."""
    here = tmp_path / "deploy" / "k8s"
    shutil.copytree(K8S, here, ignore=shutil.ignore_patterns("mine", "load", "schemas"))
    mine = yaml.safe_load(MINE)
    mine["images"] = [{"name": f"hashlens-{who}", "newTag": "dev"} for who in ("encoder", "search")]
    overlay(here, "mine", yaml.safe_dump(mine))
    load = yaml.safe_load(LOAD)
    del load["images"]
    found = images_of(Cluster(render(overlay(here, "load", yaml.safe_dump(load)))))
    assert found["Deployment encoder"] == "hashlens-encoder:dev"
    assert found["StatefulSet search"] == "hashlens-search:dev"
    assert found["Job bulk-encode"] == f"hashlens-search:{hashlens.__version__}"


def test_the_jobs_image_is_the_one_that_was_pushed() -> None:
    pushed, for_job = yaml.safe_load(MINE)["images"], yaml.safe_load(LOAD)["images"]
    assert for_job == [image for image in pushed if image["name"] == "hashlens-search"]
