//! TensorBoard's event file in the run's folder: `tensorboard --logdir runs` shows the curves of all
//! runs, and compares their settings (HParams).
//!
//! ```text
//! record   of TFRecord, its data an Event, as protobuf
//! Event    wall time, step, values: a tag and a number each
//! ```
//!
//! Tags: `loss`, `lr`, `tokens_per_s`, `step_s`, `grad_norm/stage 0`, `eval/loss`, ... A run that is
//! resumed takes over what the earlier file says of the steps before, so that no step is there twice.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prost::Message;

use super::records::{is_cut, read_record, write_record};
use super::{EvalLine, EventKind, EventLine, PlaceLine, Sink, StalenessLine, StepLine, wall_time};
use crate::clock::TimeKind;
use crate::error::{Error, Result};
use crate::files;
use crate::staleness::Staleness;

/// Between two flushes: TensorBoard looks every few seconds.
const FLUSH: Duration = Duration::from_secs(2);

/// What TensorBoard looks for in a file's name; the name of a file that is not complete, without it.
const MARK: &str = ".tfevents.";
const UNFINISHED: &str = ".tensorboard.tmp";

/// The parts of TensorFlow's `event.proto`, `summary.proto`, `tensor.proto` and of the HParams
/// plugin's `plugin_data.proto` that are used, with their numbers of fields.
mod proto {
    use std::collections::HashMap;

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Event {
        #[prost(double, tag = "1")]
        pub wall_time: f64,
        #[prost(int64, tag = "2")]
        pub step: i64,
        #[prost(string, optional, tag = "3")]
        pub file_version: Option<String>,
        #[prost(message, optional, tag = "5")]
        pub summary: Option<Summary>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Summary {
        #[prost(message, repeated, tag = "1")]
        pub value: Vec<Value>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Value {
        #[prost(string, tag = "1")]
        pub tag: String,
        #[prost(float, optional, tag = "2")]
        pub simple_value: Option<f32>,
        #[prost(message, optional, tag = "8")]
        pub tensor: Option<Tensor>,
        #[prost(message, optional, tag = "9")]
        pub metadata: Option<Metadata>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Tensor {
        #[prost(int32, tag = "1")]
        pub dtype: i32,
        #[prost(message, optional, tag = "2")]
        pub shape: Option<Shape>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Shape {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Metadata {
        #[prost(message, optional, tag = "1")]
        pub plugin: Option<Plugin>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Plugin {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(bytes = "vec", tag = "2")]
        pub content: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct HParams {
        #[prost(int32, tag = "1")]
        pub version: i32,
        #[prost(message, optional, tag = "3")]
        pub start: Option<SessionStart>,
        #[prost(message, optional, tag = "4")]
        pub end: Option<SessionEnd>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct SessionStart {
        #[prost(map = "string, message", tag = "1")]
        pub hparams: HashMap<String, Setting>,
        #[prost(double, tag = "5")]
        pub start_time_secs: f64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct SessionEnd {
        #[prost(int32, tag = "1")]
        pub status: i32,
        #[prost(double, tag = "2")]
        pub end_time_secs: f64,
    }

    /// `google.protobuf.Value`.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Setting {
        #[prost(oneof = "Kind", tags = "2, 3, 4")]
        pub kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Kind {
        #[prost(double, tag = "2")]
        Number(f64),
        #[prost(string, tag = "3")]
        Text(String),
        #[prost(bool, tag = "4")]
        Switch(bool),
    }
}

use proto::{
    Event, HParams, Kind, Metadata, Plugin, SessionEnd, SessionStart, Setting, Summary, Value,
};

/// `DT_FLOAT`, and `STATUS_SUCCESS`.
const FLOAT: i32 = 1;
const SUCCESS: i32 = 1;

/// The event file of a run.
pub struct TensorBoard {
    path: PathBuf,
    file: BufWriter<File>,
    flushed: Instant,
}

impl TensorBoard {
    /// A new file in the run's folder, with the settings of the run and, where it goes on at
    /// `resumed`, what earlier files say of the steps up to it. Those are removed.
    ///
    /// # Errors
    /// [`Error::Unwritten`] if it cannot be.
    pub fn begin(
        out: &Path,
        resumed: Option<usize>,
        settings: &[(String, serde_json::Value)],
    ) -> Result<TensorBoard> {
        let wrong = |error| Error::unwritten(&out.join("the event file of TensorBoard"), error);
        let temporary = out.join(UNFINISHED);
        let begun = TensorBoard::write_new(out, &temporary, resumed, settings).map_err(wrong);
        if begun.is_err() {
            let _ = std::fs::remove_file(&temporary); // The first error is the one to tell.
        }
        begun
    }

    fn write_new(
        out: &Path,
        temporary: &Path,
        resumed: Option<usize>,
        settings: &[(String, serde_json::Value)],
    ) -> std::io::Result<TensorBoard> {
        let earlier = event_files(out);
        let now = wall_time();
        let name = format!("events.out{MARK}{}.{}", now as u64, std::process::id());
        let path = out.join(name);
        let mut file = BufWriter::new(files::create(temporary)?);
        let version = Event {
            wall_time: now,
            file_version: Some("brain.Event:2".into()),
            ..Event::default()
        };
        let (kept, unread) = resumed.map(|start| kept(&earlier, start)).unwrap_or_default();
        let events = std::iter::once(version).chain(session(settings, now));
        for event in events.chain(kept) {
            write_record(&mut file, &event.encode_to_vec())?;
        }

        file.flush()?;
        for (number, other) in unread.iter().enumerate() {
            // Under a name that TensorBoard does not look for.
            let aside = out.join(format!("tensorboard.previous.{}.{number}", now as u64));
            std::fs::rename(other, &aside)?;
            complain!(
                "note: {} cannot be read whole; what could be is taken over, it is {} now",
                other.display(),
                aside.display()
            );
        }

        std::fs::rename(temporary, &path)?;
        let read = |other: &&PathBuf| **other != path && !unread.contains(other);
        earlier.iter().filter(read).try_for_each(std::fs::remove_file)?;
        Ok(TensorBoard { path, file, flushed: Instant::now() })
    }

    fn add(&mut self, step: usize, values: Vec<(String, f64)>) -> Result<()> {
        let scalar = |(tag, value): (String, f64)| Value {
            tag,
            simple_value: Some(value as f32),
            ..Value::default()
        };
        let summary = Summary { value: values.into_iter().map(scalar).collect() };
        self.write(&Event {
            wall_time: wall_time(),
            step: step as i64,
            summary: Some(summary),
            ..Event::default()
        })
    }

    fn write(&mut self, event: &Event) -> Result<()> {
        let due = self.flushed.elapsed() >= FLUSH;
        if due {
            self.flushed = Instant::now();
        }

        write_record(&mut self.file, &event.encode_to_vec())
            .and_then(|()| if due { self.file.flush() } else { Ok(()) })
            .map_err(|error| Error::unwritten(&self.path, error))
    }
}

impl Sink for TensorBoard {
    fn step(&mut self, line: &StepLine) -> Result<()> {
        let mut values = vec![
            ("loss".to_owned(), line.loss),
            ("lr".to_owned(), line.lr),
            ("tokens".to_owned(), line.tokens as f64),
            ("tokens_per_s".to_owned(), line.tokens_per_s),
            ("step_s".to_owned(), line.step_s),
        ];
        let norms = line.grad_norm.iter().enumerate();
        values.extend(norms.map(|(stage, norm)| (format!("grad_norm/stage {stage}"), *norm)));
        values.extend(line.table_norm.map(|norm| ("grad_norm/table".to_owned(), norm)));
        let given = line.source_tokens.iter().flatten().enumerate();
        values.extend(given.map(|(n, tokens)| (format!("source_tokens/{n}"), *tokens as f64)));
        self.add(line.step, values)
    }

    fn eval(&mut self, line: &EvalLine) -> Result<()> {
        let all = [
            ("eval/loss", Some(line.eval_loss)),
            ("eval/bpc", line.eval_bpc),
            ("eval/ppl", line.eval_ppl),
            ("eval/bpb", line.eval_bpb),
        ];
        let known = all.into_iter().filter_map(|(tag, value)| Some((tag.to_owned(), value?)));
        self.add(line.step, known.collect())
    }

    fn staleness(&mut self, line: &StalenessLine) -> Result<()> {
        let values = line.staleness.iter().flat_map(|of| {
            let name = stage_name(&of.stage);
            let of_roles = |key: &'static str, roles: &BTreeMap<String, f64>| {
                let tag = move |(role, value): (&String, &f64)| (format!("{key}/{role}"), *value);
                roles.iter().map(tag).collect::<Vec<_>>()
            };
            let roles = of_roles("relative", &of.measured.roles);
            let distances = of_roles("distance", &of.measured.role_distances);
            let numbers = numbers(&of.measured).into_iter();
            numbers
                .map(|(key, value)| (key.to_owned(), value))
                .chain(roles)
                .chain(distances)
                .map(move |(key, value)| (format!("staleness/{key}/{name}"), value))
                .collect::<Vec<_>>()
        });
        self.add(line.step, values.collect())
    }

    fn place(&mut self, line: &PlaceLine) -> Result<()> {
        let PlaceLine { name, times, .. } = line;
        let share = |(kind, word): &(TimeKind, &str)| {
            (format!("time/{name}/{word}"), times.shares[*kind as usize] / times.seconds)
        };
        let memory =
            line.memory.map(|bytes| (format!("memory_mib/{name}"), (bytes >> 10) as f64 / 1024.0));
        self.add(line.step, TimeKind::ALL.iter().map(share).chain(memory).collect())
    }

    /// A resumed run continues the curves up to here: they are on the disk from now on.
    fn event(&mut self, line: &EventLine) -> Result<()> {
        match line.kind {
            EventKind::Saved => {
                self.file.flush().map_err(|error| Error::unwritten(&self.path, error))
            }
            _ => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<()> {
        let end = SessionEnd { status: SUCCESS, end_time_secs: wall_time() };
        let data = HParams { version: 0, start: None, end: Some(end) };
        self.write(&hparams_event("_hparams_/session_end_info", &data, wall_time()))?;
        self.file.flush().map_err(|error| Error::unwritten(&self.path, error))
    }
}

/// A stage, or the table.
fn stage_name(stage: &serde_json::Value) -> String {
    match stage {
        serde_json::Value::String(name) => name.clone(),
        number => format!("stage {number}"),
    }
}

/// The numbers of a measurement.
fn numbers(measured: &Staleness) -> Vec<(&'static str, f64)> {
    let Staleness { age, seconds, distance, relative, travelled, cosine, fresh_cosine, .. } =
        measured;
    let age = age.map(|age| age as f64);
    let all = [
        ("age", age),
        ("seconds", *seconds),
        ("distance", *distance),
        ("relative", *relative),
        ("travelled", *travelled),
        ("cosine", *cosine),
        ("fresh_cosine", *fresh_cosine),
    ];
    all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

/// What tells the HParams plugin the settings of a run.
fn session(settings: &[(String, serde_json::Value)], now: f64) -> Option<Event> {
    let setting = |value: &serde_json::Value| match value {
        serde_json::Value::Number(number) => Kind::Number(number.as_f64().unwrap_or(f64::NAN)),
        serde_json::Value::Bool(on) => Kind::Switch(*on),
        serde_json::Value::String(text) => Kind::Text(text.clone()),
        other => Kind::Text(other.to_string()),
    };
    let hparams: HashMap<String, Setting> = settings
        .iter()
        .map(|(key, value)| (key.clone(), Setting { kind: Some(setting(value)) }))
        .collect();
    let start = SessionStart { hparams, start_time_secs: now };
    let data = HParams { version: 0, start: Some(start), end: None };
    (!settings.is_empty()).then(|| hparams_event("_hparams_/session_start_info", &data, now))
}

fn hparams_event(tag: &str, data: &HParams, now: f64) -> Event {
    let plugin = Plugin { name: "hparams".into(), content: data.encode_to_vec() };
    let value = Value {
        tag: tag.into(),
        // What is looked at is the content; the plugin wants a tensor beside it.
        tensor: Some(proto::Tensor { dtype: FLOAT, shape: Some(proto::Shape {}) }),
        metadata: Some(Metadata { plugin: Some(plugin) }),
        ..Value::default()
    };
    let summary = Some(Summary { value: vec![value] });
    Event { wall_time: now, summary, ..Event::default() }
}

/// The event files of a folder, the oldest first.
fn event_files(out: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(out)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            is_file && name.starts_with("events.out") && name.contains(MARK)
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// The scalars of earlier files that a run which goes on at `start` will not write again: as those of
/// `metrics.jsonl`; and the files that cannot be read whole.
fn kept(earlier: &[PathBuf], start: usize) -> (Vec<Event>, Vec<PathBuf>) {
    let (mut events, mut unread) = (Vec::new(), Vec::new());
    for path in earlier {
        let bytes = files::read(path).unwrap_or_default();
        let (mut rest, mut damaged) = (&bytes[..], bytes.is_empty());
        while let Some(event) = read_record(&mut rest) {
            let Some(event) = event.and_then(|data| Event::decode(data).ok()) else {
                damaged = true;
                continue;
            };

            let values = event.summary.iter().flat_map(|summary| &summary.value);
            let mut scalars = values.filter(|value| value.simple_value.is_some()).peekable();
            let evaluates = scalars.peek().is_some_and(|value| value.tag.starts_with("eval/"));
            let step = event.step.max(0) as usize;
            if scalars.peek().is_some() && (step < start || step == start && !evaluates) {
                events.push(event);
            }
        }

        // The last record of a process that was killed may be cut.
        if damaged || !rest.is_empty() && !is_cut(rest) {
            unread.push(path.clone());
        }
    }
    (events, unread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: usize, loss: f64) -> StepLine<'static> {
        StepLine {
            step,
            loss,
            lr: 0.1,
            tokens: 8 * step as u64,
            step_s: 0.5,
            tokens_per_s: 16.0,
            grad_norm: &[1.0, 2.0],
            table_norm: None,
            source_tokens: None,
            time: 1.0,
        }
    }

    fn eval(step: usize) -> EvalLine {
        EvalLine {
            step,
            eval_loss: 2.0,
            eval_tokens: 9,
            eval_bpc: None,
            eval_ppl: None,
            eval_bpb: None,
        }
    }

    fn events(out: &Path) -> Vec<Event> {
        let [file] = &event_files(out)[..] else { panic!("{:?}", event_files(out)) };
        let bytes = std::fs::read(file).unwrap();
        let mut rest = &bytes[..];
        let events = std::iter::from_fn(|| read_record(&mut rest))
            .map(|data| Event::decode(data.unwrap()).unwrap())
            .collect();
        assert!(rest.is_empty());
        events
    }

    fn scalars(out: &Path, tag: &str) -> Vec<(i64, f32)> {
        let of = |event: Event| {
            let found = event.summary?.value.into_iter().find(|value| value.tag == tag)?;
            Some((event.step, found.simple_value?))
        };
        events(out).into_iter().filter_map(of).collect()
    }

    #[test]
    fn a_resumed_run_has_no_step_twice() {
        let out = tempfile::tempdir().unwrap();
        let settings = [("optimizer.lr".to_owned(), serde_json::json!(0.25))];
        let mut first = TensorBoard::begin(out.path(), None, &settings).unwrap();
        for step in 1..=5 {
            first.step(&line(step, 6.0 - step as f64)).unwrap();
            first.eval(&eval(step)).unwrap();
        }
        drop(first);
        // What a kill has cut off.
        let [path] = &event_files(out.path())[..] else { panic!() };
        let mut bytes = std::fs::read(path).unwrap();
        bytes.truncate(bytes.len() - 3);
        std::fs::write(path, bytes).unwrap();

        let mut second = TensorBoard::begin(out.path(), Some(3), &settings).unwrap();
        for step in 4..=6 {
            second.step(&line(step, 0.5)).unwrap();
        }
        second.finish().unwrap();
        let losses = [(1, 5.0), (2, 4.0), (3, 3.0), (4, 0.5), (5, 0.5), (6, 0.5)];
        assert_eq!(scalars(out.path(), "loss"), losses);
        assert_eq!(scalars(out.path(), "grad_norm/stage 1").len(), 6);
        // The evaluation after step 3 is made again.
        assert_eq!(scalars(out.path(), "eval/loss"), [(1, 2.0), (2, 2.0)]);

        let starts = events(out.path())
            .into_iter()
            .filter_map(|event| event.summary)
            .flat_map(|of| of.value);
        let starts: Vec<Value> =
            starts.filter(|value| value.tag.starts_with("_hparams_")).collect();
        assert_eq!(starts.len(), 2, "a start and an end");
        let content = &starts[0].metadata.as_ref().unwrap().plugin.as_ref().unwrap().content[..];
        let told = HParams::decode(content).unwrap().start.unwrap();
        assert_eq!(told.hparams["optimizer.lr"].kind, Some(Kind::Number(0.25)));

        // A record whose data is damaged takes no other with it, and the file is put aside.
        let [path] = &event_files(out.path())[..] else { panic!() };
        let mut bytes = std::fs::read(path).unwrap();
        let at = bytes.windows(9).position(|bytes| bytes == b"grad_norm").unwrap();
        bytes[at] ^= 1;
        std::fs::write(path, &bytes).unwrap();
        drop(TensorBoard::begin(out.path(), Some(6), &settings).unwrap());
        assert_eq!(scalars(out.path(), "loss"), losses[1..]);
        let aside = std::fs::read_dir(out.path()).unwrap().flatten().find_map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            name.starts_with("tensorboard.previous.").then(|| entry.path())
        });
        assert_eq!(std::fs::read(aside.unwrap()).unwrap(), bytes);

        // A run that begins anew begins a new curve.
        drop(TensorBoard::begin(out.path(), None, &settings).unwrap());
        assert_eq!(scalars(out.path(), "loss"), []);
    }
}
