"""The training step and the evaluation: what is computed, when the device is waited for, when it stops."""

import math

import pytest
import torch
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.data.batches import Batches
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import Stopped
from timm_npu_irv2.precision import create_precision
from timm_npu_irv2.training.engine import Diverged, Position, Trainer, TrainSettings
from timm_npu_irv2.training.evaluation import evaluate
from timm_npu_irv2.training.metrics import Meter, Throughput

WORLD = World()


def batches(count: int, size: int = 4, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches((torch.randn(size, 3, 4, 4, generator=generator), torch.randint(3, (size,), generator=generator))
                   for _ in range(count))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.ReLU(), nn.Linear(20, 3))


def trainer_of(loader, model=None, lr: float = 0.1, momentum: float = 0.0, world: World = WORLD, **kwargs) -> Trainer:
    task = ClassificationTask(model or network(), verbose=False)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=lr, momentum=momentum)
    settings = TrainSettings(**{key: kwargs.pop(key) for key in list(kwargs) if key in TrainSettings.__annotations__})
    precision = create_precision(torch.device('cpu'))
    return Trainer(task, loader, optimizer, precision, world, settings=settings, **kwargs)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.task.trainable_module.parameters()])


# Training


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: values of tensors that the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device():
    """Twenty more batches ask for no more values, averages of weights and all."""
    reads = []
    for count in (10, 30):
        trainer = trainer_of(batches(count), log_interval=100)
        trainer.task.setup_ema(decay=0.9)
        with CountReads() as counter:
            trainer.train_one_epoch()
        reads.append(counter.reads)
    assert reads[0] == reads[1] > 0


def test_metrics_are_the_means_over_all_images():
    loader, model = batches(5), network()
    with torch.no_grad():
        logits = [model(images) for images, _ in loader]
    logits, target = torch.cat(logits), torch.cat([target for _, target in loader])
    metrics = trainer_of(loader, model, lr=0.0).train_one_epoch()
    assert metrics['loss'] == pytest.approx(nn.functional.cross_entropy(logits, target).item(), rel=1e-6)
    assert metrics['top1'] == 100 * (logits.argmax(1) == target).sum().item() / 20


def test_accuracy_of_mixed_targets_counts_the_larger_share():
    meter = Meter(WORLD)
    output = torch.eye(3)
    meter.update(torch.tensor(1.0), output, torch.tensor([[0.6, 0.4, 0], [0.6, 0.4, 0], [0, 0.1, 0.9]]))
    assert meter.read()[1]['top1'] == pytest.approx(100 * 2 / 3)


def test_when_the_meter_is_read_does_not_change_what_it_measures():
    results = []
    for log_interval in (1, 3, 100):
        results.append(trainer_of(batches(7, seed=3), log_interval=log_interval).train_one_epoch()['loss'])
    assert results[0] == results[1] == results[2]


def test_accumulated_gradients_are_those_of_the_large_batch_also_at_the_end_of_the_epoch():
    small = batches(5)
    large = Batches([(torch.cat([small[i][0] for i in group]), torch.cat([small[i][1] for i in group]))
                     for group in ((0, 1), (2, 3), (4,))])
    one, other = trainer_of(small, grad_accum_steps=2), trainer_of(large)
    one.train_one_epoch()
    other.train_one_epoch()
    assert one.position == other.position == Position(1, 0, 3)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(('power', 'factor'), [(0.0, 1.0), (0.5, math.sqrt(2)), (1.0, 2.0)])
def test_a_larger_batch_weighs_more_as_the_option_says(power, factor):
    moved = []
    for settings in ({}, {'batch_size_reference': 2.0, 'batch_size_power': power}):
        trainer = trainer_of(batches(1, size=4), **settings)
        before = weights(trainer)
        trainer.train_one_epoch()
        moved.append(weights(trainer) - before)
    torch.testing.assert_close(moved[1], factor * moved[0], rtol=1e-4, atol=1e-7)


