"""A predictor for servers: images in, classes out, with batches formed from simultaneous calls."""

import contextlib
import io
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.classes import class_info
from ..data.decode import read_image, to_pil_mode
from ..data.pipeline import MOST_CHANNELS, ImagePipeline
from ..errors import UserError, first_line
from ..escaping import printable
from .engines import EngineNetwork
from .network import InferenceNetwork

__all__ = ['Predictor', 'QueueFull']

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor


class QueueFull(RuntimeError):
    """Too many images are waiting for a :class:`Predictor`."""


class _Waiting(NamedTuple):
    image: Tensor
    answer: Future[dict[str, Any]]


class Predictor:
    """A classifier of images that may be called from any number of threads.

    A thread of its own runs the network. While it computes a batch, the images of other calls gather and become the
    next one; each call decodes its own images. Use it as a context manager, or call :meth:`close`.

    Args:
        network: Network of ``to_inference`` or ``load``.
        topk: Number of classes in an answer.
        batch_size: Largest number of images in a batch.
        max_wait: Seconds to wait for more images before a batch that is not full is computed.
        compiled: Module to run instead of the network, such as ``torch.compile(network)``.
        input_img_mode: PIL mode of the images; None for that of the training.
        max_waiting: Largest number of images that wait to be computed.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
            self,
            network: InferenceNetwork | EngineNetwork,
            topk: int = 5,
            batch_size: int = 8,
            max_wait: float = 0.002,
            compiled: nn.Module | None = None,
            input_img_mode: str | None = None,
            max_waiting: int = 1024,
    ) -> None:
        if not all(isinstance(each, int) and each >= 1 for each in (batch_size, topk, max_waiting)):
            raise UserError('a predictor needs a batch_size, a topk and a max_waiting that are integers of at least 1.')
        if not 0 <= max_wait <= threading.TIMEOUT_MAX:
            raise UserError(f'max_wait {max_wait}: expected seconds, at least 0.')
        self.topk, self.batch_size, self.max_wait, self.max_waiting = topk, batch_size, max_wait, max_waiting
        self._run = compiled if compiled is not None else network
        self._device = network.device
        self._classes = class_info(network.pretrained_cfg, network.num_classes)
        self._shape = (network.in_chans, *network.pretrained_cfg.get('input_size', (3, 299, 299))[1:])
        if network.in_chans <= MOST_CHANNELS:
            pipeline = ImagePipeline.for_model(network, {'input_img_mode': input_img_mode})
            self._mode, self._transform = pipeline.input_img_mode, pipeline.transform()
        self._queue: deque[_Waiting] = deque()
        self._running: list[_Waiting] = []  # batch that is being computed
        self._changed = threading.Condition()  # of the queue, or of _closed
        self._closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name='predictor', daemon=True)
        self._thread.start()

    def predict(
            self,
            images: Picture | Iterable[Picture],
            *,
            timeout: float | None = None,
            block: bool = True,
    ) -> list[dict[str, Any]]:
        """Return the answers to images, in their order.

        Args:
            images: One image or several: paths; the bytes of an image file; PIL images; uint8 arrays (H, W, 3) or
                (H, W); uint8 tensors (C, H, W) of the network's input size, which are not resized.
            timeout: Seconds until the answers must be there; None for no limit.
            block: Wait for room if ``max_waiting`` images are waiting; False raises QueueFull instead.

        Returns:
            For each image ``{'indices': [...], 'labels': [...], 'probabilities': [...]}``, the most likely class first.

        Raises:
            UserError: An image cannot be read or has another size, or the timeout is no time; none of the images of
                the call is computed then.
            TimeoutError: ``timeout`` has passed. Images that are not being computed yet are dropped.
            QueueFull: There is no room for the images, and ``block`` is false.
            RuntimeError: The predictor is closed, or was made before a fork; or the network failed, or its logits are
                not finite.
        """
        if os.getpid() != self._process:
            raise RuntimeError('a predictor does not survive a fork: make one in each process.')
        _check_timeout(timeout)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        inputs = [self._prepare(image, index) for index, image in enumerate(_as_list(images))]
        answers: list[Future[dict[str, Any]]] = []
        try:
            answers += self._submit(inputs, deadline, block)
            return [answer.result(_seconds_until(deadline)) for answer in answers]
        except (TimeoutError, FutureTimeoutError) as error:
            raise TimeoutError(f'no answer within {timeout} seconds.') from error
        finally:
            for answer in answers:
                answer.cancel()

    @property
    def waiting(self) -> int:
        """Number of images that wait to be computed."""
        return len(self._queue)

    def close(self, drain: bool = True, *, timeout: float | None = None) -> None:
        """End the thread.

        Args:
            drain: Answer the images that are waiting; False lets their calls fail with a RuntimeError.
            timeout: Seconds to wait for the network, which cannot be interrupted; None for no limit.

        Raises:
            UserError: The timeout is no time.
            TimeoutError: ``timeout`` has passed. All calls fail with a RuntimeError, that of the batch that is being
                computed included; the thread ends when the network returns, and does not keep the program from ending.
        """
        if os.getpid() != self._process:
            return
        _check_timeout(timeout)
        with self._changed:
            self._closed = True
            if not drain:
                self._fail_waiting()
            self._changed.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return
        with self._changed:
            self._fail_waiting()
            for each in self._running:
                _fail(each.answer, 'the predictor was closed before the network returned.')
        raise TimeoutError(f'the network has not returned within {timeout} seconds.')

    def __enter__(self) -> 'Predictor':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, image: Any, index: int) -> Tensor:
        """Return an image as uint8 (C, H, W) on the CPU, checked so that it cannot fail a batch."""
        if isinstance(image, Tensor):
            try:
                return self._prepare_tensor(image, index)
            except UserError:
                raise
            except Exception as error:  # a subclass, or a nested tensor, may refuse anything
                raise UserError(f'image {index} cannot be read: {first_line(error)}') from error
        if self._shape[0] > MOST_CHANNELS:
            raise UserError(f'the network takes {self._shape[0]} channels, which no image file has: use tensors.')
        name = f'image {index}' if not isinstance(image, str | os.PathLike) else printable(str(image))
        try:
            return torch.as_tensor(self._transform(_to_pil(image, self._mode)))
        except Exception as error:  # Pillow's decoders raise many types
            raise UserError(f'{name} cannot be read: {first_line(error)}') from error

    def _prepare_tensor(self, image: Tensor, index: int) -> Tensor:
        if image.dtype != torch.uint8 or tuple(image.shape) != self._shape:
            raise UserError(f'image {index} is a tensor {image.dtype} {tuple(image.shape)}: the network takes '
                            f'torch.uint8 {self._shape}.')
        with torch.inference_mode():  # a tensor that is sparse, or has no data, refuses to be copied
            return torch.empty(self._shape, dtype=torch.uint8).copy_(image.detach().as_subclass(Tensor))

    def _submit(self, images: list[Tensor], deadline: float, block: bool) -> list[Future[dict[str, Any]]]:
        answers: list[Future[dict[str, Any]]] = []
        try:
            with self._changed:
                if not block and len(images) > self.max_waiting:
                    raise QueueFull(f'{len(images)} images at a time are more than max_waiting={self.max_waiting}.')
                if not block and len(self._queue) + len(images) > self.max_waiting:
                    raise QueueFull(f'{len(self._queue)} images are waiting, and {len(images)} more would exceed '
                                    f'max_waiting={self.max_waiting}: try again later.')
                for image in images:
                    while not self._closed and len(self._queue) >= self.max_waiting:
                        if not self._changed.wait(_seconds_until(deadline)):
                            raise TimeoutError
                    if self._closed:
                        raise RuntimeError('the predictor is closed.')
                    answers.append(Future())
                    self._queue.append(_Waiting(image, answers[-1]))
                    self._changed.notify_all()
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def _serve(self) -> None:
        """Compute batch after batch until the predictor is closed."""
        try:
            while batch := self._next_batch():
                self._running = [each for each in batch if each.answer.set_running_or_notify_cancel()]
                self._answer(self._running)
                self._running = []
        finally:
            with self._changed:
                self._closed = True
                self._fail_waiting()
                self._changed.notify_all()

    def _next_batch(self) -> list[_Waiting]:
        """Return the next images; none if the predictor is closed and all are answered."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            deadline = time.monotonic() + self.max_wait
            while len(self._queue) < self.batch_size and not self._closed:
                if (seconds := deadline - time.monotonic()) <= 0 or not self._changed.wait(seconds):
                    break
            batch = [self._queue.popleft() for _ in range(min(self.batch_size, len(self._queue)))]
            self._changed.notify_all()
            return batch

    def _fail_waiting(self) -> None:
        while self._queue:
            answer = self._queue.popleft().answer
            if answer.set_running_or_notify_cancel():
                _fail(answer, 'the predictor was closed before it computed this image.')

    def _answer(self, batch: list[_Waiting]) -> None:
        """Answer a batch; if the network fails, each image on its own, so that one cannot fail the others."""
        if not batch:
            return
        try:
            answers = self._compute(torch.stack([each.image for each in batch]))
        except BaseException as error:  # SystemExit, too: every call gets an end
            if len(batch) > 1:
                for each in batch:
                    self._answer([each])
            elif isinstance(error, Exception):
                _fail(batch[0].answer, error)
            else:
                failure = RuntimeError(f'the network raised {type(error).__name__}: {error}')
                failure.__cause__ = error
                _fail(batch[0].answer, failure)
            return
        for each, answer in zip(batch, answers, strict=True):
            if math.isfinite(sum(answer['probabilities'])):
                with contextlib.suppress(InvalidStateError):  # close() has ended the call
                    each.answer.set_result(answer)
            else:
                _fail(each.answer, 'the logits of the network are NaN or infinite.')

    @torch.inference_mode()
    def _compute(self, images: Tensor) -> list[dict[str, Any]]:
        """Return N answers to images (N, C, H, W) in uint8."""
        logits = self._run(images.to(self._device)).float()
        if logits.ndim != 2 or len(logits) != len(images):
            raise RuntimeError(f'the network returned {tuple(logits.shape)} for {len(images)} images; expected logits '
                               f'({len(images)}, classes).')
        probabilities, indices = logits.softmax(-1).topk(min(self.topk, logits.shape[-1]))
        return [
            {'indices': row, 'labels': [self._label(index) for index in row], 'probabilities': values}
            for row, values in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]

    def _label(self, index: int) -> str:
        return self._classes.index_to_description(index) if self._classes is not None else str(index)


def _fail(answer: Future[dict[str, Any]], error: Exception | str) -> None:
    """Let the call that waits for an answer fail, unless it has ended."""
    with contextlib.suppress(InvalidStateError):
        answer.set_exception(RuntimeError(error) if isinstance(error, str) else error)


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not 0 <= timeout <= threading.TIMEOUT_MAX:
        raise UserError(f'timeout {timeout}: expected seconds, at least 0, or None.')


def _as_list(images: Any) -> list[Any]:
    """Return one image, or several, as a list."""
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        return [images]
    if isinstance(images, Tensor | np.ndarray) and images.ndim in (2, 3):
        return [images]
    try:
        return list(images)
    except TypeError as error:
        raise UserError(f'expected images, not {type(images).__name__}.') from error


def _to_pil(image: Any, mode: str) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f'an array {image.dtype} {image.shape}, not uint8 (height, width, channels)')
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_pil_mode(image, mode)
    if not isinstance(image, str | os.PathLike | bytes):
        raise ValueError(f'a {type(image).__name__} is not an image')
    return read_image(io.BytesIO(image) if isinstance(image, bytes) else image, mode)


def _seconds_until(deadline: float) -> float | None:
    return None if deadline == math.inf else max(deadline - time.monotonic(), 0)
