"""Mixed precision behind one small interface: none, native autocast or half weights, apex.

The training loop knows only :class:`Precision`. Two things vary behind it: the copy of the weights that the forward
uses (:class:`FullPrecision`, :class:`Autocast`, :class:`HalfWeights`, :class:`Apex`), and the factor of the loss that
keeps float16 gradients from underflow (none, a constant, or a scale that follows the overflows).

The levels are those of NVIDIA's apex (https://nvidia.github.io/apex/amp.html): O0 is float32, O1 casts operator by
operator, O2 keeps convolution and linear weights in 16 bits beside float32 master weights (P. Micikevicius et al.,
Mixed Precision Training, https://arxiv.org/abs/1710.03740).
"""
from .apex import Apex
from .base import Precision
from .create import check_options, create_precision
from .native import Autocast, FullPrecision, HalfWeights

__all__ = ['Apex', 'Autocast', 'FullPrecision', 'HalfWeights', 'Precision', 'check_options', 'create_precision']
