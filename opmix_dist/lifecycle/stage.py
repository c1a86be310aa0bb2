"""One stage in a process of its own on each rank: what the lifecycle's process on that rank starts.

Each stage begins in a fresh process, since engines keep state for as long as a process lives (Megatron's
parallel groups, DeepSpeed's communicator, compiled code, memory of the device), and so that a stage within a
lifecycle is the very same as one that is run alone.
"""

from __future__ import annotations

import sys

import yaml

from opmix_dist.config import check_config
from opmix_dist.distributed import Placement, Role, launch_store
from opmix_dist.errors import UserError
from opmix_dist.lifecycle.running import ENDED, REFUSED, STOPPED
from opmix_dist.process import die_with_parent, end_process
from opmix_dist.stopping import launch_is_told
from opmix_dist.telling import tell
from opmix_dist.train.roles import run_job


def main(parent: int) -> int:
    """Run the configuration that comes on standard input; one of the codes of ``running.py``."""
    die_with_parent(parent)
    try:
        config = check_config(yaml.safe_load(sys.stdin))
        stopped = run_job(config)
        in_pool = Placement.from_environment(config.pool.ranks).role is Role.POOL
    except UserError as error:
        tell(f"opmix: {error}", sys.stderr)
        return REFUSED
    if stopped is not None or (in_pool and launch_is_told(launch_store())):
        return STOPPED
    return ENDED


if __name__ == "__main__":
    end_process(main(int(sys.argv[1])))
