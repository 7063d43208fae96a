"""The loads of deploy/ghz, run against real services, and their gate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.secrets import nowhere
from tests.support.services import ServiceProcess

ROOT = Path(__file__).parents[2]
GHZ_FOLDER = ROOT / "deploy" / "ghz"
TOOLS = ROOT / ".tools" / "bin"
SCENARIOS = sorted(path.stem for path in (GHZ_FOLDER / "scenarios").glob("*.json"))
SHAPES = ("smoke", "closed", "sustained", "overload", "soak")
RUN_S = 60
ITEMS = "2000"
TOKEN = "0123456789abcdef0123456789abcdef"
ANYTHING = {"max_error_share": 1, "max_status_share": {}}


def tool(name: str) -> str | None:
    """Find a tool that ``make`` has installed, or that is there anyway."""
    installed = TOOLS / name
    return str(installed) if installed.exists() else shutil.which(name)


needs_ghz = pytest.mark.skipif(
    tool("ghz") is None, reason="ghz is not here: `make ghz` installs it with Go"
)
needs_kustomize = pytest.mark.skipif(
    tool("kustomize") is None, reason="kustomize is not here: `make kustomize` installs it with Go"
)


def environment(**others: str) -> dict[str, str]:
    """What a script sees: nothing of ours but what is said here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HASHLENS_")}
    return {**kept, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **others}


def execute(*command: str | Path, **others: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command,
        env=environment(**others),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )


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
    with (
        ServiceProcess("encoder_service", log=folder / "encoder.log") as encoder,
        ServiceProcess(
            "search_service",
            "--data-dir",
            str(folder / "data"),
            "--encoder",
            encoder.target,
            log=folder / "search.log",
        ) as search,
    ):
        yield Load(folder / "out", encoder.target, search.target)


def thresholds_file(folder: Path, scenario: str, shape: str, thresholds: dict[str, Any]) -> Path:
    path = folder / "thresholds.json"
    path.write_text(json.dumps({scenario: {shape: thresholds}}))
    return path


