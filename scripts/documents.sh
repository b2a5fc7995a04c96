#!/usr/bin/env bash
# From documents to a folder for `transformers`: JSON lines, a tokenizer of them, two prepared texts, a mixture of both trained
# on a 2x2 grid under mpirun, evaluated, exported. Five minutes on two cores; runs/documents-data, runs/documents.
#   scripts/documents.sh [--short] [--texts FOLDER]      FOLDER has wikitext2-valid.txt, wikitext2-test.txt, tinyshakespeare.txt
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

texts=../shared/data
missing=0
more=()
while [ $# -gt 0 ]; do
    case $1 in
        --short) more=(--set steps=20 --set optimizer.warmup=5 --set optimizer.decay_steps=5 --set batch=8 --set data.sequence=64 --set eval.every=20) ;;
        --texts) texts=$2 missing=3 && shift ;;
        *) echo "documents: unknown option $1" >&2 && exit 2 ;;
    esac
    shift
done

for name in wikitext2-valid wikitext2-test tinyshakespeare; do
    if [ ! -f "$texts/$name.txt" ]; then
        echo "documents: skipped: no $texts/$name.txt (say where with --texts FOLDER)"
        exit "$missing"
    fi
done

cargo build --release --quiet
program=target/release/ouroboros
data=runs/documents-data
rm -rf "$data" runs/documents runs/documents-exported
mkdir -p "$data"

say "articles as JSON lines"
python3 - "$texts" "$data" <<'PYTHON'
import json, pathlib, re, sys

texts, data = map(pathlib.Path, sys.argv[1:])
for split in ("valid", "test"):
    text = (texts / f"wikitext2-{split}.txt").read_text(encoding="utf-8")
    # An article begins with a line of its title between single equals signs.
    articles = [part for part in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if part.strip()]
    lines = "".join(json.dumps({"title": part.split("\n")[0].strip(" ="), "text": part}) + "\n" for part in articles)
    (data / f"wiki-{split}.jsonl").write_text(lines, encoding="utf-8")
    print(f"wiki-{split}.jsonl: {len(articles)} articles")
PYTHON

say "a tokenizer"
"$program" data tokenizer train "$data/wiki-valid.jsonl" "$texts/tinyshakespeare.txt" --size 4096 --out "$data/tokenizer.json"

say "two prepared texts"
"$program" data prepare "$data/wiki-valid.jsonl" --valid "$data/wiki-test.jsonl" --tokenizer "$data/tokenizer.json" --out "$data/wikitext.tokens"
"$program" data prepare "$texts/tinyshakespeare.txt" --tokenizer "$data/tokenizer.json" --out "$data/shakespeare.tokens"

say "a mixture of both, on a 2x2 grid: four ranks"
mpirun -n 4 --oversubscribe "$program" train configs/documents.toml ${more[@]+"${more[@]}"}

say "evaluated, each text alone"
for name in wikitext shakespeare; do
    "$program" eval runs/documents --set 'data.source=[]' --set "data.path=$data/$name.tokens"
done

say "a sample"
"$program" generate runs/documents --prompt "The history of" --tokens 60

say "a folder for transformers"
"$program" export runs/documents --to runs/documents-exported
ls runs/documents-exported
