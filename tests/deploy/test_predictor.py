"""The predictor: each call gets its own answers, one bad image harms no other, and every call ends."""

import ctypes
import io
import multiprocessing
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import OURS, fill
from timm_npu_irv2.deploy import Predictor, QueueFull, to_inference
from timm_npu_irv2.errors import UserError

SIZE = 75
CLASSES = 7
SECONDS = 600  # to wait for another thread


class Echo(torch.nn.Module):
    """Answers with the class that an image has in its first pixel, as a network of the right attributes would."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, images):
        self.log.append(len(images))
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 256).float()


class Slow(Echo):
    """Waits in the first batch until it may go on."""

    def __init__(self):
        super().__init__([])
        self.begun, self.go = threading.Event(), threading.Event()

    def forward(self, images):
        self.begun.set()
        assert self.go.wait(SECONDS)
        return super().forward(images)


def wait_until_waiting(predictor: Predictor, count: int) -> None:
    deadline = time.monotonic() + SECONDS
    while predictor.waiting < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def marked(mark):
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    image[0, 0, 0] = mark
    return image


@pytest.fixture(scope='module')
def small():
    """A network that takes images of SIZE pixels."""
    network = to_inference(fill(timm.create_model(OURS, num_classes=CLASSES)).eval())
    network.pretrained_cfg['input_size'] = (3, SIZE, SIZE)
    return network


def test_ten_thousand_answers_go_to_those_who_asked(small):
    batches = []

    def ask(thread):
        wrong = 0
        for index in range(625):
            mark = (thread * 37 + index) % 256
            (answer,) = predictor.predict(marked(mark))
            wrong += answer['indices'][0] != mark
        return wrong

    with Predictor(small, compiled=Echo(batches), batch_size=8) as predictor, ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(ask, range(16))) == 0
    assert sum(batches) == 10_000
    assert max(batches) <= 8


def test_images_that_wait_fill_batches(small):
    slow = Slow()
    with Predictor(small, compiled=slow, batch_size=8) as predictor, ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(predictor.predict, marked(0))]
        assert slow.begun.wait(SECONDS)
        asked += [threads.submit(predictor.predict, marked(mark)) for mark in range(1, 10)]
        wait_until_waiting(predictor, 9)
        slow.go.set()
        assert [answer.result(SECONDS)[0]['indices'][0] for answer in asked] == list(range(10))
    assert slow.log == [1, 8, 1]


def test_answers_are_the_networks(small):
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.inference_mode():
        probabilities = small(images).softmax(-1)
    with Predictor(small, topk=3) as predictor:
        answers = predictor.predict(list(images))
    for answer, row in zip(answers, probabilities, strict=True):
        values, indices = row.topk(3)
        assert answer['indices'] == indices.tolist()
        assert answer['labels'] == [str(index) for index in answer['indices']]
        assert answer['probabilities'] == pytest.approx(values.tolist(), rel=1e-4)


def test_files_and_pillow_images_are_prepared_as_in_evaluation(small, tmp_path):
    small.pretrained_cfg['label_names'] = [f'class {i}' for i in range(CLASSES)]
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    config = timm.data.resolve_data_config(model=small)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        expected = small(transform(Image.fromarray(pixels))[None]).softmax(-1)[0]
    with Predictor(small, topk=CLASSES) as predictor:
        from_file, from_memory = predictor.predict([tmp_path / 'image.png', Image.fromarray(pixels)])
    assert from_file == from_memory
    assert from_file['probabilities'] == pytest.approx(expected[from_file['indices']].tolist(), abs=1e-5)
    assert from_file['labels'] == [f'class {index}' for index in from_file['indices']]
    del small.pretrained_cfg['label_names']


def test_an_error_reaches_its_callers_and_no_one_else(small, tmp_path):
    (tmp_path / 'torn.jpg').write_bytes(b'\xff\xd8\xff')

    class Refusing(Echo):
        def forward(self, images):
            if images[0, 0, 0, 0] == 13:
                raise RuntimeError('the device is gone')
            return super().forward(images)

    with Predictor(small, compiled=Refusing([]), batch_size=1) as predictor:
        with pytest.raises(RuntimeError, match='the device is gone'):
            predictor.predict(marked(13))
        with pytest.raises(UserError, match=r'torn\.jpg cannot be read'):
            predictor.predict([marked(1), tmp_path / 'torn.jpg'])
        with pytest.raises(UserError, match=r'the network takes torch.uint8 \(3, 75, 75\)'):
            predictor.predict(torch.zeros(3, 80, 80, dtype=torch.uint8))
        assert predictor.predict(marked(14))[0]['indices'][0] == 14


def test_closing_answers_what_was_asked(small):
    slow = Slow()
    predictor = Predictor(small, compiled=slow, batch_size=2)
    with ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(predictor.predict, marked(0))]
        assert slow.begun.wait(SECONDS)
        asked += [threads.submit(predictor.predict, marked(mark)) for mark in range(1, 5)]
        wait_until_waiting(predictor, 4)
        closing = threading.Thread(target=predictor.close)
        closing.start()
        slow.go.set()
        assert [answer.result(SECONDS)[0]['indices'][0] for answer in asked] == list(range(5))
        closing.join(SECONDS)
    with pytest.raises(RuntimeError, match='closed'):
        predictor.predict(marked(1))
    predictor.close()


# ------------------------------------------------------------------------------------------------- what goes wrong


class Marked(torch.Tensor):
    """A subclass whose operations fail."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.stack, torch.Tensor.to):
            raise RuntimeError('not with me')
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize('bad', [
    torch.zeros(3, SIZE, SIZE, dtype=torch.uint8, device='meta'),
    torch.zeros(3, SIZE, SIZE, dtype=torch.uint8).to_sparse(),
    torch.zeros(3, SIZE, SIZE), torch.zeros(3, SIZE + 1, SIZE, dtype=torch.uint8),
    None, 3, b'', b'no image', 'nowhere.png',
    np.zeros((3, 4, 5, 6), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 9), np.uint8),
    np.zeros((4, 4), np.int32), np.zeros((4, 4), np.uint16), np.zeros((4, 4), np.float32), np.zeros((4, 4), bool),
    torch.nested.nested_tensor([torch.zeros(3, 4, 4, dtype=torch.uint8)]), 'a\nb.png', '/dev/zero',
    Image.new('RGB', (0, 0)), Image.new('F', (4, 4)), object(), [None], {'a': 1},
], ids=lambda bad: f'{type(bad).__name__}')
def test_what_is_no_image_is_refused_and_harms_no_other_call(small, bad):
    slow = Slow()
    with Predictor(small, compiled=slow, batch_size=8) as predictor, ThreadPoolExecutor(4) as threads:
        others = [threads.submit(predictor.predict, marked(mark)) for mark in (1, 2, 3)]
        try:
            with pytest.raises(UserError) as caught:
                predictor.predict(bad if isinstance(bad, list) else [bad], timeout=0.05)
        finally:
            slow.go.set()
        assert '\n' not in str(caught.value)
        assert [other.result(SECONDS)[0]['indices'][0] for other in others] == [1, 2, 3]


