#!/usr/bin/env python3
"""Runs the steps of docker/cpu.Dockerfile without a Docker engine, in a clean Debian root.

As root, with debootstrap installed:

    python3 scripts/docker_chroot.py --target test --then "make test"

debootstrap makes the root that the first stage's base image is of (`debian:bookworm-...`). Every RUN is
run in it by chroot, as the user, in the directory and with the environment that the Dockerfile says;
COPY takes the files that git tracks, as a clean checkout has them. Devices and what --bind names are
mounted in a mount namespace of the step alone, so that nothing stays mounted whatever happens. It is no
sandbox: the steps have the network, and root's rights in the root directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.dockerfile import DockerfileError, Instruction, fill, parse_dockerfile, stages_to

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SETTINGS_ONLY = frozenset(("CMD", "EXPOSE", "LABEL", "STOPSIGNAL"))
"""Instructions that describe an image and do nothing to its files."""

# The mounts end with the namespace, whose last process the chroot is. Arguments: the root, the paths to
# bind, --, chroot's arguments.
_IN_NAMESPACE = """
set -eu
root=$1; shift
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$(dirname "$root$1")"; touch "$root$1"; fi
  mount --bind "$1" "$root$1"
  mount -o remount,bind,ro "$root$1"
  shift
done
shift
exec chroot "$@"
"""


@dataclass
class Builder:
    """Carries out instructions in ``root``; ``binds`` are paths of this machine, read-only in every step."""

    root: Path
    context: Path
    binds: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    directory: str = "/"
    user: str = "0:0"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])

    def carry_out(self, instruction: Instruction) -> None:
        """DockerfileError: an instruction or a form of it that is not known here, or a step that failed."""
        match instruction.keyword:
            case "RUN":
                if status := self.run(instruction.arguments):
                    raise DockerfileError(f"line {instruction.line}: RUN failed with status {status}")
            case "COPY":
                self._copy(instruction)
            case "ENV":
                values = instruction.assignments()
                self.environment |= {name: fill(value, self.environment) for name, value in values.items()}
            case "WORKDIR":
                self.directory = os.path.join(self.directory, fill(instruction.arguments, self.environment))
                self._inside(self.directory).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = instruction.arguments
            case "SHELL":
                self.shell = instruction.words()
            case keyword if keyword not in SETTINGS_ONLY:
                raise DockerfileError(f"line {instruction.line}: {keyword} cannot be carried out in a chroot")

    def run(self, command: str) -> int:
        """The status of ``command``, a line for the shell."""
        user, home = self._account()
        inside = [
            "env",
            "-i",
            f"HOME={home}",
            *(f"{name}={value}" for name, value in self.environment.items()),
        ]
        enter = ["sh", "-c", 'cd "$0" && exec "$@"', self.directory]
        chroot = [f"--userspec={user}", str(self.root), *inside, *enter, *self.shell, command]
        namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _IN_NAMESPACE, "sh"]
        return subprocess.run([*namespace, str(self.root), *self.binds, "--", *chroot]).returncode

    def _copy(self, instruction: Instruction) -> None:
        """Files of the context that git tracks. A folder's content goes into the target, as Docker has it."""
        if instruction.flags:
            raise DockerfileError(f"line {instruction.line}: COPY with {', '.join(instruction.flags)}")
        *sources, target = instruction.words()
        folder = self._inside(os.path.join(self.directory, target))
        into_folder = len(sources) > 1 or target.endswith("/")
        for source in sources:
            for name in self._tracked(source, instruction.line):
                if str(name) != source:  # one of a folder's files
                    place = folder / name.relative_to(source)
                else:
                    place = folder / name.name if into_folder else folder
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.context / name, place)

    def _tracked(self, source: str, line: int) -> list[Path]:
        command = ["git", "-C", str(self.context), "ls-files", "-z", "--", source]
        names = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = [Path(name) for name in names.split("\0") if name]
        if not found:
            raise DockerfileError(f"line {line}: git tracks nothing at {source}")
        return found

    def _account(self) -> tuple[str, str]:
        """``uid:gid`` and the home folder that the root's own passwd has for the user."""
        name = self.user.partition(":")[0]
        for entry in self._inside("/etc/passwd").read_text().splitlines():
            login, _, uid, gid, _, home, _ = entry.split(":")
            if name in (login, uid):
                return f"{uid}:{gid}", home
        raise DockerfileError(f"USER {self.user} has no account in the root")

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")


def build(dockerfile: Path, target: str, builder: Builder) -> None:
    """Carries out all stages that lead to ``target`` and prints what each RUN took."""
    for stage in stages_to(parse_dockerfile(dockerfile.read_text()), target):
        for instruction in stage.instructions:
            started = time.monotonic()
            builder.carry_out(instruction)
            if instruction.keyword == "RUN":
                seconds = time.monotonic() - started
                say(f"{dockerfile.name}:{instruction.line} RUN of stage {stage.name}: {seconds:.0f} s")


def debootstrap(dockerfile: Path, target: str, root: Path) -> None:
    """The root of the release that the first stage's base image is of."""
    base = stages_to(parse_dockerfile(dockerfile.read_text()), target)[0].base
    image, _, tag = base.partition("@")[0].partition(":")
    if image != "debian" or not tag:
        raise DockerfileError(f"the base {base} is not debian:RELEASE...: debootstrap cannot make it")
    subprocess.run(["debootstrap", "--variant=minbase", tag.partition("-")[0], str(root)], check=True)
    # as the container engine does, so that names resolve as on this machine
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")


def say(line: str) -> None:
    print(f"docker_chroot: {line}", flush=True)


@contextmanager
def _root(given: Path | None) -> Iterator[Path]:
    """``given``, which stays, or a temporary folder."""
    if given is not None:
        given.mkdir(parents=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="opmix_root_") as folder:
        yield Path(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=REPOSITORY / "docker" / "cpu.Dockerfile")
    parser.add_argument("--target", default="runtime", help="stage to make (default: runtime)")
    parser.add_argument(
        "--root", type=Path, help="folder for the root, which stays (default: a temporary one)"
    )
    parser.add_argument(
        "--bind",
        action="append",
        default=[],
        metavar="PATH",
        help="path of this machine that each step sees, read-only, such as /etc/pip.conf. Repeatable",
    )
    parser.add_argument("--then", metavar="COMMAND", help="to run at the end, as a container would")
    arguments = parser.parse_args(argv)
    if os.geteuid():
        parser.error("chroot and mounts need root")
    started = time.monotonic()
    try:
        with _root(arguments.root) as root:
            debootstrap(arguments.file, arguments.target, root)
            say(f"debootstrap: {time.monotonic() - started:.0f} s")
            builder = Builder(root, REPOSITORY, tuple(map(os.path.abspath, arguments.bind)))
            build(arguments.file, arguments.target, builder)
            status = builder.run(arguments.then) if arguments.then else 0
    except (DockerfileError, OSError, subprocess.CalledProcessError) as error:
        print(f"docker_chroot: {error}", file=sys.stderr)
        return 1
    say(f"target {arguments.target} of {arguments.file.name}: {time.monotonic() - started:.0f} s in all")
    return status


if __name__ == "__main__":
    sys.exit(main())
