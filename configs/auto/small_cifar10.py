"""CIFAR-10 at half its resolution, evaluated on a part of it: what two CPU cores can do."""

import dataclasses
from typing import Any

import numpy as np

from optgrad.experiments import data, problems

VALIDATION, TEST = 1000, 2000


def problem(*, batch_size: int = 64, model: str, **model_options: Any) -> problems.Problem:
    """A network of `optgrad.experiments.models` on 16x16 pixels; its accuracy is the score.

    Args:
      batch_size: images per step.
      model: its name.
      model_options: as the network has them, such as ``width``.
    """
    whole = data.load("cifar10").split_validation(VALIDATION)
    smaller = dataclasses.replace(
        whole,
        name="CIFAR-10 of 16x16 pixels",
        train_images=halved(whole.train_images),
        validation_images=halved(whole.validation_images),
        test_images=halved(whole.test_images[:TEST]),
        test_labels=whole.test_labels[:TEST],
    )
    return problems.image_classification(
        smaller, model, batch_size=batch_size, model_options=model_options
    )


def halved(images: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels, [N, H, W, C] to half of H and W."""
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // 2, 2, width // 2, 2, channels)
    return np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
