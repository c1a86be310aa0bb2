"""What each rank of a launch is: a trainer, or a thin supervisor of the pool, which imports no model's code.

That takes seconds and hundreds of megabytes in each process.
"""

from __future__ import annotations

from opmix_dist.config import RunConfig
from opmix_dist.distributed import Placement, Role, has_launcher
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import Stopped
from opmix_dist.faults import points
from opmix_dist.logs import set_up_logging
from opmix_dist.pool.supervisor import Supervisor
from opmix_dist.process import die_with_parent
from opmix_dist.stopping import StopSignals


def run_job(config: RunConfig) -> Stopped | None:
    """Every rank of the launch calls this, in its main thread.

    Returns:
        None when the run has ended; else how a trainer rank was stopped, on request.

    Raises:
        UserError: anything in the configuration, the data or the run directory that the user can mend; before
            anything is written where that can be known before.
    """
    if has_launcher():  # a shell may end before the job that it started
        die_with_parent()
    stop = StopSignals()
    stop.listen()
    placement = Placement.from_environment(config.pool.ranks)
    set_up_logging(f"{placement.role} {placement.rank}")
    points.install(placement.role, placement.rank)
    if placement.role is Role.POOL:
        Supervisor(RunDir(config.run_dir), config, placement).supervise()
        return None
    from opmix_dist.train.job import train_run

    return train_run(config, placement, stop)
