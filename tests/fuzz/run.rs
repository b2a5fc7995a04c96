//! A process for every target, and who watches it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use proptest::test_runner::{Config, TestCaseError, TestError, TestRng, TestRunner};

use super::mutate::{Mutated, Mutator};
use super::{Parts, TARGETS, Target};

/// An input that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Findings of a target after which it is left.
const ENOUGH: usize = 5;

/// Where a child writes how far it is: the number of the input that it tries, and how many it has tried.
const PLACE: &str = "place";

/// Where it writes what it has found, and where it is told that its time is over.
const FINDING: &str = "finding";
const END: &str = "end";

/// What came of a target.
#[derive(Default)]
pub struct Outcome {
    pub executions: u64,
    pub findings: Vec<String>,
}

/// A folder in memory, where there is such: files are written at every execution.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a temporary folder")
}

/// Runs a target in processes of its own, the next one behind an input that has ended one.
pub fn parent(name: &str, time: Duration, seed: u64, number: Option<&str>) -> Outcome {
    let (begun, mut outcome, mut after) = (Instant::now(), Outcome::default(), 0);
    while outcome.findings.len() < ENOUGH && (begun.elapsed() < time || outcome.executions == 0) {
        let folder = scratch();
        let mut command = Command::new(std::env::current_exe().expect("the path of this program"));
        command.arg(name).arg("--child").arg(folder.path()).args(["--seed", &seed.to_string()]);
        match number {
            Some(number) => command.args(["--number", number]),
            None => command.args(["--after", &after.to_string()]),
        };
        // What the program says to its users goes nowhere.
        let output = || if number.is_some() { Stdio::inherit() } else { Stdio::null() };
        let mut child = command.stdout(output()).stderr(output()).spawn().expect("a process");

        let ended = watch(&mut child, folder.path(), begun + time);
        let (tried, made) = place(folder.path());
        outcome.executions += made;
        if let Err(how) = ended {
            let again =
                format!("again: cargo test --test fuzz -- {name} --seed {seed} --number {tried}");
            let said = std::fs::read_to_string(folder.path().join(FINDING)).unwrap_or_default();
            let said: Vec<&str> = said.lines().take(24).collect();
            outcome
                .findings
                .push(format!("FINDING {name} {tried}: {how}\n{}\n{again}", said.join("\n")));
        }
        after = tried + 1;
        if number.is_some() {
            break;
        }
    }
    outcome
}

/// Waits until a child ends, or its time is over.
fn watch(child: &mut Child, folder: &Path, end: Instant) -> Result<(), String> {
    let (mut last, mut moved) = ((0, 0), Instant::now());
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return match (status.code(), status.signal()) {
                (Some(0), _) => Ok(()),
                (Some(code), _) => Err(format!("exit code {code}")),
                (None, signal) => Err(format!("killed by signal {}", signal.unwrap_or_default())),
            };
        }
        std::thread::sleep(Duration::from_millis(5));

        let now = place(folder);
        if now != last {
            (last, moved) = (now, Instant::now());
        }
        let hangs = moved.elapsed() > PATIENCE;
        // One that is over its time ends itself after its input; it may be at one that takes long.
        if hangs || Instant::now() > end + PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("no end within {} s", PATIENCE.as_secs()));
        }
        if Instant::now() > end {
            let _ = std::fs::write(folder.join(END), "");
        }
    }
}

/// The number of the input that a child tries, and how many it has tried.
fn place(folder: &Path) -> (u64, u64) {
    let mut words = [0u8; 16];
    let read = File::open(folder.join(PLACE)).and_then(|file| file.read_exact_at(&mut words, 0));
    let word =
        |i: usize| u64::from_le_bytes(words[8 * i..8 * i + 8].try_into().expect("eight bytes"));
    if read.is_ok() { (word(0), word(1)) } else { (0, 0) }
}

static PANIC: Mutex<String> = Mutex::new(String::new());

/// Runs one target in this process, from an input on until it is told to end; or one input alone.
pub fn child(
    name: &str,
    folder: &Path,
    seed: u64,
    number: Option<&str>,
    after: Option<&str>,
) -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        let trace = std::backtrace::Backtrace::force_capture().to_string();
        let own: Vec<&str> = trace
            .lines()
            .filter(|line| line.contains("ouroboros") || line.contains("./src/"))
            .take(12)
            .collect();
        *PANIC.lock().expect("a text") = format!("{info}\n{}", own.join("\n"));
    }));
    tch::set_num_threads(1);
    let inside = folder.join("inside");
    std::fs::create_dir(&inside).expect("a folder");
    let (_, make, _) = TARGETS.iter().find(|(of, ..)| *of == name).expect("a target");
    let made = catch_unwind(AssertUnwindSafe(|| Trial::new(make(&inside), folder, inside.clone())));
    let Ok(mut trial) = made else { return told(folder, &PANIC.lock().expect("a text")) };

    let parse = |text: &str| text.parse::<u64>().expect("a whole number");
    if let Some(number) = number.map(parse) {
        return match trial.number(seed, number, true) {
            Ok(()) => ExitCode::SUCCESS,
            Err(finding) => told(folder, &finding),
        };
    }
    let mut number = after.map_or(0, parse);
    while !folder.join(END).exists() {
        for _ in 0..16 {
            if let Err(finding) = trial.number(seed, number, false) {
                return told(folder, &finding);
            }
            number += 1;
        }
    }
    ExitCode::SUCCESS
}

