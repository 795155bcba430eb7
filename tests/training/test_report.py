"""What a run writes and prints: files that resume, numbers where other people's scripts look for them."""

import csv
import io
import json
import logging
import os
import sys

import pytest
import torch
from PIL import Image

from timm_npu_irv2.errors import UserError
from timm_npu_irv2.plots import draw_curves
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.training.report import COLUMNS, Progress, Report, final_lines
from timm_npu_irv2.training.setup import describe_train_loss

FACTS = {
    'model': 'inception_resnet_v2_npu',
    'num_classes': 10,
    'parameters': 54321,
    'device': torch.device('cpu'),
    'world_size': 2,
    'precision': 'float32',
    'batch_size': 64,
    'seconds': 12.4,
    'images_per_second': 2603.0612,
}


def train(value: float) -> dict[str, float]:
    return {'loss': value, 'top1': 10 * value, 'lr': 0.1 * value, 'images_per_second': 100 * value}


def evaluation(top1: float) -> dict[str, float]:
    return {'loss': 3 - top1 / 50, 'top1': top1, 'top5': 99.0, 'count': 50}


def read_csv(folder) -> list[dict[str, str]]:
    with (folder / 'summary.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def test_summary_has_the_columns_of_timm_first(tmp_path):
    report = Report(tmp_path)
    report.add_epoch(0, train(1.0), evaluation(70.0))
    report.add_epoch(1, train(2.0), None)
    rows = read_csv(tmp_path)
    assert list(rows[0])[:6] == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    assert rows[0] == {'epoch': '0', 'train_loss': '1.0', 'eval_loss': '1.6', 'eval_top1': '70.0', 'eval_top5': '99.0',
                       'lr': '0.1', 'train_top1': '10.0', 'images_per_second': '100.0'}
    assert rows[1]['eval_top1'] == '' and rows[1]['train_loss'] == '2.0'


def test_a_resumed_run_writes_what_an_undisturbed_one_does(tmp_path):
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'resumed').mkdir()
    whole = Report(tmp_path / 'whole')
    for epoch in range(4):
        whole.add_epoch(epoch, train(epoch / 7), evaluation(epoch / 3) if epoch % 2 else None)
    first = Report(tmp_path / 'resumed')
    for epoch in range(3):  # epoch 2 was finished, but the run goes on from the checkpoint before it
        first.add_epoch(epoch, train(epoch / 7), evaluation(epoch / 3) if epoch % 2 else None)
    second = Report(tmp_path / 'resumed', first_epoch=2)
    assert [row['epoch'] for row in second.rows] == [0, 1]
    for epoch in (2, 3):
        second.add_epoch(epoch, train(epoch / 7), evaluation(epoch / 3) if epoch % 2 else None)
    assert second.rows == whole.rows
    assert (tmp_path / 'resumed/summary.csv').read_bytes() == (tmp_path / 'whole/summary.csv').read_bytes()


def test_the_best_epoch_is_the_first_of_the_best(tmp_path):
    report = Report(tmp_path)
    assert report.best is None
    for epoch, top1 in enumerate((50.0, 80.0, 80.0, 70.0)):
        report.add_epoch(epoch, train(1.0), evaluation(top1))
    assert report.best['epoch'] == 1
    report.metric = 'loss'
    assert report.best['epoch'] == 1


def test_without_validation_the_training_set_decides(tmp_path, capsys):
    report = Report(tmp_path)
    for epoch, value in enumerate((1.0, 3.0, 2.0)):
        report.add_epoch(epoch, train(value), None)
    assert report.best['epoch'] == 1
    assert report.finish(**FACTS)['top1'] is None
    assert 'Final Train Accuracy : 30.00\n' in capsys.readouterr().out


def test_report_names_results_machine_and_versions(tmp_path, capsys):
    report = Report(tmp_path)
    report.add_epoch(0, train(1.0), evaluation(79.136))
    report.add_epoch(1, train(1.0), evaluation(60.0))
    returned = report.finish(**FACTS, bad_images=3)
    written = json.loads((tmp_path / 'report.json').read_text())
    assert written == returned
    assert written['top1'] == 79.136 and written['top5'] == 99.0 and written['loss'] == pytest.approx(3 - 79.136 / 50)
    assert (written['epochs'], written['best_epoch'], written['last_epoch']['eval_top1']) == (2, 0, 60.0)
    assert torch.__version__.startswith(written['versions']['torch'])
    assert written['device']['type'] == 'cpu' and written['bad_images'] == 3
    for name in 'num_classes', 'parameters', 'world_size', 'precision', 'batch_size', 'seconds', 'images_per_second':
        assert written[name] == FACTS[name]
    assert capsys.readouterr().out.endswith(
        'Final Performance images/sec : 2603.061\nFinal Train Accuracy : 79.14\nE2E Training Duration sec : 12\n')


def test_an_evaluation_alone_is_reported(tmp_path, capsys):
    report = Report(tmp_path).finish(**FACTS, evaluation=evaluation(42.0))
    assert (report['top1'], report['epochs'], report['best_epoch']) == (42.0, 0, None)
    assert 'Final Train Accuracy : 42.00\n' in capsys.readouterr().out
    assert not (tmp_path / 'curves.png').exists()


