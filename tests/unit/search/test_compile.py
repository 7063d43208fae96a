from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numba
import pytest

import hashlens
import search_service
from search_service.kernels import euclidean, hamming, sketch
from tests.support import answers

# A busy machine may take minutes to compile all kernels without a cache.
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[3]

FULL_DISK = """
import logging, resource
import numpy as np
logging.basicConfig(level=logging.INFO, format="%(message)s")
from search_service.kernels import hamming, lists
states = np.zeros((1, 1, hamming.N_STATE), dtype=np.int64)
states[0, 0, hamming.N_STORED] = 1
rows, bits = np.array([[[5]]]), np.array([[[7]]], dtype=np.uint16)
out = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.uint16)
print(lists.gather(states, rows, bits, 0, 9, *out))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # from here on every write to a file fails
counts = np.zeros((1, 1, 10), dtype=np.int64)
counts[0, 0, 7] = 1
balls, summary = np.zeros((1, 10), dtype=np.int64), np.zeros((1, 2), dtype=np.int64)
lists.settle(states, counts, balls, summary)
print(balls[0, 7])
"""


def python(*args: str, tree: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a source tree, with nothing of Numba's in the environment but `env`."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_"))
    }
    done = subprocess.run(
        [sys.executable, *args],
        cwd=tree,
        env=inherited | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def read_only_tree(tmp_path: Path) -> Path:
    """A copy of the packages beside which no cache can be made, not even by root.

    Permissions do not bind root, so a file stands where the directory would have to be.
    """
    tree = tmp_path / "tree"
    without = shutil.ignore_patterns("__pycache__", "storage")
    for package in (hashlens, search_service):
        source = Path(package.__path__[0])
        shutil.copytree(source, tree / source.name, ignore=without)
    support = Path(answers.__file__)
    (tree / "tests/support").mkdir(parents=True)
    shutil.copy(support, tree / "tests/support" / support.name)
    (tree / "search_service/kernels/__pycache__").write_bytes(b"")
    return tree


@pytest.fixture(scope="module")
def here() -> str:
    """The digest of all answers in this process."""
    return answers.digest(n_threads=numba.config.NUMBA_NUM_THREADS)


def test_every_threading_layer_gives_the_same_answers(here: str) -> None:
    done = python(
        "-m",
        "tests.support.answers",
        "3",
        NUMBA_THREADING_LAYER="workqueue",
        NUMBA_NUM_THREADS="3",
    )
    assert "threading layer workqueue, 3 threads" in done.stderr
    assert done.stdout.strip() == here


def test_openmp_is_what_this_process_ran_on(caplog: pytest.LogCaptureFixture, here: str) -> None:
    # The other half of the test above.
    pytest.importorskip(
        "numba.np.ufunc.omppool", reason="no OpenMP runtime here", exc_type=ImportError
    )
    with caplog.at_level(logging.INFO):
        assert answers.digest(n_threads=1) == here
    assert "threading layer omp, 1 threads" in caplog.text


def test_the_plainest_cpu_and_a_read_only_tree_give_the_same_answers(
    here: str, read_only_tree: Path
) -> None:
    # No vector unit beyond the baseline, no conversion of half precision, no place for a cache.
    done = python(
        "-m",
        "tests.support.answers",
        "1",
        tree=read_only_tree,
        HOME=str(read_only_tree / "search_service/kernels/__pycache__/home"),
        NUMBA_CPU_NAME="generic",
        NUMBA_CPU_FEATURES="",
    )
    assert "scan: not cached" in done.stderr
    assert done.stdout.strip() == here


def test_the_cache_is_used_until_the_disk_is_full(tmp_path: Path) -> None:
    done = python("-c", FULL_DISK, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.stdout == "1\n1\n"
    assert "gather: not cached" not in done.stderr
    assert list(tmp_path.rglob("lists.gather*.nbc"))
    assert "settle: not cached" in done.stderr


def test_the_scan_is_vectorised() -> None:
    features = llvmlite.binding.get_host_cpu_features()
    if not features.get("avx2"):
        pytest.skip("not an x86 CPU with AVX2")
    assembly = hamming.scan.assembly()
    assert ("vpopcnt" if features.get("avx512vpopcntdq") else "vpshufb") in assembly
    if features.get("avx512vpopcntdq"):
        assert "vpminuq" in assembly


def test_the_sum_of_squares_is_not_fused() -> None:
    if "x86_64" not in llvmlite.binding.get_process_triple():
        pytest.skip("the names of the instructions are x86's")
    assembly = euclidean.distances.assembly()
    assert "mulps" in assembly
    assert "fmadd" not in assembly


def test_rows_are_asked_for_ahead_and_codes_multiplied_in_pairs() -> None:
    features = llvmlite.binding.get_host_cpu_features()
    if not features.get("avx2"):
        pytest.skip("not an x86 CPU with AVX2")
    assert "prefetcht1" in euclidean.distances.assembly()
    assembly = sketch.bounds.assembly()
    assert "prefetcht1" in assembly
    assert "vpmaddwd" in assembly or "vpdpwssd" in assembly
