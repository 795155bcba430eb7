"""Any command line and any config ends in a run or in one line: no traceback, no hang, nothing taken in silence."""

import contextlib
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_npu_irv2.cli.flags import TRAIN_FLAGS
from timm_npu_irv2.cli.parser import Flag
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.options import parse_args

from .mutations import fuzz
from .runs import Server
from .runs import server as start_server

FLAGS = {flag.dest: flag for group in TRAIN_FLAGS for flag in group.flags if flag.names.startswith('-')}
SHORT = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NUMBERS = '0 1 2 3 0.5 1.5 -1 1e-300 1e18 1e400 99999999999999999999 nan inf -inf 010 1_0 0x10 1:30'.split()
WORDS = [
    *'xyz P ../.. / a=b features_only=True - -- none rand-m9-n1 rand-mx augmix-m3 v0 original-mstd0.5'.split(),
    *'dynamic L RGB sgd adamw lookahead_adam adahessian eager inductorr torch/nonsense nonsense wds/'.split(),
    '', ' ', 'x=' + '[' * 200, '\x1b[31m', 'ä\u202e', 'a' * 3000,
]


def values(flag: Flag) -> st.SearchStrategy[list[str]]:
    """The words after an option: valid and invalid ones."""
    if flag.type is bool:
        return st.just([])
    valid = list(map(str, flag.rest.get('choices', ()))) or (NUMBERS if flag.type in (int, float) else WORDS)
    word = st.one_of(st.sampled_from(valid), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=8))
    count = flag.rest.get('nargs')
    if isinstance(count, int):
        return st.lists(word, min_size=count, max_size=count)
    return st.lists(word, min_size=0 if count in ('?', '*') else 1, max_size=3 if count in ('+', '*') else 1)


@st.composite
def command_lines(draw: st.DrawFn, names: tuple[str, ...]) -> list[str]:
    words: list[str] = []
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)):
        words += [FLAGS[name].names.split()[-1], *draw(values(FLAGS[name]))]
    return words


def check_parse(words: list[str]) -> None:
    try:
        parse_args(words)
    except UserError as error:
        quoted = any('\n' in word for word in words)  # scripts print it as \n
        assert ('\n' not in str(error) or quoted) and len(str(error)) < 1000
    except SystemExit as stop:  # --help
        assert stop.code == 0


YAML = st.one_of(
    st.text(max_size=60),
    st.dictionaries(st.sampled_from([*FLAGS, 'nonsense', '1']), st.sampled_from([
        '010', '1:30', '1e18', '[1, 2]', '[]', '{}', '{a: 1}', 'true', 'no', 'null', '~', '"x"',
        '[' * 300 + ']' * 300, '&a [1]',
        '*a', '!!python/object:os.system {}', '.nan', '.inf', '2001-01-01', '|\n  x\n  y', '? a', "'", '0.5', '-1',
        '7'])).map(
        lambda entries: ''.join(f'{key}: {value}\n' for key, value in entries.items())),
)


@SHORT
@given(YAML)
def test_any_config_is_read_or_refused_in_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp('config') / 'config.yaml'
    path.write_bytes(text.encode('utf-8', 'surrogatepass'))
    with contextlib.redirect_stdout(io.StringIO()):
        check_parse(['-c', str(path)])


@pytest.mark.parametrize(('text', 'said'), [
    ('lr: 0.1\nlr: 0.2', "'lr' occurs twice"), ('batch_size: 1\nbatch-size: 2', 'occurs twice'),
    ('epochs: &a 3\nseed: *a', 'references'), ('epochs: 1:30', '1:30'), ('mean: ' + '[' * 2000 + ']' * 2000,
    'nested too deeply'),
    ('epochs: 2001-01-01', '2001-01-01'),
])
def test_a_trap_of_yaml_is_refused(tmp_path, text, said):
    (tmp_path / 'config.yaml').write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        parse_args(['-c', str(tmp_path / 'config.yaml')])
    assert '\n' not in str(caught.value)


def test_a_leading_zero_in_yaml_is_decimal(tmp_path):
    (tmp_path / 'config.yaml').write_text('epochs: 010')
    assert parse_args(['-c', str(tmp_path / 'config.yaml')]).epochs == 10


