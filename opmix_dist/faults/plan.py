"""The plan of faults: a JSON file that says what is to happen, where and when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from opmix_dist import bounded
from opmix_dist.errors import UserError
from opmix_dist.faults.points import POINTS, SPOILABLE

MAX_PLAN_BYTES = 1 << 20

Kind = Literal["crash", "exit", "exception", "oserror", "hang", "slow", "nan"]
"""crash: SIGKILL to the process itself. exit: leave at once with code 7. exception: an InjectedError.
oserror: no space left on the device. hang: for good. slow: for ``seconds``. nan: the number at the point."""


class Fault(BaseModel):
    """One fault. It happens once, however often the job is started again."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    point: str
    kind: Kind
    role: Literal["trainer", "pool", "ingest"] = "trainer"
    rank: int = Field(0, ge=0)
    """Among the ranks of its role."""
    step: int = Field(0, ge=0)
    """The first time that the point is passed at this step or a later one."""
    detail: str = ""
    """Only where the point's detail is this; "" is anywhere."""
    seconds: float = Field(3.0, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> Fault:
        if self.point not in POINTS:
            raise ValueError(f"there is no point {self.point}: take one of {', '.join(POINTS)}")
        if (self.kind == "nan") != (self.point in SPOILABLE):
            raise ValueError(f"a fault at {self.point} cannot be {self.kind}: nan is for {SPOILABLE} only")
        return self


class Plan(BaseModel):
    model_config = ConfigDict(extra="forbid")

    fired: str
    """Folder of the marks: one for each fault that has happened."""
    faults: list[Fault]

    @model_validator(mode="after")
    def _distinct(self) -> Plan:
        if len({fault.id for fault in self.faults}) != len(self.faults):
            raise ValueError("two faults have the same id")
        return self


def read_plan(path: Path) -> Plan:
    """Raises UserError that names the file and what is wrong in it."""
    try:
        return Plan.model_validate(bounded.read_json(path, MAX_PLAN_BYTES))
    except OSError as error:
        raise UserError(f"the plan of faults {path} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is no plan of faults: {field}: {first['msg']}") from None
