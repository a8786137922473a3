#!/usr/bin/env bash
# Make a virtual environment with the package in it, on a bare Debian machine too.
#   scripts/setup.sh VENV demo        what `make demo` needs: no torch, no pyarrow
#   scripts/setup.sh VENV dev         what the tests and the checks need, with torch's CPU build
#   scripts/setup.sh VENV valgrind    only valgrind, for `make instructions`; VENV stays as it is
# $PYTHON (python3) is the interpreter it is made from, $CXX (g++) the compiler.
# Missing compiler, venv module or headers: installed with apt-get by root, named for anybody else.
# libnghttp2 likewise, but nobody has to have it: without it the server has no native data plane.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: scripts/setup.sh VENV demo|dev|valgrind"
venv=$(realpath -m "${1:?$usage}")
profile=${2:?$usage}
python=${PYTHON:-python3}
cxx=${CXX:-g++}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

# no bytecode ahead of time: most of what comes along is never imported
pip_install() { "$venv/bin/pip" install -q --no-compile "$@"; }

has_python() { command -v "$python" >/dev/null; }
has_compiler() {
    printf '#include <span>\nint main() { return std::span<int>{}.size(); }\n' |
        "$cxx" -std=c++20 -fsyntax-only -x c++ - 2>/dev/null
}
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() {
    "$python" -c 'import pathlib, sysconfig; raise SystemExit(
        not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())'
}

# the Debian packages that are missing, one per line; the interpreter's own where it is Debian's
missing_packages() {
    has_compiler || echo g++
    [ "$profile" != valgrind ] || command -v valgrind >/dev/null || echo valgrind
    if ! has_python; then
        printf '%s\n' python3 python3-venv python3-dev
        return
    fi
    local name
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    has_venv || echo "$name-venv"
    has_headers || echo "$name-dev"
}

has_nghttp2() {
    printf '#include <nghttp2/nghttp2.h>\nint main() { return nghttp2_version(0) == 0; }\n' |
        "$cxx" -x c++ - -lnghttp2 -o /dev/null 2>/dev/null
}

# an offer: what fails here leaves grpcio to serve everything
install_nghttp2() {
    if has_nghttp2; then return; fi
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "no libnghttp2: the server will have no native data plane (Debian: libnghttp2-dev)"
        return
    fi
    say "installing libnghttp2-dev with apt-get"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends libnghttp2-dev; } \
        </dev/null >/dev/null 2>&1 && has_nghttp2 ||
        say "libnghttp2-dev could not be installed: the server will have no native data plane"
}

check_python_version() {
    "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' ||
        fail "PYTHON: expected Python 3.10 or newer, got $("$python" --version 2>&1) at $(command -v "$python")"
}

install_system_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null; then
        fail "missing, under Debian's names: ${missing[*]}; install them and run this again"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        say "missing: ${missing[*]}; run this, then the same command again:"
        say "    sudo apt-get update && sudo apt-get install -y ${missing[*]}"
        exit 1
    fi
    say "installing ${missing[*]} with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q </dev/null
    apt-get install -y -q --no-install-recommends "${missing[@]}" </dev/null
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] ||
        fail "still missing after apt-get: ${missing[*]} (for CXX=$cxx, PYTHON=$(command -v "$python")); Debian's own are CXX=g++ PYTHON=/usr/bin/python3"
}

# The CPU build from pip's own sources, else from PyTorch's index: PyPI's build is the CUDA one, which pins
# another triton than the tests use. Its dependencies come with the package's.
install_torch() {
    local pin
    pin=$(grep -m 1 '^torch==' constraints/cpu.txt)+cpu
    pip_install --no-deps "$pin" 2>/dev/null ||
        pip_install --no-deps --index-url https://download.pytorch.org/whl/cpu "$pin" ||
        fail "torch: expected $pin from pip's own sources or from download.pytorch.org, got it from neither"
}

case $profile in demo | dev | valgrind) ;; *) fail "$usage" ;; esac
if has_python; then check_python_version; fi
install_system_packages
check_python_version
[ "$profile" != valgrind ] || exit 0
install_nghttp2

if [ ! -x "$venv/bin/pip" ]; then
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
# no build isolation: the objects in $venv/build are used again, so that only what changed is compiled
say "installing build tools"
pip_install "scikit-build-core>=0.11" "pybind11>=3.0" cmake ninja
if [ "$profile" = dev ]; then
    say "installing torch (CPU build)"
    install_torch
fi
say "building and installing proteus-fast[$profile]"
pip_install --no-build-isolation --config-settings "build-dir=$venv/build" -c constraints/cpu.txt ".[$profile]"
