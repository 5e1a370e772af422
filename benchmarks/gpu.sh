#!/bin/sh
# Runs benchmarks/gpu.py with the python3 at hand, or $PYTHON: vaeflow itself need not be installed.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit
PYTHONPATH="$here:$here/../src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 KERAS_BACKEND=jax \
	exec "${PYTHON:-python3}" "$here/gpu.py" "$@"
