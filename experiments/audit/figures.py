"""The figures of `experiments.audit`, and the tables and reasons beside them."""

import dataclasses
from pathlib import Path

from bn_research.claims import atomic
from bn_research.claims.figures import Figure
from experiments.audit import Config
from experiments.audit.verdicts import CLAIMS, Records, explained, restored


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """A figure of each arm's first seed.

    Its table with reasons goes into `audit.txt` beside the folder; that with BN is printed.
    """
    texts, figures = [], []
    for arm, audits in records.items():
        found = restored(config, audits[0])
        heading, table = f"{config.model}, {arm}", found.table(config.learning_rate)
        reasons = explained(found, audits[0]["normalized"])
        texts.append(f"{heading}\n\n{table}\n\n{reasons}\n")
        file = folder / f"audit_{arm.lower().replace(' ', '_')}.png"
        figure = found.figure(file, config.learning_rate)
        title = f"{figure.title}: {heading}"
        figures.append(dataclasses.replace(figure, title=title, claims=(CLAIMS[0].id,)))
    atomic.write_bytes(folder.parent / "audit.txt", "\n".join(texts).encode())
    print(texts[0])
    return figures
