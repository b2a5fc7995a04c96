"""JSON lines to token ids with the Python package `tokenizers` on one core, as data preparations do it: ids of 2 bytes, the
end token behind every document.

    python benches/peers/tokenise.py TOKENIZER JSONL END OUT
"""

import itertools
import json
import os
import sys

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer

BATCH = 1000


def main():
    path, lines, end, out = sys.argv[1:]
    tokenizer = Tokenizer.from_file(path)
    end = tokenizer.token_to_id(end)
    count = 0
    with open(lines, encoding="utf-8") as file, open(out, "wb") as to:
        while docs := [json.loads(line)["text"] for line in itertools.islice(file, BATCH)]:
            # Without offsets, as nobody asks for them here.
            encodings = tokenizer.encode_batch_fast(docs)
            ids = [number for encoding in encodings for number in [*encoding.ids, end]]
            np.array(ids, dtype=np.uint16).tofile(to)
            count += len(ids)
    print(count)


main()
