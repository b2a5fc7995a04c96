#!/usr/bin/env bash
# What runs leave to be looked at, read by tools that nobody here wrote: traces, TensorBoard's file, Prometheus' text, and the report, which
# Chromium opens at two widths, light and dark, without a network. Pictures go to target/report.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cargo build --release --quiet
program=$root/target/release/ouroboros
scripts/report-tools.sh

LIMIT=100 # seconds a command
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
runs=$folder/runs
mkdir -p target/report
check() { timeout "$LIMIT" .venv-report/bin/python tests/report/check.py "$@"; }
# ranks COUNT ARGUMENTS...: the program under mpirun; its last lines if it fails. A run that was stopped ends with 75.
ranks() {
    local count=$1 code=0
    shift
    timeout "$LIMIT" mpirun -n "$count" --oversubscribe "$program" "$@" >"$folder/log" 2>&1 || code=$?
    if [ "$code" != 0 ] && [ "$code" != 75 ]; then tail -n 40 "$folder/log" >&2; fi
    return "$code"
}
sinks='sink=["jsonl", "terminal", "tensorboard", "prometheus"]'

say "a run on 2x2, killed, gone on with, traced, stopped, and gone on with on 2x1"
sets=(--set steps=60 --set checkpoint.every=20 --set eval.every=20 --set batch=16 --set staleness.every=10 --set "$sinks")
# train COUNT ARGUMENTS...: the first run, by so many ranks.
train() {
    local count=$1
    shift
    ranks "$count" train configs/quickstart.toml --out "$runs/first" "${sets[@]}" "$@"
}
# Waits until its metrics have so many lines.
lines_of_first() {
    for ((i = 0; i < 600; i++)); do
        if [ "$(cat "$runs/first/metrics.jsonl" 2>/dev/null | wc -l)" -ge "$1" ]; then break; fi
        sleep 0.1
    done
}
"$program" train configs/quickstart.toml --out "$runs/first" "${sets[@]}" --grid 2x2 >"$folder/log" 2>&1 &
training=$!
lines_of_first 34
kill -9 "$training"
wait "$training" 2>/dev/null || true
before=$(grep -o '"step":[0-9]*' "$runs/first/metrics.jsonl" | tail -n 1 | cut -d : -f 2)

train 4 --grid 2x2 --resume --trace 4..25 &
training=$!
lines_of_first 50
touch "$runs/first/STOP"
if wait "$training"; then
    echo "the run was not stopped" >&2
    exit 1
fi
start=$(grep '"text":"resumed"' "$runs/first/events.jsonl" | grep -o '"step":[0-9]*' | cut -d : -f 2)
if [ "$start" -lt 1 ] || [ "$start" -ge "$before" ]; then
    echo "no step was made again: killed behind step $before, gone on with from $start" >&2
    exit 1
fi
train 2 --grid 2x1 --resume
for kind in start saved stop trace end; do
    grep -q "\"kind\":\"$kind\"" "$runs/first/events.jsonl" || { echo "events.jsonl tells of no $kind" >&2; exit 1; }
done
check trace "$runs/first/trace-$start-25.json.gz"
check tensorboard "$runs/first"
check prometheus "$runs/first"

say "a trace of ranks whose clocks are apart"
if unshare --mount --net --time --monotonic 1000 true 2>/dev/null; then
    timeout "$LIMIT" mpirun -n 1 "$program" bench configs/quickstart.toml --grid 2x1 --emulated-compute 3,6 --trace 4..9 --out "$runs/apart" : \
        -n 1 unshare --time --monotonic 1000 "$program" bench configs/quickstart.toml --grid 2x1 --emulated-compute 3,6 --trace 4..9 --out "$runs/apart" >"$folder/log" 2>&1 || { tail -n 40 "$folder/log" >&2; exit 1; }
    check trace "$runs/apart/trace-4-9.json.gz" | tee "$folder/apart"
    grep -q "aligned within" "$folder/apart"
else
    echo "skipped: no time namespaces here"
fi

say "a trace on a disk that is nearly full"
mkdir -p "$folder/small"
if unshare --mount true 2>/dev/null; then
    unshare --mount bash -c 'mount -t tmpfs -o size=60m none "$2" && exec timeout "$3" "$1" train configs/quickstart.toml --grid 2x1 \
        --set steps=30 --set batch=8 --out "$2/run" --trace 0..30' full "$program" "$folder/small" "$LIMIT" >"$folder/log" 2>&1 || { tail -n 40 "$folder/log" >&2; exit 1; }
    grep "are not traced" "$folder/log"
    [ "$(grep -c "which the run may need" "$folder/log")" = 1 ]
