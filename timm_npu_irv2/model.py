"""Inception-ResNet-v2 (Szegedy et al., 2016, https://arxiv.org/abs/1602.07261), numerically timm's, for the NPU.

It differs from timm's network where that costs less, and in no result but for rounding:

* 1×1 convolutions that share their input are one convolution (:class:`~.layers.Siblings`),
* the norms of branches that are concatenated are one, after the concatenation (:meth:`~.layers.LayerFactory.norm`),
* the scale of a residual goes into the last activation of its branches, and its end is one operator
  (:class:`ResidualBlock`),
* a ReLU comes after the pooling that follows it (:func:`~.layers.conv_pool`), a pooling after its convolution
  (:class:`Mixed5b`),
* BatchNorm counts its batches on the host (:class:`~.layers.BatchNormAct2d`).

Names are timm's outside the merged layers, so that a state dict can be read at sight; ``weights.py`` translates.
"""

from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import create_classifier
from timm.models import _builder as timm_builder
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from . import weights
from .layers import BlockSequence, LayerFactory, PiecewiseNorm, ScaledBiasConv2d, Siblings, conv_pool, recomputed
from .ops import scaled_residual_relu

__all__ = ['InceptionResnetV2Npu', 'inception_resnet_v2_npu']

LayerType = Union[str, Callable, Type[nn.Module]]

# The modules of each stage, in order; a stage ends where its feature map is taken.
STAGES: Tuple[Tuple[str, ...], ...] = (
    ('conv2d_1a', 'conv2d_2a', 'conv2d_2b'),
    ('maxpool_3a', 'conv2d_3b', 'conv2d_4a'),
    ('maxpool_5a', 'mixed_5b', 'repeat'),
    ('mixed_6a', 'repeat_1'),
    ('mixed_7a', 'repeat_2', 'block8', 'conv2d_7b'),
)


def _branch(*layers: nn.Module, first: int = 1) -> nn.Sequential:
    """The layers of a branch under timm's names, which count from the sibling that is merged elsewhere."""
    return nn.Sequential(OrderedDict((str(first + i), layer) for i, layer in enumerate(layers)))


class Mixed5b(nn.Module):
    """The first mixed block: (N, 192, H, W) -> (N, 320, H, W).

    timm's last branch pools and then convolves; both are linear, so here it convolves, with its siblings, and pools.
    """

    def __init__(self, layers: LayerFactory, **dd: Any) -> None:
        super().__init__()
        self.siblings = Siblings(layers, 192, direct=(96, 64), passed_on=(48, 64), **dd)
        self.branch1 = _branch(layers.conv(48, 64, kernel_size=5, padding=2, normalized=False, **dd))
        self.branch2 = _branch(
            layers.conv(64, 96, kernel_size=3, padding=1, **dd),
            layers.conv(96, 96, kernel_size=3, padding=1, normalized=False, **dd),
        )
        self.branch3 = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.bn = layers.norm((96, 64, 96, 64), **dd)

    def forward(self, x: Tensor) -> Tensor:
        x0, x3, x1, x2 = self.siblings(x)
        return self.bn(torch.cat((x0, self.branch1(x1), self.branch2(x2), self.branch3(x3)), 1))


