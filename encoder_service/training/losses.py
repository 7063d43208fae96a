"""What training makes small: a function of one forward pass and the labels.

Labels are class positions, int64 ``[n]``, or, where an image may have several, float 0 and 1,
``[n, n_classes]``. `OrthoHash` and `Csq` shape H by themselves; there the classifier, which serving
needs for explanations, learns to read H without changing it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional
from numpy.typing import NDArray
from torch import Tensor, nn

from encoder_service.model.network import HashOutput
from encoder_service.training.recipe import Recipe
from hashlens.errors import InvalidInputError

_TARGET_TRIES = 5_000
"""Random draws of which the best is taken as the classes' targets."""

_HADAMARD_TRIES = 200
"""The same of rows of Hadamard's matrix, which are as far apart in any draw."""


def make_loss(recipe: Recipe, n_classes: int, *, multi_label: bool = False) -> HashLoss:
    """Make the loss that a recipe names.

    Parameters
    ----------
    recipe
        Its ``loss`` and that loss's settings.
    n_classes
        How many classes there are.
    multi_label
        Whether an image may have several labels.

    Raises
    ------
    InvalidInputError
        The recipe is the author's of 2015, whose softmax knows one label an image.
    """
    if multi_label and recipe.recipe in ("lin2015", "lin2015-modern"):
        raise InvalidInputError(
            f"{recipe.recipe} is softmax over classes, for one label an image. These images have "
            "several: use recipe orthohash, csq or ssdh.",
            field="recipe",
        )
    match recipe.loss:
        case "softmax":
            return Softmax(recipe.label_smoothing, multi_label)
        case "ssdh":
            return Ssdh(recipe, multi_label)
        case "orthohash":
            return OrthoHash(recipe, class_targets(n_classes, recipe.n_bits), multi_label)
        case "csq":
            return Csq(recipe, class_targets(n_classes, recipe.n_bits), multi_label)


class HashLoss(nn.Module, ABC):
    """Base of the losses.

    Attributes
    ----------
    shapes_by_classifier
        Whether H learns through the classifier. If not, `HashNet.detach_classifier` is to be set.

    Parameters
    ----------
    label_smoothing
        Share of the target spread over all classes; of one label an image only.
    multi_label
        Whether labels are 0 and 1 by class instead of positions.
    """

    shapes_by_classifier = True

    def __init__(self, label_smoothing: float, multi_label: bool) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.multi_label = multi_label

    @abstractmethod
    def forward(self, output: HashOutput, labels: Tensor) -> Tensor:
        """Return the loss, a scalar in float32.

        Parameters
        ----------
        output
            Of one forward pass, in training mode.
        labels
            See the module.
        """

    def classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy: softmax for one label an image, else one sigmoid a class."""
        if self.multi_label:
            return torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        return torch.nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing
        )

    def class_weights(self, labels: Tensor, n_classes: int) -> Tensor:
        """Return each image's labels as shares that sum to 1: float ``[n, n_classes]``."""
        if self.multi_label:
            return labels / labels.sum(1, keepdim=True).clamp(min=1)
        return torch.nn.functional.one_hot(labels, n_classes).float()


class Softmax(HashLoss):
    """Cross-entropy of the classes and nothing else: Lin et al. 2015, section 3.2."""

    def forward(self, output: HashOutput, labels: Tensor) -> Tensor:
        """Return the loss."""
        return self.classification(output.logits, labels)


class Ssdh(HashLoss):
    """Cross-entropy, a push of H away from 0.5, and a pull to half of the bits at 1.

    Yang, Lin, Chen, TPAMI 2018, with squares in both terms, each as a mean over images; the push
    divided by the largest value it can have, 1/4. For several labels an image, one sigmoid a class.
    """

    def __init__(self, recipe: Recipe, multi_label: bool) -> None:
        super().__init__(recipe.label_smoothing, multi_label)
        self.push_weight = recipe.push_weight
        self.fire_weight = recipe.fire_weight

    def forward(self, output: HashOutput, labels: Tensor) -> Tensor:
        """Return the loss."""
        activations = output.activations.float()
        push = 1 - 4 * (activations - 0.5).square().mean()
        fire = (activations.mean(1) - 0.5).square().mean()
        return (
            self.classification(output.logits, labels)
            + self.push_weight * push
            + self.fire_weight * fire
        )


