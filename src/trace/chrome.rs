//! The parts of all ranks as one file of Chrome's trace event format, packed: what Perfetto
//! (<https://ui.perfetto.dev>) and `chrome://tracing` open. Neither is needed to read it: it is JSON.
//!
//! The format is that of the document "Trace Event Format" of the Chromium project: complete events
//! (`X`) on the lanes, flows (`s`, `t`, `f`) from a send over its transfer to its receive, counters
//! (`C`), names (`M`); times in microseconds.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::event::Message;
use super::part::leave_room;
use super::{Count, Event, Lane, Moment, Offset, Part, Span, Wait, Window};
use crate::clock::TimeKind;
use crate::files;
use crate::grid::Grid;
use crate::schedule::{Action, Op, Pass, Schedule};

/// What stands beside the events.
#[derive(Debug, Clone)]
pub struct About {
    /// Of the run.
    pub name: String,
    pub grid: Grid,
    pub schedule: Schedule,
    pub window: Window,
    /// Bytes that stay free on the disk.
    pub reserve: u64,
    /// Whether the ranks are threads of one process: their memory is that of all.
    pub threads: bool,
}

/// A rank's part, and what is to be taken from its moments.
pub type Aligned = (usize, PathBuf, Offset);

/// Writes the trace of all parts to `path`.
///
/// # Errors
/// What cannot be read or written.
pub fn merge(about: &About, parts: &[Aligned], path: &Path) -> io::Result<()> {
    // Packed it is a small part of them.
    let bytes: u64 =
        parts.iter().filter_map(|(_, part, _)| Some(part.metadata().ok()?.len())).sum();
    leave_room(path, about.reserve + bytes / 4)?;
    let (origin, flows) = survey(about, parts)?;
    let temporary = files::temporary(path);
    let written = write(about, parts, origin, &flows, &temporary)
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary); // The first error is the one to tell.
    }
    written
}

/// Nanoseconds by which two actions of a GPU may seem to overlap.
const ROUNDED: u64 = 10_000;

/// A message whose ends are in the trace, by its replica: the number of its arrow.
type Flows = HashMap<(usize, Message), usize>;

/// The first moment of all, and the messages of which both ends are there.
fn survey(about: &About, parts: &[Aligned]) -> io::Result<(i64, Flows)> {
    let (mut origin, mut ends) = (i64::MAX, HashMap::new());
    for (rank, path, offset) in parts {
        let replica = replica(about, *rank);
        for event in Part::read(path)? {
            let event = event?;
            origin = origin.min(first(&event).0 as i64 - offset.ahead);
            if let Event::Action { action, waits: false, .. } = event
                && let Some((message, sends)) = Message::of(&action, &about.schedule)
            {
                let [sent, taken]: &mut [bool; 2] = ends.entry((replica, message)).or_default();
                *(if sends { sent } else { taken }) = true;
            }
        }
    }

    let whole = ends.into_iter().filter(|(_, ends)| *ends == [true; 2]);
    Ok((origin, whole.enumerate().map(|(number, (message, _))| (message, number)).collect()))
}

fn first(event: &Event) -> Moment {
    match event {
        Event::Action { span, .. }
        | Event::Wait { span, .. }
        | Event::Transfer { span, .. }
        | Event::Sum { span, .. }
        | Event::Write { span, .. } => span.begin,
        Event::Count { at, .. } => *at,
    }
}

fn replica(about: &About, rank: usize) -> usize {
    about.grid.held(rank)[0].replica
}

fn write(
    about: &About,
    parts: &[Aligned],
    origin: i64,
    flows: &Flows,
    path: &Path,
) -> io::Result<()> {
    let packed = GzEncoder::new(files::create(path)?, Compression::fast());
    let mut out = Out { file: BufWriter::with_capacity(1 << 16, packed), events: 0 };
    let other = json!({
        "run": about.name,
        "grid": about.grid.to_string(),
        "steps": about.window.to_string(),
        "microbatches": about.schedule.microbatches,
        "program": concat!("ouroboros ", env!("CARGO_PKG_VERSION")),
        "clocks": clocks(parts),
        "clock_error_us": error(parts) as f64 / 1e3,
    });
    write!(out.file, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{other},\"traceEvents\":[")?;
    names(about, &mut out)?;

    for (rank, path, offset) in parts {
        let (zero, threads) = (origin + offset.ahead, about.threads && *rank > 0);
        let mut lanes =
            Lanes { about, flows, replica: replica(about, *rank), zero, busy: BTreeMap::new() };
        for event in Part::read(path)? {
            match event? {
                Event::Count { count: Count::Memory, .. } if threads => {}
                event => lanes.put(&event, &mut out)?,
            }
        }
    }

    out.file.write_all(b"\n]}\n")?;
    out.file.into_inner().map_err(io::IntoInnerError::into_error)?.finish()?.sync_all()
}

