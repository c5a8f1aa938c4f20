#!/bin/sh
# Make the environment of `make test-processors`: the tests' own, what SmolVLM's processor reads
# numbers with, and torchvision beside torch's CPU build, without what it would bring along.
#
#   sh scripts/setup-processors.sh FOLDER
#
# Settings from the environment: PYTHON, TORCH and TORCH_INDEX as in setup.sh.
set -eu

folder=$1
: "${TORCH_INDEX:=}"

CPU=1 sh scripts/setup.sh "$folder" "[test]" num2words
python=$folder/bin/python
# torchvision 0.n is made for torch 2.(n - 15).
release=$("$python" -c 'import torch; print(int(torch.__version__.split(".")[1]) + 15)')
"$python" -m pip install --disable-pip-version-check -q --no-deps \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torchvision==0.$release.*"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Where an index has torchvision for CUDA only; see the file.
cp tests/vllm/bootstrap/torchvision_operators.py "$site/"
echo 'import torchvision_operators' >"$site/torchvision_operators.pth"
