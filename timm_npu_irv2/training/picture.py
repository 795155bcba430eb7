"""A picture of images with what a model takes them for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .report import create_figure, save_figure

__all__ = ['Prediction', 'choose', 'draw_predictions']

COLUMNS, ROWS = 10, 4
RIGHT, WRONG = '#2a8c4a', '#c8373f'


class Prediction(NamedTuple):
    """An image (PIL), the name of its class, and the name of the class that the model takes it for."""

    image: Any
    target: str
    answer: str


def choose(answers: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """As many of the (index, answer, target) as a picture holds: wrong ones first, and right ones from all over."""
    wrong = [each for each in answers if each[1] != each[2]][:COLUMNS * ROWS // 2]
    right = [each for each in answers if each[1] == each[2]]
    places = min(COLUMNS * ROWS - len(wrong), len(right))
    return wrong + [right[place * len(right) // places] for place in range(places)]


def draw_predictions(path: Path, predictions: Sequence[Prediction], title: str) -> bool:
    """Draw images with the model's answers under them: green where right, red where wrong.

    Args:
        path: The PNG to write.
        predictions: At most forty.
        title: The first line.

    Returns:
        Whether it was drawn: matplotlib may be missing, which is said in the log.
    """
    rows = max(1, -(-len(predictions) // COLUMNS))
    figure = create_figure(path, title, (12, 0.9 + 1.5 * rows))
    if figure is None:
        return False
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, prediction in zip(panels, predictions, strict=False):
        _draw(panel, prediction)
    save_figure(figure, path)
    return True


def _draw(panel: Any, prediction: Prediction) -> None:
    right = prediction.answer == prediction.target
    color = RIGHT if right else WRONG
    panel.set_axis_on()
    panel.set(xticks=[], yticks=[])
    panel.imshow(prediction.image, cmap='gray')
    for spine in panel.spines.values():
        spine.set(color=color, linewidth=2.5)
    text = prediction.answer if right else f'{prediction.answer}, not {prediction.target}'
    panel.set_xlabel(text if len(text) <= 22 else f'{text[:21]}…', color=color, fontsize=10, fontweight='bold')
