"""``benchmark.py tune``: the fastest settings on this device, measured, for train.py, validate.py and inference.py.

Greedy over groups of settings: an alternative is measured in turn with the fastest settings so far, after its outputs
(and in training its update of the weights) are compared with those of timm's network in float32. At the end the
choice is measured in turn with the default once more. Each choice runs in a process of its own (``tune_worker.py``).
"""

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import device as devices
from ..cli.checks import check_output_file
from ..deploy.engines import record_engine
from ..errors import CannotWrite, UserError
from ..tuning import Workload, describe_missing, environment_of, is_complete, save_tuned
from . import report
from .timing import Ratio, ratio
from .tune_plan import Alternative, plan
from .tune_process import Worker, WorkerFailed
from .tune_worker import Job

__all__ = ['COLUMNS', 'run']

COLUMNS = ('images/s', 'of the time before', 'least', 'greatest', 'error', 'result')
MARGIN = 0.98  # an alternative must take less of the time than this, in the median
TURN = 1.0  # seconds of a turn, at least
GRACE = 60.0  # seconds after the budget in which the fastest settings so far must end their turn
SHARE = 0.5  # part of the time left that an alternative may take: one that hangs leaves some for the others
Row = dict[str, Any]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the result, print and return all figures.

    Raises:
        UserError: An option does not fit, or the default settings do not run.
        CannotWrite: After what was measured has been printed.
        KeyboardInterrupt: After what was measured has been written; its argument is the number of the signal.
    """
    device = devices.resolve_device(args.device)
    half = (args.amp_dtype or str(devices.half_dtype(device)).removeprefix('torch.')) if _is_half(args) else ''
    level = (args.opt_level or 'O1') if half and args.task == 'train' else ''
    workload = Workload.on(device, task=args.task, batch_size=args.batch_size, img_size=args.img_size,
                           precision=f'{level} {half}'.strip() or 'float32')
    check_output_file('--output', args.output or str(workload.path), make_folder=True)
    alternatives = _select(plan(args.task, device, workload.precision), args.only)
    with tempfile.TemporaryDirectory(prefix='timm_npu_irv2-') as folder:
        job = Job(str(device), args.task, args.batch_size, args.img_size, half, level, {}, f'{folder}/reference.pt')
        tuner = Tuner(job, alternatives, rounds=args.rounds, budget=args.budget)
        stopped_by = tuner.run()
    interrupted, path, failure = stopped_by != 0, None, None
    try:
        # An interrupted search replaces no complete one, and none of which nothing was chosen yet replaces any.
        if args.output or not interrupted or (tuner.chosen and not is_complete(workload.path)):
            path = save_tuned(workload, tuner.report(interrupted), Path(args.output) if args.output else None)
        if not interrupted and not args.output and device.type == 'cpu' and any(
                row['name'].startswith('engine=') for row in tuner.rows):
            record_engine(workload.precision, tuner.chosen.get('engine', 'torch'), {'measured': tuner.rows})
    except CannotWrite as error:
        failure = error
    result = _conclude(workload, tuner, path, stopped_by)  # what took minutes is shown, whatever the disk says
    if failure is not None:
        raise failure
    return result


def _is_half(args: argparse.Namespace) -> bool:
    return bool(args.amp or args.opt_level or args.amp_dtype)


def _select(alternatives: Sequence[Alternative], groups: Sequence[str] | None) -> list[Alternative]:
    known = list(dict.fromkeys(each.group for each in alternatives))
    if unknown := set(groups or ()) - set(known):
        raise UserError(f'--only {min(unknown)}: no such group here; there are {", ".join(known)}.')
    return [each for each in alternatives if groups is None or each.group in groups]


def _conclude(workload: Workload, tuner: 'Tuner', path: Path | None, stopped_by: int) -> dict[str, Any]:
    title = (f'{workload.task}, {workload.precision}, batch {workload.batch_size}, {workload.img_size} px, '
             f'{workload.device} ({workload.name})')
    rows = {row['name']: [row.get('images_per_second'), *(row.get('ratio') or (None,) * 3),
                          _scientific(row.get('error')), row['result']] for row in tuner.rows}
    if rows:
        report.print_table(title, COLUMNS, rows)
    chosen = ', '.join(Alternative('', {name: value}).name for name, value in tuner.chosen.items())
    print(f'  chosen: {chosen or "the default settings"}; {f"written to {path}" if path else "nothing was written"}')
    if missing := describe_missing(tuner.chosen):
        print(f' {missing}')
    if stopped_by:
        raise KeyboardInterrupt(stopped_by)
    return {'title': title, 'columns': COLUMNS, 'rows': rows, 'chosen': tuner.chosen, 'file': str(path),
            'environment': environment_of(tuner.chosen)}


def _scientific(value: float | None) -> str | None:
    return None if value is None else f'{value:.1e}'


class Tuner:
    """A search for the fastest settings.

    Args:
        job: Job of the default settings.
        alternatives: Alternatives in the order in which they are tried.
        rounds: Turns of an alternative and of the fastest settings so far.
        budget: Seconds for everything.
    """

    def __init__(self, job: Job, alternatives: Sequence[Alternative], rounds: int, budget: float) -> None:
        self.chosen: dict[str, Any] = {}
        self.rows: list[Row] = []
        self._job, self._alternatives, self._rounds = job, alternatives, rounds
        self._started = time.monotonic()
        self._deadline = self._started + budget
        self._longest = 0.0  # seconds that an alternative took
        self._verified: Ratio | None = None

    def run(self) -> int:
        """Measure everything; return the number of the signal that stopped it, 0 for none."""
        bar = tqdm(total=len(self._alternatives) + 2, unit='choice', file=sys.stderr, disable=None)
        with contextlib.closing(bar):
            try:
                with _interrupted_by(signal.SIGTERM):  # a scheduler sends it before it ends a job
                    self._measure(bar)
            except KeyboardInterrupt as stop:
                for row in self.rows[-1:]:
                    row.setdefault('result', 'interrupted')
                return next(iter(stop.args), signal.SIGINT)
        return 0

    def report(self, interrupted: bool) -> dict[str, Any]:
        """Return the entries of the result's file."""
        verified = self._verified._asdict() if self._verified else None
        return {'chosen': self.chosen, 'of_default_time': verified, 'interrupted': interrupted,
                'seconds': time.monotonic() - self._started, 'measured': self.rows}

    def _measure(self, bar: Any) -> None:
        best = self._start({})
        try:
            bar.update()
            for alternative in self._alternatives:
                bar.set_postfix_str(alternative.name)
                best = self._try(alternative, best)
                bar.update()
            self._verify(best)
            bar.update()
        finally:
            best.close()

    def _start(self, settings: Mapping[str, Any]) -> Worker:
        """Return the worker of the default settings, whose errors are the measure for all others."""
        worker = Worker(replace(self._job, settings=settings, writes_reference=True))
        try:
            error, _ = worker.start(self._deadline)
            step = worker.time(1, self._deadline)
        except WorkerFailed as failure:
            worker.close()
            raise UserError(f'the default settings do not run here: {failure}') from failure
        except BaseException:
            worker.close()
            raise
        self._steps = max(1, min(50, round(TURN / step)))
        self.rows.append({'name': 'default', 'images_per_second': self._job.batch_size / step, 'error': error,
                          'result': 'the default settings'})
        return worker

    def _try(self, alternative: Alternative, best: Worker) -> Worker:
        """Measure an alternative, and return the worker of the fastest settings."""
        row: Row = {'name': alternative.name}
        self.rows.append(row)
        started = time.monotonic()
        if started + 2.2 * self._longest > self._deadline:  # it, and the verification at the end
            row['result'] = 'not measured: the budget is spent'
            return best
        share = 1.0 if 'torchcompile' in alternative.settings else SHARE  # compiling takes minutes
        deadline = started + min(self._deadline - self._longest - started, share * (self._deadline - started))
        worker = Worker(replace(self._job, settings={**self.chosen, **alternative.settings}))
        faster = False
        try:
            faster = self._compare(worker, best, deadline, row)
            self._longest = max(self._longest, time.monotonic() - started)
        except WorkerFailed as failure:
            if failure.worker is best:
                raise UserError(f'the fastest settings so far stopped beside {alternative.name}: {failure}. Run tune '
                                'again, with a smaller --batch-size if memory was short.') from failure
            row['result'] = f'failed: {failure}{_advice(failure)}'
        finally:
            (best if faster else worker).close()
        if not faster:
            return best
        self.chosen = {**self.chosen, **alternative.settings}
        return worker

    def _compare(self, worker: Worker, best: Worker, deadline: float, row: Row) -> bool:
        """Fill in the row of an alternative's worker, and return True if it is right and faster."""
        row['error'], wrong = worker.start(deadline)
        if wrong:
            row['result'] = f'wrong: {wrong}'
            return False
        found = self._in_turn(worker, best, deadline, row)
        faster = found.median < MARGIN
        row['result'] = 'taken' if faster else 'not faster'
        return faster

    def _in_turn(self, worker: Worker, other: Worker, deadline: float, row: Row) -> Ratio:
        times: dict[Worker, list[float]] = {worker: [], other: []}
        # The other one has run before. An answer of it that nobody waited for would be taken for the next one.
        deadlines = {worker: deadline, other: self._deadline + self._longest + GRACE}
        for index in range(self._rounds):
            for each in (worker, other)[::-1 if index % 2 else 1]:
                times[each].append(each.time(self._steps, deadlines[each]))
        found = ratio(times[worker], times[other])
        row['ratio'] = found
        row['images_per_second'] = self._steps * self._job.batch_size / statistics.median(times[worker])
        return found

    def _verify(self, best: Worker) -> None:
        """Measure the choice in turn with the default, and return to the default unless the choice is faster."""
        if not self.chosen:
            return
        row: Row = {'name': 'choice, of the default'}
        self.rows.append(row)
        with _closing(Worker(replace(self._job, settings={}))) as default:
            try:
                default.start(self._deadline + self._longest)
                self._verified = self._in_turn(best, default, self._deadline + 2 * self._longest, row)
            except WorkerFailed as failure:
                self.chosen = {}
                row['result'] = f'failed: {failure}: the default settings remain'
                return
        if self._verified.median >= 1:
            self.chosen = {}
        row['result'] = 'verified' if self.chosen else 'not faster after all: the default settings remain'


def _advice(failure: WorkerFailed) -> str:
    if 'out of memory' not in str(failure).lower() and 'SIGKILL' not in str(failure):
        return ''
    return ' (two choices are in memory while they take turns: use a smaller --batch-size)'


@contextlib.contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on another signal, too, with its number."""
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def _closing(worker: Worker) -> Iterator[Worker]:
    try:
        yield worker
    finally:
        worker.close()
