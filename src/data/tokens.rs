//! A sequence of tokens: bytes of files mapped into memory, one after the other, or tokens of one,
//! two or four bytes each, mapped or in memory.

use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::files;

/// Tokens that are looked at together.
const BLOCK: usize = 1 << 16;

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap, Range<usize>),
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
            .flat_map(|token| token.to_le_bytes().into_iter().take(self as usize))
            .collect()
    }
}

impl TryFrom<u8> for Width {
    type Error = String;

    fn try_from(bytes: u8) -> std::result::Result<Width, String> {
        [Width::One, Width::Two, Width::Four]
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

/// A range of tokens; clones share the memory.
#[derive(Debug, Clone)]
pub struct Tokens {
    parts: Arc<Vec<Bytes>>,
    width: Width,
    /// In tokens.
    range: Range<usize>,
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
            Ok(Bytes::Mapped(map, range))
        };
        Ok(Tokens::new(paths.iter().map(whole).collect::<Result<_>>()?, Width::One))
    }

    /// Tokens of `width` in a part of a mapped file.
    pub(super) fn of_map(map: Mmap, range: Range<usize>, width: Width) -> Tokens {
        Tokens::new(vec![Bytes::Mapped(map, range)], width)
    }

    /// Bytes that are in memory already.
    pub fn of_bytes(bytes: Vec<u8>) -> Tokens {
        Tokens::new(vec![Bytes::Made(bytes)], Width::One)
    }

    /// Tokens of a vocabulary.
    pub fn of_ids(ids: &[u32], vocabulary: usize) -> Tokens {
        let width = Width::of(vocabulary);
        Tokens::new(vec![Bytes::Made(width.encode(ids))], width)
    }

    fn new(parts: Vec<Bytes>, width: Width) -> Tokens {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        Tokens { parts: Arc::new(parts), width, range: 0..bytes / width as usize }
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

    /// The largest token.
    pub fn largest(&self) -> Option<u64> {
        let mut block = Vec::new();
        let largest_of = |start: usize| {
            block.clear();
            self.read(start, BLOCK.min(self.len() - start), &mut block);
            block.iter().max().copied()
        };
        let largest: Option<i64> = (0..self.len()).step_by(BLOCK).filter_map(largest_of).max();
        largest.map(|token| token as u64)
    }

    /// xxh3 of the tokens' bytes.
    pub fn digest(&self) -> u64 {
        let width = self.width as usize;
        let (mut skip, mut left) = (self.range.start * width, self.len() * width);
        let mut hash = Xxh3::new();
        for part in self.parts.iter() {
            let start = skip.min(part.len());
            let take = (part.len() - start).min(left);
            hash.update(&part[start..start + take]);
            (skip, left) = (skip - start, left - take);
        }

        hash.digest()
    }

    /// The share of the tokens below each of `cutoffs`, from the one before on, and of the rest;
    /// counted in blocks that are spread over the whole.
    pub fn shares(&self, cutoffs: &[usize]) -> Vec<f64> {
        if cutoffs.is_empty() {
            return vec![1.0];
        }

        let (blocks, length) = (64, 1 << 14);
        let mut counts = vec![0usize; cutoffs.len() + 1];
        let mut block = Vec::new();
        for i in 0..blocks {
            let start = self.len() / blocks * i;
            block.clear();
            self.read(start, length.min(self.len() - start), &mut block);
            block.iter().for_each(|token| {
                counts[cutoffs.partition_point(|cut| *cut as i64 <= *token)] += 1
            });
        }

        let all = counts.iter().sum::<usize>().max(1) as f64;
        counts.into_iter().map(|count| count as f64 / all).collect()
    }

    /// Adds `count` tokens from `offset` on to `out`.
    ///
    /// # Panics
    /// If they reach past the end: windows are counted so that none does.
    pub fn read(&self, offset: usize, count: usize, out: &mut Vec<i64>) {
        assert!(offset + count <= self.len(), "window {offset}+{count} of {} tokens", self.len());
        let width = self.width as usize;
        let (mut skip, mut left) = ((self.range.start + offset) * width, count * width);
        for part in self.parts.iter() {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }

            let take = (part.len() - skip).min(left);
            let bytes = &part[skip..skip + take];
            match self.width {
                Width::One => out.extend(bytes.iter().map(|b| i64::from(*b))),
                Width::Two => out.extend(
                    bytes.chunks_exact(2).map(|b| i64::from(u16::from_le_bytes([b[0], b[1]]))),
                ),
                Width::Four => out.extend(
                    bytes
                        .chunks_exact(4)
                        .map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
                ),
            }

            (skip, left) = (0, left - take);
            if left == 0 {
                break;
            }
        }
    }
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
