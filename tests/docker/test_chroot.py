"""Steps of a Dockerfile in a chroot: a real one, whose programs are this machine's, mounted read-only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from scripts.docker_chroot import Builder, build
from scripts.dockerfile import DockerfileError

DOCKERFILE = """\
FROM debian:bookworm-slim AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /srv/app
ENV NAME="a b" PATH=/srv/app/bin:$PATH
COPY one.txt folder /srv/app/in/
COPY folder copy
RUN if touch /usr/of_the_machine; then false; fi
RUN id -u > user; echo "$NAME" > name; echo "$PATH" > path; pwd > directory
FROM base AS middle
WORKDIR deeper
USER 1234:1234
RUN id -u > /tmp/user; pwd > /tmp/directory; echo ~ > /tmp/home
FROM base AS other
RUN false
FROM middle AS last
CMD ["/bin/true"]
"""


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    if os.geteuid():
        pytest.skip("chroot and mounts need root")
    root, context = tmp_path / "root", tmp_path / "context"
    for folder in ("proc", "dev", "etc", "usr"):
        (root / folder).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "tmp").mkdir(mode=0o777)
    (root / "tmp").chmod(0o777)
    (root / "etc" / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nsomebody:x:1234:1234::/home/somebody:/bin/sh\n"
    )
    (context / "folder" / "sub").mkdir(parents=True)
    for name in ("one.txt", "folder/two.txt", "folder/sub/three.txt", "folder/untracked.txt"):
        (context / name).write_text(name)
    git = ["git", "-C", str(context)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "one.txt", "folder/two.txt", "folder/sub/three.txt"], check=True)
    return Builder(root, context, binds=["/usr"])


def run(builder: Builder, text: str, target: str) -> None:
    file = builder.context.parent / "Dockerfile"
    file.write_text(text)
    build(file, target, builder)


def test_steps_run_as_the_dockerfile_says(builder: Builder) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    run(builder, DOCKERFILE, "last")  # without `other`, whose step fails
    root = builder.root

    def said(path: str) -> str:
        return (root / path).read_text().strip()

    assert [said(f"srv/app/{name}") for name in ("user", "name", "directory")] == ["0", "a b", "/srv/app"]
    assert said("srv/app/path").startswith("/srv/app/bin:/usr/local/sbin:")
    assert [said(f"tmp/{name}") for name in ("user", "home")] == ["1234", "/home/somebody"]
    assert said("tmp/directory") == "/srv/app/deeper"
    copied = sorted(
        str(path.relative_to(root / "srv" / "app")) for path in (root / "srv" / "app").rglob("*.txt")
    )
    assert copied == [
        "copy/sub/three.txt",
        "copy/two.txt",
        "in/one.txt",
        "in/sub/three.txt",
        "in/two.txt",
    ]
    assert Path("/proc/self/mounts").read_text() == mounts
    assert list((root / "usr").iterdir()) == []
    assert not Path("/usr/of_the_machine").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("COPY --chown=1:1 one.txt /", "COPY with chown"),
        ("COPY missing /", "git tracks nothing at missing"),
        ("ARG X=1", "ARG cannot be carried out"),
        ("USER nobody_here\nRUN true", "nobody_here has no account"),
    ],
)
def test_what_cannot_be_carried_out_is_an_error(builder: Builder, step: str, message: str) -> None:
    with pytest.raises(DockerfileError, match=message):
        run(builder, f"FROM debian:bookworm-slim AS x\n{step}\n", "x")


def test_a_failed_step_stops_the_build(builder: Builder) -> None:
    with pytest.raises(DockerfileError, match="line 14: RUN failed with status 1"):
        run(builder, DOCKERFILE, "other")
