"""The command line of an experiment: flags, presets, a field of the config each, and its help."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from absl import flags
from ml_collections import ConfigDict, config_flags

from bn_research.lab.experiment import Experiment
from bn_research.lab.fields import in_words

_PARALLEL = ("auto", "jit", "pmap", "shard_map")


class UsageError(ValueError):
    """What a user asked for cannot be done; the message is one line and says what can."""


class Options(NamedTuple):
    """What the command line says."""

    preset: str
    config: Any
    path: Path
    strict: bool
    tensorboard: bool
    parallel: str | None  # None for an experiment that is not distributed
    job: Mapping[str, Any] | None  # arguments of join; None for a process alone


def default_path(experiment: Experiment, preset: str) -> Path:
    """The workdir where none is given."""
    return Path(f"runs/{experiment.name}-{preset}")


def parse(experiment: Experiment, argv: list[str]) -> Options | None:
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
    except (AttributeError, KeyError) as error:  # of ml_collections: there is no such field
        text = str(error)
        field, meant = re.search(r"\w+", text), re.search(r'Did you mean "(\w+)"', text)
        hint = f", did you mean {meant[1]!r}?" if meant else ""
        raise UsageError(
            f"the config has no field {field and field[0]!r}{hint} (see --help)"
        ) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(f"{error} (see --help for what is allowed)") from error
    if len(rest) > 1:
        raise UsageError(f"unexpected argument {rest[1]!r}: flags start with -- (see --help)")
    try:
        resolved = dataclasses.replace(experiment.presets[basic.preset], **config.to_dict())
    except pydantic.ValidationError as error:
        raise UsageError(in_words(error)) from error
    _check(resolved, experiment.presets[basic.preset])
    path = Path(basic.workdir or default_path(experiment, basic.preset))
    if basic.tensorboard:
        from bn_research.lab.tensorboard import obstacle

        if missing := obstacle():
            raise UsageError(missing)
    parallel = basic.parallel if experiment.distributed else None
    job = _job(basic) if experiment.distributed else None
    return Options(basic.preset, resolved, path, basic.strict, basic.tensorboard, parallel, job)


def _check(config: Any, preset: Any) -> None:
    """UsageError where a tuple of numbers was given something else, or seeds is below 1."""
    if config.seeds < 1:
        raise UsageError(f"--config.seeds={config.seeds} is not allowed: at least 1")
    for field, before in dataclasses.asdict(preset).items():
        value = getattr(config, field)
        if isinstance(before, tuple) and all(isinstance(item, (int, float)) for item in before):
            wrong = [item for item in value if not isinstance(item, (int, float))]
            if before and wrong:
                raise UsageError(f"--config.{field} holds numbers, got {wrong[0]!r} (see --help)")


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
    "  4  stopped by SIGTERM or Ctrl-C: start again with the same command to go on",
    "  5  another process was lost, or a collective failed: start the job again to go on",
)


def _help(experiment: Experiment, config: ConfigDict) -> str:
    lines = [
        experiment.question.strip(),
        "",
        f"{experiment.command} [--preset={'|'.join(experiment.presets)}] "
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