def test_clipping_limits_the_gradient_of_a_whole_update():
    trainer = trainer_of(batches(2), lr=1.0, clip_grad=1e-3, grad_accum_steps=2)
    before = weights(trainer)
    trainer.train_one_epoch()
    assert (weights(trainer) - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_average_follows_every_update():
    trainer = trainer_of(batches(3))
    trainer.task.trainable_module_ema = ModelEmaV3(trainer.task.trainable_module, decay=0.5)
    expected, history = None, []
    trainer.on_log = lambda figures: history.append(weights(trainer))
    trainer.settings = TrainSettings(log_interval=1)
    trainer.train_one_epoch()
    for now in history:
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    average = torch.cat([p.flatten() for p in trainer.task.trainable_module_ema.module.parameters()])
    torch.testing.assert_close(average, expected)


def test_the_schedule_is_stepped_with_the_number_of_updates():
    seen = []

    class Schedule:
        def step_update(self, updates):
            seen.append(updates)

    trainer = trainer_of(batches(5), scheduler=Schedule(), grad_accum_steps=2)
    trainer.train_one_epoch()
    trainer.train_one_epoch()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_log_line_comes_first_at_intervals_and_last():
    lines = []
    trainer_of(batches(7), log_interval=3, on_log=lines.append).train_one_epoch()
    assert [line['batch'] for line in lines] == [1, 3, 6, 7]
    assert lines[0]['images_per_second'] == 0 and all(line['images_per_second'] > 0 for line in lines[1:])
    assert lines[-1]['batches'] == 7 and lines[-1]['lr'] == pytest.approx(0.1)


def test_a_lost_loss_stops_before_a_checkpoint_is_spoilt():
    loader = batches(6)
    loader[3][0][0] = math.nan
    saved = []
    trainer = trainer_of(loader, log_interval=100, recovery_interval=5, on_recovery=saved.append,
                         last_good=lambda: 'recovery-0-1')
    with pytest.raises(Diverged, match=r'nan in epoch 0, batch 5.*learning rate 0\.1.*recovery-0-1'):
        trainer.train_one_epoch()
    assert saved == []


def test_a_loss_scale_that_skips_every_step_gives_up_and_says_where():
    """float16's gradients of these weights overflow whatever the scale."""
    model = network()
    trainer = trainer_of(batches(50), model, last_good=lambda: 'recovery-0-1')
    trainer.precision = create_precision(torch.device('cpu'), amp=True, amp_dtype=torch.float16, loss_scale='dynamic')
    model[0].weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer)
    with pytest.raises(Diverged, match=r'an overflow in each of the last 40 steps in epoch 0, batch 40 .*recovery-0-1'):
        trainer.train_one_epoch()
    assert torch.equal(weights(trainer), before)


def test_a_skipped_step_now_and_then_is_no_reason_to_give_up():
    model, calls = network(), []
    trainer = trainer_of(batches(50), model)
    trainer.precision = create_precision(torch.device('cpu'), amp=True, amp_dtype=torch.float16, loss_scale='dynamic')

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * math.inf if len(calls) % 30 else gradient

    model[0].weight.register_hook(spoil)
    trainer.train_one_epoch()
    assert trainer.precision.skipped_steps == 49


def test_recovery_checkpoints_come_at_their_interval_but_not_at_the_end():
    saved = []
    trainer = trainer_of(batches(6), recovery_interval=2, on_recovery=lambda t: saved.append(t.position.batch))
    trainer.train_one_epoch()
    assert saved == [2, 4]


def test_saving_is_not_counted_as_training(monkeypatch):
    now = [0.0]

    def tick() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr('timm_npu_irv2.training.metrics.time.perf_counter', tick)

    def save(trainer: Trainer) -> None:
        now[0] += 1000

    trainer = trainer_of(batches(6), recovery_interval=2, on_recovery=save)
    trainer.train_one_epoch()
    assert 0 < trainer.throughput.seconds < 1000


def test_a_wish_to_stop_is_granted_after_the_update_and_a_checkpoint():
    class Stop:
        asked = 0

        def poll(self):
            self.asked += 1
            return 15 if self.asked == 3 else 0

    saved = []
    trainer = trainer_of(batches(6), stop=Stop(), on_recovery=lambda t: saved.append(t.position.batch))
    with pytest.raises(Stopped) as stopped:
        trainer.train_one_epoch()
    assert stopped.value.number == 15 and saved == [3]


def test_an_epoch_that_starts_in_the_middle_trains_on_the_rest():
    trainer = trainer_of(batches(6), position=Position(2, 4, 16))
    trainer.train_one_epoch()
    assert trainer.position == Position(3, 0, 18)


