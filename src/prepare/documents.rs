//! Documents, read one after the other from the inputs, as pieces that can be tokenised by
//! themselves.
//!
//! ```text
//! inputs --lines | rows | whole files--> documents --cut where tokens allow it--> pieces --4 MiB--> batches
//! ```
//!
//! Every batch knows the place behind it, from which reading can go on in another process. What is
//! in memory does not grow with the inputs: a batch, and a piece of a text or one record.

use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::inputs::{Content, Format, Input, Splitting};
use super::parquet_column::Column;
use super::unpack;
use crate::data::{Unit, Vocabulary};
use crate::error::{Error, Result};
use crate::files;

/// Bytes of a batch, about.
const BATCH: usize = 4 << 20;
/// Bytes of a piece, about.
const PIECE: usize = 1 << 18;
/// Bytes of a line of words that are held; a longer one is cut between its words.
const UNCUT: usize = 16 << 20;
/// Bytes of a record: more is none.
const RECORD: u64 = 256 << 20;
/// What some editors write before a text; it is none of its characters.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Where reading goes on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Place {
    /// The number of the input.
    pub input: usize,
    /// Unpacked bytes of it, or rows.
    pub offset: u64,
    /// Lines of it.
    pub lines: u64,
    /// The split of a text whose document goes on.
    pub open: Option<usize>,
    /// The end of what was read of it, for the tokens of what follows.
    pub before: String,
}

/// A part of a document whose tokens can be made by themselves.
#[derive(Debug)]
pub struct Piece {
    pub text: Vec<u8>,
    /// The end of what stands before it in its document.
    pub before: String,
    pub split: usize,
    pub begins: bool,
    pub ends: bool,
    /// The number of its input.
    pub input: usize,
}

/// Pieces that are tokenised together.
#[derive(Debug)]
pub struct Batch {
    pub pieces: Vec<Piece>,
    /// Where the next batch begins.
    pub end: Place,
    /// Bytes of the inputs that were read so far, as they lie there.
    pub read: u64,
    /// Lines and rows so far that were no documents.
    pub skipped: u64,
}

/// How documents are read.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The key or column of the text.
    pub field: String,
    /// Leave out lines and rows that are no documents.
    pub skip_bad: bool,
    pub seed: u64,
    /// The share of the documents that each of valid and test gets.
    pub held_out: f64,
    /// Whether a record ends as a line where tokens have no end of a document.
    pub ends_lines: bool,
}

/// The split of a document: a pure function of the seed and its text, of which the beginning
/// decides. 0 is train, 1 valid, 2 test.
pub fn drawn(seed: u64, held_out: f64, text: &[u8]) -> usize {
    let mut hash = Xxh3::with_seed(seed);
    hash.update(&text[..text.len().min(PIECE)]);
    let u = (hash.digest() >> 11) as f64 / (1u64 << 53) as f64;
    match () {
        () if u < held_out => 1,
        () if u < 2.0 * held_out => 2,
        () => 0,
    }
}

/// The documents of the inputs.
pub struct Documents<'a> {
    inputs: &'a [Input],
    vocabulary: &'a Vocabulary,
    reading: &'a Reading,
    place: Place,
    source: Option<Source>,
    /// Bytes that were read of the current input.
    read: Arc<AtomicU64>,
    skipped: u64,
    /// Pieces of a record that did not fit into the batch before.
    waiting: std::collections::VecDeque<Piece>,
}

/// What is being read.
enum Source {
    Lines(Box<dyn BufRead + Send>),
    Rows(Box<Column>),
    Text(Text),
}

/// A text that is read piece by piece.
struct Text {
    reader: Box<dyn BufRead + Send>,
    held: Vec<u8>,
    ended: bool,
}

