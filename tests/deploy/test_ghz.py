"""The loads of deploy/ghz, run against real services."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hashlens import Client
from tests.support.certificates import Authority
from tests.support.ghz import (
    GHZ_FOLDER,
    SCENARIOS,
    TOKEN,
    execute,
    job_of,
    needs_ghz,
    needs_kustomize,
    project,
    rendered,
    thresholds_file,
    tool,
)
from tests.support.secrets import nowhere
from tests.support.secured import SecuredServer
from tests.support.services import both_services, wait_until

ITEMS = "2000"
ANYTHING = {"max_error_share": 1, "max_status_share": {}}


@dataclass(frozen=True)
class Load:
    """Runs run.sh against both services."""

    out: Path
    encoder: str
    search: str

    def where(self) -> dict[str, str]:
        """Where the services are, and where results go."""
        return {
            "HASHLENS_ENCODER": self.encoder,
            "HASHLENS_SEARCH": self.search,
            "HASHLENS_GHZ_OUT": str(self.out),
            "HASHLENS_GHZ_ITEMS": ITEMS,
        }

    def run(self, *arguments: str, **others: str) -> subprocess.CompletedProcess[str]:
        return execute("bash", GHZ_FOLDER / "run.sh", *arguments, **{**self.where(), **others})

    def report(self, scenario: str, shape: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.out / f"{scenario}-{shape}.json").read_text())
        return read


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Both services as real processes."""
    folder = tmp_path_factory.mktemp("ghz")
    with both_services(folder) as (encoder, search):
        yield Load(folder / "out", encoder.target, search.target)


@needs_ghz
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_smoke_run_of_each_scenario_keeps_its_thresholds(
    load: Load, scenario: str, tmp_path: Path
) -> None:
    # A machine that halts for two seconds is no slow service: times have room, errors have none.
    limits = json.loads((GHZ_FOLDER / "thresholds.json").read_text())[scenario]["smoke"]
    limits = {k: v * 15 if k.endswith("_ms") else v for k, v in limits.items()}
    limits["min_ok_per_s"] /= 10
    kept = thresholds_file(tmp_path, scenario, "smoke", limits)
    ended = load.run(scenario, HASHLENS_GHZ_THRESHOLDS=str(kept))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = load.report(scenario, "smoke")
    assert list(report["statusCodeDistribution"]) == ["OK"]
    assert report["count"] == report["statusCodeDistribution"]["OK"] > 1
    assert report["tags"] == {"scenario": scenario, "shape": "smoke", "loop": "closed"}
    page = (load.out / f"{scenario}-smoke.html").read_text()
    assert f"<h1>{scenario} smoke</h1>" in page
    assert page.count('class="kept"') == len(ended.stdout.split("kept ")) - 1 > 1


@needs_ghz
def test_an_open_loop_calls_at_its_rate(load: Load, tmp_path: Path) -> None:
    kept = thresholds_file(tmp_path, "search-by-id", "sustained", ANYTHING)
    ended = load.run(
        "search-by-id",
        "sustained",
        HASHLENS_GHZ_RATE="40",
        HASHLENS_GHZ_DURATION_S="1.5",
        HASHLENS_GHZ_WARMUP_S="0.2",
        HASHLENS_GHZ_THRESHOLDS=str(kept),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = load.report("search-by-id", "sustained")
    assert report["options"]["async"]
    # 60 and a few; a closed loop of as many workers would have made several hundred. A machine that
    # halts makes fewer.
    assert 10 <= report["count"] <= 90


@needs_ghz
def test_overload_rises_in_steps(load: Load, tmp_path: Path) -> None:
    kept = thresholds_file(tmp_path, "search-by-id", "overload", ANYTHING)
    ended = load.run(
        "search-by-id",
        "overload",
        HASHLENS_GHZ_RATE="20",
        HASHLENS_GHZ_DURATION_S="5",
        HASHLENS_GHZ_WARMUP_S="0.2",
        HASHLENS_GHZ_THRESHOLDS=str(kept),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = load.report("search-by-id", "overload")
    counts = [sum(second["statuses"].values()) for second in report["seconds"]][:5]
    # A machine that halts for a while makes fewer.
    assert 100 <= sum(counts) <= 20 + 40 + 60 + 80 + 100 + 60
    assert max(counts[3:], default=0) > 2 * counts[0]


@needs_ghz
def test_a_missed_threshold_fails_the_run(load: Load, tmp_path: Path) -> None:
    missed = thresholds_file(tmp_path, "upsert", "smoke", {**ANYTHING, "min_ok_per_s": 1e6})
    ended = load.run("upsert", HASHLENS_GHZ_THRESHOLDS=str(missed))
    assert ended.returncode == 1
    assert "MISSED OK calls a second" in ended.stdout
    assert 'class="missed"' in (load.out / "upsert-smoke.html").read_text()


@needs_ghz
def test_a_token_is_sent_and_not_kept(load: Load, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    out = tmp_path / "out"
    kept = thresholds_file(tmp_path, "search-by-id", "smoke", ANYTHING)
    ended = load.run(
        "search-by-id",
        HASHLENS_GHZ_THRESHOLDS=str(kept),
        HASHLENS_TOKEN_FILE=str(token),
        HASHLENS_GHZ_OUT=str(out),
        HASHLENS_GHZ_DATA=str(load.out / "data"),
        HASHLENS_GHZ_PRINT="1",
        TMPDIR=str(tmp_path),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (out / "search-by-id-smoke.json").read_text() in ended.stdout
    token.unlink()
    assert nowhere(tmp_path, {"token": TOKEN.encode()})
    assert TOKEN not in ended.stdout + ended.stderr


@needs_ghz
@needs_kustomize
def test_the_job_runs_what_is_mounted(load: Load, tmp_path: Path) -> None:
    pod, maps = job_of(rendered(GHZ_FOLDER))
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {m["name"]: tmp_path / m["mountPath"][1:] for m in container["volumeMounts"]}
    for path in mounts.values():
        path.mkdir(parents=True)
    project(volumes["files"], maps, mounts["files"])
    (mounts["token"] / "token").write_text(TOKEN)

    def here(text: str) -> str:
        """Point a path of the container to where it is laid out."""
        for mount in container["volumeMounts"]:
            if text.startswith(mount["mountPath"]):
                return str(tmp_path) + text
        return text

    (source,) = container["envFrom"]
    variables = {k: here(v) for k, v in maps[source["configMapRef"]["name"]].items()}
    variables |= {"SHAPE": "smoke", "HASHLENS_GHZ_ITEMS": ITEMS, "HASHLENS_SEARCH": load.search}
    # Its scheme stays: ghz goes round what the name leads to.
    assert variables["HASHLENS_ENCODER"].startswith("dns:///")
    variables["HASHLENS_ENCODER"] = f"dns:///{load.encoder}"
    command = [
        here(word.replace("$(SCENARIO)", variables["SCENARIO"]).replace("$(SHAPE)", "smoke"))
        for word in container["command"]
    ]
    found = tool("ghz")
    assert found is not None
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(found).parent)])
    variables |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(mounts["tmp"])}
    before = {p for p in mounts["files"].rglob("*") if "__pycache__" not in p.parts}
    ended = execute(*command, **variables)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "kept   error share: 0, at most 0" in ended.stdout
    assert '"statusCodeDistribution"' in ended.stdout
    written = {p for p in mounts["files"].rglob("*") if "__pycache__" not in p.parts}
    assert written == before, "something is written where the container cannot"