else
    echo "skipped: no namespaces of mounts here"
fi

say "other runs beside it, and nothing changed in their folders"
timeout "$LIMIT" "$program" train configs/quickstart.toml --grid 1x1 --out "$runs/second" --set steps=60 --set eval.every=20 --set batch=16 >/dev/null
sums() { find "$runs/first" "$runs/second" -type f ! -name report.html -exec sha256sum {} + | sort; }
sums >"$folder/before"
timeout "$LIMIT" "$program" report "$runs/first" "$runs/second" -o "$folder/report.html"
timeout "$LIMIT" "$program" report "$runs/first" >/dev/null
timeout "$LIMIT" "$program" watch "$runs/first" --once
sums | diff "$folder/before" - || { echo "report or watch has changed a run's folder" >&2; exit 1; }
timeout "$LIMIT" "$program" report "$runs/first" --json | python3 -c '
import json, sys
run = json.load(sys.stdin)["runs"][0]
proof, ends = run["proof"], [process["end"].split(":")[0] for process in run["processes"]]
assert ends == ["killed", "stopped", "ended"] and run["state"] == "ended", ends
assert [process["grid"] for process in run["processes"]] == ["2x2", "2x2", "2x1"] and len(run["places"]) == 2
assert 0 < proof["measured_idle"] < 0.9 and proof["measured_step_s"] > max(proof["work_s"]) * 0.9, proof
assert run["seconds"] >= run["step_seconds"] > 0, (run["seconds"], run["step_seconds"])
'
check page "$folder/report.html" target/report

say "runs of other tokens, an oracle's, and a grid of 64 places"
train_alone() { timeout "$LIMIT" "$program" train configs/quickstart.toml --set steps=30 --set eval.every=10 --set batch=16 "$@" >/dev/null; }
train_alone --out "$runs/characters" --set data.tokenizer=characters
train_alone --out "$runs/oracle" --oracle --grid 2x1 --set staleness.every=10
python3 - "$runs" <<'PY'
import json, pathlib, shutil, sys

runs = pathlib.Path(sys.argv[1])
shutil.copytree(runs / "first", runs / "wide", ignore=shutil.ignore_patterns("checkpoints", "log"))
places = json.loads((runs / "wide" / "places.json").read_text())
some = list(places["places"].values())
wide = {}
for stage in range(16):
    for replica in range(4):
        place = json.loads(json.dumps(some[stage % len(some)]))
        place |= {"name": f"stage {stage}, replica {replica}", "stages": [stage], "replica": replica}
        wide[replica * 16 + stage] = place
places["places"] = wide
(runs / "wide" / "places.json").write_text(json.dumps(places))
PY
timeout "$LIMIT" "$program" report "$runs/first" "$runs/characters" "$runs/oracle" "$runs/wide" -o "$folder/others.html"
for words in "bits per byte" "is a run of kind oracle" "and a fresh one" "means over the replicas of a stage"; do
    grep -qF "$words" "$folder/others.html" || { echo "the page does not say \`$words\`" >&2; exit 1; }
done
check page "$folder/others.html" target/report/others few

say "a run as it goes, on a terminal"
timeout "$LIMIT" "$program" train configs/quickstart.toml --grid 2x1 --out "$runs/live" --set steps=100000 --set checkpoint.every=50000 \
    --set batch=16 >"$folder/log" 2>&1 &
training=$!
for ((i = 0; i < 600; i++)); do
    if [ "$(wc -l 2>/dev/null <"$runs/live/places.json")" != "" ] && [ -s "$runs/live/places.json" ]; then break; fi
    sleep 0.1
done
screen() { TERM=xterm-256color tmux -L "ouroboros-$$" -f /dev/null "$@"; }
screen new-session -d -s watch -x 110 -y 34 "$program watch $runs/live"
sleep 3
watching=$(screen list-panes -t watch -F '#{pane_pid}')
ticks() { awk '{ print $14 + $15 }' "/proc/$watching/stat"; }
before=$(ticks)
sleep 5
used=$((($(ticks) - before) * 100 / $(getconf CLK_TCK) / 5))
screen capture-pane -p -t watch >target/report/watch.txt
screen send-keys -t watch q
touch "$runs/live/STOP"
wait "$training" || [ $? = 75 ]
cat target/report/watch.txt
for words in "live   grid 2x1" "running" "tokens/s" "left" "stage 0, replica 0" "stage 1, replica 0" "events" "q quits"; do
    grep -qF "$words" target/report/watch.txt || { echo "watch does not show \`$words\`" >&2; exit 1; }
