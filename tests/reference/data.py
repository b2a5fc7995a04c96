"""Texts and tokens made by tools that nobody here wrote, for tests/integration/data.rs.

    python tests/reference/data.py make FOLDER TEXT

writes documents of TEXT as JSON lines, Parquet and packed, token files as nanoGPT and Megatron-LM write them,
tokenizers of five kinds, a small Llama with one of them, and expected.json: the tokens of every document.

    python tests/reference/data.py encode TOKENIZER JSONL END

prints the tokens of every document as JSON, END behind each.

    python tests/reference/data.py model FOLDER JSONL PROMPT COUNT

prints what a model folder makes of a prompt, and its loss over the documents, one after the other, as windows.
"""

import gzip
import json
import pathlib
import struct
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<|endoftext|>"


def documents(text):
    """Paragraphs, and what is hard to tokenise."""
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    hard = [
        "naïve café — “quotes” … ½ 漢字かな 🙂🙂 e\u0301",
        "  two  spaces\t\ttabs \n\n\n lines \r\n end  ",
        f"a document that names {END} in its text",
        "x" * 3000,
        "\n",
        "1234567890 3.14 1,000,000",
    ]
    return paragraphs + hard + [f"Document {i}: {part[: 40 + i % 97]}" for i, part in enumerate(paragraphs * 12)]


def byte_level(docs, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(docs, trainer)
    return tokenizer


def like_llama3(docs):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(docs, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A $B",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    return tokenizer


def like_t5(docs):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(docs, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def like_llama2(docs):
    """One word for the whole text, whose beginning is a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special + alphabet, show_progress=False)
    tokenizer.train_from_iterator(docs, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def like_bert(docs):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        docs, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer


def encoded(tokenizer, docs, end):
    """What the library makes of every document, the end token behind it once."""
    end = tokenizer.token_to_id(end)
    all_ids = [encoding.ids for encoding in tokenizer.encode_batch(docs, add_special_tokens=True)]
    return [ids if ids[-1:] == [end] else ids + [end] for ids in all_ids]


def write_megatron(prefix, docs, code, dtype, cut):
    """The layout that Megatron-LM documents for its indexed datasets; a document of several sequences is `cut`."""
    sequences, starts = [], [0]
    for ids in docs:
        parts = [ids] if not cut else [part for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]) if part]
        sequences += parts
        starts.append(len(sequences))
    lengths = np.array([len(part) for part in sequences], dtype=np.int32)
    size = np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1].astype(np.int64) * size)]).astype(np.int64)
    with open(f"{prefix}.bin", "wb") as file:
        for part in sequences:
            file.write(np.array(part, dtype=dtype).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", code))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(starts)))
        file.write(lengths.tobytes(order="C"))
        file.write(pointers.tobytes(order="C"))
        file.write(np.array(starts, dtype=np.int64).tobytes(order="C"))


def make_model(folder, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(3)
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 7,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def make(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    docs = documents(text)
    lines = "".join(json.dumps({"id": i, "text": doc, "more": {"text": "no"}}) + "\n" for i, doc in enumerate(docs))
    raw = lines.encode()
    (folder / "a.jsonl").write_bytes(raw)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(raw[: len(raw) // 2]) + gzip.compress(raw[len(raw) // 2 :]))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    shards = folder / "shards" / "deeper"
    shards.mkdir(parents=True, exist_ok=True)
    half, rest = docs[: len(docs) // 2], docs[len(docs) // 2 :]
    pq.write_table(pa.table({"text": half}), folder / "shards" / "a.parquet", row_group_size=7, compression="zstd")
    (shards / "b.ndjson").write_text("".join(json.dumps({"text": doc}, ensure_ascii=False) + "\n\n" for doc in rest))
    for name, how in [("snappy", "snappy"), ("gzip", "gzip"), ("lz4", "lz4"), ("none", "none")]:
        table = pa.table({"number": range(len(docs)), "text": docs})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=100, compression=how, use_dictionary=name != "none")
    holes = [doc if i % 3 else None for i, doc in enumerate(docs)]
    pq.write_table(pa.table({"text": pa.array(holes), "other": pa.array(range(len(docs)))}), folder / "holes.parquet")
    pq.write_table(pa.table({"words": [["a", "b"]], "number": [1]}), folder / "lists.parquet")
    (folder / "long.txt").write_text("\n\n".join(docs) * 12)
    (folder / "bomb.jsonl.zst").write_bytes(zstandard.compress(b"\n" * (300 << 20)))

    tokenizers = {
        "gpt2": (byte_level(docs, 600), END),
        "llama3": (like_llama3(docs), "<|end_of_text|>"),
        "t5": (like_t5(docs), "</s>"),
        "bert": (like_bert(docs), "[SEP]"),
        "llama2": (like_llama2(docs), "</s>"),
    }
    expected = {}
    for name, (tokenizer, end) in tokenizers.items():
        tokenizer.save(str(folder / f"{name}.json"))
        ids = encoded(tokenizer, docs, end)
        expected[name] = {"end": end, "size": tokenizer.get_vocab_size(), "documents": ids}
        whole = (folder / "long.txt").read_bytes().decode()
        expected[name]["long"] = encoded(tokenizer, [whole], end)[0]

    ids = expected["gpt2"]["documents"]
    flat = [token for doc in ids for token in doc]
    np.array(flat, dtype=np.uint16).tofile(folder / "two.bin")
    np.array(flat, dtype=np.uint32).tofile(folder / "four.bin")
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(flat)
    (folder / "headed.bin").write_bytes(header.tobytes() + np.array(flat, dtype=np.uint16).tobytes())
    for name, code, dtype, cut in [("u16", 8, np.uint16, False), ("i32", 4, np.int32, True), ("i64", 5, np.int64, True)]:
        write_megatron(str(folder / f"megatron-{name}"), ids, code, dtype, cut)
    make_model(folder / "model", tokenizers["gpt2"][0])
    (folder / "expected.json").write_text(json.dumps(expected))


def encode(tokenizer, path, end):
    docs = [json.loads(line)["text"] for line in pathlib.Path(path).read_text().splitlines()]
    print(json.dumps(encoded(Tokenizer.from_file(tokenizer), docs, end)))


def run_model(folder, path, prompt, count):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=count, do_sample=False)[0]
        docs = [json.loads(line)["text"] for line in pathlib.Path(path).read_text().splitlines()]
        end = tokenizer.eos_token_id
        flat = [token for doc in docs for token in tokenizer(doc).input_ids + [end]]
        total, sequence = 0.0, 32
        for start in range(0, len(flat) - 1, sequence):
            window = torch.tensor([flat[start : start + sequence + 1]])
            logits = model(window[:, :-1]).logits.double()
            total += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    text = tokenizer.decode(out, skip_special_tokens=True)
    size = sum(len(doc.encode()) for doc in docs)
    print(json.dumps({"text": text, "loss": total / (len(flat) - 1), "bytes_per_token": size / len(flat)}))


if __name__ == "__main__":
    command, arguments = sys.argv[1], sys.argv[2:]
    if command == "make":
        make(pathlib.Path(arguments[0]), pathlib.Path(arguments[1]).read_text())
    elif command == "encode":
        encode(*arguments)
    else:
        run_model(arguments[0], arguments[1], arguments[2], int(arguments[3]))
