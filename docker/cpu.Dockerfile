# syntax=docker/dockerfile:1
# opmix_dist on CPUs: preparing data, `opmix fit`, `opmix report`, small runs, and (target `test`) the tests.
#   docker build -f docker/cpu.Dockerfile -t opmix:cpu .
#   docker build -f docker/cpu.Dockerfile -t opmix:cpu-test --target test .
# scripts/docker_chroot.py runs these steps where there is no Docker engine, in a root that debootstrap makes: the
# stages that lead to a target therefore follow from one another, and nothing is copied between stages.
FROM debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171 AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# g++ and Python's headers are for torch.compile, which `engine.compile` and masked attention ask for.
# A stable release changes its packages only to mend them, and takes the earlier ones away: no versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 opmix
WORKDIR /opt/opmix
ENV PATH=/opt/opmix/.venv/bin:$PATH

# Of the repository only what decides the packages, so that a change of the code installs none of them again.
FROM base AS packages
COPY requirements/cpu.lock requirements/
COPY scripts/setup.sh scripts/
RUN PIP_NO_CACHE_DIR=1 bash scripts/setup.sh python3 .venv requirements/cpu.lock packages \
    && cp requirements/cpu.lock .venv/

FROM packages AS project
COPY setup.py pyproject.toml ./
COPY kernels kernels
COPY opmix_dist opmix_dist
RUN PIP_NO_CACHE_DIR=1 python -m pip install --no-deps --no-build-isolation --editable .

# The tests read the documentation and the configurations too, and leave caches in the working directory.
FROM project AS test
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && chown opmix:opmix /opt/opmix
COPY .dockerignore Makefile CONTRIBUTING.md README.md ./
COPY .github .github
COPY benchmarks benchmarks
COPY configs configs
COPY docker docker
COPY docs docs
COPY requirements requirements
COPY scripts scripts
COPY tests tests
USER 10001:10001
CMD ["make", "test"]

# No entry point: what a scheduler or a user names is what runs.
FROM project AS runtime
COPY configs configs
USER 10001:10001
CMD ["opmix", "--help"]
