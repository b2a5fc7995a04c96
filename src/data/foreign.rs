//! Token files that other programs have made, mapped as they are.
//!
//! ```text
//! nanoGPT        NAME.bin   token ids of 2 or 4 bytes, nothing else
//! llm.c          NAME.bin   256 numbers of 4 bytes before them: 20240520, version 1, how many; or 20240801, 7 (4 bytes an id)
//! Megatron-LM    NAME.idx   "MMIDIDX\0\0", version 1 (8 bytes), code of the type (1), sequences (8), documents and one (8),
//!                           their lengths (4 each), where they begin in bytes (8 each), the first sequence of each document (8 each)
//!                NAME.bin   the ids
//! ```
//!
//! All numbers are little-endian.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use xxhash_rust::xxh3::xxh3_64;

use super::borders::{Borders, List, Stride};
use super::tokens::{Mapped, Tokens, Width, digest_of_blocks, map};
use super::{DataConfig, Vocabulary};
use crate::error::{Error, Result};

const MEGATRON: &[u8; 9] = b"MMIDIDX\0\0";
/// Bytes before the lengths.
const MEGATRON_HEAD: usize = 9 + 8 + 1 + 8 + 8;
/// llm.c's numbers, their versions and the bytes of an id.
const LLM_C: [(u32, u32, Width); 2] = [(20_240_520, 1, Width::Two), (20_240_801, 7, Width::Four)];
const LLM_C_HEAD: usize = 1024;
/// Bytes of ids of which all go into their digest, and parts that do of more.
const SMALL: usize = 64 << 20;
const PARTS: usize = 1024;
/// Sequences and documents of an index that are looked at.
const SAMPLE: usize = 4096;

/// Whether a path is that of token ids.
pub fn is_foreign(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "bin" || ending == "idx")
}

/// The index beside the ids, if there is one.
fn index(path: &Path) -> Option<PathBuf> {
    let index = path.with_extension("idx");
    index.is_file().then_some(index)
}

/// The ids of a file.
///
/// # Errors
/// [`Error::Data`] for a file that is none, or has ids that the vocabulary does not have.
pub fn open(path: &Path, config: &DataConfig, vocabulary: &Vocabulary) -> Result<Tokens> {
    let bin = path.with_extension("bin");
    let map = Arc::new(map(&bin)?);
    let after = vocabulary.end().map_or(Borders::None, Borders::After);
    let (start, width, borders) = match index(path) {
        Some(index) => {
            let (width, list) = megatron(&index, &map)?;
            (0, width, Borders::Listed(list))
        }
        None => {
            let plain = (0, width_of(config, vocabulary)?);
            let (start, width) = headed(&map, &bin)?.unwrap_or(plain);
            (start, width, after)
        }
    };

    let bytes = map.len() - start;
    if !bytes.is_multiple_of(width as usize) {
        let problem = format!("{bytes} bytes are no ids of {} bytes each", width as usize);
        return Err(Error::data(bin.display(), problem, "check data.token_bytes, or the file"));
    }

    let digest = Some(digest(&map[start..]));
    let (range, name) = (start..map.len(), bin.display().to_string());
    let tokens = Tokens::of_map(Mapped { map, range, width, borders, digest, name });
    tokens.check_a_sample(vocabulary.len())?;
    Ok(tokens)
}

/// Bytes of an id: those that are said, or as nanoGPT writes them.
fn width_of(config: &DataConfig, vocabulary: &Vocabulary) -> Result<Width> {
    match config.token_bytes {
        Some(2) => Ok(Width::Two),
        Some(4) => Ok(Width::Four),
        Some(other) => Err(Error::config("data.token_bytes", other, "2 or 4")),
        None if vocabulary.len() <= 1 << 16 => Ok(Width::Two),
        None => Ok(Width::Four),
    }
}

/// Where the ids begin and how wide they are, of a file that has llm.c's head.
fn headed(map: &Mmap, path: &Path) -> Result<Option<(usize, Width)>> {
    let number = |i: usize| Some(u32::from_le_bytes(map.get(4 * i..4 * i + 4)?.try_into().ok()?));
    let (Some(magic), Some(version), Some(count)) = (number(0), number(1), number(2)) else {
        return Ok(None);
    };

    let Some((.., width)) = LLM_C.into_iter().find(|(m, v, _)| (*m, *v) == (magic, version)) else {
        return Ok(None);
    };

    let bytes = (map.len() as u64).saturating_sub(LLM_C_HEAD as u64);
    if map.len() < LLM_C_HEAD || bytes != u64::from(count) * width as u64 {
        let problem =
            format!("{bytes} bytes of ids, its head says {count} ids of {}", width as u64);
        return Err(Error::data(path.display(), problem, "it is cut short: fetch it again"));
    }
    Ok(Some((LLM_C_HEAD, width)))
}

