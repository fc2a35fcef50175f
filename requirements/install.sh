#!/bin/sh
# Make $VENV hold the pinned CPU packages and this checkout. Does nothing when it already does.
set -eu

want=$(cat requirements/cpu.txt requirements/install.sh pyproject.toml | sha256sum | cut -d' ' -f1)
[ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$want" ] && exit 0

if [ ! -x "$VENV/bin/python" ]; then
    "$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in [(3, 11), (3, 12)])' || {
        echo "Python 3.11 or 3.12 is needed; '$PYTHON' is $("$PYTHON" --version 2>&1). Try: make PYTHON=python3.11 ..." >&2
        exit 1
    }
    "$PYTHON" -m venv "$VENV" || {
        echo "cannot create $VENV: on Debian and Ubuntu install python3-venv first" >&2
        exit 1
    }
fi

# torch first: anything else that asks for it would bring the newest CUDA build, several gigabytes.
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    "$VENV/bin/pip" install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH"
fi
"$VENV/bin/pip" install --quiet -r requirements/cpu.txt
"$VENV/bin/pip" install --quiet --no-deps --editable .
echo "$want" > "$STAMP"
