"""How a script starts and ends: the environment of torch, one line for an error of several processes, early checks."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from timm_npu_irv2.cli.checks import check_installed, check_output_file, name_option
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.errors import UserError

ROOT = Path(__file__).parents[2]

# The scripts with a table of options, and the words that each must have.
NEEDED = {
    'train': [], 'validate': ['--checkpoint', 'a.pth'], 'inference': ['--checkpoint', 'a.pth'],
    'onnx_export': ['a.onnx', '--checkpoint', 'a.pth'], 'onnx_quantize': ['a.onnx', 'b.onnx'],
    'make_shards': ['a', 'b'], 'benchmark': ['step']}
OFFLINE = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': '0'}  # nothing listens on the port of `discard`

# Prints a variable at the moment in which a script imports torch, and interrupts it there.
WATCH = '''
import os, runpy, signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch':
            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def until_torch(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a script, or a command of timm-npu-irv2, until it imports torch."""
    environment = {key: value for key, value in os.environ.items() if key != 'GOMP_SPINCOUNT'} | variables
    path = ROOT / 'train_scripts' / f'{script}.py'
    start = [path] if path.is_file() else [ROOT / 'timm-npu-irv2', script]
    code = WATCH if path.is_file() else WATCH.replace('run_path(sys.argv[0]', "run_module('timm_npu_irv2'")
    return subprocess.run([sys.executable, '-c', code, *start, *words], capture_output=True, text=True, check=False,
                          env={**environment, 'PYTHONPATH': str(ROOT)})


@pytest.mark.parametrize('script', [each for each in NEEDED if each != 'make_shards'])
@pytest.mark.parametrize(('given', 'found'), [({}, '2000'), ({'GOMP_SPINCOUNT': '7'}, '7')])
def test_waiting_threads_give_way_however_a_script_is_started(script, given, found):
    assert until_torch(script, *NEEDED.get(script, ()), **given).stdout == f'{found}\n'


@pytest.mark.parametrize('script', NEEDED)
def test_a_mistyped_option_and_help_are_answered_before_torch_is_loaded(script):
    wrong = until_torch(script, *NEEDED[script], '--qqqqqq')
    assert (wrong.returncode, wrong.stdout) == (2, '')
    assert wrong.stderr == f'{script}.py: error: unknown option --qqqqqq; --help lists all options.\n'
    helped = until_torch(script, '--help')
    assert (helped.returncode, helped.stderr) == (0, '')
    assert helped.stdout.startswith(f'usage: {script}.py ')


@pytest.mark.parametrize(('words', 'line'), [
    (['hub'], 'timm-npu-irv2 hub: error: add one of export, push, pull.'),
    (['hub', 'exprot'], "timm-npu-irv2 hub: error: unknown command 'exprot': use one of export, push, pull."),
    (['hub', 'export', 'a', 'b', '--dtpye', 'c'],
     'timm-npu-irv2 hub: error: unknown option --dtpye. Did you mean --dtype?'),
    (['hub', 'export', 'a', 'b', '--for', 'c'],
     "timm-npu-irv2 hub: error: --for: invalid choice: 'c' (choose from "),
    (['hub', 'push', 'a'], 'timm-npu-irv2 hub: error: the following arguments are required: REPO'),
    (['weights', 'a', 'b', '--tp', 'npu'], 'timm-npu-irv2 weights: error: unknown option --tp. Did you mean --to?'),
    (['weights', 'a', 'b'], 'timm-npu-irv2 weights: error: the following arguments are required: --to'),
    (['weights', 'a', 'b', '--to', 'npu', '--ema'], 'timm-npu-irv2 weights: error: unknown option --ema'),
    (['doctor', '--jsno'], 'timm-npu-irv2 doctor: error: unknown option --jsno. Did you mean --json?'),
    (['benchmark', 'fly'], "benchmark.py: error: unknown command 'fly': use one of step, train, infer, "),
    (['benchmark', 'tune', '--taks', 'eval'], 'benchmark.py: error: unknown option --taks. Did you mean --task?'),
    (['make_shards', 'a', 'b', '--sed', '1'], 'make_shards.py: error: unknown option --sed. Did you mean --seed?'),
])
def test_a_wrong_command_or_option_is_one_line_before_torch_is_loaded(words, line):
    done = until_torch(*words)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(line) and done.stderr.count('\n') == 1


@pytest.mark.parametrize('words', [
    ['hub', '--help'], ['hub', 'export', '--help'], ['weights', '--help'], ['doctor', '--help'],
    ['benchmark', 'infer', '--help'], ['benchmark', '-h'], ['make_shards', '-h']])
def test_help_of_every_command_comes_before_torch_is_loaded(words):
    done = until_torch(*words)
    assert (done.returncode, done.stderr) == (0, '') and done.stdout.startswith('usage: ')


