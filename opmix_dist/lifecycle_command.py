"""``opmix lifecycle``: the stages of a model's life, one after the other."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any


def add_lifecycle_command(commands: Any) -> None:
    """Add it to the subcommands of ``opmix``."""
    lifecycle = commands.add_parser(
        "lifecycle",
        help="go through the stages of a model's life: pretrain, midtrain, instruct",
        description="Start it with torchrun for several ranks, or as it is for one. The same command goes on "
        "where it was killed. Settings as --all.dotted.key value, or --stages.NAME.dotted.key value.",
    )
    lifecycle.add_argument("config", type=Path, help="YAML configuration")
    which = lifecycle.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="NAME", help="one stage; the one before it must have ended")
    which.add_argument("--from", dest="first", metavar="NAME", help="this stage and those behind it")
    lifecycle.add_argument(
        "--print-config", action="store_true", help="print every stage's settings and stop"
    )
    lifecycle.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.distributed import has_launcher
    from opmix_dist.lifecycle.config import load_lifecycle, resolve
    from opmix_dist.lifecycle.running import STOPPED, Lifecycle, chosen_stages, require_same_stages
    from opmix_dist.process import die_with_parent
    from opmix_dist.settings import to_yaml
    from opmix_dist.telling import tell

    config = load_lifecycle(arguments.config, rest)
    stages = resolve(config)
    if arguments.print_config:
        for stage in stages:
            print(f"# stage {stage.name}\n{to_yaml(stage.config)}")
        return 0
    if has_launcher():
        die_with_parent()
    require_same_stages(stages)
    lifecycle = Lifecycle(config, stages)
    code = lifecycle.run(chosen_stages(stages, only=arguments.only, first=arguments.first))
    if code == STOPPED:
        if lifecycle.is_leader:
            tell(f"opmix: {config.run_dir} was stopped; started again, it goes on", sys.stderr)
        # as of `opmix train`: torchrun would start ranks that fail again
        return 0 if has_launcher() else 128 + (lifecycle.received or signal.SIGTERM)
    return code if code >= 0 else 128 - code
