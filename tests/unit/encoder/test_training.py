"""The training loop: it learns, to the same result however it is interrupted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoder_service.data.images import ImageSet
from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing
from encoder_service.training.batches import Batches
from encoder_service.training.distributed import ALONE, Processes
from encoder_service.training.fit import StepReport, Trainer
from encoder_service.training.recipe import RECIPES
from encoder_service.training.state import load_state, save_state
from hashlens.errors import InvalidInputError
from tests.support.training import (
    CPU,
    PREPROCESSING,
    SIDE,
    flat_weights,
    make_trainer,
    patterns,
    small_recipe,
)


def finish(trainer: Trainer) -> torch.Tensor:
    """Train to the end; return all that would be served."""
    list(trainer.fit())
    return flat_weights(trainer.result)


# --- learning ---


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns(name: str) -> None:
    changes = {"optimizer": "adamw", "learning_rate": 0.003, "augment": "none", "ema": 0.0}
    recipe = small_recipe(name, epochs=4, steps=0, **changes)
    trainer = make_trainer(recipe, patterns(96), patterns(30, 1))
    steps: list[StepReport] = []
    reports = list(trainer.fit(on_step=steps.append))
    assert [report.step for report in steps] == list(range(1, 25))
    assert {report.steps for report in steps} == {24}
    assert all(report.images_per_s > 0 for report in steps)
    assert [(report.epoch, report.step) for report in reports] == [
        (1, 6),
        (2, 12),
        (3, 18),
        (4, 24),
    ]
    assert reports == trainer.reports
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].train_accuracy > 0.8
    # Chance: a third.
    assert reports[-1].holdout_map > 0.7
    assert not trainer.result.detach_classifier


@pytest.mark.parametrize("name", ["orthohash", "csq", "ssdh"])
def test_several_labels_an_image(name: str) -> None:
    recipe = small_recipe(name, epochs=6, augment="none", learning_rate=0.01, optimizer="adamw")
    watched = patterns(30, 1, multi_label=True)
    trainer = make_trainer(recipe, patterns(96, multi_label=True), watched)
    reports = list(trainer.fit())
    # Of (image, class) pairs; half of them are no. The best epoch's: ssdh's swing on these few
    # images, and how a CPU rounds decides where they end.
    best = max(report.train_accuracy for report in reports)
    assert best > max(0.6, reports[0].train_accuracy + 0.15)
    shares = (watched.labels[:, None] & watched.labels).any(axis=2)
    by_chance = (shares.sum() - 30) / (30 * 29)
    assert by_chance + 0.1 < reports[-1].holdout_map <= 1


def test_lin2015_at_its_own_size() -> None:
    """The author's network takes a step on 256 px pictures, of which it crops 227."""
    random = np.random.default_rng(0)
    images = ImageSet.from_pixels(
        random.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8), np.arange(2), ("a", "b")
    )
    recipe = small_recipe(
        "lin2015",
        backbone="alexnet",
        resize=256,
        crop=227,
        batch_size=2,
        learning_rate=0.001,
        steps=1,
    )
    trainer = make_trainer(recipe, images)
    list(trainer.fit())
    assert trainer.reports[0].step == 1
    # Weights of F8 this small know nothing yet: the loss is that of guessing between two.
    assert trainer.reports[0].loss == pytest.approx(math.log(2), rel=0.1)


def test_steps_go_before_epochs() -> None:
    trainer = make_trainer(small_recipe(epochs=50, steps=6))
    reports = list(trainer.fit())
    assert (trainer.steps, trainer.epochs) == (6, 2)
    assert [report.step for report in reports] == [4, 6]


def test_one_held_out_image_has_no_other_to_find() -> None:
    trainer = make_trainer(small_recipe(epochs=1), holdout=patterns(1, 1))
    (report,) = trainer.fit()
    assert math.isnan(report.holdout_map)
    assert report.holdout_accuracy in (0.0, 1.0)


def test_without_a_hold_out() -> None:
    (report,) = make_trainer(small_recipe(epochs=1)).fit()
    assert math.isnan(report.holdout_map)
    assert math.isnan(report.holdout_accuracy)


def test_the_average_is_what_is_served() -> None:
    trainer = make_trainer(small_recipe(ema=0.5))
    served = finish(trainer)
    last = trainer.state()["network"]
    assert not torch.equal(served, torch.cat([t.flatten().double() for t in last.values()]))
    plain = make_trainer(small_recipe(ema=0.0))
    finish(plain)
    # Watching does not change the watched.
    assert all(torch.equal(t, last[name]) for name, t in plain.state()["network"].items())


# --- the seed, and nothing else, decides ---