fn told(folder: &Path, finding: &str) -> ExitCode {
    std::fs::write(folder.join(FINDING), finding).expect("a file");
    ExitCode::from(1)
}

/// A target at work.
struct Trial {
    target: Box<dyn Target>,
    mutator: Mutator,
    folder: PathBuf,
    /// The target's own folder.
    inside: PathBuf,
    place: File,
    made: u64,
}

impl Trial {
    fn new(target: Box<dyn Target>, folder: &Path, inside: PathBuf) -> Trial {
        let seeds = target.seeds();
        for (i, seed) in seeds.iter().enumerate() {
            assert!(!seed.is_empty(), "seed {i}");
        }
        let mutator = Mutator::new(seeds, target.words());
        let place = File::create(folder.join(PLACE)).expect("a file");
        Trial { target, mutator, folder: folder.to_owned(), inside, place, made: 0 }
    }

    /// Tries one input; what is found, with the least input that still shows it.
    fn number(&mut self, seed: u64, number: u64, show: bool) -> Result<(), String> {
        let mut bytes = [0u8; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&number.to_le_bytes());
        let config = Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_iters: 400,
            ..Config::default()
        };
        let rng = TestRng::from_seed(config.rng_algorithm, &bytes);
        let mut runner = TestRunner::new_with_rng(config, rng);

        let (strategy, show) = (self.mutator.strategy(), std::cell::Cell::new(show));
        let this = std::cell::RefCell::new(self);
        let found = runner.run(&strategy, |mutated: Mutated| {
            let mut this = this.borrow_mut();
            let parts = this.mutator.apply(&mutated);
            if show.take() {
                ouroboros::say!("{}", shown(&parts));
            }
            this.input(&parts, number).map_err(TestCaseError::fail)
        });
        let this = this.into_inner();
        match found {
            Ok(()) => Ok(()),
            Err(TestError::Fail(reason, mutated)) => Err(format!(
                "{reason}\nleast input: {mutated:?}\n{}",
                shown(&this.mutator.apply(&mutated))
            )),
            Err(other) => Err(other.to_string()),
        }
    }

    fn input(&mut self, parts: &Parts, number: u64) -> Result<(), String> {
        self.made += 1;
        let words = [number.to_le_bytes(), self.made.to_le_bytes()].concat();
        self.place.write_all_at(&words, 0).map_err(|error| error.to_string())?;

        let before = allocated();
        let read = catch_unwind(AssertUnwindSafe(|| self.target.read(parts)));
        let taken = allocated() - before;
        match read {
            Err(_) => return Err(PANIC.lock().expect("a text").clone()),
            Ok(Err(problem)) => return Err(problem),
            Ok(Ok(())) => {}
        }

        let bytes: usize = parts.iter().map(Vec::len).sum();
        let room = self.target.room(bytes) as u64;
        if taken > room {
            return Err(format!(
                "{taken} bytes were allocated for an input of {bytes}, more than {room}"
            ));
        }
        self.outside()
    }

    /// Whether something stands beside the target's folder that was not there.
    fn outside(&self) -> Result<(), String> {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if entry.path() != self.inside && ![PLACE, FINDING, END].iter().any(|own| name == *own)
            {
                return Err(format!("{} was written outside of the folder", name.display()));
            }
        }
        Ok(())
    }
}

/// Bytes that this thread has allocated so far.
fn allocated() -> u64 {
    thread_local! {
        static COUNT: Option<tikv_jemalloc_ctl::thread::ThreadLocal<u64>> =
            tikv_jemalloc_ctl::thread::allocatedp::read().ok();
    }
    COUNT.with(|count| count.as_ref().expect("a heap that counts").get())
}

fn shown(parts: &Parts) -> String {
    let part = |part: &Vec<u8>| {
        let text: String = part.escape_ascii().to_string().replace("\\n", "\n    ");
        format!("    {}", text.chars().take(3000).collect::<String>())
    };
    parts.iter().map(part).collect::<Vec<_>>().join("\n    ----\n")
}
