#!/bin/sh
# Train on this machine: launch/local.sh CONFIG [section.key=value ...]. Edit the environment below to taste.
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec .venv/bin/megatron-rl train "$@"
