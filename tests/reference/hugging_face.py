"""What `transformers` makes of small models with random weights, for tests/integration/hugging_face.rs.

    python tests/reference/hugging_face.py make FOLDER [CASE...]

writes for every case FOLDER/CASE/model (a folder as `save_pretrained` writes it) and FOLDER/CASE/expected.json with
tokens, logits, the greedy continuation of prompts, and the losses of AdamW over the batches in FOLDER/batches.json.

    python tests/reference/hugging_face.py losses TEXT SEQUENCE MODEL...

prints the mean loss of each folder's model over the windows of a text, a byte a token.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

VOCABULARY = 256
ROWS, TOKENS = 4, 24

LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=72,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=24,
    max_position_embeddings=256,
    initializer_range=0.15,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
GPT2 = dict(
    vocab_size=VOCABULARY,
    n_embd=72,
    n_layer=4,
    n_head=9,
    n_positions=256,
    initializer_range=0.15,
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)

# Name -> config, type of the weights, and bytes of a shard.
CASES = {
    "llama": (LlamaConfig(**LLAMA, rope_parameters=dict(rope_type="default", rope_theta=10000.0)), "float32", None),
    "llama-tied-llama3": (
        LlamaConfig(**{**LLAMA, "tie_word_embeddings": True}, rope_parameters=LLAMA3),
        "float32",
        "100KB",
    ),
    "llama-linear-biases": (
        LlamaConfig(
            **LLAMA,
            attention_bias=True,
            rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=4.0),
        ),
        "float32",
        None,
    ),
    "llama-bf16": (LlamaConfig(**LLAMA), "bfloat16", "100KB"),
    "llama-f16": (LlamaConfig(**{**LLAMA, "num_key_value_heads": 9}), "float16", None),
    "mistral": (MistralConfig(**LLAMA, sliding_window=None), "float32", None),
    "qwen2": (Qwen2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, head_dim=8), "float32", None),
    "qwen3": (Qwen3Config(**LLAMA), "float32", None),
    "qwen3-tied": (Qwen3Config(**{**LLAMA, "tie_word_embeddings": True, "head_dim": 16}), "float32", None),
    "gpt2": (GPT2Config(**GPT2), "float32", None),
    "gpt2-untied": (GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=100), "float32", "100KB"),
}


def spread(model):
    """Biases and the weights of normalisations too are other than they begin with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def cross_entropy(model, tokens, targets, reduction="mean"):
    logits = model(tokens).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def steps(model, batches):
    """Losses of AdamW as ouroboros has it: decay of matrices only, one rate, no clipping."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for batch in batches:
        tokens, targets = torch.tensor(batch["tokens"]), torch.tensor(batch["targets"])
        loss = cross_entropy(model, tokens, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def make(folder, name):
    config, dtype, shard = CASES[name]
    torch.manual_seed(sorted(CASES).index(name))
    model = AutoModelForCausalLM.from_config(config).eval()
    spread(model)
    model = model.to(getattr(torch, dtype))
    where = folder / name
    size = dict(max_shard_size=shard) if shard else {}
    model.save_pretrained(where / "model", **size)

    # Read again, and in f32 from here on: what is saved is what is compared.
    model = AutoModelForCausalLM.from_pretrained(where / "model", dtype=torch.float32).eval()
    tokens = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(tokens).logits
        greedy = []
        for length in (5, 11, 11):
            prompt = tokens[len(greedy) : len(greedy) + 1, :length]
            mask = torch.ones_like(prompt)
            text = model.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
            greedy.append(dict(prompt=prompt[0].tolist(), continuation=text[0, length:].tolist()))
    expected = dict(
        tokens=tokens.flatten().tolist(),
        logits=logits.flatten().tolist(),
        greedy=greedy,
        losses=steps(model.train(), json.loads((folder / "batches.json").read_text())),
    )
    (where / "expected.json").write_text(json.dumps(expected))


def losses(text, sequence, models):
    tokens = torch.tensor(list(pathlib.Path(text).read_bytes()))
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(tokens) - 1, sequence):
                targets = tokens[start + 1 : start + 1 + sequence]
                window = tokens[start : start + len(targets)]
                total += cross_entropy(model, window[None], targets, reduction="sum").item()
        print(f"{total / (len(tokens) - 1):.9f}", folder)


def main():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    match sys.argv[1:]:
        case ["make", folder, *names]:
            for name in names or CASES:
                make(pathlib.Path(folder), name)
        case ["losses", text, sequence, *models]:
            losses(text, int(sequence), models)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
