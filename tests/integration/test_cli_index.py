"""`hashlens index`, `search` and the small commands against real services."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hashlens import Client, Item
from hashlens.cli.main import main
from hashlens.cli.shard import Shard
from hashlens.errors import HashlensError, NotFoundError
from tests.integration.conftest import SearchProcess
from tests.support.services import ServiceProcess

Hashlens = Callable[..., Result]


@pytest.fixture
def hashlens(encoder: ServiceProcess, search: SearchProcess) -> Hashlens:
    """Run a command against the services."""

    def run(*arguments: str | Path, status: int = 0) -> Result:
        flags = ["--encoder", encoder.target, "--search", search.target]
        result = CliRunner().invoke(main, [*map(str, arguments), *flags])
        assert result.exit_code == status, result.output
        return result

    return run


@pytest.fixture
def collection(request: pytest.FixtureRequest) -> str:
    """A collection of the test's own."""
    return str(request.node.name).replace("_", "-")[:64]


@pytest.fixture
def pictures(tmp_path: Path, images: list[bytes]) -> Path:
    """A folder with 30 good images among much else."""
    folder = tmp_path / "pictures"
    for n, data in enumerate(images[:30]):
        path = folder / f"album {n % 3}" / f"{n:03}.{'jpg' if n % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def summary_of(result: Result) -> Any:
    return json.loads(result.stdout)


def test_a_folder_with_much_that_is_odd(
    hashlens: Hashlens, collection: str, pictures: Path, images: list[bytes]
) -> None:
    bad = {
        "cut.jpg": images[1][:300],
        "text.png": b"I am no picture",
        "empty.gif": b"",
    }
    for name, data in bad.items():
        (pictures / name).write_bytes(data)
    (pictures / "huge.jpg").touch()
    os.truncate(pictures / "huge.jpg", 2**40)
    os.mkfifo(pictures / "pipe.jpg")
    (pictures / "loop").symlink_to(pictures)
    (pictures / "broken.jpg").symlink_to("nowhere")
    (pictures / "notes.txt").write_text("hello")
    (pictures / "no extension").write_bytes(images[40])
    (pictures / "東京 [red] 'x'.png").write_bytes(images[41])
    not_utf8 = os.fsdecode(os.fsencode(pictures) + b"/caf\xe9.jpg")
    Path(not_utf8).write_bytes(images[42])

    result = hashlens("index", pictures, "-c", collection, "--json")
    summary = summary_of(result)
    assert (summary["indexed"], summary["items"]) == (32, 32)
    failed = {os.path.basename(f["path"]): f["reason"] for f in summary["failed"]}  # noqa: PTH119
    assert set(failed) == {
        *bad, "huge.jpg", "pipe.jpg", "loop", "broken.jpg", "caf\udce9.jpg",
    }  # fmt: skip
    assert all(failed.values())

    shown = hashlens("index", pictures, "-c", collection)
    assert "32 unchanged" in shown.stdout
    assert f"{len(failed)} not readable" in shown.stdout
    for name in ("cut.jpg", "huge.jpg", "caf\\udce9.jpg"):
        assert f"  {name}: " in shown.stdout


def test_only_what_is_new_or_changed_is_encoded_again(
    hashlens: Hashlens, collection: str, pictures: Path, images: list[bytes]
) -> None:
    index = ("index", pictures, "-c", collection, "--json")
    assert summary_of(hashlens(*index))["indexed"] == 30
    (pictures / "new.png").write_bytes(images[50])
    changed = pictures / "album 0" / "000.png"
    changed.write_bytes(images[52])
    os.utime(pictures / "album 1" / "001.jpg", ns=(1, 1))
    gone = pictures / "album 2" / "002.png"
    gone.unlink()

    summary = summary_of(hashlens(*index))
    assert (summary["indexed"], summary["unchanged"], summary["items"]) == (3, 27, 31)
    found = summary_of(hashlens("search", changed, "-c", collection, "-k", "1", "--json"))
    assert found["hits"][0]["id"] == str(changed)
    assert found["hits"][0]["payload"]["size"] == len(images[52])

    summary = summary_of(hashlens(*index, "--prune"))
    assert (summary["pruned"], summary["items"]) == (1, 30)


