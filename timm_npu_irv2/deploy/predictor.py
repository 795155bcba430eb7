"""What a server calls: images in, answers out, with batches formed from the calls that come at the same time."""

import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ..data.decode import read_image, to_pil_mode
from ..data.pipeline import MOST_CHANNELS, ImagePipeline
from ..errors import UserError, first_line
from .network import InferenceNetwork

__all__ = ['Predictor']

Picture = str | os.PathLike | Image.Image | Tensor
Waiting = tuple[Tensor, Future]


class Predictor:
    """Answers to images, from any number of threads.

    A thread of its own runs the network. While it computes a batch, the images of other calls gather and become the
    next one; each call decodes its own images.

    Args:
        network: What ``to_inference`` or ``load`` gives.
        topk: Classes in an answer, best first.
        batch_size: Images in a batch at most.
        max_wait: Seconds to wait for more images before a batch that is not full is computed.
        compiled: What to run in the network's place, ``torch.compile(network)`` say.
        input_img_mode: PIL mode of the images; None for that of the training.

    Use it as a context manager, or call :meth:`close`.
    """

    def __init__(
            self,
            network: InferenceNetwork,
            topk: int = 5,
            batch_size: int = 8,
            max_wait: float = 0.002,
            compiled: nn.Module | None = None,
            input_img_mode: str | None = None,
    ) -> None:
        if batch_size < 1 or topk < 1:
            raise UserError('a predictor needs a batch_size and a topk of at least 1.')
        self.topk, self.batch_size, self.max_wait = topk, batch_size, max_wait
        self._run = compiled if compiled is not None else network
        self._device = network.conv2d_1a.weight.device
        self._labels = _label_names(network)
        self._shape = (network.in_chans, *network.pretrained_cfg.get('input_size', (3, 299, 299))[1:])
        if network.in_chans <= MOST_CHANNELS:
            pipeline = ImagePipeline.for_model(network, {'input_img_mode': input_img_mode})
            self._mode, self._transform = pipeline.input_img_mode, pipeline.transform()
        self._waiting: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()  # nothing is put behind the mark that ends the thread
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name='predictor', daemon=True)
        self._thread.start()

    def predict(self, images: Picture | Sequence[Picture]) -> list[dict[str, Any]]:
        """The answers to ``images``, in their order.

        Args:
            images: Files, PIL images, or uint8 tensors (C, H, W) of the network's input size, which are taken as they
                are; one or several.

        Returns:
            For each image ``{'indices': [...], 'labels': [...], 'probabilities': [...]}``, best class first.

        Raises:
            UserError: An image can't be read or has another size; none of the call's images is answered then.
            RuntimeError: The predictor is closed.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, Tensor) and images.ndim == 3):
            images = [images]
        inputs = [self._prepare(image, index) for index, image in enumerate(images)]
        with self._submitting:
            if self._closed:
                raise RuntimeError('the predictor is closed.')
            answers = [self._submit(each) for each in inputs]
        return [answer.result() for answer in answers]

    def close(self) -> None:
        """Answer what has been asked, and end the thread."""
        with self._submitting:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def __enter__(self) -> 'Predictor':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, image: Picture, index: int) -> Tensor:
        """(C, H, W) uint8."""
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or tuple(image.shape) != self._shape:
                raise UserError(f'image {index} is a tensor {image.dtype} {tuple(image.shape)}: the network takes '
                                f'torch.uint8 {self._shape}.')
            return image
        if self._shape[0] > MOST_CHANNELS:
            raise UserError(f'the network takes {self._shape[0]} channels, which no image file has: give tensors.')
        try:
            pixels = (to_pil_mode(image, self._mode) if isinstance(image, Image.Image)
                      else read_image(image, self._mode))
            return torch.as_tensor(self._transform(pixels))
        except Exception as error:  # decoders fail in as many ways as files can be damaged
            name = f'image {index}' if isinstance(image, Image.Image) else image
            raise UserError(f'{name} cannot be read: {first_line(error)}') from error

    def _submit(self, image: Tensor) -> Future:
        answer: Future = Future()
        self._waiting.put((image, answer))
        return answer

    def _serve(self) -> None:
        """The thread: batch after batch until the mark that ends it."""
        while (first := self._waiting.get()) is not None:
            batch, ends = self._gather(first)
            try:
                answers: list[Any] = self._answers(torch.stack([image for image, _ in batch]))
            except Exception as error:  # it belongs to those who asked, and the thread goes on
                for _, answer in batch:
                    answer.set_exception(error)
            else:
                for (_, answer), content in zip(batch, answers, strict=True):
                    answer.set_result(content)
            if ends:
                return

    def _gather(self, first: Waiting) -> tuple[list[Waiting], bool]:
        """A batch, and whether the end has been reached."""
        batch, deadline = [first], time.monotonic() + self.max_wait
        while len(batch) < self.batch_size:
            try:
                item = self._waiting.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                break
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    @torch.inference_mode()
    def _answers(self, images: Tensor) -> list[dict[str, Any]]:
        """(N, C, H, W) uint8 -> N answers."""
        logits = self._run(images.to(self._device)).float()
        probabilities, indices = logits.softmax(-1).topk(min(self.topk, logits.shape[-1]))
        return [
            {'indices': row, 'labels': [self._labels[index] if self._labels else str(index) for index in row],
             'probabilities': values}
            for row, values in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]


def _label_names(network: InferenceNetwork) -> list[str] | None:
    """What the classes are called: as was published with the model, else ImageNet's names if it has its classes."""
    if names := network.pretrained_cfg.get('label_names'):
        return list(names)
    if subset := infer_imagenet_subset({'num_classes': network.num_classes}):
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(network.num_classes)]
    return None
