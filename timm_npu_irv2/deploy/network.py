"""Inception-ResNet-v2 for inference: convolutions with a bias and a ReLU, and nothing else.

BatchNorm and the scales of the residual blocks are inside the weights (see ``fold.py``), so every layer of timm's
network is one operator: convolution, bias, the addition of the block's input where there is one, and ReLU.

Numbers of blocks come from ``model.py``. The blocks are written out: with a ReLU in each convolution, the addition
inside the last one and a pooled branch apart, a description shared with ``model.py`` would branch in every line, and
the names in saved folders would change.
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import create_classifier
from torch import Tensor, nn

from .. import device as devices
from ..model import RUNS
from ..shortcuts import is_eager
from .convolution import FusedConvolution

__all__ = ['InferenceNetwork']


def _branch(*layers: nn.Module) -> nn.Sequential:
    """Return a branch under timm's names: layer 0 is merged with its siblings, so these count from 1."""
    return nn.Sequential(OrderedDict((str(1 + i), layer) for i, layer in enumerate(layers)))


class Mixed5b(nn.Module):
    """The first mixed block: (N, 192, H, W) -> (N, 320, H, W)."""

    def __init__(self, **dd: Any) -> None:
        super().__init__()
        self.siblings = FusedConvolution(192, 96 + 48 + 64, 1, **dd)
        self.branch1 = _branch(FusedConvolution(48, 64, 5, padding=2, **dd))
        self.branch2 = _branch(
            FusedConvolution(64, 96, 3, padding=1, **dd),
            FusedConvolution(96, 96, 3, padding=1, **dd),
        )
        # Averaging and a 1×1 convolution commute, and this way round a third of the channels is averaged.
        self.branch3 = _branch(
            FusedConvolution(192, 64, 1, relu=False, **dd),
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        x0, x1, x2 = self.siblings(x).split((96, 48, 64), 1)
        return torch.cat((x0, self.branch1(x1), self.branch2(x2), self.branch3(x)), 1)


class Block35(nn.Module):
    """A residual block: (N, 320, H, W) -> the same shape. Like the others it may overwrite its input."""

    def __init__(self, **dd: Any) -> None:
        super().__init__()
        self.siblings = FusedConvolution(320, 3 * 32, 1, **dd)
        self.branch1 = _branch(FusedConvolution(32, 32, 3, padding=1, **dd))
        self.branch2 = _branch(
            FusedConvolution(32, 48, 3, padding=1, **dd),
            FusedConvolution(48, 64, 3, padding=1, **dd),
        )
        self.conv2d = FusedConvolution(128, 320, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        x0, x1, x2 = self.siblings(x).split(32, 1)
        return self.conv2d(torch.cat((x0, self.branch1(x1), self.branch2(x2)), 1), x)


class Mixed6a(nn.Module):
    """A reduction: (N, 320, H, W) -> (N, 1088, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, **dd: Any) -> None:
        super().__init__()
        self.branch0 = FusedConvolution(320, 384, 3, stride=2, **dd)
        self.branch1 = nn.Sequential(
            FusedConvolution(320, 256, 1, **dd),
            FusedConvolution(256, 256, 3, padding=1, **dd),
            FusedConvolution(256, 384, 3, stride=2, **dd),
        )
        self.branch2 = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        return torch.cat((self.branch0(x), self.branch1(x), self.branch2(x)), 1)


class Block17(nn.Module):
    """A residual block: (N, 1088, H, W) -> the same shape."""

    def __init__(self, **dd: Any) -> None:
        super().__init__()
        self.siblings = FusedConvolution(1088, 192 + 128, 1, **dd)
        self.branch1 = _branch(
            FusedConvolution(128, 160, (1, 7), padding=(0, 3), **dd),
            FusedConvolution(160, 192, (7, 1), padding=(3, 0), **dd),
        )
        self.conv2d = FusedConvolution(384, 1088, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        x0, x1 = self.siblings(x).split((192, 128), 1)
        return self.conv2d(torch.cat((x0, self.branch1(x1)), 1), x)


class Mixed7a(nn.Module):
    """A reduction: (N, 1088, H, W) -> (N, 2080, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, **dd: Any) -> None:
        super().__init__()
        self.siblings = FusedConvolution(1088, 3 * 256, 1, **dd)
        self.branch0 = _branch(FusedConvolution(256, 384, 3, stride=2, **dd))
        self.branch1 = _branch(FusedConvolution(256, 288, 3, stride=2, **dd))
        self.branch2 = _branch(
            FusedConvolution(256, 288, 3, padding=1, **dd),
            FusedConvolution(288, 320, 3, stride=2, **dd),
        )
        self.branch3 = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        x0, x1, x2 = self.siblings(x).split(256, 1)
        return torch.cat((self.branch0(x0), self.branch1(x1), self.branch2(x2), self.branch3(x)), 1)


class Block8(nn.Module):
    """A residual block: (N, 2080, H, W) -> the same shape. The last one has no ReLU."""

    def __init__(self, relu: bool = True, **dd: Any) -> None:
        super().__init__()
        self.siblings = FusedConvolution(2080, 2 * 192, 1, **dd)
        self.branch1 = _branch(
            FusedConvolution(192, 224, (1, 3), padding=(0, 1), **dd),
            FusedConvolution(224, 256, (3, 1), padding=(1, 0), **dd),
        )
        self.conv2d = FusedConvolution(448, 2080, 1, relu=relu, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        x0, x1 = self.siblings(x).split(192, 1)
        return self.conv2d(torch.cat((x0, self.branch1(x1)), 1), x)


class InferenceNetwork(nn.Module):
    """Inception-ResNet-v2 that can only infer. ``fold.to_inference`` makes one from a trained network.

    Args:
        num_classes: Number of logits; 0 for the pooled features (N, 1536).
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, by timm's name.
        device: Device of the weights.
        dtype: Dtype of the weights and the output.

    Attributes:
        pretrained_cfg: Preprocessing, under timm's names, and ``label_names``, as far as they are known.

    Input: (N, in_chans, H, W), either uint8 as images come from a file, or floating point and normalised as the trained
    network takes them; H and W at least 75. Output: (N, num_classes), of the weights' dtype.
    """

    def __init__(
            self,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, 1536
        self.arguments = {'num_classes': num_classes, 'in_chans': in_chans, 'global_pool': global_pool}
        self.pretrained_cfg: dict[str, Any] = {}
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv2d_1a = FusedConvolution(in_chans, 32, 3, stride=2, **dd)
        self.conv2d_1a_uint8 = FusedConvolution(in_chans, 32, 3, stride=2, **dd)  # the normalisation is in its weights
        self.conv2d_2a = FusedConvolution(32, 32, 3, **dd)
        self.conv2d_2b = FusedConvolution(32, 64, 3, padding=1, **dd)
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)
        self.conv2d_3b = FusedConvolution(64, 80, 1, **dd)
        self.conv2d_4a = FusedConvolution(80, 192, 3, **dd)
        self.maxpool_5a = nn.MaxPool2d(3, stride=2)
        self.mixed_5b = Mixed5b(**dd)
        self.repeat = nn.Sequential(*[Block35(**dd) for _ in range(RUNS['repeat'][0])])
        self.mixed_6a = Mixed6a(**dd)
        self.repeat_1 = nn.Sequential(*[Block17(**dd) for _ in range(RUNS['repeat_1'][0])])
        self.mixed_7a = Mixed7a(**dd)
        self.repeat_2 = nn.Sequential(*[Block8(**dd) for _ in range(RUNS['repeat_2'][0])])
        self.block8 = Block8(relu=False, **dd)
        self.conv2d_7b = FusedConvolution(2080, self.num_features, 1, **dd)
        self.global_pool, _, self.classif = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=0.0, **dd,
        )
        self.freeze()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.conv2d_1a.weight.device

    def freeze(self) -> 'InferenceNetwork':
        """Lay out the weights for their device and exclude them from gradients; return the network."""
        device = self.conv2d_1a.weight.device
        if device.type != 'meta':
            self.to(memory_format=devices.memory_format(device))
        return self.requires_grad_(False).eval()

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last feature map (N, 1536, H / 32, W / 32), sizes rounded down."""
        if torch.jit.is_scripting():
            pass
        elif is_eager(x):
            x = x.to(memory_format=devices.memory_format(self.conv2d_1a.weight.device))
        x = self._first(x)
        x = self.maxpool_3a(self.conv2d_2b(self.conv2d_2a(x)))
        x = self.maxpool_5a(self.conv2d_4a(self.conv2d_3b(x)))
        x = self.repeat(self.mixed_5b(x))
        x = self.repeat_1(self.mixed_6a(x))
        x = self.block8(self.repeat_2(self.mixed_7a(x)))
        return self.conv2d_7b(x)

    def _first(self, x: Tensor) -> Tensor:
        weight = self.conv2d_1a.weight
        if not isinstance(x, Tensor) or x.is_floating_point():  # a proxy of FX stands for floating-point images
            return self.conv2d_1a(x.to(weight.dtype))
        return self.conv2d_1a_uint8(x.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        return self.classif(self.global_pool(self.forward_features(x)))
