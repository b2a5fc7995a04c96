//! Troubles that users of other trainers have reported, tried here; each stands for its kind.

use std::path::Path;
use std::process::Command;

use crate::harness::{Finished, Folder, LIMIT, TINY, run};

/// A run that ends only when it is stopped.
const LONG: &str = "--set steps=1000000 --set checkpoint.every=100000";

/// What scripts may call: `began OUT` waits until a run has made some steps, `caught ID` until a process has a handler for SIGUSR1.
const FUNCTIONS: &str = r#"
    set -o pipefail
    began() { until [ "$(cat $1/metrics.jsonl 2> /dev/null | wc -l)" -gt 3 ]; do sleep 0.05; done; }
    caught() { until (( 0x$(awk '/^SigCgt/ { print $2 }' /proc/$1/status) & 0x200 )); do :; done; }
"#;

/// Runs a script of bash in the folder; `$B` is the program, `$M` mpirun without its number of ranks.
fn shell(folder: &Folder, script: &str) -> Finished {
    // Whatever it has started ends with it.
    let mut command = Command::new("timeout");
    command
        .args(["-k", "2", "50", "bash", "-c", &format!("{FUNCTIONS}\n{script}")])
        .current_dir(folder.path(""));
    command
        .env("B", env!("CARGO_BIN_EXE_ouroboros"))
        .env("M", "mpirun --bind-to none --oversubscribe -n");
    command
        .env("LONG", LONG)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
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
        shell(&folder, &format!("$B train tiny.toml --set steps=300 --out {out} {sink}"))
            .expect_code(0);
        assert_eq!(last_step(&folder, out), 300, "{out}");
    }
    assert!(
        text(&folder.path("pipe/log/rank-0.log")).contains("standard output cannot be written")
    );
    let short =
        shell(&folder, "$B schedule --grid 8x1 --rows 4000 --steps 400 | head -2").expect_code(0);
    assert!(short.stderr.is_empty() && short.stdout.lines().count() == 2, "{short}");
    let full = shell(&folder, "$B schedule > /dev/full").expect_code(2);
    assert!(full.stderr.contains("error: standard output cannot be written"), "{full}");
    shell(&folder, "$B train missing.toml 2> /dev/full").expect_code(2);
    shell(&folder, "$B --help | head -1; $B train --help > /dev/full").expect_code(0);

    // Ctrl-C reaches whoever reads as well.
    shell(&folder, "timeout -s INT 5 $B train tiny.toml $LONG --out both 2>&1 | sleep 1")
        .expect_code(124);
    assert!(folder.path("both/checkpoints").read_dir().unwrap().count() == 1);
}

/// One wish to stop that arrives twice.
#[test]
fn field_f02() {
    let folder = Folder::new();
    let stopped =
        shell(&folder, "timeout 4 $B train tiny.toml --grid 2x1 $LONG --out a").expect_code(124);
    assert!(
        stopped.stdout.contains("stopped at step ") && stopped.errors().is_empty(),
        "{stopped}"
    );
    let twice = "$B train tiny.toml --grid 2x1 $LONG --out b & began b; kill -TERM $!; kill -TERM $!; kill -INT $!; wait $!";
    let stopped = shell(&folder, twice).expect_code(75);
    assert!(stopped.stdout.contains("again in 2 s or later: ends at once"), "{stopped}");

    // A stop that takes long: a stage that waits for the disk.
    let later = "$B train tiny.toml --grid 2x1 $LONG --inject hang@0,0:10 --out c & began c; sleep 1; kill -TERM $!; sleep 2.5; kill -TERM $!; wait $!";
    let ended = shell(&folder, later).expect_code(143);
    assert!(ended.stderr.contains("error: SIGTERM again: ended at once"), "{ended}");
}

