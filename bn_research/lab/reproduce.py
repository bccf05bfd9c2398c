"""Every experiment, and one report of all claims: python -m experiments.reproduce.

Exit status:

    0  every experiment finished, whatever the verdicts
    1  an experiment failed; the others went on, and the report has its log
    2  bad flags or workdir, in one line
    3  with --strict, when a claim is not reproduced
    4  stopped by SIGTERM or Ctrl-C and saved; started again with the same command it goes on
"""

import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from tqdm import tqdm

from bn_research.claims.finding import NOT_REPRODUCED, VERDICTS
from bn_research.claims.formatting import format_duration
from bn_research.claims.html.overview import write_overview
from bn_research.claims.results import Failure, Run, read_run
from bn_research.lab.experiment import Experiment
from bn_research.lab.flags import UsageError
from bn_research.lab.rooms import PACKAGE, experiment_names, load_all
from bn_research.lab.side_by_side import Finished, Stopped, default_jobs, run_all, tail

_STOPPED = 4
TITLE = "Batch normalization: what is claimed, and what was measured"
INTRODUCTION = (
    "Each claim about batch normalization was tested by an experiment whose criterion was written "
    "down before its run. A verdict compares the criterion with a 95 % interval over seeds."
)
HELP = """\
Runs every experiment and writes one report of all claims.

python -m experiments.reproduce [--preset=quick] [--workdir=DIR] [--only=NAME,NAME] [--jobs=N]
    [--strict] [--list] [--report_only]

--preset       size of each run: smoke, quick or standard; default quick
--workdir      folder of the runs and of report.html; default runs/reproduce-PRESET. Started again
               it goes on: what is finished is not run again
--only         run these experiments alone; the report shows what else is in the workdir
--jobs         experiments at once, each with its own cores; default one for every two cores, and
               one where there is an accelerator
--strict       exit with status 3 if a claim is not reproduced
--list         show the experiments with their claims, and run nothing
--report_only  write the report of what is in the workdir, and run nothing
"""


