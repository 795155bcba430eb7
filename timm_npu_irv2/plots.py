"""Every figure: curves of a training, contact sheets with Grad-CAM, grids of predictions, bar charts."""

import io
import logging
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .serialization import atomic_write

__all__ = ['GRID_SIZE', 'Prediction', 'draw_bar_chart', 'draw_contact_sheet', 'draw_curves', 'draw_prediction_grid',
           'gradcam', 'select_predictions']

_logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

INK, GREY, AXIS, GRID, PALE = '#222222', '#555555', '#bbbbbb', '#e6e6e6', '#eef1f6'
BLUE, RED, VIOLET, GREEN, ORANGE = '#2f6fde', '#d1495b', '#7b5ea7', '#2a8c7f', '#e0913a'
SERIES = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)

SHEET_COLUMNS = 5
GRID_COLUMNS, GRID_ROWS = 10, 4
GRID_SIZE = GRID_COLUMNS * GRID_ROWS


class Prediction(NamedTuple):
    """An image and the classes that a model predicts for it.

    Attributes:
        image: Image as the network saw it: (H, W, 3) or (H, W) uint8, or a PIL image.
        labels: Names of the first few classes, the likeliest first.
        probabilities: Probabilities of ``labels``.
        target: Name of the true class; None if it is not known.
        title: Line above the image.
        heat: Heat map (H, W) in 0 … 1, drawn over the image; None for none.
    """

    image: Any
    labels: Sequence[str]
    probabilities: Sequence[float] = ()
    target: str | None = None
    title: str = ''
    heat: np.ndarray | None = None