done
if screen has-session -t watch 2>/dev/null; then
    echo "watch does not end by q" >&2
    exit 1
fi
echo "watch: $used % of a core"
if [ "$used" -ge 2 ]; then exit 1; fi
timeout "$LIMIT" "$program" watch "$runs/live" | tee "$folder/line"
grep -q "live: stopped, step" "$folder/line"

say "progress of what takes long: on a terminal, and nowhere else"
# shows_bar WORD COMMAND: a bar with this word and the time left, on a terminal where the command runs.
shows_bar() {
    screen new-session -d -s long -x 110 -y 10 "$2"
    for ((i = 0; i < 200; i++)); do
        sleep 0.2
        screen capture-pane -p -t long >"$folder/bar"
        if grep -q "$1 .*left" "$folder/bar"; then break; fi
    done
    screen kill-session -t long
    grep "$1 .*left" "$folder/bar" || { cat "$folder/bar"; echo "no bar of \`$1\`" >&2; return 1; }
}
shows_bar generating "$program generate $runs/first --prompt the --tokens 100000 >/dev/null"
cat >"$folder/study.toml" <<TOML
name = "small"
base = "$root/configs/quickstart.toml"
set = ["steps=300", "batch=16", "eval.every=300", "eval.drain=false"]
rates = [1e-3]
seeds = [1, 2]
[[variant]]
name = "one"
set = ["schedule=1f1b"]
[[variant]]
name = "two"
against = "one"
TOML
shows_bar training "$program study $folder/study.toml --out $folder/study"
timeout 4 "$program" generate "$runs/first" --prompt the --tokens 100000 >/dev/null 2>"$folder/quiet" || [ $? = 124 ]
if [ -s "$folder/quiet" ]; then
    cat "$folder/quiet"
    echo "a bar where there is no terminal" >&2
    exit 1
fi

say "ten runs of 100,000 steps"
python3 - "$runs" <<'PY'
import json, pathlib, random, sys

draw = random.Random(1)
runs = pathlib.Path(sys.argv[1])
begun = json.loads((runs / "first" / "events.jsonl").read_text().splitlines()[0])
for run in range(10):
    folder = runs / f"long-{run}"
    folder.mkdir()
    (folder / "places.json").write_text((runs / "first" / "places.json").read_text())
    with open(folder / "events.jsonl", "w") as file:
        file.write(json.dumps(begun) + "\n")
        for step in range(100, 100_001, 100):
            file.write(json.dumps({"time": begun["time"] + step / 10, "step": step, "kind": "saved", "text": f"step {step}  saved 579.0 MiB"}) + "\n")
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 100_001):
            loss = 2 + 3 / (1 + step / 500) + draw.gauss(0, 0.05)
            line = {"step": step, "loss": loss, "lr": 1e-3, "tokens": 4096 * step, "step_s": 0.1, "tokens_per_s": 40960.0, "grad_norm": [0.1, 0.2, 0.3, 0.4]}
            file.write(json.dumps(line) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "eval_loss": loss, "eval_bpc": 1.44 * loss, "eval_tokens": 32768}) + "\n")
            if step % 50 in (48, 49):
                kinds = ("age", "seconds", "distance", "relative", "travelled") if step % 50 == 48 else ("cosine",)
                told = [{"stage": stage, **{kind: draw.random() for kind in kinds}} for stage in (0, 1, 2, 3, "table")]
                file.write(json.dumps({"step": step, "staleness": told}) + "\n")
PY
began=$(date +%s%N)
timeout "$LIMIT" "$program" report "$runs"/long-* -o "$folder/long.html" | tail -n 1
took=$((($(date +%s%N) - began) / 1000000))
size=$(stat -c %s "$folder/long.html")
echo "report: $took ms, $((size / 1024)) KiB"
if [ "$took" -gt 5000 ] || [ "$size" -gt 5000000 ]; then
    echo "report: more than 5 s or 5 MB" >&2
    exit 1
fi
