#!/bin/sh
# Make $VENV hold torch and the packages pinned in $PINS. Does nothing when it already does.
# requirements/cpu.txt, gpu.txt: the trainer, with this checkout. sglang.txt, sglang-gpu.txt: SGLang's servers alone.
# peers.txt: another trainer alone, to compare with.
# The files for GPUs pin all of CUDA's packages, torch among them, so that both sides have one torch and one NCCL.
set -eu

case "$PINS" in
    *sglang*.txt | *peers.txt) checkout= ;;
    *) checkout=pyproject.toml ;;
esac
stamp="$VENV/installed.sha256"
want=$(cat "$PINS" requirements/install.sh $checkout | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

if [ ! -x "$VENV/bin/python" ]; then
    case "$PINS" in *gpu.txt)
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || {
            echo "the pins for GPUs are for Python 3.12; '$PYTHON' is $("$PYTHON" --version 2>&1): make PYTHON=python3.12" >&2
            exit 1
        } ;;
    esac
    "$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in [(3, 11), (3, 12)])' || {
        echo "Python 3.11 or 3.12 is needed; '$PYTHON' is $("$PYTHON" --version 2>&1). Try: make PYTHON=python3.11 ..." >&2
        exit 1
    }
    "$PYTHON" -m venv "$VENV" || {
        echo "cannot create $VENV: on Debian and Ubuntu install python3-venv first" >&2
        exit 1
    }
fi

case "$PINS" in *gpu.txt)
    "$VENV/bin/pip" install --quiet --no-deps -r "$PINS"
    if [ -n "$checkout" ]; then
        "$VENV/bin/pip" install --quiet --no-deps --editable .
        # An extension that is compiled against the torch that is installed.
        "$VENV/bin/pip" install --quiet --no-deps --no-build-isolation transformer-engine-torch==2.11.0
    fi
    echo "$want" > "$stamp"
    exit 0 ;;
esac

# torch first: anything else that asks for it would bring the newest CUDA build, several gigabytes.
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    "$VENV/bin/pip" install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH"
fi
if [ -n "$checkout" ]; then
    "$VENV/bin/pip" install --quiet -r "$PINS"
    "$VENV/bin/pip" install --quiet --no-deps --editable .
else
    # Every package is pinned; sglang asks for CUDA packages and another torch.
    "$VENV/bin/pip" install --quiet --no-deps -r "$PINS"
fi
echo "$want" > "$stamp"
