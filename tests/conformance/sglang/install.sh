#!/bin/sh
# Makes FOLDER/0.5.10 and FOLDER/0.5.23, each with that SGLang for CPU. Safe to run again: it does nothing when done.
#   install.sh FOLDER
# SGLang's own requirements are CUDA builds; what is listed here is what its encoder and its language server import.
set -eu
root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$(cd "$(dirname "$0")" && pwd)
folder=$1

common="aiohttp anthropic apache-tvm-ffi av blobfile==3.0.0 datasets decord2 distro easydict einops fastapi gguf
    interegular IPython mistral_common modelscope msgspec ninja numba numpy openai-harmony==0.0.4 orjson
    outlines==0.1.11 packaging partial_json_parser pillow prometheus-client psutil py-spy pybase64 pydantic
    python-dateutil python-multipart pyzmq regex requests scipy sentencepiece setproctitle soundfile tiktoken torchao
    tqdm triton uvicorn uvloop watchfiles xxhash zstandard"

make() { # make VERSION PACKAGES…
    version=$1
    shift
    venv=$folder/$version
    if [ -e "$venv/.installed" ] && ! [ "$here/install.sh" -nt "$venv/.installed" ]; then
        return
    fi
    mkdir -p "$folder"
    "$root/.venv/bin/python" -m venv "$venv"
    echo "installing SGLang $version for CPU into $venv (about 3 GB; the first time takes minutes)"
    pip="$venv/bin/pip --disable-pip-version-check"
    $pip install --quiet torch==2.13.0 torchvision==0.28.0 $common "$@"
    $pip install --quiet --no-deps "sglang==$version"
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$here/sitecustomize.py" "$packages/sitecustomize.py"
    receiver=$packages/sglang/srt/disaggregation/encode_receiver.py # 0.5.10 moves every embedding to a GPU
    if [ -e "$receiver" ]; then
        sed -i 's/append(e\.cuda())/append(e)/' "$receiver"
    fi
    touch "$venv/.installed"
}

make 0.5.10 transformers==5.3.0 compressed-tensors "llguidance<0.8.0" openai==2.6.1 xgrammar==0.1.32 timm==1.0.16
make 0.5.23 transformers==5.19.0 compressed-tensors==0.18.0 "llguidance>=1.7.6,<2" openai==2.8.0 xgrammar==0.2.7 \
    timm==1.0.25