def test_pruning_keeps_what_is_elsewhere(
    hashlens: Hashlens, collection: str, pictures: Path
) -> None:
    hashlens("index", pictures, "-c", collection)
    for n in range(3):
        (pictures / f"album {n}" / f"{n:03}.{'jpg' if n % 2 else 'png'}").unlink()
    summary = summary_of(
        hashlens("index", pictures / "album 0", "-c", collection, "--prune", "--json")
    )
    assert (summary["pruned"], summary["items"]) == (1, 29)


def test_shards_take_every_file_once_and_prune_their_own(
    hashlens: Hashlens, client: Client, collection: str, pictures: Path, tmp_path: Path
) -> None:
    def run(folder: Path, index: int, *more: str) -> Any:
        flags = ("--ids", "relative", "--shard", f"{index}/3", "--json", *more)
        return summary_of(hashlens("index", folder, "-c", collection, *flags))

    files = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.*"))
    shares = [run(pictures, index)["indexed"] for index in range(3)]
    assert sum(shares) == client.collection(collection).n_items == 30
    assert all(shares)
    assert len(client.get_items(collection, files)) == 30

    # Another machine has the folder elsewhere: nothing is new there.
    elsewhere = tmp_path / "mnt" / "images"
    shutil.copytree(pictures, elsewhere)
    assert [run(elsewhere, index)["unchanged"] for index in range(3)] == shares

    # What others have put there is not below the folder, whatever it is called.
    (code,) = client.encode_batch([(pictures / files[0]).read_bytes()])
    assert not isinstance(code, HashlensError)
    others = ["gone.png", "album 0/nobody.png", "/gone/a.png"]
    client.upsert(
        collection,
        [
            Item(id=others[0], embedding=code.embedding),
            Item(id=others[1], embedding=code.embedding, payload=b'["path"]'),
            Item(id=others[2], embedding=code.embedding, payload=b'{"path": "/gone/a.png"}'),
        ],
    )
    for name in files[:20]:
        (elsewhere / name).unlink()
    left = 33
    for index in range(3):
        gone = [name for name in files[:20] if Shard(index, 3).has(name)]
        assert run(elsewhere, index, "--prune")["pruned"] == len(gone) > 0
        left -= len(gone)
        assert client.collection(collection).n_items == left
    kept = {item.id for item in client.get_items(collection, [*files, *others])}
    assert kept == {*files[20:], *others}


def test_a_report_and_what_the_exit_status_says(
    hashlens: Hashlens, collection: str, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "album 0" / "text.png").write_bytes(b"I am no picture")
    (pictures / "empty.gif").touch()
    report = tmp_path / "report.jsonl"
    index = ("index", pictures, "-c", collection, "--report", report)
    summary = summary_of(hashlens(*index, "--json"))
    assert (summary["indexed"], summary["n_failed"]) == (30, 2)
    lines = {
        line["path"]: line["reason"] for line in map(json.loads, report.read_text().splitlines())
    }
    assert lines.keys() == {"album 0/text.png", "empty.gif"}
    assert lines["empty.gif"] == "empty"

    assert "2 not readable" in hashlens(*index, "--strict", status=3).stdout
    (pictures / "empty.gif").unlink()
    hashlens(*index, "--strict", status=3)
    assert [json.loads(line)["path"] for line in report.read_text().splitlines()] == [
        "album 0/text.png"
    ]
    (pictures / "album 0" / "text.png").unlink()
    hashlens(*index, "--strict")
    assert report.read_text() == ""
    for wrong in (("--shard", "3/3"), ("--ids", "short"), ("--expected-rows", "0")):
        hashlens(*index, *wrong, status=2)
    hashlens("index", pictures, "-c", "No Such", status=2)


def test_a_report_that_cannot_be_written(
    hashlens: Hashlens, client: Client, collection: str, pictures: Path, tmp_path: Path
) -> None:
    report = tmp_path / "missing" / "report.jsonl"
    refused = hashlens("index", pictures, "-c", collection, "--report", report, status=2)
    assert "--report" in refused.output
    assert str(report) in refused.output.replace("\n", "")
    # Not even the collection has been made.
    with pytest.raises(NotFoundError):
        client.collection(collection)


