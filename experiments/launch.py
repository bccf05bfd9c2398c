"""What every experiment shares: flags, presets, the workdir, results and exit status.

    python -m experiments.NAME --preset=quick --workdir=DIR --config.FIELD=VALUE

Exit status, each but 0 and 3 with one line on stderr:

    0  finished, whatever the verdicts
    2  bad flags, config, data, workdir, checkpoint or coordinator
    3  with --strict, when a claim is not reproduced
    4  stopped by SIGTERM and saved; started again with the same command it goes on
    5  another process of the job was lost, or a collective failed; start the job again to go on

With --tensorboard the curves of `metrics.jsonl` are also written as event files, for TensorBoard,
into DIR/tensorboard, while the run goes on.

The processes of a job end with one status. Process 0 alone writes and prints; the others report
only what ends them.
"""

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from bn_research.claims.figures import Figure
from bn_research.claims.page import write_report
from bn_research.claims.registry import Claim
from bn_research.claims.report import results_document, verdict_table, write_json
from bn_research.claims.run import read_run, write_run
from bn_research.claims.verdict import NOT_REPRODUCED, Finding
from bn_research.data import DataError
from bn_research.training.checkpoint import CheckpointError
from bn_research.training.compilation_cache import use_compilation_cache
from bn_research.training.cpu_process import use_eigen_convolutions
from bn_research.training.preemption import Stopped
from bn_research.training.processes import Job, ProcessError, join
from experiments.launch_tensorboard import event_files, obstacle
from experiments.workdir import Workdir, WorkdirError

_STOPPED = 4
_PARALLEL = ("auto", "jit", "pmap", "shard_map")


class UsageError(ValueError):
    """What a user asked for cannot be done; the message is one line and says what can."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment as its module describes it.

    Attributes:
      name: of the module.
      title: of the report.
      question: what it asks, in a few sentences.
      presets: name -> Config, a frozen dataclass with at least `dataset` and `seeds`.
      claims: with their criteria, as they stand before the run.
      prepare: config -> data; checks the config and fetches what it needs, writing nothing into
        the workdir. ValueErrors it raises are shown to the user. In a job of several processes
        process 0 calls it first.
      run: (config, data, path of the workdir) -> findings and figures. Resumable.
      distributed: whether its run can span devices and processes. It then takes the flags for
        that, and run the keyword `parallel`: auto, jit, pmap or shard_map. Those of process 0 are
        the findings and figures that count.
    """

    name: str
    title: str
    question: str
    presets: Mapping[str, Any]
    claims: Sequence[Claim]
    prepare: Callable[[Any], Any]
    run: Callable[..., tuple[Sequence[Finding], Sequence[Figure]]]
    distributed: bool = False


