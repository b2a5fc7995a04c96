"""Measures how the sources read: lengths, density, pauses, documentation. Prints a table; compares nothing.

    python3 scripts/measure.py [FOLDER]...      default: src
"""

import os
import re
import statistics
import sys

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[A-Za-z_]\w*|\d[\w.]*|[^\s\w]')
FUNCTION = re.compile(r"^\s*(?:pub(?:\([\w: ]+\))? )?(?:const )?(?:async )?(?:unsafe )?(?:extern \"C\" )?fn (\w+)")
LONG = 25


def sources(folders):
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in sorted(names):
                if name.endswith(".rs"):
                    with open(os.path.join(place, name)) as file:
                        yield os.path.join(place, name), file.read().splitlines()


def without_tests(lines):
    """The lines above the unit tests; a file of nothing but tests has none."""
    at = next((n for n, line in enumerate(lines) if line.strip() == "#[cfg(test)]" and n + 1 < len(lines) and "mod " in lines[n + 1]
               and lines[n + 1].rstrip().endswith("{")), len(lines))
    return lines[:at]


def bare(line):
    """A line without strings, characters and comments, for counting braces."""
    line = re.sub(r'"(?:\\.|[^"\\])*"', '""', line)
    line = re.sub(r"'(?:\\.|[^'\\])'", "' '", line)
    return line.split("//")[0]


def functions(lines):
    """Name, lines and parameters of every function that has a body."""
    n = 0
    while n < len(lines):
        match = FUNCTION.match(lines[n])
        if not match:
            n += 1
            continue
        depth, opened, end = 0, False, n
        while end < len(lines):
            text = bare(lines[end])
            depth += text.count("{") - text.count("}")
            opened |= "{" in text
            if opened and depth <= 0 or (not opened and text.rstrip().endswith(";")):
                break
            end += 1
        if opened:
            yield match.group(1), lines[n : end + 1]
        n = end + 1 if opened and end - n < 2 else n + 1


def is_comment(line):
    return line.strip().startswith("//")


def of(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0


def percent(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "-"


def main():
    folders = sys.argv[1:] or ["src"]
    lengths, tokens, file_lengths, widths = [], [], [], []
    blank = body = silent = long = wide = 0
    docs = comments = code = unwraps = unsafe = reasons = empty_errors = tuples = lets = closures = 0
    for path, lines in sources(folders):
        if path.endswith(("/tests.rs", "/deadlock.rs", "/reference.rs")):
            continue
        lines = without_tests(lines)
        file_lengths.append(len(lines))
        for n, line in enumerate(lines):
            text = line.strip()
            widths.append(len(line))
            wide += len(line) > 120
            docs += text.startswith(("///", "//!"))
            comments += text.startswith("//") and not text.startswith(("///", "//!"))
            code += bool(text)
            unwraps += len(re.findall(r"\.unwrap\(\)|\.expect\(\"|\bpanic!\(", bare(line) if '"' not in line else line))
            if re.search(r"\bunsafe (\{|impl)", bare(line)):
                unsafe += 1
                reasons += any("SAFETY" in before for before in lines[max(0, n - 12) : n + 1])
            lets += bool(re.match(r"let ", text))
            tuples += bool(re.match(r"let \((?:mut )?\w+, ", text)) and ") = (" in text
            closures += bool(re.match(r"let \w+ = (?:move )?\|", text))
            empty_errors += text == "/// # Errors" and bool(re.match(r"\s*/// (What|Those|That)[^`\[]*\.$", lines[n + 1]))
        for _, found in functions(lines):
            lengths.append(len(found))
            inner = found[1:-1]
            body += len(inner)
            blank += sum(not line.strip() for line in inner)
            for line in inner:
                if line.strip() and not is_comment(line):
                    tokens.append(len(TOKEN.findall(line.split(" // ")[0])))
            if len(found) >= LONG:
                long += 1
                silent += not any(not line.strip() or is_comment(line) for line in inner)

    rows = [
        ("functions", len(lengths)),
        ("function lines p50 / p90 / max", f"{of(lengths, .5)} / {of(lengths, .9)} / {max(lengths)}"),
        ("functions over 50 lines, over 64", f"{sum(n > 50 for n in lengths)}, {sum(n > 64 for n in lengths)}"),
        ("tokens a line p50 / p90 (mean)", f"{of(tokens, .5)} / {of(tokens, .9)} ({statistics.mean(tokens):.1f})"),
        ("blank lines in bodies", percent(blank, body)),
        (f"functions of {LONG} lines or more without blank or comment", percent(silent, long)),
        ("line length p90; lines over 120", f"{of(widths, .9)}; {wide}"),
        ("named closures, tuples of lets", f"{percent(closures, lets)}, {percent(tuples, lets)}"),
        ("file lines before tests p50 / p90 / max", f"{of(file_lengths, .5)} / {of(file_lengths, .9)} / {max(file_lengths)}"),
        ("documentation, plain comments", f"{percent(docs, code)}, {percent(comments, code)}"),
        ("`# Errors` that say nothing", empty_errors),
        ("unwrap, expect, panic", unwraps),
        ("unsafe blocks (with a reason)", f"{unsafe} ({reasons})"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