@pytest.mark.parametrize('bad', [None, 3, io.BytesIO(b'')])
def test_what_is_no_image_is_named_by_its_type(small, bad):
    """An open file is read by nobody: who closes it, and from where it is read, would be open questions."""
    said = f'image 0 cannot be read: a {type(bad).__name__} is not an image'
    with Predictor(small, compiled=Echo([])) as predictor, pytest.raises(UserError, match=said):
        predictor.predict([bad])


def test_there_are_no_more_answers_than_classes(small):
    with Predictor(small, topk=100) as predictor:
        (answer,) = predictor.predict(marked(1))
    assert sorted(answer['indices']) == list(range(CLASSES))


def test_closing_does_not_wait_for_a_batch_to_fill(small):
    predictor = Predictor(small, compiled=Echo([]), batch_size=2, max_wait=10 * SECONDS)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(predictor.predict, marked(1))
        wait_until_waiting(predictor, 1)
        predictor.close(timeout=SECONDS)
        assert call.result(SECONDS)[0]['indices'][0] == 1


def test_a_subclass_of_tensor_is_an_image(small):
    with Predictor(small, compiled=Echo([])) as predictor:
        answers = predictor.predict([marked(5).as_subclass(Marked), marked(6)], timeout=SECONDS)
    assert [answer['indices'][0] for answer in answers] == [5, 6]


