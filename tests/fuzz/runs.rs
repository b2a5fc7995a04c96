//! The folder of a run, as `report` and `watch` read it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ouroboros::report::{self, Figures, report};
use ouroboros::watch::{self, watch};

use super::{Parts, Target};

/// The files that are read, the order of the parts.
const FILES: [&str; 4] = ["metrics.jsonl", "events.jsonl", "places.json", "config.toml"];

const CONFIG: &str =
    "name = \"small\"\nseed = 1\nbatch = 8\n[grid]\nstages = 2\n[optimizer]\nbetas = [0.9, 0.95]\n";

const START: &str = r#"{"time":1795829116.5,"step":0,"kind":"start","text":"started","facts":{"program":"ouroboros 0.1.0","name":"small","grid":"2x1","stages":2,"replicas":1,"ring":false,"places":["stage 0, replica 0","stage 1, replica 0"],"threads":false,"oracle":false,"bench":false,"emulated":false,"schedule":"decoupled","microbatches":2,"delays":[1,0],"ahead":[1,0],"start":0,"steps":12,"tokens_a_step":2048,"parameters":462336,"unit":"byte","bytes_per_token":1.0,"vocabulary":256,"tokens":"d30345fef8ac3570","device":"cpu","floor":0.8887684664808326,"predicted_bytes":[54401365,40757930]}}"#;

const EVENTS: [&str; 6] = [
    r#"{"time":1795829116.7,"step":4,"kind":"saved","text":"step      4  saved 3.8 MiB"}"#,
    r#"{"time":1795829116.8,"step":5,"kind":"straggler","text":"stage 1 is slow"}"#,
    r#"{"time":1795829116.9,"step":5,"kind":"skipped","text":"not finite"}"#,
    r#"{"time":1795829117.0,"step":6,"kind":"trace","text":"trace-2-4.json.gz"}"#,
    r#"{"time":1795829117.1,"step":6,"kind":"fault","text":"rank 1 was killed"}"#,
    r#"{"time":1795829117.7,"step":12,"kind":"end","text":"ended","facts":{"stopped":false,"eval_loss":5.1,"step_s":0.07,"peak_bytes":[51068928,36200448]}}"#,
];

struct Runs {
    run: PathBuf,
    seeds: Vec<Parts>,
}

/// Parts: the four files.
pub fn runs(folder: &Path) -> Box<dyn Target> {
    let whole = vec![metrics(1..13), events(&[]), places(), CONFIG.into()];
    // One that was killed, and has gone on from an earlier state.
    let twice = [metrics(1..7), metrics(5..13)].concat();
    let resumed = vec![twice, events(&[START]), places(), CONFIG.into()];
    let run = folder.join("small");
    fs::create_dir(&run).expect("a folder");
    let mut it = Runs { run, seeds: vec![whole.clone(), resumed] };

    assert_eq!(it.read(&whole), Ok(()), "the good one");
    let figures = Figures::read(&it.run).expect("a run");
    assert!(figures.notes.is_empty(), "{:?}", figures.notes);
    assert!(figures.proof.is_some() && figures.staleness.len() == 4, "all of it is understood");
    assert!(figures.events.len() == 1 + EVENTS.len() && figures.eval_loss.is_some());
    Box::new(it)
}

/// Lines of so many steps: losses, evaluations, and what is measured of the staleness.
fn metrics(steps: std::ops::Range<u64>) -> Vec<u8> {
    let lines = steps.flat_map(|step| {
        let loss = 5.0 - step as f64 / 10.0;
        let mut lines = vec![format!(
            r#"{{"step":{step},"loss":{loss},"lr":0.001,"tokens":{},"step_s":0.06,"tokens_per_s":34000.5,"grad_norm":[3.25,null],"table_norm":1.3}}"#,
            2048 * step
        )];
        if step % 6 == 0 {
            lines.push(format!(r#"{{"step":{step},"eval_loss":{loss},"eval_tokens":32768,"eval_bpc":7.9,"eval_bpb":7.9}}"#));
        }
        if step % 6 == 3 {
            lines.push(format!(r#"{{"step":{step},"staleness":[{{"stage":0,"age":1,"seconds":0.09,"distance":0.01,"relative":0.0003,"travelled":0.01,"roles":{{"matrices":0.0001,"tables":0.0005}}}},{{"stage":"table","age":0,"distance":0.0,"relative":0.0,"travelled":0.0,"roles":{{}}}}]}}"#));
        }
        if step % 6 == 4 {
            lines.push(format!(r#"{{"step":{step},"staleness":[{{"stage":0,"cosine":0.98,"fresh_cosine":0.9}},{{"stage":"table","cosine":null}}]}}"#));
        }
        lines
    });
    (lines.collect::<Vec<_>>().join("\n") + "\n").into_bytes()
}

/// The lines of events, some more before the last.
fn events(more: &[&str]) -> Vec<u8> {
    let (last, before) = EVENTS.split_last().expect("lines");
    ([&[START], before, more, &[*last]].concat().join("\n") + "\n").into_bytes()
}

fn places() -> Vec<u8> {
    let place = |stage: usize| {
        let spent = serde_json::json!({
            "steps": 12, "seconds": 1.5,
            "kinds": {"compute": 1.2, "copies": 0.01, "downstream": 0.1, "idle": 0.004, "reduce": 5.7e-6, "table": 0.05, "update": 0.09, "upstream": 0.0},
            "stages": [{"stage": stage, "forward": 0.27, "backward": 0.41, "update": 0.09, "copies": 0.007, "table": 0.004, "microbatches": 24, "updates": 12}],
        });
        serde_json::json!({
            "name": format!("stage {stage}, replica 0"), "replica": 0, "stages": [stage], "step": 12, "at": 1795829117.7,
            "recent": spent, "total": spent, "memory": 215511040u64, "predicted": 54401365u64,
        })
    };
    let places = serde_json::json!({"0": place(0), "1": place(1)});
    serde_json::json!({"updated": 1795829117.7, "places": places}).to_string().into_bytes()
}

impl Target for Runs {
    fn seeds(&self) -> Vec<Parts> {
        self.seeds.clone()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "null",
            "\"step\":18446744073709551615",
            "\"step\":0",
            "\"stages\":4096",
            "\"microbatches\":1000000",
            "\"delays\":[9]",
            "\"ring\":true",
            "\"schedule\":\"gpipe\"",
            "1e400",
            "-1e308",
            "\"</script><script>\"",
            "\u{1b}[2J",
            "{",
            "[",
            "\n",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let page = self.run.join("report.html");
        let _ = fs::remove_file(&page);
        for (name, bytes) in FILES.iter().zip(parts) {
            fs::write(self.run.join(name), bytes).map_err(|error| error.to_string())?;
        }

        let run = self.run.clone();
        let once = watch::Request { run: run.clone(), every: Duration::from_secs(1), once: true };
        let asked = report::Request { runs: vec![run.clone(), run], out: None, json: false };
        let told = [report(&asked), watch(&once)];
        if told[0].is_ok() && !page.exists() {
            return Err("there is no page".to_owned());
        }

        let named = |error: &ouroboros::error::Error| {
            error.to_string().contains(&self.run.display().to_string())
        };
        match told.iter().filter_map(|told| told.as_ref().err()).find(|error| !named(error)) {
            Some(error) => Err(format!("{error} does not name the folder")),
            None => Ok(()),
        }
    }

    /// A page has marks of its own, whatever it is told.
    fn room(&self, bytes: usize) -> usize {
        (64 << 20) + 256 * bytes
    }
}