class ResidualBlock(nn.Module):
    r"""The end of a residual block: $\max(0, x + s\,(W z + b))$ with $z$ the concatenated, activated branches.

    ReLU is homogeneous, so $s$ goes into the activation that makes $z$, where it costs nothing, and into $b$:
    neither the block's output, the largest tensor around, nor its gradient is multiplied by anything. Other activations
    leave $s$ to the addition.
    """

    def __init__(
            self,
            layers: LayerFactory,
            channels: int,
            branch_channels: Tuple[int, ...],
            scale: float,
            relu: bool = True,
            **dd: Any,
    ) -> None:
        super().__init__()
        inner, self.scale = (scale, 1.0) if layers.scales_activation else (1.0, scale)
        self.relu = relu
        self.bn = layers.norm(branch_channels, scale=inner, **dd)
        self.conv2d = ScaledBiasConv2d(sum(branch_channels), channels, kernel_size=1, bias_scale=inner, **dd)

    def merge(self, branches: List[Tensor], scaled_bias: Optional[Tensor]) -> Tensor:
        """What the branches have computed, not yet normalised -> the block's residual."""
        return self.conv2d(self.bn(torch.cat(branches, 1)), scaled_bias)

    def residual(self, x: Tensor, out: Tensor) -> Tensor:
        """The block's output from its input and its residual."""
        if self.relu:
            return scaled_residual_relu(x, out, self.scale)
        return torch.add(x, out, alpha=self.scale)

    def branches(self, x: Tensor, scaled_bias: Optional[Tensor] = None) -> Tensor:
        """The block's residual; ``scaled_bias`` is that of its last convolution, if it has been computed already."""
        raise NotImplementedError

    def forward(self, x: Tensor, scaled_bias: Optional[Tensor] = None) -> Tensor:
        return self.residual(x, self.branches(x, scaled_bias))


class Block35(ResidualBlock):
    """Residual block on the 35 × 35 grid (for 299 px): (N, 320, H, W) -> the same."""

    def __init__(self, layers: LayerFactory, scale: float, **dd: Any) -> None:
        super().__init__(layers, 320, (32, 32, 64), scale, **dd)
        self.siblings = Siblings(layers, 320, direct=(32,), passed_on=(32, 32), **dd)
        self.branch1 = _branch(layers.conv(32, 32, kernel_size=3, padding=1, normalized=False, **dd))
        self.branch2 = _branch(
            layers.conv(32, 48, kernel_size=3, padding=1, **dd),
            layers.conv(48, 64, kernel_size=3, padding=1, normalized=False, **dd),
        )

    def branches(self, x: Tensor, scaled_bias: Optional[Tensor] = None) -> Tensor:
        x0, x1, x2 = self.siblings(x)
        return self.merge([x0, self.branch1(x1), self.branch2(x2)], scaled_bias)


class Mixed6a(nn.Module):
    """Reduction to the 17 × 17 grid: (N, 320, H, W) -> (N, 1088, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, layers: LayerFactory, **dd: Any) -> None:
        super().__init__()
        self.branch0 = layers.conv(320, 384, kernel_size=3, stride=2, **dd)
        self.branch1 = nn.Sequential(
            layers.conv(320, 256, kernel_size=1, **dd),
            layers.conv(256, 256, kernel_size=3, padding=1, **dd),
            layers.conv(256, 384, kernel_size=3, stride=2, **dd),
        )
        self.branch2 = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch0(x), self.branch1(x), self.branch2(x)), 1)


class Block17(ResidualBlock):
    """Residual block on the 17 × 17 grid: (N, 1088, H, W) -> the same."""

    def __init__(self, layers: LayerFactory, scale: float, **dd: Any) -> None:
        super().__init__(layers, 1088, (192, 192), scale, **dd)
        self.siblings = Siblings(layers, 1088, direct=(192,), passed_on=(128,), **dd)
        self.branch1 = _branch(
            layers.conv(128, 160, kernel_size=(1, 7), padding=(0, 3), **dd),
            layers.conv(160, 192, kernel_size=(7, 1), padding=(3, 0), normalized=False, **dd),
        )

    def branches(self, x: Tensor, scaled_bias: Optional[Tensor] = None) -> Tensor:
        x0, x1 = self.siblings(x)
        return self.merge([x0, self.branch1(x1)], scaled_bias)


class Mixed7a(nn.Module):
    """Reduction to the 8 × 8 grid: (N, 1088, H, W) -> (N, 2080, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, layers: LayerFactory, **dd: Any) -> None:
        super().__init__()
        self.siblings = Siblings(layers, 1088, direct=(), passed_on=(256, 256, 256), **dd)
        self.branch0 = _branch(layers.conv(256, 384, kernel_size=3, stride=2, normalized=False, **dd))
        self.branch1 = _branch(layers.conv(256, 288, kernel_size=3, stride=2, normalized=False, **dd))
        self.branch2 = _branch(
            layers.conv(256, 288, kernel_size=3, padding=1, **dd),
            layers.conv(288, 320, kernel_size=3, stride=2, normalized=False, **dd),
        )
        self.branch3 = nn.MaxPool2d(3, stride=2)
        self.bn = layers.norm((384, 288, 320), **dd)

    def forward(self, x: Tensor) -> Tensor:
        x0, x1, x2 = self.siblings(x)
        out = self.bn(torch.cat((self.branch0(x0), self.branch1(x1), self.branch2(x2)), 1))
        return torch.cat((out, self.branch3(x)), 1)


