"""The shell launchers: what they run, with which words, and one line for what can be known to be wrong before."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from timm_npu_irv2 import device as devices
from timm_npu_irv2.data.samplers import RankSampler
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.serialization import read_checkpoint
from timm_npu_irv2.training.options import parse_args

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
WITNESS = Path(__file__).parents[1] / 'witness'
LAUNCHERS = sorted(path.name for path in SCRIPTS.glob('*.sh'))
AWKWARD = ['a b', "it's", '$(touch spoiled)', '`touch spoiled`', '"quoted"', '*', '']

sys.path.insert(0, str(SCRIPTS))
import preflight  # noqa: E402


@pytest.fixture
def recorded(tmp_path):
    """A stand-in for Python that writes down each call; calls(launcher, words…) gives them."""
    log, python = tmp_path / 'calls', tmp_path / 'python'
    python.write_text(f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exit 0\nprintf "%s\\0" "$@" $\'\\n\' >> "{log}"\n')
    python.chmod(0o755)

    def calls(launcher: str, *words: str, **environment: str) -> list[list[str]]:
        clean = {key: value for key, value in os.environ.items() if key not in ('MASTER_PORT', 'MASTER_ADDR', 'NNODES')}
        subprocess.run(['bash', SCRIPTS / launcher, *words], check=True, cwd=tmp_path,
                       env={**clean, 'PYTHON': str(python), **environment})
        assert not (tmp_path / 'spoiled').exists()
        return [call.split('\0')[:-1] for call in log.read_text().split('\n\0')[:-1]]

    return calls


def run(launcher: str, *words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(['bash', SCRIPTS / launcher, *words], capture_output=True, text=True, check=False, cwd=cwd,
                          env={**os.environ, 'PYTHON': sys.executable, **environment})


@pytest.mark.parametrize('name', LAUNCHERS)
def test_launchers_are_sound_shell(name):
    subprocess.run(['bash', '-n', SCRIPTS / name], check=True)
    shellcheck = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    if shellcheck:
        subprocess.run([shellcheck, '-x', SCRIPTS / name], check=True)


@pytest.mark.parametrize('name', [name for name in LAUNCHERS if name != 'common.sh'])
def test_launchers_can_be_started_by_their_path(name):
    assert (SCRIPTS / name).read_text().startswith('#!/usr/bin/env bash\n')


ONE_PROCESS = {
    'train_full_1p.sh': ['-c', 'zoo_1p.yaml'],
    'train_performance_1p.sh': ['-c', 'zoo_1p.yaml', '--epochs', '2'],
}
EIGHT_PROCESSES = {
    'train_full_8p.sh': ['train.py', '-c', 'zoo_8p.yaml'],
    'train_performance_8p.sh': ['train.py', '-c', 'zoo_8p.yaml', '--epochs', '2'],
    'train_eval_8p.sh': ['validate.py'],
}


def short(words: list[str]) -> list[str]:
    return [Path(word).name if str(SCRIPTS) in word else word for word in words]


@pytest.mark.parametrize('name', ONE_PROCESS)
def test_one_card_runs_the_script_itself(recorded, name):
    words = [f'--data_path={AWKWARD[2]}', *AWKWARD]
    assert [short(call) for call in recorded(name, *words)] == [['train.py', *ONE_PROCESS[name], *words]]


@pytest.mark.parametrize('name', EIGHT_PROCESSES)
def test_eight_cards_are_checked_and_started_by_torchrun(recorded, name):
    words = [f'--data_path={AWKWARD[2]}', *AWKWARD]
    check, start = (short(call) for call in recorded(name, *words))
    script, *options = EIGHT_PROCESSES[name]
    assert check == ['preflight.py', name, script, '8', *options, *words]
    assert start == ['torchrun.py', '--nproc-per-node', '8', '--max-restarts', '0', script, *options, *words]


def test_dist_train_passes_every_word_on(recorded):
    _, start = recorded('dist_train_npu.sh', '2', *AWKWARD, MAX_RESTARTS='3')
    assert start[-len(AWKWARD):] == AWKWARD and start[start.index('--max-restarts') + 1] == '3'


def test_several_machines_meet_where_the_environment_says(recorded):
    _, start = recorded('dist_train_npu.sh', '8', NNODES='2', NODE_RANK='1', MASTER_ADDR='host', MASTER_PORT='1234')
    assert start[1:11] == ['--rdzv-backend', 'machines', '--rdzv-endpoint', 'host:1234', '--rdzv-id', 'train',
                           '--rdzv-conf', 'rank=1,timeout=600', '--nnodes', '2']


KUBERNETES = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'MASTER_ADDR': 'job-master-0', 'MASTER_PORT': '23456'}
SLURM = {'SLURM_NNODES': '3', 'SLURM_NTASKS': '3', 'SLURM_NODEID': '2', 'SLURM_JOB_NODELIST': 'node[04-06]',
         'SLURM_JOB_ID': '1234567'}


@pytest.mark.parametrize(('variables', 'endpoint', 'conf', 'nodes'), [
    ({**KUBERNETES, 'WORLD_SIZE': '4', 'RANK': '3'}, 'job-master-0:23456', 'rank=3,timeout=600', '4'),
    ({'PET_NNODES': '2', 'PET_NODE_RANK': '1', 'PET_MASTER_ADDR': 'job-0', 'PET_MASTER_PORT': '29400',
      'PET_NPROC_PER_NODE': '1'}, 'job-0:29400', 'rank=1,timeout=600', '2'),
    ({'PET_NNODES': '2:4', 'PET_RDZV_ENDPOINT': 'job-0:29400', 'PET_RDZV_ID': 'job', 'PET_RDZV_BACKEND': 'c10d'},
     'job-0:29400', 'join_timeout=600,last_call_timeout=30', '2:4'),
    (SLURM, 'node04:21567', 'rank=2,timeout=600', '3'),
], ids=['PyTorchJob and Volcano', 'Kubeflow', 'elastic Kubeflow', 'SLURM'])
def test_the_variables_of_clusters_are_understood(recorded, tmp_path, variables, endpoint, conf, nodes):
    scontrol = tmp_path / 'bin' / 'scontrol'
    scontrol.parent.mkdir()
    scontrol.write_text('[[ "$*" == "show hostnames node[04-06]" ]] && printf "node0%s\\n" 4 5 6\n')
    scontrol.chmod(0o755)
    _, start = recorded('dist_train_npu.sh', '8', **variables, PATH=f'{scontrol.parent}:{os.environ["PATH"]}')
    options = dict(zip(start[1::2], start[2::2], strict=False))
    assert (options['--rdzv-endpoint'], options['--rdzv-conf'], options['--nnodes']) == (endpoint, conf, nodes)
    assert options['--nproc-per-node'] == '8'


@pytest.mark.parametrize(('nodes', 'message'), [('2', 'needs MASTER_ADDR'), ('2:4', 'needs RDZV_ENDPOINT=HOST:PORT')])
def test_several_machines_need_a_place_to_meet(tmp_path, nodes, message):
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env bash\n')
    python.chmod(0o755)
    assert f'NNODES={nodes} {message}' in one_line(run('dist_train_npu.sh', '2', NNODES=nodes, PYTHON=str(python)))


def test_the_environment_of_the_npu_has_defaults_that_give_way(tmp_path):
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env bash\n[[ $1 == -c ]] && exit 0\n'
                      'echo "$TASK_QUEUE_ENABLE $HCCL_CONNECT_TIMEOUT $OMP_NUM_THREADS"\n')
    python.chmod(0o755)
    result = run('train_full_1p.sh', PYTHON=str(python), HCCL_CONNECT_TIMEOUT='7', OMP_NUM_THREADS='3')
    assert result.stdout == '2 7 3\n'


PRINTED = ('${PYTORCH_NPU_ALLOC_CONF-none} ${HCCL_IF_BASE_PORT-none} ${HCCL_SOCKET_IFNAME-none} '
           '${GLOO_SOCKET_IFNAME-none} ${HCCL_WHITELIST_DISABLE-none}')


def variables_of(tmp_path: Path, *words: str, **environment: str) -> list[str]:
    python = tmp_path / 'python'
    python.write_text(f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exit 0\n[[ $1 == *preflight.py ]] || echo "{PRINTED}"\n')
    python.chmod(0o755)
    return run('dist_train_npu.sh', *words, PYTHON=str(python), **environment).stdout.split()


def test_no_allocator_variable_stands_beside_the_users(tmp_path):
    assert variables_of(tmp_path, '1')[0] == 'expandable_segments:True'
    assert variables_of(tmp_path, '1', PYTORCH_ALLOC_CONF='max_split_size_mb:64')[0] == 'none'
    assert variables_of(tmp_path, '1', PYTORCH_NPU_ALLOC_CONF='max_split_size_mb:64')[0] == 'max_split_size_mb:64'


def test_a_second_job_gets_other_ports_for_hccl(tmp_path):
    assert variables_of(tmp_path, '2', HCCL_IF_BASE_PORT='61000')[1] == '61000'
    with socket.socket() as listener:
        with contextlib.suppress(OSError):  # another one listens there
            listener.bind(('127.0.0.1', 60031))
            listener.listen()
        base = int(variables_of(tmp_path, '2')[1])
    assert base > 60031 and base % 32 == 60000 % 32


def test_one_name_of_an_interface_serves_hccl_and_gloo(tmp_path):
    found = variables_of(tmp_path, '1', SOCKET_IFNAME='eth7', GLOO_SOCKET_IFNAME='eth8')
    assert found[2:] == ['eth7', 'eth8', 'none']
    assert variables_of(tmp_path, '1')[2:] == ['none', 'none', 'none']


@pytest.mark.parametrize('folders, first', [
    (('Ascend/cann', 'Ascend/ascend-toolkit'), 'Ascend/cann'), (('Ascend/ascend-toolkit',), 'Ascend/ascend-toolkit')])
def test_cann_below_the_home_folder_is_loaded_the_newer_one_first(tmp_path, folders, first):
    python = tmp_path / 'python'
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'set_env.sh').write_text(f'export ASCEND_OPP_PATH={folder}\n')
    python.write_text('#!/usr/bin/env bash\n[[ $1 == -c ]] && exit 0\necho "$ASCEND_OPP_PATH"\n')
    python.chmod(0o755)
    assert run('train_full_1p.sh', PYTHON=str(python), HOME=str(tmp_path)).stdout == f'{first}\n'


def test_cann_is_loaded_where_it_is(tmp_path):
    toolkit, python = tmp_path / 'a b', tmp_path / 'python'
    toolkit.mkdir()
    (toolkit / 'set_env.sh').write_text('export ASCEND_OPP_PATH="$UNSET_VARIABLE"here\nfalse\n')
    python.write_text('#!/usr/bin/env bash\n[[ $1 == -c ]] && exit 0\necho "$ASCEND_OPP_PATH"\n')
    python.chmod(0o755)
    assert run('train_full_1p.sh', PYTHON=str(python), ASCEND_TOOLKIT_HOME=str(toolkit)).stdout == 'here\n'


# ------------------------------------------------------------------------------------------------- what goes wrong


def one_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.count('\n') == 1
    return result.stderr


@pytest.mark.parametrize(('words', 'message'), [
    ([], 'usage'),
    (['two'], "'two' is not a number of processes"),
    (['0'], "'0' is not a number of processes"),
])
def test_number_of_processes(words, message):
    assert message in one_line(run('dist_train_npu.sh', *words))


def test_no_python(tmp_path):
    for tool in ('dirname', 'nproc', 'getconf'):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    result = subprocess.run([shutil.which('bash'), SCRIPTS / 'train_full_1p.sh'], capture_output=True, text=True,
                            check=False, env={'PATH': str(tmp_path)})
    assert 'python is not found' in one_line(result)


def test_a_python_without_the_package(tmp_path):
    python = tmp_path / 'python'
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S -I "$@"\n')  # without installed packages
    python.chmod(0o755)
    message = one_line(run('dist_train_npu.sh', '2', '--data-dir', str(tmp_path), PYTHON=str(python)))
    assert f'{python} does not have timm_npu_irv2: activate the environment that has it, or set PYTHON.' in message


def test_a_missing_data_folder_is_one_line_for_all_processes():
    result = run('dist_train_npu.sh', '2', '--device', 'cpu', '--data-dir', "/no where/it's $(here)")
    assert one_line(result) == (
        "dist_train_npu.sh: error: data folder '/no where/it's $(here)' does not exist: check --data-dir.\n")


def message_of(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        preflight.main(words)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_wrong_options(tmp_path):
    assert '--epochz' in message_of('train.py', '2', '--data-dir', str(tmp_path), '--epochz', '1')
    assert '--lr' in message_of('validate.py', '2', '--data-dir', str(tmp_path), '--lr', '1')


@pytest.mark.parametrize('script', ['train.py', 'validate.py'])
def test_no_data(script):
    assert '--data-dir' in message_of(script, '2', '--device', 'cpu')


@pytest.mark.parametrize(('kind', 'message'), [('npu', 'no NPU is available'), ('cuda', 'no CUDA device is available')])
def test_missing_devices(tmp_path, kind, message):
    if devices.device_count(kind):
        pytest.skip(f'there is a {kind} device here')
    assert message in message_of('train.py', '2', '--device', kind, '--data-dir', str(tmp_path))


def test_more_processes_than_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, 'device_count', lambda kind: 4)
    message = message_of('train.py', '5', '--device', 'cuda', '--data-dir', str(tmp_path))
    assert 'sees 4 cuda device(s). Start at most 4 processes here' in message


@pytest.mark.skipif(any(map(devices.device_count, ('npu', 'cuda'))), reason='there is a device here')
def test_several_processes_share_a_cpu_only_if_asked_to(tmp_path):
    assert 'add --device cpu' in message_of('train.py', '8', '--data-dir', str(tmp_path))
    assert preflight.main(['train.py', '1', '--data-dir', str(tmp_path), '--val-split', '']) == 0


@pytest.mark.parametrize('name', [name for name in LAUNCHERS if name != 'common.sh'])
@pytest.mark.parametrize('option', ['-h', '--help'])
def test_help_of_a_launcher_does_nothing_else(name, option):
    result = run(name, option, PYTHON='/no/such/python')
    assert (result.returncode, result.stderr) == (0, '')
    assert name in result.stdout and '#' not in result.stdout


@pytest.mark.parametrize('script', ['digits.py', 'preflight.py', 'torchrun.py', 'train.py'])
def test_help_of_a_script_does_nothing_else(script, tmp_path):
    done = subprocess.run([sys.executable, SCRIPTS / script, '--help'], capture_output=True, text=True, check=False,
                          cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '') and 'usage' in done.stdout.lower()
    assert not list(tmp_path.iterdir())


def test_restarts_need_a_folder_to_go_on_in(tmp_path, monkeypatch):
    words = ['train.py', '2', '--device', 'cpu', '--data-dir', str(tmp_path)]
    monkeypatch.setenv('MAX_RESTARTS', '3')
    assert 'MAX_RESTARTS needs --experiment' in message_of(*words)
    assert preflight.main([*words, '--experiment', 'run']) == 0


def test_port_in_use(tmp_path, monkeypatch):
    words = ['train.py', '2', '--device', 'cpu', '--data-dir', str(tmp_path)]
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        monkeypatch.setenv('MASTER_PORT', str(taken.getsockname()[1]))
        assert 'is in use' in message_of(*words)
        monkeypatch.setenv('NODE_RANK', '1')  # the port is that of another machine
        assert preflight.main(words) == 0


def test_port_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv('MASTER_PORT', 'http')
    assert "'http' is not a port" in message_of('train.py', '2', '--device', 'cpu', '--data-dir', str(tmp_path))


@pytest.mark.parametrize(('conf', 'message'), [
    ('rank=0,timeout=1', 'machine 1, 2 of 3 did not come to 127.0.0.1:{} within 1 s: start it with NODE_RANK=1'),
    ('rank=2,timeout=1', f'machine 2 ({socket.gethostname()}) cannot reach machine 0 at 127.0.0.1:{{}}'),
], ids=['missing machines', 'closed port'])
def test_machines_that_cannot_meet_are_named_in_one_line(free_port, conf, message):
    meeting = ['--rdzv-backend', 'machines', '--rdzv-endpoint', f'127.0.0.1:{free_port}', '--rdzv-conf', conf]
    command = [sys.executable, SCRIPTS / 'torchrun.py', *meeting, '--nnodes', '3', '--nproc-per-node', '1', 'script.py']
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert message.format(free_port) in one_line(result)


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize('path', sorted((SCRIPTS / 'recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_recipes_are_options_of_train(path):
    args = parse_args(['-c', str(path), '--data-dir', 'somewhere'])
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, key) == value


def test_the_zoos_recipe_to_the_letter():
    eight = parse_args(['-c', str(SCRIPTS / 'recipes/zoo_8p.yaml')])
    facts = {
        'opt': 'npufusedsgd', 'lr': 0.6, 'momentum': 0.9, 'weight_decay': 1e-4, 'sched': 'cosine', 'min_lr': 0.0,
        'warmup_epochs': 0, 'epochs': 240, 'batch_size': 192, 'opt_level': 'O2', 'loss_scale': 128.0, 'smoothing': 0.1,
        'no_ddp_bb': True, 'seed': 49, 'img_size': 299, 'hflip': 0.5, 'color_jitter': 0.0, 'num_classes': 1001,
        'mean': [0.5] * 3, 'std': [0.5] * 3, 'sched_on_updates': False, 'opt_kwargs': {'filter_bias_and_bn': False},
    }
    assert {key: getattr(eight, key) for key in facts} == facts
    assert int(299 / eight.crop_pct) == 342
    one = parse_args(['-c', str(SCRIPTS / 'recipes/zoo_1p.yaml')])
    differing = {key for key, value in vars(eight).items() if getattr(one, key) != value}
    assert differing == {'lr', 'no_ddp_bb'} and one.lr == 0.075


# ------------------------------------------------------------------------------------------------------ end to end


def test_folders_with_awkward_names_are_trained_from_and_into(tmp_path):
    awkward = tmp_path / """it's "odd" $(touch spoiled) `touch spoiled` * \\ ;&"""
    for split, index in itertools.product(('train', 'val'), range(4)):
        path = awkward / 'images' / split / f'class{index % 2}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 40), (60 * index, 0, 0)).save(path)
    words = ['--model', 'test_resnet', '--img-size', '32', '--num-classes', '2', '-b', '2', '-j', '0', '--epochs', '1',
             '--warmup-epochs', '0', '--device', 'cpu']
    result = run('dist_train_npu.sh', '2', '--data-dir', str(awkward / 'images'), '--output', str(awkward), *words,
                 '--experiment', 'a run', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (awkward / 'a run' / 'report.json').exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [awkward.name]


# Places in the order of the first epoch, by their image: of two processes with four each, one sees a, b, b, c and the
# other b, c, c, d; one process sees the same two batches one after the other.
DEALT = 'abbcbccd'


@pytest.fixture
def dealt_images(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    images = {name: Image.fromarray(generator.integers(0, 256, (75, 75, 3), dtype=np.uint8)) for name in set(DEALT)}
    folder = tmp_path / 'images'
    (folder / 'train' / 'class0').mkdir(parents=True)
    order = itertools.islice(RankSampler(len(DEALT), 0, 1, seed=7, epoch_repeats=0, aug_repeats=0), len(DEALT))
    for draw, name in zip(order, DEALT, strict=True):
        images[name].save(folder / 'train' / 'class0' / f'{draw.index}.png')
    return folder


def test_two_processes_have_the_gradients_of_one_that_averages_their_half_batches(dealt_images, tmp_path):
    """Those of this network, by how far a step of plain SGD moves the weights."""
    model = timm.create_model('inception_resnet_v2_npu', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'start.pth')
    words = ['--data-dir', str(dealt_images), '--val-split', '', '--num-classes', '3', '--img-size', '75', '-b', '4',
             '-j', '0', '--no-aug', '--initial-checkpoint', str(tmp_path / 'start.pth'), '--epochs', '1', '--seed', '7',
             '--opt', 'momentum', '--momentum', '0', '--weight-decay', '0', '--lr', '1', '--sched', 'none',
             '--warmup-epochs', '0', '--device', 'cpu', '--device-modules', 'rank_weights', '--output', str(tmp_path)]
    moved = {}
    for processes, options in ('2', []), ('1', ['--grad-accum-steps', '2']):
        result = run('dist_train_npu.sh', processes, *words, *options, '--experiment', processes, cwd=tmp_path,
                     PYTHONPATH=os.pathsep.join([str(WITNESS), str(SCRIPTS.parent)]), OMP_NUM_THREADS='1')
        assert result.returncode == 0, result.stderr
        after = read_checkpoint(tmp_path / processes / 'last.pth.tar')['state_dict']
        moved[processes] = torch.cat([(start - after[name]).flatten() for name, start in model.named_parameters()])
        if processes == '2':
            ranks = [json.loads((tmp_path / f'rank-{rank}.json').read_text()) for rank in range(2)]
            assert ranks[0] == ranks[1]
            # A thread of gloo's that is left may want Python's lock while Python ends, and abort the process.
            threads = [(tmp_path / f'threads-{rank}.txt').read_text() for rank in range(2)]
            assert all('python' in names and 'gloo' not in names for names in threads)
            assert json.loads((tmp_path / 'listening-1.json').read_text()) == ['127.0.0.1']
    assert (moved['2'] - moved['1']).norm() < 1e-5 * moved['1'].norm()


def test_measure_npu_tunes_trains_on_each_number_of_cards_and_measures(recorded, tmp_path):
    calls = [short(call) for call in recorded(
        'measure_npu.sh', '--data_path=a b', CARDS='1 2', BATCH='4', IMG_SIZE='75', OUTPUT='out', DEVICE='npu:1')]
    scripts = [call[:2] if call[0] == 'benchmark.py' else call[:1] for call in calls]
    assert scripts == [
        ['benchmark.py', 'tune'], ['train.py'], ['preflight.py'], ['torchrun.py'], ['benchmark.py', 'train'],
        ['benchmark.py', 'ops'], ['benchmark.py', 'ops'], ['benchmark.py', 'profile'], ['benchmark.py', 'table']]
    for call in calls[:-1]:
        words = dict(itertools.pairwise(call))
        assert (words['--img-size'], words['--batch-size']) == ('75', '4'), call
        assert words.get('--device') == ('npu:1' if call[0] == 'benchmark.py' else None)
    for call in calls[1], calls[3]:
        assert call[-1] == '--data_path=a b' and '--epochs' in call
    runs = [dict(itertools.pairwise(call))['--experiment'] for call in (calls[1], calls[3])]
    assert calls[-1][2:] == [f'out/{run}/report.json' for run in runs]  # the folders that train.py writes to


def test_measure_npu_exports_the_variables_that_tune_chose(tmp_path):
    """torch_npu reads them when it is loaded, so no script can apply them."""
    python, log = tmp_path / 'python', tmp_path / 'calls'
    python.write_text(f'''#!/usr/bin/env bash
case "$1 $2" in
    *"benchmark.py tune") echo '{{"environment": {{"TORCH_NPU_LAZY_FUSION": "True"}}}}' > out/tune.json ;;
    "-c import json"*) exec "{sys.executable}" "$@" ;;
    *) echo "${{TORCH_NPU_LAZY_FUSION:-}}" >> "{log}" ;;
esac
''')
    python.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name != 'TORCH_NPU_LAZY_FUSION'}
    subprocess.run(['bash', SCRIPTS / 'measure_npu.sh', '--data_path=x'], check=True, cwd=tmp_path,
                   env={**clean, 'PYTHON': str(python), 'CARDS': '1', 'OUTPUT': 'out'})
    seen = log.read_text().split('\n')[:-1]
    assert seen[0] == '' and len(seen) > 6 and set(seen[1:]) == {'True'}  # check_python comes before tune
