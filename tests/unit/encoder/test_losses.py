"""Losses against the same sums written down again in NumPy, float64."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from encoder_service.model.network import HashNet, HashOutput
from encoder_service.training.losses import HashLoss, class_targets, make_loss
from encoder_service.training.recipe import Recipe, make_recipe
from hashlens.errors import InvalidInputError

N, N_BITS, N_CLASSES = 6, 7, 3


def outputs(seed: int = 0) -> HashOutput:
    """A forward pass's result, of which `scores` and `logits` are leaves."""
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(N, N_BITS, generator=generator)).requires_grad_()
    logits = torch.randn(N, N_CLASSES, generator=generator).requires_grad_()
    return HashOutput(torch.zeros(N, 4), torch.sigmoid(scores), logits, scores)


ONE_LABEL = np.array([0, 1, 2, 2, 1, 0])
SEVERAL = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=float)


def recipe(name: str, **changes: Any) -> Recipe:
    return make_recipe(name, n_bits=N_BITS, **changes)  # type: ignore[arg-type]


def value(loss: HashLoss, output: HashOutput, labels: NDArray[Any]) -> float:
    given = torch.from_numpy(labels.astype(np.int64 if labels.ndim == 1 else np.float32))
    return float(loss(output, given).detach())


# --- the sums again ---


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def binary_cross_entropy(p: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    return float(-(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).mean())


def cross_entropy(output: HashOutput, labels: NDArray[Any], smoothing: float) -> float:
    logits = output.logits.detach().double().numpy()
    if labels.ndim == 2:
        return binary_cross_entropy(sigmoid(logits), labels)
    total = 0.0
    for row, label in zip(log_softmax(logits), labels, strict=True):
        for position, log_share in enumerate(row):
            wanted = (1 - smoothing) * (position == label) + smoothing / N_CLASSES
            total -= wanted * log_share
    return total / N


def ssdh(output: HashOutput, push_weight: float, fire_weight: float) -> float:
    h = output.activations.detach().double().numpy()
    push = np.mean([1 - np.mean((2 * (row - 0.5)) ** 2) for row in h])
    fire = np.mean([(np.mean(row) - 0.5) ** 2 for row in h])
    return float(push_weight * push + fire_weight * fire)


def orthohash(
    output: HashOutput, labels: NDArray[Any], margin: float, scale: float, smoothing: float
) -> float:
    scores = output.scores.detach().double().numpy()
    targets = class_targets(N_CLASSES, N_BITS).astype(float)
    total = 0.0
    for row, label in zip(scores, labels, strict=True):
        own = [int(label)] if labels.ndim == 1 else np.flatnonzero(label).tolist()
        cosines = [t @ row / np.linalg.norm(t) / np.linalg.norm(row) for t in targets]
        logits = [scale * (c - margin * (i in own)) for i, c in enumerate(cosines)]
        log_shares = log_softmax(np.array([logits]))[0]
        for i in range(N_CLASSES):
            wanted = (1 - smoothing) * (i in own) / max(len(own), 1) + smoothing / N_CLASSES
            total -= wanted * log_shares[i]
    return total / N


def csq(output: HashOutput, labels: NDArray[Any], weight: float, smoothing: float) -> float:
    scores = output.scores.detach().double().numpy()
    targets = class_targets(N_CLASSES, N_BITS).astype(float)
    central, quantisation = 0.0, 0.0
    for row, label in zip(scores, labels, strict=True):
        own = [int(label)] if labels.ndim == 1 else np.flatnonzero(label).tolist()
        for bit in range(N_BITS):
            votes = sum(targets[i, bit] for i in own)
            centre = np.sign(votes) if votes else targets[0, bit]
            # Smoothing moves 0 and 1 towards 0.5 by half of it.
            wanted = (centre + 1) / 2 * (1 - smoothing) + smoothing / 2
            h = sigmoid(row[bit])
            central -= wanted * np.log(h) + (1 - wanted) * np.log(1 - h)
            quantisation += np.log(np.cosh(abs(2 * h - 1) - 1))
    return central / N / N_BITS + weight * quantisation / N


# --- against them ---


@pytest.mark.parametrize("labels", [ONE_LABEL, SEVERAL], ids=["one label", "several"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ssdh(labels: NDArray[Any], smoothing: float) -> None:
    chosen = recipe("ssdh", push_weight=0.7, fire_weight=3.0, label_smoothing=smoothing)
    loss = make_loss(chosen, N_CLASSES, multi_label=labels.ndim == 2)
    output = outputs()
    expected = cross_entropy(output, labels, smoothing) + ssdh(output, 0.7, 3.0)
    assert value(loss, output, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_cross_entropy_and_nothing_else(smoothing: float) -> None:
    loss = make_loss(recipe("lin2015", label_smoothing=smoothing), N_CLASSES)
    output = outputs()
    expected = cross_entropy(output, ONE_LABEL, smoothing)
    assert value(loss, output, ONE_LABEL) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", [ONE_LABEL, SEVERAL], ids=["one label", "several"])
@pytest.mark.parametrize(
    ("margin", "scale", "smoothing"), [(0.2, 0.0, 0.1), (0.0, 4.0, 0.0), (0.5, 11.0, 0.3)]
)
def test_orthohash(labels: NDArray[Any], margin: float, scale: float, smoothing: float) -> None:
    chosen = recipe("orthohash", margin=margin, scale=scale, label_smoothing=smoothing)
    loss = make_loss(chosen, N_CLASSES, multi_label=labels.ndim == 2)
    output = outputs()
    expected = orthohash(output, labels, margin, scale or np.sqrt(N_BITS), smoothing)
    expected += cross_entropy(output, labels, smoothing)
    assert value(loss, output, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", [ONE_LABEL, SEVERAL], ids=["one label", "several"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_csq(labels: NDArray[Any], smoothing: float) -> None:
    chosen = recipe("csq", quantisation_weight=0.3, label_smoothing=smoothing)
    loss = make_loss(chosen, N_CLASSES, multi_label=labels.ndim == 2)
    output = outputs()
    expected = csq(output, labels, 0.3, smoothing) + cross_entropy(output, labels, smoothing)
    assert value(loss, output, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["orthohash", "csq", "ssdh", "lin2015-modern"])
def test_it_is_least_where_it_should_be(name: str) -> None:
    """Scores at the class's target and right classes cost less than any other class's."""
    loss = make_loss(recipe(name, label_smoothing=0.0), N_CLASSES)
    targets = torch.from_numpy(class_targets(N_CLASSES, N_BITS)).float()
    right, wrong = torch.eye(N_CLASSES) * 9, torch.eye(N_CLASSES).roll(1, 0) * 9
    labels = np.arange(N_CLASSES)

    def at(scores: torch.Tensor, logits: torch.Tensor) -> float:
        return value(loss, HashOutput(scores, torch.sigmoid(scores), logits, scores), labels)

    best = at(9 * targets, right)
    assert best < at(9 * targets, wrong)
    if name in ("orthohash", "csq"):
        assert best < at(9 * targets.roll(1, 0), right)
    if name in ("ssdh", "csq"):
        assert best < at(0.1 * targets, right)


# --- who learns from it ---


@pytest.mark.parametrize(
    ("name", "multi_label"),
    [
        *((name, multi) for name in ("orthohash", "csq", "ssdh") for multi in (False, True)),
        ("lin2015-modern", False),
    ],
)
def test_gradients_reach_h_by_the_way_that_is_meant(name: str, multi_label: bool) -> None:
    torch.manual_seed(0)
    loss = make_loss(recipe(name), N_CLASSES, multi_label=multi_label)
    network = HashNet("resnet9", N_BITS, N_CLASSES, "batch")
    network.detach_classifier = not loss.shapes_by_classifier
    labels = torch.from_numpy(SEVERAL).float() if multi_label else torch.from_numpy(ONE_LABEL)
    output = network(torch.randn(N, 3, 8, 8))

    loss(output, labels).backward(retain_graph=True)
    assert network.classifier.weight.grad is not None
    assert network.classifier.weight.grad.abs().sum() > 0
    for part in (network.hash_layer.weight, next(network.backbone.parameters())):
        assert part.grad is not None
        assert part.grad.abs().sum() > 0

    # Of the classification alone, H hears only where it is meant to learn by it.
    network.zero_grad()
    loss.classification(output.logits, labels).backward()
    heard = network.hash_layer.weight.grad is not None
    assert heard == (name in ("ssdh", "lin2015-modern"))


@pytest.mark.parametrize("name", ["lin2015", "lin2015-modern"])
def test_the_recipes_of_2015_know_one_label_an_image(name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"several: use recipe orthohash, csq or ssdh") as e:
        make_loss(recipe(name), N_CLASSES, multi_label=True)
    assert e.value.field == "recipe"


# --- the targets ---


def distances(targets: NDArray[np.int8]) -> list[int]:
    return [int((a != b).sum()) for a, b in itertools.combinations(targets, 2)]


@pytest.mark.parametrize(("n_classes", "n_bits"), [(2, 4), (10, 16), (63, 64), (100, 128)])
def test_hadamard_targets_differ_in_exactly_half(n_classes: int, n_bits: int) -> None:
    targets = class_targets(n_classes, n_bits)
    assert (targets.shape, targets.dtype) == ((n_classes, n_bits), np.int8)
    assert set(np.unique(targets)) == {-1, 1}
    assert set(distances(targets)) == {n_bits // 2}
    # As many bits on as off: what an even code needs.
    assert (targets.sum(axis=1) == 0).all()


@pytest.mark.parametrize(
    ("n_classes", "n_bits", "least"),
    [
        # Plotkin's bound for ten codes of 48 bits is 26.
        (10, 48, 21),
        (10, 12, 4),
        (10, 24, 9),
        (16, 16, 4),
        (100, 48, 12),
    ],
)
def test_random_targets_are_far_apart(n_classes: int, n_bits: int, least: int) -> None:
    targets = class_targets(n_classes, n_bits)
    assert set(np.unique(targets)) == {-1, 1}
    found = distances(targets)
    assert min(found) >= least
    assert abs(np.mean(found) - n_bits / 2) < 0.06 * n_bits


def test_targets_are_the_same_every_time() -> None:
    np.testing.assert_array_equal(class_targets(10, 48), class_targets(10, 48))
    assert not np.array_equal(class_targets(10, 48), class_targets(11, 48)[:10])


def test_a_thousand_classes_are_affordable() -> None:
    began = time.process_time()
    targets = class_targets(1000, 12)
    assert time.process_time() - began < 10
    assert targets.shape == (1000, 12)
    # 4096 codes there are; drawn at random, most classes have one of their own.
    assert len(np.unique(targets, axis=0)) > 800


@pytest.mark.parametrize("n_bits", [16, 32, 64, 128])
def test_targets_split_the_classes_in_as_many_ways_as_there_are_bits(n_bits: int) -> None:
    """The first rows of Sylvester's matrix, without more ado, have 16 different columns."""
    targets = class_targets(10, n_bits)
    columns = {tuple(column * column[0]) for column in targets.T}
    assert len(columns - {(1,) * 10}) >= n_bits - 2
    distances = [(a != b).sum() for i, a in enumerate(targets) for b in targets[:i]]
    assert set(distances) == {n_bits // 2}


def test_structure_is_the_mean_square_between_cosines_of_pairs() -> None:
    output = outputs()
    features = torch.randn(N, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
    output = output._replace(features=features)
    plain = make_loss(recipe("orthohash"), N_CLASSES)
    weighted = make_loss(recipe("orthohash", structure_weight=2.5), N_CLASSES)
    labels = torch.from_numpy(ONE_LABEL)
    got = weighted(output, labels) - plain(output, labels)

    def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    u, f = (t.detach().double().numpy() for t in (output.scores, features))
    gaps = [
        (cosine(u[i], u[j]) - cosine(f[i], f[j])) ** 2 for i in range(N) for j in range(N) if i != j
    ]
    assert got.item() == pytest.approx(2.5 * np.mean(gaps), rel=1e-4)
    got.backward()
    assert features.grad is None
