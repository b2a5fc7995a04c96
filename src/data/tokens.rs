//! A sequence of tokens: bytes of files mapped into memory, one after the other, or tokens of one,
//! two, four or eight bytes each, mapped or in memory; and where the documents among them begin.

use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::borders::Borders;
use crate::error::{Error, Result};
use crate::files;

/// Bytes that have a digest of their own.
pub const BLOCK: usize = 16 << 20;

#[derive(Debug)]
enum Bytes {
    Mapped(Arc<Mmap>, Range<usize>),
    Made(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map, range) => &map[range.clone()],
            Bytes::Made(bytes) => bytes,
        }
    }
}

/// Bytes that one token takes, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Width {
    One = 1,
    Two = 2,
    Four = 4,
    Eight = 8,
}

impl Width {
    /// The least width for a vocabulary.
    pub fn of(vocabulary: usize) -> Width {
        match vocabulary {
            0..=0x100 => Width::One,
            0x101..=0x1_0000 => Width::Two,
            _ => Width::Four,
        }
    }

    /// The bytes of tokens.
    pub fn encode(self, tokens: &[u32]) -> Vec<u8> {
        tokens
            .iter()
            .flat_map(|token| u64::from(*token).to_le_bytes().into_iter().take(self as usize))
            .collect()
    }

    /// Adds the tokens of bytes to `out`.
    fn decode(self, bytes: &[u8], out: &mut Vec<i64>) {
        match self {
            Width::One => out.extend(bytes.iter().map(|b| i64::from(*b))),
            Width::Two => {
                out.extend(
                    bytes.as_chunks::<2>().0.iter().map(|b| i64::from(u16::from_le_bytes(*b))),
                );
            }
            Width::Four => {
                out.extend(
                    bytes.as_chunks::<4>().0.iter().map(|b| i64::from(u32::from_le_bytes(*b))),
                );
            }
            Width::Eight => {
                out.extend(bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)))
            }
        }
    }

    /// The largest token of bytes.
    pub fn largest(self, bytes: &[u8]) -> Option<u64> {
        let mut tokens = Vec::with_capacity(bytes.len() / self as usize);
        self.decode(bytes, &mut tokens);
        tokens.into_iter().max().map(|token| token as u64)
    }
}

impl TryFrom<u8> for Width {
    type Error = String;

    fn try_from(bytes: u8) -> std::result::Result<Width, String> {
        [Width::One, Width::Two, Width::Four, Width::Eight]
            .into_iter()
            .find(|width| *width as u8 == bytes)
            .ok_or_else(|| format!("tokens of {bytes} bytes"))
    }
}

impl From<Width> for u8 {
    fn from(width: Width) -> u8 {
        width as u8
    }
}

/// Tokens of one file.
#[derive(Debug)]
struct Part {
    bytes: Bytes,
    width: Width,
    borders: Borders,
    /// Of the bytes, where that was kept with them.
    digest: Option<u64>,
    name: String,
}

impl Part {
    fn new(bytes: Bytes, width: Width) -> Part {
        Part { bytes, width, borders: Borders::None, digest: None, name: String::new() }
    }

    fn len(&self) -> usize {
        self.bytes.len() / self.width as usize
    }

    fn token(&self, at: usize) -> i64 {
        let mut token = Vec::with_capacity(1);
        self.width.decode(self.bytes(at..at + 1), &mut token);
        token[0]
    }

    fn bytes(&self, range: Range<usize>) -> &[u8] {
        let width = self.width as usize;
        &self.bytes[range.start * width..range.end * width]
    }
}

/// A range of tokens; clones share the memory.
#[derive(Debug, Clone)]
pub struct Tokens {
    parts: Arc<Vec<Part>>,
    /// In tokens.
    range: Range<usize>,
}

/// Tokens as they lie in a mapped file.
#[derive(Debug)]
pub struct Mapped {
    pub map: Arc<Mmap>,
    /// In bytes.
    pub range: Range<usize>,
    pub width: Width,
    pub borders: Borders,
    /// Of the bytes, where that was kept with them.
    pub digest: Option<u64>,
    /// What errors call it.
    pub name: String,
}

