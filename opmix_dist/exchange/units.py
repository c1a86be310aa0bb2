"""What the values of a search are, domain by domain: whoever tells of them asks here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opmix_dist.exchange.schemas import Proposal

LOSS, ERROR = "loss", "error rate"
NATS = "nats per token"


@dataclass(frozen=True)
class Units:
    """error_rates: domains whose values are error rates of replies, 0..1; all others are mean losses in nats
    per token. mixed: whether the search has both."""

    error_rates: frozenset[str] = frozenset()
    mixed: bool = False

    @classmethod
    def of(cls, proposal: Proposal) -> Units:
        """By the search's own record."""
        rates = frozenset(proposal.error_rates)
        return cls(rates, bool(rates) and bool({*proposal.weights} - rates))

    @property
    def quantity(self) -> str:
        """What the values of all domains are."""
        return f"{LOSS} or {ERROR}" if self.mixed else ERROR if self.error_rates else LOSS

    @property
    def described(self) -> str:
        """``quantity`` with its unit. Error rates have none."""
        return self.quantity.replace(LOSS, f"{LOSS} ({NATS})")

    @property
    def unit(self) -> str:
        """Of differences and errors of all domains; where domains differ in it, their labels tell."""
        return "in its own unit" if self.mixed else ERROR if self.error_rates else NATS

    def objective(self, name: str) -> str:
        """What is lowered, and its unit.

        Args:
            name: as ``search.proposal.objective`` has them.
        """
        if name == "relative":
            many = (
                f"{LOSS}es and {ERROR}s" if self.mixed else f"{ERROR}s" if self.error_rates else f"{LOSS}es"
            )
            return f"mean of {many} over the snapshot's"
        text = name.replace("_", " ")
        if self.mixed:
            return f"{text} of {LOSS}es, {NATS}, and {ERROR}s"
        return f"{text} {ERROR}" if self.error_rates else f"{text} {LOSS}, {NATS}"

    def label(self, domain: str) -> str:
        """A domain's name, with what it is measured in where domains differ in that."""
        return self.label_of(domain, [domain])

    def label_of(self, name: str, domains: Iterable[str]) -> str:
        """The name of a mean over ``domains``, likewise."""
        found = {ERROR if domain in self.error_rates else NATS for domain in domains}
        return f"{name} ({' and '.join(sorted(found))})" if self.mixed else name


LOSSES = Units()
"""Of a search on losses alone."""
