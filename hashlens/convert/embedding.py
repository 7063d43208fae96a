"""Messages of `embedding.proto` and `encoder_service.proto`."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf import json_format, struct_pb2
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError
from hashlens.types import (
    MAX_DIM,
    Classifier,
    Embedding,
    EncodeTimings,
    FeatureDtype,
    ModelInfo,
)
from hashlens.v1 import embedding_pb2 as epb
from hashlens.v1 import encoder_service_pb2 as enc

_DTYPE_TO_PROTO = {
    FeatureDtype.F32: epb.FEATURE_DTYPE_F32,
    FeatureDtype.F16: epb.FEATURE_DTYPE_F16,
}


def dtype_to_proto(dtype: FeatureDtype | None) -> epb.FeatureDtype.ValueType:
    """Return the wire form; None is unspecified."""
    return epb.FEATURE_DTYPE_UNSPECIFIED if dtype is None else _DTYPE_TO_PROTO[dtype]


def dtype_from_proto(number: int, *, field: str = "feature_dtype") -> FeatureDtype | None:
    """Return the member, or None where the message leaves it open."""
    if number == epb.FEATURE_DTYPE_UNSPECIFIED:
        return None
    for dtype, known in _DTYPE_TO_PROTO.items():
        if number == known:
            return dtype
    raise InvalidInputError(f"{number} is no feature dtype: use F32 or F16", field=field)


def feature_to_proto(feature: NDArray[Any]) -> epb.Feature:
    """Return the wire form of a float32 or float16 array of shape ``[dim]``."""
    dtype = FeatureDtype.of(feature)
    return epb.Feature(values=feature.tobytes(), dtype=_DTYPE_TO_PROTO[dtype], dim=feature.shape[0])


def feature_from_proto(message: epb.Feature) -> NDArray[Any]:
    """Return a read-only view of the message's bytes, shape ``[dim]``.

    Raises
    ------
    InvalidInputError
        Unknown dtype, a length that is not ``dim`` numbers, or a number that is not finite.
    """
    dtype = dtype_from_proto(message.dtype, field="dtype")
    if dtype is None:
        raise InvalidInputError("say how the numbers are written: F32 or F16", field="dtype")
    values = message.values
    if not 1 <= message.dim <= MAX_DIM:
        raise InvalidInputError(
            f"dim is {message.dim}: a feature has 1 to {MAX_DIM} numbers", field="dim"
        )
    if len(values) != message.dim * dtype.n_bytes:
        raise InvalidInputError(
            f"{len(values)} bytes are not {message.dim} numbers of {dtype.n_bytes} bytes: "
            "send dim numbers, little-endian, without padding",
            field="values",
        )
    feature = np.frombuffer(values, dtype=dtype.numpy)
    if not all_finite(feature):
        raise InvalidInputError(
            f"number {int(np.flatnonzero(~np.isfinite(feature))[0])} is not finite: "
            "mend the feature, or store as f32 what overflows f16",
            field="values",
        )
    return feature


_AT_ONCE = 1 << 18
"""Numbers that are looked at before they leave the cache."""


def all_finite(features: NDArray[Any]) -> bool:
    """Tell whether no number is NaN or infinity; there is at least one."""
    if features.dtype.itemsize == 2:
        # Their exponents are all ones; NumPy's own look at a float16 takes four times as long.
        numbers = features.view("<u2").reshape(-1)
        return all(
            int((numbers[lo : lo + _AT_ONCE] & 0x7FFF).max()) < 0x7C00
            for lo in range(0, numbers.shape[0], _AT_ONCE)
        )
    return bool(np.isfinite(features).all())


def code_from_proto(message: epb.Code) -> tuple[bytes, int]:
    """Return (packed bytes, n_bits), checked for length and padding."""
    n_bits, bits = message.n_bits, message.bits
    if not 1 <= n_bits <= codes.MAX_BITS:
        raise InvalidInputError(
            f"n_bits is {n_bits}: a code has 1 to {codes.MAX_BITS} bits", field="n_bits"
        )
    if len(bits) != codes.n_bytes(n_bits):
        raise InvalidInputError(
            f"{len(bits)} bytes do not hold {n_bits} bits: send {codes.n_bytes(n_bits)} bytes",
            field="bits",
        )
    if not codes.padding_is_zero(bits, n_bits):
        raise InvalidInputError(
            f"the unused high bits of the last byte must be zero: {n_bits} bits fill only "
            f"{n_bits % 8} of its 8",
            field="bits",
        )
    return bits, n_bits


def embedding_to_proto(embedding: Embedding) -> epb.Embedding:
    """Return the wire form."""
    message = epb.Embedding(
        code=epb.Code(bits=embedding.code, n_bits=embedding.n_bits), model_id=embedding.model_id
    )
    if embedding.feature is not None:
        message.feature.CopyFrom(feature_to_proto(embedding.feature))
    if embedding.activations is not None:
        message.activations.values = embedding.activations.astype("<f4").tobytes()
    return message


def embedding_from_proto(message: epb.Embedding) -> Embedding:
    """Return the value; feature and activations are read-only views of the message's bytes.

    Raises
    ------
    InvalidInputError
        As `code_from_proto` and `feature_from_proto`; activations of another length or range.
    """
    if not message.HasField("code"):
        raise InvalidInputError("an embedding needs a code", field="code")
    try:
        bits, n_bits = code_from_proto(message.code)
    except InvalidInputError as error:
        raise error.within("code") from None
    feature = None
    if message.HasField("feature"):
        try:
            feature = feature_from_proto(message.feature)
        except InvalidInputError as error:
            raise error.within("feature") from None
    activations = None
    if message.HasField("activations"):
        values = message.activations.values
        if len(values) != 4 * n_bits:
            raise InvalidInputError(
                f"{len(values)} bytes are not {n_bits} float32 numbers: send one for each bit",
                field="activations.values",
            )
        activations = np.frombuffer(values, dtype="<f4")
        if not bool(np.all((activations >= 0) & (activations <= 1))):
            raise InvalidInputError(
                "activations lie in 0..1: send the sigmoid's outputs", field="activations.values"
            )
    return Embedding(
        code=bits,
        n_bits=n_bits,
        model_id=message.model_id,
        feature=feature,
        activations=activations,
    )


def encode_timings_to_proto(timings: EncodeTimings) -> enc.EncodeTimings:
    """Return the wire form."""
    return enc.EncodeTimings(
        decode_ns=timings.decode_ns,
        queue_ns=timings.queue_ns,
        inference_ns=timings.inference_ns,
        total_ns=timings.total_ns,
        batch_items=timings.batch_items,
    )


def encode_timings_from_proto(message: enc.EncodeTimings) -> EncodeTimings:
    """Return the value."""
    return EncodeTimings(
        decode_ns=message.decode_ns,
        queue_ns=message.queue_ns,
        inference_ns=message.inference_ns,
        total_ns=message.total_ns,
        batch_items=message.batch_items,
    )


def model_to_proto(model: ModelInfo) -> enc.GetModelResponse:
    """Return the wire form."""
    preprocessing = struct_pb2.Struct()
    preprocessing.update(dict(model.preprocessing))
    return enc.GetModelResponse(
        model_id=model.model_id,
        backbone=model.backbone,
        n_bits=model.n_bits,
        dim=model.dim,
        classes=model.classes,
        preprocessing=preprocessing,
        limits=enc.EncoderLimits(
            max_image_bytes=model.max_image_bytes,
            max_image_pixels=model.max_image_pixels,
            max_batch_items=model.max_batch_items,
            max_message_bytes=model.max_message_bytes,
        ),
        metrics=model.metrics,
        licence=model.licence,
        feature_dtype=_DTYPE_TO_PROTO[model.feature_dtype],
        device=model.device,
        classifier=None if model.classifier is None else _classifier_to_proto(model.classifier),
    )


def model_from_proto(message: enc.GetModelResponse) -> ModelInfo:
    """Return the value.

    Raises
    ------
    InvalidInputError
        A classifier that does not fit the model's bits and classes, or is not finite.
    """
    return ModelInfo(
        model_id=message.model_id,
        backbone=message.backbone,
        n_bits=message.n_bits,
        dim=message.dim,
        classes=tuple(message.classes),
        preprocessing=json_format.MessageToDict(message.preprocessing),
        metrics=dict(message.metrics),
        licence=message.licence,
        max_image_bytes=message.limits.max_image_bytes,
        max_image_pixels=message.limits.max_image_pixels,
        max_batch_items=message.limits.max_batch_items,
        max_message_bytes=message.limits.max_message_bytes,
        feature_dtype=dtype_from_proto(message.feature_dtype) or FeatureDtype.F32,
        device=message.device,
        classifier=_classifier_from_proto(message) if message.HasField("classifier") else None,
    )


def _classifier_to_proto(classifier: Classifier) -> enc.Classifier:
    return enc.Classifier(
        weights=classifier.weights.astype("<f4").tobytes(),
        bias=classifier.bias.astype("<f4").tobytes(),
    )


def _classifier_from_proto(message: enc.GetModelResponse) -> Classifier:
    """Return read-only views of the message's bytes."""
    n_classes, n_bits = len(message.classes), message.n_bits
    weights, bias = message.classifier.weights, message.classifier.bias
    if len(weights) != 4 * n_classes * n_bits or len(bias) != 4 * n_classes:
        raise InvalidInputError(
            f"{len(weights)} and {len(bias)} bytes are no classifier of {n_classes} classes over "
            f"{n_bits} bits: send float32 numbers, little-endian",
            field="classifier",
        )
    classifier = Classifier(
        np.frombuffer(weights, dtype="<f4").reshape(n_classes, n_bits),
        np.frombuffer(bias, dtype="<f4"),
    )
    if not (np.isfinite(classifier.weights).all() and np.isfinite(classifier.bias).all()):
        raise InvalidInputError("the classifier holds NaN or infinity", field="classifier")
    return classifier