def test_final_lines_are_those_of_the_zoo():
    assert final_lines(2603.061, 79.14, 123456.2) == (
        'Final Performance images/sec : 2603.061\nFinal Train Accuracy : 79.14\nE2E Training Duration sec : 123456')


@pytest.mark.parametrize('epochs', [1, 2, 60])
@pytest.mark.parametrize('gaps', [False, True])
def test_curves_are_drawn_for_any_number_of_epochs(tmp_path, epochs, gaps):
    rows = [dict.fromkeys(COLUMNS, None if gaps else 1.5) | {'epoch': epoch, 'train_loss': 1.0, 'lr': 0.0}
            for epoch in range(epochs)]
    assert draw_curves(rows, tmp_path / 'curves.png', 'title')
    with Image.open(tmp_path / 'curves.png') as picture:
        assert picture.size == (1440, 960)


def test_the_curves_say_what_the_training_loss_is(tmp_path):
    rows = [{'epoch': epoch, 'train_loss': 1.0, 'eval_loss': 0.5} for epoch in range(2)]
    assert draw_curves(rows, tmp_path / 'curves.svg', 'title', 'label smoothing 0.1')
    assert 'training, with label smoothing 0.1' in (tmp_path / 'curves.svg').read_text()


def test_the_training_loss_is_described_by_the_options():
    assert describe_train_loss(parse_args(['--smoothing', '0'])) == ''
    assert describe_train_loss(parse_args(['--mixup', '0.2'])) == 'label smoothing 0.1, Mixup'


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert not draw_curves([{'epoch': 0}], tmp_path / 'curves.png', 'title')
    assert 'timm-npu-irv2[plot]' in caplog.text and len(caplog.records) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(progress: Progress) -> None:
    for batch in (5, 10):
        progress.update({'epoch': 0, 'batch': batch, 'batches': 10, 'loss': 0.5, 'top1': 90.0, 'lr': 0.1,
                         'images_per_second': 10.0 * (batch > 5)})
    progress.epoch_done({'epoch': 0, 'train_loss': 0.5, 'train_top1': 90.0, 'eval_loss': 0.25, 'eval_top1': 95.0,
                         'eval_top5': 100.0, 'lr': 0.1, 'images_per_second': 10.0})


def test_a_file_gets_plain_lines(caplog):
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    steps(Progress(3, stream, clock=iter([10, 20, 24]).__next__))
    assert stream.getvalue() == ''
    assert [record.message for record in caplog.records] == [
        'Train 0 [ 5/10  50 %]  loss 0.5000  top-1 90.00 %  lr 0.1',
        'Train 0 [10/10 100 %]  loss 0.5000  top-1 90.00 %  lr 0.1  10.0 images/s',
        'Epoch 0 (1 of 3): loss 0.5000, top-1 90.00 %, validation loss 0.2500, top-1 95.00 %, top-5 100.00 %, '
        '10.0 images/s, 0:48 left',
    ]


def test_the_time_that_is_left_counts_batches_and_validations(caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(3, io.StringIO(), clock=iter([10, 20, 24, 100, 4100, 4104]).__next__)
    steps(progress)  # 2 seconds for a batch, 4 for the validation
    figures = {'batches': 10, 'loss': 0.5, 'top1': 90.0, 'lr': 0.1, 'images_per_second': 0.0}
    progress.update({**figures, 'epoch': 1, 'batch': 5})
    assert caplog.records[-1].message.endswith('left 0:10 (run 0:38)')
    progress.update({**figures, 'epoch': 1, 'batch': 9})  # slower by now
    assert caplog.records[-1].message.endswith('left 16:40 (run 3:03:28)')
    progress.update({**figures, 'epoch': 2, 'batch': 10})
    assert 'left' not in caplog.records[-1].message


def test_a_terminal_gets_a_bar_and_a_line_for_each_epoch(caplog):
    caplog.set_level(logging.INFO)
    stream = Terminal()
    steps(Progress(3, stream))
    assert 'Epoch 0' in stream.getvalue() and 'loss 0.5000' in stream.getvalue() and '10/10' in stream.getvalue()
    assert [record.message[:7] for record in caplog.records] == ['Epoch 0']


@pytest.mark.timeout(600)
@pytest.mark.parametrize('content', [
    b'epoch\nx\n', b'epoch\nnan\n', b'epoch\ninf\n', b'epoch\n\xff\n', 'pipe', 'folder',
    b'epoch\n"' + b'1' * 200_000 + b'"\n',
])
def test_a_damaged_table_of_an_earlier_start_is_one_line(tmp_path, content):
    path = tmp_path / 'summary.csv'
    {'pipe': lambda: os.mkfifo(path), 'folder': path.mkdir}.get(content, lambda: path.write_bytes(content))()
    with pytest.raises(UserError, match=r'summary\.csv cannot be read') as caught:
        Report(tmp_path, 1)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500