def test_the_seed_decides_everything() -> None:
    first = finish(make_trainer(small_recipe(seed=1, augment="strong")))
    assert torch.equal(finish(make_trainer(small_recipe(seed=1, augment="strong"))), first)
    assert not torch.equal(finish(make_trainer(small_recipe(seed=2, augment="strong"))), first)


def test_dropout_follows_the_seed_too() -> None:
    def weights(noise: int) -> torch.Tensor:
        recipe = small_recipe(backbone="mobilenet_v3_small", resize=32, crop=32, steps=2)
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
        images = ImageSet.from_pixels(pixels, np.arange(32) % 3, ("a", "b", "c"))
        trainer = make_trainer(recipe, images)
        torch.manual_seed(noise)
        return finish(trainer)

    assert torch.equal(weights(1), weights(2))


def test_the_number_of_workers_changes_nothing() -> None:
    one = finish(make_trainer(small_recipe(augment="strong"), n_workers=1))
    assert torch.equal(finish(make_trainer(small_recipe(augment="strong"), n_workers=5)), one)


def batches(world: int = 1, rank: int = 0, **changes: Any) -> Batches:
    recipe = small_recipe(**{"augment": "none", **changes})
    return Batches(patterns(70), PREPROCESSING, recipe, Processes(rank, world), 2)


def test_an_epoch_shows_every_image_at_most_once() -> None:
    """Of 70 images, four batches of 16; others in another epoch."""
    seen = []
    for epoch in (0, 1):
        images = torch.cat([batch.images for batch in batches().of_epoch(epoch)]).flatten(1)
        assert len(images) == 64
        assert len(torch.unique(images, dim=0)) == 64
        seen.append(images)
    assert not torch.equal(*seen)