class Options(NamedTuple):
    """What the command line says."""

    preset: str
    path: Path
    only: list[str]
    jobs: int
    strict: bool
    lists: bool
    report_only: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status, after what the command line asks for."""
    try:
        options = parse(list(sys.argv if argv is None else argv))
        if options is None:
            print(HELP)
            return 0
        if options.lists:
            print("\n\n".join(_listed(*each) for each in load_all(options.only).items()))
            return 0
        return reproduce(options)
    except UsageError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt):  # the latter between two looks at the experiments
        print("reproduce: stopped; start again with the same command to go on", file=sys.stderr)
        return _STOPPED


def parse(argv: list[str]) -> Options | None:
    """What the command line says; None after --help.

    Raises:
      UsageError: it asks for what there is not.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("preset", "quick", "size of each run", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the runs", flag_values=values)
    flags.DEFINE_list("only", None, "these experiments alone", flag_values=values)
    flags.DEFINE_integer("jobs", None, "at once", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("strict", False, "3 if a claim fails", flag_values=values)
    flags.DEFINE_bool("list", False, "show the experiments", flag_values=values)
    flags.DEFINE_bool("report_only", False, "run nothing", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UsageError(f"{error} (see --help for what is allowed)") from error
    if len(rest) > 1:
        raise UsageError(f"unexpected argument {rest[1]!r}: flags start with -- (see --help)")
    if values.help:
        return None
    names = experiment_names()
    only = names if values.only is None else values.only
    unknown = [name for name in only if name not in names]
    if unknown or not only:
        raise UsageError(
            f"--only={','.join(only)}: no experiment {', '.join(map(repr, unknown)) or 'named'}; "
            f"there are {', '.join(names)}"
        )
    path = Path(values.workdir or f"runs/reproduce-{values.preset}")
    return Options(
        values.preset,
        path,
        [name for name in names if name in only],
        values.jobs or default_jobs(),
        values.strict,
        values.list,
        values.report_only,
    )


def _listed(name: str, experiment: Experiment | Exception) -> str:
    if isinstance(experiment, Exception):
        return f"{name}  cannot be loaded: {' '.join(str(experiment).split())}"
    claims = (
        textwrap.indent(
            textwrap.fill(f"{claim.id}: {claim.statement} ({claim.source})", 96), "    "
        ).replace("    ", "  - ", 1)
        for claim in experiment.claims
    )
    presets = ", ".join(experiment.presets)
    return "\n".join([f"{experiment.name}  {experiment.title}  ({presets})", *claims])


def reproduce(options: Options) -> int:
    """Exit status, after the experiments have run: a line for each, and the report of all."""
    if options.report_only:
        return write_report(options, [])
    names = _with_preset(options.only, options.preset)
    _prepare_workdir(options)
    done = [name for name in names if _is_finished(options.path / name)]
    for name in done:
        print(f"{name}: {_counts(options.path / name)}, finished before")
    failures = []
    waiting = [name for name in names if name not in done]
    for ended in run_all(
        waiting, options.path, package=PACKAGE, preset=options.preset, jobs=options.jobs
    ):
        if ended.status:
            failures.append(_failure(ended, options))
            tqdm.write(f"{ended.name}: failed, {failures[-1].reason} (see {ended.log})")
        else:
            took = format_duration(ended.seconds)
            tqdm.write(f"{ended.name}: {_counts(options.path / ended.name)}, {took}")
    return write_report(options, failures)


def _with_preset(names: Sequence[str], preset: str) -> list[str]:
    """Experiments that have the preset. One that cannot be loaded stays, and fails when it runs."""
    loaded = load_all(names)
    presets = {n: tuple(getattr(each, "presets", (preset,))) for n, each in loaded.items()}
    found = [name for name in names if preset in presets[name]]
    if not found:
        known = dict.fromkeys(preset for each in presets.values() for preset in each)
        raise UsageError(f"no experiment has a preset {preset!r}; there are {', '.join(known)}")
    for name in names:
        if name not in found:
            print(f"{name}: left out, it has no preset {preset} ({', '.join(presets[name])})")
    return found


def _prepare_workdir(options: Options) -> None:
    """Makes the folder, unless it holds runs of another preset: that is said once, here."""
    try:
        options.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"workdir {options.path} cannot be made: {error}") from error
    for name in experiment_names():
        config = options.path / name / "config.json"
        try:
            preset = json.loads(config.read_text())["preset"] if config.exists() else None
        except (ValueError, KeyError) as error:
            raise UsageError(f"{config} cannot be read: give another --workdir") from error
        if preset not in (None, options.preset):
            raise UsageError(
                f"workdir {options.path} holds runs of --preset={preset}: give that preset to "
                "continue them, or another --workdir"
            )


def _is_finished(path: Path) -> bool:
    """Whether the run can be read; one that is damaged runs again."""
    try:
        read_run(path)
    except ValueError:
        return False
    return True


def _counts(path: Path) -> str:
    """``3 reproduced, 1 inconclusive``."""
    found = [claim["verdict"] for claim in read_run(path).results["claims"]]
    return ", ".join(f"{found.count(v)} {v}" for v in VERDICTS if v in found) or "no claim"


def _failure(ended: Finished, options: Options) -> Failure:
    log = tail(ended.log)
    last = (log.splitlines() or ["it printed nothing"])[-1]
    how = f"signal {-ended.status}" if ended.status < 0 else f"status {ended.status}"
    words = ["python", "-m", f"{PACKAGE}.{ended.name}", f"--preset={options.preset}"]
    return Failure(
        experiment=ended.name,
        command=shlex.join([*words, f"--workdir={options.path / ended.name}"]),
        status=ended.status,
        reason=f"{how}: {last}",
        log=log,
    )


def write_report(options: Options, failures: Sequence[Failure]) -> int:
    """Exit status, after `report.html` is written of all finished runs and of failures.

    Runs that `--only` does not name stay in it.
    """
    failed = [failure.experiment for failure in failures]
    folders = [options.path / name for name in experiment_names() if name not in failed]
    runs = [read_run(folder) for folder in folders if _is_finished(folder)]
    if not runs and not failures:
        raise UsageError(f"no finished run in {options.path}: give the --workdir of one")
    path = options.path / "report.html"
    preset = options.preset if failures else _preset(runs)
    write_overview(
        path,
        title=TITLE,
        introduction=INTRODUCTION,
        command=f"python -m {PACKAGE}.reproduce --preset={preset}",
        runs=runs,
        failures=failures,
    )
    claims = [claim for run in runs for claim in run.results["claims"]]
    found = [claim["verdict"] for claim in claims]
    counts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS)
    lost = f"; {_plural(len(failures), 'experiment')} failed" if failures else ""
    print(f"{_plural(len(found), 'claim')}: {counts}{lost}")
    print(f"report: {path}")
    if failures:
        return 1
    asked = [run for run in runs if run.results["experiment"] in options.only]
    missed = any(c["verdict"] == NOT_REPRODUCED for run in asked for c in run.results["claims"])
    return 3 if options.strict and missed else 0


def _preset(runs: Sequence[Run]) -> str:
    """The preset of most runs."""
    presets = [run.results["preset"] for run in runs]
    return max(presets, key=presets.count)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