impl Tokens {
    /// Maps files as one text of bytes, in the order given.
    ///
    /// # Errors
    /// [`Error::Data`] for a file that cannot be opened or is empty.
    pub fn of_files(paths: &[PathBuf]) -> Result<Tokens> {
        let whole = |path: &PathBuf| {
            let map = map(path)?;
            let range = 0..map.len();
            let part = Part::new(Bytes::Mapped(Arc::new(map), range), Width::One);
            Ok(Part { name: path.display().to_string(), ..part })
        };
        Ok(Tokens::new(paths.iter().map(whole).collect::<Result<_>>()?))
    }

    /// Tokens in a part of a mapped file.
    pub fn of_map(mapped: Mapped) -> Tokens {
        let Mapped { map, range, width, borders, digest, name } = mapped;
        let bytes = Bytes::Mapped(map, range);
        Tokens::new(vec![Part { bytes, width, borders, digest, name }])
    }

    /// Bytes that are in memory already.
    pub fn of_bytes(bytes: Vec<u8>) -> Tokens {
        Tokens::new(vec![Part::new(Bytes::Made(bytes), Width::One)])
    }

    /// Tokens of a vocabulary.
    pub fn of_ids(ids: &[u32], vocabulary: usize) -> Tokens {
        let width = Width::of(vocabulary);
        Tokens::new(vec![Part::new(Bytes::Made(width.encode(ids)), width)])
    }

    fn new(parts: Vec<Part>) -> Tokens {
        let count = parts.iter().map(Part::len).sum();
        Tokens { parts: Arc::new(parts), range: 0..count }
    }

    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// A part of these tokens.
    pub fn slice(&self, range: Range<usize>) -> Tokens {
        let start = self.range.start;
        Tokens { range: start + range.start..start + range.end, ..self.clone() }
    }

    /// The parts of `count` tokens from `offset` on, each with its range in it.
    fn pieces(&self, offset: usize, count: usize) -> impl Iterator<Item = (&Part, Range<usize>)> {
        let (from, to) = (self.range.start + offset, self.range.start + offset + count);
        let mut before = 0;
        self.parts.iter().filter_map(move |part| {
            let start = before;
            before += part.len();
            let range = from.max(start)..to.min(before);
            (range.start < range.end).then(|| (part, range.start - start..range.end - start))
        })
    }

    /// xxh3 of the xxh3 of every block of the tokens' bytes; where a digest was kept with them,
    /// that, and what is taken of them: those are not read.
    pub fn digest(&self) -> u64 {
        let pieces: Vec<(&Part, Range<usize>)> = self.pieces(0, self.len()).collect();
        match pieces[..] {
            [(part, ref range)] => match part.digest {
                Some(digest) if range.len() == part.len() => digest,
                Some(digest) => digest_of(&[digest, range.start as u64, range.end as u64]),
                None => digest_of_blocks(part.bytes(range.clone())),
            },
            _ if pieces.iter().all(|(part, _)| part.digest.is_none()) => {
                digest_of_slices(pieces.iter().map(|(part, range)| part.bytes(range.clone())))
            }
            _ => {
                let parts = pieces.into_iter().map(|(part, range)| {
                    let digest = part.digest.unwrap_or_else(|| digest_of_blocks(&part.bytes));
                    [digest, range.start as u64, range.end as u64]
                });
                digest_of(&parts.flatten().collect::<Vec<u64>>())
            }
        }
    }

    /// The share of the tokens below each of `cutoffs`, from the one before on, and of the rest;
    /// counted in blocks that are spread over the whole.
    pub fn shares(&self, cutoffs: &[usize]) -> Vec<f64> {
        if cutoffs.is_empty() {
            return vec![1.0];
        }

        let mut counts = vec![0usize; cutoffs.len() + 1];
        self.sample(|_, block| {
            block.iter().for_each(|token| {
                counts[cutoffs.partition_point(|cut| *cut as i64 <= *token)] += 1
            });
        });

        let all = counts.iter().sum::<usize>().max(1) as f64;
        counts.into_iter().map(|count| count as f64 / all).collect()
    }

    /// Whether a vocabulary has the tokens of blocks that are spread over the whole; the others
    /// are looked at when they are read.
    ///
    /// # Errors
    /// As [`Tokens::check`].
    pub fn check_a_sample(&self, vocabulary: usize) -> Result<()> {
        let mut checked = Ok(());
        self.sample(|start, block| {
            if checked.is_ok() {
                checked = self.check(start, block, vocabulary);
            }
        });
        checked
    }

