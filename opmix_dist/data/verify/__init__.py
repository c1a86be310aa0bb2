"""``opmix data verify``: everything that a prepared folder says of itself, compared with what is there."""

from opmix_dist.data.verify.folder import verify
from opmix_dist.data.verify.report import DomainReport, Duplicate, Fault, VerifyReport

__all__ = ["DomainReport", "Duplicate", "Fault", "VerifyReport", "verify"]
