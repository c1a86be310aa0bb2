"""``opmix validate``: full training on mixtures that a finished search has simulated, beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_validate_command(commands: Any) -> None:
    """Add ``validate`` to the subcommands of ``opmix``."""
    command = commands.add_parser(
        "validate",
        help="is a search's simulation true? Train on mixtures for real and compare; any setting as "
        "--dotted.key value",
        description="From the snapshot of a finished search, trains the whole model on a set of mixtures for "
        "as many tokens as the probes have read, and compares with what the search simulates there. Start it "
        "with torchrun to deal the mixtures out to several ranks. Killed, it goes on with the same command.",
    )
    command.add_argument("run_dir", metavar="RUN", type=Path, help="of `opmix train` or `opmix search`")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML with settings of the validation")
    command.add_argument("--print-config", action="store_true", help="print the documented settings and stop")
    command.set_defaults(run=_validate)


def _validate(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.settings import to_yaml
    from opmix_dist.validate.config import load_validate_config

    settings = load_validate_config(arguments.config, rest)
    if arguments.print_config:
        print(to_yaml(settings, documented=True), end="")
        return
    from opmix_dist.determinism import use_deterministic_kernels
    from opmix_dist.distributed import Placement, World, has_launcher
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.logs import set_up_logging
    from opmix_dist.process import die_with_parent
    from opmix_dist.terminal import open_console, say
    from opmix_dist.validate.job import validate
    from opmix_dist.validate.page import write_page
    from opmix_dist.validate.tables import console_tables, sentences

    run = RunDir(arguments.run_dir)
    config = run.any_config()
    if has_launcher():
        die_with_parent()
    placement = Placement.from_environment(0)
    set_up_logging(f"validate {placement.rank}")
    if config.deterministic:
        use_deterministic_kernels()
    world = World.join(placement, device=config.engine.device, timeout_s=config.engine.collective_timeout_s)
    try:
        found = validate(run, settings, world)
    except BaseException as error:
        world.explain(error)
        world.abandon()
        raise
    world.leave()
    if found is None:
        return
    result, folder = found
    console = open_console()
    for table in console_tables(result):
        console.print(table)
    for sentence in sentences(result):
        say(console, sentence)
    say(console, f"calibration ({result.chosen}): {folder.calibration_file}")
    say(console, f"report: {write_page(result, folder)}")
