"""Several processes: who they are, that they compute one thing together, how they are started and stopped."""

import argparse
import copy
import dataclasses
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from tests.conftest import ROOT, reserved_port
from tests.data.batches import Batches
from timm_npu_irv2.data.folder import FolderReader, list_images
from timm_npu_irv2.distributed import (
    StopRequest,
    World,
    agree,
    barrier,
    device_name,
    gather_objects,
    initialize,
    is_launched,
    is_lost_peer,
    launch,
    on_primary,
    shutdown,
    sum_over_ranks,
    together,
)
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.precision import create_precision
from timm_npu_irv2.serialization import write_checkpoint
from timm_npu_irv2.training import setup
from timm_npu_irv2.training.checkpoint import RunInfo, resume, training_state
from timm_npu_irv2.training.engine import Trainer, TrainSettings
from timm_npu_irv2.training.evaluation import evaluate
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.training.output_dir import output_dir


def in_processes(count: int, works: dict[str, Callable[[World], Any]], folder: Path) -> dict[str, list]:
    """Run each ``work(world)`` in ``count`` processes that joined each other; what each returned, by rank."""
    with reserved_port() as port:
        mp.spawn(_process, (count, port, works, folder), nprocs=count)
    results = [torch.load(folder / f'{rank}.pt') for rank in range(count)]
    return {name: [result[name] for result in results] for name in works}