/// By how much the clocks of two ranks may be apart at most: each is known beside rank 0's.
fn error(parts: &[Aligned]) -> u64 {
    let mut errors: Vec<u64> = parts.iter().map(|(.., offset)| offset.error).collect();
    errors.sort_unstable();
    errors.iter().rev().take(2).sum()
}

/// How well the clocks of the ranks are aligned, in words.
fn clocks(parts: &[Aligned]) -> String {
    match error(parts) {
        0 => "one clock".to_owned(),
        error => format!("aligned within {:.1} us", error as f64 / 1e3),
    }
}

/// Names and order of processes and threads.
fn names(about: &About, out: &mut Out) -> io::Result<()> {
    for replica in 0..about.grid.replicas {
        let name = |what: &str, tid: Option<usize>, args: Value| match tid {
            None => json!({"ph": "M", "name": what, "pid": replica, "args": args}),
            Some(tid) => json!({"ph": "M", "name": what, "pid": replica, "tid": tid, "args": args}),
        };

        out.event(&name("process_name", None, json!({"name": format!("replica {replica}")})))?;
        out.event(&name("process_sort_index", None, json!({"sort_index": replica})))?;
        for stage in 0..about.grid.stages {
            for (lane, word) in Lane::ALL {
                let tid = tid(stage, lane);
                let text = format!("stage {stage}: {word}");
                out.event(&name("thread_name", Some(tid), json!({"name": text})))?;
                out.event(&name("thread_sort_index", Some(tid), json!({"sort_index": tid})))?;
            }
        }
    }
    Ok(())
}

/// The number of a place's lane.
fn tid(stage: usize, lane: Lane) -> usize {
    Lane::ALL.len() * stage + lane as usize
}

/// The list of events, as it grows.
struct Out {
    file: BufWriter<GzEncoder<std::fs::File>>,
    events: usize,
}

impl Out {
    fn event(&mut self, event: &Value) -> io::Result<()> {
        let before: &[u8] = if self.events == 0 { b"\n" } else { b",\n" };
        self.events += 1;
        self.file.write_all(before)?;
        Ok(serde_json::to_writer(&mut self.file, event)?)
    }
}

/// The lanes of the places of one rank.
struct Lanes<'a> {
    about: &'a About,
    flows: &'a Flows,
    replica: usize,
    /// What the trace's origin is in moments of this rank.
    zero: i64,
    /// Until when a lane that takes one thing after the other is busy.
    busy: BTreeMap<usize, Moment>,
}

/// What is drawn of an event.
struct Slice {
    lane: Lane,
    stage: usize,
    name: String,
    kind: &'static str,
    span: Span,
    args: Value,
}

