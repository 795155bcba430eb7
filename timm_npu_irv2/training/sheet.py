"""A contact sheet: images, what a model takes them for, and how sure it is; and where in the image it looked."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .report import BLUE, GREY, INK, create_figure, save_figure

__all__ = ['Answer', 'draw_sheet', 'gradcam']

COLUMNS, LONGEST = 5, 26


class Answer(NamedTuple):
    """An image and the first answers to it.

    Attributes:
        image: (H, W, 3) or (H, W) uint8, as the network saw it.
        title: What is written above it.
        labels, probabilities: The first few answers, the likeliest first.
        heat: (H, W) in 0 … 1, drawn over the image; None for none.
    """

    image: np.ndarray
    title: str
    labels: Sequence[str]
    probabilities: Sequence[float]
    heat: np.ndarray | None = None


def gradcam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2) on the last feature map.

    Args:
        model: A timm model with ``forward_features`` of shape (N, C, h, w) and ``forward_head``.
        images: (N, C, H, W), normalised, on the model's device.
        classes: (N,) the class of each image whose evidence is wanted.

    Returns:
        (N, H, W) float32 on the CPU; the largest value of an image is 1, unless nothing speaks for the class.

    Raises:
        UserError: The model has no such feature map, or one of a single pixel, which tells no places apart.
    """
    with torch.no_grad():
        features = model.forward_features(images)
    with torch.enable_grad():
        features.requires_grad_()
        if features.ndim != 4 or max(features.shape[2:]) < 2:
            shape = ' × '.join(map(str, features.shape[1:]))
            raise UserError(f'--gradcam: the last feature map is {shape}, which has no places to tell apart: '
                            'use a convolutional network and a larger --img-size, 299 say.')
        logits = model.forward_head(features)
        gradient, = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    features = features.detach()
    maps = F.relu((gradient.float().mean((2, 3), keepdim=True) * features.float()).sum(1, keepdim=True))
    maps = F.interpolate(maps, images.shape[2:], mode='bilinear', align_corners=False)[:, 0].cpu()
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def draw_sheet(path: Path, answers: Sequence[Answer], title: str) -> bool:
    """Draw images with bars for the likeliest answers below each.

    Args:
        path: The PNG to write.
        answers: At least one.
        title: The first line.

    Returns:
        Whether it was drawn: matplotlib may be missing, which is said in the log.
    """
    columns = min(COLUMNS, len(answers))
    rows = math.ceil(len(answers) / columns)
    bars = max(len(answer.labels) for answer in answers)
    figure = create_figure(path, title, (max(3.2 * columns, 5), 0.6 + rows * (2.9 + 0.26 * bars)))
    if figure is None:
        return False
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.5, 0.26 * bars + 0.1] * rows)
    for index, answer in enumerate(answers):
        row, column = divmod(index, columns)
        _draw_image(figure.add_subplot(grid[2 * row, column]), answer)
        _draw_bars(figure.add_subplot(grid[2 * row + 1, column]), answer, bars)
    save_figure(figure, path)
    return True


def _draw_image(panel: Any, answer: Answer) -> None:
    panel.set_axis_off()
    # grey under the heat, or the two colours could not be told apart
    colored = answer.heat is None or answer.image.ndim == 2
    panel.imshow(answer.image if colored else answer.image.mean(2), cmap='gray', vmin=0, vmax=255)
    if answer.heat is not None:
        panel.imshow(answer.heat, cmap='inferno', vmin=0, vmax=1, alpha=0.15 + 0.5 * answer.heat)
    panel.set_title(_short(answer.title, 30), fontsize=9, color=GREY)


def _draw_bars(panel: Any, answer: Answer, bars: int) -> None:
    places = range(len(answer.labels))
    panel.barh(places, [1] * len(places), color='#eef1f6', height=0.82)
    panel.barh(places, answer.probabilities, color=BLUE, alpha=0.45, height=0.82)
    for place, label, probability in zip(places, answer.labels, answer.probabilities, strict=True):
        panel.text(0.015, place, _short(label, LONGEST), va='center', fontsize=9, color=INK,
                   fontweight='bold' if place == 0 else 'normal')
        panel.text(0.985, place, f'{probability:.1%}', va='center', ha='right', fontsize=9, color=INK)
    panel.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    panel.set_axis_off()


def _short(text: str, length: int) -> str:
    text = text.replace('$', r'\$')  # which would begin mathematics
    return text if len(text) <= length else f'{text[:length - 1]}…'
