"""Classification of images: the part that the scripts with CNNs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import options
import torch.nn.functional as F
from task import Batch, Indices
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images and their classes.

    Attributes:
        name: Source of the images.
        images: Images by part ("train", "validation", "test"), in the form that the model takes.
        classes: int64 ``(n,)`` by part.
        held_out_batch: Images in a held-out batch; divides validation and test, so that every image counts once.
        digest: Hash of the data and their split.
    """

    name: str
    images: dict[str, Tensor]
    classes: dict[str, Tensor]
    held_out_batch: int
    digest: str


class Classifier(nn.Module):
    """A model that maps images and classes to the mean cross-entropy."""

    def logits(self, images: Tensor) -> Tensor:
        """Maps a batch of images to ``(batch, classes)``."""
        raise NotImplementedError

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Returns the mean cross-entropy, in nats per image."""
        return F.cross_entropy(self.logits(images), classes)


class ImageTask:
    """Classification of images; a ``Task`` without its model.

    Args:
        settings: The command line.
        data: The images.
    """

    items = "images"
    items_per_example = 1
    trajectory: tuple[str, ...] = ()

    def __init__(self, settings: options.Settings, data: Images) -> None:
        self.settings, self.data = settings, data
        self.title = f"CNN on {data.name}"
        self.examples = len(data.classes["train"])
        self.facts: dict[str, Any] = {
            "data": data.name,
            "data_digest": data.digest,
            "loss_unit": "nats per image",
        }

    def batch(self, chosen: Indices) -> Batch:
        """Returns images and classes."""
        return self.data.images["train"][chosen], self.data.classes["train"][chosen]

    def held_out(self) -> list[Batch]:
        """Returns the fixed validation or test batches."""
        part, size = self.settings.judge, self.data.held_out_batch
        images, classes = self.data.images[part], self.data.classes[part]
        return [(images[i : i + size], classes[i : i + size]) for i in range(0, len(images), size)]

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean loss, in nats per image, and the share classified correctly."""
        assert isinstance(model, Classifier)
        logits = model.logits(inputs)
        return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).float().mean()