impl Lanes<'_> {
    fn put(&mut self, event: &Event, out: &mut Out) -> io::Result<()> {
        let slice = match event {
            Event::Action { action, waits, span } => Slice {
                lane: Lane::Compute,
                stage: action.stage,
                name: if *waits { waited(action.op) } else { word(action) }.to_owned(),
                kind: kind(action, *waits),
                span: *span,
                args: about(action),
            },
            Event::Wait { stage, wait, span } => {
                let (name, kind) = match wait {
                    Wait::Between => ("idle", "idle"),
                    Wait::Gate => ("wait for rank 0", "gate"),
                    Wait::Elsewhere => ("the device's other stage", "elsewhere"),
                };
                let (lane, name, args) = (Lane::Compute, name.to_owned(), json!({}));
                Slice { lane, stage: *stage, name, kind, span: *span, args }
            }
            Event::Transfer { action, bytes, span } => {
                let mut args = about(action);
                args["bytes"] = json!(bytes);
                let (lane, stage) = (Lane::Link, action.stage);
                let name = self.message(action).map_or("message", |(message, _)| message.name());
                Slice { lane, stage, name: name.to_owned(), kind: "transfer", span: *span, args }
            }
            Event::Sum { stage, step, bytes, span } => {
                let (name, args) = ("all-reduce".to_owned(), json!({"step": step, "bytes": bytes}));
                Slice { lane: Lane::Group, stage: *stage, name, kind: "sum", span: *span, args }
            }
            Event::Write { stage, step, span } => {
                let (name, args) = ("write checkpoint".to_owned(), json!({"step": step}));
                Slice { lane: Lane::Writer, stage: *stage, name, kind: "save", span: *span, args }
            }
            Event::Count { stage, count, value, at } => {
                return self.count(*stage, *count, *value, *at, out);
            }
        };

        let drawn = self.slice(slice, out)?;
        match event {
            Event::Action { action, waits: false, .. } => self.arrow(action, drawn, false, out),
            Event::Transfer { action, .. } => self.arrow(action, drawn, true, out),
            _ => Ok(()),
        }
    }

    /// Draws a slice; where on its lane. Beside compute several things may be under way at once: one that
    /// began before another ended is drawn from there on, and says so.
    fn slice(&mut self, slice: Slice, out: &mut Out) -> io::Result<Span> {
        let Slice { lane, stage, name, kind, span, mut args } = slice;
        let tid = tid(stage, lane);
        let free = self.busy.get(&tid).copied().unwrap_or(Moment(0));
        self.busy.insert(tid, free.max(span.end));
        let overlap = free.min(span.end).since(span.begin);
        // A GPU's moments are rounded; anything else on the compute lane is an error to be seen.
        let drawn_later = lane != Lane::Compute || overlap < ROUNDED;
        let begin = if drawn_later { Moment(span.begin.0 + overlap) } else { span.begin };
        if lane != Lane::Compute && overlap > 0 {
            args["overlap_us"] = json!(micros(overlap));
        }

        let (ts, dur) = (self.at(begin), micros(span.end.since(begin)));
        out.event(&json!({
            "ph": "X", "name": name, "cat": kind, "pid": self.replica, "tid": tid, "ts": ts, "dur": dur, "args": args
        }))?;
        Ok(Span { begin, end: span.end })
    }

    /// A piece of a message's arrow, at the slice of its send, its transfer or its receive.
    fn arrow(&self, action: &Action, drawn: Span, travels: bool, out: &mut Out) -> io::Result<()> {
        let Some((message, sends)) = self.message(action) else { return Ok(()) };
        let Some(id) = self.flows.get(&(self.replica, message)) else { return Ok(()) };
        let (phase, lane, at) = match (sends, travels) {
            (true, false) => ("s", Lane::Compute, drawn.begin),
            (true, true) => ("t", Lane::Link, drawn.begin),
            // The moment before the end of the slice, which is when it was taken.
            _ => ("f", Lane::Compute, Moment(drawn.end.0.saturating_sub(1)).max(drawn.begin)),
        };

        let mut arrow = json!({
            "ph": phase, "id": id, "name": message.name(), "cat": "message",
            "pid": self.replica, "tid": tid(action.stage, lane), "ts": self.at(at)
        });
        if phase == "f" {
            arrow["bp"] = json!("e");
        }
        out.event(&arrow)
    }

    fn count(
        &self,
        stage: usize,
        count: Count,
        value: u64,
        at: Moment,
        out: &mut Out,
    ) -> io::Result<()> {
        let (what, value) = match count {
            Count::Versions => ("versions", json!(value)),
            Count::Activations => ("activations", json!(value)),
            Count::Memory => ("MiB", json!((value >> 10) as f64 / 1024.0)),
        };
        let name = match count {
            Count::Versions => format!("stage {stage}: versions held"),
            Count::Activations => format!("stage {stage}: activations held"),
            Count::Memory if self.about.threads => "memory of the process".to_owned(),
            Count::Memory => format!("stage {stage}: memory"),
        };
        out.event(&json!({
            "ph": "C", "name": name, "pid": self.replica, "ts": self.at(at), "args": {what: value}
        }))
    }

    fn message(&self, action: &Action) -> Option<(Message, bool)> {
        Message::of(action, &self.about.schedule)
    }

    /// Microseconds since the trace's origin.
    fn at(&self, moment: Moment) -> f64 {
        micros((moment.0 as i64 - self.zero).max(0) as u64)
    }
}

fn micros(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

/// What an action is about.
fn about(action: &Action) -> Value {
    let mut args = json!({"action": action.to_string(), "step": action.step});
    if !action.op.whole_step() {
        args["microbatch"] = json!(action.microbatch);
    }
    args
}

/// What an action's time is counted as, as `bench` does.
fn kind(action: &Action, waits: bool) -> &'static str {
    let kind = match (action.op, action.pass) {
        (Op::Update, _) if waits => TimeKind::Reduce,
        (Op::SendActivation, Pass::Train) if waits => TimeKind::Downstream,
        (Op::SendGradient, Pass::Train) if waits => TimeKind::Upstream,
        _ => TimeKind::of(action),
    };
    TimeKind::ALL[kind as usize].1
}