class Block8(ResidualBlock):
    """Residual block on the 8 × 8 grid: (N, 2080, H, W) -> the same. The last one has no ReLU."""

    def __init__(self, layers: LayerFactory, scale: float, relu: bool = True, **dd: Any) -> None:
        super().__init__(layers, 2080, (192, 256), scale, relu, **dd)
        self.siblings = Siblings(layers, 2080, direct=(192,), passed_on=(192,), **dd)
        self.branch1 = _branch(
            layers.conv(192, 224, kernel_size=(1, 3), padding=(0, 1), **dd),
            layers.conv(224, 256, kernel_size=(3, 1), padding=(1, 0), normalized=False, **dd),
        )

    def branches(self, x: Tensor, scaled_bias: Optional[Tensor] = None) -> Tensor:
        x0, x1 = self.siblings(x)
        return self.merge([x0, self.branch1(x1)], scaled_bias)


class InceptionResnetV2Npu(nn.Module):
    """Inception-ResNet-v2 with timm's interface; it loads state dicts in any dialect of ``weights.py``.

    Args:
        num_classes: Number of logits; 0 for none (the pooled features are the output).
        in_chans: Channels of the input image.
        drop_rate: Dropout before the classifier.
        output_stride: 32, the only one this network has.
        global_pool: timm's name of the global pooling.
        norm_layer: timm's name of the normalisation.
        norm_eps: Its epsilon.
        act_layer: timm's name of the activation inside the blocks (the residual's own is ReLU).
        device, dtype: Of parameters and buffers.

    Input: (N, in_chans, H, W), H and W at least 75. Output: (N, num_classes).
    """

    def __init__(
            self,
            num_classes: int = 1000,
            in_chans: int = 3,
            drop_rate: float = 0.,
            output_stride: int = 32,
            global_pool: str = 'avg',
            norm_layer: LayerType = 'batchnorm2d',
            norm_eps: float = 1e-3,
            act_layer: LayerType = 'relu',
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        if output_stride != 32:
            raise ValueError(f'inception_resnet_v2_npu has output_stride 32 only, not {output_stride}.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = 1536
        dd = {'device': device, 'dtype': dtype}
        layers = LayerFactory(norm_layer, norm_eps, act_layer)

        self.conv2d_1a = layers.conv(in_chans, 32, kernel_size=3, stride=2, **dd)
        self.conv2d_2a = layers.conv(32, 32, kernel_size=3, **dd)
        self.conv2d_2b = layers.conv(32, 64, kernel_size=3, padding=1, **dd)
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)
        self.conv2d_3b = layers.conv(64, 80, kernel_size=1, **dd)
        self.conv2d_4a = layers.conv(80, 192, kernel_size=3, **dd)
        self.maxpool_5a = nn.MaxPool2d(3, stride=2)
        self.mixed_5b = Mixed5b(layers, **dd)
        self.repeat = BlockSequence(*[Block35(layers, scale=0.17, **dd) for _ in range(10)])
        self.mixed_6a = Mixed6a(layers, **dd)
        self.repeat_1 = BlockSequence(*[Block17(layers, scale=0.10, **dd) for _ in range(20)])
        self.mixed_7a = Mixed7a(layers, **dd)
        self.repeat_2 = BlockSequence(*[Block8(layers, scale=0.20, **dd) for _ in range(9)])
        self.block8 = Block8(layers, scale=1.0, relu=False, **dd)
        self.conv2d_7b = layers.conv(2080, self.num_features, kernel_size=1, **dd)
        self.feature_info = [
            dict(num_chs=channels, reduction=reduction, module=stage[-1])
            for channels, reduction, stage in zip((64, 192, 320, 1088, 1536), (2, 4, 8, 16, 32), STAGES, strict=True)
        ]
        self.global_pool, self.head_drop, self.classif = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd,
        )
        self.recompute = ''  # 'cheap', 'all' or nothing
        self.register_load_state_dict_pre_hook(_translate_on_load)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """The layers in order, from the input, for layer-wise learning rates: timm's groups, or its stages."""
        if coarse:
            return {str(i): rf'^(?:{"|".join(stage)})\.' for i, stage in enumerate(STAGES)}
        return dict(
            stem=[(r'^conv2d_[12]', (0,)), (r'^conv2d_[34]', (1,))],
            mixed_5b=r'^mixed_5b',
            repeat=r'^repeat\.(\d+)',
            mixed_6a=r'^mixed_6a',
            repeat_1=r'^repeat_1\.(\d+)',
            mixed_7a=r'^mixed_7a',
            repeat_2=r'^repeat_2\.(\d+)',
            neck=r'^(?:block8|conv2d_7b)',
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: Union[bool, str] = True) -> None:
        """Keep less for the backward, and compute it again there.

        Args:
            enable: 'all' or True: keep only the inputs of the residual blocks. 'cheap': keep what convolutions
                compute, throughout the network, and compute norms, activations, concatenations and pooling again.
                False: keep everything.
        """
        recompute = {True: 'all', False: ''}.get(enable, enable)
        if recompute not in ('all', 'cheap', ''):
            raise ValueError(f"set_grad_checkpointing takes True, False, 'all' or 'cheap', not {enable!r}.")
        self.recompute = recompute
        for sequence in (self.repeat, self.repeat_1, self.repeat_2):
            sequence.recompute = recompute

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer, a Linear, or an Identity without classes."""
        return self.classif

    def reset_classifier(self, num_classes: int, global_pool: str = 'avg') -> None:
        """A new, randomly initialised head, on the device and in the dtype of the network."""
        self.num_classes = num_classes
        weight = self.conv2d_7b.conv.weight
        self.global_pool, self.classif = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=weight.device, dtype=weight.dtype,
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last feature map (N, 1536, H / 32, W / 32), sizes rounded down."""
        if torch.jit.is_scripting() or self.recompute != 'cheap':
            x = self._stem(x)
            x = self.repeat(x)
            x = self.mixed_6a(x)
            x = self.repeat_1(x)
            x = self.mixed_7a(x)
            x = self.repeat_2(x)
            x = self.block8(x)
            x = self.conv2d_7b(x)
        else:
            x = recomputed(self._stem, x, keep_convolutions=True)
            x = self.repeat(x)
            x = recomputed(self.mixed_6a, x, keep_convolutions=True)
            x = self.repeat_1(x)
            x = recomputed(self.mixed_7a, x, keep_convolutions=True)
            x = self.repeat_2(x)
            x = self.block8.residual(x, recomputed(self.block8.branches, x, keep_convolutions=True))
            x = self.conv2d_7b(x)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        x = self.conv2d_1a(x)
        x = self.conv2d_2a(x)
        if torch.jit.is_scripting():
            x = self.maxpool_3a(self.conv2d_2b(x))
            x = self.conv2d_3b(x)
            x = self.maxpool_5a(self.conv2d_4a(x))
        else:
            x = conv_pool(self.conv2d_2b, self.maxpool_3a, x)
            x = self.conv2d_3b(x)
            x = conv_pool(self.conv2d_4a, self.maxpool_5a, x)
        return self.mixed_5b(x)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Forward to the last feature map, with feature maps on the way.

        Args:
            x: (N, in_chans, H, W).
            indices: Stages to return: the last n if an int, all five if None.
            norm: Has no effect: the stages end normalised.
            stop_early: Leave the stages after the last one wanted uncomputed.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Return the list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW' for this network, not {output_fmt!r}.")
        wanted, last = feature_take_indices(len(STAGES), indices)
        intermediates = []
        for index, stage in enumerate(STAGES[:last + 1] if stop_early else STAGES):
            for name in stage:
                x = self.get_submodule(name)(x)
            if index in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop the stages after the last one in ``indices`` (and the head); returns the indices as positive numbers."""
        wanted, last = feature_take_indices(len(STAGES), indices)
        for stage in STAGES[last + 1:]:
            for name in stage:
                setattr(self, name, nn.Identity())
        if prune_head:
            self.num_classes = 0
            self.global_pool, self.head_drop, self.classif = nn.Identity(), nn.Identity(), nn.Identity()
        return wanted

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map -> logits (N, num_classes), or the pooled features (N, 1536)."""
        x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.classif(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _dialect(model: nn.Module) -> str:
    """The dialect that a network of this module speaks: its siblings may be separate (see ``layers.py``)."""
    return 'npu_separate' if isinstance(model.mixed_5b.bn, PiecewiseNorm) else 'npu'


def _translate_on_load(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook: whatever dialect the weights are in, the network loads them."""
    own = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if not own or own.keys() & model.state_dict().keys() == own.keys():
        return
    translated = weights.convert(own, to=_dialect(model))
    for key in own:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in translated.items()})


def _checkpoint_filter(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """timm's hook for pretrained weights, called before it adapts the stem and the classifier."""
    return weights.convert(state_dict, to=_dialect(model))


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 299, 299), 'min_input_size': (3, 75, 75), 'pool_size': (8, 8),
        'crop_pct': 0.8975, 'interpolation': 'bicubic',
        'mean': IMAGENET_INCEPTION_MEAN, 'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'conv2d_1a.conv', 'classifier': 'classif',
        'license': 'apache-2.0', **kwargs,
    }