def _process(rank: int, count: int, port: int, works: dict[str, Callable[[World], Any]], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = initialize('cpu')
    torch.save({name: work(world) for name, work in works.items()}, folder / f'{rank}.pt')
    barrier(world)
    shutdown(world)


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> dict[str, list]:
    """What two processes find; they are started once, since that takes longer than all they do."""
    works: dict[str, Callable[[World], Any]] = {
        'tell': _tell,
        'stop': _stop_at,
        'gradient': Train('--no-ddp-bb'),
        'compressed': Train('--no-ddp-bb', '--grad-compress', 'fp16'),
        'float32': Train('--model-ema', count=6),
        'O2': Train('--opt-level', 'O2', '--no-ddp-bb', '--model-ema', count=6),
        'evaluate': _evaluate,
    }
    folder = tmp_path_factory.mktemp('two')
    works['folder'] = OpenFolder(folder)
    works['mid-epoch'] = ResumeInMidEpoch(folder)
    works['failures'] = fail_in_one
    works['statistics'] = evaluate_distributed
    works['folders'] = EnterFolders(folder)
    return in_processes(2, works, folder)


class OpenFolder:
    """A picklable call: a process's searches of a folder, and what it found there or why it found nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, world: World) -> tuple[int, list[tuple[str, int]], str, str]:
        if world.is_primary:
            for name in 'ant/1.png', 'ant/10.png', 'ant/2.png', 'bee/é.png', 'bee/deep/1.png', '../empty/no/image':
                path = self.folder / 'images' / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(name)
        barrier(world)
        searched = []
        search = list_images
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('timm_npu_irv2.data.folder.list_images', lambda *args: searched.append(args) or search(*args))
            reader = FolderReader(self.folder / 'images', {'ant': 0, 'bee': 1}, class_map=True, world=world)
        found = [(file.read().decode(), target) for file, target in map(reader.__getitem__, range(len(reader)))]
        with pytest.raises(UserError) as caught:
            FolderReader(self.folder / 'empty', world=world)
        return len(searched), found, reader.hash_names(), str(caught.value)


# One process


def test_without_an_environment_there_is_one_process(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    world = initialize('cpu')
    assert (world.rank, world.size, world.device) == (0, 1, torch.device('cpu'))
    assert world.is_primary and not world.distributed
    assert gather_objects('x', world) == ['x']
    barrier(world)
    shutdown(world)


@pytest.mark.parametrize(('variables', 'said'), [
    ({'RANK': 'abc', 'WORLD_SIZE': '2'}, "RANK='abc' is not a number"), ({'WORLD_SIZE': ''}, "WORLD_SIZE='' is not"),
    ({'SLURM_NTASKS': '2(x3)\n'}, r"SLURM_NTASKS='2\(x3\)\\n' is not"),
    ({'LOCAL_RANK': '-1'}, "LOCAL_RANK='-1' is not"),
    ({'RANK': '2', 'WORLD_SIZE': '2'}, 'number 2 of 2, from 0 on'),
])
def test_odd_counts_of_a_launcher_are_one_line(monkeypatch, variables, said):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for read in lambda: initialize('cpu'), is_launched:
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert '\n' not in str(caught.value)


def test_a_sum_over_one_process_is_a_copy():
    value = torch.ones(2)
    total = sum_over_ranks(value, World())
    total += 1
    assert value.tolist() == [1, 1]


def test_signals_are_caught_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(World()) as stop:
        assert stop.poll() == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.poll() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert stop.poll() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_terminal_stops_the_run_unless_it_was_started_with_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, expected in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
            signal.signal(signal.SIGHUP, handler)
            with StopRequest(World()) as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.poll() == expected
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_taken_where_nobody_reads_the_messages():
    """As after ``2>&1 | head -1``."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    errors = os.dup(2)
    os.dup2(write_end, 2)
    try:
        with StopRequest(World()) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.poll() == signal.SIGTERM
    finally:
        os.dup2(errors, 2)
        for number in errors, write_end:
            os.close(number)


def test_an_insistent_interrupt_is_an_interrupt(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('timm_npu_irv2.distributed.time.monotonic', lambda: now[0])
    with StopRequest(World()):
        signal.raise_signal(signal.SIGINT)
        now[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# Two processes


def _tell(world: World) -> dict:
    exact = sum_over_ranks(torch.tensor([2**53 + world.rank, 1]), world)
    works: list[int] = []
    on_primary(lambda: works.append(world.rank), world)
    return {'rank': world.rank, 'size': world.size, 'sum': exact, 'all': gather_objects({'rank': world.rank}, world),
            'works': works}


def test_processes_know_each_other(two):
    told = two['tell']
    assert [(each['rank'], each['size']) for each in told] == [(0, 2), (1, 2)]
    assert all(each['sum'].tolist() == [2**54 + 1, 2] for each in told)
    assert told[0]['all'] == [{'rank': 0}, {'rank': 1}] and told[1]['all'] == []
    assert told[0]['works'] == [0] and told[1]['works'] == []


def test_rank_0_alone_searches_a_folder_and_all_have_its_images_or_its_error(two):
    (searches, *found), (others, *same) = two['folder']
    assert (searches, others) == (1, 0) and found == same
    assert found[0] == [('ant/1.png', 0), ('ant/2.png', 0), ('ant/10.png', 0), ('bee/é.png', 1)]
    assert found[2].endswith('empty: no images in this folder.')


def failure_of(work: Callable[[], Any]) -> tuple[str, str, bool]:
    """Type and text of the error, and whether another process reports it."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, 'is_echo', False)
    return '', '', False


def fail_in_one(world: World) -> list[tuple[str, str, bool]]:
    """What each process learns of a failure in one of them; whoever waited for the failed one would never return."""
    model, labels = torch.nn.Flatten(), torch.zeros(2, dtype=torch.long)

    def batches(failing: int):
        yield torch.zeros(2, 3), labels
        if world.rank == failing:
            raise UserError('torn.jpg cannot be read.')

    def find(failing: int) -> int:
        if world.rank == failing:
            raise KeyError('lost')
        return world.rank

    assert together(lambda: find(-1), world) == world.rank
    assert evaluate(model, batches(-1), world)['count'] == 4
    return [failure_of(work) for work in (
        lambda: together(lambda: find(0), world), lambda: together(lambda: find(1), world),
        lambda: evaluate(model, batches(0), world), lambda: evaluate(model, batches(1), world),
        lambda: agree(lambda: next(raising(UserError('full'))), world),
        lambda: agree(lambda: next(raising(KeyError('gone'))), world))]


def raising(error: Exception):
    raise error
    yield


def test_a_failure_in_one_process_ends_the_work_of_all_and_one_reports_it(two):
    first, second = two['failures']
    torn = 'torn.jpg cannot be read.'
    assert first == [('KeyError', "'lost'", False), ('UserError', "rank 1: 'lost'", True), ('UserError', torn, False),
                     ('UserError', f'rank 1: {torn}', True), ('UserError', 'full', False),
                     ('KeyError', "'gone'", False)]
    assert second == [('UserError', "'lost'", True), ('KeyError', "'lost'", False), ('UserError', torn, True),
                      ('UserError', torn, False), ('UserError', 'full', True), ('UserError', "'gone'", True)]


def evaluate_distributed(world: World) -> list[float]:
    """The statistics of this process after an evaluation of a model that DDP wraps."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(3))
    model = torch.nn.parallel.DistributedDataParallel(network)
    mean = network[1].running_mean.fill_(world.rank)
    evaluate(model, [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))], world)
    return mean.tolist()


def test_an_evaluation_goes_past_ddp_whose_forward_waits_for_processes_with_fewer_batches(two):
    """It would have shared the statistics of rank 0, too."""
    assert two['statistics'] == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(('error', 'expected'), [
    (torch.distributed.DistNetworkError('The client socket has timed out'), True),
    (RuntimeError('[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:7'), True),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
])
def test_the_end_of_another_process_is_known_by_its_error(error, expected):
    assert is_lost_peer(error) is expected


class EnterFolders:
    """Enter a new output folder, and one of another run."""

    def __init__(self, folder: Path) -> None:
        self.new, self.old = folder / 'new', folder / 'old'

    def __call__(self, world: World) -> tuple[list[bool], tuple[str, str, bool]]:
        inside = []
        with output_dir(self.new, world):
            inside.append((self.new / '.lock').exists())
        if world.is_primary:
            self.old.mkdir()
            (self.old / 'last.pth.tar').touch()
        return inside, failure_of(lambda: output_dir(self.old, world).__enter__())


def test_an_output_folder_is_locked_by_rank_0_and_refused_in_all_processes(two):
    for rank, (inside, (kind, text, is_echo)) in enumerate(two['folders']):
        assert inside == [True] and kind == 'UserError' and 'checkpoints of another run (last.pth.tar)' in text
        assert is_echo == (rank > 0)


def _compute_slowly(world: World) -> str:
    return agree(lambda: time.sleep(25) or 'done', world)


@pytest.mark.long
def test_what_rank_0_computes_may_take_longer_than_a_collective(tmp_path, monkeypatch):
    monkeypatch.setenv('COLLECTIVE_TIMEOUT', '12')
    assert in_processes(2, {'slow': _compute_slowly}, tmp_path)['slow'] == ['done', 'done']


def _stop_at(world: World) -> int:
    """The step after which a process stops if rank 1 is told to at its third."""
    with StopRequest(world) as stop:
        for step in range(10):
            if step == 3 and world.rank == 1:
                signal.raise_signal(signal.SIGTERM)
            if stop.poll():
                return step
    return -1


def test_a_signal_to_one_process_stops_all_after_the_same_step(two):
    assert two['stop'] == [4, 4]


def trainer_of(
        world: World,
        batches: Batches,
        args: argparse.Namespace,
        accumulate: int = 1,
        checkpoint: Path | None = None,
) -> Trainer:
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=4).to(memory_format=torch.channels_last)
    task = ClassificationTask(model, verbose=False)
    precision = create_precision(world.device, amp=args.amp, opt_level=args.opt_level)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=1.0)
    task.trainable_module, optimizer = precision.prepare(task.trainable_module, optimizer)
    if args.model_ema:
        setup.setup_ema(task, precision, decay=args.model_ema_decay)
    settings = TrainSettings(grad_accum_steps=accumulate)
    trainer = Trainer(task, batches, optimizer, precision, world, settings=settings)
    if checkpoint is not None:
        resume(trainer, checkpoint, info_of(args))
    setup.compile_and_distribute(
        task, optimizer, world, sync_buffers=not args.no_ddp_bb, grad_compress=args.grad_compress)
    return trainer