def test_arrays_and_bytes_are_images(small):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'png')
    with Predictor(small) as predictor:
        (expected,) = predictor.predict(Image.fromarray(pixels))
        answers = [*predictor.predict(pixels), *predictor.predict(file.getvalue()),
                   *predictor.predict(np.stack([pixels, pixels]))]
        assert [answer['indices'] for answer in answers] == [expected['indices']] * 4
        for answer in answers:
            assert answer['probabilities'] == pytest.approx(expected['probabilities'], rel=1e-4)
        assert len(predictor.predict(pixels[..., 0])) == 1  # grey


def test_a_failure_inside_the_network_concerns_one_image(small):
    class Refusing(Slow):
        def forward(self, images):
            if (images[:, 0, 0, 0] == 13).any():
                raise RuntimeError('thirteen')
            return super().forward(images)

    slow = Refusing()
    with Predictor(small, compiled=slow, batch_size=8) as predictor, ThreadPoolExecutor(8) as threads:
        first = threads.submit(predictor.predict, marked(0))
        assert slow.begun.wait(SECONDS)
        others = [threads.submit(predictor.predict, marked(mark)) for mark in (11, 12, 13, 14)]
        wait_until_waiting(predictor, 4)
        slow.go.set()
        assert first.result(SECONDS)[0]['indices'][0] == 0
        with pytest.raises(RuntimeError, match='thirteen'):
            others[2].result(SECONDS)
        assert [others[index].result(SECONDS)[0]['indices'][0] for index in (0, 1, 3)] == [11, 12, 14]


@pytest.mark.parametrize(('forward', 'message'), [
    (lambda images: exec('raise SystemExit(3)'), 'SystemExit'),
    (lambda images: torch.zeros(0, 9), r'returned \(0, 9\)'),
    (lambda images: torch.zeros(len(images)), 'returned'),
    (lambda images: None, 'float'),
])
def test_a_broken_network_ends_every_call(small, forward, message):
    class Broken(torch.nn.Module):
        def forward(self, images):
            return forward(images)

    with Predictor(small, compiled=Broken()) as predictor:
        for _ in range(2):  # the thread lives on
            with pytest.raises((RuntimeError, AttributeError), match=message):
                predictor.predict(marked(1), timeout=SECONDS)


def test_a_call_ends_with_its_time(small):
    slow = Slow()
    with Predictor(small, compiled=slow, batch_size=1) as predictor, ThreadPoolExecutor(1) as threads:
        first = threads.submit(predictor.predict, marked(1))
        assert slow.begun.wait(SECONDS)
        with pytest.raises(TimeoutError, match=r'0\.05 seconds'):
            predictor.predict(marked(2), timeout=0.05)
        slow.go.set()
        assert first.result(SECONDS)[0]['indices'][0] == 1
        assert predictor.predict(marked(3), timeout=SECONDS)[0]['indices'][0] == 3
    assert sum(slow.log) == 2  # 2 was dropped


@pytest.mark.parametrize('timeout', [float('nan'), -1, 1e300])
def test_a_timeout_that_is_no_time_is_refused(small, timeout):
    with Predictor(small, compiled=Echo([])) as predictor, pytest.raises(UserError, match='timeout'):
        predictor.predict(marked(1), timeout=timeout)


def test_logits_that_are_not_finite_are_an_error_of_their_image(small):
    class Broken(Slow):
        def forward(self, images):
            logits = super().forward(images)
            logits[images[:, 0, 0, 0] == 13] = float('nan')
            return logits

    slow = Broken()
    with Predictor(small, compiled=slow, batch_size=8) as predictor, ThreadPoolExecutor(8) as threads:
        first = threads.submit(predictor.predict, marked(0))
        assert slow.begun.wait(SECONDS)
        others = [threads.submit(predictor.predict, marked(mark)) for mark in (12, 13)]
        slow.go.set()
        assert first.result(SECONDS)[0]['indices'][0] == 0 and others[0].result(SECONDS)[0]['indices'][0] == 12
        with pytest.raises(RuntimeError, match='NaN or infinite'):
            others[1].result(SECONDS)


