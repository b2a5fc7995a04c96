#!/usr/bin/env bash
# Puts the readers of what runs leave into .venv-report: TensorBoard, Prometheus' parser, JSON Schema, Selenium; and Chromium from the
# distribution where it is missing. For scripts/test-report.sh. May be run again at any time.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tensorboard=2.21.0
jsonschema=4.26.0
prometheus=0.26.0
selenium=4.51.0

if ! .venv-report/bin/python -c "import importlib.metadata as m; assert m.version('tensorboard') == '$tensorboard' and m.version('selenium') == '$selenium' and m.version('jsonschema') == '$jsonschema' and m.version('prometheus-client') == '$prometheus'" 2>/dev/null; then
    say "TensorBoard $tensorboard, Selenium $selenium"
    rm -rf .venv-report
    python3 -m venv .venv-report
    .venv-report/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        "tensorboard==$tensorboard" "jsonschema==$jsonschema" "prometheus-client==$prometheus" "selenium==$selenium"
fi

if ! type -P chromium >/dev/null || ! type -P chromedriver >/dev/null || ! type -P tmux >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! type -P apt-get >/dev/null; then
        echo "report-tools: chromium, chromedriver or tmux is missing; install them" >&2
        exit 1
    fi
    say "chromium"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core tmux >/dev/null
fi
echo "report-tools: TensorBoard $tensorboard, $(chromedriver --version | cut -d' ' -f1-2)"
