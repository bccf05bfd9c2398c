"""A run of an experiment: its job, workdir, records, verdicts and report."""

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bn_research.claims.figures import Figure
from bn_research.claims.finding import NOT_REPRODUCED, Finding
from bn_research.claims.html.page import write_report
from bn_research.claims.results import read_run, results_document, write_json, write_run
from bn_research.claims.tables import verdict_table
from bn_research.data import DataError
from bn_research.lab.experiment import Experiment
from bn_research.lab.flags import Options, UsageError, default_path
from bn_research.lab.interruption import interruptible
from bn_research.lab.tensorboard import event_files
from bn_research.lab.workdir import Workdir, WorkdirError
from bn_research.training.checkpoint import CheckpointError
from bn_research.training.compilation_cache import use_compilation_cache
from bn_research.training.cpu_process import use_eigen_convolutions
from bn_research.training.preemption import Stopped
from bn_research.training.processes import Job, ProcessError, join

_STOPPED = 4
_AGAIN = "start again with the same command to go on"


def run(experiment: Experiment, options: Options) -> int:
    """Exit status of a run with these options, see `bn_research.lab.launch`."""
    job = None
    try:
        use_eigen_convolutions()
        use_compilation_cache()
        if options.job is not None:
            job = join(**options.job, name=experiment.name)
        try:
            with interruptible() if job is None else contextlib.nullcontext():
                status = _run(experiment, options, job)
        except Stopped as stop:
            status = _STOPPED
            if _writes(job):
                print(f"{experiment.name}: {stop}; {_AGAIN}", file=sys.stderr)
        return status if job is None else job.end(status)
    except (UsageError, DataError, CheckpointError, WorkdirError, ProcessError) as error:
        if job is not None:
            job.fail(error, 2)
        print(f"{experiment.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BaseException as error:
        if job is not None:
            job.fail(error)
        if not isinstance(error, KeyboardInterrupt):
            raise
        print(
            f"{experiment.name}: interrupted, what was measured is kept; {_AGAIN}", file=sys.stderr
        )
        return _STOPPED


def _writes(job: Job | None) -> bool:
    return job is None or job.index == 0


def _run(experiment: Experiment, options: Options, job: Job | None) -> int:
    config, path = options.config, options.path
    document = {"experiment": experiment.name, "preset": options.preset}
    workdir = Workdir(path, {**document, **dataclasses.asdict(config)})
    barrier = (lambda name: None) if job is None else job.barrier
    if _writes(job):
        workdir.check()
    else:
        barrier("prepared")  # what process 0 has downloaded and built is there
    _ = experiment.claims  # each once, or it is said now
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
            records = experiment.measure(config, data, path, **parallel)
            findings: Sequence[Finding] = []
            if _writes(job):
                findings = experiment.judge(config, records)
                figures = experiment.draw(config, records, path / "figures")
        if _writes(job):
            _report(experiment, options, findings, figures, time.monotonic() - start)
    failed = any(finding.verdict == NOT_REPRODUCED for finding in findings)
    return 3 if options.strict and failed and _writes(job) else 0


def _report(
    experiment: Experiment,
    options: Options,
    findings: Sequence[Finding],
    figures: Sequence[Figure],
    seconds: float,
) -> None:
    """Writes the results and the report, and prints the table."""
    preset, config, path = options.preset, options.config, options.path
    _check_claims(experiment, findings, figures)
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


def _check_claims(
    experiment: Experiment, findings: Sequence[Finding], figures: Sequence[Figure]
) -> None:
    """ValueError unless each claim has one finding, and figures name these claims alone."""
    claims = sorted(claim.id for claim in experiment.claims)
    found = sorted(finding.claim.id for finding in findings)
    if found != claims:
        raise ValueError(f"run must give a finding for each of {claims}, got those of {found}")
    for figure in figures:
        if not set(figure.claims) <= set(claims):
            raise ValueError(f"{figure.path.name} shows {list(figure.claims)}, claims are {claims}")


def _first_prose(text: str) -> str:
    """First paragraph of prose below the title; the title where there is none."""
    paragraphs = [part for part in text.strip().split("\n\n") if not part.startswith(" ")]
    return paragraphs[min(1, len(paragraphs) - 1)]


def _command(experiment: Experiment, preset: str, config: Any, path: Path) -> str:
    """The command that gives this run: its preset, workdir, and fields unlike the preset's."""
    base = dataclasses.asdict(experiment.presets[preset])
    changed = [
        f"--config.{field}={value}"
        for field, value in dataclasses.asdict(config).items()
        if value != base[field]
    ]
    moved = [] if path == default_path(experiment, preset) else [f"--workdir={path}"]
    words = [f"--preset={preset}", *moved, *changed]
    return shlex.join([*experiment.command.split(), *words])
