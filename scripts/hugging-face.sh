#!/usr/bin/env bash
# Puts Hugging Face's libraries, and those that write the files of texts, into .venv-hf, an environment of their own that
# sees the set-up's torch: for the tests and the benchmarks against them. May be run again at any time.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

transformers=5.24.0
safetensors=0.8.0
tokenizers=0.23.3
pyarrow=26.0.1
zstandard=0.25.0

if [ ! -x .venv/bin/python ]; then
    echo "hugging-face: no torch in .venv (set up without LIBTORCH to have it)" >&2
    exit 1
fi

if ! .venv-hf/bin/python -c "import torch, importlib.metadata as m; assert m.version('transformers') == '$transformers' and m.version('pyarrow') == '$pyarrow' and m.version('zstandard') == '$zstandard'" 2>/dev/null; then
    say "transformers $transformers"
    rm -rf .venv-hf
    .venv/bin/python -m venv .venv-hf
    .venv-hf/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        "transformers==$transformers" "safetensors==$safetensors" "tokenizers==$tokenizers" \
        "pyarrow==$pyarrow" "zstandard==$zstandard"

    # One torch is enough: a line in a .pth file is one more folder of modules.
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$purelib" >"$(.venv-hf/bin/python -c "$purelib")/torch-of-the-set-up.pth"
fi
.venv-hf/bin/python -c 'import torch, transformers; print(f"hugging-face: transformers {transformers.__version__} with torch {torch.__version__}")'
