"""What deploy/ghz says, compares and renders, without a service."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.support.ghz import (
    GHZ_FOLDER,
    SCENARIOS,
    TOKEN,
    execute,
    job_of,
    needs_kustomize,
    rendered,
    thresholds_file,
)
from tests.support.secrets import nowhere

SHAPES = ("smoke", "closed", "sustained", "overload", "soak")


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


KEPT = {"max_error_share": 0, "max_status_share": {}}
MISSED = {**KEPT, "min_ok_per_s": 1e6}


@pytest.mark.parametrize(
    ("failing", "thresholds", "status"),
    [
        ("nothing", KEPT, 0),
        ("nothing", MISSED, 1),
        # What could be compared is not, whatever the failing program ends with.
        *((part, KEPT, 2) for part in ("config.py", "data.py", "warmup", "run", "report.py")),
    ],
)
def test_only_a_missed_threshold_ends_a_run_with_1(
    tmp_path: Path, failing: str, thresholds: dict[str, Any], status: int
) -> None:
    report = tmp_path / "made-up.json"
    report.write_text(json.dumps(report_of()))
    python, ghz = tmp_path / "python", tmp_path / "ghz"
    # Each is named by its file; ghz by its configuration's. There are no services to make data of.
    python.write_text(
        f"""#!/bin/sh
case $(basename "$1") in
  {failing}) exit 1 ;;
  data.py) exit 0 ;;
esac
exec {shlex.quote(sys.executable)} "$@"
"""
    )
    ghz.write_text(
        f"""#!/bin/sh
[ "$(basename "$2" .json)" != {failing} ] || exit 1
cat {shlex.quote(str(report))}
"""
    )
    for program in (python, ghz):
        program.chmod(0o755)
    limits = thresholds_file(tmp_path, "encode", "smoke", thresholds)
    ended = execute(
        "bash",
        GHZ_FOLDER / "run.sh",
        "encode",
        PYTHON=str(python),
        GHZ=str(ghz),
        HASHLENS_GHZ_OUT=str(tmp_path / "out"),
        HASHLENS_GHZ_THRESHOLDS=str(limits),
        TMPDIR=str(tmp_path),
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert ("kept " in ended.stdout) == (status != 2)
    assert not list(tmp_path.glob("tmp.*")), "configurations stay behind"


def test_without_services_there_is_nothing_to_compare(tmp_path: Path) -> None:
    where = {"HASHLENS_ENCODER": "127.0.0.1:1", "HASHLENS_SEARCH": "127.0.0.1:1"}
    ended = execute(
        "bash",
        GHZ_FOLDER / "run.sh",
        "encode",
        GHZ="false",
        HASHLENS_GHZ_OUT=str(tmp_path),
        **where,
    )
    assert ended.returncode == 2
    assert "cannot be reached" in ended.stderr


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
        ({"count": 3}, 2, "KeyError('statusCodeDistribution')"),
        (report_of(total=0), 2, "is no report of ghz"),
        (report_of(latencyDistribution=[{"percentage": 99}]), 2, "is no report of ghz"),
        (report_of(errorDistribution={"a": None, "b": None}), 2, "is no report of ghz"),
        (report_of(errorDistribution=["a"]), 2, "is no report of ghz"),
        ([1], 2, "is no report of ghz"),  # type: ignore[list-item]
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
    limits.write_text("[]")
    other = execute(sys.executable, check, path, "encode", "smoke", "--thresholds", limits)
    assert other.returncode == 2
    assert f"{limits} has other things" in other.stderr
    limits.write_text("[" * 100_000)
    deep = execute(sys.executable, check, path, "encode", "smoke", "--thresholds", limits)
    assert deep.returncode == 2
    assert str(limits) in deep.stderr
    path.write_text("")
    empty = execute(sys.executable, check, path, "encode", "smoke", "--thresholds", limits)
    assert empty.returncode == 2
    assert str(path) in empty.stderr
    path.write_text(json.dumps(report_of()))
    limits = thresholds_file(tmp_path, "encode", "smoke", {**LIMITS, **thresholds})
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


@needs_kustomize
def test_an_overlay_has_the_image_of_a_registry(tmp_path: Path) -> None:
    page = (GHZ_FOLDER / "README.md").read_text().split("### Images of a registry\n")[1]
    (commands,) = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    build, push = commands.replace("\\\n", "").splitlines()
    (overlay,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    shutil.copytree(GHZ_FOLDER, tmp_path / "ghz")
    folder = tmp_path / "ghz-mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(overlay)
    pod, maps = job_of(rendered(folder))
    image = pod["containers"][0]["image"]
    assert image == "images.example/hashlens-ghz:0.1.0"
    words = shlex.split(build)
    assert words[words.index("-t") + 1] == shlex.split(push)[-1] == image
    argument, _, value = words[words.index("--build-arg") + 1].partition("=")
    assert value == image.replace("-ghz:", "-encoder:")
    lines = (GHZ_FOLDER / "Dockerfile").read_text().splitlines()
    instructions = [line for line in lines if line and not line.startswith("#")]
    # FROM sees an ARG only if that stands before the first FROM.
    assert instructions[0].startswith(f"ARG {argument}=")
    assert f"FROM ${{{argument}}}" in instructions
    (variables,) = (m for m in maps.values() if "HASHLENS_INSECURE" in m)
    assert variables["HASHLENS_INSECURE"] == "false"


def test_the_image_is_linted() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if linter is None:
        pytest.skip("hadolint is not here")
    ended = execute(linter, GHZ_FOLDER / "Dockerfile")
    assert (ended.returncode, ended.stdout) == (0, "")