def test_call_data_are_made_once_and_anew_for_another_number_of_rows(
    load: Load, tmp_path: Path
) -> None:
    def make(n_items: int) -> str:
        arguments = ("--output", tmp_path, "--items", str(n_items))
        ended = execute(sys.executable, GHZ_FOLDER / "data.py", *arguments, **load.where())
        assert ended.returncode == 0, ended.stderr
        return ended.stderr

    assert "call data for 60 items" in make(60)
    assert make(60) == ""
    assert "call data for 40 items" in make(40)
    with Client(load.search, load.encoder) as client:
        # Another process has written them, and they are acknowledged before they are here.
        wait_until(lambda: client.collection("ghz").n_items == 40, within_s=30, what="all are here")
    asked = json.loads((tmp_path / "search-by-id.json").read_text())
    assert all(0 <= int(query["query"]["id"].removeprefix("row-")) < 40 for query in asked)


@needs_ghz
def test_ghz_is_known_by_certificate_and_token(load: Load, tmp_path: Path) -> None:
    data = ["--output", str(load.out / "data"), "--items", ITEMS]
    made = execute(sys.executable, GHZ_FOLDER / "data.py", *data, **load.where())
    assert made.returncode == 0, made.stderr
    authority = Authority(tmp_path)
    server_pair, pair = authority.pair("server"), authority.pair("client")
    tokens, token = tmp_path / "tokens", tmp_path / "token"
    tokens.write_text(f"read {TOKEN} ghz\n")
    token.write_text(TOKEN)
    ghz = tool("ghz")
    assert ghz is not None

    def statuses(**others: str) -> set[str]:
        config = GHZ_FOLDER / "config.py"
        arguments = ["search-by-id", "smoke", "--data", str(load.out / "data"), "--warmup"]
        configured = execute(
            sys.executable,
            config,
            *arguments,
            HASHLENS_SEARCH=f"127.0.0.1:{server.port}",
            HASHLENS_TLS_CA=str(authority.ca),
            HASHLENS_TLS_NAME="localhost",
            **others,
        )
        path = tmp_path / "config.json"
        path.write_text(configured.stdout)
        ended = execute(ghz, "--config", path)
        assert ended.returncode == 0, ended.stderr
        return set(json.loads(ended.stdout)["statusCodeDistribution"])

    with SecuredServer(
        listen="127.0.0.1:0",
        tls_cert=server_pair.cert,
        tls_key=server_pair.key,
        tls_client_ca=authority.ca,
        tokens=tokens,
    ) as server:
        shown = {"HASHLENS_TLS_CERT": str(pair.cert), "HASHLENS_TLS_KEY": str(pair.key)}
        # It has no such method, and says so to who is let in.
        assert statuses(**shown, HASHLENS_TOKEN_FILE=str(token)) == {"Unimplemented"}
        assert statuses(**shown) == {"Unauthenticated"}
        assert statuses(HASHLENS_TOKEN_FILE=str(token)) == {"Unavailable"}
