//! Runs of small configs, in this process and as programs, and what they leave behind.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ouroboros::config::Config;
use ouroboros::control::Mode;
use ouroboros::coordinator::Coordinator;
use ouroboros::launch::{run_local, run_oracle};
use ouroboros::metrics::Summary;
use ouroboros::setup::Setup;
use tempfile::TempDir;

/// A model that trains in milliseconds; tests put their keys over it with `--set` pairs.
pub const TINY: &str = r#"
name = "tiny"
steps = 6
batch = 24
microbatches = 1
[model]
layers = 6
d_model = 16
heads = 2
d_ff = 32
[data]
synthetic = 4000
sequence = 8
[optimizer]
lr = 1e-2
warmup = 2
"#;

/// A small generator: the draws are the same for ever.
pub struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Draw {
        Draw(seed)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What a run leaves in its folder.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    /// Lines of `metrics.jsonl` without their times.
    pub lines: Vec<serde_json::Value>,
    /// Bytes of every file of the saved states, by name: weights, state of the optimizer, memories.
    pub weights: Vec<(String, Vec<u8>)>,
}

impl Outcome {
    /// Reads a run's folder.
    pub fn read(out: &Path) -> Outcome {
        let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
        let lines = text.lines().map(|line| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            let object = value.as_object_mut().unwrap();
            object.remove("step_s");
            object.remove("tokens_per_s");
            object.remove("time");
            // Of measured staleness what tells of time, and what only the oracle can know.
            for of in
                object.get_mut("staleness").and_then(|of| of.as_array_mut()).into_iter().flatten()
            {
                let of = of.as_object_mut().unwrap();
                of.remove("seconds");
                of.remove("fresh_cosine");
            }
            value
        });
        let mut weights = Vec::new();
        for folder in std::fs::read_dir(out.join("checkpoints")).into_iter().flatten().flatten() {
            for file in std::fs::read_dir(folder.path()).unwrap().flatten() {
                let name = file.file_name().into_string().unwrap();
                if name.ends_with(".safetensors") {
                    weights.push((name, std::fs::read(file.path()).unwrap()));
                }
            }
        }
        weights.sort();
        Outcome { lines: lines.collect(), weights }
    }

    /// Files of weights: one a stage.
    pub fn stages(&self) -> usize {
        self.weights.iter().filter(|(name, _)| name.matches('.').count() == 1).count()
    }

    /// The `loss` column.
    pub fn losses(&self) -> Vec<f64> {
        self.lines.iter().filter_map(|line| line.get("loss")?.as_f64()).collect()
    }
}

/// The checked setup of `TINY` with `sets` over it.
pub fn tiny(sets: &[&str]) -> Arc<Setup> {
    setup_of(TINY, sets)
}

/// The checked setup of a config's text with `sets` over it.
pub fn setup_of(text: &str, sets: &[&str]) -> Arc<Setup> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let config = Config::parse(text, &sets).unwrap_or_else(|error| panic!("{sets:?}: {error}"));
    Arc::new(Setup::new(config).unwrap_or_else(|error| panic!("{sets:?}: {error}")))
}

/// Runs a setup as threads.
pub fn as_threads(setup: &Arc<Setup>) -> Outcome {
    let out = TempDir::new().unwrap();
    let coordinator = Coordinator::new(Arc::clone(setup), out.path()).unwrap();
    run_local(setup, out.path(), coordinator, Mode::default()).unwrap();
    Outcome::read(out.path())
}

/// Runs a setup with the oracle.
pub fn by_oracle(setup: &Arc<Setup>) -> Outcome {
    let out = TempDir::new().unwrap();
    let coordinator = Coordinator::new(Arc::clone(setup), out.path()).unwrap();
    run_oracle(setup, out.path(), coordinator, &Mode::default()).unwrap();
    Outcome::read(out.path())
}

/// Runs a setup into a folder that may hold earlier parts of the run.
pub fn trained(setup: Setup, out: &Path, oracle: bool) -> Summary {
    let setup = Arc::new(setup);
    let coordinator = Coordinator::new(Arc::clone(&setup), out).unwrap();
    let mode = Mode::default();
    let result = match oracle {
        true => run_oracle(&setup, out, coordinator, &mode),
        false => run_local(&setup, out, coordinator, mode),
    };
    result.unwrap_or_else(|error| panic!("{error:?}"))
}

/// The bytes of the files of one state.
pub fn files(out: &Path, step: usize) -> Vec<(String, Vec<u8>)> {
    let folder = out.join(format!("checkpoints/step-{step}"));
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .flatten()
        .map(|file| (file.file_name().into_string().unwrap(), std::fs::read(file.path()).unwrap()))
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .collect();
    found.sort();
    found
}