/// Limits of time that no clock can count.
#[test]
fn field_f12() {
    let folder = Folder::new();
    for limit in ["-1", "nan", "inf", "1e300", "soon"] {
        for option in ["max-minutes", "stop-margin"] {
            let refused = shell(&folder, &format!("$B train tiny.toml --out a --{option}={limit}"))
                .expect_code(2);
            assert!(refused.stderr.contains(&format!("--{option}")), "{refused}");
            assert!(refused.stderr.contains("write a number from 0 to"), "{refused}");
        }
    }
    assert!(!folder.path("a").exists());
    for (end, why) in
        [("1000000000", "s ago"), ("18446744073709551615", "too far"), ("soon", "is no number")]
    {
        let train = format!("SLURM_JOB_END_TIME={end} $B train tiny.toml --out {end}");
        let done = shell(&folder, &train).expect_code(0);
        assert!(
            done.stdout.contains("note: SLURM_JOB_END_TIME") && done.stdout.contains(why),
            "{done}"
        );
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
        refused.stderr.contains("cannot be written (File too large")
            && refused.stderr.contains("--resume"),
        "{refused}"
    );
    std::fs::write(folder.path("text"), vec![b'x'; 1 << 20]).unwrap();
    let refused = shell(&folder, "ulimit -f 100; $B data prepare text --dir .").expect_code(3);
    assert!(refused.stderr.contains("text.tokens: cannot be written (File too large"), "{refused}");
    assert!(!folder.path("text.tokens").exists(), "{refused}");
    let refused =
        shell(&folder, "ulimit -f 8; $B train tiny.toml --out b --set steps=300").expect_code(7);
    assert!(refused.stderr.contains("b/metrics.jsonl: cannot be written"), "{refused}");
}

/// Signals that batch systems and terminals send.
#[test]
fn field_f15() {
    let folder = Folder::new();
    for signal in ["HUP", "USR2", "XCPU"] {
        let script = format!(
            "$B train tiny.toml --grid 2x1 $LONG --out {signal} & began {signal}; kill -{signal} $!; wait $!"
        );
        let stopped = shell(&folder, &script).expect_code(75);
        assert!(stopped.stdout.contains(&format!("SIG{signal} at this process")), "{stopped}");
    }
    // While the program is being loaded, and with a signal that is ignored.
    let early =
        "$B train tiny.toml --grid 2x1 $LONG --out early & caught $!; kill -USR1 $!; wait $!";
    assert!(shell(&folder, early).expect_code(75).stdout.contains("SIGUSR1 at this process"));
    let nohup = "trap '' HUP; $B train tiny.toml --grid 2x1 --out nohup --max-minutes 0.05 $LONG & began nohup; kill -HUP $!; wait $!";
    assert!(shell(&folder, nohup).expect_code(75).stdout.contains("--max-minutes"));
    let ranks = "$M 2 $B train tiny.toml --grid 2x1 $LONG --out ranks & began ranks; kill -USR2 $(pgrep -P $! | tail -1); wait $!";
    assert!(shell(&folder, ranks).expect_code(75).stdout.contains("SIGUSR2 at stage"));
}

/// A run that goes on with another text, or another vocabulary.
#[test]
fn field_f03() {
    let folder = Folder::new();
    let write = |name: &str, text: String| std::fs::write(folder.path(name), text).unwrap();
    write("a.txt", "one two two three three three\n".repeat(200));
    write("frequent.txt", "one one one two two three\n".repeat(200));
    write("same.txt", "three two three one two three\n".repeat(200));
    write("grown.txt", "one two two three three three\n".repeat(300));
    let words = "--set data.tokenizer=words --set data.sequence=8 --set eval.every=3";
    let train = |text: &str, more: &str| {
        format!(
            "sed -i /synthetic/d tiny.toml; $B train tiny.toml --out a --set data.path={text} {words} {more}"
        )
    };
    shell(&folder, &train("a.txt", "")).expect_code(0);
    let resumed = |text: &str, more: &str| {
        shell(&folder, &train(text, &format!("--resume --set steps=8 {more}")))
    };

    let refused = resumed("frequent.txt", "").expect_code(3);
    let told = "word number 0 is `one` instead of `three`";
    assert!(refused.stderr.contains(told), "{refused}");
    write("more.txt", "one two two three three three four\n".repeat(200));
    let refused = resumed("more.txt", "").expect_code(3);
    assert!(refused.stderr.contains("is `four` instead of `one`"), "{refused}");

    // Copies, so that each goes on from the same state.
    for (text, more, note) in [
        ("a.txt", "", None),
        ("same.txt", "", Some("note: the training text is another than before")),
        ("grown.txt", "", Some("note: the training text is another than before")),
        (
            "a.txt",
            "--set data.held_out=same.txt",
            Some("note: the held-out text is another than before"),
        ),
        ("a.txt", "--set data.order=streams", Some("note: data.order is another than before")),
    ] {
        let script = format!(
            "rm -rf b; cp -r a b; {}",
            train(text, &format!("--resume --set steps=8 {more}"))
        );
        let done = shell(&folder, &script.replace("--out a", "--out b")).expect_code(0);
        let found =
            done.stdout.lines().find(|line| line.starts_with("note: ") && line.contains("another"));
        assert!(
            note.is_none() == found.is_none()
                && done.stdout.contains(note.unwrap_or("resuming at step 6")),
            "{done}"
        );
    }

    let characters = "--set data.tokenizer=characters --set data.sequence=8";
    let train = |text: &str, more: &str| {
        format!("$B train tiny.toml --out c --set data.path={text} {characters} {more}")
    };
    shell(&folder, &train("a.txt", "")).expect_code(0);
    write("upper.txt", "ONE two two three three three\n".repeat(200));
    let refused = shell(&folder, &train("upper.txt", "--resume")).expect_code(3);
    assert!(refused.stderr.contains("character number 2 is `E` instead of `e`"), "{refused}");
}