def info_of(args: argparse.Namespace) -> RunInfo:
    return RunInfo(args.model, args.num_classes, vars(args))


def half_batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return Batches((torch.randn(4, 3, 64, 64, generator=generator), torch.randint(4, (4,), generator=generator))
                   for _ in range(count))


def _train(words: list[str], count: int, world: World) -> dict:
    args = parse_args(['--model', 'test_resnet', '--num-classes', '4', *words])
    trainer = trainer_of(world, Batches(half_batches(count)[world.rank::world.size]), args, 1)
    metrics = trainer.train_one_epoch()
    setup.distribute_batch_norm(trainer.task, world, args.dist_bn)
    ema = trainer.task.get_trainable_module(ema=True)
    return {'weights': trainer.precision.model_state_dict(trainer.task.get_trainable_module()), 'loss': metrics['loss'],
            'ema': ema.module.state_dict() if ema is not None else {}}


class Train:
    """A picklable call of :func:`_train`."""

    def __init__(self, *words: str, count: int = 2) -> None:
        self.words, self.count = list(words), count

    def __call__(self, world: World) -> dict:
        return _train(self.words, self.count, world)


def test_gradients_are_those_of_one_process_that_averages_the_half_batches(two):
    """A step of SGD with learning rate 1 moves the weights by the gradient."""
    both = two['gradient']
    args = parse_args(['--model', 'test_resnet', '--num-classes', '4'])
    alone = trainer_of(World(), half_batches(2), args, accumulate=2)
    before = {key: value.clone() for key, value in alone.task.trainable_module.named_parameters()}
    metrics = alone.train_one_epoch()
    for name, parameter in alone.task.trainable_module.named_parameters():
        gradient, theirs = before[name] - parameter, before[name] - both[0]['weights'][name]
        assert (gradient - theirs).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    assert both[0]['loss'] == pytest.approx(metrics['loss'], rel=1e-6)


