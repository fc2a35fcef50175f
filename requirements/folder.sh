#!/bin/sh
# Make $FOLDER hold the packages pinned in $PINS, without what they depend on. Does nothing when it already does.
# The folder is put on PYTHONPATH by those who want these versions, beside the packages of $VENV.
set -eu
stamp="$FOLDER/installed.sha256"
want=$(cat "$PINS" requirements/folder.sh | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0
rm -rf "$FOLDER"
# The newest megatron-core asks for Python 3.12, and its code runs on 3.11.
"$VENV/bin/pip" install --quiet --no-deps --ignore-requires-python --target "$FOLDER" -r "$PINS"
echo "$want" > "$stamp"
