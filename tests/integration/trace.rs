//! Traces: every action of every place in the window, once; lanes that are busy with one thing at a time and whose
//! moments are somebody's; arrows with both ends; asked for by a file; a disk that is full.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use std::process::Command;

use flate2::read::GzDecoder;
use ouroboros::schedule::Pass;
use ouroboros::setup::Setup;
use serde_json::Value;

use crate::harness::{Folder, LIMIT, TINY, mpirun, ouroboros, run, setup_of, slices};

/// From when to when, in nanoseconds, and the event.
type Slice<'a> = (u64, u64, &'a Value);

/// The events of a trace.
struct Trace {
    other: Value,
    events: Vec<Value>,
}

impl Trace {
    fn read(path: &Path) -> Trace {
        let file =
            std::fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut text = String::new();
        GzDecoder::new(file).read_to_string(&mut text).unwrap();
        let mut whole: Value = serde_json::from_str(&text).unwrap();
        let Value::Array(events) = whole["traceEvents"].take() else { panic!("no events") };
        Trace { other: whole["otherData"].take(), events }
    }

    fn of<'a>(&'a self, phase: &'a str) -> impl Iterator<Item = &'a Value> {
        self.events.iter().filter(move |event| event["ph"] == phase)
    }

    /// The slices of every lane, in order: from, to, nanoseconds.
    fn lanes(&self) -> BTreeMap<(u64, u64), Vec<Slice<'_>>> {
        let mut lanes: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for slice in self.of("X") {
            let [pid, tid] = ["pid", "tid"].map(|key| slice[key].as_u64().unwrap());
            let [ts, dur] =
                ["ts", "dur"].map(|key| (slice[key].as_f64().unwrap() * 1e3).round() as u64);
            lanes.entry((pid, tid)).or_default().push((ts, ts + dur, slice));
        }
        lanes.values_mut().for_each(|slices| slices.sort_by_key(|(from, to, _)| (*from, *to)));
        lanes
    }

    /// What must be true of every trace.
    fn check(&self, setup: &Setup, from: usize, to: usize) {
        self.check_actions(setup, from, to);
        self.check_lanes(from, to);
        self.check_arrows(setup);
    }

    /// Every action of the steps is there once.
    fn check_actions(&self, setup: &Setup, from: usize, to: usize) {
        let steps = from..to;
        let mut found: BTreeMap<(u64, String), usize> = BTreeMap::new();
        let waits = |slice: &Value| slice["name"].as_str().unwrap().starts_with("wait for");
        for slice in
            self.of("X").filter(|slice| slice["tid"].as_u64().unwrap() % 4 == 0 && !waits(slice))
        {
            if let Some(action) = slice["args"]["action"].as_str() {
                *found.entry((slice["pid"].as_u64().unwrap(), action.to_owned())).or_default() += 1;
            }
        }

        assert!(found.values().all(|times| *times == 1), "{found:?}");
        for place in setup.grid.places() {
            for action in setup.schedule.actions(place.stage) {
                let key = (place.replica as u64, action.to_string());
                if steps.contains(&action.step) && action.pass == Pass::Train {
                    assert!(found.contains_key(&key), "{key:?} is not in the trace");
                }
            }
        }
    }

    /// A lane does one thing at a time; of the compute lane every moment is somebody's, from step to step.
    fn check_lanes(&self, from: usize, to: usize) {
        for ((pid, tid), slices) in self.lanes() {
            for pair in slices.windows(2) {
                assert!(pair[0].1 <= pair[1].0, "replica {pid}, lane {tid}: {pair:?}");
            }

            if tid % 4 != 0 {
                continue;
            }
            let updates: Vec<u64> = slices
                .iter()
                .filter(|(.., slice)| slice["name"] == "update")
                .filter(|(.., slice)| {
                    (from..to).contains(&(slice["args"]["step"].as_u64().unwrap() as usize))
                })
                .map(|(_, to, _)| *to)
                .collect();
            assert_eq!(updates.len(), to - from, "replica {pid}, lane {tid}");
            for step in updates.windows(2) {
                let within = |(from, to, _): &(u64, u64, &Value)| {
                    to.min(&step[1]).saturating_sub(*from.max(&step[0]))
                };
                let covered: u64 = slices.iter().map(within).sum();
                let whole = step[1] - step[0];
                assert!(
                    covered as f64 > 0.99 * whole as f64,
                    "replica {pid}, lane {tid}: {covered} of {whole} ns"
                );
            }
        }
    }

    /// Every arrow has both ends, within slices, and does not go back.
    fn check_arrows(&self, setup: &Setup) {
        let (starts, finishes) = (self.arrows("s"), self.arrows("f"));
        assert_eq!(starts.len(), self.of("s").count());
        assert_eq!(starts.keys().collect::<Vec<_>>(), finishes.keys().collect::<Vec<_>>());
        assert_eq!(setup.grid.stages > 1, !starts.is_empty());
        let messages = self.messages();
        assert!(starts.len() >= messages, "{} arrows of {messages} messages", starts.len());
        let lanes = self.lanes();
        for (start, finish) in starts.values().zip(finishes.values()) {
            assert!(start["ts"].as_f64() <= finish["ts"].as_f64(), "{start} {finish}");
            for end in [start, finish] {
                let key = (end["pid"].as_u64().unwrap(), end["tid"].as_u64().unwrap());
                let at = (end["ts"].as_f64().unwrap() * 1e3).round() as u64;
                let within = lanes[&key].iter().any(|(from, to, _)| (*from..=*to).contains(&at));
                assert!(within, "{end} is in no slice");
            }
        }
        // Those that travel when the window ends are not there.
        let transfers: BTreeSet<u64> = self.of("t").map(|of| of["id"].as_u64().unwrap()).collect();
        assert!(transfers.iter().all(|id| starts.contains_key(id)));
        assert!(2 * transfers.len() >= starts.len(), "{} of {}", transfers.len(), starts.len());
        let on_compute = |slice: &&Value| slice["tid"].as_u64().unwrap().is_multiple_of(4);
        assert!(
            self.of("X").filter(on_compute).all(|slice| slice["args"].get("overlap_us").is_none())
        );
    }

    /// Messages between neighbours of which both ends are in the window.
    fn messages(&self) -> usize {
        let ends = |word: &str, beside: [i64; 2]| -> BTreeSet<(u64, i64, bool, u64, u64)> {
            let of = |slice: &Value| {
                let (name, tid) = (slice["name"].as_str()?, slice["tid"].as_u64()?);
                let activation = name == format!("{word} activation");
                let whole = activation || name == format!("{word} gradient");
                let sender = (tid / 4) as i64 + beside[usize::from(!activation)];
                let args = &slice["args"];
                let at = (args["step"].as_u64()?, args["microbatch"].as_u64()?);
                whole.then_some((slice["pid"].as_u64()?, sender, activation, at.0, at.1))
            };
            self.of("X").filter_map(of).collect()
        };
        ends("send", [0, 0]).intersection(&ends("receive", [-1, 1])).count()
    }

    /// The ends of arrows, by their numbers.
    fn arrows<'a>(&'a self, phase: &'a str) -> BTreeMap<u64, &'a Value> {
        self.of(phase).map(|end| (end["id"].as_u64().unwrap(), end)).collect()
    }

    fn names<'a>(&'a self, phase: &'a str) -> BTreeSet<&'a str> {
        self.of(phase).map(|event| event["name"].as_str().unwrap()).collect()
    }
}