@pytest.mark.parametrize('words', [
    ['train', '--pretrained'], ['train', '--model', 'hf-hub:OWNER/NAME'], ['inference', 'a.png'],
    ['validate', '--model', 'inception_resnet_v2_npu.tf_ens_adv_in1k'],
    ['validate', '--checkpoint', 'hf-hub:OWNER/NAME'],
    ['onnx_export', 'a.onnx'], ['preflight', 'launcher', 'train.py', '2', '--pretrained']])
def test_weights_that_cannot_be_had_are_told_before_torch_is_loaded(words, tmp_path):
    done = until_torch(*words, **OFFLINE, HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.count('\n') == 1 and 'cannot be reached, and it is not in the cache' in done.stderr


@pytest.mark.parametrize('words', [
    ['train', '--pretrained', '--pretrained-path', 'a.pth'], ['train'], ['inference', 'a.png', '--checkpoint', 'b.pth'],
    ['validate', '--checkpoint', 'a.pth', 'hf-hub:OWNER/NAME']])
def test_weights_that_are_not_wanted_or_one_of_many_are_not_asked_for(words, tmp_path):
    done = until_torch(*words, **OFFLINE, HF_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, '')


def test_the_launchers_check_finds_a_mistyped_option_before_torch_is_loaded():
    done = until_torch('preflight', 'dist_train_npu.sh', 'validate.py', '2', '--chekpoint', 'a')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'dist_train_npu.sh: error: unknown option --chekpoint. Did you mean --checkpoint?\n'


def test_a_config_from_a_pipe_is_read_once(tmp_path):
    script = f'"{sys.executable}" "{ROOT}/train_scripts/train.py" -c <(echo "epochs: 0") --data-dir missing'
    done = subprocess.run(['bash', '-c', script], capture_output=True, text=True, check=False, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert 'missing' in done.stderr and 'does not exist' in done.stderr


@pytest.mark.parametrize('script', NEEDED)
def test_an_interruption_while_torch_is_loaded_leaves_no_traceback(script):
    done = until_torch(script, *NEEDED[script])
    assert (done.returncode, done.stderr) == (-signal.SIGINT, '')


def test_one_of_several_processes_reports_an_error(tmp_path, monkeypatch, capsys):
    def fail(argv):
        raise UserError('the same everywhere')

    codes = []
    for rank in range(3):
        folder = tmp_path / 'attempt_0' / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(folder / 'error.json'))
        codes.append(run_script('train.py', fail, []))
    assert codes == [2, 2, 2]
    assert capsys.readouterr().err == 'train.py: error: the same everywhere\n'


def test_an_error_of_several_processes_is_one_line_and_exit_code_2(tmp_path):
    script = tmp_path / 'fails.py'
    script.write_text(
        'import sys\nfrom timm_npu_irv2.cli.script import run_script\nfrom timm_npu_irv2.errors import UserError\n'
        "def main(argv):\n    raise UserError('it is wrong')\nsys.exit(run_script('fails.py', main, []))\n")
    done = subprocess.run(
        [sys.executable, ROOT / 'train_scripts' / 'torchrun.py', '--standalone', '--nproc-per-node', '3', script],
        capture_output=True, text=True, check=False,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert (done.returncode, done.stderr) == (2, 'fails.py: error: it is wrong\n')


@pytest.mark.parametrize(('is_primary', 'count'), [(True, 1), (False, 0)])
def test_torchs_warning_about_workers_comes_once(is_primary, count):
    with warnings.catch_warnings(record=True) as warned:
        start_log(is_primary)
        for line in range(2):
            warnings.warn_explicit('This DataLoader will create 4 worker processes', UserWarning, 'dataloader', line)
    assert len(warned) == count


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path):
    check_output_file('--picture', '')
    check_output_file('--picture', str(tmp_path / 'a.png'))
    check_output_file('--results-file', str(tmp_path / 'new' / 'folder' / 'a.csv'), make_folder=True)
    with pytest.raises(UserError, match='there is no folder'):
        check_output_file('--picture', str(tmp_path / 'new' / 'a.png'))
    with pytest.raises(UserError, match='it is a folder'):
        check_output_file('--picture', str(tmp_path))
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='there is no folder'):
        check_output_file('--results-file', str(tmp_path / 'file' / 'a.csv'), make_folder=True)


def test_a_missing_package_is_named_with_its_remedy():
    check_installed('--picture', 'torch')
    with pytest.raises(UserError, match=r'^--x needs no_such_package: pip install no_such_package\.$'):
        check_installed('--x', 'torch', 'no_such_package')


def test_an_error_of_a_construction_names_its_option():
    with pytest.raises(UserError, match=r'^--opt sgd: first line second line$'), name_option('--opt sgd'):
        raise ValueError('first line\nsecond line')
    with pytest.raises(RuntimeError, match='out of memory'), name_option('--model x'):
        raise RuntimeError('out of memory')
    with pytest.raises(UserError, match=r'^as it is$'), name_option('--model x'):
        raise UserError('as it is')