def test_a_collection_is_made_for_as_many_rows_as_are_expected(
    hashlens: Hashlens, client: Client, collection: str, pictures: Path
) -> None:
    flags = ("-c", collection, "--expected-rows", "5000000", "--shard", "0/2")
    hashlens("index", pictures, *flags)
    assert client.collection(collection).spec.expected_rows == 5_000_000


def test_another_models_collection_is_refused(
    hashlens: Hashlens,
    collection: str,
    pictures: Path,
    encoder: ServiceProcess,
    search: SearchProcess,
) -> None:
    with Client(search.target, encoder.target) as client:
        spec = client.create_collection("for-its-spec").spec
        client.create_collection(
            collection, spec=replace(spec, name=collection, model_id="0" * len(spec.model_id))
        )
    result = hashlens("index", pictures, "-c", collection, status=2)
    assert "000000000000" in result.stderr
    assert f"hashlens drop {collection}" in result.stderr


def test_search_by_image_and_by_id(
    hashlens: Hashlens, collection: str, pictures: Path, tmp_path: Path
) -> None:
    hashlens("index", pictures, "-c", collection)
    query = pictures / "album 0" / "003.jpg"

    shown = hashlens("search", query, "-c", collection, "-k", "5")
    assert str(query) in shown.stdout
    assert "pool 30 of 30 within" in shown.stdout
    assert "exact" in shown.stdout

    by_image = summary_of(hashlens("search", query, "-c", collection, "-k", "5", "--json"))
    by_id = summary_of(hashlens("search", "--id", query, "-c", collection, "-k", "5", "--json"))
    assert by_image["hits"] == by_id["hits"]
    assert by_image["hits"][0]["id"] == str(query)
    assert by_image["hits"][0]["hamming_bits"] == 0

    html = tmp_path / "gallery.html"
    hashlens("search", query, "-c", collection, "-k", "5", "--html", html)
    page = html.read_text("utf-8")
    assert page.count("data:image/webp;base64,") == 6
    assert "The model sees" in page, "explained without being asked to"
    assert "query margin" in page

    explain = ("-c", collection, "-k", "5", "--explain")
    explained = summary_of(hashlens("search", query, *explain, "--json"))
    assert len(explained["explanation"]["bits"]) == len(explained["explanation"]["certainty"]) == 48
    for hit in explained["hits"]:
        assert len(hit["explanation"]["differing_bits"]) == hit["hamming_bits"]
    shown = hashlens("search", query, *explain).stdout
    assert f"query seen as {explained['explanation']['predicted']['class']}" in shown
    assert shown.count("query margin") == 6

    coarse = ("--rank", "hamming", "--max-hamming", "2", "--json")
    hits = summary_of(hashlens("search", query, "-c", collection, *coarse))["hits"]
    assert all(hit["distance"] is None and hit["hamming_bits"] <= 2 for hit in hits)
    for flags, used in (((), True), (("--ignore-margins",), False)):
        found = summary_of(hashlens("search", query, "-c", collection, *coarse, *flags))
        assert found["receipt"]["margins_used"] is used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id", "none"], "none"),
        ([__file__], "image"),
        (["--id", "none", "--max-hamming", "999"], "max_hamming_bits"),
        (["--id", "none", "-c", "no-such"], "no-such"),
        (["--id", "none", "-c", "No Such"], "collection"),
    ],
)
def test_a_search_that_cannot_be(
    hashlens: Hashlens, pictures: Path, arguments: list[str], message: str
) -> None:
    hashlens("index", pictures, "-c", "searched")
    result = hashlens("search", "-c", "searched", *arguments, status=1)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_collections_and_drop(hashlens: Hashlens, collection: str, pictures: Path) -> None:
    hashlens("index", pictures, "-c", collection)
    listed = {c["name"]: c for c in json.loads(hashlens("collections", "--json").stdout)}
    assert listed[collection]["items"] == 30
    assert collection in hashlens("collections").stdout
    hashlens("drop", collection, status=1)  # Nobody confirms.
    assert "is gone (30 items)" in hashlens("drop", collection, "--yes").stdout
    assert collection not in hashlens("collections").stdout
    assert "Error" in hashlens("drop", collection, "--yes", status=1).stderr