@pytest.mark.timeout(600)
def test_a_pipe_is_no_image(small, tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    with Predictor(small, compiled=Echo([])) as predictor, pytest.raises(UserError, match=r'a\.png cannot be read'):
        predictor.predict(tmp_path / 'a.png')


def test_more_images_than_may_wait_are_told_at_once(small):
    with Predictor(small, compiled=Echo([]), max_waiting=2) as predictor:
        with pytest.raises(QueueFull, match='3 images at a time are more than max_waiting=2'):
            predictor.predict([marked(mark) for mark in (1, 2, 3)], block=False)
        assert len(predictor.predict([marked(mark) for mark in (1, 2, 3)])) == 3


def test_the_queue_is_bounded(small):
    slow = Slow()
    with Predictor(small, compiled=slow, batch_size=1, max_waiting=2) as predictor, ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(predictor.predict, marked(0))]
        assert slow.begun.wait(SECONDS)
        calls += [threads.submit(predictor.predict, marked(mark)) for mark in (1, 2)]
        wait_until_waiting(predictor, 2)
        with pytest.raises(QueueFull, match='max_waiting=2'):
            predictor.predict(marked(3), block=False)
        with pytest.raises(TimeoutError):
            predictor.predict([marked(3)] * 3, timeout=0.05)
        assert predictor.waiting == 2
        calls.append(threads.submit(predictor.predict, [marked(mark) for mark in (4, 5, 6)]))  # waits for room
        slow.go.set()
        assert [answer['indices'][0] for call in calls for answer in call.result(SECONDS)] == [0, 1, 2, 4, 5, 6]


def test_closing_may_drop_what_waits(small):
    slow = Slow()
    predictor = Predictor(small, compiled=slow, batch_size=1)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(predictor.predict, marked(1))
        assert slow.begun.wait(SECONDS)
        second = threads.submit(predictor.predict, marked(2))
        wait_until_waiting(predictor, 1)
        closing = threading.Thread(target=predictor.close, kwargs={'drain': False})
        closing.start()
        with pytest.raises(RuntimeError, match='closed before'):
            second.result(SECONDS)
        slow.go.set()
        assert first.result(SECONDS)[0]['indices'][0] == 1
        closing.join(SECONDS)


def test_a_call_that_waits_for_room_ends_when_the_predictor_is_closed(small):
    """Also where the network does not return, so that there will be no room."""
    slow = Slow()
    predictor = Predictor(small, compiled=slow, batch_size=1, max_waiting=1)
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(predictor.predict, marked(0))]
        assert slow.begun.wait(SECONDS)
        calls.append(threads.submit(predictor.predict, marked(1)))
        wait_until_waiting(predictor, 1)
        calls.append(threads.submit(predictor.predict, marked(2)))
        time.sleep(0.1)  # so that it does wait; a later call is refused in any case
        with pytest.raises(TimeoutError):
            predictor.close(timeout=0.01)
        try:
            for call in calls:
                with pytest.raises(RuntimeError, match='closed'):
                    call.result(SECONDS)
        finally:
            slow.go.set()
        predictor.close()


def test_what_a_call_has_queued_is_dropped_if_there_is_no_room_for_the_rest(small):
    slow = Slow()
    with Predictor(small, compiled=slow, batch_size=1, max_waiting=2) as predictor, ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(predictor.predict, marked(0))]
        assert slow.begun.wait(SECONDS)
        calls.append(threads.submit(predictor.predict, marked(1)))
        wait_until_waiting(predictor, 1)
        with pytest.raises(TimeoutError):
            predictor.predict([marked(2)] * 3, timeout=0.05)
        slow.go.set()
        assert [call.result(SECONDS)[0]['indices'][0] for call in calls] == [0, 1]
    assert sum(slow.log) == 2


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_if_the_thread_dies_calls_fail_instead_of_waiting_for_ever(small):
    """A server may kill threads that have worked for too long, with an exception from outside."""
    predictor = Predictor(small, compiled=Echo([]))
    (thread,) = (each for each in threading.enumerate() if each.name == 'predictor')
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    for _ in range(2):
        with pytest.raises(RuntimeError, match='closed'):
            predictor.predict(marked(1), timeout=SECONDS)
    predictor.close()


