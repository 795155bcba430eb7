"""Checkpoints with changed contents: a line that says what is wrong, or a run that goes on from a possible place."""

import functools

import pytest
import torch
from hypothesis import strategies as st
from timm.scheduler.plateau_lr import PlateauLRScheduler

from tests.training.test_checkpoint import info_of, options, trainer_of
from timm_npu_irv2 import hub, rules, schema
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.hub import card
from timm_npu_irv2.serialization import load_weights, write_checkpoint
from timm_npu_irv2.training.checkpoint import resume, training_state
from timm_npu_irv2.training.engine import Trainer

from .mutations import fuzz, mutated

pytestmark = pytest.mark.filterwarnings('ignore')

RUNS = ['', '--model-ema', '--amp', '--opt-level O2']


def new_trainer(words: str) -> Trainer:
    trainer = trainer_of(options(*words.split()))
    trainer.scheduler = PlateauLRScheduler(trainer.optimizer)
    return trainer


@functools.cache
def saved(words: str) -> dict:
    """The checkpoint of a run in the middle of its second epoch."""
    args = options(*words.split())
    trainer = new_trainer(words)
    trainer.train_one_epoch()
    trainer.position.batch = 2
    extra = {'seconds': 5.0, 'bad_images': {'a.jpg': 'torn'}, 'metric': 1.0, 'saver': {
        'checkpoint_files': [('checkpoint-0.pth.tar', 1.0)], 'dropped': [], 'best_epoch': 0, 'best_metric': 1.0}}
    return training_state(trainer, info_of(args), extra)


def one_line(error: UserError) -> None:
    assert '\n' not in str(error) and len(str(error)) < 2000, str(error)


def check_resuming(data, tmp_path_factory) -> None:
    words = RUNS[data.draw(st.integers(0, len(RUNS) - 1))]
    path = tmp_path_factory.mktemp('fuzz') / 'last.pth.tar'
    trainer = new_trainer(words)
    write_checkpoint(mutated(saved(words), data), path)
    try:
        resume(trainer, path, info_of(options(*words.split())))
        position = trainer.position
        assert 0 <= position.epoch <= 10**6 and min(position.batch, position.updates) >= 0
        trainer.train_one_epoch()
    except UserError as error:
        one_line(error)
    finally:
        path.unlink()
        path.parent.rmdir()


test_resuming, test_resuming_for_long = fuzz(40, 0.2)(check_resuming)


@functools.cache
def partial_weights() -> dict[str, torch.Tensor]:
    """Enough of the weights for their dialect, classes and channels to be known, and no more."""
    return {'conv2d_1a.conv.weight': torch.zeros(32, 3, 3, 3), 'classif.weight': torch.zeros(4, 1536),
            'classif.bias': torch.zeros(4), 'mixed_5b.branch0.conv.weight': torch.zeros(96, 192, 1, 1)}


def check_reading(data, tmp_path_factory) -> None:
    """For the hub and for --initial-checkpoint, whoever wrote the file; the weights are not all there."""
    content = {**saved(''), 'state_dict': partial_weights()}
    content['args'] = {**content['args'], 'model_kwargs': {'drop_rate': 0.1, 'act_layer': 'relu'}, 'gp': 'avg',
                       'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5], 'img_size': 96, 'crop_pct': 0.9}
    if data.draw(st.booleans()):
        del content['training']
    folder = tmp_path_factory.mktemp('fuzz')
    write_checkpoint(mutated(content, data, most=3), folder / 'a.pth.tar')
    for reader in (load_weights, hub.create, lambda path: hub.export(path, folder / 'out')):
        try:
            reader(folder / 'a.pth.tar')
        except UserError as error:
            one_line(error)
    assert [each.name for each in folder.iterdir()] == ['a.pth.tar']
    (folder / 'a.pth.tar').unlink()
    folder.rmdir()


test_reading, test_reading_for_long = fuzz(8, 0.1)(check_reading)


def check_card(data) -> None:
    """The recipe and the report are printed into the card, whatever they hold that the schema lets pass."""
    config = {'num_classes': 2, 'pretrained_cfg': {'input_size': [3, 96, 96]}, 'label_names': ['a', 'b']}
    recipe = mutated({'model': 'x', 'opt': 'sgd', 'lr': 0.1, 'epochs': 3, 'aa': 'rand', 'scale': [0.1, 1.0],
                      'model_kwargs': {'drop_rate': 0.1}, 'val_split': 'validation'}, data, tensors=False)
    figures = {'top1': 50.0, 'top5': 90.0, 'epochs': 3, 'seconds': 60.0, 'world_size': 1, 'precision': 'O0',
               'device': {'type': 'cpu', 'name': 'x'}, 'versions': {'torch': '2'}}
    figures = mutated(figures, data, tensors=False)
    try:
        with rules.naming('report.json'):
            schema.check_report(figures)
            schema.check_checkpoint({'state_dict': partial_weights(), 'args': recipe})
    except UserError as error:
        return one_line(error)
    text = card.write('x', config, target='npu', license='mit', datasets=(), recipe=recipe, figures=figures,
                      averaged=False, dtype='float32', curves=None)
    assert text.startswith('---\n') and not any(each in text for each in '\x1b\x00\x9b') and '<b>' not in text.replace(
        '```yaml', '', 1).split('```yaml')[-1].split('```')[-1]
    return None


test_card, test_card_for_long = fuzz(60, 0.05)(check_card)