def test_compressed_gradients_are_rounded_alike_on_all_processes(two):
    exact, (one, other) = two['gradient'][0]['weights'], (each['weights'] for each in two['compressed'])
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = [name for name in exact if not torch.equal(one[name], exact[name])]
    assert len(changed) > 10
    for name in changed:
        assert (one[name] - exact[name]).norm() < 1e-3 * exact[name].norm() + 1e-3, name


@pytest.mark.parametrize('precision', ['float32', 'O2'])
def test_processes_end_an_epoch_with_bit_equal_weights_averages_and_statistics(two, precision):
    one, other = two[precision]
    for part in ('weights', 'ema'):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())
    assert one['loss'] == other['loss']


class Resume:
    """A picklable call: the weights after three steps, and after the third by a trainer that went on from two."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    def __call__(self, world: World) -> tuple[dict, dict]:
        args = parse_args(['--num-classes', '4', '--no-ddp-bb', *self.words])
        generator = torch.Generator().manual_seed(world.rank)
        batches = [(torch.randn(2, 3, 75, 75, generator=generator), torch.randint(4, (2,), generator=generator))
                   for _ in range(3)]
        undisturbed, resumed = (trainer_of(world, Batches(batches[:2]), args, 1) for _ in range(2))
        undisturbed.train_one_epoch()
        load(resumed, copy.deepcopy(weights_of(undisturbed)))
        resumed.position = dataclasses.replace(undisturbed.position)
        for trainer in undisturbed, resumed:
            trainer.loader = Batches(batches[2:])
            trainer.train_one_epoch()
        return weights_of(undisturbed), weights_of(resumed)


class ResumeInMidEpoch:
    """A picklable call: what differs between a trainer and one that went on from its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / 'a.pth.tar'

    def __call__(self, world: World) -> tuple[list[str], list[str]]:
        args = parse_args(['--model', 'test_resnet', '--num-classes', '4', '--no-ddp-bb'])
        batches = Batches(half_batches(6)[world.rank::world.size])
        undisturbed = trainer_of(world, batches, args)
        undisturbed.settings = TrainSettings(recovery_interval=2)
        undisturbed.on_recovery = lambda trainer: self.save(trainer, info_of(args))
        undisturbed.train_one_epoch()
        resumed = trainer_of(world, batches, args, checkpoint=self.path)
        own = torch.load(self.path.with_suffix(f'.{world.rank}'))
        at_once = [name for name, buffer in unwrap_model(resumed.module).named_buffers()
                   if not torch.equal(buffer, own[name])]
        resumed.train_one_epoch()
        expected = weights_of(undisturbed)
        return at_once, [name for name, value in weights_of(resumed).items() if not torch.equal(value, expected[name])]

    def save(self, trainer: Trainer, info: RunInfo) -> None:
        torch.save(dict(unwrap_model(trainer.module).named_buffers()), self.path.with_suffix(f'.{trainer.world.rank}'))
        state = training_state(trainer, info)
        if state is not None:
            write_checkpoint(state, self.path)
        barrier(trainer.world)


def test_processes_go_on_with_the_buffers_of_their_own(two):
    """DDP's constructor broadcasts those of rank 0."""
    assert two['mid-epoch'] == [([], []), ([], [])]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.precision.model_state_dict(trainer.task.get_trainable_module())


def load(trainer: Trainer, weights: dict[str, torch.Tensor]) -> None:
    trainer.precision.load_model_state_dict(trainer.task.get_trainable_module(), weights)


@pytest.fixture(scope='module')
def three(tmp_path_factory) -> dict[str, list]:
    works = {
        'evaluate': _evaluate,
        'float32': Resume('--model', 'inception_resnet_v2_npu'),
        'O2': Resume('--model', 'test_resnet', '--opt-level', 'O2'),
    }
    return in_processes(3, works, tmp_path_factory.mktemp('three'))


@pytest.mark.parametrize('precision', ['float32', 'O2'])
def test_three_processes_go_on_bit_for_bit(three, precision):
    """DDP adds up gradients in another arrangement in a process's first step, which three summands notice."""
    for one, other in three[precision]:
        assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []


def _evaluate(world: World) -> dict:
    generator = torch.Generator().manual_seed(0)
    images, target = torch.randn(103, 3, generator=generator), torch.randint(7, (103,), generator=generator)
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 7)
    own = range(world.rank, 103, world.size)
    loader = list(zip(images[own].split(5), target[own].split(5), strict=True))
    return evaluate(model, loader, world)


