"""The Transformer of `src/model/`, in PyTorch's own modules and calls: pre-LN blocks, learned positions, GELU, fused causal
attention, an output matrix of its own (pipelining libraries cannot tie it). Parameters are called as in saved weights.
"""

import json
import math
import struct

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        d = model["d_model"]
        self.norm1 = nn.LayerNorm(d)
        self.attention = Attention(d, model["heads"])
        self.norm2 = nn.LayerNorm(d)
        self.mlp = Mlp(d, model["d_ff"])

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Embedding(nn.Module):
    def __init__(self, vocabulary, model, sequence):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocabulary, model["d_model"]))
        self.positions = nn.Parameter(torch.empty(sequence, model["d_model"]))

    def forward(self, tokens):
        return F.embedding(tokens, self.tokens) + self.positions[: tokens.shape[1]]


class Head(nn.Module):
    def __init__(self, vocabulary, model):
        super().__init__()
        self.norm = nn.LayerNorm(model["d_model"])
        self.weight = nn.Parameter(torch.empty(vocabulary, model["d_model"]))

    def forward(self, x):
        return F.linear(self.norm(x), self.weight)


class Part(nn.Module):
    """Blocks `first` to `past` of the model, with the embedding and the head where they belong."""

    def __init__(self, model, sequence, first, past, vocabulary=256):
        super().__init__()
        self.embedding = Embedding(vocabulary, model, sequence) if first == 0 else None
        self.layers = nn.ModuleDict({str(l): Block(model) for l in range(first, past)})
        self.head = Head(vocabulary, model) if past == model["layers"] else None

    def forward(self, x):
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.layers.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def loss(logits, targets):
    """Mean cross-entropy, nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer(module, settings):
    """AdamW with decay on matrices only; PyTorch's fused form, the fastest it has on a CPU."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"], fused=True)


def load(module, files):
    """Fills the parameters of `module` from safetensors files."""
    values = {}
    for path in files:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header, data = json.loads(file.read(length)), file.read()
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                flat = torch.frombuffer(bytearray(data[start:end]), dtype=torch.float32)
                assert flat.numel() == math.prod(entry["shape"]), name
                values[name] = flat.view(entry["shape"])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])


class Streams:
    """Rows of a text as `data.order = "streams"` reads them: row b goes through part b, a segment a step."""

    def __init__(self, path, rows, sequence, held_out):
        with open(path, "rb") as file:
            text = file.read()
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) - round(len(text) * held_out)]
        self.rows, self.sequence = rows, sequence
        self.segments = (len(self.text) - 1) // rows // sequence

    def batch(self, step, rows):
        """Tokens and targets [rows, T] of the given rows of a step's batch."""
        part, segment = (len(self.text) - 1) // self.rows, step % self.segments
        starts = [row * part + segment * self.sequence for row in rows]
        window = torch.stack([self.text[start : start + self.sequence + 1] for start in starts]).long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()