const SETS: &[&str] = &["steps=12", "microbatches=2", "checkpoint.every=6", "eval.every=5"];

#[test]
fn a_trace_has_every_action_of_its_steps() {
    let folder = Folder::new();
    for (name, grid, ranks, sets) in [
        ("line", "3x2", 6, &["model.tie=aligned"][..]),
        ("head", "2x1", 0, &["model.tie=head"]),
        ("ring", "4x2", 6, &["grid.placement=ring"]),
        ("alone", "1x1", 0, &[]),
        ("drained", "3x2", 0, &["schedule=1f1b"]),
    ] {
        let sets = [SETS, sets].concat();
        let args = folder.train(name, &sets, &["--grid", grid, "--trace", "4..7"]);
        let command =
            if ranks > 0 { mpirun(ranks, &slices(&args)) } else { ouroboros(&slices(&args)) };
        let finished = run(command, LIMIT).expect_code(0);
        assert!(finished.stdout.contains("trace of the steps 4..7"), "{finished}");

        let trace = Trace::read(&folder.path(name).join("trace-4-7.json.gz"));
        let (stages, replicas) = grid.split_once('x').unwrap();
        let grid = [format!("grid.stages={stages}"), format!("grid.replicas={replicas}")];
        let sets: Vec<&str> = sets.iter().copied().chain(grid.iter().map(String::as_str)).collect();
        trace.check(&setup_of(TINY, &sets), 4, 7);
        assert_eq!(trace.other["clocks"], "one clock");

        let lanes: BTreeSet<u64> = trace.lanes().keys().map(|(_, tid)| tid % 4).collect();
        let replicated = replicas != "1";
        assert_eq!(lanes.contains(&1), stages != "1", "{name}: link");
        assert_eq!(lanes.contains(&2), replicated, "{name}: group");
        assert!(lanes.contains(&3), "{name}: writer");
        let counters = trace.names("C");
        assert!(counters.contains("stage 0: versions held"), "{counters:?}");
        assert!(counters.iter().any(|counter| counter.contains("memory")), "{counters:?}");
        let left: Vec<_> = std::fs::read_dir(folder.path(name)).unwrap().flatten().collect();
        assert!(
            left.iter().all(|file| !file.file_name().to_string_lossy().starts_with(".trace")),
            "{left:?}"
        );
    }
}

