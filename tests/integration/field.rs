//! Troubles that users of other trainers have reported, tried here; each stands for its kind.

use std::path::Path;
use std::process::Command;

use crate::harness::{Finished, Folder, LIMIT, run};

/// A run that ends only when it is stopped.
const LONG: &str = "--set steps=1000000 --set checkpoint.every=100000";

/// Runs a script of bash in the folder; `$B` is the program, `$M` mpirun without its number of ranks.
fn shell(folder: &Folder, script: &str) -> Finished {
    // Whatever it has started ends with it.
    let mut command = Command::new("timeout");
    command.args(["-k", "2", "50", "bash", "-c", &format!("set -o pipefail\n{script}")]).current_dir(folder.path(""));
    command.env("B", env!("CARGO_BIN_EXE_ouroboros")).env("M", "mpirun --bind-to none --oversubscribe -n");
    command.env("LONG", LONG).env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    run(command, LIMIT)
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The step of the last line of a run's metrics.
fn last_step(folder: &Folder, out: &str) -> u64 {
    let metrics = text(&folder.path(out).join("metrics.jsonl"));
    let line: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    line["step"].as_u64().unwrap()
}

/// Standard output or error that nobody reads, or that cannot be written.
#[test]
fn field_f01() {
    let folder = Folder::new();
    for (out, sink) in [("pipe", "| head -1"), ("full", "> /dev/full"), ("closed", ">&-")] {
        shell(&folder, &format!("$B train tiny.toml --set steps=300 --out {out} {sink}")).expect_code(0);
        assert_eq!(last_step(&folder, out), 300, "{out}");
    }
    assert!(text(&folder.path("pipe/log/rank-0.log")).contains("standard output cannot be written"));
    let short = shell(&folder, "$B schedule --grid 8x1 --rows 4000 --steps 400 | head -2").expect_code(0);
    assert!(short.stderr.is_empty() && short.stdout.lines().count() == 2, "{short}");
    let full = shell(&folder, "$B schedule > /dev/full").expect_code(2);
    assert!(full.stderr.contains("error: standard output cannot be written"), "{full}");
    shell(&folder, "$B train missing.toml 2> /dev/full").expect_code(2);
    shell(&folder, "$B --help | head -1; $B train --help > /dev/full").expect_code(0);

    // Ctrl-C reaches whoever reads as well.
    shell(&folder, "timeout -s INT 2.5 $B train tiny.toml $LONG --out both 2>&1 | sleep 1").expect_code(124);
    assert!(folder.path("both/checkpoints").read_dir().unwrap().count() == 1);
}

/// One wish to stop that arrives twice.
#[test]
fn field_f02() {
    let folder = Folder::new();
    let stopped = shell(&folder, "timeout 1.5 $B train tiny.toml --grid 2x1 $LONG --out a").expect_code(124);
    assert!(stopped.stdout.contains("stopped at step ") && stopped.errors().is_empty(), "{stopped}");
    let twice =
        "$B train tiny.toml --grid 2x1 $LONG --out b & sleep 1.5; kill -TERM $!; kill -TERM $!; kill -INT $!; wait $!";
    let stopped = shell(&folder, twice).expect_code(75);
    assert!(stopped.stdout.contains("again in 2 s or later: ends at once"), "{stopped}");

    // A stop that takes long: a stage that waits for the disk.
    let later = "$B train tiny.toml --grid 2x1 $LONG --inject hang@0,0:40 --out c & sleep 1.5; kill -TERM $!; sleep 2.5; kill -TERM $!; wait $!";
    let ended = shell(&folder, later).expect_code(143);
    assert!(ended.stderr.contains("error: SIGTERM again: ended at once"), "{ended}");
}

/// Limits of time that no clock can count.
#[test]
fn field_f12() {
    let folder = Folder::new();
    for limit in ["-1", "nan", "inf", "1e300", "soon"] {
        for option in ["max-minutes", "stop-margin"] {
            let refused = shell(&folder, &format!("$B train tiny.toml --out a --{option}={limit}")).expect_code(2);
            assert!(refused.stderr.contains(&format!("--{option}")), "{refused}");
            assert!(refused.stderr.contains("write a number from 0 to"), "{refused}");
        }
    }
    assert!(!folder.path("a").exists());
    for (end, why) in [("1000000000", "s ago"), ("18446744073709551615", "too far"), ("soon", "is no number")] {
        let train = format!("SLURM_JOB_END_TIME={end} $B train tiny.toml --out {end}");
        let done = shell(&folder, &train).expect_code(0);
        assert!(done.stdout.contains("note: SLURM_JOB_END_TIME") && done.stdout.contains(why), "{done}");
    }
}

/// A limit of the size of files.
#[test]
fn field_f13() {
    let folder = Folder::new();
    let wide = "--set model.d_model=128 --set checkpoint.every=2";
    let refused = shell(&folder, &format!("ulimit -f 400; $B train tiny.toml --out a {wide}"));
    assert!(refused.code == Some(7), "{refused}");
    assert!(
        refused.stderr.contains("cannot be written (File too large") && refused.stderr.contains("--resume"),
        "{refused}"
    );
    std::fs::write(folder.path("text"), vec![b'x'; 1 << 20]).unwrap();
    let refused = shell(&folder, "ulimit -f 100; $B data prepare text --dir .").expect_code(3);
    assert!(refused.stderr.contains("text.tokens: cannot be written (File too large"), "{refused}");
    assert!(!folder.path("text.tokens").exists(), "{refused}");
    let refused = shell(&folder, "ulimit -f 8; $B train tiny.toml --out b --set steps=300").expect_code(7);
    assert!(refused.stderr.contains("b/metrics.jsonl: cannot be written"), "{refused}");
}

/// Signals that batch systems and terminals send.
#[test]
fn field_f15() {
    let folder = Folder::new();
    for signal in ["HUP", "USR2", "XCPU"] {
        let script =
            format!("$B train tiny.toml --grid 2x1 $LONG --out {signal} & sleep 1.5; kill -{signal} $!; wait $!");
        let stopped = shell(&folder, &script).expect_code(75);
        assert!(stopped.stdout.contains(&format!("SIG{signal} at this process")), "{stopped}");
    }
    // While the program is being loaded, and with a signal that is ignored.
    let early = "$B train tiny.toml --grid 2x1 $LONG --out early & sleep 0.1; kill -USR1 $!; wait $!";
    assert!(shell(&folder, early).expect_code(75).stdout.contains("SIGUSR1 at this process"));
    let nohup = "trap '' HUP; $B train tiny.toml --grid 2x1 --out nohup --max-minutes 0.05 $LONG & sleep 1; kill -HUP $!; wait $!";
    assert!(shell(&folder, nohup).expect_code(75).stdout.contains("--max-minutes"));
    let ranks =
        "$M 2 $B train tiny.toml --grid 2x1 $LONG --out ranks & sleep 3; kill -USR2 $(pgrep -P $! | tail -1); wait $!";
    assert!(shell(&folder, ranks).expect_code(75).stdout.contains("SIGUSR2 at stage"));
}

/// What cannot be understood is told before anything is written.
#[test]
fn field_messages() {
    let folder = Folder::new();
    let refused = shell(&folder, "OUROBOROS_LOG=loud,=,x=7 $B train tiny.toml --out a").expect_code(2);
    assert!(refused.stderr.contains("setting `OUROBOROS_LOG`: found loud,=,x=7"), "{refused}");
    std::fs::create_dir_all(folder.path("b/STOP")).unwrap();
    shell(&folder, "$B train tiny.toml --out b").expect_code(0);
}