def test_an_evaluation_is_the_same_number_for_one_two_and_three_processes(two, three):
    alone = _evaluate(World())
    for metrics in two['evaluate'] + three['evaluate']:
        assert metrics | {'loss': 0} == alone | {'loss': 0}
        assert metrics['loss'] == pytest.approx(alone['loss'], rel=1e-6)


# The launcher


def test_a_list_of_one_card_names_the_device():
    assert device_name('cuda', '3') == 'cuda:3'
    assert device_name('cuda:1', None) == 'cuda:1'
    assert device_name(None, None) is None


def test_a_process_knows_if_a_launcher_has_started_it(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    assert not is_launched()
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert is_launched()


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(('', 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f'port {port} is in use'):
            launch('train.py', [], device='cpu', device_list='0,1', dist_url=f'tcp://127.0.0.1:{port}')


@pytest.mark.parametrize(('port', 'options', 'said'), [
    ('http', {'nodes': 2}, "MASTER_PORT 'http' is not a port"), ('70000', {'nodes': 2}, "MASTER_PORT '70000' is not"),
    ('29500', {'dist_url': 'tcp://localhost:99999'}, "--dist-url '99999' is not a port"),
])
def test_a_port_that_is_none_is_named(monkeypatch, port, options, said):
    monkeypatch.setenv('MASTER_PORT', port)
    with pytest.raises(UserError, match=said):
        launch('train.py', [], device='cpu', device_list='0,1', **options)
    monkeypatch.setenv('MASTER_PORT', '99999')
    with pytest.raises(UserError, match="MASTER_PORT '99999' is not a port"):
        initialize('cpu', world_size=2, rank=0)


WITNESS = Path(__file__).parent / 'witness' / 'listening_addresses.py'


def test_the_store_of_one_machine_is_out_of_reach_of_others_and_the_run_has_a_random_id(capfd, free_port):
    """Whoever reaches the store runs code in the processes."""
    for url in None, None, f'tcp://127.0.0.1:{free_port}':
        assert launch(str(WITNESS), [], device='cpu', device_list='0,1', dist_url=url) == 0
    run_ids, addresses = zip(*(line.split() for line in capfd.readouterr().out.splitlines()), strict=True)
    assert addresses == ('127.0.0.1',) * 6
    assert len(set(run_ids)) == 3 and all(len(run_id) == 32 for run_id in run_ids)


def test_so_is_that_of_processes_that_nobody_launched(tmp_path):
    assert in_processes(2, {'store': _listening_addresses}, tmp_path) == {'store': [['127.0.0.1'], ['127.0.0.1']]}


def _listening_addresses(world: World) -> list[str]:
    addresses = runpy.run_path(str(WITNESS))['listening_addresses']()
    barrier(world)
    return addresses


# A machine whose host name is the address of an interface, as most machines of a network are.
MACHINE = """
set -e
ip link set lo up
ip link add outside type veth peer name other
ip addr add 10.77.0.1/24 dev outside
ip link set outside up; ip link set other up
hostname machine
printf '127.0.0.1 localhost\\n10.77.0.1 machine\\n' > "$1/hosts"
mount --bind "$1/hosts" /etc/hosts
shift
exec "$@"
"""


def test_no_process_listens_on_another_interface_of_a_machine_with_a_name(tmp_path):
    inside = ['unshare', '--net', '--uts', '--mount', 'bash', '-c', MACHINE, 'bash', str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run([*inside, 'true'], capture_output=True, check=False).returncode != 0:
        pytest.skip('it takes root, unshare and ip to make a network namespace')
    shown = 'import socket; print(socket.gethostbyname(socket.gethostname()))'
    assert subprocess.check_output([*inside, sys.executable, '-c', shown], text=True).strip() == '10.77.0.1'
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    start = f"""
from timm_npu_irv2.distributed import launch
launch({str(WITNESS)!r}, ['--join'], device='cpu', device_list='0,1')
"""
    done = subprocess.run([*inside, sys.executable, '-c', start], capture_output=True, text=True, check=False,
                          env={**os.environ, 'PYTHONPATH': path}, timeout=1200)
    addresses = [line.split()[1:] for line in done.stdout.splitlines()]
    assert addresses == [['127.0.0.1']] * 2, done


def test_processes_that_cannot_meet_say_so(monkeypatch):
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    with pytest.raises(UserError, match='rank 1 of 2 cannot join the others'):
        initialize('cpu', world_size=2, rank=1, dist_url='tcp://127.0.0.1:1', timeout=timedelta(seconds=2))