impl<'a> Documents<'a> {
    /// From `place` on, before which `skipped` records were left out.
    pub fn new(
        inputs: &'a [Input],
        vocabulary: &'a Vocabulary,
        reading: &'a Reading,
        place: Place,
        skipped: u64,
    ) -> Documents<'a> {
        let (read, waiting) = (Arc::default(), std::collections::VecDeque::new());
        Documents { inputs, vocabulary, reading, place, source: None, read, skipped, waiting }
    }

    /// The next batch; none at the end of the inputs.
    ///
    /// # Errors
    /// [`Error::Data`] with the file and the place of what cannot be read.
    pub fn batch(&mut self) -> Result<Option<Batch>> {
        let (mut pieces, mut held) = (Vec::new(), 0);
        while held < BATCH {
            let Some(piece) = self.piece()? else { break };
            held += piece.text.len();
            pieces.push(piece);
        }

        // A record's pieces belong together: reading goes on behind records.
        pieces.extend(self.waiting.drain(..));
        let before = |i: usize| self.inputs[i].bytes;
        let read = (0..self.place.input.min(self.inputs.len())).map(before).sum::<u64>();
        let read = read + if self.source.is_some() { self.read.load(Ordering::Relaxed) } else { 0 };
        let batch = Batch { pieces, end: self.place.clone(), read, skipped: self.skipped };
        Ok((!batch.pieces.is_empty()).then_some(batch))
    }

    /// Where reading has come, and how many records were left out.
    pub fn end(&self) -> (Place, u64) {
        (self.place.clone(), self.skipped)
    }

    fn piece(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.waiting.pop_front() {
                return Ok(Some(piece));
            }

            let Some(input) = self.inputs.get(self.place.input) else { return Ok(None) };
            let source = match self.source.take() {
                Some(source) => source,
                None => self.open(input)?,
            };

            let (source, more) = match source {
                Source::Lines(mut lines) => {
                    let more = self.line(input, &mut lines)?;
                    (Source::Lines(lines), more)
                }
                Source::Rows(mut rows) => {
                    let more = self.row(input, &mut rows)?;
                    (Source::Rows(rows), more)
                }
                Source::Text(mut text) => {
                    let more = self.part(input, &mut text)?;
                    (Source::Text(text), more)
                }
            };

            match more {
                true => self.source = Some(source),
                false => self.place = Place { input: self.place.input + 1, ..Place::default() },
            }
        }
    }

    fn open(&self, input: &Input) -> Result<Source> {
        let wrong = |error: std::io::Error| problem(input, &error.to_string());
        match (input.format, &input.content) {
            (Format::Parquet, Content::File(path)) => {
                let file = files::open(path).map_err(wrong)?;
                let column = Column::open(file, &self.reading.field, self.place.offset);
                Ok(Source::Rows(Box::new(column.map_err(|error| problem(input, &error))?)))
            }
            (Format::JsonLines, _) => Ok(Source::Lines(
                unpack::open(input, self.place.offset, &self.read).map_err(wrong)?,
            )),
            _ => {
                let reader = unpack::open(input, self.place.offset, &self.read).map_err(wrong)?;
                Ok(Source::Text(Text { reader, held: Vec::new(), ended: false }))
            }
        }
    }

    /// Takes a line; false at the end.
    fn line(&mut self, input: &Input, lines: &mut impl BufRead) -> Result<bool> {
        let mut line = Vec::new();
        let count = lines.take(RECORD).read_until(b'\n', &mut line);
        let count = count.map_err(|error| {
            problem(
                input,
                &format!("it ends or breaks off after line {} ({error})", self.place.lines),
            )
        })?;
        if count == 0 {
            return Ok(false);
        }

        self.place.offset += count as u64;
        self.place.lines += 1;
        let number = self.place.lines;
        let bare = if number == 1 { line.strip_prefix(BYTE_ORDER_MARK) } else { None };
        let line = bare.unwrap_or(&line).trim_ascii();
        if count as u64 == RECORD {
            return Err(problem(input, &format!("line {number} is longer than {RECORD} bytes")));
        }

        if !line.is_empty() {
            match text_of(line, &self.reading.field) {
                Ok(text) => self.record(input, text)?,
                Err(_) if self.reading.skip_bad => self.skipped += 1,
                Err(reason) => {
                    let text = String::from_utf8_lossy(line);
                    let plain =
                        |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
                    let shown: String = text.chars().take(80).map(plain).collect();
                    let found = format!("line {number}: {reason}: {shown}");
                    return Err(bad(input, &found));
                }
            }
        }
        Ok(true)
    }

    /// Takes a row; false at the end.
    fn row(&mut self, input: &Input, rows: &mut Column) -> Result<bool> {
        let row = rows.next_row().map_err(|error| problem(input, &error))?;
        let Some(row) = row else { return Ok(false) };
        self.place.offset += 1;
        let bytes = row.as_ref().map_or(0, |text| text.len() as u64);
        if bytes > RECORD {
            let found = format!("row {} is longer than {RECORD} bytes", self.place.offset);
            return Err(problem(input, &found));
        }

        // Rows are about equally long.
        let share = self.place.offset as f64 / rows.count.max(1) as f64;
        self.read.store((input.bytes as f64 * share) as u64, Ordering::Relaxed);

        let text = row.as_ref().map(|text| std::str::from_utf8(text.data()));
        match text {
            Some(Ok(text)) => self.record(input, text.to_owned())?,
            _ if self.reading.skip_bad => self.skipped += 1,
            other => {
                let reason = if other.is_none() { "has no text" } else { "is no UTF-8" };
                let (row, field) = (self.place.offset, &self.reading.field);
                return Err(bad(input, &format!("row {row}: its `{field}` {reason}")));
            }
        }
        Ok(true)
    }

    /// Takes a document of its own.
    fn record(&mut self, input: &Input, mut text: String) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }

        let split = match input.splitting {
            Splitting::Whole(split) => split,
            _ => drawn(self.reading.seed, self.reading.held_out, text.as_bytes()),
        };

        // Tokens that have no end of a document end it as a line.
        let has_no_end = matches!(self.vocabulary.unit(), Unit::Bytes | Unit::Characters);
        if self.reading.ends_lines && has_no_end && !text.ends_with('\n') {
            text.push('\n');
        }

        let mut start = 0;
        while start < text.len() {
            let rest = &text[start..];
            let cut = match rest.len() > 2 * PIECE {
                true => self.vocabulary.cut(rest, PIECE, &input.name)?.unwrap_or(rest.len()),
                false => rest.len(),
            };
            self.waiting.push_back(Piece {
                text: rest.as_bytes()[..cut].to_vec(),
                before: self.vocabulary.context(&text[..start]).to_owned(),
                split,
                begins: start == 0,
                ends: cut == rest.len(),
                input: self.place.input,
            });
            start += cut;
        }
        Ok(())
    }

    /// Takes a part of a text; false at the end.
    fn part(&mut self, input: &Input, text: &mut Text) -> Result<bool> {
        let limit = match &input.splitting {
            Splitting::Cut(ends) => ends.iter().copied().find(|end| *end > self.place.offset),
            _ => None,
        };
        let mut wanted = 4 * PIECE;
        loop {
            text.fill(wanted).map_err(|error| {
                let read = self.place.offset + text.held.len() as u64;
                problem(input, &format!("it ends or breaks off after {read} bytes ({error})"))
            })?;
            if text.held.is_empty() {
                return Ok(false);
            }

            if self.place.offset == 0
                && text.held.starts_with(BYTE_ORDER_MARK)
                && self.vocabulary.unit() != Unit::Bytes
            {
                text.held.drain(..BYTE_ORDER_MARK.len());
                self.place.offset = BYTE_ORDER_MARK.len() as u64;
                continue;
            }

            let left = limit.map_or(u64::MAX, |limit| limit - self.place.offset);
            let whole = text.held.len() as u64 >= left || text.ended;
            let end = (text.held.len() as u64).min(left) as usize;
            let held = self.utf8(input, &text.held[..end], whole)?;
            let cut =
                match (end > 2 * PIECE || !whole).then(|| self.cut(input, held)).transpose()? {
                    Some(Some(cut)) => cut,
                    Some(None) if !whole => {
                        wanted *= 2;
                        continue;
                    }
                    _ => end,
                };

            let open = self.place.open;
            let ends = cut == end && whole;
            let split = open.unwrap_or_else(|| self.split_of(input, &text.held[..end]));
            let next = held.get(..cut).map(|part| self.vocabulary.context(part).to_owned());
            let rest = text.held.split_off(cut);
            let part = std::mem::replace(&mut text.held, rest);
            self.place.offset += part.len() as u64;
            self.place.open = (!ends).then_some(split);
            let next = next.filter(|_| !ends).unwrap_or_default();
            let before = std::mem::replace(&mut self.place.before, next);
            let (begins, input) = (open.is_none(), self.place.input);
            self.waiting.push_back(Piece { text: part, before, split, begins, ends, input });
            return Ok(true);
        }
    }

    /// The split of a text that begins with a part.
    fn split_of(&self, input: &Input, part: &[u8]) -> usize {
        match &input.splitting {
            Splitting::Whole(split) => *split,
            Splitting::Cut(ends) => ends.partition_point(|end| *end <= self.place.offset),
            Splitting::Drawn => drawn(self.reading.seed, self.reading.held_out, part),
        }
    }

    /// Bytes as text, as far as they have whole characters; bytes that stay bytes are none.
    fn utf8<'t>(&self, input: &Input, bytes: &'t [u8], whole: bool) -> Result<&'t str> {
        if self.vocabulary.unit() == Unit::Bytes {
            return Ok("");
        }

        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(error) if error.error_len().is_none() && !whole => {
                Ok(std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default())
            }
            Err(error) => {
                let place = self.place.offset + error.valid_up_to() as u64;
                let remedy = "mend the text, or take the tokenizer bytes";
                Err(Error::data(&input.name, format!("no UTF-8 at byte {place}"), remedy))
            }
        }
    }

    /// Where what is held of a text can be cut; none: not yet.
    fn cut(&self, input: &Input, held: &str) -> Result<Option<usize>> {
        if self.vocabulary.unit() == Unit::Bytes {
            return Ok(Some(PIECE));
        }

        let cut = self.vocabulary.cut(held, PIECE, &input.name)?;
        if cut.is_some() || held.len() < UNCUT {
            return Ok(cut);
        }

        // A line that is too long is cut between its words.
        let space = held.as_bytes()[PIECE..].iter().position(u8::is_ascii_whitespace);
        match space {
            Some(at) => Ok(Some(PIECE + at)),
            None => Err(problem(input, &format!("a word of more than {UNCUT} bytes"))),
        }
    }
}