/// A trace changes no number.
#[test]
fn a_trace_changes_no_number() {
    let folder = Folder::new();
    let mut found = Vec::new();
    for (name, more) in [("plain", &[][..]), ("traced", &["--trace", "2..9"])] {
        let more = [&["--grid", "2x2"], more].concat();
        run(mpirun(4, &slices(&folder.train(name, SETS, &more))), LIMIT).expect_code(0);
        found.push(crate::harness::Outcome::read(&folder.path(name)));
    }
    assert_eq!(found[0], found[1]);
}

#[test]
fn a_bench_is_traced() {
    let folder = Folder::new();
    let (config, out) = (folder.text("tiny.toml"), folder.text("out"));
    let args = [
        "bench",
        &config,
        "--grid",
        "2x1",
        "--emulated-compute",
        "2,4",
        "--out",
        &out,
        "--trace",
        "5..8",
    ];
    run(mpirun(2, &args), LIMIT).expect_code(0);
    let trace = Trace::read(&folder.path("out").join("trace-5-8.json.gz"));
    trace.check(&setup_of(TINY, &["steps=20", "grid.stages=2"]), 5, 8);
    let forward = trace.of("X").find(|slice| slice["name"] == "forward").unwrap();
    assert!(forward["dur"].as_f64().unwrap() >= 2000.0, "{forward}");
}

#[test]
fn windows_that_the_run_does_not_have_are_refused() {
    let folder = Folder::new();
    for (more, told) in [
        (&["--trace", "4..9"][..], "0..6"),
        (&["--trace", "7..9"], "0..6"),
        (&["--trace", "3..3"], "100..110"),
        (&["--trace", "3"], "100..110"),
        (&["--trace", "2..4", "--oracle"], "leave --oracle out"),
    ] {
        let refused =
            run(ouroboros(&slices(&folder.train("out", &[], more))), LIMIT).expect_code(2);
        assert!(refused.stderr.contains("--trace") && refused.stderr.contains(told), "{refused}");
    }
    assert!(!folder.path("out").exists());

    let begin = folder.train("out", &["checkpoint.every=3"], &[]);
    run(ouroboros(&slices(&begin)), LIMIT).expect_code(0);
    let resumed = |trace: &str| folder.train("out", &["steps=9"], &["--resume", "--trace", trace]);
    let refused = run(ouroboros(&slices(&resumed("4..10"))), LIMIT).expect_code(2);
    assert!(refused.stderr.contains("6..9"), "{refused}");

    // A batch job is given the same words every time: what is made already is left out.
    let told = run(ouroboros(&slices(&resumed("4..8"))), LIMIT).expect_code(0);
    assert!(told.stderr.contains("6..8 are traced"), "{told}");
    assert!(folder.path("out/trace-6-8.json.gz").exists());
    let told = run(ouroboros(&slices(&resumed("4..8"))), LIMIT).expect_code(0);
    assert!(told.stderr.contains("4..8 are made already"), "{told}");
}

