#!/usr/bin/env bash
# The first stage of a container: builds the program in the folder that it is called in, and collects in OUT (/opt/ouroboros) what runs
# it. Called by the Dockerfile and the Apptainer definition, as root, where Rust is.
#   LIBTORCH_FOR=cpu     the program and the libraries that it is linked with (the default)
#   LIBTORCH_FOR=cuda    also libtorch's other half and the libraries of CUDA: several GB
set -euo pipefail

out=${OUT:-/opt/ouroboros}

# What the program is linked with, but for the system's.
linked() { ldd target/release/ouroboros | awk '$3 ~ /site-packages/ { print $3 }'; }

scripts/setup.sh
cargo build --release --locked
mkdir -p "$out/torch/lib"
cp target/release/ouroboros "$out/"
cp -r configs topology scripts "$out/"
cp -L .libtorch/version.py "$out/torch/"
case "${LIBTORCH_FOR:-cpu}" in
cpu)
    linked | while read -r library; do cp -L "$library" "$out/torch/lib/"; done
    ;;
cuda)
    cp -L .libtorch/lib/*.so* "$out/torch/lib/"
    cp -rL .libtorch/../nvidia "$out/"
    ;;
*)
    echo "build: LIBTORCH_FOR=$LIBTORCH_FOR is neither cpu nor cuda" >&2
    exit 2
    ;;
esac