/// Ranks that read different texts or vocabularies.
#[test]
fn field_f04() {
    let folder = Folder::new();
    let ranks = |name: &str, texts: [&str; 2], tokenizer: &str| {
        for (rank, text) in texts.into_iter().enumerate() {
            std::fs::create_dir_all(folder.path(&format!("{name}{rank}"))).unwrap();
            std::fs::write(folder.path(&format!("{name}{rank}/text")), text.repeat(200)).unwrap();
        }
        let program = format!(
            "cd {name}$OMPI_COMM_WORLD_RANK; $B train ../tiny.toml --grid 2x1 --out ../out --set data.path=text \
             --set data.tokenizer={tokenizer}"
        );
        std::fs::write(folder.path("program"), program).unwrap();
        shell(&folder, "sed -i /synthetic/d tiny.toml; $M 2 bash program")
    };
    for (name, texts, tokenizer, what) in [
        ("text", ["a b c\n", "a b d\n"], "bytes", "training text"),
        ("words", ["a b c\n", "a b d\n"], "words", "vocabulary"),
        ("frequency", ["a b b\n", "a a b\n"], "words", "vocabulary"),
    ] {
        let refused = ranks(name, texts, tokenizer).expect_code(2);
        assert!(
            refused.stderr.contains(&format!("another {what} on rank 1 than on rank 0")),
            "{refused}"
        );
    }
    ranks("same", ["a b c\n", "a b c\n"], "words").expect_code(0);
}

/// A run's folder that the nodes do not share.
#[test]
fn field_f05() {
    let folder = Folder::new();
    let program = "mkdir -p $OMPI_COMM_WORLD_RANK; cd $OMPI_COMM_WORLD_RANK; $B train ../tiny.toml --grid 2x1 --out run";
    std::fs::write(folder.path("program"), program).unwrap();
    let refused = shell(&folder, "$M 2 bash program").expect_code(2);
    assert!(
        refused.stderr.contains("rank 1: setting `--out`")
            && refused.stderr.contains("all nodes share"),
        "{refused}"
    );
    assert!(!folder.path("0/run/checkpoints").exists(), "{refused}");
}

/// A run that is suspended and continued.
#[test]
fn field_f06() {
    let folder = Folder::new();
    let long = "$LONG --set stall_seconds=1 --max-minutes 0.2";
    let ranks = shell(
        &folder,
        &format!(
            "$M 2 $B train tiny.toml --grid 2x1 --out a {long} & began a; all=\"$! $(pgrep -P $!)\"
             kill -STOP $all; sleep 6; kill -CONT $all; wait $!"
        ),
    );
    assert!(ranks.code == Some(75) && ranks.errors().is_empty(), "{ranks}");
    let alone = format!(
        "$B train tiny.toml --grid 2x1 --out b {long} & began b; kill -STOP $!; sleep 6; kill -CONT $!; wait $!"
    );
    let alone = shell(&folder, &alone);
    assert!(alone.code == Some(75) && alone.errors().is_empty(), "{alone}");
    // No step has taken the time of the pause.
    let metrics = text(&folder.path("b/metrics.jsonl"));
    let longest = metrics.lines().filter_map(|line| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()["step_s"].as_f64()
    });
    assert!(longest.fold(0.0, f64::max) < 4.0);
}

