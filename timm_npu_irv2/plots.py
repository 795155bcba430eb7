"""Every figure: curves of a training, contact sheets, Grad-CAM, bar charts."""

import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .serialization import atomic_write

__all__ = [
    'Answer',
    'Prediction',
    'bar_chart',
    'choose',
    'create_figure',
    'draw_curves',
    'draw_predictions',
    'draw_sheet',
    'gradcam',
    'save_figure',
]

_logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

INK, GREY = '#222222', '#555555'
BLUE, RED, VIOLET, GREEN = '#2f6fde', '#d1495b', '#7b5ea7', '#2a8c7f'


def create_figure(path: Path, title: str, size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of ``size`` inches, for :func:`save_figure` to write to ``path``.

    None where matplotlib is missing, which is said in the log.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        _logger.warning(f"{path.name} is not drawn: matplotlib is missing (pip install 'timm-npu-irv2[plot]').")
        return None
    figure = Figure(figsize=size, dpi=120, layout='constrained', facecolor='white')
    figure.suptitle(title, fontsize=14, fontweight='bold', color=INK)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format='png')
    atomic_write(path, picture.getvalue())


def draw_curves(rows: Sequence[Row], path: Path, title: str) -> bool:
    """SampleKey loss, accuracy, learning rate and throughput over the epochs.

    Args:
        rows: The rows of summary.csv, at least one.
        path: The PNG to write.
        title: The first line of the picture.

    Returns:
        Whether it was drawn: matplotlib may be missing, which is said in the log.
    """
    figure = create_figure(path, title, (12, 8))
    if figure is None:
        return False
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    loss, accuracy, rate, speed = figure.subplots(2, 2, sharex=True).flat
    _draw_panel(loss, rows, 'Loss', 'cross entropy',
                {'training': ('train_loss', BLUE), 'validation': ('eval_loss', RED)})
    _draw_panel(accuracy, rows, 'Accuracy', 'top-1 (%)',
                {'training': ('train_top1', BLUE), 'validation': ('eval_top1', RED)})
    _draw_panel(rate, rows, 'Learning rate', 'learning rate', {'': ('lr', VIOLET)}, from_zero=True)
    _draw_panel(speed, rows, 'Throughput', 'images / s', {'': ('images_per_second', GREEN)}, from_zero=True)
    _mark_best(accuracy, rows)
    if len(rows) == 1:
        accuracy.set_ylim(-3, 103)
    save_figure(figure, path)
    return True


