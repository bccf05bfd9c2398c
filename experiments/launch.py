"""What every experiment shares: flags, presets, the workdir, results and exit status.

    python -m experiments.NAME --preset=quick --workdir=DIR --config.FIELD=VALUE

Exit status: 0 finished, whatever the verdicts; 2 bad flags, config, data or workdir, with one line
on stderr; 3 with --strict, when a claim is not reproduced.
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bn_research.claims.figures import Figure
from bn_research.claims.registry import Claim
from bn_research.claims.report import results_document, verdict_table, write_json, write_report
from bn_research.claims.verdict import NOT_REPRODUCED, Finding
from bn_research.data import DataError
from bn_research.training.checkpoint import CheckpointError
from experiments.workdir import Workdir, WorkdirError


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
        the workdir. ValueErrors it raises are shown to the user.
      run: (config, data, path of the workdir) -> findings and figures. Resumable.
    """

    name: str
    title: str
    question: str
    presets: Mapping[str, Any]
    claims: Sequence[Claim]
    prepare: Callable[[Any], Any]
    run: Callable[[Any, Any, Path], tuple[Sequence[Finding], Sequence[Figure]]]


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Runs an experiment from the command line; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    try:
        options = _parse(experiment, argv)
        if options is None:
            return 0
        return _run(experiment, *options)
    except (UsageError, DataError, CheckpointError, WorkdirError) as error:
        print(f"{experiment.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(experiment: Experiment, preset: str, config: Any, path: Path, strict: bool) -> int:
    document = {"experiment": experiment.name, "preset": preset, **dataclasses.asdict(config)}
    workdir = Workdir(path, document)
    workdir.check()
    try:
        data = experiment.prepare(config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    workdir.create()

    start = time.monotonic()
    findings, figures = experiment.run(config, data, path)
    seconds = time.monotonic() - start
    results_path, report_path = path / "results.json", path / "report.html"
    if results_path.exists():  # the run had finished before: its time is the one that counts
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
    write_report(
        report_path,
        title=experiment.title,
        question=_first_prose(experiment.question),
        results=results,
        figures=figures,
        config=workdir.config,
        environment=workdir.environment,
        command=_command(experiment, preset, config, path),
    )
    print(verdict_table(findings))
    print(f"report: {report_path}")
    failed = any(finding.verdict == NOT_REPRODUCED for finding in findings)
    return 3 if strict and failed else 0


def _first_prose(text: str) -> str:
    """The first paragraph below the title that is not a listing; the title when it is alone."""
    paragraphs = [part for part in text.strip().split("\n\n") if not part.startswith(" ")]
    return paragraphs[min(1, len(paragraphs) - 1)]


def _command(experiment: Experiment, preset: str, config: Any, path: Path) -> str:
    """The command that gives this run: the preset, and the fields that differ from it."""
    base = dataclasses.asdict(experiment.presets[preset])
    changed = [
        f"--config.{field}={value}"
        for field, value in dataclasses.asdict(config).items()
        if value != base[field]
    ]
    words = [f"--preset={preset}", f"--workdir={path}", *changed]
    return shlex.join(["python", "-m", f"experiments.{experiment.name}", *words])


def _parse(experiment: Experiment, argv: list[str]) -> tuple[str, Any, Path, bool] | None:
    """Preset, config, workdir and strictness from the command line; None after --help."""
    names = tuple(experiment.presets)
    basic = flags.FlagValues()
    flags.DEFINE_enum("preset", "quick", names, "size of the run", flag_values=basic)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=basic)
    flags.DEFINE_bool("strict", False, "exit with 3 if a claim fails", flag_values=basic)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=basic)
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
    path = Path(basic.workdir or f"runs/{experiment.name}-{basic.preset}")
    return basic.preset, resolved, path, basic.strict


def _help(experiment: Experiment, config: ConfigDict) -> str:
    lines = [
        experiment.question.strip(),
        "",
        f"python -m experiments.{experiment.name} [--preset={'|'.join(experiment.presets)}] "
        "[--workdir=DIR] [--strict] [--config.FIELD=VALUE ...]",
        "",
        "--preset   size of the run; default quick",
        f"--workdir  folder of the run; default runs/{experiment.name}-PRESET. Started again with",
        "           the same config, a run goes on where it stopped",
        "--strict   exit with status 3 if a claim is not reproduced",
        "",
        "--config.FIELD, with this preset's values:",
        *(f"  {field} = {value!r}" for field, value in config.items()),
    ]
    return "\n".join(lines)