@pytest.mark.parametrize(('words', 'said'), [
    ('--crop-pct 100', 'at most 1'), ('--img-size 100000', '4096'), ('--aa xyz', 'AutoAugment'),
    ('--aa rand-n1000000', 'AutoAugment'),
    ('--torchcompile nonsense', 'no such backend'), ('--torchcompile --torchcompile-mode fast', 'max-autotune'),
    ('--sched plateau --sched-on-updates', 'plateau'), ('--opt-level O2 --torchscript', 'exclude'),
    ('--model-kwargs features_only=True', 'features_only'), ('--epoch-repeats 1e18', '1000'),
    ('--cooldown-epochs 100000000000', '100000'),
    ('--workers 500', 'CPU cores'), ('--epochs 1 --warmup-epochs 1000', '--warmup-epochs 1000'), ('--momentum 5',
    'less than 1'),
    ('--scale 5 9', '--scale'), ('--scale 0.5 1.5', 'at most 1'), ('--dataset nonsense', '<type>/<name>'),
    ('--dataset nonsense/x', '<type>/<name>'), ('--epochs 3 --start-epoch 3', 'ends after 3'), ('--lr-noise-pct 0',
    '0.01'),
    ('--cutmix-minmax 0.5 0.5', 'differ'), ('--sched step --decay-rate 3', 'at most 1'), ('--lr-noise 0.9 0.1',
    'smaller'),
])
def test_nonsense_is_refused(words, said):
    with pytest.raises(UserError) as caught:
        parse_args(words.split())
    assert said in str(caught.value) and '\n' not in str(caught.value)


def test_an_empty_module_name_is_refused():
    with pytest.raises(UserError, match='--device-modules'):
        parse_args(['--device-modules', ''])


def test_the_default_warm_up_fits_into_a_short_run():
    assert [parse_args(['--epochs', str(n)]).warmup_epochs for n in (1, 2, 5, 6, 300)] == [0, 1, 2, 5, 5]


# --------------------------------------------------------------------------------------------------- two-image runs


# Left out: what needs a network, other processes or a long time, and where the results go.
LEFT_OUT = set(
    'dataset_download pretrained kd_model_name log_wandb push_to_hub multiprocessing_distributed world_size rank '
    'dist_url dist_backend addr output experiment data_dir num_classes input_size train_img_sizes'.split())
RUN_FLAGS = tuple(sorted(FLAGS.keys() - LEFT_OUT))
# Of these, large values would be right and take long: they are drawn from a few small and some impossible ones.
FEW = {
    'epochs': '0 1 2 -1 1e18 nan 99999999999', 'cooldown_epochs': '0 1 100000000000 -1',
    'epoch_repeats': '0 1 2.5 1e18 nan', 'train_batches_per_epoch': '1 3 0 99999999999999', 'aug_repeats': '0 2 3 nan',
    'lr_cycle_limit': '1 2 0 99999999', 'lr_cycle_mul': '1 2 0.5 1e300', 'workers': '0 1 500 -1',
    'img_size': '32 33 1 0 100000', 'torchcompile': 'eager nonsense aot_eager',
    'dataset': 'nonsense torch/ torch/x wds/',
    'model': 'test_resnet test_vit test_efficientnet nonsense hf-hub: local-dir:x resnet18.nonsense',
    'resume': 'auto nowhere.pth.tar . train/a/0.png', 'initial_checkpoint': 'nowhere.pth . train/a/0.png',
    'warmup_epochs': '0 1 1000', 'start_epoch': '0 1 7',
}
LIMIT = 60  # seconds of a run


@st.composite
def runs(draw: st.DrawFn) -> list[str]:
    words: list[str] = []
    for name in draw(st.lists(st.sampled_from(RUN_FLAGS), min_size=1, max_size=4)):
        chosen = [draw(st.sampled_from(FEW[name].split()))] if name in FEW else draw(values(FLAGS[name]))
        words += [FLAGS[name].names.split()[-1], *chosen]
    return words


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('two images')
    for split in 'train', 'val':
        for label in 'a', 'b':
            path = folder / split / label / '0.png'
            path.parent.mkdir(parents=True)
            pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope='module')
def server() -> Iterator[Server]:
    with start_server() as running:
        yield running


def check_run(images: Path, server: Server, words: list[str]) -> None:
    usual = '--model test_resnet --device cpu --img-size 32 -j 0 --epochs 1 -b 2'.split()
    folder = images / 'output' / str(time.monotonic_ns())
    command = [*usual, '--data-dir', str(images), *words, '--output', str(folder.parent), '--experiment', folder.name]
    code, output = server.run(command, images, LIMIT)
    shutil.rmtree(folder, ignore_errors=True)
    assert code in (0, 2), (words, code, output)
    errors = [line for line in output.splitlines() if line.startswith('train.py: error: ')]
    assert len(errors) == (code == 2) and 'Traceback' not in output, (words, output)
    assert not any(len(error) > 1000 for error in errors), (words, output)


def check_command(data, images, server) -> None:
    check_run(images, server, data.draw(runs()))


test_two_images_are_trained_on_or_the_options_refused, test_commands_for_long = fuzz(25, 0.4)(check_command)


def check_parsing(data) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        check_parse(data.draw(command_lines(tuple(FLAGS))))


test_any_command_line_is_parsed_or_refused_in_one_line, test_command_lines_for_long = fuzz(60, 0.05)(check_parsing)