class OrthoHash(HashLoss):
    """Cosine of the scores to fixed targets, one a class, by cross-entropy with a margin.

    Hoe et al., NeurIPS 2021: the margin is taken from the cosine to the own class, the cosines are
    scaled. Several labels an image share the target evenly.

    With a structure weight, which the paper does not have, the cosine between the scores of two
    images is drawn to the cosine between their F7, by its mean square over the pairs of a batch.
    That keeps what no class tells apart, and with it classes that were never seen.
    """

    shapes_by_classifier = False
    targets: Tensor

    def __init__(self, recipe: Recipe, targets: NDArray[np.int8], multi_label: bool) -> None:
        super().__init__(recipe.label_smoothing, multi_label)
        self.margin = recipe.margin
        self.scale = recipe.scale or math.sqrt(targets.shape[1])
        self.structure_weight = recipe.structure_weight
        unit = torch.from_numpy(targets.astype(np.float32)) / math.sqrt(targets.shape[1])
        self.register_buffer("targets", unit, persistent=False)

    def forward(self, output: HashOutput, labels: Tensor) -> Tensor:
        """Return the loss."""
        directions = torch.nn.functional.normalize(output.scores.float(), dim=1)
        cosines = directions @ self.targets.T
        wanted = self.class_weights(labels, len(self.targets))
        logits = self.scale * (cosines - self.margin * (wanted > 0))
        smooth = (1 - self.label_smoothing) * wanted + self.label_smoothing / len(self.targets)
        loss = -(smooth * logits.log_softmax(1)).sum(1).mean()
        if self.structure_weight:
            loss = loss + self.structure_weight * _structure_gap(directions, output.features)
        return loss + self.classification(output.logits, labels)


def _structure_gap(directions: Tensor, features: Tensor) -> Tensor:
    """Return the mean square between pairs' cosines in code and in F7, which learns nothing."""
    wanted = torch.nn.functional.normalize(features.detach().float(), dim=1)
    gaps = directions @ directions.T - wanted @ wanted.T
    return gaps.square().sum() / (len(gaps) * (len(gaps) - 1))


class Csq(HashLoss):
    """Cross-entropy of each bit with that of the class's centre, and a pull of H to 0 and 1.

    Yuan et al., CVPR 2020. Several labels an image: the majority of their centres, bit by bit.
    Label smoothing draws each bit's target towards 0.5, which the paper does not do; 0 gives the
    paper's.
    """

    shapes_by_classifier = False
    targets: Tensor

    def __init__(self, recipe: Recipe, targets: NDArray[np.int8], multi_label: bool) -> None:
        super().__init__(recipe.label_smoothing, multi_label)
        self.quantisation_weight = recipe.quantisation_weight
        self.register_buffer(
            "targets", torch.from_numpy(targets.astype(np.float32)), persistent=False
        )

    def forward(self, output: HashOutput, labels: Tensor) -> Tensor:
        """Return the loss."""
        scores = output.scores.float()
        # Sums of -1 and 1, exact. Where the labels' centres are at odds, in equal numbers, the bit
        # of the first class there is decides.
        centres = (self.class_weights(labels, len(self.targets)) > 0).float() @ self.targets
        centres = torch.where(centres == 0, self.targets[0], centres.sign())
        wanted = 0.5 + (1 - self.label_smoothing) * centres / 2
        central = torch.nn.functional.binary_cross_entropy_with_logits(scores, wanted)
        gap = (2 * torch.sigmoid(scores) - 1).abs() - 1
        loss = central + self.quantisation_weight * torch.log(torch.cosh(gap)).sum(1).mean()
        return loss + self.classification(output.logits, labels)


def class_targets(n_classes: int, n_bits: int) -> NDArray[np.int8]:
    """Choose one code for each class, far from each other.

    Rows of Hadamard's matrix, with random signs, where `n_bits` is a power of two with enough rows:
    half of the bits differ between any two. Else random draws. Of many, the best by the smallest
    distance, then by how many bits split the classes in a way that no other bit does.

    Parameters
    ----------
    n_classes, n_bits
        How many codes of which length.

    Returns
    -------
    ndarray
        int8, -1 and 1, shape ``[n_classes, n_bits]``; the same for the same arguments.
    """
    random = np.random.default_rng([n_classes, n_bits])
    hadamard = n_bits & (n_bits - 1) == 0 and n_classes < n_bits
    rows = _hadamard(n_bits)[1:] if hadamard else None
    best: NDArray[np.int8] | None = None
    best_merit = (-1, -1, 0.0)
    pairs = np.triu_indices(n_classes, 1)
    # As many entries of a draw are looked at as keeps thousands of classes affordable.
    tries = max(1, min(_TARGET_TRIES, 20_000_000 // (n_classes * n_classes)))
    for _ in range(tries if rows is None else min(tries, _HADAMARD_TRIES)):
        if rows is None:
            draw = (random.integers(0, 2, (n_classes, n_bits)) * 2 - 1).astype(np.int8)
        else:
            draw = rows[random.choice(len(rows), n_classes, replace=False)]
            draw = draw * random.choice(np.array([-1, 1], np.int8), (n_classes, 1))
        products = (draw.astype(np.float32) @ draw.T.astype(np.float32))[pairs]
        distance = int((n_bits - products.max()) / 2)
        if distance < best_merit[0]:
            continue
        merit = (
            distance,
            0 if rows is None else _n_splits(draw),
            -float(np.square(products).mean()),
        )
        if merit > best_merit:
            best, best_merit = draw, merit
    assert best is not None, "at least one draw"
    return best


def _hadamard(n: int) -> NDArray[np.int8]:
    """Return Sylvester's matrix of -1 and 1, shape ``[n, n]``, for a power of two."""
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _n_splits(targets: NDArray[np.int8]) -> int:
    """Count the different ways in which bits split the classes; a bit all share splits none."""
    columns = targets * targets[:1]
    return int((np.unique(columns, axis=1) != 1).any(axis=0).sum())
