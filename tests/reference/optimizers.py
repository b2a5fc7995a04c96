"""Golden updates of Muon and SOAP, in float64 and by the definition.

    .venv/bin/python tests/reference/optimizers.py > tests/reference/optimizers.json

Nothing here is shared with the program: weights and gradients come from a formula that the test evaluates too, every matrix is
taken by itself, and SOAP keeps its average of gradients as it is, and turns it anew at every update. Eigenvectors have any
sign, and a basis may be any where eigenvalues are equal: so squares where both sides are turned.
"""

import json
import math

import numpy as np

UPDATES = 4
LR, DECAY, BETAS, EPS = 0.02, 0.1, (0.9, 0.95), 0.05
MU = 0.95

CASES = [
    {"name": "muon", "kind": "muon", "lead": "off", "delay": 0},
    {"name": "muon, lead of the delay", "kind": "muon", "lead": "delay", "delay": 3},
    {"name": "soap", "kind": "soap", "lead": "off", "delay": 1, "sides": "both", "every": 2, "limit": 9},
    {"name": "soap, lead", "kind": "soap", "lead": "one", "delay": 1, "sides": "both", "every": 3, "limit": 9},
    {"name": "soap, old gradients", "kind": "soap", "lead": "delay", "delay": 2, "sides": "both", "every": 4, "limit": 9},
    {"name": "soap, smaller side", "kind": "soap", "lead": "off", "delay": 0, "sides": "smaller", "every": 2, "limit": 9},
    {"name": "soap, limit", "kind": "soap", "lead": "off", "delay": 0, "sides": "both", "every": 2, "limit": 3},
]

SQUARE = {"layers.1.qkv": ([12, 4], 3), "layers.1.bias": ([5], 1), "layers.2.out": ([4, 4], 1)}
OTHER = {"layers.1.up": ([5, 3], 1), "layers.1.bias": ([4], 1), "layers.1.kv": ([6, 4], 2), "layers.2.down": ([3, 5], 1), "layers.2.long": ([3, 7], 1)}


def values(seed, shape):
    """sin(seed + 12.9898 n + 0.37 n^2) for n = 0, 1, ... in row order."""
    n = np.arange(math.prod(shape), dtype=np.float64)
    return np.sin(seed + 12.9898 * n + 0.37 * n * n).reshape(shape)


def leads(case, beta):
    """c of beta, or none."""
    return {"off": None, "one": beta, "delay": beta ** max(case["delay"], 1)}[case["lead"]]


class Adamw:
    def __init__(self, case, w, decays=False):
        self.case, self.w, self.decays = case, w.copy(), decays
        self.m, self.v = np.zeros_like(w), np.zeros_like(w)

    def direction(self, n, m, v, g):
        b1, b2 = BETAS
        c = leads(self.case, b1)
        u = m / (1 - b1**n) if c is None else (c * m + (1 - c) * g) / (1 - c * b1**n)
        return u / (np.sqrt(v / (1 - b2**n)) + EPS)

    def update(self, n, g):
        b1, b2 = BETAS
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        self.w = self.w * (1 - LR * DECAY * self.decays) - LR * self.direction(n, self.m, self.v, g)


class Muon:
    def __init__(self, case, w, turn):
        self.w, self.m = w.copy(), np.zeros_like(w)
        self.c = MU ** max(case["delay"], 1) if case["lead"] == "delay" else MU

    def update(self, n, g):
        self.m = MU * self.m + (1 - MU) * g
        u = self.c * self.m + (1 - self.c) * g
        x = u / (np.sqrt((u * u).sum()) + 1e-7)
        if x.shape[0] > x.shape[1]:
            x = x.T
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        if x.shape != u.shape:
            x = x.T
        self.w = self.w * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(max(u.shape)) * x


class Soap(Adamw):
    def __init__(self, case, w, turn):
        super().__init__(case, w)
        rows, columns = w.shape
        sides = (True, True) if case["sides"] == "both" else (rows <= columns, rows > columns)
        self.turn, self.every = turn, max(1, case["every"] // max(1, case["delay"]))
        self.turned = [side and length <= case["limit"] for side, length in zip(sides, w.shape)]
        self.averages = [np.zeros((length, length)) for length in w.shape]
        self.bases = [np.eye(length) for length in w.shape]

    def update(self, n, g):
        b1, b2 = BETAS
        for side, square in enumerate((g @ g.T, g.T @ g)):
            if not self.turned[side]:
                continue
            average = self.averages[side] = b2 * self.averages[side] + (1 - b2) * square
            basis = self.bases[side]
            if n == 1:
                self.bases[side] = np.linalg.eigh(average)[1][:, ::-1]
            elif (n + self.turn + side) % self.every == 0:
                order = np.argsort(-np.diag(basis.T @ average @ basis), kind="stable")
                self.bases[side] = np.linalg.qr(average @ basis[:, order])[0]
                self.v = np.take(self.v, order, axis=side)
        left, right = self.bases
        turned = left.T @ g @ right
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * turned**2
        step = left @ self.direction(n, left.T @ self.m @ right, self.v, turned) @ right.T
        self.w = self.w * (1 - LR * DECAY) - LR * step


def run(case, shapes):
    rules, numbers = {}, {}
    for seed, (name, (shape, fused)) in enumerate(shapes.items()):
        w = values(0.5 * seed, shape)
        if len(shape) == 1:
            rules[name] = [Adamw(case, w)]
            continue
        layer = int(name.split(".")[1])
        rules[name] = []
        for part in np.split(w, fused):
            number = numbers[layer] = numbers.get(layer, -1) + 1
            rule = Muon if case["kind"] == "muon" else Soap
            rules[name].append(rule(case, part, layer + 2 * number))
    for n in range(1, UPDATES + 1):
        for seed, (name, (shape, fused)) in enumerate(shapes.items()):
            g = values(100.0 * n + seed, shape) * (1 if n != 2 else -0.5)
            for rule, part in zip(rules[name], np.split(g, fused)):
                rule.update(n, part)
    weights = {name: np.concatenate([rule.w for rule in rules[name]]).ravel().tolist() for name in shapes}
    return {name: [float(f"{value:.10g}") for value in row] for name, row in weights.items()}


def main():
    cases = []
    for case in CASES:
        square = case["kind"] == "soap" and case["sides"] == "both" and case["limit"] >= 4
        shapes = SQUARE if square else OTHER
        parameters = [{"name": name, "shape": shape, "fused": fused} for name, (shape, fused) in shapes.items()]
        cases.append({**case, "parameters": parameters, "weights": run(case, shapes)})
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