/// What an action waits for before it does its work.
fn waited(op: Op) -> &'static str {
    match op {
        Op::Update => "wait for the sum",
        Op::SendActivation | Op::SendGradient => "wait for room on the link",
        _ => "wait for the table",
    }
}

fn word(action: &Action) -> &'static str {
    match action.op {
        Op::Load => "load",
        Op::RecvActivation => "receive activation",
        Op::Forward if action.pass == Pass::Eval => "evaluate",
        Op::Forward => "forward",
        Op::SendActivation => "send activation",
        Op::RecvGradient => "receive gradient",
        Op::Backward => "backward",
        Op::SendGradient => "send gradient",
        Op::Reduce => "start all-reduce",
        Op::Update => "update",
        Op::Part => "hand over the table's part",
        Op::RecvPart => "receive the table's part",
        Op::ReduceTable => "start the table's all-reduce",
        Op::SendTable => "send the table's sum",
        Op::RecvTable => "receive the table's sum",
        Op::UpdateTable => "update table",
        Op::AwaitTable => "await table",
        Op::Digest => "digest",
        Op::Save => "copy state",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;
    use crate::delay::SyncPoints;
    use crate::schedule::ScheduleKind;

    fn action(text: &str, begin: u64, end: u64) -> Event {
        let span = Span { begin: Moment(begin), end: Moment(end) };
        Event::Action { action: text.parse().unwrap(), waits: false, span }
    }

    /// Two ranks whose clocks are a millisecond apart: a message whose ends are both there has an
    /// arrow that does not go back, one that leaves the window has none.
    #[test]
    fn parts_become_one_trace() {
        let folder = tempfile::tempdir().unwrap();
        let transfer = |text: &str, begin, end| Event::Transfer {
            action: text.parse().unwrap(),
            bytes: 64,
            span: Span { begin: Moment(begin), end: Moment(end) },
        };
        let above = vec![
            action("0F1.0", 1000, 2000),
            action("0SA1.0", 2000, 2100),
            transfer("0SA1.0", 2050, 2500),
            transfer("0SA2.0", 2200, 3000),
            action("0SA2.0", 2900, 3000),
        ];
        let shifted = 1_000_000;
        let below = vec![
            action("1RA1.0", shifted + 1500, shifted + 2600),
            Event::Count {
                stage: 1,
                count: Count::Activations,
                value: 1,
                at: Moment(shifted + 2600),
            },
        ];
        let mut parts = Vec::new();
        for (rank, events, ahead) in [(0, above, 0), (1, below, shifted as i64)] {
            let path = folder.path().join(format!("{rank}"));
            let mut part = Part::begin(path.clone(), 0, |end| end.unwrap()).unwrap();
            assert!(events.into_iter().all(|event| part.add(event)));
            part.end().join().unwrap();
            parts.push((rank, path, Offset { ahead, error: 700 * rank as u64 }));
        }

        let schedule = Schedule::new(ScheduleKind::Decoupled, 2, 1, 1, SyncPoints::ends(6));
        let about = About {
            name: "a".to_owned(),
            grid: schedule.grid(1),
            schedule,
            window: Window { from: 1, to: 3 },
            reserve: 0,
            threads: false,
        };
        let path = folder.path().join("trace.json.gz");
        merge(&about, &parts, &path).unwrap();
        let mut text = String::new();
        GzDecoder::new(std::fs::File::open(&path).unwrap()).read_to_string(&mut text).unwrap();
        let trace: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(trace["otherData"]["clock_error_us"], 0.7);
        let events = trace["traceEvents"].as_array().unwrap();
        let of =
            |phase: &str| events.iter().filter(|event| event["ph"] == phase).collect::<Vec<_>>();

        let arrows: Vec<_> = ["s", "t", "f"].map(of).into_iter().flatten().collect();
        let seen: Vec<_> =
            arrows.iter().map(|arrow| (&arrow["tid"], arrow["ts"].as_f64().unwrap())).collect();
        assert_eq!(seen, [(&json!(0), 1.0), (&json!(1), 1.05), (&json!(4), 1.599)]);
        // The second transfer has its turn when the first is over.
        let second = of("X").into_iter().filter(|slice| slice["tid"] == 1).nth(1).unwrap().clone();
        assert_eq!((second["ts"].as_f64(), second["dur"].as_f64()), (Some(1.5), Some(0.5)));
        assert_eq!(second["args"]["overlap_us"], 0.3);
        assert_eq!(of("C")[0]["args"]["activations"], 1);
        assert_eq!(of("M").len(), 2 + 2 * 2 * 4);
    }
}