def test_health(hashlens: Hashlens, encoder: ServiceProcess) -> None:
    result = json.loads(hashlens("health", "--json").stdout)
    assert result["serving"]
    assert result["services"][0]["target"] == encoder.target
    assert hashlens("health").stdout.count("serving") == 2


def test_an_empty_folder(hashlens: Hashlens, collection: str, tmp_path: Path) -> None:
    summary = summary_of(hashlens("index", tmp_path, "-c", collection, "--prune", "--json"))
    assert (summary["found"], summary["items"], summary["pruned"]) == (0, 0, 0)


@pytest.mark.parametrize("ids", ["absolute", "relative"])
def test_a_folder_that_is_not_mounted_is_not_pruned(
    hashlens: Hashlens, client: Client, pictures: Path, ids: str
) -> None:
    name = f"not-mounted-{ids}"
    index = ("index", pictures, "-c", name, "--ids", ids, "--json")
    hashlens(*index)
    mounted = pictures.rename(pictures.with_name("mounted"))
    pictures.mkdir()
    # What a mount point may have of its own.
    (pictures / "lost+found").mkdir()
    (pictures / "README.txt").write_text("nothing is mounted here")
    for shard in ("0/1", "1/3"):
        refused = hashlens(*index, "--prune", "--shard", shard, status=2)
        assert f"hashlens drop {name}" in refused.output
        assert client.collection(name).n_items == 30

    # One image that another shard has is enough: the folder is there.
    shutil.rmtree(pictures)
    (kept,) = mounted.rglob("000.*")
    stays = pictures / kept.relative_to(mounted)
    stays.parent.mkdir(parents=True)
    shutil.copy2(kept, stays)
    here = [n for n in range(3) if Shard(n, 3).has(str(kept.relative_to(mounted)))]
    other = f"{(here[0] + 1) % 3}/3"
    pruned = summary_of(hashlens(*index, "--prune", "--shard", other))["pruned"]
    assert 0 < pruned == 30 - client.collection(name).n_items
    summary = summary_of(hashlens(*index, "--prune"))
    assert (summary["items"], summary["unchanged"]) == (1, 1)


def test_tags_and_a_time_to_live(
    hashlens: Hashlens, client: Client, collection: str, pictures: Path, images: list[bytes]
) -> None:
    index = ("index", pictures, "-c", collection, "--json")
    assert summary_of(hashlens(*index, "--tag", "b", "--tag", "a", "--tag", "b"))["indexed"] == 30
    ids = [str(path) for path in sorted(pictures.rglob("*.*"))]
    assert {item.tags for item in client.get_items(collection, ids)} == {("a", "b")}
    # Without labels those that are there stay; with the same nothing is to do.
    assert summary_of(hashlens(*index))["unchanged"] == 30
    assert summary_of(hashlens(*index, "--tag", "a", "--tag", "b"))["unchanged"] == 30

    (pictures / "album 0" / "000.png").write_bytes(images[52])
    assert summary_of(hashlens(*index))["indexed"] == 1
    album = ("index", pictures / "album 1", "-c", collection, "--json")
    before_ms = time.time() * 1000
    assert summary_of(hashlens(*album, "--tag", "c", "--ttl-s", "3600"))["indexed"] == 10
    stored = client.get_items(collection, ids)
    late = [item for item in stored if item.expires_unix_ms]
    assert {item.tags for item in late} == {("c",)}
    assert len(late) == 10
    (expires_ms,) = {item.expires_unix_ms for item in late}
    assert before_ms + 3_599_000 < expires_ms < before_ms + 3_700_000
    assert {item.tags for item in stored if not item.expires_unix_ms} == {("a", "b")}

    search = ("search", ids[0], "-c", collection, "-k", "100", "--json")

    def found(*arguments: str) -> int:
        return len(summary_of(hashlens(*search, *arguments))["hits"])

    assert found() == 30
    assert found("--tag-any", "c", "--tag-any", "b") == 30
    assert found("--tag-all", "a", "--tag-all", "b") == 20
    assert found("--tag-none", "a") == 10
    assert found("--tag-any", "a", "--tag-none", "b") == 0
    refused = hashlens(*search, "--tag-any", "", status=1)
    assert "--tag-any[0]" in refused.output
    hashlens(*index, "--tag", "line\nbreak", status=2)
    hashlens(*index, "--ttl-s", "0", status=2)
