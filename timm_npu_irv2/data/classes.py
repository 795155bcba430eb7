"""Names of classes: published with a model, or those of ImageNet."""

from collections.abc import Mapping
from typing import Any

from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.data.dataset_info import DatasetInfo

__all__ = ['class_info']


def class_info(pretrained_cfg: Mapping[str, Any], num_classes: int) -> DatasetInfo | None:
    """Return timm's description of the classes of a network, or None if their names are not known.

    Args:
        pretrained_cfg: Configuration of the network; ``label_names`` in it are the names that were published.
        num_classes: Number of classes; without published names it selects ImageNet-1k, 21k and so on.
    """
    if names := pretrained_cfg.get('label_names'):
        return CustomDatasetInfo(names, pretrained_cfg.get('label_descriptions'))
    subset = infer_imagenet_subset({'num_classes': num_classes})
    return ImageNetInfo(subset) if subset else None