def test_an_epoch_can_be_begun_in_its_middle() -> None:
    whole = list(batches(augment="strong").of_epoch(3))
    rest = list(batches(augment="strong").of_epoch(3, 2))
    assert len(rest) == 2
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_processes_share_a_batch() -> None:
    (whole, *_), *parts = (
        list(batches(world, rank).of_epoch(0)) for world, rank in ((1, 0), (2, 0), (2, 1))
    )
    images = torch.stack([part[0].images for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(images, whole.images)


def test_training_sees_what_serving_sees() -> None:
    """Without augmentation a batch is the preprocessing's own output."""
    source = patterns(70)
    (first, *_) = batches().of_epoch(0)
    served = {PREPROCESSING.normalise(source.batch(np.array([row]))).tobytes() for row in range(70)}
    for image in first.images.permute(0, 2, 3, 1).numpy():
        assert np.ascontiguousarray(image).tobytes() in served
    assert first.images.shape == (16, 3, SIDE, SIDE)
    assert first.images.is_contiguous(memory_format=torch.channels_last)


# --- interruption ---


def test_going_on_from_any_pause_gives_the_same(tmp_path: Path) -> None:
    recipe = small_recipe(steps=7, augment="strong", patience=50)
    holdout = patterns(20, 1)
    whole = make_trainer(recipe, holdout=holdout)
    paths: list[Path] = []

    def keep() -> None:
        paths.append(tmp_path / str(len(paths)))
        save_state({"fingerprint": {}, "trainer": whole.state()}, paths[-1])

    for _ in whole.fit(on_pause=keep):
        pass
    expected = flat_weights(whole.result)
    # After each step but the last of an epoch, and after each epoch.
    assert len(paths) == 7
    for path in paths:
        stored = load_state(path, {})
        assert stored is not None
        again = make_trainer(recipe, holdout=holdout)
        again.restore(stored["trainer"])
        assert torch.equal(finish(again), expected)
        for ours, theirs in zip(again.reports, whole.reports, strict=True):
            for name in ("epoch", "step", "loss", "train_accuracy", "holdout_map", "learning_rate"):
                assert getattr(ours, name) == getattr(theirs, name), (path.name, name)


# --- early stopping ---


def misleading(n: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to learn the position of, and some to be watched by their colour."""
    learned = patterns(n, seed)
    pixels = learned.batch(np.arange(n)).copy()
    colours = np.random.default_rng(seed).integers(0, 3, n)
    pixels[np.arange(n), :, :, colours] //= 2
    watched = ImageSet.from_pixels(pixels, colours, learned.classes)
    return ImageSet.from_pixels(pixels, learned.labels, learned.classes), watched


def test_early_stopping_keeps_the_best() -> None:
    """Colours look alike at first; what is learned is position, so their mAP falls."""
    train, watched = misleading(96, 0)
    recipe = small_recipe(epochs=30, patience=3, ema=0.0, augment="none", learning_rate=0.02)
    trainer = make_trainer(recipe, train, watched)
    weights = [
        {name: tensor.clone() for name, tensor in trainer.state()["network"].items()}
        for _ in trainer.fit()
    ]
    quality = [report.holdout_map for report in trainer.reports]
    best = int(np.argmax(quality))
    assert len(quality) == best + 1 + 3 < 30
    assert quality[best] > quality[-1]
    kept = trainer.result.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights[best].items())
    assert not all(torch.equal(kept[name], tensor) for name, tensor in weights[-1].items())


def test_a_stopped_training_stays_stopped(tmp_path: Path) -> None:
    """Killed between the last epoch and the checkpoint, it has nothing left to learn."""
    train, watched = misleading(96, 0)
    recipe = small_recipe(epochs=30, patience=1, ema=0.0, augment="none", learning_rate=0.02)
    trainer = make_trainer(recipe, train, watched)
    expected = finish(trainer)
    assert len(trainer.reports) < 30
    save_state({"fingerprint": {}, "trainer": trainer.state()}, tmp_path / "state")
    again = make_trainer(recipe, train, watched)
    stored = load_state(tmp_path / "state", {})
    assert stored is not None
    again.restore(stored["trainer"])
    assert torch.equal(finish(again), expected)
    assert len(again.reports) == len(trainer.reports)


def test_a_network_that_does_not_change_is_not_waited_for() -> None:
    recipe = small_recipe(
        epochs=30, patience=2, ema=0.0, freeze="all", hash_norm="none", learning_rate=0.0
    )
    trainer = make_trainer(recipe, holdout=patterns(20, 1))
    list(trainer.fit())
    assert len(trainer.reports) == 3


# --- what cannot be ---


@pytest.mark.parametrize(
    ("changes", "group", "match", "field"),
    [
        ({"batch_size": 100}, ALONE, "64 training images are fewer.*from 100", "batch_size"),
        ({"batch_size": 16}, Processes(0, 3), "3 processes need an even share", "batch_size"),
        ({"batch_size": 4}, Processes(0, 4), "at least 2 images each", "batch_size"),
        ({"amp": "fp16"}, ALONE, "fp16 needs CUDA", "amp"),
        ({"freeze": "stem,nothing"}, ALONE, "begins with 'nothing'", "freeze"),
        ({"patience": 3}, ALONE, "hold-out, which has 1 images", "patience"),
    ],
)
def test_refused_before_it_begins(
    changes: dict[str, Any], group: Processes, match: str, field: str
) -> None:
    with pytest.raises(InvalidInputError, match=match) as caught:
        make_trainer(small_recipe(**changes), holdout=patterns(1, 1), group=group)
    assert caught.value.field == field


def test_a_training_that_comes_apart_says_so() -> None:
    recipe = small_recipe("lin2015-modern", optimizer="sgd", learning_rate=10, epochs=200, ema=0.0)
    network = HashNet("resnet9", 8, 3)
    # Class scores beyond float32.
    with torch.no_grad():
        network.classifier.weight.mul_(1e38).mul_(100)
    trainer = make_trainer(recipe, network=network)
    with pytest.raises(InvalidInputError, match=r"come apart.*learning_rate from 10") as caught:
        list(trainer.fit())
    assert caught.value.field == "learning_rate"


# --- mixed precision ---


@pytest.mark.parametrize("backbone", ["resnet9", "mobilenet_v3_small"])
def test_bfloat16_on_a_cpu(backbone: str) -> None:
    side = 32 if backbone == "mobilenet_v3_small" else SIDE
    pixels = patterns(64).batch(np.arange(64)).repeat(side // SIDE, 1).repeat(side // SIDE, 2)
    images = ImageSet.from_pixels(pixels, np.arange(64) % 3, ("a", "b", "c"))
    changes = {"backbone": backbone, "resize": side, "crop": side, "epochs": 1}
    losses = []
    for amp in ("bf16", "none"):
        trainer = make_trainer(small_recipe(amp=amp, **changes), images, images.take(np.arange(9)))
        served = finish(trainer)
        assert torch.isfinite(served).all()
        assert {p.dtype for p in trainer.result.parameters()} == {torch.float32}
        losses.append(trainer.reports[0].loss)
    # Eight bits of mantissa, and a few steps that multiply the difference: alike, not equal.
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    assert losses[0] != losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_on_cuda(amp: str) -> None:
    recipe = small_recipe(epochs=8, amp=amp, augment="none")
    torch.manual_seed(1)
    trainer = Trainer(
        HashNet("resnet9", 8, 3, "batch"),
        patterns(96),
        patterns(30, 1),
        Preprocessing(resize=SIDE, crop=SIDE),
        recipe,
        device=torch.device("cuda:0"),
    )
    list(trainer.fit())
    assert trainer.reports[-1].holdout_map > 0.7
    assert trainer.result.classifier.weight.device != CPU
