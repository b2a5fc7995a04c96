"""Tokens/s of runs FOLDER/NAME-VARIANT-ROUND, medians over the rounds, and ratios to the first variant.

    python3 scripts/rates.py FOLDER ROUNDS NAME VARIANT...
"""

import json
import os
import platform
import statistics
import sys

folder, rounds, name, variants = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]


def rate(variant, n):
    """Tokens of a step over the mean time of the steps, the first quarter left out."""
    with open(os.path.join(folder, f"{name}-{variant}-{n}", "metrics.jsonl")) as file:
        steps = [line for line in map(json.loads, file) if "loss" in line]
    steps = steps[len(steps) // 4:]
    return steps[0]["tokens_per_s"] * steps[0]["step_s"] * len(steps) / sum(line["step_s"] for line in steps)


with open("/proc/cpuinfo") as file:
    model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
rates = {variant: [rate(variant, n) for n in range(1, rounds + 1)] for variant in variants}
base = statistics.median(rates[variants[0]])
print(f"{name}: {model}, {os.cpu_count()} cores, {rounds} rounds, medians")
print(f"{'':>8} {'tokens/s':>10} {'spread':>15} {'over ' + variants[0]:>14}")
for variant, values in rates.items():
    middle = statistics.median(values)
    print(f"{variant:>8} {middle:>10,.0f} {min(values):>7,.0f}-{max(values):<7,.0f} {middle / base:>14.3f}")
