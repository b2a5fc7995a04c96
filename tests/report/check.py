"""What runs leave to be looked at, read by tools that nobody here wrote. scripts/test-report.sh calls it.

    python tests/report/check.py trace FILE           a trace, by JSON Schema and by what must be true of it
    python tests/report/check.py tensorboard RUN      the event file, by TensorBoard's reader: every number of metrics.jsonl
    python tests/report/check.py prometheus RUN       metrics.prom, by Prometheus' parser
    python tests/report/check.py page HTML PICTURES   the report, by Chromium: no network, no error, marks in their frames, values on hover;
                                                      with a further word only light on a desktop, dark on a phone
"""

import base64
import collections
import gzip
import json
import math
import pathlib
import shutil
import struct
import sys

HERE = pathlib.Path(__file__).parent


def trace(path):
    import jsonschema

    whole = unpacked(path)
    jsonschema.validate(whole, json.loads((HERE / "trace.schema.json").read_text()))
    print("trace: " + holds(whole))


def unpacked(path):
    return json.loads(gzip.decompress(pathlib.Path(path).read_bytes()))


def holds(whole):
    """What must be true of every trace; what it has, in words."""
    events = whole["traceEvents"]

    # No lane does two things at once; of the compute lanes every moment of a step is somebody's.
    lanes = collections.defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            lanes[event["pid"], event["tid"]].append((begin, begin + round(event["dur"] * 1000), event))
    steps = 0
    for (pid, tid), slices in lanes.items():
        slices.sort(key=lambda slice: slice[:2])
        for before, after in zip(slices, slices[1:]):
            assert before[1] <= after[0], f"overlap on {pid}/{tid}: {before} {after}"
        if tid % 4 == 0:
            ends = [end for _, end, event in slices if event["name"] == "update"]
            for begin, end in zip(ends, ends[1:]):
                covered = sum(max(0, min(b, end) - max(a, begin)) for a, b, _ in slices)
                assert covered > 0.99 * (end - begin), f"{covered} of {end - begin} ns on {pid}/{tid}"
                steps += 1

    # Every arrow has both ends, each within a slice of its lane, and goes forward.
    arrows = collections.defaultdict(dict)
    for event in events:
        if event["ph"] in "stf":
            assert event["ph"] not in arrows[event["id"]], f"two ends of one kind: {event}"
            arrows[event["id"]][event["ph"]] = event
    for ends in arrows.values():
        assert {"s", "f"} <= set(ends), f"an arrow with one end: {ends}"
        assert ends["s"]["ts"] <= ends["f"]["ts"], f"an arrow that goes back: {ends}"
        for end in ends.values():
            at = round(end["ts"] * 1000)
            assert any(a <= at <= b for a, b, _ in lanes[end["pid"], end["tid"]]), f"an end in no slice: {end}"

    assert steps > 0 and arrows, f"{steps} steps covered, {len(arrows)} arrows"
    assert not any("overlap_us" in event.get("args", {}) for event in events if event.get("tid", 0) % 4 == 0)
    names = {(event["pid"], event.get("tid")) for event in events if event["ph"] == "M"}
    assert all(lane in names for lane in lanes), "a lane without a name"
    return f"{len(events)} events on {len(lanes)} lanes, {steps} steps covered, {len(arrows)} arrows; {whole['otherData']['clocks']}"


def as_f32(value):
    """What a number is in single precision; a word for what is none, which metrics.jsonl has as null."""
    number = struct.unpack("f", struct.pack("f", math.nan if value is None else value))[0]
    return number if math.isfinite(number) else "not finite"


def lines(run):
    return [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]


def tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    reader = EventAccumulator(str(run), size_guidance={"scalars": 0})
    reader.Reload()
    expected = collections.defaultdict(list)
    for line in lines(run):
        step = line["step"]
        if "staleness" in line:
            for of in line["staleness"]:
                name = f"stage {of['stage']}" if isinstance(of["stage"], int) else of["stage"]
                numbers = {key: value for key, value in of.items() if key not in ("stage", "roles", "role_distances")}
                for key, roles in (("relative", "roles"), ("distance", "role_distances")):
                    numbers |= {f"{key}/{role}": value for role, value in of.get(roles, {}).items()}
                for key, value in numbers.items():
                    expected[f"staleness/{key}/{name}"].append((step, value))
        elif "eval_loss" in line:
            for key in ("loss", "bpc", "ppl", "bpb"):
                if f"eval_{key}" in line:
                    expected[f"eval/{key}"].append((step, line[f"eval_{key}"]))
        else:
            for key in ("loss", "lr", "tokens", "tokens_per_s", "step_s"):
                expected[key].append((step, line[key]))
            for stage, norm in enumerate(line["grad_norm"]):
                expected[f"grad_norm/stage {stage}"].append((step, norm))
            if "table_norm" in line:
                expected["grad_norm/table"].append((step, line["table_norm"]))
    found = {tag for tag in reader.Tags()["scalars"] if not tag.startswith(("time/", "memory_mib/"))}
    assert found == set(expected), f"tags {sorted(found ^ set(expected))} are in one of both only"
    for tag, points in expected.items():
        scalars = [(event.step, as_f32(event.value)) for event in reader.Scalars(tag)]
        assert scalars == [(step, as_f32(value)) for step, value in points], f"{tag} is another in TensorBoard"
    shares = [tag for tag in reader.Tags()["scalars"] if tag.startswith("time/")]
    assert shares, "no shares of time"

    settings = reader.PluginTagToContent("hparams")
    data = plugin_data_pb2.HParamsPluginData.FromString(settings["_hparams_/session_start_info"])
    hparams = data.session_start_info.hparams
    assert hparams["optimizer.lr"].number_value > 0 and hparams["grid.stages"].number_value >= 1, hparams
    print(f"tensorboard: {len(expected)} curves of {len(expected['loss'])} steps equal metrics.jsonl, {len(hparams)} settings")


def prometheus(run):
    from prometheus_client.parser import text_string_to_metric_families

    text = (pathlib.Path(run) / "metrics.prom").read_text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {sample.name: sample.value for sample in samples if "stage" not in sample.labels}
    steps = [line for line in lines(run) if "loss" in line]
    for name, key in [("step", "step"), ("loss", "loss"), ("learning_rate", "lr"), ("tokens", "tokens")]:
        assert values[f"ouroboros_{name}"] == steps[-1][key], f"{name}: {values[f'ouroboros_{name}']} is not {steps[-1][key]}"
    for sample in samples:
        assert {"run"} <= set(sample.labels) <= {"run", "stage", "replica", "kind"}, sample
    norms = {sample.labels["stage"]: sample.value for sample in samples if sample.name == "ouroboros_gradient_norm"}
    for stage, norm in enumerate(steps[-1]["grad_norm"]):
        assert norms[str(stage)] == norm
    shares = collections.Counter()
    for sample in samples:
        if sample.name == "ouroboros_time_share":
            shares[sample.labels["stage"], sample.labels["replica"]] += sample.value
    assert shares and all(abs(share - 1) < 0.02 for share in shares.values()), shares
    print(f"prometheus: {len(samples)} samples, shares of {len(shares)} ranks")


MARKS = """
const svg = arguments[0];
const outside = [], size = svg.viewBox.baseVal, frame = svg.getBoundingClientRect();
const marks = [...svg.querySelectorAll('polyline, circle, rect, line, text')];
for (const mark of marks) {
  const box = mark.getBoundingClientRect(), slack = 1.5;
  if (box.left < frame.left - slack || box.right > frame.right + slack || box.top < frame.top - slack || box.bottom > frame.bottom + slack)
    outside.push(mark.outerHTML.slice(0, 120));
}
return [marks.length, outside, size.width, size.height];
"""


# Words of a chart that stand on each other.
TEXTS = """
const texts = [...arguments[0].querySelectorAll('text')].map(text => [text.textContent.trim(), text.getBoundingClientRect()]);
const found = [];
texts.forEach(([name, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
  const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left), high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (name && other && wide > 1 && high > 3) found.push([name, other]);
}));
return found;
"""


# Scrolls a chart that is wider than the screen to a share of its width, and says where it is then.
PLACED = """
const svg = arguments[0], room = svg.closest('.scroll');
room.scrollLeft = arguments[1] * svg.getBoundingClientRect().width - room.clientWidth / 2;
const box = svg.getBoundingClientRect();
return [box.left, box.top, box.width, box.height];
"""


