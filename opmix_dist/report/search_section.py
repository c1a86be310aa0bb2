"""The part of the report that tells of one search: proposal, laws, probes, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from opmix_dist.exchange.schemas import Fit, Proposal, SearchStage
from opmix_dist.exchange.units import Units
from opmix_dist.report import charts, page, words
from opmix_dist.report.page import Figures, Html
from opmix_dist.report.reading import Candidates, SearchView


def search_section(
    view: SearchView, realised: Mapping[str, float], colours: Mapping[str, str], figures: Figures
) -> Html:
    """Everything that the run directory holds of one search.

    Args:
        realised: held-out loss by domain at the end of the run; empty while it goes on.
        colours: colour of each domain.
    """
    parts = [_proposal(view, realised, colours, figures), _laws(view, colours, figures)]
    return page.section(
        f"Search {view.name}", _standing(view), *_problems(view), *parts, _probes(view, colours, figures)
    )


def _standing(view: SearchView) -> Html:
    asked = f"Asked at step {view.request.step:,}. " if view.request else ""
    failed = view.status is not None and view.status.stage is SearchStage.FAILED
    return (page.problem if failed else page.caption)(asked + view.standing)


def _problems(view: SearchView) -> list[Html]:
    """What could not be read, and what the fit and the proposal warn of, once each."""
    warnings = [text for record in (view.fit, view.proposal) if record for text in record.warnings]
    return [page.problem(text) for text in dict.fromkeys([*view.problems, *warnings])]


def _proposal(
    view: SearchView, realised: Mapping[str, float], colours: Mapping[str, str], figures: Figures
) -> Html:
    if view.proposal is None:
        return page.caption("There is no proposal.")
    proposal = view.proposal
    coefficients = ", ".join(f"{name} {value:.3f}" for name, value in proposal.coefficients.items())
    text = f"Pale: before; solid: proposed. Coefficients of the probes: {coefficients}."
    if proposal.confidence is not None:
        text += f" Whiskers: {words.percent(proposal.confidence)} intervals from resampled laws."
    bars = page.subsection(
        "Proposed mixture",
        *_decision(proposal),
        page.caption(text),
        figures.place(charts.proposed_mixture(proposal, colours)),
    )
    return page.element("div", bars, _landing(proposal, realised, colours, figures))


def _decision(proposal: Proposal) -> Iterator[Html]:
    """Whether to move, in plain sight, and what the gain is."""
    if proposal.decision is not None:
        verdict = "Move to the proposal" if proposal.decision.move else "Keep the mixture"
        yield page.element("p", page.element("strong", f"{verdict}."), f" {proposal.decision.reason}.")
    if proposal.gain is not None:
        rows = [[what, text] for what, text in words.gain(proposal.gain, proposal.confidence).items()]
        objective = Units.of(proposal).objective(proposal.objective_name)
        yield page.table(["gain over staying", objective], rows)


_LANDING = (
    "Change from the snapshot that the search started from: ○ staying on the old mixture and ◇ moving to the "
    "proposal, with as many probes averaged in both, as the law predicts (open) and as measured on the model "
    "simulated by interpolated adapters (● ◆); ★ realised by the end of the run. Law and simulation describe "
    "the same model and should agree. Both look {horizon} tokens ahead, at the learning rate of the probes, "
    "so neither is expected to equal the final loss. All are measured on the search's held-out samples, "
    "which the losses above leave out{instead}."
)
_RATES = "; error rates on tasks, which a run does not measure as it ends (no ★): `opmix score` does"


def _landing(
    proposal: Proposal, realised: Mapping[str, float], colours: Mapping[str, str], figures: Figures
) -> Html:
    units = Units.of(proposal)
    comparable = {name: loss for name, loss in realised.items() if name not in units.error_rates}
    instead = _RATES if units.error_rates else ""
    text = _LANDING.format(horizon=words.si(proposal.horizon_tokens), instead=instead)
    if not realised:
        text += " Nothing is realised yet."
    losses = charts.landing_losses(proposal, comparable)
    ahead = {name: values for name, values in losses.items() if values is not comparable}
    scales = [("At the horizon of the search", ahead)]  # the end of the run may dwarf these differences
    if comparable:
        scales.append(("With the end of the run", losses))
    rows = [
        [
            units.label(domain),
            words.loss(start),
            *(words.loss(values.get(domain)) for values in losses.values()),
        ]
        for domain, start in proposal.snapshot.items()
    ]
    return page.subsection(
        f"Predicted, simulated and realised {units.described if units.error_rates else units.quantity}",
        page.caption(text),
        figures.grid(charts.landing(*shown, proposal.snapshot, units, colours) for shown in scales),
        page.table(["domain", "snapshot", *losses], rows),
    )


def _laws(view: SearchView, colours: Mapping[str, str], figures: Figures) -> Html:
    fit, candidates = view.fit, view.candidates
    gain = view.proposal.gain if view.proposal else None
    if fit is None and gain is not None and gain.predicted is None:
        return page.caption("This search followed gradients and fitted no laws.")
    if fit is None or candidates is None:
        missing = "candidates.parquet" if candidates is None else "fit.json"
        return page.caption(f"The fitted laws cannot be shown without a valid {missing}.")
    units = view.units
    grid = [
        charts.law_against_measured(
            domain, candidates, colours.get(domain, charts.GREY), title=units.label(domain)
        )
        for domain in fit.domains
    ]
    text = (
        f"Laws of the family {fit.family}. Each dot is a candidate mixture: its measured {units.quantity} ± "
        "standard error, and the law that was fitted to all of them; its ring is what laws say that were "
        "fitted to others. The star is the proposal, measured after the fit. On the dotted line they agree."
    )
    return page.subsection(
        "Laws against measurements",
        page.caption(text),
        figures.grid(grid),
        _fit_table(fit, candidates, units),
        *_comparison(fit, units),
    )


def _comparison(fit: Fit, units: Units) -> Iterator[Html]:
    """Errors of the families that were compared."""
    if fit.comparison:
        rows = [
            [units.label(domain), *(_number(errors[i]) for errors in fit.comparison.values())]
            for i, domain in enumerate(fit.domains)
        ]
        yield page.caption(f"Cross-validated root mean square error of each family, {units.unit}.")
        yield page.table(["domain", *fit.comparison], rows)


def _number(value: float | None) -> str:
    return words.ABSENT if value is None else f"{value:.3g}"


def _fit_table(fit: Fit, candidates: Candidates, units: Units) -> Html:
    """How well each law holds, beside how far apart the candidates are."""
    rows = []
    for i, domain in enumerate(fit.domains):
        measured = candidates.loss[candidates.rows(domain, "candidate")]
        spread = float(np.ptp(measured)) if len(measured) else None
        values = (fit.r2[i], fit.spearman[i], fit.loo_error[i], fit.calibration[i], spread)
        rows.append([units.label(domain), *map(_number, values)])
    header = ["domain", "R²", "Spearman", "leave-one-out RMSE", "calibration"]
    header.append(f"spread of measured {units.quantity}")
    return page.table(header, rows)


def _probes(view: SearchView, colours: Mapping[str, str], figures: Figures) -> Html:
    curves = {name: points for name, points in view.curves.items() if points}
    absent = [name for name in view.curves if name not in curves]
    parts = [page.problem(f"No training curve: {', '.join(absent)}.")] if absent else []
    if curves:
        parts.append(figures.place(charts.probe_curves(curves, colours)))
    text = "Training loss of each adapter on its own component, in means of consecutive steps."
    return page.subsection("Probes", page.caption(text), *parts)
