"""Loaders: (seed, epoch, index) decide what they yield, each validation image comes once, errors are one line."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_dataset, create_loader
from timm.data.loader import fast_collate
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torchvision.datasets import CIFAR10

from tests.pictures import write_classes
from timm_npu_irv2.data.augmentation import Augmentation
from timm_npu_irv2.data.dataset import open_dataset
from timm_npu_irv2.data.loader import create_train_sampler
from timm_npu_irv2.data.pipeline import ImagePipeline
from timm_npu_irv2.data.samplers import Batch, EvalBatchSampler, RankSampler, SampleKey
from timm_npu_irv2.data.worker import BatchDataset
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.loaders import build_eval_loader, build_train_loader
from timm_npu_irv2.training.options import parse_args

CONFIG = {
    'input_size': (3, 75, 75),
    'mean': (0.5, 0.4, 0.3),
    'std': (0.2, 0.3, 0.5),
    'interpolation': 'bicubic',
    'crop_pct': 0.9,
    'crop_mode': 'center',
}
PIPELINE = ImagePipeline.from_config(CONFIG)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('images')
    write_classes(root / 'train', 3, 7)
    write_classes(root / 'val', 3, 5, seed=1)
    return root


def options(folder: Path, *words: str):
    return parse_args(['--data-dir', str(folder), '-b', '4', '-j', '0', *words])


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank=rank, local_rank=rank, size=size, device=torch.device('cpu'))


def train_loader(args, where: World | None = None, pipeline=PIPELINE, **given):
    return build_train_loader(args, pipeline, where or world(), num_classes=args.num_classes or 10,
                              batch_size=args.batch_size, **given)


def eval_loader(args, where: World | None = None, **given):
    return build_eval_loader(args, PIPELINE, where or world(), split=args.val_split, num_classes=args.num_classes or 10,
                             batch_size=args.validation_batch_size or args.batch_size, **given)


def epoch_of(args, epoch: int, start: int = 0, where: World | None = None):
    loader = train_loader(args, where)
    for seed in torch.seed, np.random.seed, random.seed:  # to something else each time
        seed()
    loader.set_epoch(epoch, start)
    return list(loader)


def equal(a, b) -> bool:
    pairs = ((x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)


AUGMENTATIONS = {
    'plain': [],
    'randaugment': ['--aa', 'rand-m9-mstd0.5-inc1', '--color-jitter', '0.4'],
    'mixup and erasing': ['--mixup', '0.2', '--cutmix', '1', '--reprob', '0.5'],
    'mixup of each image': ['--mixup', '0.2', '--mixup-mode', 'elem'],
    'normalised on the host': ['--no-prefetcher', '--reprob', '0.5', '--mixup', '0.2'],
    'augmentation splits': ['--aug-splits', '3', '--aa', 'augmix-m5-w4-d2'],
    'several sizes': ['--train-img-sizes', '75', '99', '--train-batch-sizes', '4', '2'],
    'repeated augmentation': ['--aug-repeats', '3'],
    'endless workers': ['--use-multi-epochs-loader'],
}


@pytest.mark.parametrize('words', AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_workers_and_restart_change_nothing(folder, words):
    expected = epoch_of(options(folder, *words), 1)
    for workers in '1', '3':
        assert equal(epoch_of(options(folder, *words, '-j', workers), 1), expected)
    for workers in '0', '2':
        assert equal(epoch_of(options(folder, *words, '-j', workers), 1, start=2), expected[2:])


@pytest.mark.parametrize('words', AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_seed_and_epoch_change_everything(folder, words):
    expected = epoch_of(options(folder, *words), 1)
    assert not torch.equal(epoch_of(options(folder, *words), 2)[0][0], expected[0][0])
    assert not torch.equal(epoch_of(options(folder, *words, '--seed', '7'), 1)[0][0], expected[0][0])


def test_a_sample_depends_on_seed_epoch_index_and_repeat_alone(folder):
    def images(*samples: SampleKey, epoch: int = 1, batch_seed: int = 7, seed: int = 42) -> torch.Tensor:
        dataset = BatchDataset(open_dataset('', str(folder), 'train'), [transform], 'RGB', fast_collate, seed)
        return dataset[Batch(samples, epoch=epoch, seed=batch_seed)].images

    transform = Augmentation().transform(PIPELINE, 75)
    together, alone = images(SampleKey(3, 0), SampleKey(5, 0), SampleKey(3, 1)), images(SampleKey(3, 0), batch_seed=8)
    assert torch.equal(together[0], alone[0]) and not torch.equal(together[0], together[2])
    assert not torch.equal(alone, images(SampleKey(3, 0), epoch=2))
    assert not torch.equal(alone, images(SampleKey(3, 0), seed=7))


@pytest.mark.parametrize('workers', ['0', '2'])
def test_loading_leaves_the_global_generators_alone(folder, workers):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    list(train_loader(options(folder, '--reprob', '0.5', '--mixup', '0.2', '-j', workers)))
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_endless_workers_follow_the_epochs_asked_for(folder):
    loader = train_loader(options(folder, '--use-multi-epochs-loader', '-j', '2'))
    for epoch, start in ((0, 0), (1, 0), (2, 3), (3, 0), (1, 0)):
        loader.set_epoch(epoch, start)
        assert equal(list(loader), epoch_of(options(folder), epoch, start))
    loader.set_epoch(4)
    next(iter(loader))  # an epoch given up
    loader.set_epoch(5)
    assert equal(list(loader), epoch_of(options(folder), 5))


def test_processes_share_each_batch_of_one_process(folder):
    one = epoch_of(options(folder, '-b', '6'), 3)
    parts = [epoch_of(options(folder, '-b', '2'), 3, where=world(rank, 3)) for rank in range(3)]
    assert len(one) == 3 and all(len(part) == 3 for part in parts)
    for number, (images, targets) in enumerate(one):
        for rank, part in enumerate(parts):
            assert torch.equal(part[number][0], images[rank::3]) and torch.equal(part[number][1], targets[rank::3])


def test_each_process_mixes_its_own_way(folder):
    args = options(folder, '-b', '2', '--mixup', '1')
    first, second = (train_loader(args, world(rank, 2)) for rank in range(2))
    assert next(iter(first.sampler)).seed != next(iter(second.sampler)).seed


def test_an_epoch_takes_each_image_once():
    for size, processes in ((10, 1), (12, 4), (11, 4)):
        shares = [RankSampler(size, rank, processes, 0, 0.0, 0.0) for rank in range(processes)]
        drawn = [sample for share in shares for sample, _ in zip(share, range(len(share)), strict=False)]
        assert {sample.index for sample in drawn} == set(range(size))
        assert len({*drawn}) == len(drawn) == -(-size // processes) * processes  # a second pass fills up


def test_repeated_augmentation_repeats_each_image_in_a_row():
    share = RankSampler(400, 0, 1, 0, 0.0, 3.0)
    samples = [sample for sample, _ in zip(share, range(len(share)), strict=False)]
    assert len(share) == 256  # as timm: rounded down to a multiple of 256
    assert [sample.repeat for sample in samples[:6]] == [0, 1, 2, 0, 1, 2]
    assert samples[0].index == samples[1].index == samples[2].index != samples[3].index
    ranks = [next(iter(RankSampler(400, rank, 3, 0, 0.0, 3.0))) for rank in range(3)]
    assert len({sample.index for sample in ranks}) == 1 and [sample.repeat for sample in ranks] == [0, 1, 2]


@pytest.mark.parametrize('options', [{}, {'aug_repeats': 3.0}, {'epoch_repeats': 2.5}, {'num_batches': 90}])
def test_batches_of_one_size_are_those_of_timms_schedule_from_any_batch_on(options):
    where, other = world(1, 3), {name: value for name, value in options.items() if name != 'num_batches'}
    samples = RankSampler(700, 1, 3, 7, other.get('epoch_repeats', 0), other.get('aug_repeats', 0))
    theirs = ScheduledBatchSampler(samples, [8], seed=7, num_batches=options.get('num_batches'))
    theirs.set_epoch(2)
    expected = [[sample for sample, _ in batch] for batch in theirs]
    ours = create_train_sampler(700, where, [8], seed=7, **options)
    for start in 0, 1, len(expected) - 1:
        ours.set_epoch(2, start)
        assert [batch.samples for batch in ours] == expected[start:] and len(ours) == len(expected)


def test_epoch_repeats_lengthen_the_epoch(folder):
    assert len(train_loader(options(folder))) == 5
    assert len(train_loader(options(folder, '--epoch-repeats', '2.5'))) == 13
    loader = train_loader(options(folder, '--train-batches-per-epoch', '11'))
    assert len(loader) == len(list(loader)) == 11


def test_training_images_are_those_of_timm_without_augmentation(folder):
    args = options(folder, '--no-aug')
    ours = train_loader(args)
    order = [sample.index for batch in ours.sampler for sample in batch.samples]
    dataset = create_dataset('', str(folder), 'train')
    theirs = create_loader(dataset, (3, 75, 75), 21, no_aug=True, is_training=False, interpolation='bicubic',
                           mean=CONFIG['mean'], std=CONFIG['std'], num_workers=0, device=torch.device('cpu'),
                           crop_pct=1.0, crop_mode='squash')
    images, targets = next(iter(theirs))
    for number, (got, labels) in enumerate(ours):
        torch.testing.assert_close(got, images[order[4 * number:4 * number + 4]])
        assert torch.equal(labels, targets[order[4 * number:4 * number + 4]])


@pytest.mark.parametrize('extra', [[], ['--no-prefetcher']], ids=['device', 'host'])
def test_validation_images_are_those_of_timm(folder, extra):
    args = options(folder, *extra)
    theirs = create_loader(create_dataset('', str(folder), 'validation'), (3, 75, 75), 4,
                           interpolation='bicubic', mean=CONFIG['mean'], std=CONFIG['std'], num_workers=0,
                           device=torch.device('cpu'), crop_pct=0.9)
    ours = eval_loader(args)
    assert ours.mixup_enabled is False and len(ours) == 4
    for (images, targets), (expected, labels) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(images, expected)
        assert torch.equal(targets, labels)


@pytest.mark.parametrize('size', [1, 2, 4, 16])
def test_each_validation_image_comes_once(folder, size):
    loaders = [eval_loader(options(folder, '-vb', '3'), world(rank, size)) for rank in range(size)]
    for rank, loader in enumerate(loaders):
        assert loader.indices == list(range(rank, 15, size))
        assert sum(len(targets) for _, targets in loader) == len(loader.indices)
    whole = torch.cat([images for images, _ in eval_loader(options(folder))])
    for loader in loaders:
        for got, index in zip((image for images, _ in loader for image in images), loader.indices, strict=True):
            assert torch.equal(got, whole[index])


def test_an_evaluation_starts_at_any_batch_and_in_any_epoch(folder):
    loader = eval_loader(options(folder, '-j', '2'))
    whole = list(loader)
    assert loader.average_batch_size == 15 / 4
    loader.set_epoch(3, start_batch=2)
    assert equal(list(loader), whole[2:]) and len(loader) == 4
    loader.set_epoch(4)
    assert equal(list(loader), whole)


@pytest.mark.parametrize('rank', [0, 1, 2])
def test_processes_without_images_of_their_own_evaluate_nothing(rank):
    sampler = EvalBatchSampler(size=2, rank=rank, world_size=3, batch_size=4)
    batches = list(sampler)
    assert [[sample.index for sample in batch.samples] for batch in batches] == ([[rank]] if rank < 2 else [])
    assert len(sampler) == len(batches) and sampler.average_batch_size == len(batches)


def test_two_views_of_a_validation_image(folder):
    plain = next(iter(eval_loader(options(folder))))
    images, targets = next(iter(eval_loader(options(folder, '--tta', '2'))))
    assert torch.equal(images[::2], plain[0]) and torch.equal(images[1::2], plain[0].flip(3))
    assert torch.equal(targets[::2], plain[1]) and torch.equal(targets[1::2], plain[1])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_images_have_the_dtype_asked_for_and_the_layout_of_the_device(folder, dtype):
    for words in [], ['--mixup', '0.5', '--reprob', '1'], ['--no-prefetcher']:
        loader = train_loader(options(folder, *words), dtype=dtype)
        images, _ = next(iter(loader))
        assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)


def test_one_channel(folder):
    pipeline = ImagePipeline.from_config({**CONFIG, 'input_size': (1, 75, 75)})
    images, _ = next(iter(train_loader(options(folder), pipeline=pipeline)))
    assert images.shape == (4, 1, 75, 75)


def test_mixup_can_be_switched_off_by_epoch_and_by_hand(folder):
    args = options(folder, '--mixup', '1', '--mixup-off-epoch', '2', '--smoothing', '0', '-j', '2')
    loader = train_loader(args)
    hard = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        hard.append((loader.mixup_enabled, all((targets.max(1).values == 1).all() for _, targets in loader)))
    assert hard == [(True, False), (True, False), (False, True)]
    loader.set_epoch(0)
    loader.mixup_enabled = False
    assert all((targets.max(1).values == 1).all() for _, targets in loader)


def test_torchvision_data_sets(tmp_path):
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    write_cifar(base)
    args = options(tmp_path, '--dataset', 'torch/cifar10', '-b', '5')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, '_check_integrity', lambda self: True)  # the real archive's hashes
        patch.setattr('torchvision.datasets.cifar.check_integrity', lambda *_: True)
        train = train_loader(args)
        val = eval_loader(args, train_loader=train)
        assert (len(train), len(val)) == (2, 1)
        assert next(iter(train))[0].shape == (5, 3, 75, 75)


def write_cifar(base: Path) -> None:
    generator = np.random.default_rng(0)
    for name, count in [(f'data_batch_{i}', 2) for i in range(1, 6)] + [('test_batch', 4)]:
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({'data': pixels, 'labels': list(range(count))}))
    (base / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'thing{i}' for i in range(10)]}))


# ------------------------------------------------------------------------------------------------- what goes wrong


def both_loaders(args):
    train = train_loader(args)
    return train, eval_loader(args, train_loader=train)


def message(args) -> str:
    with pytest.raises(UserError) as caught:
        both_loaders(args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_no_data_folder_named():
    assert '--data-dir' in message(parse_args([]))


def test_data_folder_missing(tmp_path):
    assert f"'{tmp_path / 'nowhere'}' does not exist" in message(options(tmp_path / 'nowhere'))


def test_folder_without_images(tmp_path):
    (tmp_path / 'train').mkdir()
    assert 'no images in this folder' in message(options(tmp_path))


def test_a_validation_class_that_was_not_trained(tmp_path):
    write_classes(tmp_path / 'train', 2, 2)
    write_classes(tmp_path / 'val', 3, 2)
    assert "classes that the network does not know: 'class2'" in message(options(tmp_path))


def test_a_class_without_validation_images_leaves_the_others_their_numbers(tmp_path):
    write_classes(tmp_path / 'train', 3, 2)
    write_classes(tmp_path / 'val', 3, 2)
    for path in (tmp_path / 'val' / 'class0').iterdir():
        path.unlink()
    for _ in range(2):  # with the empty folder, and without it
        _, val = both_loaders(options(tmp_path))
        assert torch.cat([targets for _, targets in val]).tolist() == [1, 1, 2, 2]
        if (tmp_path / 'val' / 'class0').exists():
            (tmp_path / 'val' / 'class0').rmdir()


def test_no_validation_folder(tmp_path):
    write_classes(tmp_path / 'train', 3, 2)
    assert "no split 'validation'" in message(options(tmp_path))
    assert "not apart" in message(options(tmp_path / 'train'))


def test_no_training_folder(tmp_path):
    write_classes(tmp_path / 'val', 3, 2)
    assert "no split 'train'" in message(options(tmp_path))


def test_more_classes_than_the_model_has(folder):
    assert '--num-classes 3' in message(options(folder, '--num-classes', '2'))


def test_fewer_images_than_a_batch(folder):
    assert 'smaller --batch-size' in message(options(folder, '-b', '22'))


def test_odd_batches_cannot_be_mixed(folder):
    assert 'even --batch-size' in message(options(folder, '-b', '3', '--mixup', '0.2'))


def test_unknown_data_set(folder):
    assert 'nothing' in message(options(folder, '--dataset', 'torch/nothing'))


def test_torchvision_data_set_that_is_not_there(tmp_path):
    assert 'download' in message(options(tmp_path, '--dataset', 'torch/cifar10'))


def test_class_map_that_is_not_there(folder):
    assert 'nowhere.txt' in message(options(folder, '--class-map', 'nowhere.txt'))


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_broken_image_stops_with_its_name(tmp_path, workers):
    write_classes(tmp_path / 'train', 2, 2)
    (tmp_path / 'train' / 'class1' / '1.png').write_bytes(b'not an image')
    loader = train_loader(options(tmp_path, '-j', workers))
    with pytest.raises(UserError, match=r'^image .*class1/1\.png cannot be read: [^\n]*$'):
        list(loader)


@pytest.mark.parametrize(('words', 'name', 'value', 'said'), [
    ('', 'aa', 'xyz', '--aa xyz: '), ('--hflip 0.1', 'color_jitter', 'much', '--hflip 0.1 --color-jitter much: '),
    ('--mixup 0.1', 'cutmix_minmax', [0.5], '--mixup 0.1 --cutmix-minmax 0.5: '),
])
def test_an_error_of_timms_transforms_names_the_options_that_were_given(folder, words, name, value, said):
    args = options(folder, *words.split())
    setattr(args, name, value)  # as if the parser had let it pass
    with pytest.raises(UserError) as caught:
        train_loader(args)
    assert str(caught.value).startswith(said) and '\n' not in str(caught.value)
