"""What a verification found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from opmix_dist.data.catalogue import Split


@dataclass(frozen=True)
class Fault:
    """Something that is not as the folder says; training on it would fail or learn something else."""

    domain: str
    split: Split | None
    what: str
    """One line that names the file."""


@dataclass(frozen=True)
class Duplicate:
    """A held-out document that is there once more."""

    domain: str
    sample: int
    """Of the domain's eval split, in which the document begins."""
    other_domain: str
    other_split: Split
    other_sample: int
    """Where it begins there."""
    opening: str
    """Its first words, printable."""


@dataclass
class DomainReport:
    """One domain: what was read of it and what is wrong. Counts are of what could be read."""

    name: str
    shards: int = 0
    samples: int = 0
    tokens: int = 0
    documents: int = 0
    faults: list[Fault] = field(default_factory=list)
    in_train: list[Duplicate] = field(default_factory=list)
    """Held-out documents of this domain that a train split has too, each once."""
    within_eval: list[Duplicate] = field(default_factory=list)
    """Held-out documents of this domain that an eval split has before, in the order of reading."""
    repeated: int | None = None
    """Documents that an earlier one equals, in this domain or one before it; None: not counted."""

    def fault(self, what: str, split: Split | None = None) -> None:
        self.faults.append(Fault(self.name, split, what))


@dataclass
class VerifyReport:
    """All domains that were looked at."""

    root: str
    domains: list[DomainReport] = field(default_factory=list)
    shared_faults: list[str] = field(default_factory=list)
    """Those of no single domain: the tokenizer, or a folder that cannot be listed."""
    left_out: int = 0
    """Domains of the folder that were not looked at, also not for duplicates."""

    @property
    def faults(self) -> list[Fault]:
        return [fault for domain in self.domains for fault in domain.faults]

    @property
    def sound(self) -> bool:
        return not self.shared_faults and not self.faults

    @property
    def duplicates(self) -> Iterator[Duplicate]:
        return (found for domain in self.domains for found in (*domain.in_train, *domain.within_eval))

    @property
    def repetitions(self) -> int:
        """Duplicates of every kind."""
        return sum(1 for _ in self.duplicates) + sum(domain.repeated or 0 for domain in self.domains)
