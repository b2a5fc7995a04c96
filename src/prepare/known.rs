//! Corpora that everybody knows: archives on the net, and how they are split.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::inputs::{Input, Splitting};
use super::{HELD_OUT, Request, SPLITS, download};
use crate::data::{Tokenizer, cut_text, utf8};
use crate::error::{Error, Result};
use crate::files;

/// A corpus that everybody knows.
pub struct Known {
    pub name: &'static str,
    archive: &'static str,
    addresses: &'static [&'static str],
    pub sha256: &'static str,
    pub tokenizer: Tokenizer,
    /// One file that is cut 90 / 5 / 5, or the files of the three splits.
    files: &'static [&'static str],
}

const KNOWN: [Known; 3] = [
    Known {
        name: "enwik8",
        archive: "enwik8.zip",
        addresses: &["https://mattmahoney.net/dc"],
        sha256: "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        tokenizer: Tokenizer::Bytes,
        files: &["enwik8"],
    },
    Known {
        name: "text8",
        archive: "text8.zip",
        addresses: &["https://mattmahoney.net/dc"],
        sha256: "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        tokenizer: Tokenizer::Characters,
        files: &["text8"],
    },
    Known {
        name: "wikitext-103",
        archive: "wikitext-103-v1.zip",
        addresses: &[
            "https://s3.amazonaws.com/research.metamind.io/wikitext",
            "https://wikitext.smerity.com",
        ],
        sha256: "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        tokenizer: Tokenizer::Words,
        files: &[
            "wikitext-103/wiki.train.tokens",
            "wikitext-103/wiki.valid.tokens",
            "wikitext-103/wiki.test.tokens",
        ],
    },
];

/// Bytes of an unpacked text: the largest of those that everybody knows has half a gibibyte.
const LARGEST: u64 = 1 << 32;
/// Deflate makes no more bytes than this of one.
const RATIO: u64 = 1032;

/// The names of all.
pub fn names() -> String {
    KNOWN.map(|known| known.name).join(", ")
}

/// The corpus of a name.
pub fn find(name: &Path) -> Option<&'static Known> {
    KNOWN.iter().find(|known| name == Path::new(known.name))
}

/// The archive, checked: the one that was given, the one that is there, or a download.
pub fn archive(request: &Request, known: &Known, sha256: &str) -> Result<PathBuf> {
    if let Some(archive) = &request.archive {
        download::check(archive, sha256)?;
        return Ok(archive.clone());
    }

    make_folder(&request.dir)?;
    let path = request.dir.join(known.archive);
    if path.exists() {
        let stale = |error| match error {
            Error::Data { path, problem, .. } => {
                let remedy =
                    "remove it and run again, or give --sha256 if it is meant to be another".into();
                Error::Data { path, problem, remedy }
            }
            other => other,
        };

        download::check(&path, sha256).map_err(stale)?;
        return Ok(path);
    }

    let addresses: Vec<String> = match &request.mirror {
        Some(mirror) => vec![mirror.clone()],
        None => known.addresses.iter().map(|address| (*address).to_owned()).collect(),
    };

    let addresses: Vec<String> = addresses
        .iter()
        .map(|address| format!("{}/{}", address.trim_end_matches('/'), known.archive))
        .collect();
    say!("{}: downloading {}", path.display(), addresses[0]);
    download::download(&addresses, &path, sha256)?;
    Ok(path)
}

fn make_folder(folder: &Path) -> Result<()> {
    let wrong =
        |error| Error::config("--dir", folder.display(), format!("cannot be made ({error})"));
    fs::create_dir_all(folder).map_err(wrong)
}

/// The texts of an archive.
pub fn unpack(archive: &Path, known: &Known, tokenizer: &Tokenizer) -> Result<Vec<Input>> {
    let wrong = |problem: String| {
        Error::data(archive.display(), problem, "fetch it again, or give another --archive")
    };

    let file = files::open(archive).map_err(|error| wrong(error.to_string()))?;
    let length = file.metadata().map_err(|error| wrong(error.to_string()))?.len();
    let mut zip = zip::ZipArchive::new(file)
        .map_err(|error| wrong(format!("not a zip archive ({error})")))?;
    let mut read = |name: &str| -> Result<Vec<u8>> {
        let mut member =
            zip.by_name(name).map_err(|error| wrong(format!("no `{name}` in it ({error})")))?;
        let (size, packed) = (member.size(), member.compressed_size().min(length));
        if !member.is_file() || size > LARGEST || size > RATIO.saturating_mul(packed) {
            return Err(wrong(format!("`{name}` is no text: {size} bytes packed into {packed}")));
        }

        let mut bytes = Vec::with_capacity(size as usize);
        let bar = download::bytes_bar(size, "unpacking");
        // One byte more tells what goes on for ever.
        let read = bar.wrap_read(&mut member).take(size + 1).read_to_end(&mut bytes);
        bar.finish_and_clear();
        match read {
            Ok(read) if read as u64 == size => Ok(bytes),
            Ok(_) => Err(wrong(format!("`{name}` is not the {size} bytes that the archive says"))),
            Err(error) => Err(wrong(format!("`{name}`: {error}"))),
        }
    };

    if let [only] = known.files {
        let text = read(only)?;
        if *tokenizer != Tokenizer::Bytes {
            utf8(&text, only)?;
        }

        let ranges = cut_text(&text, &[HELD_OUT, HELD_OUT], tokenizer.unit());
        let ends = ranges.into_iter().map(|range| range.end as u64).collect();
        return Ok(vec![Input::memory(only, text, Splitting::Cut(ends))]);
    }

    let text = |(split, name): (usize, &&str)| {
        Ok(Input::memory(
            &format!("{name} ({})", SPLITS[split]),
            read(name)?,
            Splitting::Whole(split),
        ))
    };
    known.files.iter().enumerate().map(text).collect()
}
