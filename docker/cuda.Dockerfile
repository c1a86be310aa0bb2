# syntax=docker/dockerfile:1
# opmix_dist on NVIDIA GPUs, for Docker, Pyxis/Enroot and Apptainer (docs/docker.md).
#   docker build -f docker/cuda.Dockerfile -t opmix:cuda .
#
# The wheels in the lock bring CUDA 13.0's libraries, cuDNN and NCCL; of the base, a run needs the settings by which
# the NVIDIA container runtime hands in the driver (580 or later). `base` therefore, not `devel`: only what compiles
# CUDA at run time (DeepSpeed's offloaded optimiser) wants nvcc, and gets it with
#   --build-arg CUDA_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
#
# Networks. NCCL finds InfiniBand and RoCE by libibverbs and its providers, which are installed below; the host
# gives /dev/infiniband and an unlimited memlock. EFA needs libfabric and the aws-ofi-nccl plugin of the host's EFA
# release, so they are mounted from the host (/opt/amazon) and not baked in: LD_LIBRARY_PATH=/opt/amazon/efa/lib:
# /opt/amazon/ofi-nccl/lib. NCCL_* variables belong to the launch, which knows the cluster; none is set here.
ARG CUDA_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701

# What a run needs of the distribution. Triton and torch.compile compile with g++ and Python's headers at run time.
FROM ${CUDA_BASE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# A stable release changes its packages only to mend them, and takes the earlier ones away: no versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev \
        ibverbs-providers libibverbs1 libnuma1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 opmix
WORKDIR /opt/opmix
ENV PATH=/opt/opmix/.venv/bin:$PATH

# Makes the environment. Of the repository only what decides the packages, so that a change of the code installs
# none of them again.
FROM base AS packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/cuda.lock requirements/
COPY scripts/setup.sh scripts/
RUN PIP_NO_CACHE_DIR=1 bash scripts/setup.sh python3 .venv requirements/cuda.lock packages

# Pyxis and Apptainer run as the user who calls them, on a root that they may not write to: everything is readable
# by all and nothing is written below /opt/opmix. No entry point: Enroot would start it before what srun names.
FROM base AS runtime
COPY --from=packages /opt/opmix/.venv .venv
COPY setup.py pyproject.toml ./
COPY kernels kernels
COPY opmix_dist opmix_dist
COPY configs configs
RUN PIP_NO_CACHE_DIR=1 python -m pip install --no-deps --no-build-isolation --editable .
USER 10001:10001
CMD ["opmix", "--help"]
