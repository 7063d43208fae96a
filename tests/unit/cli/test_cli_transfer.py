"""Files of items: read as they were written, and refused with a column and a row."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hashlens.cli import extras
from hashlens.cli.transfer import checks, columns
from hashlens.cli.transfer.columns import Columns, Layout
from hashlens.cli.transfer.files import reading, writing
from hashlens.errors import AlreadyExistsError, InvalidInputError, PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype

N = 10
SPEC = CollectionSpec("c", "m", 12, 3, FeatureDtype.F32)
LAYOUT = Layout(2, 3, FeatureDtype.F32, 12, "m")
SUFFIXES = ["npz", "parquet", "arrow"]


def check(path: Path, spec: CollectionSpec = SPEC) -> int:
    """Check a file as an import does; return how many items were looked at."""
    looked_at: list[int] = []
    with reading(path) as reader:
        checks.check_layout(spec, reader.layout, may_round=False)
        checks.check_items(reader, spec, looked_at.append)
    return sum(looked_at)


def good() -> dict[str, Any]:
    """The members of a right .npz file."""
    return {
        "ids": np.array([f"\u00e4{i}" for i in range(N)]),
        "codes": np.full((N, 2), 15, dtype=np.uint8),
        "features": np.ones((N, 3), dtype=np.float32),
        "payloads": np.arange(2 * N, dtype=np.uint8),
        "payloads_ends": np.arange(2, 2 * N + 2, 2),
        "tags": np.array(["red\nround"] * N),
        "expires_unix_ms": np.zeros(N, dtype=np.int64),
        "n_bits": 12,
        "dim": 3,
        "model_id": "m",
        "format": columns.FORMAT,
    }


def changed(name: str, row: int, value: Any) -> Any:
    array = np.array(good()[name])
    array[row] = value
    return array


def test_a_right_file_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **good())
    assert check(path) == N
    few = {"ids": good()["ids"], "codes": good()["codes"]}
    np.savez_compressed(path, **few)
    with reading(path) as reader:
        assert reader.layout == Layout(2)
        [part] = reader.read()
    assert list(part.ids) == few["ids"].tolist()
    assert (part.features, list(part.payloads), list(part.tags)) == (None, [b""] * N, [()] * N)


@pytest.mark.parametrize(
    ("member", "value", "field", "said"),
    [
        ("ids", None, "ids", "has to be"),
        ("codes", None, "codes", "has to be"),
        ("ids", np.arange(N), "ids", "text, shape"),
        ("ids", np.array(["a"] * (N - 1)), "ids", "9 rows, but codes have 10"),
        ("ids", np.array([object()] * N), "ids", "Python objects"),
        ("ids", changed("ids", 4, ""), "ids[4]", "0 bytes"),
        ("ids", changed("ids", 4, "\n"), "ids[4]", "control"),
        ("ids", np.array(["x" * 1025] * N), "ids[0]", "1025 bytes"),
        ("ids", changed("ids", 9, "\u00e43"), "ids[9]", "the id of row 3"),
        ("ids", np.full(N, 0x110000, "<u4").view("<U1"), "ids[0]", "no text"),
        ("codes", np.zeros((N, 3), np.uint8), "codes", "3 bytes, but 12 bits take 2"),
        ("codes", np.zeros((N, 2), np.int8), "codes", "uint8"),
        ("codes", np.zeros(N, np.uint8), "codes", "uint8"),
        ("codes", np.zeros((N, 0), np.uint8), "codes", "uint8"),
        ("codes", np.asfortranarray(good()["codes"]), "codes", "column order"),
        ("codes", changed("codes", 7, (0, 16)), "codes[7]", "behind its end"),
        ("features", np.ones((N, 3)), "features", "float16 or float32"),
        ("features", np.ones((N, 3), ">f4"), "features", "little-endian"),
        ("features", np.ones((N - 1, 3), np.float32), "features", "9 rows"),
        ("features", changed("features", 6, np.nan), "features[6]", "finite"),
        ("payloads", np.arange(N), "payloads", "bytes (uint8)"),
        ("payloads_ends", None, "payloads_ends", "say where"),
        ("payloads_ends", np.arange(N) + 0.5, "payloads_ends", "integers"),
        ("payloads_ends", np.arange(1, N), "payloads_ends", "9 rows"),
        ("payloads_ends", changed("payloads_ends", 3, 5), "payloads_ends[3]", "cannot be the end"),
        ("payloads_ends", changed("payloads_ends", 9, 19), "payloads", "goes on behind"),
        ("payloads_ends", changed("payloads_ends", 9, 21), "payloads", "cut off"),
        ("payloads_ends", changed("payloads_ends", 9, 70_000), "payloads_ends[9]", "65536"),
        ("tags", changed("tags", 2, "a\n\nb"), "tags[2][1]", "0 bytes"),
        ("tags", changed("tags", 2, "a\n\rb"), "tags[2][1]", "control"),
        ("expires_unix_ms", changed("expires_unix_ms", 5, -1), "expires_unix_ms[5]", "no time"),
        ("expires_unix_ms", np.zeros(N), "expires_unix_ms", "integers"),
        ("n_bits", 513, "n_bits", "1 to 512"),
        ("n_bits", 0, "n_bits", "1 to 512"),
        ("n_bits", 1.5, "n_bits", "one integer"),
        ("n_bits", [12], "n_bits", "one integer"),
        ("dim", 4, "dim", "have 3 numbers"),
        ("model_id", 3, "model_id", "one text"),
        ("model_id", "x" * 2000, "model_id", "too long"),
        ("format", "hashlens-items-2", "format", "is not hashlens-items-1"),
    ],
)
def test_a_wrong_member_is_named(
    tmp_path: Path, member: str, value: Any, field: str, said: str
) -> None:
    members = good()
    if value is None:
        del members[member]
    else:
        members[member] = value
    path = tmp_path / "a.npz"
    np.savez(path, **members)
    with pytest.raises(InvalidInputError) as caught:
        check(path)
    assert caught.value.field == f"a.npz: {field}"
    assert said in caught.value.message


def test_rows_are_counted_over_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "PART_ROWS", 3)
    for n, (member, row, value) in enumerate(
        [("codes", 8, 255), ("features", 5, np.inf), ("ids", 9, "\u00e40"), ("tags", 7, "\n")]
    ):
        path = tmp_path / f"{n}.npz"
        np.savez(path, **{**good(), member: changed(member, row, value)})
        with pytest.raises(InvalidInputError) as caught:
            check(path)
        assert f"{member}[{row}]" in caught.value.field
    path = tmp_path / "right.npz"
    np.savez(path, **good())
    assert check(path) == N


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    members = good() | {
        "ids": np.frombuffer(b"a\xc3\xa4\xc3b", np.uint8),
        "ids_ends": np.array([1, 3, 4, 5]),
    }
    few = {name: members[name] for name in ("ids", "ids_ends")}
    np.savez(path, codes=good()["codes"][:4], **few)
    with pytest.raises(InvalidInputError) as caught:
        check(path, CollectionSpec("c", "m", 16, 0))
    assert caught.value.field == "a.npz: ids[2]"


def table(**changes: Any) -> pa.Table:
    made = {
        "ids": pa.array([f"{i}" for i in range(N)]),
        "codes": pa.array([b"\x0f\x0f"] * N, pa.binary()),
        "features": pa.array([[1.0, 2.0, 3.0]] * N, pa.list_(pa.float32())),
        "tags": pa.array([["red"], None] * (N // 2), pa.list_(pa.string())),
    }
    kept = {name: column for name, column in (made | changes).items() if column is not None}
    return pa.table(kept)


def replaced(name: str, row: int, value: Any) -> pa.Array:
    column = table()[name]
    values = column.to_pylist()
    values[row] = value
    return pa.array(values, column.type)


def save(path: Path, content: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(content, path, row_group_size=4)
        return
    with pa.ipc.new_file(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=4)


BAD_UTF8 = pa.array([b"a"] * 6 + [b"\xff"] + [b"b"] * 3, pa.binary()).view(pa.string())


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("name", "column", "field", "said"),
    [
        ("ids", None, "ids", "has to be"),
        ("ids", pa.array(range(N)), "ids", "write string"),
        ("ids", replaced("ids", 5, None), "ids[5]", "null"),
        ("ids", replaced("ids", 5, "4"), "ids[5]", "the id of row 4"),
        ("ids", BAD_UTF8, "ids[6]", "UTF8"),
        ("codes", pa.array(["ab"] * N), "codes", "write binary"),
        ("codes", replaced("codes", 6, b"\x0f"), "codes[6]", "1 bytes, the first one has 2"),
        ("codes", replaced("codes", 6, b"\x0f\x10"), "codes[6]", "behind its end"),
        ("codes", pa.array([b""] * N, pa.binary()), "codes[0]", "at least 1 bit"),
        ("features", pa.array([[1.0]] * N), "features", "float16 or float32"),
        ("features", replaced("features", 7, None), "features[7]", "null"),
        ("features", replaced("features", 7, [1.0, None, 1.0]), "features[7]", "null"),
        ("features", replaced("features", 7, [1.0]), "features[7]", "1 numbers"),
        ("features", replaced("features", 7, [1.0, 2.0, np.inf]), "features[7]", "finite"),
        ("tags", replaced("tags", 8, ["a", None]), "tags[8]", "null"),
        ("tags", replaced("tags", 8, ["a", ""]), "tags[8][1]", "0 bytes"),
        ("payloads", pa.array([b"x" * 65_537] * N), "payloads[0]", "65537 bytes"),
        ("expires_unix_ms", pa.array([2**63] * N, pa.uint64()), "expires_unix_ms[0]", "no time"),
    ],
)
def test_a_wrong_column_is_named(
    tmp_path: Path, suffix: str, name: str, column: Any, field: str, said: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    save(path, table())
    assert check(path) == N
    save(path, table(**{name: column}))
    with pytest.raises(InvalidInputError) as caught:
        check(path)
    assert caught.value.field == f"{path.name}: {field}"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_bits", "0"), ("n_bits", "x"), ("dim", "4"), ("format", "hashlens-items-2")],
)
def test_wrong_metadata_of_a_table_is_named(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "a.parquet"
    save(path, table().replace_schema_metadata({f"hashlens.{key}": value}))
    with pytest.raises(InvalidInputError) as caught:
        check(path)
    assert caught.value.field == f"a.parquet: {key}"


def written(path: Path, layout: Layout = LAYOUT, n: int = N) -> bytes:
    """Write a file as an export does, in two parts."""
    rng = np.random.default_rng(3)
    with writing(path, layout) as writer:
        for begin, end in ((0, n // 2), (n // 2, n)):
            size = end - begin
            part = Columns(
                ids=[f"id-{i}" for i in range(begin, end)],
                codes=rng.integers(0, 16, (size, layout.code_bytes), dtype=np.uint8),
                features=rng.random((size, layout.dim)).astype(layout.feature_dtype.numpy),
                payloads=[rng.bytes(i) for i in range(size)],
                tags=[("a", "b")[: i % 3] for i in range(size)],
                expires_unix_ms=[i % 2 for i in range(size)],
            )
            writer.write(part)
    return path.read_bytes()


def test_numpy_and_pyarrow_read_what_is_written(tmp_path: Path) -> None:
    written(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert set(arrays) == {*good(), "ids_ends", "tags_ends"}
    ends = arrays["ids_ends"].tolist()
    ids = [arrays["ids"][a:b].tobytes().decode() for a, b in zip([0, *ends], ends, strict=False)]
    assert ids == [f"id-{i}" for i in range(N)]
    for suffix in ("parquet", "arrow"):
        path = tmp_path / f"a.{suffix}"
        written(path)
        found = (
            pq.read_table(path) if suffix == "parquet" else pa.ipc.open_file(str(path)).read_all()
        )
        assert found["ids"].to_pylist() == ids
        assert found.schema.field("codes").type == pa.binary(2)
        assert found.schema.field("features").type == pa.list_(pa.float32(), 3)
        assert found.schema.metadata[b"hashlens.n_bits"] == b"12"
        assert b"".join(found["codes"].to_pylist()) == arrays["codes"].tobytes()
        assert check(path) == N


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_refused_or_read(tmp_path: Path, suffix: str) -> None:
    whole = written(tmp_path / f"whole.{suffix}")
    path = tmp_path / f"a.{suffix}"
    rng = np.random.default_rng(4)
    n_refused = 0
    lengths = [0, 1, len(whole) // 2, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()]
    damaged = [whole[:length] for length in lengths]
    for position in rng.integers(0, len(whole), 150).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for n, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            check(path)
        except (InvalidInputError, PreconditionError):
            n_refused += 1
        else:
            assert n >= len(lengths), "a file that was cut off was read"
    assert n_refused >= len(lengths)


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 2)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("codes.npy", header.getvalue())
        archive.writestr("ids.npy", b"\x93NUMPY")
    with pytest.raises(InvalidInputError, match="as long as its shape") as caught:
        check(path)
    assert caught.value.field == "a.npz: codes"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(KeyboardInterrupt), writing(path, LAYOUT):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    written(path)
    with pytest.raises(AlreadyExistsError), writing(path, LAYOUT):
        raise AssertionError("not reached")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for suffix in ("parquet", "arrow"):
        with (
            pytest.raises(PreconditionError, match=r"pip install 'hashlens\[arrow\]'"),
            writing(tmp_path / f"a.{suffix}", LAYOUT),
        ):
            raise AssertionError("not reached")
    assert len(written(tmp_path / "a.npz")) > 0


def test_what_does_not_fit_the_collection_is_refused() -> None:
    wide = CollectionSpec("c", "m", 12, 4, FeatureDtype.F32)
    with pytest.raises(PreconditionError, match="3 numbers, those of c have 4"):
        checks.check_layout(wide, LAYOUT, may_round=False)
    half = CollectionSpec("c", "m", 12, 3, FeatureDtype.F16)
    with pytest.raises(PreconditionError, match="--dtype f16 rounds"):
        checks.check_layout(half, LAYOUT, may_round=False)
    checks.check_layout(half, LAYOUT, may_round=True)
    checks.check_layout(SPEC, Layout(2, 3, FeatureDtype.F16), may_round=False)
    large = Columns(
        ["a"], np.zeros((1, 2), np.uint8), np.full((1, 3), 1e6, np.float32), [b""], [()], [0]
    )
    with pytest.raises(InvalidInputError, match="overflows float16"):
        checks.check_part(checks.fitted(large, half), 12, 0)
