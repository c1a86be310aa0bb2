#!/usr/bin/env bash
# Installs Debian's or Ubuntu's SLURM for the tests, which start daemons of their own and leave the system's alone.
# Ends well where that is not to be had: then those tests say so and are skipped.
set -uo pipefail

say() { echo "install_slurm: $1" >&2; }

if command -v slurmctld slurmd sbatch munged >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  say "no apt-get here: the tests of SLURM will be skipped"
  exit 0
fi
root=()
if [ "$(id -u)" != 0 ]; then
  root=(sudo -n --preserve-env=DEBIAN_FRONTEND)
  if ! sudo -n true 2>/dev/null; then
    say "neither root nor sudo without a password: the tests of SLURM will be skipped"
    exit 0
  fi
fi

# The packages would start services, which need a configuration that is not there.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee $policy >/dev/null
  "${root[@]}" chmod +x $policy
  trap '"${root[@]}" rm -f $policy' EXIT
fi
apt() { DEBIAN_FRONTEND=noninteractive timeout 180 "${root[@]}" apt-get -qq -o Acquire::Retries=1 "$@" >/dev/null; }
packages=(slurmctld slurmd slurm-client munge)
apt install -y --no-install-recommends "${packages[@]}" 2>/dev/null ||
  { apt update && apt install -y --no-install-recommends "${packages[@]}"; } ||
  say "the packages cannot be had: the tests of SLURM will be skipped"
exit 0
