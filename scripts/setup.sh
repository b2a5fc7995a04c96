#!/usr/bin/env bash
# Installs what the build needs and points .libtorch at libtorch. May be run again at any time.
#   LIBTORCH=/path/to/libtorch scripts/setup.sh     uses that libtorch instead of PyPI's
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

torch=2.11.0
packages=(libopenmpi-dev openmpi-bin libclang-dev pkg-config g++ make procps)

has_packages() {
    local name pattern
    for name in mpicc mpirun pkg-config c++ make kill; do
        type -P "$name" >/dev/null || return 1
    done
    for pattern in /usr/lib/llvm-*/lib /usr/lib /usr/lib64 /usr/lib/x86_64-linux-gnu; do
        pattern="$pattern/libclang[.-][s0-9]*"
        if compgen -G "$pattern" >/dev/null; then return 0; fi
    done
    return 1
}

install_packages() {
    local sudo=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || return 1
        sudo=(sudo)
    fi
    command -v apt-get >/dev/null || return 1
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

advise() {
    echo "setup: cannot install packages here. Needed, by their Debian names: $*" >&2
    echo "setup: (an MPI with mpicc and mpirun, libclang, pkg-config, Python 3.10 or later with venv)" >&2
    exit 1
}

if ! has_packages; then
    say "packages: ${packages[*]}"
    install_packages "${packages[@]}" || advise "${packages[@]}"
fi
command -v cargo >/dev/null || { echo "setup: cargo is missing; install Rust 1.88 or later (rustup)" >&2; exit 1; }

if [ -n "${LIBTORCH:-}" ] && [ "$(readlink -f "$LIBTORCH")" != "$(readlink -f .libtorch || true)" ]; then
    [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] || { echo "setup: LIBTORCH=$LIBTORCH has no lib/libtorch_cpu.so" >&2; exit 1; }
    ln -sfn "$(readlink -f "$LIBTORCH")" .libtorch
elif [ ! -e .libtorch/lib/libtorch_cpu.so ]; then
    if [ ! -x .venv/bin/pip ]; then
        say "virtual environment .venv"
        rm -rf .venv
        python3 -m venv .venv || { rm -rf .venv; install_packages python3-venv && python3 -m venv .venv; } || advise python3-venv
    fi
    if ! .venv/bin/python -c "import importlib.metadata as m; assert m.version('torch').split('+')[0] == '$torch'" 2>/dev/null; then
        say "torch $torch"
        .venv/bin/pip install --quiet --disable-pip-version-check --no-compile "torch==$torch"
    fi
    site=$(.venv/bin/python -c "import sysconfig, os; print(os.path.relpath(sysconfig.get_path('purelib')))")
    ln -sfn "$site/torch" .libtorch
fi
echo "setup: libtorch at $(readlink -f .libtorch)"
