"""What every experiment shares: flags, presets, the workdir, results and exit status.

    python -m experiments.NAME --preset=quick --workdir=DIR --config.FIELD=VALUE

Exit status, each but 0 and 3 with one line on stderr:

    0  finished, whatever the verdicts
    2  bad flags, config, data, workdir, checkpoint or coordinator
    3  with --strict, when a claim is not reproduced
    4  stopped by SIGTERM or Ctrl-C; started again with the same command it goes on
    5  another process of the job was lost, or a collective failed; start the job again to go on

With --tensorboard the curves of `metrics.jsonl` are also written as event files, for TensorBoard,
into DIR/tensorboard, while the run goes on.

The processes of a job end with one status. Process 0 alone writes and prints; the others report
only what ends them.
"""

import sys
from collections.abc import Sequence

from bn_research.lab.experiment import Experiment
from bn_research.lab.flags import UsageError, parse


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Exit status of a run from the command line.

    In a job of several processes whatever keeps one of them from its end ends them all at once,
    without returning.
    """
    try:
        options = parse(experiment, list(sys.argv if argv is None else argv))
    except UsageError as error:
        print(f"{experiment.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options is None:  # it was asked for help, which needs none of what a run does
        return 0
    from bn_research.lab.run import run

    return run(experiment, options)