    /// Whether a vocabulary has tokens that were read from `offset` on.
    ///
    /// # Errors
    /// [`Error::Data`] with the file and the place of the first that it does not have.
    pub fn check(&self, offset: usize, tokens: &[i64], vocabulary: usize) -> Result<()> {
        let known = 0..vocabulary as i64;
        let Some(wrong) = tokens.iter().position(|token| !known.contains(token)) else {
            return Ok(());
        };

        let (name, place) = self.place(offset + wrong);
        let problem =
            format!("token {place} is {}, and the vocabulary has {vocabulary}", tokens[wrong]);
        let remedy = "name the tokenizer that made it, check data.token_bytes, or make it again";
        Err(Error::data(name, problem, remedy))
    }

    fn sample(&self, mut look: impl FnMut(usize, &[i64])) {
        let (blocks, length) = (64, 1 << 14);
        let mut block = Vec::new();
        for i in 0..blocks {
            let start = self.len() / blocks * i;
            block.clear();
            self.read(start, length.min(self.len() - start), &mut block);
            look(start, &block);
        }
    }

    /// Adds `count` tokens from `offset` on to `out`.
    ///
    /// # Panics
    /// If they reach past the end: windows are counted so that none does.
    pub fn read(&self, offset: usize, count: usize, out: &mut Vec<i64>) {
        assert!(offset + count <= self.len(), "window {offset}+{count} of {} tokens", self.len());
        for (part, range) in self.pieces(offset, count) {
            part.width.decode(part.bytes(range), out);
        }
    }

    /// Adds, for each of `count` tokens from `offset` on, where in these its document begins; 0 for
    /// one that begins before them. A file begins a document.
    pub fn document_starts(&self, offset: usize, count: usize, out: &mut Vec<i64>) {
        let begin = out.len();
        for (part, range) in self.pieces(offset, count) {
            let (base, first) = ((out.len() - begin) as i64, range.start);
            let mut start = base;
            let mut borders = part.borders.within(range.clone(), |at| part.token(at)).peekable();
            for at in range {
                if borders.next_if_eq(&at).is_some() {
                    start = base + (at - first) as i64;
                }
                out.push(start);
            }
        }
    }

    /// Whether it is known where documents begin.
    pub fn has_documents(&self) -> bool {
        let knows = |part: &Part| matches!(part.borders, Borders::Listed(_) | Borders::After(_));
        self.parts.len() > 1 || self.parts.iter().any(knows)
    }

    /// The same tokens, of which one of a number ends a document.
    pub fn ended_by(mut self, end: Option<u32>) -> Tokens {
        if let (Some(end), Some(parts)) = (end, Arc::get_mut(&mut self.parts)) {
            parts.iter_mut().for_each(|part| part.borders = Borders::After(end));
        }
        self
    }

    /// The first document that begins at `token` or later, if it is known where documents do.
    pub fn next_document(&self, token: usize) -> Option<usize> {
        let (part, range) = self.pieces(token, self.len() - token).next()?;
        Some(token + part.borders.next(range.start)? - range.start)
    }

    /// Bytes of the text that these tokens were made of, where that is known.
    pub fn text_bytes(&self) -> Option<u64> {
        let of = |(part, range): (&Part, Range<usize>)| part.borders.text_bytes(range, part.len());
        self.pieces(0, self.len()).map(of).sum()
    }

    /// What errors call the file of a token, and its place there.
    pub fn place(&self, token: usize) -> (String, usize) {
        let piece = self.pieces(token, 1).next();
        piece.map_or((String::new(), token), |(part, range)| (part.name.clone(), range.start))
    }

    /// Texts one after the other.
    pub fn joined(texts: &[Tokens]) -> Tokens {
        match texts {
            [one] => one.clone(),
            _ => Tokens::new(texts.iter().flat_map(Tokens::owned).collect()),
        }
    }

    /// The parts, as far as the range goes.
    fn owned(&self) -> Vec<Part> {
        let part = |(part, range): (&Part, Range<usize>)| {
            let width = part.width as usize;
            let bytes = match &part.bytes {
                Bytes::Mapped(map, all) => {
                    let start = all.start + range.start * width;
                    Bytes::Mapped(Arc::clone(map), start..start + range.len() * width)
                }
                Bytes::Made(_) => Bytes::Made(part.bytes(range.clone()).to_vec()),
            };

            let whole = range.len() == part.len();
            let cut = |digest| digest_of(&[digest, range.start as u64, range.end as u64]);
            let digest = part.digest.map(|digest| if whole { digest } else { cut(digest) });
            let borders = part.borders.slice(range.clone(), part.len());
            Part { bytes, width: part.width, borders, digest, name: part.name.clone() }
        };
        self.pieces(0, self.len()).map(part).collect()
    }
}

