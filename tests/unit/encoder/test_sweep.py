from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from encoder_service.commands import sweep
from encoder_service.training.sweep import SweepConfig, cells, read_results, table, train_config
from hashlens.errors import InvalidInputError
from tests.unit.encoder.conftest import write_small_fashion_mnist


def test_cells_are_all_combinations_and_share_a_training() -> None:
    config = SweepConfig(
        recipes="orthohash, csq",
        backbones="resnet9,alexnet",
        bits="12,48",
        protocols="split,lin2015",
    )
    found = cells(config)
    assert len(found) == 2 * 2 * 2
    assert {cell.protocols for cell in found} == {("split", "lin2015")}
    assert len({cell.path(Path()) for cell in found}) == len(found)


def test_unseen_classes_are_a_training_of_their_own() -> None:
    config = SweepConfig(recipes="csq", bits="16", protocols="split,unseen-classes")
    seen, unseen = cells(config)
    assert (seen.protocols, unseen.protocols) == (("split",), ("unseen-classes",))
    classes = tuple("abcdefghij")
    assert train_config(config, seen, classes).unseen == ()
    assert train_config(config, unseen, classes).unseen == ("h", "i", "j")


def test_only_the_recipe_differs_between_cells_of_a_backbone() -> None:
    config = SweepConfig(recipes="orthohash,csq,ssdh,lin2015-modern", bits="24", epochs=3)
    settings = [train_config(config, cell, ()).to_json() for cell in cells(config)]
    differing = {name for name in settings[0] if len({str(s[name]) for s in settings}) > 1}
    assert differing == {"recipe", "loss", "hash_norm", "label_smoothing"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"recipes": "orthohash,none"}, "recipes"),
        ({"backbones": "resnet18"}, "backbones"),
        ({"protocols": ""}, "protocols"),
        ({"bits": "12,x"}, "bits"),
    ],
)
def test_what_is_unknown_is_refused(change: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        cells(SweepConfig(**change))  # type: ignore[arg-type]
    assert caught.value.field == field


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        sweep,
        [
            *("--data", str(folder), "--output", str(folder / "sweep"), "--epochs", "1"),
            *("--batch-size", "32", "--bits", "16", "--device", "cpu", *arguments),
        ],
        catch_exceptions=False,
    )


def test_a_sweep_makes_each_cell_once(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    protocols = ("--protocols", "split,unseen-classes")
    first = run(tmp_path, "--recipes", "orthohash", *protocols)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*.json")}
    assert len(made) == 2
    # The training's own log stays; its checkpoint does not.
    assert not list((tmp_path / "sweep").glob("*.safetensors*"))

    second = run(tmp_path, "--recipes", "orthohash,csq", "--protocols", "split")
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in made.items())
    results = read_results(tmp_path / "sweep")
    assert [r["cell"]["recipe"] for r in results] == ["orthohash", "csq", "orthohash"]
    assert second.stdout == table(results)
    assert first.stdout.count("\n") == 2 + 2
    assert second.stdout.count("\n") == 2 + 3

    run(tmp_path, "--recipes", "csq", "--protocols", "lin2015", "--queries", "20")
    added = json.loads((tmp_path / "sweep" / "resnet9-csq-16-seen.json").read_text())
    assert set(added["protocols"]) == {"split", "lin2015"}
    with pytest.raises(InvalidInputError, match="seed was 1 and is 2"):
        run(tmp_path, "--recipes", "orthohash", "--protocols", "split", "--seed", "2")
    seen = json.loads((tmp_path / "sweep" / "resnet9-orthohash-16-seen.json").read_text())
    line = next(
        line for line in second.stdout.splitlines() if "| orthohash | 16 | 1 | split" in line
    )
    assert f"{seen['protocols']['split']['coarse']['tie_aware_map_full']:.4f}" in line
