"""HashNet: a classifier whose last hidden layer is the code.

Lin, Yang, Hsiao, Chen, "Deep Learning of Binary Hash Codes for Fast Image Retrieval", CVPR
Workshops 2015, section 3.1: between F7 and the classifier F8 goes a fully connected layer H with a
sigmoid, one unit per bit. F8 sees only H, so what tells classes apart has to pass through it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from encoder_service.model.backbones import get_backbone
from hashlens.codes import MAX_BITS
from hashlens.errors import InvalidInputError

HashNorm = Literal["none", "batch"]
"""What stands between the linear layer of H and its sigmoid: nothing, or batch normalisation."""


class HashOutput(NamedTuple):
    """What one forward pass gives."""

    features: Tensor
    """F7, float, shape ``[n, dim]``."""
    activations: Tensor
    """H, float in 0..1, shape ``[n, n_bits]``; the code is ``activations > 0.5``."""
    logits: Tensor
    """F8 before the softmax, float, shape ``[n, n_classes]``."""
    scores: Tensor
    """H before its sigmoid, float, shape ``[n, n_bits]``; what most losses on codes work on."""


class HashNet(nn.Module):
    """Backbone -> F7 -> H -> classifier.

    Parameters
    ----------
    backbone
        Name in `encoder_service.model.backbones.BACKBONES`.
    n_bits
        Code length, 1 to 512 bits.
    n_classes
        How many classes F8 tells apart, at least 2.
    hash_norm
        ``"none"`` as in the paper. ``"batch"`` centres every bit over the training set, which
        keeps bits from being always on or always off when training starts from scratch.

    Raises
    ------
    InvalidInputError
        An argument is out of its range.
    """

    def __init__(
        self, backbone: str, n_bits: int, n_classes: int, hash_norm: HashNorm = "none"
    ) -> None:
        super().__init__()
        entry = get_backbone(backbone)
        if not 1 <= n_bits <= MAX_BITS:
            raise InvalidInputError(f"n_bits is 1 to {MAX_BITS}, not {n_bits}.", field="n_bits")
        if n_classes < 2:
            raise InvalidInputError(
                f"a classifier needs at least 2 classes, not {n_classes}.", field="classes"
            )
        if hash_norm not in get_args(HashNorm):
            raise InvalidInputError(
                f"hash_norm is 'none' or 'batch', not {hash_norm!r}.", field="hash_norm"
            )
        self.backbone_name = backbone
        self.dim = entry.dim
        self.n_bits = n_bits
        self.n_classes = n_classes
        self.hash_norm_name: HashNorm = hash_norm
        self.detach_classifier = False
        """Whether, in training, F8 learns to read H without shaping it."""
        self.backbone = entry.build()
        self.dropout = nn.Dropout(entry.dropout)
        self.hash_layer = nn.Linear(entry.dim, n_bits)
        self.hash_norm = nn.BatchNorm1d(n_bits) if hash_norm == "batch" else nn.Identity()
        self.classifier = nn.Linear(n_bits, n_classes)
        # As in the author's training files.
        nn.init.normal_(self.hash_layer.weight, std=0.005)
        nn.init.ones_(self.hash_layer.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> HashOutput:
        """Run images through.

        Parameters
        ----------
        images
            Normalised float, shape ``[n, 3, s, s]``.

        Returns
        -------
        HashOutput
            F7, H, the class scores, and H before its sigmoid.
        """
        features: Tensor = self.backbone(images)
        scores = self.hash_norm(self.hash_layer(self.dropout(features)))
        activations = torch.sigmoid(scores)
        read = activations.detach() if self.detach_classifier else activations
        return HashOutput(features, activations, self.classifier(read), scores)