class _Options(NamedTuple):
    """What the command line says."""

    preset: str
    config: Any
    path: Path
    strict: bool
    tensorboard: bool
    parallel: str | None  # None for an experiment that is not distributed
    job: Mapping[str, Any] | None  # arguments of join; None for a process alone


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Runs an experiment from the command line; returns the exit status.

    In a job of several processes whatever keeps one of them from its end ends them all at once,
    without returning.
    """
    argv = list(sys.argv if argv is None else argv)
    job = None
    try:
        options = _parse(experiment, argv)
        if options is None:
            return 0
        use_eigen_convolutions()
        use_compilation_cache()
        if options.job is not None:
            job = join(**options.job, name=experiment.name)
        try:
            status = _run(experiment, options, job)
        except Stopped as stop:
            status = _STOPPED
            if _writes(job):
                again = "start again with the same command to go on"
                print(f"{experiment.name}: {stop}; {again}", file=sys.stderr)
        return status if job is None else job.end(status)
    except (UsageError, DataError, CheckpointError, WorkdirError, ProcessError) as error:
        if job is not None:
            job.fail(error, 2)
        print(f"{experiment.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BaseException as error:
        if job is not None:
            job.fail(error)
        raise


def _writes(job: Job | None) -> bool:
    return job is None or job.index == 0


def _run(experiment: Experiment, options: _Options, job: Job | None) -> int:
    config, path = options.config, options.path
    document = {"experiment": experiment.name, "preset": options.preset}
    workdir = Workdir(path, {**document, **dataclasses.asdict(config)})
    barrier = (lambda name: None) if job is None else job.barrier
    if _writes(job):
        workdir.check()
    else:
        barrier("prepared")  # what process 0 has downloaded and built is there
    try:
        data = experiment.prepare(config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if _writes(job):
        barrier("prepared")
    with workdir.opened() if _writes(job) else contextlib.nullcontext():
        barrier("workdir")
        if not _writes(job):
            workdir.check_shared()
        parallel = {} if options.parallel is None else {"parallel": options.parallel}
        start = time.monotonic()
        with (
            event_files(path / "metrics.jsonl")
            if options.tensorboard and _writes(job)
            else contextlib.nullcontext()
        ):
            findings, figures = experiment.run(config, data, path, **parallel)
        seconds = time.monotonic() - start
        if _writes(job):
            _report(experiment, options, findings, figures, seconds)
    failed = any(finding.verdict == NOT_REPRODUCED for finding in findings)
    return 3 if options.strict and failed and _writes(job) else 0


def _report(
    experiment: Experiment,
    options: _Options,
    findings: Sequence[Finding],
    figures: Sequence[Figure],
    seconds: float,
) -> None:
    """Writes the results and the report, and prints the table."""
    preset, config, path = options.preset, options.config, options.path
    results_path, report_path = path / "results.json", path / "report.html"
    if results_path.exists():  # the run had finished before: its time is the one that counts
        with contextlib.suppress(ValueError, KeyError):  # damaged: it is written anew
            seconds = json.loads(results_path.read_text())["wall_seconds"]
    results = results_document(
        experiment=experiment.name,
        preset=preset,
        dataset=config.dataset,
        seeds=range(config.seeds),
        wall_seconds=seconds,
        findings=findings,
    )
    write_json(results_path, results)
    write_run(
        path,
        title=experiment.title,
        question=_first_prose(experiment.question),
        command=_command(experiment, preset, config, path),
        figures=figures,
    )
    write_report(report_path, read_run(path))
    print(verdict_table(findings))
    print(f"report: {report_path}")


def _first_prose(text: str) -> str:
    """The first paragraph below the title that is not a listing; the title when it is alone."""
    paragraphs = [part for part in text.strip().split("\n\n") if not part.startswith(" ")]
    return paragraphs[min(1, len(paragraphs) - 1)]


def _command(experiment: Experiment, preset: str, config: Any, path: Path) -> str:
    """The command that gives this run: the preset, and what differs from it and the defaults."""
    base = dataclasses.asdict(experiment.presets[preset])
    changed = [
        f"--config.{field}={value}"
        for field, value in dataclasses.asdict(config).items()
        if value != base[field]
    ]
    moved = [] if path == _default_path(experiment, preset) else [f"--workdir={path}"]
    words = [f"--preset={preset}", *moved, *changed]
    return shlex.join(["python", "-m", f"experiments.{experiment.name}", *words])


def _default_path(experiment: Experiment, preset: str) -> Path:
    return Path(f"runs/{experiment.name}-{preset}")


def _parse(experiment: Experiment, argv: list[str]) -> _Options | None:
    """What the command line says; None after --help."""
    names = tuple(experiment.presets)
    basic = flags.FlagValues()
    flags.DEFINE_enum("preset", "quick", names, "size of the run", flag_values=basic)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=basic)
    flags.DEFINE_bool("strict", False, "exit with 3 if a claim fails", flag_values=basic)
    flags.DEFINE_bool("tensorboard", False, "write event files too", flag_values=basic)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=basic)
    if experiment.distributed:
        _define_processes(basic)
    try:
        basic(argv, known_only=True)
        # The preset's values are the defaults of the config flags, so it is read first.
        config = ConfigDict(dataclasses.asdict(experiment.presets[basic.preset]))
        config_flags.DEFINE_config_dict("config", config, flag_values=basic, sys_argv=argv)
        if basic.help:
            print(_help(experiment, config))
            return None
        basic.unparse_flags()
        rest = basic(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise UsageError(f"{text} (see --help for what is allowed)") from error
    if len(rest) > 1:
        raise UsageError(f"unexpected argument {rest[1]!r}: flags start with -- (see --help)")
    resolved = dataclasses.replace(experiment.presets[basic.preset], **config.to_dict())
    path = Path(basic.workdir or _default_path(experiment, basic.preset))
    if basic.tensorboard and (missing := obstacle()):
        raise UsageError(missing)
    parallel = basic.parallel if experiment.distributed else None
    job = _job(basic) if experiment.distributed else None
    return _Options(basic.preset, resolved, path, basic.strict, basic.tensorboard, parallel, job)


_JOB = ("coordinator_address", "num_processes", "process_id")


def _define_processes(values: flags.FlagValues) -> None:
    """Flags, not config: a run may go on with other devices and processes."""
    flags.DEFINE_enum("parallel", "auto", _PARALLEL, "how devices are used", flag_values=values)
    flags.DEFINE_string(_JOB[0], None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer(_JOB[1], None, "of the job", flag_values=values)
    flags.DEFINE_integer(_JOB[2], None, "of this process", flag_values=values)
    flags.DEFINE_bool("multiprocess", False, "let JAX detect the job", flag_values=values)


def _job(values: flags.FlagValues) -> dict[str, Any] | None:
    """Arguments of join; None without the flags that ask for a job."""
    given = {name: values[name].value for name in _JOB}
    explicit = any(value is not None for value in given.values())
    if values.multiprocess and explicit:
        raise UsageError(f"--multiprocess detects what {', '.join(_JOB)} say: give it alone")
    return given if explicit or values.multiprocess else None


_HELP_JOB_USAGE = (
    "    [--parallel=" + "|".join(_PARALLEL) + "]",
    "    [--multiprocess | --coordinator_address=HOST:PORT --num_processes=N --process_id=I]",
)
_HELP_JOB = (
    "--parallel how the devices are used: auto is jit on one and pmap on several",
    "--multiprocess         one of several processes, started by SLURM, Open MPI, Kubernetes or on",
    "                       Cloud TPU, whose number and place JAX detects",
    "--coordinator_address  one of several processes, all started by this command but for its",
    "                       --process_id: where process 0 listens, HOST:PORT",
    "--num_processes        how many they are",
    "--process_id           which of them this is, from 0",
    "                       All must see the workdir. They are flags, not config: a run may go on",
    "                       with other devices and processes",
)
_HELP_STATUS = (
    "Exit status:",
    "  0  finished, whatever the verdicts",
    "  2  bad flags, config, data, workdir, checkpoint or coordinator",
    "  3  with --strict, when a claim is not reproduced",
    "  4  stopped by SIGTERM and saved: start again with the same command to go on",
    "  5  another process was lost, or a collective failed: start the job again to go on",
)


def _help(experiment: Experiment, config: ConfigDict) -> str:
    lines = [
        experiment.question.strip(),
        "",
        f"python -m experiments.{experiment.name} [--preset={'|'.join(experiment.presets)}] "
        "[--workdir=DIR] [--strict] [--tensorboard] [--config.FIELD=VALUE ...]",
        *(_HELP_JOB_USAGE if experiment.distributed else ()),
        "",
        "--preset   size of the run; default quick",
        f"--workdir  folder of the run; default runs/{experiment.name}-PRESET. Started again with",
        "           the same config, a run goes on where it stopped",
        "--strict   exit with status 3 if a claim is not reproduced",
        "--tensorboard  write the curves of metrics.jsonl as event files too, into DIR/tensorboard",
        "           while the run goes on; needs pip install 'bn_research[tensorboard]'",
        *(_HELP_JOB if experiment.distributed else ()),
        "",
        *_HELP_STATUS,
        "",
        "--config.FIELD, with this preset's values:",
        *(f"  {field} = {value!r}" for field, value in config.items()),
    ]
    return "\n".join(lines)
