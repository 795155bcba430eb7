"""Inception-ResNet-v2 for the NPU, numerically equal to timm's (Szegedy et al., 2016, https://arxiv.org/abs/1602.07261).

It differs from timm's network where that is faster, and in no result but for rounding:

* 1×1 convolutions that share their input are one convolution (:class:`~.layers.Siblings`),
* the norms of branches that are concatenated are one, after the concatenation (:meth:`~.layers.LayerFactory.norm`),
* a pooling that is linear comes after its convolution (:class:`Mixed5b`),
* BatchNorm counts its batches on the host (:class:`~.layers.BatchNormAct2d`),
* where nobody can tell, the scale of a residual goes into the last activation of its branches, its end is one operator
  (:class:`~.layers.ResidualBlock`), and a ReLU comes after the pooling that follows it (:func:`~.layers.conv_pool`).

Names are timm's outside the merged layers, so that a state dict can be read at sight; ``weights.py`` translates.
"""

from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import create_classifier, get_device_dtype
from timm.models import _builder as timm_builder
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from . import weights
from .layers import BlockSequence, LayerFactory, PiecewiseNorm, ResidualBlock, Siblings, concatenate, conv_pool
from .published import REPOSITORIES
from .recompute import recomputed

__all__ = ['LAST_BLOCK', 'RUNS', 'STAGES', 'InceptionResnetV2Npu', 'inception_resnet_v2_npu', 'residual_scales']

LayerType = Union[str, Callable, Type[nn.Module]]


# Runs of equal residual blocks: {name: (number of blocks, scale of each)}. See https://arxiv.org/abs/1602.07261,
# section 3.3; the values are those of TF-slim's network.
RUNS = {'repeat': (10, 0.17), 'repeat_1': (20, 0.10), 'repeat_2': (9, 0.20)}
LAST_BLOCK, LAST_SCALE = 'block8', 1.0  # after the runs, without a ReLU

# The modules of each stage, in order; a stage ends where its feature map is taken.
STAGES: Tuple[Tuple[str, ...], ...] = (
    ('conv2d_1a', 'conv2d_2a', 'conv2d_2b'),
    ('maxpool_3a', 'conv2d_3b', 'conv2d_4a'),
    ('maxpool_5a', 'mixed_5b', 'repeat'),
    ('mixed_6a', 'repeat_1'),
    ('mixed_7a', 'repeat_2', 'block8', 'conv2d_7b'),
)


def _scales(name: str) -> List[float]:
    blocks, scale = RUNS[name]
    return [scale] * blocks


def residual_scales() -> Dict[str, float]:
    """Return {name of a residual block: its scale}."""
    scales = {f'{name}.{i}': scale for name in RUNS for i, scale in enumerate(_scales(name))}
    return {**scales, LAST_BLOCK: LAST_SCALE}


def _branch(*layers: nn.Module) -> nn.Sequential:
    """Return a branch under timm's names: layer 0 is merged with its siblings, so these count from 1."""
    return nn.Sequential(OrderedDict((str(1 + i), layer) for i, layer in enumerate(layers)))