impl Text {
    /// Reads until `wanted` bytes are held, or the end.
    fn fill(&mut self, wanted: usize) -> std::io::Result<()> {
        while !self.ended && self.held.len() < wanted {
            let missing = (wanted - self.held.len()) as u64;
            let count = (&mut self.reader).take(missing).read_to_end(&mut self.held)?;
            self.ended = count == 0;
        }
        Ok(())
    }
}

fn problem(input: &Input, found: &str) -> Error {
    Error::data(&input.name, found, "give another file, or mend it")
}

fn bad(input: &Input, found: &str) -> Error {
    Error::data(
        &input.name,
        found,
        "mend it, name its --field, or leave such ones out with --skip-bad",
    )
}

/// The text of a line of JSON.
fn text_of(line: &[u8], field: &str) -> std::result::Result<String, String> {
    let mut json = serde_json::Deserializer::from_slice(line);
    let found = Field(field).deserialize(&mut json).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => {
            format!("no object of JSON with a text `{field}` ({error})")
        }
        _ => format!("no JSON ({error})"),
    })?;
    json.end().map_err(|error| format!("no JSON ({error})"))?;
    found.ok_or_else(|| format!("no field `{field}`"))
}

/// Reads one field of an object and passes over the others.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Option<String>;

    fn deserialize<D: serde::Deserializer<'de>>(
        self,
        json: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<std::borrow::Cow<str>>()? {
            match key == self.0 {
                true => found = Some(map.next_value::<String>()?),
                false => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }
}

