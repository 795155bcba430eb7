"""How a program starts and ends where its surroundings are not as usual: closed streams, full disks, signals."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
START = '''
import contextlib, os, resource, signal, subprocess, sys, tempfile, time
from timm_npu_irv2.program import run_script
def main(argv):
{}
sys.exit(run_script('x.py', main, sys.argv[1:]))
'''
LIMIT = 300  # seconds, for a machine that is busy


def command(body: str) -> list[str]:
    """Return the command of a program whose ``main`` has this body."""
    return [sys.executable, '-c', START.format('\n'.join(f'    {line}' for line in body.strip().splitlines()))]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    usual = {name: value for name, value in os.environ.items() if name != 'LOCAL_RANK'}
    return {**usual, 'PYTHONPATH': path, **variables}


def run(body: str, *prefix: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([*prefix, *command(body)], capture_output=True, text=True, check=False, timeout=LIMIT,
                          env=environment(**variables))


NOISY = '''
with open(os.environ['FILE'], 'w') as file:
    os.write(1, b'noise')
    os.write(2, b'noise')
    subprocess.run(['sh', '-c', 'echo noise; echo noise >&2; cat'], check=True)
    print('noise', flush=True)
    print('noise', file=sys.stderr, flush=True)
    file.write('safe')
return 0
'''


@pytest.mark.parametrize('closed', ['<&-', '>&-', '2>&-', '<&- >&-', '<&- >&- 2>&-'])
def test_what_is_printed_goes_into_no_file_where_a_stream_is_closed(tmp_path, closed):
    """The next file to be opened would have the number of the stream."""
    done = run(NOISY, 'bash', '-c', f'exec "$@" {closed}', 'bash', FILE=str(tmp_path / 'file'))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'file').read_text() == 'safe'


def with_dead_reader(body: str, stream: str) -> subprocess.CompletedProcess:
    """Run a program that writes to a pipe that nobody reads, as with ``| head -1``."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        other = 'stderr' if stream == 'stdout' else 'stdout'
        return subprocess.run(command(body), **{stream: write_end, other: subprocess.PIPE}, text=True, check=False,
                              timeout=LIMIT, env=environment())
    finally:
        os.close(write_end)


@pytest.mark.parametrize('body', ["print('a', flush=True)\nreturn 0", "print('a')\nreturn 0"])
def test_output_that_nobody_reads_ends_the_program_as_sigpipe_does(body):
    done = with_dead_reader(body, 'stdout')
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, '')


@pytest.mark.parametrize(('body', 'code'), [
    ("import logging\nlogging.basicConfig()\nlogging.warning('a')\nreturn 0", 0),
    ("from timm_npu_irv2.errors import UserError\nraise UserError('a')", 2),
    ("with contextlib.suppress(OSError):\n    print('a', file=sys.stderr)\nreturn 3", 3),
])
def test_messages_that_nobody_reads_change_nothing(body, code):
    assert with_dead_reader(body, 'stderr').returncode == code


@pytest.mark.parametrize(('body', 'line'), [
    ("open('/no/such/file')", '/no/such/file: No such file or directory.'),
    ("os.rename('/no/such/file', '/no/other')", '/no/such/file and /no/other: No such file or directory.'),
    ("resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n_ = [open(os.devnull) for _ in range(99)]",
     '/dev/null: Too many open files: raise the limit of open files with `ulimit -n`, or use fewer --workers.'),
    ("open('a' * 5000)", f'{"a" * 200}…{"a" * 99}: File name too long.'),
])
def test_an_error_of_the_system_is_one_line(body, line):
    done = run(body)
    assert (done.returncode, done.stderr) == (2, f'x.py: error: {line}\n')


@pytest.mark.parametrize('body', ["print('a', flush=True)", "print('a')\nreturn 0"])
def test_so_is_output_to_a_full_disk(body):
    with Path('/dev/full').open('w') as full:
        done = subprocess.run(command(body), stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=LIMIT,
                              env=environment())
    line = ('x.py: error: No space left on device: free some space where the output goes and in the folder for '
            f'temporary files, {tempfile.gettempdir()} (TMPDIR chooses another one).\n')
    assert (done.returncode, done.stderr) == (2, line)


def test_an_error_of_a_library_keeps_its_traceback():
    done = run("raise OSError('a library is broken')")
    assert done.returncode == 1 and 'Traceback' in done.stderr


def test_a_letter_that_the_terminal_does_not_know_is_written_in_digits():
    done = run(r"print('caf\xe9 \udcff')" + '\nreturn 0', PYTHONIOENCODING='ascii:strict')
    assert (done.returncode, done.stdout) == (0, 'caf\\xe9 \\udcff\n')


WAITING = '''
with tempfile.TemporaryDirectory() as folder:
    print(folder, flush=True)
    while True:
        time.sleep(0.05)
'''
INSISTENT = '''
try:
    print('waiting', flush=True)
    while True:
        time.sleep(0.05)
except KeyboardInterrupt:
    print('removing', flush=True)
    while True:
        time.sleep(0.05)
'''
FORKED = '''
read_end, write_end = os.pipe()
child = os.fork()
if child == 0:
    os.write(write_end, b'x')
    while True:
        time.sleep(0.05)
os.read(read_end, 1)  # a signal that comes during the fork is lost
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), flush=True)
return 0
'''


@pytest.fixture
def start() -> Iterator:
    started = []

    def run_in_background(*words: str, **variables: str) -> tuple[subprocess.Popen, str]:
        """Return a program that is ready, and the line that it has printed."""
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=environment(**variables))
        started.append(process)
        return process, process.stdout.readline().strip()

    yield run_in_background
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_a_program_and_removes_what_is_temporary(start, number):
    process, folder = start(*command(WAITING))
    assert Path(folder).is_dir()
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (128 + number, '')
    assert not Path(folder).exists()


def test_a_second_signal_ends_it_at_once(start):
    process, _ = start(*command(INSISTENT))
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == 'removing\n'
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == -signal.SIGTERM


def test_nohup_keeps_its_meaning(start):
    process, _ = start('bash', '-c', 'trap "" HUP; exec "$@"', 'bash', *command(WAITING))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_process_of_a_launcher_ends_at_once(start):
    """It may wait for another one in a library, where no exception can be raised."""
    process, _ = start(*command(WAITING), LOCAL_RANK='0')
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGTERM


def test_a_child_of_a_fork_ends_by_the_signal_alone(start):
    process, line = start(*command(FORKED))
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, line, errors) == (0, str(-signal.SIGTERM), '')
