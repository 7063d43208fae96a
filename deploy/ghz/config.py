"""The configuration of one run of ghz, on standard output: a scenario in a shape.

Python's own library only. The environment says where and how much, see README.md. The output holds
the bearer token, if there is one: write it where nobody else reads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

ADDRESSES = {
    "EncoderService": ("HASHLENS_ENCODER", "127.0.0.1:50051"),
    "SearchService": ("HASHLENS_SEARCH", "127.0.0.1:50052"),
}

OPEN_WORKERS = 32
"""Goroutines that start calls in an open loop; none of them waits for an answer."""

FALSE = {"", "0", "false", "no", "off"}


class UsageError(ValueError):
    """What was asked for makes no run."""


def load(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object."""
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
        raise UsageError(f"there is no {what} {path.stem}: it is one of {names}")
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def number(name: str, fallback: float) -> float:
    """Read a positive number of the environment."""
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else fallback
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise UsageError(f"{name} must be a number above 0, not {text!r}")
    return value


def access() -> dict[str, Any]:
    """Return how the services are known, as the client's variables say it."""
    files = {"cacert": "HASHLENS_TLS_CA", "cert": "HASHLENS_TLS_CERT", "key": "HASHLENS_TLS_KEY"}
    known = {key: os.environ[name] for key, name in files.items() if os.environ.get(name)}
    is_tls = bool(known) or os.environ.get("HASHLENS_TLS", "").lower() not in FALSE
    config: dict[str, Any] = {**known, "insecure": not is_tls}
    if os.environ.get("HASHLENS_TLS_NAME"):
        config["cname"] = os.environ["HASHLENS_TLS_NAME"]
    token_file = os.environ.get("HASHLENS_TOKEN_FILE")
    if token_file:
        config["metadata"] = {"authorization": f"Bearer {Path(token_file).read_text().strip()}"}
    return config


def loop(scenario: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """Return what makes the load: who calls how often, for how long."""
    duration_s = number("HASHLENS_GHZ_DURATION_S", shape["duration_s"])
    # A call that is under way at the end is waited for, and counts.
    config: dict[str, Any] = {"duration": f"{duration_s:g}s", "duration-stop": "wait"}
    if shape["loop"] == "closed":
        callers = shape.get("concurrency", scenario["concurrency"])
        config["concurrency"] = int(number("HASHLENS_GHZ_CONCURRENCY", callers))
        return {**config, "rps": 0}
    rate = number("HASHLENS_GHZ_RATE", scenario["rps"])
    rates = [max(1, round(rate * factor)) for factor in shape["factors"]]
    config |= {"async": True, "concurrency": OPEN_WORKERS}
    if len(rates) == 1:
        return {**config, "rps": rates[0]}
    return {
        **config,
        "rps": 0,
        "load-schedule": "step",
        "load-start": rates[0],
        "load-step": rates[1] - rates[0],
        "load-step-duration": f"{duration_s / len(rates):g}s",
        "load-end": rates[-1],
    }


def warmup(scenario: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """Return the load before, whose result is thrown away."""
    seconds = number("HASHLENS_GHZ_WARMUP_S", shape["warmup_s"])
    return {
        "duration": f"{seconds:g}s",
        "duration-stop": "wait",
        "concurrency": shape.get("concurrency", scenario["concurrency"]),
        "rps": 0,
    }


def config_of(
    scenario_name: str, shape_name: str, data: Path, *, is_warmup: bool
) -> dict[str, Any]:
    """Return the configuration, as ``ghz --config`` reads it."""
    scenario = load(HERE / "scenarios" / f"{scenario_name}.json", "scenario")
    shapes = json.loads((HERE / "shapes.json").read_text())
    if shape_name not in shapes:
        raise UsageError(f"there is no shape {shape_name}: it is one of {', '.join(shapes)}")
    shape = shapes[shape_name]
    load_of = warmup if is_warmup else loop
    config = {**scenario, **access(), **load_of(scenario, shape)}
    for key in ("protoset", "binary-file", "data-file"):
        if key in config:
            config[key] = str(data / config[key])
    service = scenario["call"].split(".")[-2]
    variable, fallback = ADDRESSES[service]
    config["host"] = os.environ.get(variable) or fallback
    if config["host"].startswith("dns:///"):
        # Behind a headless Service: all replicas, not the first that answers.
        config["lb-strategy"] = "round_robin"
    connections = int(number("HASHLENS_GHZ_CONNECTIONS", scenario["connections"]))
    config["connections"] = min(connections, config["concurrency"])
    # The data are no templates: looking for them in each call takes time.
    config |= {"disable-template-functions": True, "disable-template-data": True}
    config["tags"] = {"scenario": scenario_name, "shape": shape_name, "loop": shape["loop"]}
    return config | {"format": "json"}


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario")
    parser.add_argument("shape")
    parser.add_argument("--data", type=Path, required=True, help="folder of the call data")
    parser.add_argument("--warmup", action="store_true", help="the load before the run")
    asked = parser.parse_args()
    try:
        config = config_of(asked.scenario, asked.shape, asked.data, is_warmup=asked.warmup)
    except (UsageError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    json.dump(config, sys.stdout, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