class Mixed5b(nn.Module):
    """The first mixed block: (N, 192, H, W) -> (N, 320, H, W).

    timm's last branch pools and then convolves; both are linear, so here it convolves, with its siblings, and pools.
    """

    def __init__(self, layers: LayerFactory, **dd: Any) -> None:
        super().__init__()
        self.siblings = Siblings(layers, 192, direct=(96, 64), passed_on=(48, 64), large=True, **dd)
        self.branch1 = _branch(layers.conv(48, 64, kernel_size=5, padding=2, normalized=False, **dd))
        self.branch2 = _branch(
            layers.conv(64, 96, kernel_size=3, padding=1, **dd),
            layers.conv(96, 96, kernel_size=3, padding=1, normalized=False, **dd),
        )
        self.branch3 = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.bn = layers.norm((96, 64, 96, 64), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        x0, x3, x1, x2 = self.siblings(x)
        return self.bn(concatenate([x0, self.branch1(x1), self.branch2(x2), self.branch3(x3)]))


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

    def branches(self, x: Tensor) -> Tensor:
        """Return the concatenated branches, not yet normalised."""
        x0, x1, x2 = self.siblings(x)
        return concatenate([x0, self.branch1(x1), self.branch2(x2)])


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
        """Concatenate the branches."""
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

    def branches(self, x: Tensor) -> Tensor:
        """Return the concatenated branches, not yet normalised."""
        x0, x1 = self.siblings(x)
        return concatenate([x0, self.branch1(x1)])


class Mixed7a(nn.Module):
    """Reduction to the 8 × 8 grid: (N, 1088, H, W) -> (N, 2080, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, layers: LayerFactory, **dd: Any) -> None:
        super().__init__()
        self.siblings = Siblings(layers, 1088, direct=(), passed_on=(256, 256, 256), large=True, **dd)
        self.branch0 = _branch(layers.conv(256, 384, kernel_size=3, stride=2, normalized=False, **dd))
        self.branch1 = _branch(layers.conv(256, 288, kernel_size=3, stride=2, normalized=False, **dd))
        self.branch2 = _branch(
            layers.conv(256, 288, kernel_size=3, padding=1, **dd),
            layers.conv(288, 320, kernel_size=3, stride=2, normalized=False, **dd),
        )
        self.branch3 = nn.MaxPool2d(3, stride=2)
        self.bn = layers.norm((384, 288, 320), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        x0, x1, x2 = self.siblings(x)
        out = self.bn(concatenate([self.branch0(x0), self.branch1(x1), self.branch2(x2)]))
        return torch.cat((out, self.branch3(x)), 1)


class Block8(ResidualBlock):
    """Residual block on the 8 × 8 grid: (N, 2080, H, W) -> the same. The last one has no ReLU."""

    def __init__(self, layers: LayerFactory, scale: float, relu: bool = True, **dd: Any) -> None:
        super().__init__(layers, 2080, (192, 256), scale, **dd)
        del self.act
        self.relu: Optional[nn.Module] = nn.ReLU() if relu else None  # timm's name here
        self.siblings = Siblings(layers, 2080, direct=(192,), passed_on=(192,), **dd)
        self.branch1 = _branch(
            layers.conv(192, 224, kernel_size=(1, 3), padding=(0, 1), **dd),
            layers.conv(224, 256, kernel_size=(3, 1), padding=(1, 0), normalized=False, **dd),
        )

    def branches(self, x: Tensor) -> Tensor:
        """Return the concatenated branches, not yet normalised."""
        x0, x1 = self.siblings(x)
        return concatenate([x0, self.branch1(x1)])

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation at the end of the block, if it has one."""
        return x if self.relu is None else self.relu(x)


class InceptionResnetV2Npu(nn.Module):
    """Inception-ResNet-v2 with timm's interface; it loads state dicts in any dialect of ``weights.py``.

    Args:
        num_classes: Number of logits; 0 for none (the pooled features are the output).
        in_chans: Channels of the input image.
        drop_rate: Dropout before the classifier.
        output_stride: 32, the only one this network has.
        global_pool: Global pooling, by timm's name.
        norm_layer: Normalisation, by timm's name.
        norm_eps: Epsilon of the normalisation.
        act_layer: Activation inside the blocks, by timm's name (at the end of a block it is a ReLU).
        device: Device of parameters and buffers.
        dtype: Dtype of parameters.

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
        self.num_features = 1536
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
        self.repeat = BlockSequence(*[Block35(layers, scale, **dd) for scale in _scales('repeat')])
        self.mixed_6a = Mixed6a(layers, **dd)
        self.repeat_1 = BlockSequence(*[Block17(layers, scale, **dd) for scale in _scales('repeat_1')])
        self.mixed_7a = Mixed7a(layers, **dd)
        self.repeat_2 = BlockSequence(*[Block8(layers, scale, **dd) for scale in _scales('repeat_2')])
        self.block8 = Block8(layers, LAST_SCALE, relu=False, **dd)
        self.conv2d_7b = layers.conv(2080, self.num_features, kernel_size=1, **dd)
        self.feature_info = [
            dict(num_chs=channels, reduction=reduction, module=stage[-1])
            for channels, reduction, stage in zip((64, 192, 320, 1088, 1536), (2, 4, 8, 16, 32), STAGES, strict=True)
        ]
        self.layer_names = [name for stage in STAGES for name in stage]
        self.feature_ends = [self.layer_names.index(stage[-1]) for stage in STAGES]
        self.global_pool, self.head_drop, self.classif = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd,
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.recompute_cheap = False  # see set_grad_checkpointing
        self.register_load_state_dict_pre_hook(_translate_on_load)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Return patterns of layers from the input on, for layer-wise learning rates: timm's groups, or the stages."""
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
        recompute = ('all' if enable else '') if isinstance(enable, bool) else enable
        if recompute not in ('all', 'cheap', ''):
            raise ValueError(f"set_grad_checkpointing takes True, False, 'all' or 'cheap', not {enable!r}.")
        self.recompute_cheap = recompute == 'cheap'
        for module in self.modules():
            if isinstance(module, BlockSequence):
                module.recompute = recompute == 'all'
            elif isinstance(module, ResidualBlock):
                module.recompute = self.recompute_cheap

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last layer: a Linear, or an Identity without classes."""
        return self.classif

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head by a randomly initialised one, in the network's device, dtype and mode.

        Args:
            num_classes: Number of logits; 0 for none.
            global_pool: Global pooling, by timm's name; None for the one that is there.
        """
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.classif = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.classif.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last feature map (N, 1536, H / 32, W / 32), sizes rounded down."""
        if torch.jit.is_scripting() or not self.recompute_cheap:
            x = self.repeat(self._stem(x))
            x = self.repeat_1(self.mixed_6a(x))
            x = self.repeat_2(self.mixed_7a(x))
        else:
            x = self.repeat(recomputed(self._stem, x, keep_convolutions=True))
            x = self.repeat_1(recomputed(self.mixed_6a, x, keep_convolutions=True))
            x = self.repeat_2(recomputed(self.mixed_7a, x, keep_convolutions=True))
        return self.conv2d_7b(self.block8(x))

    def _stem(self, x: Tensor) -> Tensor:
        x = self.conv2d_2a(self.conv2d_1a(x))
        if torch.jit.is_scripting():
            x = self.maxpool_3a(self.conv2d_2b(x))
            x = self.maxpool_5a(self.conv2d_4a(self.conv2d_3b(x)))
        else:
            x = conv_pool(self.conv2d_2b, self.maxpool_3a, x)
            x = conv_pool(self.conv2d_4a, self.maxpool_5a, self.conv2d_3b(x))
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
        """Compute the last feature map and those of earlier stages.

        Args:
            x: Images (N, in_chans, H, W).
            indices: Stages to return: a list, or the last n for an int; None for all five.
            norm: No effect, since the stages end normalised.
            stop_early: Do not compute the stages after the last one in ``indices``.
            output_fmt: Layout of the feature maps; only 'NCHW'.
            intermediates_only: Return the list of feature maps alone.
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
        """Drop the stages after the last one in ``indices``; return the indices as positive numbers.

        The head goes too, unless every stage stays and ``prune_head`` is False.
        """
        wanted, last = feature_take_indices(len(STAGES), indices)
        for stage in STAGES[last + 1:]:
            for name in stage:
                setattr(self, name, nn.Identity())
        info: Any = self.feature_info[last]
        self.num_features = info['num_chs']
        if prune_head or last < len(STAGES) - 1:
            self.reset_classifier(0, '')
        return wanted

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (N, num_classes), or the pooled features (N, 1536), from the last feature map."""
        x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.classif(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _dialect(model: Any) -> str:
    """Return the dialect of a network's state dict: norms that cannot be merged are separate."""
    return 'npu_separate' if isinstance(model.mixed_5b.bn, PiecewiseNorm) else 'npu'


def _translate_on_load(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Translate a state dict of any dialect before it is loaded (a pre-hook of load_state_dict)."""
    own = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if not own or own.keys() & model.state_dict().keys() == own.keys():
        return
    translated = weights.convert(own, to=_dialect(model))
    for key in own:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in translated.items()})


def _checkpoint_filter(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Translate pretrained weights before timm adapts the stem and the classifier."""
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
        hf_hub_id=REPOSITORIES['tf_in1k'], hf_hub_filename='model.safetensors'),
    'inception_resnet_v2_npu.tf_ens_adv_in1k': _cfg(
        hf_hub_id=REPOSITORIES['tf_ens_adv_in1k'], hf_hub_filename='model.safetensors'),
    # The file that the model zoo's network was checked with; logit 0 is a background class. Its authors evaluated it
    # with a bilinear resize to 341 px. https://github.com/Cadene/pretrained-models.pytorch
    'inception_resnet_v2_npu.cadene_in1k': _cfg(
        url='http://data.lip6.fr/cadene/pretrainedmodels/inceptionresnetv2-520b38e4.pth',
        label_offset=1, crop_pct=0.875, interpolation='bilinear', license='bsd-3-clause',
    ),
})


@register_model
def inception_resnet_v2_npu(pretrained: bool = False, **kwargs: Any) -> InceptionResnetV2Npu:
    """Create Inception-ResNet-v2; ``kwargs`` are those of :class:`InceptionResnetV2Npu` and timm's factory."""
    # timm checks the hash in the name of a downloaded file only on demand. A plain-http source must be checked.
    unchecked = timm_builder._CHECK_HASH
    timm_builder.set_pretrained_check_hash(True)
    try:
        return build_model_with_cfg(InceptionResnetV2Npu, 'inception_resnet_v2_npu', pretrained,
                                    pretrained_filter_fn=_checkpoint_filter, **kwargs)
    finally:
        timm_builder.set_pretrained_check_hash(unchecked)