def test_a_network_of_many_channels_takes_tensors_alone():
    network = to_inference(timm.create_model(OURS, num_classes=2, in_chans=5).eval())
    network.pretrained_cfg['input_size'] = (5, SIZE, SIZE)
    with Predictor(network, compiled=Echo([])) as predictor:
        with pytest.raises(UserError, match='takes 5 channels, which no image file has: use tensors'):
            predictor.predict(Image.new('RGB', (9, 9)))
        assert predictor.predict(torch.full((5, SIZE, SIZE), 3, dtype=torch.uint8))[0]['indices'][0] == 3


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_child_of_a_fork_is_told(small):
    with Predictor(small, compiled=Echo([])) as predictor:
        def child(connection):
            try:
                predictor.predict(marked(1))
            except RuntimeError as error:
                connection.send(str(error))
            predictor.close()

        parent, connection = multiprocessing.Pipe()
        process = multiprocessing.get_context('fork').Process(target=child, args=(connection,))
        process.start()
        assert parent.poll(SECONDS) and 'fork' in parent.recv()
        process.join(SECONDS)
        assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_child_of_a_fork_closes_though_another_thread_held_the_lock(small, monkeypatch):
    """That thread does not exist in the child, so nobody would release the lock there."""
    locked, go = threading.Event(), threading.Event()

    class Delayed(Future):
        """The answer to a call, made while the lock is held."""

        def __init__(self):
            super().__init__()
            locked.set()
            assert go.wait(SECONDS)

    monkeypatch.setattr('timm_npu_irv2.deploy.predictor.Future', Delayed)
    with Predictor(small, compiled=Echo([])) as predictor, ThreadPoolExecutor(1) as threads:
        call = threads.submit(predictor.predict, marked(1))
        assert locked.wait(SECONDS)
        child = multiprocessing.get_context('fork').Process(target=predictor.close)
        child.start()
        child.join(SECONDS)
        ended = child.exitcode
        child.kill()
        go.set()
        assert call.result(SECONDS)[0]['indices'][0] == 1 and ended == 0


@pytest.mark.parametrize('options', [
    {'max_wait': float('nan')}, {'max_wait': -1}, {'max_wait': float('inf')}, {'batch_size': 0}, {'topk': 0},
    {'max_waiting': 0}, {'batch_size': float('nan')}, {'batch_size': 2.5}, {'topk': '5'}])
def test_arguments_out_of_range_are_refused(small, options):
    with pytest.raises(UserError):
        Predictor(small, **options)


INPUTS = st.one_of(
    st.none(), st.integers(), st.text(max_size=20), st.binary(max_size=200), st.floats(),
    st.builds(np.ones, st.lists(st.integers(0, 5), max_size=4).map(tuple),
              st.sampled_from([np.uint8, np.int64, np.float32, bool, object])),
    st.builds(lambda shape, kind: torch.ones(shape, dtype=kind), st.lists(st.sampled_from([0, 1, 3, SIZE]), max_size=4),
              st.sampled_from([torch.uint8, torch.float32, torch.bool])),
    st.builds(Image.new, st.sampled_from(['1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'I', 'F', 'LAB', 'I;16']),
              st.tuples(st.integers(0, 9), st.integers(0, 9))),
)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(inputs=st.lists(st.one_of(INPUTS, st.lists(INPUTS, max_size=3)), min_size=1, max_size=4))
def test_any_input_is_answered_or_refused(small, inputs):
    with Predictor(small, compiled=Echo([])) as predictor:
        for each in inputs:
            try:
                answers = predictor.predict(each, timeout=SECONDS)
            except UserError as error:
                assert '\n' not in str(error)
            else:
                assert all(0 <= answer['indices'][0] < 256 for answer in answers)


def test_closing_does_not_wait_for_ever_for_a_network_that_does_not_return(small):
    slow = Slow()
    predictor = Predictor(small, compiled=slow, batch_size=1)
    with pytest.raises(UserError, match='timeout'):
        predictor.close(timeout=float('nan'))
    with ThreadPoolExecutor(2) as threads:
        computed = threads.submit(predictor.predict, marked(1))
        assert slow.begun.wait(300)
        waiting = threads.submit(predictor.predict, marked(2))
        while predictor.waiting < 1:
            time.sleep(0.001)
        with pytest.raises(TimeoutError, match=r'has not returned within 0\.01 seconds'):
            predictor.close(timeout=0.01)
        for call, message in (computed, 'before the network returned'), (waiting, 'before it computed this image'):
            with pytest.raises(RuntimeError, match=message):
                call.result(300)
        slow.go.set()
        predictor.close()  # waits for the thread, which has lost no answer and raised nothing
    assert slow.log == [1]