def _draw_panel(
        panel: Any,
        rows: Sequence[Row],
        title: str,
        unit: str,
        lines: dict[str, tuple[str, str]],
        from_zero: bool = False,
) -> None:
    for label, (column, color) in lines.items():
        points = [(row['epoch'], row[column]) for row in rows if row.get(column) is not None]
        if points:
            marker = 'o' if len(points) <= 40 else ''
            panel.plot(*zip(*points, strict=True), color=color, label=label, linewidth=2, marker=marker, markersize=4)
    panel.set_title(title, loc='left', fontsize=12, fontweight='bold', color=INK)
    panel.set_xlabel('epoch', color=GREY)
    panel.set_ylabel(unit, color=GREY)
    margin = max(0.5, len(rows) / 50)
    panel.set_xlim(rows[0]['epoch'] - margin, rows[-1]['epoch'] + margin)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if from_zero:
        highest = max((value for line in panel.lines for value in line.get_ydata()), default=0)
        panel.set_ylim(0, 1.15 * highest or 1)
    panel.grid(color='#e6e6e6', linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[['top', 'right']].set_visible(False)
    panel.spines[['left', 'bottom']].set_color('#bbbbbb')
    panel.tick_params(colors=GREY, labelbottom=True)
    if len(panel.lines) > 1:
        panel.legend(frameon=False)
    elif not panel.lines:
        panel.text(0.5, 0.5, 'not measured', transform=panel.transAxes, ha='center', color=GREY)


def _mark_best(panel: Any, rows: Sequence[Row]) -> None:
    known = [row for row in rows if row.get('eval_top1') is not None]
    if known:
        best = max(known, key=lambda row: row['eval_top1'])
        panel.plot(best['epoch'], best['eval_top1'], marker='*', markersize=14, color=RED, linestyle='')
        panel.set_title(f'★ {best["eval_top1"]:.2f} % in epoch {best["epoch"]}', loc='right', fontsize=11, color=RED)


SHEET_COLUMNS, LONGEST = 5, 26


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
    """SampleKey images with bars for the likeliest answers below each.

    Args:
        path: The PNG to write.
        answers: At least one.
        title: The first line.

    Returns:
        Whether it was drawn: matplotlib may be missing, which is said in the log.
    """
    columns = min(SHEET_COLUMNS, len(answers))
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


GRID_COLUMNS, GRID_ROWS = 10, 4
RIGHT, WRONG = '#2a8c4a', '#c8373f'


class Prediction(NamedTuple):
    """An image (PIL), the name of its class, and the name of the class that the model takes it for."""

    image: Any
    target: str
    answer: str


def choose(answers: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """As many of the (index, answer, target) as a picture holds: wrong ones first, and right ones from all over."""
    wrong = [each for each in answers if each[1] != each[2]][:GRID_COLUMNS * GRID_ROWS // 2]
    right = [each for each in answers if each[1] == each[2]]
    places = min(GRID_COLUMNS * GRID_ROWS - len(wrong), len(right))
    return wrong + [right[place * len(right) // places] for place in range(places)]


def draw_predictions(path: Path, predictions: Sequence[Prediction], title: str) -> bool:
    """SampleKey images with the model's answers under them: green where right, red where wrong.

    Args:
        path: The PNG to write.
        predictions: At most forty.
        title: The first line.

    Returns:
        Whether it was drawn: matplotlib may be missing, which is said in the log.
    """
    rows = max(1, -(-len(predictions) // GRID_COLUMNS))
    figure = create_figure(path, title, (12, 0.9 + 1.5 * rows))
    if figure is None:
        return False
    panels = list(figure.subplots(rows, GRID_COLUMNS, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, prediction in zip(panels, predictions, strict=False):
        _draw_prediction(panel, prediction)
    save_figure(figure, path)
    return True


def _draw_prediction(panel: Any, prediction: Prediction) -> None:
    right = prediction.answer == prediction.target
    color = RIGHT if right else WRONG
    panel.set_axis_on()
    panel.set(xticks=[], yticks=[])
    panel.imshow(prediction.image, cmap='gray')
    for spine in panel.spines.values():
        spine.set(color=color, linewidth=2.5)
    text = prediction.answer if right else f'{prediction.answer}, not {prediction.target}'
    panel.set_xlabel(text if len(text) <= 22 else f'{text[:21]}…', color=color, fontsize=10, fontweight='bold')


def bar_chart(path: Path, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> None:
    """SampleKey a small chart of bars for each column, a bar for each row.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError("--chart needs matplotlib: pip install 'timm-npu-irv2[plot]'.") from error
    drawn = [i for i in range(len(columns)) if any(row[i] is not None for row in rows.values())]
    figure = Figure(figsize=(2.6 * len(drawn) + 1, 3.2), layout='constrained')
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, index in zip(axes, drawn, strict=True):
        values = [row[index] or 0 for row in rows.values()]
        bars = axis.bar(range(len(rows)), values, color=[f'C{i}' for i in range(len(rows))])
        axis.bar_label(bars, [_cell(value) for value in values], fontsize=8)
        axis.set_title(columns[index], fontsize=9)
        axis.set_xticks([])
        axis.margins(y=0.15)
        axis.spines[['top', 'right']].set_visible(False)
    figure.legend(bars.patches, list(rows), loc='outside lower center', ncols=len(rows), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _cell(value: float) -> str:
    return f'{value:.3f}' if abs(value) < 10 else f'{value:.1f}'