/// Where a text of a file is cut so that valid and test get a share each.
///
/// # Errors
/// [`Error::Data`] if it cannot be read.
pub fn cuts(path: &Path, held_out: f64, unit: Unit) -> Result<Vec<u64>> {
    let map = crate::data::map(path)?;
    let ranges = crate::data::cut_text(&map, &[held_out, held_out], unit);
    Ok(ranges.into_iter().map(|range| range.end as u64).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_field_of_a_line_is_taken() {
        let text = |line: &str| text_of(line.as_bytes(), "text");
        assert_eq!(
            text(r#"{"a": [1, {"text": "no"}], "text": "a\nb", "z": null}"#).unwrap(),
            "a\nb"
        );
        for (line, reason) in [
            ("{\"text\": 3}", "no object of JSON with a text `text` (invalid type: integer `3`"),
            ("{\"a\": 3}", "no field `text`"),
            ("[1]", "no object of JSON with a text"),
            ("{\"text\": \"a\"} x", "no JSON (trailing characters"),
            ("{\"text\": \"a", "no JSON (EOF while parsing"),
        ] {
            let error = text(line).unwrap_err();
            assert!(error.starts_with(reason), "{line}: {error}");
        }
    }

    #[test]
    fn a_document_is_drawn_by_its_text() {
        let texts: Vec<String> = (0..4000).map(|i| format!("document {i}")).collect();
        let count =
            |split| texts.iter().filter(|text| drawn(1, 0.1, text.as_bytes()) == split).count();
        assert!((300..500).contains(&count(1)) && (300..500).contains(&count(2)), "{}", count(1));
        assert_eq!(drawn(7, 0.1, b"a"), drawn(7, 0.1, b"a"));
        assert!(
            texts
                .iter()
                .any(|text| drawn(1, 0.1, text.as_bytes()) != drawn(2, 0.1, text.as_bytes()))
        );
        assert!(texts.iter().all(|text| drawn(1, 0.0, text.as_bytes()) == 0));
    }
}