/// Names that two writers would share.
#[test]
fn field_f07() {
    let folder = Folder::new();
    for (name, letter) in [("one", "a"), ("two", "b")] {
        std::fs::write(folder.path(name), letter.repeat(1 << 22)).unwrap();
    }
    let both = "$B data prepare one --out p.one & $B data prepare two --out p.two & second=$!; wait $second";
    shell(&folder, both).expect_code(0);
    let bytes = |name: &str| std::fs::read(folder.path(name)).unwrap();
    for (name, letter) in [("p.one", b'a'), ("p.two", b'b')] {
        assert_eq!(bytes(name)[1000], letter, "{name}");
    }
    assert!(
        std::fs::read_dir(folder.path(""))
            .unwrap()
            .flatten()
            .all(|e| !e.file_name().to_string_lossy().ends_with("tmp"))
    );

    // Two that make the same file: one makes it, the other is told, or finds it made.
    let same = "$B data prepare one --out q & $B data prepare two --out q; a=$?; wait $!; echo codes $a $?";
    let done = shell(&folder, same).expect_code(0);
    assert!(done.stdout.contains("codes 3 0") || done.stdout.contains("codes 0 3"), "{done}");
    let told =
        ["another process is preparing it", "another process has made it meanwhile", "made of"];
    assert!(told.iter().any(|reason| done.stderr.contains(reason)), "{done}");
}

/// Two runs in one folder.
#[test]
fn field_f08() {
    let folder = Folder::new();
    let refused = shell(
        &folder,
        "$B train tiny.toml --out a $LONG & began a; $B train tiny.toml --out a --set seed=2; code=$?; kill -KILL $!; exit $code",
    );
    assert!(
        refused.code == Some(2) && refused.stderr.contains("writes into it; wait for its end"),
        "{refused}"
    );
    // A dead run's lock does not hold.
    shell(&folder, "$B train tiny.toml --out a").expect_code(0);
    let refused = shell(
        &folder,
        "$M 2 $B train tiny.toml --out b --grid 2x1 $LONG --max-minutes 0.15 & began b
         $B train tiny.toml --out b --set seed=2; code=$?; wait $!; exit $code",
    );
    assert!(
        refused.code == Some(2) && refused.stderr.contains("writes into it; wait for its end"),
        "{refused}"
    );
    let init = "$B train tiny.toml --out c $LONG & began c; $B init tiny.toml --out c; code=$?; kill $!; exit $code";
    let refused = shell(&folder, init);
    assert!(refused.code == Some(2) && refused.stderr.contains("writes into it"), "{refused}");
}

/// Clocks that differ or jump.
#[test]
fn field_f09() {
    let folder = Folder::new();
    shell(&folder, "$B train tiny.toml --out a --set steps=40 --set checkpoint.every=2 --set checkpoint.keep_last=4 --max-minutes 0")
        .expect_code(75);
    let train = "$B train tiny.toml --out a --resume --set steps=100000 --set checkpoint.every=50 --max-minutes 0.01";
    shell(&folder, train).expect_code(75);
    let oldest = |name: &str| -> Vec<u64> {
        let entries = std::fs::read_dir(folder.path(name).join("checkpoints")).unwrap().flatten();
        let mut steps: Vec<u64> = entries
            .map(|e| e.file_name().to_string_lossy().trim_start_matches("step-").parse().unwrap())
            .collect();
        steps.sort_unstable();
        steps
    };
    // The clock of the machine that saved the older state was an hour ahead.
    let steps = oldest("a");
    let manifest = folder.path(&format!("a/checkpoints/step-{}/manifest.json", steps[0]));
    let mut value: serde_json::Value = serde_json::from_str(&text(&manifest)).unwrap();
    value["time_ms"] = (value["time_ms"].as_u64().unwrap() + 3_600_000).into();
    std::fs::write(&manifest, value.to_string()).unwrap();
    let mut before = *steps.last().unwrap();
    for _ in 0..3 {
        shell(&folder, train).expect_code(75);
        let steps = oldest("a");
        assert!(*steps.last().unwrap() > before && steps.len() <= 4, "{steps:?} after {before}");
        before = *steps.last().unwrap();
    }
}