/// A program's run, shown whole when a test fails.
pub struct Finished {
    pub command: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub time: Duration,
    pub timed_out: bool,
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tail = |text: &str| {
            text.lines()
                .rev()
                .take(40)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect::<Vec<_>>()
                .join("\n")
        };
        let late = if self.timed_out { " and was ended for running too long" } else { "" };
        write!(
            f,
            "\n$ {}\nexit code {:?} after {:.1?}{late}\n--- stdout\n{}\n--- stderr\n{}\n",
            self.command,
            self.code,
            self.time,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

impl Finished {
    /// Fails unless the program ended in time with this code.
    pub fn expect_code(self, code: i32) -> Finished {
        assert!(!self.timed_out && self.code == Some(code), "expected exit code {code}:{self}");
        self
    }

    /// The lines of stderr that are the program's own errors.
    pub fn errors(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.contains("error: ")).collect()
    }
}

/// The program under test with these arguments.
pub fn ouroboros(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ouroboros"));
    command.args(args);
    command
}

/// The program under mpirun.
pub fn mpirun(ranks: usize, args: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["-n", &ranks.to_string(), "--oversubscribe", env!("CARGO_BIN_EXE_ouroboros")])
        .args(args);
    // Build machines often run as root, which Open MPI refuses otherwise.
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command
}

/// Runs a program to its end, at most `seconds`; then it is ended by its process id.
pub fn run(command: Command, seconds: u64) -> Finished {
    run_telling(command, seconds, |_| ())
}

/// The same; `told` is told the process id.
pub fn run_telling(mut command: Command, seconds: u64, told: impl FnOnce(u32)) -> Finished {
    let shown = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{shown}: {error}"));
    told(child.id());
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let timed_out = !wait(&mut child, Duration::from_secs(seconds));
    if timed_out {
        end(&mut child);
    }
    let code = child.wait().unwrap().code();
    let time = started.elapsed();
    let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap();
    Finished { command: shown, code, stdout: text(stdout), stderr: text(stderr), time, timed_out }
}

fn collect(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// True if the child ended in time.
fn wait(child: &mut Child, limit: Duration) -> bool {
    let started = Instant::now();
    while started.elapsed() < limit {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

/// mpirun passes SIGTERM on to its ranks; a kill would leave them.
fn end(child: &mut Child) {
    let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    if !wait(child, Duration::from_secs(8)) {
        let _ = child.kill();
    }
}

/// A folder with the tiny config in a file.
pub struct Folder {
    folder: TempDir,
}

impl Folder {
    pub fn new() -> Folder {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("tiny.toml"), TINY).unwrap();
        Folder { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Arguments of `train` over the tiny config into `out`, with `sets` and more.
    pub fn train(&self, out: &str, sets: &[&str], more: &[&str]) -> Vec<String> {
        let mut args = vec!["train".into(), self.text("tiny.toml"), "--out".into(), self.text(out)];
        for set in sets {
            args.extend(["--set".into(), set.to_string()]);
        }
        args.extend(more.iter().map(|arg| arg.to_string()));
        args
    }
}

/// Strings as the slices that `Command` takes.
pub fn slices(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Seconds that a run of a test may take.
pub const LIMIT: u64 = 60;

/// Starts a program, sends a signal once it has made some steps, and waits for its end.
pub fn signalled(
    command: Command,
    metrics: &Path,
    signal: &str,
    whom: impl Fn(u32) -> String,
) -> Finished {
    let lines = || std::fs::read_to_string(metrics).unwrap_or_default().lines().count();
    let before = lines();
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let runner =
            scope.spawn(move || run_telling(command, LIMIT, |id| sender.send(id).unwrap()));
        let id = receiver.recv().unwrap();
        let started = Instant::now();
        while lines() < before + 20 {
            assert!(
                started.elapsed() < Duration::from_secs(30),
                "no steps in {}",
                metrics.display()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let status = Command::new("kill").args([signal, &whom(id)]).status().unwrap();
        assert!(status.success());
        runner.join().unwrap()
    })
}

/// The process of a rank: a child of mpirun's.
pub fn child(mpirun: u32, nth: usize) -> String {
    let listed = Command::new("pgrep").args(["-P", &mpirun.to_string()]).output().unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    text.lines().nth(nth).unwrap_or_else(|| panic!("mpirun has the children {text}")).to_owned()
}