/// The file TRACE traces the next steps of a run that is under way; one that is stopped meanwhile has fewer.
#[test]
fn a_file_asks_for_a_trace() {
    let folder = Folder::new();
    let script = r#"
        set -e
        $B train tiny.toml --grid 2x1 --set steps=100000 --set checkpoint.every=50000 --trace 90000..90005 --out out > log &
        run=$!
        until [ "$(cat out/metrics.jsonl 2> /dev/null | wc -l)" -gt 3 ]; do sleep 0.05; done
        echo soon > out/TRACE
        until grep -q "write a number of steps" log; do sleep 0.05; done
        echo 20 > out/TRACE
        until ls out/trace-*.json.gz 2> /dev/null; do sleep 0.05; done
        test ! -e out/TRACE
        echo 99999 > out/TRACE
        until grep -q "before the trace of the steps 90000..90005 is made" log; do sleep 0.05; done
        echo 30000 > out/TRACE
        until grep -c "tracing the steps" log | grep -q 2; do sleep 0.05; done
        sleep 0.2
        touch out/STOP
        wait $run && exit 1
        test $? = 75
        grep -q "90000..90005 are not traced" log
    "#;
    let mut command = Command::new("bash");
    command
        .args(["-c", script])
        .current_dir(folder.path(""))
        .env("B", env!("CARGO_BIN_EXE_ouroboros"));
    let finished = run(command, LIMIT).expect_code(0);

    let mut windows = Vec::new();
    for entry in std::fs::read_dir(folder.path("out")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        assert!(!name.ends_with(".part"), "{name}");
        if let Some(window) =
            name.strip_prefix("trace-").and_then(|name| name.strip_suffix(".json.gz"))
        {
            let (from, to) = window.split_once('-').unwrap();
            windows.push((
                from.parse::<usize>().unwrap(),
                to.parse::<usize>().unwrap(),
                entry.path(),
            ));
        }
    }
    windows.sort();
    assert_eq!(windows.len(), 2, "{finished}");
    assert_eq!(windows[0].1 - windows[0].0, 20);
    assert!(windows[1].1 - windows[1].0 < 29_000);
    let setup = setup_of(TINY, &["steps=100000", "grid.stages=2"]);
    for (from, to, path) in &windows {
        Trace::read(path).check(&setup, *from, *to);
    }
}

/// A disk that is full ends the trace, and not the training.
#[test]
fn a_trace_that_cannot_be_written_ends_alone() {
    let folder = Folder::new();
    // Files of 64 KiB at most: enough for everything but a trace.
    let script = "ulimit -f 64; exec \"$B\" train tiny.toml --grid 2x1 --set steps=200 --out out --trace 0..200";
    let mut command = Command::new("bash");
    command
        .args(["-c", script])
        .current_dir(folder.path(""))
        .env("B", env!("CARGO_BIN_EXE_ouroboros"));
    let finished = run(command, LIMIT).expect_code(0);
    assert_eq!(finished.stdout.matches("are not traced").count(), 1, "{finished}");
    let left: Vec<_> = std::fs::read_dir(folder.path("out"))
        .unwrap()
        .flatten()
        .map(|file| file.file_name())
        .collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("trace")), "{left:?}");
}