/// Lists of words as people have them.
#[test]
fn field_f10() {
    let folder = Folder::new();
    std::fs::write(folder.path("text"), "the cat saw the dog\n".repeat(300)).unwrap();
    let train = |list: &str, out: &str| {
        std::fs::write(folder.path("list"), list).unwrap();
        let words = "--set data.tokenizer=words --set data.vocabulary=list --set data.path=text --set data.sequence=8";
        shell(
            &folder,
            &format!(
                "sed -i /synthetic/d tiny.toml; $B train tiny.toml --out {out} {words} --set steps=30"
            ),
        )
    };
    let plain = train("the\ncat\nsaw\ndog\n<unk>\n", "plain").expect_code(0);
    for (list, out) in [
        ("the\t600\ncat\t300\nsaw\t300\ndog\t300\n<unk>\t0\n", "counts"),
        ("\u{feff}the\ncat\nsaw\ndog\n<unk>\n", "mark"),
        ("the \r\ncat\r\nsaw\r\ndog\r\n<unk>\r\n", "windows"),
    ] {
        let found = train(list, out).expect_code(0);
        assert_eq!(
            found.stdout.lines().find(|l| l.starts_with("loss (last")),
            plain.stdout.lines().find(|l| l.starts_with("loss (last"))
        );
    }
    let refused = train("the\ncat and dog\n", "a").expect_code(3);
    assert!(refused.stderr.contains("list: line 2 is no word: `cat and dog`"), "{refused}");
    let refused = train("the\ncat\nsaw\n", "a").expect_code(3);
    assert!(refused.stderr.contains("add `<unk>`, or the word, to list"), "{refused}");
}

/// The held-out share of a text with one very long line.
#[test]
fn field_f11() {
    let folder = Folder::new();
    let text = ["few words here\n".repeat(7), "long line ".repeat(10_000), "\n".into()].concat();
    std::fs::write(folder.path("text"), text).unwrap();
    let words = "--set data.tokenizer=words --set data.path=text --set data.sequence=8 --set data.held_out=0.05";
    let done =
        shell(&folder, &format!("sed -i /synthetic/d tiny.toml; $B train tiny.toml {words}"))
            .expect_code(0);
    assert!(done.stdout.contains("text: 19,0"), "{done}");
    assert!(done.stdout.contains(" words to train on, 1,00"), "{done}");
}

/// Files that are not files.
#[test]
fn field_f14() {
    let folder = Folder::new();
    std::fs::write(folder.path("text"), "a b c d\n".repeat(300)).unwrap();
    let words = "--set data.tokenizer=words --set data.sequence=8";
    for command in [
        "$B train tiny.toml --set data.path=pipe".to_owned(),
        "$B train tiny.toml --set data.path=text --set data.held_out=pipe".to_owned(),
        format!("$B train tiny.toml --set data.path=text {words} --set data.vocabulary=pipe"),
        "$B data prepare pipe".to_owned(),
        "$B data prepare text --tokenizer words --vocabulary pipe".to_owned(),
        "$B data prepare enwik8 --archive pipe --sha256 00".to_owned(),
        "$B bench tiny.toml --emulated-compute pipe".to_owned(),
    ] {
        let script = format!(
            "sed -i /synthetic/d tiny.toml; [ -e pipe ] || mkfifo pipe; timeout 10 {command}"
        );
        let refused = shell(&folder, &script);
        assert!(refused.code == Some(2) || refused.code == Some(3), "{refused}");
        assert!(refused.stderr.contains("a pipe, not a file"), "{refused}");
    }
}