def test_throughput_leaves_out_the_first_lap_and_what_is_skipped(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('timm_npu_irv2.training.metrics.time.perf_counter', lambda: now[0])
    throughput = Throughput(World(size=2))
    throughput.start_epoch()

    def lap(images, seconds):
        throughput.count(images)
        now[0] += seconds
        return throughput.lap()

    assert lap(10, 100.0) == 0
    assert lap(10, 1.0) == 20  # both processes'
    now[0] += 50
    throughput.skip()
    assert lap(30, 1.0) == 60
    assert throughput.images_per_second == throughput.of_epoch == 40
    throughput.start_epoch()
    lap(10, 100.0)
    assert throughput.of_epoch == 0 and throughput.images_per_second == 40


# Evaluation


@pytest.mark.parametrize('batch_size', [1, 7, 64])
def test_every_image_counts_once_whatever_the_batch_size(batch_size):
    generator = torch.Generator().manual_seed(0)
    images, target = torch.randn(103, 3, 4, 4, generator=generator), torch.randint(10, (103,), generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10))
    model.train()
    loader = list(zip(images.split(batch_size), target.split(batch_size), strict=True))
    metrics = evaluate(model, loader, WORLD)
    assert not model.training
    with torch.no_grad():
        order = model(images).argsort(dim=1, descending=True)
    assert metrics['top1'] == 100 * (order[:, 0] == target).sum().item() / 103
    assert metrics['top5'] == 100 * (order[:, :5] == target[:, None]).sum().item() / 103
    assert metrics['count'] == 103
    with torch.no_grad():
        assert metrics['loss'] == pytest.approx(nn.functional.cross_entropy(model(images), target).item(), rel=1e-5)


def test_evaluation_reads_nothing_until_its_end():
    reads = []
    for count in (2, 9):
        with CountReads() as counter:
            evaluate(network(), batches(count), WORLD)
        reads.append(counter.reads)
    assert reads[0] == reads[1]


def test_with_fewer_than_five_classes_top5_is_everything():
    assert evaluate(network(), batches(2), WORLD)['top5'] == 100


def test_views_of_an_image_are_averaged_and_count_once():
    identity = nn.Identity()
    logits = torch.tensor([[0.0, 3.0], [2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    seen = []
    metrics = evaluate(identity, [(logits, torch.tensor([1, 1, 0, 0]))], WORLD, tta=2,
                       on_batch=lambda index, output, target: seen.append((index, output.tolist(), target.tolist())))
    assert metrics['count'] == 2 and metrics['top1'] == 100
    assert seen == [(0, [[1.0, 1.5], [1.0, 0.0]], [1, 0])]


def test_an_empty_loader_is_no_division_by_zero():
    assert evaluate(network(), [], WORLD) == {'loss': 0.0, 'top1': 0.0, 'top5': 0.0, 'count': 0}


def test_images_reach_a_half_precision_model_in_its_type():
    model = network().to(torch.bfloat16)
    assert evaluate(model, batches(2), WORLD)['count'] == 8


def test_logits_are_computed_under_autocast_and_their_loss_in_float32():
    seen = []
    model, loader = network(), batches(3)
    metrics = evaluate(model, loader, WORLD, autocast=lambda: torch.autocast('cpu', torch.bfloat16),
                       on_batch=lambda index, output, target: seen.append(output))
    assert {output.dtype for output in seen} == {torch.bfloat16}
    target = torch.cat([target for _, target in loader])
    expected = nn.functional.cross_entropy(torch.cat(seen).float(), target).item()
    assert metrics['loss'] == pytest.approx(expected, rel=1e-6)


def test_of_several_outputs_the_first_has_the_logits():
    class WithFeatures(nn.Module):
        def forward(self, images):
            return images, images.flatten(1)

    logits = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    assert evaluate(WithFeatures(), [(logits, torch.tensor([1, 0]))], WORLD)['top1'] == 100


def test_losses_are_added_up_in_float64():
    model, loader = network(), batches(50, size=3)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(images), target).item() for images, target in loader]
    assert evaluate(model, loader, WORLD)['loss'] == pytest.approx(math.fsum(losses) / 50, rel=1e-13)


def test_an_evaluation_keeps_nothing_for_a_backward_pass():
    seen = []
    evaluate(network(), batches(2), WORLD, on_batch=lambda index, output, target: seen.append(output.requires_grad))
    assert seen == [False, False]