def _create_figure(title: str, size: tuple[float, float]) -> Any:
    """Return an empty matplotlib figure of ``size`` inches.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an optional dependency)
    except ImportError as error:
        raise UserError("matplotlib is missing: pip install 'timm-npu-irv2[plot]'.") from error
    figure = Figure(figsize=size, dpi=120, layout='constrained', facecolor='white')
    figure.suptitle(_shorten(title), fontsize=14, fontweight='bold', color=INK)
    return figure


def _create_figure_or_warn(path: Path, title: str, size: tuple[float, float]) -> Any:
    """Return an empty figure, or None with a warning in the log where matplotlib is missing."""
    try:
        return _create_figure(title, size)
    except UserError as error:
        _logger.warning(f'{path.name} is not drawn: {error}')
        return None


def _save_figure(figure: Any, path: Path) -> None:
    """Write a figure as SVG or PDF if ``path`` ends so, else as PNG."""
    content = io.BytesIO()
    suffix = path.suffix.lower().lstrip('.')
    figure.savefig(content, format=suffix if suffix in ('svg', 'pdf') else 'png')
    atomic_write(path, content.getvalue())


def _shorten(text: str, length: int | None = None) -> str:
    """Return ``text`` in at most ``length`` characters, with nothing in it that matplotlib reads as mathematics."""
    shortened = text if length is None or len(text) <= length else f'{text[:length - 1]}…'
    return shortened.replace('$', r'\$')


def draw_curves(rows: Sequence[Row], path: Path, title: str, train_loss: str = '') -> bool:
    """Draw loss, accuracy, learning rate and throughput over the epochs.

    Args:
        rows: Rows of summary.csv, at least one.
        path: Picture to write.
        title: First line of the picture.
        train_loss: Difference of the training loss from plain cross entropy; '' for none.

    Returns:
        False if matplotlib is missing, with a warning in the log.
    """
    figure = _create_figure_or_warn(path, title, (12, 8))
    if figure is None:
        return False
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    loss, accuracy, rate, speed = figure.subplots(2, 2, sharex=True).flat
    training = f'training, with {train_loss}' if train_loss else 'training'
    _draw_panel(loss, rows, 'Loss', 'cross entropy',
                {training: ('train_loss', BLUE), 'validation': ('eval_loss', RED)})
    _draw_panel(accuracy, rows, 'Accuracy', 'top-1 (%)',
                {'training': ('train_top1', BLUE), 'validation': ('eval_top1', RED)})
    _draw_panel(rate, rows, 'Learning rate', 'learning rate', {'': ('lr', VIOLET)}, from_zero=True)
    _draw_panel(speed, rows, 'Throughput', 'images / s', {'': ('images_per_second', GREEN)}, from_zero=True)
    _mark_best(accuracy, rows)
    if len(rows) == 1:
        accuracy.set_ylim(-3, 103)
    _save_figure(figure, path)
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
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[['top', 'right']].set_visible(False)
    panel.spines[['left', 'bottom']].set_color(AXIS)
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


def draw_contact_sheet(path: Path, predictions: Sequence[Prediction], title: str) -> bool:
    """Draw images, each with bars for the likeliest classes below it.

    Args:
        path: Picture to write.
        predictions: Images with probabilities, at least one.
        title: First line of the picture.

    Returns:
        False if matplotlib is missing, with a warning in the log.
    """
    columns = min(SHEET_COLUMNS, len(predictions))
    rows = math.ceil(len(predictions) / columns)
    bars = max(len(prediction.labels) for prediction in predictions)
    figure = _create_figure_or_warn(path, title, (max(3.2 * columns, 5), 0.6 + rows * (2.9 + 0.26 * bars)))
    if figure is None:
        return False
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.5, 0.26 * bars + 0.1] * rows)
    for index, prediction in enumerate(predictions):
        row, column = divmod(index, columns)
        _draw_image(figure.add_subplot(grid[2 * row, column]), prediction)
        _draw_bars(figure.add_subplot(grid[2 * row + 1, column]), prediction, bars)
    _save_figure(figure, path)
    return True


def _draw_image(panel: Any, prediction: Prediction) -> None:
    panel.set_axis_off()
    image, heat = np.asarray(prediction.image), prediction.heat
    # Grey under the heat map, or its colours could not be told from the image's.
    panel.imshow(image if heat is None or image.ndim == 2 else image.mean(2), cmap='gray', vmin=0, vmax=255)
    if heat is not None:
        panel.imshow(heat, cmap='inferno', vmin=0, vmax=1, alpha=0.15 + 0.5 * heat)
    panel.set_title(_shorten(prediction.title, 30), fontsize=9, color=GREY)


def _draw_bars(panel: Any, prediction: Prediction, bars: int) -> None:
    places = range(len(prediction.labels))
    panel.barh(places, [1] * len(places), color=PALE, height=0.82)
    panel.barh(places, prediction.probabilities, color=BLUE, alpha=0.45, height=0.82)
    for place, label, probability in zip(places, prediction.labels, prediction.probabilities, strict=True):
        panel.text(0.015, place, _shorten(label, 26), va='center', fontsize=9, color=INK,
                   fontweight='bold' if place == 0 else 'normal')
        panel.text(0.985, place, f'{probability:.1%}', va='center', ha='right', fontsize=9, color=INK)
    panel.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    panel.set_axis_off()


def select_predictions(predictions: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return as many predictions as a grid holds: the first wrong ones, and right ones from all over.

    Args:
        predictions: Tuples (index of the image, predicted class, true class).
    """
    wrong = [each for each in predictions if each[1] != each[2]][:GRID_SIZE // 2]
    right = [each for each in predictions if each[1] == each[2]]
    count = min(GRID_SIZE - len(wrong), len(right))
    return wrong + [right[place * len(right) // count] for place in range(count)]


def draw_prediction_grid(path: Path, predictions: Sequence[Prediction], title: str) -> bool:
    """Draw images with the predicted class below each: green if it is right, red if it is wrong.

    Args:
        path: Picture to write.
        predictions: Images with targets, at most ``GRID_SIZE``.
        title: First line of the picture.

    Returns:
        False if matplotlib is missing, with a warning in the log.
    """
    rows = max(1, -(-len(predictions) // GRID_COLUMNS))
    figure = _create_figure_or_warn(path, title, (12, 0.9 + 1.5 * rows))
    if figure is None:
        return False
    panels = list(figure.subplots(rows, GRID_COLUMNS, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, prediction in zip(panels, predictions, strict=False):
        _draw_framed(panel, prediction)
    _save_figure(figure, path)
    return True


def _draw_framed(panel: Any, prediction: Prediction) -> None:
    label, target = prediction.labels[0], prediction.target
    color = GREEN if label == target else RED
    panel.set_axis_on()
    panel.set(xticks=[], yticks=[])
    panel.imshow(prediction.image, cmap='gray')
    for spine in panel.spines.values():
        spine.set(color=color, linewidth=2.5)
    text = label if label == target else f'{label}, not {target}'
    panel.set_xlabel(_shorten(text, 22), color=color, fontsize=10, fontweight='bold')


def draw_bar_chart(path: Path, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> None:
    """Draw a small bar chart for each column, with a bar for each row.

    Args:
        path: Picture to write.
        title: Title of the picture, wrapped to its width.
        columns: Titles of the charts.
        rows: Values by name, one for each column; None where nothing was measured. A column of them is left out.

    Raises:
        UserError: matplotlib is missing, or the picture cannot be written.
    """
    drawn = [index for index in range(len(columns)) if any(row[index] is not None for row in rows.values())]
    lines = 1 if len(drawn) <= 3 else 2
    across = -(-len(drawn) // lines)
    width = 3.1 * across + 1.2
    figure = _create_figure(textwrap.fill(title, int(8 * width)), (width, 2.8 * lines + 1.2))
    panels = figure.subplots(lines, across, squeeze=False).flat
    colors = [SERIES[index % len(SERIES)] for index in range(len(rows))]
    for panel in panels[len(drawn):]:
        panel.set_axis_off()
    for panel, index in zip(panels, drawn, strict=False):
        values = [row[index] for row in rows.values()]
        bars = panel.bar(range(len(values)), [value or 0 for value in values], color=colors)
        panel.bar_label(bars, ['–' if value is None else _format(value) for value in values], fontsize=9, color=INK)
        panel.set_title(columns[index], fontsize=11, color=INK)
        panel.set_xticks([])
        panel.margins(y=0.15)
        panel.tick_params(colors=GREY)
        panel.spines[['top', 'right']].set_visible(False)
        panel.spines[['left', 'bottom']].set_color(AXIS)
    figure.legend(bars.patches, list(rows), loc='outside lower center', ncols=min(len(rows), across), frameon=False)
    _save_figure(figure, path)


def _format(value: float) -> str:
    if value == int(value):
        return str(int(value))
    return f'{value:.3f}' if abs(value) < 10 else f'{value:.1f}'


def gradcam(model: Any, images: Tensor, classes: Tensor) -> Tensor:
    """Return the evidence for a class at each pixel: Grad-CAM on the last feature map.

    Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2.

    Args:
        model: timm model with ``forward_features`` of shape (N, C, h, w) and ``forward_head``.
        images: Normalized images (N, C, H, W) on the model's device.
        classes: Class indices (N,), one for each image.

    Returns:
        Maps (N, H, W), float32 on the CPU. The largest value of a map is 1, or 0 if nothing is evidence for the class.

    Raises:
        UserError: The last feature map has no spatial dimensions, or a single pixel.
    """
    with torch.no_grad():
        features = model.forward_features(images)
    with torch.enable_grad():
        features.requires_grad_()
        if features.ndim != 4 or max(features.shape[2:]) < 2:
            shape = ' × '.join(map(str, features.shape[1:]))
            raise UserError(f'--gradcam: the last feature map is {shape}, which is too small for a heat map: '
                            'use a convolutional network and a larger --img-size such as 299.')
        logits = model.forward_head(features)
        gradient, = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    features = features.detach()
    maps = F.relu((gradient.float().mean((2, 3), keepdim=True) * features.float()).sum(1, keepdim=True))
    maps = F.interpolate(maps, images.shape[2:], mode='bilinear', align_corners=False)[:, 0].cpu()
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
