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

use super::borders::{Borders, List, Stride};
use super::tokens::{Mapped, Tokens, Width, map};
use super::{DataConfig, Vocabulary};
use crate::error::{Error, Result};

const MEGATRON: &[u8; 9] = b"MMIDIDX\0\0";
/// Bytes before the lengths.
const MEGATRON_HEAD: usize = 9 + 8 + 1 + 8 + 8;
/// llm.c's numbers, their versions and the bytes of an id.
const LLM_C: [(u32, u32, Width); 2] = [(20_240_520, 1, Width::Two), (20_240_801, 7, Width::Four)];
const LLM_C_HEAD: usize = 1024;

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
            let (start, width) = headed(&map).unwrap_or((0, width_of(config, vocabulary)?));
            (start, width, after)
        }
    };

    let bytes = map.len() - start;
    if !bytes.is_multiple_of(width as usize) {
        let problem = format!("{bytes} bytes are no ids of {} bytes each", width as usize);
        return Err(Error::data(bin.display(), problem, "check data.token_bytes, or the file"));
    }

    let (range, name) = (start..map.len(), bin.display().to_string());
    let tokens = Tokens::of_map(Mapped { map, range, width, borders, digest: None, name });
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
fn headed(map: &Mmap) -> Option<(usize, Width)> {
    let number = |i: usize| Some(u32::from_le_bytes(map.get(4 * i..4 * i + 4)?.try_into().ok()?));
    let (magic, version, count) = (number(0)?, number(1)?, number(2)?);
    let (.., width) = LLM_C.into_iter().find(|(m, v, _)| (*m, *v) == (magic, version))?;
    let bytes = (map.len() as u64).checked_sub(LLM_C_HEAD as u64)?;
    (bytes == u64::from(count) * width as u64).then_some((LLM_C_HEAD, width))
}

/// How Megatron's ids lie, and its documents.
fn megatron(index: &Path, bin: &Mmap) -> Result<(Width, List)> {
    let wrong = |problem: String| {
        let remedy = "take the .idx and .bin of one run of Megatron's preprocessing";
        Error::data(index.display(), problem, remedy)
    };

    let map = map(index)?;
    let number = |at: usize| -> Result<u64> {
        let bytes = map.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or_else(|| wrong("cut short".into()))
    };

    if !map.starts_with(MEGATRON) {
        return Err(wrong("no index of Megatron's: it does not begin with MMIDIDX".into()));
    }

    let version = number(9)?;
    if version != 1 {
        return Err(wrong(format!("version {version} is not known here, 1 is")));
    }

    // As Megatron numbers the types of numpy.
    let code = map.get(17).copied().unwrap_or_default();
    let width = match code {
        1 => Width::One,
        8 => Width::Two,
        4 => Width::Four,
        5 => Width::Eight,
        _ => {
            return Err(wrong(format!(
                "its type {code} is none of ids: uint8, uint16, int32, int64"
            )));
        }
    };

    let (sequences, documents) = (number(18)? as usize, number(26)? as usize);
    let lengths = MEGATRON_HEAD;
    let ends = |at: usize, count: usize, each: usize| {
        let end = count.checked_mul(each).and_then(|bytes| bytes.checked_add(at));
        end.filter(|end| *end <= map.len()).ok_or_else(|| {
            wrong(format!(
                "cut short: it says {sequences} sequences and {documents} documents and one"
            ))
        })
    };
    let pointers = ends(lengths, sequences, 4)?;
    let starts = ends(pointers, sequences, 8)?;
    ends(starts, documents, 8)?;
    if sequences == 0 || documents == 0 {
        return Err(wrong("it has no documents".into()));
    }

    let last = sequences - 1;
    let length = map[lengths + 4 * last..][..4].try_into().map_or(0, u32::from_le_bytes);
    let bytes = number(pointers + 8 * last)? + u64::from(length) * width as u64;
    let first = (number(pointers)?, number(starts)?, number(starts + 8 * (documents - 1))?);
    if bytes != bin.len() as u64 || first != (0, 0, sequences as u64) {
        return Err(wrong(format!(
            "it does not fit its .bin: it says {bytes} bytes, and there are {}",
            bin.len()
        )));
    }

    let stride = Stride::Pointers { at: pointers, count: sequences, width: width as u64 };
    let documents = documents - 1;
    Ok((width, List { map: Arc::new(map), at: starts, documents, stride, base: 0, bytes: None }))
}