/// Absurd sizes.
#[test]
fn field_f16() {
    let folder = Folder::new();
    let keys = [
        "steps",
        "batch",
        "microbatches",
        "slack",
        "threads",
        "model.layers",
        "model.d_model",
        "model.heads",
        "model.d_ff",
        "model.mem_len",
        "data.sequence",
        "data.synthetic",
        "grid.stages",
        "grid.replicas",
        "eval.tokens",
        "eval.sequence",
    ];
    let largest = [i64::MAX, (1 << 51) + 1];
    for (key, value) in keys.iter().flat_map(|key| largest.map(|value| (key, value))) {
        let refused = shell(&folder, &format!("timeout 20 $B train tiny.toml --set {key}={value}"))
            .expect_code(2);
        assert!(
            refused.stderr.contains(&format!("setting `{key}`: found {value}; more than")),
            "{refused}"
        );
    }
    for refused in [
        "--set grid.delays=[9223372036854775807]",
        "--set grid.layers_per_stage=[9223372036854775807]",
    ] {
        let refused =
            shell(&folder, &format!("timeout 20 $B train tiny.toml {refused}")).expect_code(2);
        assert!(refused.stderr.contains("setting `grid."), "{refused}");
    }
    for options in [
        "--slack 9223372036854775807",
        "--microbatches 4294967297",
        "--grid 99999999x2",
        "--steps 4294967297",
    ] {
        let refused = shell(&folder, &format!("timeout 20 $B schedule {options}")).expect_code(2);
        assert!(refused.stderr.contains("error: "), "{refused}");
    }
    for (out, more) in
        [("a", "--grid 2x1"), ("b", "--oracle"), ("c", "--grid 2x1 --set schedule=1f1b")]
    {
        let script = format!(
            "timeout -s KILL 20 $B train tiny.toml --set steps=1000000000000 --max-minutes 0.01 --out {out} {more}"
        );
        let stopped = shell(&folder, &script).expect_code(75);
        assert!(stopped.stdout.contains("of 1000000000000, checkpoint saved"), "{stopped}");
    }
}

