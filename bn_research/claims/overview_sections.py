"""The sections of the page of all experiments, and the anchors by which its parts link."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from bn_research.claims import elements
from bn_research.claims.figures import Figure
from bn_research.claims.run import Failure, Run
from bn_research.claims.verdict import VERDICTS


def section_anchor(experiment: str) -> str:
    """Return the id of an experiment's section."""
    return f"experiment-{_slug(experiment)}"


class Place(NamedTuple):
    """A run and where it stands on the page."""

    run: Run
    first_figure: int  # figures are counted through the page, from 1

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return str(self.run.results["experiment"])

    @property
    def anchor(self) -> str:
        """Id of the section."""
        return section_anchor(self.experiment)

    def claim_anchor(self, claim: str) -> str:
        """Id of a claim within the section."""
        return f"{self.anchor}-claim-{_slug(claim)}"

    def figure_anchor(self, index: int) -> str:
        """Id of the figure of this index."""
        return f"{self.anchor}-figure-{index + 1}"


def places(runs: Sequence[Run]) -> list[Place]:
    """Count the figures through the page."""
    found, number = [], 1
    for run in runs:
        found.append(Place(run, number))
        number += len(run.figures)
    return found


def check_different(experiments: Sequence[str]) -> None:
    """Raise ValueError if two are the same: one would take the other's links."""
    anchors = list(map(section_anchor, experiments))
    for index, (name, anchor) in enumerate(zip(experiments, anchors, strict=True)):
        if anchor in anchors[:index]:
            raise ValueError(f"each run must be of another experiment, got {name!r} more than once")


def contents(placed: Sequence[Place], failures: Sequence[Failure]) -> str:
    """Return links to the sections, each with its verdicts."""
    entries = [
        (place.anchor, place.run.title, place.experiment, _signs(place.run)) for place in placed
    ]
    entries += [
        (section_anchor(f.experiment), f.reason, f.experiment, elements.badge(elements.FAILED))
        for f in failures
    ]
    items = "\n".join(
        f'<li><a href="#{anchor}"><span class="name">{escape(title)}</span> '
        f'<code>{escape(experiment)}</code> <span class="signs">{signs}</span></a></li>'
        for anchor, title, experiment, signs in entries
    )
    return f'<ol class="contents">\n{items}\n</ol>'


def run_section(place: Place) -> str:
    """Return the section of one run: question, claims, figures, configuration."""
    run, anchor = place.run, place.anchor
    claims = "\n".join(_claim(place, claim) for claim in run.results["claims"])
    figures = "\n".join(_figure(place, index, f) for index, f in enumerate(run.figures))
    return f"""\
<section class="experiment" id="{anchor}" aria-labelledby="{anchor}-title">
<h2 id="{anchor}-title">{escape(run.title)}</h2>
<p class="question">{escape(run.question)}</p>
<p class="facts">{elements.facts(run.results)}</p>
{elements.command(run.command)}
<ul class="claims">
{claims}
</ul>
<div class="figures">
{figures}
</div>
<details><summary>Configuration</summary>
{elements.pairs(run.config)}
</details>
<details><summary>Environment</summary>
{elements.pairs(run.environment)}
</details>
{_BACK}
</section>"""


def failure_section(failure: Failure) -> str:
    """Return the section of an experiment that failed: command, reason and log."""
    anchor = section_anchor(failure.experiment)
    return f"""\
<section class="experiment" id="{anchor}" aria-labelledby="{anchor}-title">
<h2 id="{anchor}-title">Failed: {escape(failure.experiment)}</h2>
<p class="question">{escape(failure.reason)}</p>
<p class="facts">{elements.badge(elements.FAILED)} Exit status {failure.status}</p>
{elements.command(failure.command)}
<h3>End of its log</h3>
<pre class="log" tabindex="0">{escape(failure.log) or "The log is empty."}</pre>
{_BACK}
</section>"""


_BACK = '<p class="back"><a href="#claims">Back to all claims</a></p>'


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)


def _signs(run: Run) -> str:
    """Return how many claims came to each verdict, in signs that are read out as words."""
    found = [claim["verdict"] for claim in run.results["claims"]]
    return " ".join(
        f'<span class="sign {elements.verdict_class(verdict)}">{found.count(verdict)} '
        f'<span aria-hidden="true">{elements.verdict_sign(verdict)}</span>'
        f'<span class="unseen">{verdict}</span></span>'
        for verdict in VERDICTS
        if verdict in found
    )


def _claim(place: Place, claim: Mapping[str, Any]) -> str:
    note = f'<p class="note">{escape(claim["note"])}</p>' if claim["note"] else ""
    return (
        f'<li id="{place.claim_anchor(claim["id"])}">\n'
        f'<p class="statement">{elements.badge(claim["verdict"])} '
        f"<strong>{escape(claim['statement'])}</strong> <code>{escape(claim['id'])}</code></p>\n"
        f"<p><b>Criterion.</b> {escape(claim['criterion'])}</p>{note}</li>"
    )


def _figure(place: Place, index: int, figure: Figure) -> str:
    known = [claim["id"] for claim in place.run.results["claims"]]
    links = ", ".join(
        f'<a href="#{place.claim_anchor(claim)}">{escape(claim)}</a>'
        for claim in figure.claims
        if claim in known
    )
    shows = f'<p class="shows">Shows {links}</p>' if links else ""
    return elements.figure(
        figure,
        anchor=place.figure_anchor(index),
        label=f"Figure {place.first_figure + index}. ",
        more=f'{shows}<p class="made">{elements.code(place.run.command)}</p>',
    )