default_cfgs = generate_default_cfgs({
    # timm's own conversions of TensorFlow's weights, translated while loading; not the pickles that lie beside them.
    'inception_resnet_v2_npu.tf_in1k': _cfg(
        hf_hub_id='timm/inception_resnet_v2.tf_in1k', hf_hub_filename='model.safetensors'),
    'inception_resnet_v2_npu.tf_ens_adv_in1k': _cfg(
        hf_hub_id='timm/inception_resnet_v2.tf_ens_adv_in1k', hf_hub_filename='model.safetensors'),
    # The file that the model zoo's network was checked with; logit 0 is a background class. Its authors evaluated it
    # with a bilinear resize to 341 px. https://github.com/Cadene/pretrained-models.pytorch
    'inception_resnet_v2_npu.cadene_in1k': _cfg(
        url='http://data.lip6.fr/cadene/pretrainedmodels/inceptionresnetv2-520b38e4.pth',
        label_offset=1, crop_pct=0.875, interpolation='bilinear', license='bsd-3-clause',
    ),
})


@register_model
def inception_resnet_v2_npu(pretrained: bool = False, **kwargs: Any) -> InceptionResnetV2Npu:
    """Inception-ResNet-v2; ``kwargs`` are :class:`InceptionResnetV2Npu`'s, or ``features_only`` and its options."""
    # timm checks the hash in a downloaded file's name only when told to. A plain-http source must be checked.
    unchecked = timm_builder._CHECK_HASH
    timm_builder.set_pretrained_check_hash(True)
    try:
        return build_model_with_cfg(
            InceptionResnetV2Npu,
            'inception_resnet_v2_npu',
            pretrained,
            pretrained_filter_fn=_checkpoint_filter,
            **kwargs,
        )
    finally:
        timm_builder.set_pretrained_check_hash(unchecked)