/// Figures that would depend on the grid: every held-out token is scored once, on every grid.
#[test]
fn field_f17() {
    let folder = Folder::new();
    std::fs::write(folder.path("held"), &text(Path::new("tests/data/declaration.txt"))[..1003])
        .unwrap();
    let evals = |out: &str| -> Vec<(f64, u64)> {
        let metrics = text(&folder.path(out).join("metrics.jsonl"));
        let lines =
            metrics.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines
            .filter_map(|line| Some((line["eval_loss"].as_f64()?, line["eval_tokens"].as_u64()?)))
            .collect()
    };
    let streams = "--set model.arch=transformer-xl --set model.mem_len=8 --set eval.batch=12";
    for (name, more) in [("windows", ""), ("streams", streams)] {
        let train = format!(
            "$B train tiny.toml --set data.held_out=held --set data.sequence=16 --set steps=2 --set eval.every=1 --set sync_steps=2 \
             --set optimizer.lr=1e-12 {more}"
        );
        let mut first = Vec::new();
        for grid in ["1x1", "1x2", "1x3", "2x2", "3x4"] {
            let out = format!("{name}{grid}");
            shell(&folder, &format!("{train} --grid {grid} --out {out}")).expect_code(0);
            let found = evals(&out);
            assert_eq!(
                found.iter().map(|(_, tokens)| *tokens).collect::<Vec<_>>(),
                [1002, 1002],
                "{out}"
            );
            if first.is_empty() {
                first.clone_from(&found);
            }
            for ((loss, _), (expected, _)) in found.iter().zip(&first) {
                assert!(
                    (loss / expected - 1.0).abs() < 1e-6,
                    "{out}: {loss} instead of {expected}"
                );
            }
        }
        let done = shell(&folder, &format!("$B eval {name}1x1")).expect_code(0);
        assert!(done.stdout.contains("scored          1,002 of 1,003 tokens"), "{done}");
        let loss: f64 = done.stdout.lines().find(|line| line.starts_with("loss ")).unwrap()[5..25]
            .trim()
            .split(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!((loss / first[1].0 - 1.0).abs() < 1e-6, "{done} instead of {}", first[1].0);
    }
}

/// Damaged inputs: found when they are opened.
#[test]
fn field_f18() {
    let folder = Folder::new();
    std::fs::write(folder.path("text"), "a b c d e\n".repeat(400)).unwrap();
    shell(&folder, "$B data prepare text --tokenizer words --out p").expect_code(0);
    let good = std::fs::read(folder.path("p")).unwrap();
    let train = "sed -i /synthetic/d tiny.toml; $B train tiny.toml --set data.tokenizer=words --set data.path=p --set data.sequence=8";
    shell(&folder, train).expect_code(0);
    for place in [20, 60, 150, good.len() / 2, good.len() - 20, good.len() - 1] {
        let mut bad = good.clone();
        bad[place] ^= 0x40;
        std::fs::write(folder.path("p"), &bad).unwrap();
        let refused = shell(&folder, train).expect_code(3);
        assert!(refused.stderr.contains("data p: "), "{place}: {refused}");
    }
}

/// What cannot be understood is told before anything is written.
#[test]
fn field_messages() {
    let folder = Folder::new();
    let refused =
        shell(&folder, "OUROBOROS_LOG=loud,=,x=7 $B train tiny.toml --out a").expect_code(2);
    assert!(refused.stderr.contains("setting `OUROBOROS_LOG`: found loud,=,x=7"), "{refused}");
    std::fs::create_dir_all(folder.path("b/STOP")).unwrap();
    shell(&folder, "$B train tiny.toml --out b").expect_code(0);
    // Values as people write them.
    for (set, code) in [("name=7", 0), ("optimizer.lr=.001", 0), ("optimizer.lr=1_000e-6", 0)] {
        shell(&folder, &format!("$B train tiny.toml --set {set} --set steps=1")).expect_code(code);
    }
    assert!(folder.path("runs/7").exists());
    for (set, told) in [
        ("name=", "a folder of this name is made in runs/"),
        ("name=../x", "a folder of this name is made in runs/"),
        ("name=a/b", "a folder of this name is made in runs/"),
        ("name=..", "a folder of this name is made in runs/"),
        ("optimizer.lr=inf", "must be a finite number"),
        ("seed=18446744073709551615", "expected a whole number, at most 9223372036854775807"),
        ("steps=none", "it cannot be turned off; write a value"),
        ("optimizer.betas=none", "it cannot be turned off; write a value"),
        ("eval=true", "a section: set its keys, as in `eval.KEY=VALUE`"),
        ("grid=2x2", "give --grid, as in --grid 2x2"),
    ] {
        let refused = shell(&folder, &format!("$B train tiny.toml --set {set}")).expect_code(2);
        assert!(refused.stderr.contains(told) && !refused.stderr.contains("struct"), "{refused}");
    }
    let refused = shell(&folder, "$B train --resume tiny.toml").expect_code(2);
    assert!(refused.stderr.contains("write train tiny.toml --resume"), "{refused}");

    // What a file sets is taken out.
    std::fs::write(
        folder.path("set.toml"),
        format!("{TINY}clip = 0.5\n[eval]\nevery = 2\n[checkpoint]\nevery = 2\n"),
    )
    .unwrap();
    let none = "--set eval=none --set checkpoint.every=none --set optimizer.clip=none --set verify_every=none";
    let done = shell(&folder, &format!("$B train set.toml --out d {none}")).expect_code(0);
    assert!(
        !done.stdout.contains("eval loss") && done.stdout.matches("saved").count() == 1,
        "{done}"
    );
    let config = text(&folder.path("d/config.toml"));
    assert!(config.contains("clip = \"none\"") && !config.contains("[eval]"), "{config}");
    shell(&folder, "$B train d/config.toml --out e").expect_code(0);
    assert_eq!(text(&folder.path("d/config.toml")), text(&folder.path("e/config.toml")));

    // The variables of a launcher in a shell that launches nothing.
    let variables = "PMI_SIZE=4 PMI_RANK=0";
    let refused = shell(&folder, &format!("{variables} $B train tiny.toml --out c")).expect_code(2);
    assert!(
        refused.stderr.contains("unset PMI_SIZE and PMI_RANK, or give --transport local"),
        "{refused}"
    );
    shell(&folder, &format!("{variables} $B train tiny.toml --out c --transport local"))
        .expect_code(0);
    shell(&folder, &format!("{variables} $B train tiny.toml --out c --oracle")).expect_code(0);
    shell(&folder, "PMI_SIZE=1 PMI_RANK=0 $B train tiny.toml --out c").expect_code(0);

    // Names that are not UTF-8.
    let odd = "printf 'text %.0s' $(seq 2000) > $'t\\xff'; $B data prepare $'t\\xff' --dir $'d\\xff' && $B train tiny.toml --out $'r\\xff'";
    shell(&folder, odd).expect_code(0);
    shell(&folder, "$M 2 $B train tiny.toml --grid 2x1 --out $'r\\xff' --resume --set steps=9")
        .expect_code(0);
}

/// What an earlier run has left in a folder is not shown as that of a later one, and what is there
/// instead of a file that is only looked at ends no run.
#[test]
fn an_earlier_run_is_not_taken_for_this_one() {
    let folder = Folder::new();
    let json = |folder: &Folder| -> serde_json::Value {
        let told = shell(folder, "$B report a --json").expect_code(0);
        serde_json::from_str(&told.stdout).unwrap()
    };
    shell(&folder, "$B train tiny.toml --grid 2x1 --set steps=40 --set batch=64 --out a")
        .expect_code(0);
    assert_eq!(json(&folder)["runs"][0]["places"].as_array().unwrap().len(), 2);
    let before = text(&folder.path("a/metrics.jsonl"));

    shell(&folder, "$B train tiny.toml --grid 2x1 --oracle --set 'sink=[\"terminal\"]' --out a")
        .expect_code(0);
    let refused = shell(&folder, "$B report a").expect_code(3);
    assert!(refused.stderr.contains("has no metrics.jsonl"), "{refused}");
    assert_eq!(text(&folder.path("a/metrics.previous.jsonl")), before);

    shell(&folder, "$B train tiny.toml --grid 2x1 --oracle --out a").expect_code(0);
    let run = &json(&folder)["runs"][0];
    assert!(run["places"].as_array().unwrap().is_empty() && run["proof"].is_null(), "{run}");
    assert_eq!((&run["state"], &run["steps"]), (&"ended".into(), &6.into()), "{run}");

    let odd = "rm a/events.jsonl && mkdir a/events.jsonl a/metrics.prom && $B train tiny.toml --out a \
               --set 'sink=[\"jsonl\", \"terminal\", \"prometheus\"]'";
    let told = shell(&folder, odd).expect_code(0);
    assert!(told.stderr.contains("events.jsonl") && told.stderr.contains("goes on without it"));
    let run = &json(&folder)["runs"][0];
    assert!(run["notes"].to_string().contains("events.jsonl cannot be read"), "{run}");
}

/// A run's folder that has come from elsewhere may have links in it: nothing is written through them.
#[test]
fn links_in_a_run_folder_are_not_followed() {
    let folder = Folder::new();
    let good = "$B train tiny.toml --set checkpoint.every=3 --out a";
    shell(&folder, good).expect_code(0);
    let outside = folder.path("outside");
    std::fs::create_dir(&outside).unwrap();
    let there = || {
        let file = |entry: std::fs::DirEntry| (entry.file_name(), text(&entry.path()));
        std::fs::read_dir(&outside).unwrap().flatten().map(file).collect::<Vec<_>>()
    };
    let link = |target: &str, name: &str| {
        let name = folder.path(&format!("a/{name}"));
        let _ = std::fs::remove_file(&name);
        std::os::unix::fs::symlink(folder.path(target), name).unwrap();
    };

    std::fs::write(outside.join("kept"), "kept").unwrap();
    for name in ["lock", "config.toml", "log/rank-0.log"] {
        link("outside/kept", name);
        let refused = shell(&folder, &format!("{good} --resume")).expect_code(2);
        assert!(refused.stderr.contains(&format!("{name} is a link")), "{refused}");
        std::fs::remove_file(folder.path(&format!("a/{name}"))).unwrap();
    }
    // What is replaced, or was left by an interrupted save, is taken away, and not what it leads to.
    link("outside/kept", "metrics.jsonl");
    link("outside/kept", "metrics.previous.jsonl");
    link("outside", "checkpoints/step-9.tmp");
    shell(&folder, &format!("{good} --resume --set steps=18")).expect_code(0);
    assert!(folder.path("a/checkpoints/step-18").exists());
    link("outside/kept", "report.html");
    shell(&folder, "$B report a").expect_code(0);
    assert_eq!(there(), [("kept".into(), "kept".to_owned())]);

    // A file of a state may be none of its folder.
    let manifest = folder.path("a/checkpoints/step-18/manifest.json");
    let good = text(&manifest);
    std::fs::rename(
        folder.path("a/checkpoints/step-18/stage-0.safetensors"),
        outside.join("stage-0.safetensors"),
    )
    .unwrap();
    let escaped =
        good.replace("\"stage-0.safetensors\"", "\"../../../outside/stage-0.safetensors\"");
    std::fs::write(&manifest, escaped).unwrap();
    let refused = shell(&folder, "$B eval a/checkpoints/step-18").expect_code(6);
    assert!(
        refused
            .stderr
            .contains("the file `../../../outside/stage-0.safetensors` is none of its folder"),
        "{refused}"
    );
}
