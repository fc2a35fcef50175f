#!/usr/bin/env bash
# Install Debian's Slurm and munge by name, without starting their services. Does nothing where they are installed.
set -euo pipefail
want=(munge slurmctld slurmd slurm-client iproute2 util-linux)
miss=()
for package in "${want[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || miss+=("$package")
done
[ ${#miss[@]} -gt 0 ] || exit 0
export DEBIAN_FRONTEND=noninteractive
# A policy file keeps apt from starting the daemons; a file that exists already is left alone.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${miss[@]}" >/dev/null