/// What tells ids from others: their digest, or of many bytes that of parts all over them.
fn digest(bytes: &[u8]) -> u64 {
    const PART: usize = 1 << 16;
    if bytes.len() <= SMALL {
        return digest_of_blocks(bytes);
    }

    let parts = (0..PARTS).map(|i| (bytes.len() - PART) / (PARTS - 1) * i);
    let digests = parts.map(|start| xxh3_64(&bytes[start..start + PART]));
    let numbers: Vec<u8> = digests.chain([bytes.len() as u64]).flat_map(u64::to_le_bytes).collect();
    xxh3_64(&numbers)
}

/// How Megatron's ids lie, and its documents.
fn megatron(path: &Path, bin: &Mmap) -> Result<(Width, List)> {
    let wrong = |problem: String| {
        let remedy = "take the .idx and .bin of one run of Megatron's preprocessing";
        Error::data(path.display(), problem, remedy)
    };

    let index = Index::read(map(path)?).map_err(wrong)?;
    index.check(bin.len() as u64).map_err(wrong)?;
    let Index { map, width, sequences, documents, pointers, starts, .. } = index;
    let stride = Stride::Pointers { at: pointers, count: sequences, width: width as u64 };
    Ok((width, List { map: Arc::new(map), at: starts, documents, stride, base: 0, bytes: None }))
}

/// An index of Megatron's: where its lists begin in the file, bytes.
struct Index {
    map: Mmap,
    width: Width,
    sequences: usize,
    documents: usize,
    lengths: usize,
    pointers: usize,
    starts: usize,
}

impl Index {
    fn read(map: Mmap) -> std::result::Result<Index, String> {
        let number = |at: usize| {
            let bytes = map.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u64::from_le_bytes).ok_or("cut short")
        };

        if !map.starts_with(MEGATRON) {
            return Err("no index of Megatron's: it does not begin with MMIDIDX".into());
        }

        let version = number(9)?;
        if version != 1 {
            return Err(format!("version {version} is not known here, 1 is"));
        }

        // As Megatron numbers the types of numpy.
        let width = match map.get(17).copied().unwrap_or_default() {
            1 => Width::One,
            8 => Width::Two,
            4 => Width::Four,
            5 => Width::Eight,
            code => {
                return Err(format!("its type {code} is none of ids: uint8, uint16, int32, int64"));
            }
        };

        let (sequences, bounds) = (number(18)? as usize, number(26)? as usize);
        let end = |at: usize, count: usize, each: usize| {
            let end = count.checked_mul(each).and_then(|bytes| bytes.checked_add(at));
            let says =
                || format!("cut short: it says {sequences} sequences, {bounds} documents and one");
            end.filter(|end| *end <= map.len()).ok_or_else(says)
        };
        let lengths = MEGATRON_HEAD;
        let pointers = end(lengths, sequences, 4)?;
        let starts = end(pointers, sequences, 8)?;
        end(starts, bounds, 8)?;
        if sequences == 0 || bounds < 2 {
            return Err("it has no documents".into());
        }

        let documents = bounds - 1;
        Ok(Index { map, width, sequences, documents, lengths, pointers, starts })
    }

    fn number(&self, at: usize) -> u64 {
        self.map[at..at + 8].try_into().map_or(u64::MAX, u64::from_le_bytes)
    }

    /// Where a sequence begins and ends in the ids, bytes.
    fn sequence(&self, number: usize) -> (u64, Option<u64>) {
        let length = self.map[self.lengths + 4 * number..][..4].try_into();
        let bytes = u64::from(length.map_or(u32::MAX, u32::from_le_bytes)) * self.width as u64;
        let start = self.number(self.pointers + 8 * number);
        (start, start.checked_add(bytes))
    }

    /// Whether it fits ids of so many bytes: its ends, and sequences and documents all over it.
    fn check(&self, bytes: u64) -> std::result::Result<(), String> {
        let (last, start) =
            (self.sequences - 1, |document: usize| self.number(self.starts + 8 * document));
        let says = self.sequence(last).1;
        let ends = (self.sequence(0).0, start(0), start(self.documents));
        if says != Some(bytes) || ends != (0, 0, self.sequences as u64) {
            let says = says.map_or("more than there can be".to_owned(), |bytes| bytes.to_string());
            return Err(format!(
                "it does not fit its .bin: it says {says} bytes, and there are {bytes}"
            ));
        }

        let sample = |count: usize| (0..count).step_by(count.div_ceil(SAMPLE).max(1));
        let breaks = sample(last).find(|i| self.sequence(*i).1 != Some(self.sequence(i + 1).0));
        if let Some(sequence) = breaks {
            return Err(format!(
                "sequence {} does not begin where the one before ends",
                sequence + 1
            ));
        }

        match sample(self.documents).find(|i| start(*i) > start(i + 1)) {
            Some(document) => {
                Err(format!("document {} begins before the one before", document + 1))
            }
            None => Ok(()),
        }
    }
}