def page(path, pictures, few=None):
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    path, pictures = pathlib.Path(path).resolve(), pathlib.Path(pictures)
    pictures.mkdir(parents=True, exist_ok=True)
    text = path.read_text()
    for address in ("http://", "https://"):
        outside = [part[:60] for part in text.split(address)[1:] if not part.startswith("www.w3.org/")]
        assert not outside, f"the page names {address}{outside[0]}"

    charts = 0
    for width, height, name in [(1280, 900, "desktop"), (390, 844, "phone")]:
        for scheme in ("light", "dark"):
            if few and (name == "phone") != (scheme == "dark"):
                continue
            options = webdriver.ChromeOptions()
            for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"):
                options.add_argument(flag)
            options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
            options.binary_location = shutil.which("chromium")
            driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
            try:
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"})
                driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": name == "phone"})
                driver.get(path.as_uri())
                ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
                bright = sum(int(part) for part in ground[4:-1].split(",")[:3]) > 384
                assert bright == (scheme == "light"), f"{ground} in {scheme}"
                assert driver.execute_script("return document.documentElement.scrollWidth") <= width, f"wider than {name}"

                figures = driver.find_elements(By.CSS_SELECTOR, "figure[data-chart]")
                assert len(figures) >= 6, f"{len(figures)} charts"
                charts = len(figures)
                for figure in figures:
                    check_chart(driver, figure, By, name == "phone")
                whole = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
                (pictures / f"report-{name}-{scheme}.png").write_bytes(base64.b64decode(whole["data"]))
                errors = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
                assert not errors, errors
                asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
                urls = [of["params"]["request"]["url"] for of in asked if of["method"] == "Network.requestWillBeSent"]
                assert all(url.startswith(("file:", "data:")) for url in urls), urls
            finally:
                driver.quit()
    print(f"page: {charts} charts at two widths, light and dark; {len(text) // 1024} KiB; pictures in {pictures}")


def check_chart(driver, figure, by, touch):
    svg = figure.find_element(by.TAG_NAME, "svg")
    title = figure.find_element(by.TAG_NAME, "h3").text
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    marks, outside, width, height = driver.execute_script(MARKS, svg)
    assert marks > 3 and not outside, f"{title}: {marks} marks, outside of the frame {outside[:3]}"
    overlapping = driver.execute_script(TEXTS, svg)
    assert not overlapping, f"{title}: texts on each other: {overlapping[:3]}"
    curves, dots = driver.execute_script("const s = arguments[0]; return ['polyline', 'circle'].map(of => s.querySelectorAll(of).length)", svg)

    # The values on hover are those of the data at that point.
    data = json.loads(driver.execute_script("return document.getElementById(arguments[0].dataset.chart).textContent", figure))
    if "series" in data:
        series = next(of for of in data["series"] if of["points"])
        assert curves + dots >= len(data["series"]), f"{title}: {curves} curves and {dots} dots of {len(data['series'])} series"
        x, y = series["points"][len(series["points"]) // 2]
        at = data["x"]
        place = at["left"] + (x - at["from"]) / (at["to"] - at["from"]) * (at["right"] - at["left"])
        middle = (data["y"]["top"] + data["y"]["bottom"]) / 2
        expected = f"{series['name']}: {short(y)}"
    else:
        mark = max(data["marks"], key=lambda mark: mark["box"][3] - mark["box"][1])
        box = mark["box"]
        place, middle, expected = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, mark["text"]
    frame = driver.execute_script(PLACED, svg, place / width)
    dx, dy = frame[0] + place / width * frame[2], frame[1] + middle / height * frame[3]
    if touch:
        # A finger leaves at once; what it has touched stays to be read.
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": dx, "y": dy}]})
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    else:
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": dx, "y": dy})
    tip = driver.execute_script("const t = document.getElementById('tip'); return t.style.display === 'block' ? t.textContent : ''")
    told = [line.split("  (")[0] for line in tip.split("\n")]
    assert expected in told, f"{title}: `{tip}` on hover, expected `{expected}`"

    # Its numbers are a table.
    rows = driver.execute_script(
        "const d = arguments[0].querySelector('details'); d.open = true; return new Promise(r => setTimeout(() => { const n = d.querySelector('table').rows.length; d.open = false; r(n); }, 60))",
        figure,
    )
    wanted = 1 + (sum(len(of["points"]) for of in data["series"]) if "series" in data else len(data["rows"]))
    assert rows == wanted, f"{title}: a table of {rows} rows, expected {wanted}"


def short(value):
    """As the page's script writes a number: six digits."""
    rounded = float(f"{value:.6g}")
    if rounded == int(rounded) and abs(rounded) < 1e15:
        return str(int(rounded))
    return repr(rounded) if math.fabs(rounded) >= 1e-6 else f"{rounded:.6g}"


if __name__ == "__main__":
    {"trace": trace, "tensorboard": tensorboard, "prometheus": prometheus, "page": page}[sys.argv[1]](*sys.argv[2:])
