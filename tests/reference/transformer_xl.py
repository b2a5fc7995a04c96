"""Golden values of one Transformer-XL layer, in float64 and by the definition: one loop over every query and key.

    .venv/bin/python tests/reference/transformer_xl.py > tests/reference/transformer_xl.json

Nothing here is shared with the program: inputs and weights come from a formula that the test evaluates too, the scores
from `d = i + M - j` as in Dai et al. 2019, eq. (4) of section 3.3, gradients from autograd over that.
"""

import json
import math

import torch

B, T, D, H, F = 2, 4, 8, 2, 12
LN_EPS = 1e-5


def shapes(A):
    """Of a layer whose heads are A wide together."""
    return {
        "norm1.weight": [D], "norm1.bias": [D],
        "attention.query.weight": [A, D], "attention.key_value.weight": [2 * A, D], "attention.position.weight": [A, D],
        "attention.content_bias": [A], "attention.position_bias": [A], "attention.out.weight": [D, A],
        "norm2.weight": [D], "norm2.bias": [D],
        "mlp.up.weight": [F, D], "mlp.up.bias": [F], "mlp.down.weight": [D, F], "mlp.down.bias": [D],
    }


CASES = [
    {"name": "post", "memory": 6, "pre": False, "clamp": None, "same_length": 0, "d_head": 4},
    {"name": "pre", "memory": 6, "pre": True, "clamp": None, "same_length": 0, "d_head": 4},
    {"name": "no memory", "memory": 0, "pre": False, "clamp": None, "same_length": 0, "d_head": 4},
    {"name": "clamped, same length", "memory": 5, "pre": False, "clamp": 3, "same_length": 5, "d_head": 4},
    {"name": "narrow heads", "memory": 6, "pre": True, "clamp": None, "same_length": 0, "d_head": 3},
    {"name": "wide heads", "memory": 6, "pre": False, "clamp": None, "same_length": 0, "d_head": 5},
]


def values(seed, shape, requires_grad=True):
    """0.4 sin(seed + 12.9898 n) for n = 0, 1, ... in row order."""
    count = math.prod(shape)
    data = [0.4 * math.sin(seed + 12.9898 * n) for n in range(count)]
    return torch.tensor(data, dtype=torch.float64).view(shape).requires_grad_(requires_grad)


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + LN_EPS) * weight + bias


def sinusoid(distance):
    half = D // 2
    angles = [distance / 10000 ** (2 * i / D) for i in range(half)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def attention(p, case, x, context):
    m, W = context.shape[1] - T, case["d_head"]
    keys = context @ p["attention.key_value.weight"][:H * W].T
    vals = context @ p["attention.key_value.weight"][H * W:].T
    queries = x @ p["attention.query.weight"].T
    rows = []
    for b in range(B):
        for i in range(T):
            heads = []
            for h in range(H):
                cut = slice(h * W, (h + 1) * W)
                q = queries[b, i, cut]
                u, v = p["attention.content_bias"][cut], p["attention.position_bias"][cut]
                scores, seen = [], []
                for j in range(m + T):
                    d = i + m - j
                    if d < 0 or (case["same_length"] and d >= case["same_length"]):
                        continue
                    r = p["attention.position.weight"] @ sinusoid(min(d, case["clamp"]) if case["clamp"] is not None else d)
                    scores.append(((q + u) @ keys[b, j, cut] + (q + v) @ r[cut]) / math.sqrt(W))
                    seen.append(j)
                share = torch.softmax(torch.stack(scores), 0)
                heads.append(sum(s * vals[b, j, cut] for s, j in zip(share, seen)))
            rows.append(torch.cat(heads))
    return torch.stack(rows).view(B, T, H * W) @ p["attention.out.weight"].T


def mlp(p, x):
    inner = torch.clamp(x @ p["mlp.up.weight"].T + p["mlp.up.bias"], min=0)
    return inner @ p["mlp.down.weight"].T + p["mlp.down.bias"]


def layer(p, case, x, memory):
    context = torch.cat([memory, x], 1)
    norm1 = lambda y: layer_norm(y, p["norm1.weight"], p["norm1.bias"])
    norm2 = lambda y: layer_norm(y, p["norm2.weight"], p["norm2.bias"])
    if case["pre"]:
        x = x + attention(p, case, norm1(x), norm1(context))
        return x + mlp(p, norm2(x))
    x = norm1(x + attention(p, case, x, context))
    return norm2(x + mlp(p, x))


def main():
    out = []
    for number, case in enumerate(CASES):
        every = shapes(H * case["d_head"]).items()
        p = {name: values(1.0 + n + 0.1 * number, shape) for n, (name, shape) in enumerate(every)}
        x = values(0.3 + number, [B, T, D])
        memory = values(0.7 + number, [B, case["memory"], D], requires_grad=False)
        y = layer(p, case, x, memory)
        (y * values(0.9 + number, [B, T, D], requires_grad=False)).sum().backward()
        flat = lambda t: [float(f"{v:.12g}") for v in t.detach().flatten().tolist()]
        gradients = {name: flat(w.grad) for name, w in p.items()}
        out.append({**case, "output": flat(y), "input_gradient": flat(x.grad), "gradients": gradients})
    print(json.dumps(out))


main()