@needs_ghz
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_smoke_run_of_each_scenario_keeps_its_thresholds(load: Load, scenario: str) -> None:
    ended = load.run(scenario)
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
    # 60; a closed loop of as many workers would have made several hundred.
    assert 40 <= report["count"] <= 62


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
    assert sum(counts) == pytest.approx(20 + 40 + 60 + 80 + 100, abs=30)
    assert counts == sorted(counts)


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
    ended = load.run(
        "search-by-id",
        HASHLENS_TOKEN_FILE=str(token),
        HASHLENS_GHZ_OUT=str(out),
        HASHLENS_GHZ_PRINT="1",
        TMPDIR=str(tmp_path),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (out / "search-by-id-smoke.json").read_text() in ended.stdout
    token.unlink()
    assert nowhere(tmp_path, {"token": TOKEN.encode()})
    assert TOKEN not in ended.stdout + ended.stderr


def config(*arguments: str, **others: str) -> subprocess.CompletedProcess[str]:
    return execute(sys.executable, GHZ_FOLDER / "config.py", *arguments, "--data", "data", **others)


def test_a_configuration_says_who_is_called_and_how_it_is_known(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    ended = config(
        "encode",
        "closed",
        HASHLENS_ENCODER="dns:///encoder:1",
        HASHLENS_SEARCH="search:2",
        HASHLENS_TLS_CA="ca.pem",
        HASHLENS_TLS_NAME="name",
        HASHLENS_TOKEN_FILE=str(token),
        HASHLENS_GHZ_CONCURRENCY="3",
    )
    made = json.loads(ended.stdout)
    assert (made["host"], made["lb-strategy"]) == ("dns:///encoder:1", "round_robin")
    assert (made["cacert"], made["cname"], made["insecure"]) == ("ca.pem", "name", False)
    assert made["metadata"] == {"authorization": f"Bearer {TOKEN}"}
    assert (made["concurrency"], made["connections"], made["rps"]) == (3, 3, 0)
    assert made["binary-file"] == "data/encode.binpb"
    plain = json.loads(config("search-by-id", "soak", HASHLENS_SEARCH="search:2").stdout)
    assert (plain["host"], plain["insecure"], plain["async"]) == ("search:2", True, True)


@pytest.mark.parametrize(
    ("arguments", "others", "said"),
    [
        (("nonsense", "smoke"), {}, "there is no scenario nonsense: it is one of encode, "),
        (("encode", "nonsense"), {}, "there is no shape nonsense: it is one of smoke, "),
        (("encode", "sustained"), {"HASHLENS_GHZ_RATE": "-1"}, "HASHLENS_GHZ_RATE must be"),
        (("encode", "smoke"), {"HASHLENS_TOKEN_FILE": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_makes_no_run_is_said(
    arguments: tuple[str, str], others: dict[str, str], said: str
) -> None:
    ended = config(*arguments, **others)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr


def test_without_ghz_it_says_how_to_get_it(tmp_path: Path) -> None:
    copied = tmp_path / "deploy" / "ghz"
    shutil.copytree(GHZ_FOLDER, copied)
    bash = shutil.which("bash")
    assert bash is not None
    folder = tmp_path / "bin"
    folder.mkdir()
    dirname = shutil.which("dirname")
    assert dirname is not None
    (folder / "dirname").symlink_to(dirname)
    ended = execute(bash, copied / "run.sh", "encode", PATH=str(folder))
    assert ended.returncode == 2
    assert "`make ghz` installs it" in ended.stderr


def report_of(**others: object) -> dict[str, Any]:
    """A report as ghz writes it: 100 calls in two seconds, of 1 to 99 ms."""
    return {
        "date": "2026-11-29T12:00:00Z",
        "name": "<made up>",
        "count": 100,
        "total": 2_000_000_000,
        "options": {"metadata": {"authorization": TOKEN}, "call": "a.B.C"},
        "errorDistribution": {},
        "statusCodeDistribution": {"OK": 100},
        "latencyDistribution": [
            {"percentage": p, "latency": p * 1_000_000} for p in (10, 25, 50, 75, 90, 95, 99)
        ],
        "details": [],
        **others,
    }


LIMITS: dict[str, Any] = {
    "p50_ms": 50,
    "p95_ms": 100,
    "p99_ms": 150,
    "max_error_share": 0.05,
    "max_status_share": {"ResourceExhausted": 0.05},
    "min_ok_per_s": 40,
}
REFUSED = {"errorDistribution": {"rpc error: ...": 5}}


@pytest.mark.parametrize(
    ("report", "status", "said"),
    [
        (report_of(), 0, "kept   p99: 99 ms, at most 150 ms"),
        (
            report_of(statusCodeDistribution={"OK": 95, "ResourceExhausted": 5}, **REFUSED),
            0,
            "kept   share of ResourceExhausted: 0.05, at most 0.05",
        ),
        (
            report_of(statusCodeDistribution={"OK": 94, "ResourceExhausted": 6}, **REFUSED),
            1,
            "MISSED error share: 0.06, at most 0.05",
        ),
        (
            report_of(statusCodeDistribution={"OK": 99, "Internal": 1}, **REFUSED),
            1,
            "MISSED share of Internal: 0.01, at most 0\n",
        ),
        (
            report_of(latencyDistribution=[{"percentage": 99, "latency": 151_000_000}]),
            1,
            "MISSED p99: 151 ms, at most 150 ms",
        ),
        (report_of(total=2_600_000_000), 1, "MISSED OK calls a second: 38.46, at least 40"),
        (
            report_of(statusCodeDistribution={"Unavailable": 100}, latencyDistribution=None),
            1,
            "MISSED p50: inf ms, at most 50 ms",
        ),
        (report_of(count=0, statusCodeDistribution={}), 2, "the report has no calls"),
    ],
)
def test_the_gate(tmp_path: Path, report: dict[str, Any], status: int, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    limits = thresholds_file(tmp_path, "encode", "smoke", LIMITS)
    check = GHZ_FOLDER / "check.py"
    ended = execute(sys.executable, check, path, "encode", "smoke", "--thresholds", limits)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert said in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ({**LIMITS, "p999_ms": 1}, "unknown keys ['p999_ms']"),
        ({"p99_ms": 1}, "missing keys ['max_error_share', 'max_status_share']"),
    ],
)
def test_thresholds_that_say_nothing_fail(
    tmp_path: Path, thresholds: dict[str, Any], said: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report_of()))
    limits = thresholds_file(tmp_path, "encode", "smoke", thresholds)
    check = GHZ_FOLDER / "check.py"
    ended = execute(sys.executable, check, path, "encode", "smoke", "--thresholds", limits)
    assert ended.returncode == 2
    assert said in ended.stderr
    absent = execute(sys.executable, check, path, "encode", "soak", "--thresholds", limits)
    assert absent.returncode == 2
    assert "has nothing for encode soak" in absent.stderr


def test_a_page_shows_seconds_and_no_secret(tmp_path: Path) -> None:
    details = [
        {
            "timestamp": f"2026-11-29T12:00:0{second}.123456789+02:00",
            "latency": 1_000_000 * (second + 1),
            "status": status,
            "error": "",
        }
        for second, status in ((0, "OK"), (1, "OK"), (1, "Unavailable"), (3, "OK"))
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report_of(details=details)))
    out = tmp_path / "out" / "page"
    out.parent.mkdir()
    ended = execute(sys.executable, GHZ_FOLDER / "report.py", path, "encode", "smoke", out)
    assert ended.returncode == 0, ended.stderr
    seconds = json.loads(Path(f"{out}.json").read_text())["seconds"]
    assert [s["statuses"] for s in seconds] == [
        {"OK": 1},
        {"OK": 1, "Unavailable": 1},
        {},
        {"OK": 1},
    ]
    assert [s["slowest_ok_ms"] for s in seconds] == [1.0, 2.0, 0.0, 4.0]
    page = Path(f"{out}.html").read_text()
    assert page.count("<rect") == 8
    assert "&lt;made up&gt;" in page
    assert nowhere(out.parent, {"token": TOKEN.encode()})


def test_every_scenario_has_thresholds_in_every_shape() -> None:
    thresholds = json.loads((GHZ_FOLDER / "thresholds.json").read_text())
    assert list(json.loads((GHZ_FOLDER / "shapes.json").read_text())) == list(SHAPES)
    assert {name: list(found) for name, found in thresholds.items()} == {
        name: list(SHAPES) for name in thresholds
    }
    assert sorted(thresholds) == SCENARIOS


def rendered(folder: Path) -> list[dict[str, Any]]:
    kustomize = tool("kustomize")
    assert kustomize is not None
    ended = execute(kustomize, "build", folder)
    assert ended.returncode == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


def job_of(objects: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Return the Job's pod, and the data of the ConfigMaps by their names."""
    (job,) = (item for item in objects if item["kind"] == "Job")
    maps = {
        item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"
    }
    return job["spec"]["template"]["spec"], maps


def project(volume: dict[str, Any], maps: dict[str, dict[str, str]], to: Path) -> None:
    """Lay files out as the kubelet does: behind a link that it can swap."""
    version = to / "..2026"
    for source in volume["projected"]["sources"]:
        data = maps[source["configMap"]["name"]]
        items = source["configMap"].get("items") or [{"key": k, "path": k} for k in data]
        for item in items:
            path = version / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(data[item["key"]])
    (to / "..data").symlink_to(version.name)
    for entry in version.iterdir():
        (to / entry.name).symlink_to(Path("..data", entry.name))


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


@needs_kustomize
@pytest.mark.parametrize("with_tls", [False, True])
def test_the_job_is_valid_and_restricted(tmp_path: Path, with_tls: bool) -> None:
    folder = GHZ_FOLDER
    if with_tls:
        shutil.copytree(GHZ_FOLDER, tmp_path / "ghz")
        folder = tmp_path / "overlay"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(
            "resources: [../ghz]\ncomponents: [../ghz/k8s/tls]\n"
        )
    objects = rendered(folder)
    for item in objects:
        kubernetes_validate.validate(item, "1.31", strict=True)
        assert item["metadata"]["namespace"] == "hashlens"
    pod, maps = job_of(objects)
    (container,) = pod["containers"]
    assert container["image"] == "hashlens-ghz:0.1.0"
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # Each file that is named is mounted, and each scenario is there.
    (source,) = container["envFrom"]
    variables = maps[source["configMapRef"]["name"]]
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    paths = [value for value in variables.values() if value.startswith("/")]
    assert len(paths) == (5 if with_tls else 2)
    for path in (*paths, *container["command"][1:2]):
        assert any(path == m or path.startswith(f"{m}/") for m in mounted), path
    (files,) = (volume for volume in pod["volumes"] if volume["name"] == "files")
    items = files["projected"]["sources"][1]["configMap"]["items"]
    assert {item["path"] for item in items} == {f"scenarios/{s}.json" for s in SCENARIOS}
    assert variables["HASHLENS_INSECURE"] == ("false" if with_tls else "true")


def test_the_image_is_linted() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if linter is None:
        pytest.skip("hadolint is not here")
    ended = execute(linter, GHZ_FOLDER / "Dockerfile")
    assert (ended.returncode, ended.stdout) == (0, "")