fn digest_of(numbers: &[u64]) -> u64 {
    let mut hash = Xxh3::new();
    numbers.iter().for_each(|number| hash.update(&number.to_le_bytes()));
    hash.digest()
}

/// xxh3 of the xxh3 of every block.
pub fn digest_of_blocks(bytes: &[u8]) -> u64 {
    let digests: Vec<u64> = bytes.par_chunks(BLOCK).map(xxh3_64).collect();
    digest_of(&digests)
}

/// The same of slices one after the other.
fn digest_of_slices<'a>(slices: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut digests, mut hash, mut held) = (Vec::new(), Xxh3::new(), 0);
    for mut slice in slices {
        while !slice.is_empty() {
            let (now, later) = slice.split_at(slice.len().min(BLOCK - held));
            hash.update(now);
            (held, slice) = (held + now.len(), later);
            if held == BLOCK {
                digests.push(hash.digest());
                hash.reset();
                held = 0;
            }
        }
    }

    if held > 0 {
        digests.push(hash.digest());
    }
    digest_of(&digests)
}

/// Maps a file that is not empty.
///
/// # Errors
/// [`Error::Data`] for a file that cannot be opened or is empty.
pub fn map(path: &Path) -> Result<Mmap> {
    let wrong = |problem: String| {
        Error::data(path.display(), problem, "check the path, which is relative to this folder")
    };

    let file = files::open(path).map_err(|error| wrong(format!("cannot be opened ({error})")))?;
    let bytes = file.metadata().map_err(|error| wrong(error.to_string()))?.len();
    if bytes == 0 {
        return Err(wrong("empty".into()));
    }

    // SAFETY: the map is read-only. Another process that cuts the file short while it is mapped
    // would end this one with SIGBUS; a corpus under training is not to be changed, as the README
    // says.
    unsafe { Mmap::map(&file) }.map_err(|error| wrong(format!("cannot be mapped ({error})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(tokens: &Tokens, offset: usize, count: usize) -> Vec<i64> {
        let mut out = Vec::new();
        tokens.read(offset, count, &mut out);
        out
    }

    #[test]
    fn files_read_as_one_text() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = ["abc", "d", "efgh"]
            .iter()
            .map(|text| {
                let path = folder.path().join(text);
                std::fs::write(&path, text).unwrap();
                path
            })
            .collect();
        let text = Tokens::of_files(&paths).unwrap();
        assert_eq!(text.len(), 8);
        assert_eq!(read(&text, 2, 5), b"cdefg".map(i64::from));
        assert_eq!(read(&text.slice(3..8).slice(1..5), 3, 1), [i64::from(b'h')]);
        let whole = Tokens::of_bytes(b"abcdefgh".to_vec());
        for range in [0..8, 2..7, 4..4, 3..5] {
            assert_eq!(text.slice(range.clone()).digest(), whole.slice(range).digest());
        }
        assert_ne!(text.digest(), text.slice(0..7).digest());
    }

    #[test]
    fn shares_count_the_tokens_between_cutoffs() {
        let ids: Vec<u32> = (0..1000).map(|i| i % 10).collect();
        let tokens = Tokens::of_ids(&ids, 10);
        for (found, expected) in tokens.shares(&[2, 7]).into_iter().zip([0.2, 0.5, 0.3]) {
            assert!((found - expected).abs() < 0.01, "{found} {expected}");
        }
        assert_eq!(tokens.shares(&[]), [1.0]);
    }

    #[test]
    fn every_width_reads_what_it_was_made_of() {
        for vocabulary in [200, 256, 257, 60_000, 70_000] {
            let ids: Vec<u32> = (0..50).map(|i| i * 7919 % vocabulary).collect();
            let tokens = Tokens::of_ids(&ids, vocabulary as usize);
            assert_eq!(tokens.len(), 50);
            let expected: Vec<i64> = ids[10..30].iter().map(|id| i64::from(*id)).collect();
            assert_eq!(read(&tokens.slice(5..50), 5, 20), expected);
        }
    }
}
