//! `ouroboros data prepare`: from an archive on the net, or a text here, to a prepared file that
//! every run maps.
//!
//! ```text
//! NAME.zip.part --SHA-256--> NAME.zip --unpack, split, tokenise--> NAME.tokens
//! ```
//!
//! Every arrow is one rename at its end, so whatever is there under its own name is complete; what
//! is there already is not made again.

mod download;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::data::prepared::{self, Header, Prepared, Source};
use crate::data::{DataConfig, Tokenizer, Vocabulary, cut_text, made, utf8};
use crate::error::{Error, Result};
use crate::files;
use crate::metrics::thousands;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The name of a known corpus, or the path of a text.
    pub what: PathBuf,
    /// Where archives and prepared files go.
    pub dir: PathBuf,
    pub out: Option<PathBuf>,
    /// An address that has the archive under its own name.
    pub mirror: Option<String>,
    pub archive: Option<PathBuf>,
    /// Of the archive, where it is not the known one.
    pub sha256: Option<String>,
    pub tokenizer: Option<Tokenizer>,
    pub min_count: usize,
    pub vocabulary: Option<PathBuf>,
    /// The share of a text of one's own that each of the splits `valid` and `test` gets; none: 5 %.
    pub held_out: Option<f64>,
}

/// A corpus that everybody knows.
struct Known {
    name: &'static str,
    archive: &'static str,
    addresses: &'static [&'static str],
    sha256: &'static str,
    tokenizer: Tokenizer,
    /// One file that is cut 90 / 5 / 5, or the files of the three splits.
    files: &'static [&'static str],
}

const SPLITS: [&str; 3] = ["train", "valid", "test"];
/// As usual for enwik8 and text8.
const HELD_OUT: f64 = 0.05;

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

/// The bytes of the texts of the splits, one after the other where they come from one file.
type Texts = Vec<(&'static str, Vec<u8>)>;

/// Prepares what is asked for; the path of the prepared file.
///
/// # Errors
/// [`Error::Data`] about the archive, the text or the file; [`Error::Config`] about an option that
/// does not fit.
pub fn prepare(request: &Request) -> Result<PathBuf> {
    let known = KNOWN.iter().find(|known| request.what == Path::new(known.name));
    let tokenizer =
        request.tokenizer.unwrap_or(known.map_or(Tokenizer::Bytes, |known| known.tokenizer));
    let list = request.vocabulary.as_ref().map(|path| path.display().to_string());
    let rare = (request.min_count > 1).then(|| request.min_count.to_string());
    for (option, found) in [("--min-count", rare), ("--vocabulary", list)] {
        if let Some(found) = found.filter(|_| tokenizer != Tokenizer::Words) {
            return Err(Error::config(
                option,
                found,
                "is for --tokenizer words only; leave it out",
            ));
        }
    }

    if let Some(fraction) = request.held_out.filter(|_| known.is_some()) {
        let remedy = format!("the splits of {} are fixed; leave it out", request.what.display());
        return Err(Error::config("--held-out", fraction, remedy));
    }

    match known {
        Some(known) => prepare_known(request, known),
        None => prepare_file(request),
    }
}

fn prepare_known(request: &Request, known: &Known) -> Result<PathBuf> {
    let tokenizer = request.tokenizer.unwrap_or(known.tokenizer);
    let out =
        request.out.clone().unwrap_or_else(|| request.dir.join(format!("{}.tokens", known.name)));
    let sha256 = request.sha256.clone().unwrap_or_else(|| known.sha256.to_owned()).to_lowercase();
    let source = Source {
        name: known.name.to_owned(),
        sha256: sha256.clone(),
        how: how(request, tokenizer)?,
    };

    if is_done(&out, &source)? {
        return Ok(out);
    }

    make_folder_of(&out)?;
    let archive = archive(request, known, &sha256)?;
    say!("{}: unpacking", archive.display());
    let texts = unpack(&archive, known, tokenizer)?;
    finish(request, &out, source, texts, tokenizer)
}

fn prepare_file(request: &Request) -> Result<PathBuf> {
    for (option, given) in [
        ("--mirror", request.mirror.is_some()),
        ("--archive", request.archive.is_some()),
        ("--sha256", request.sha256.is_some()),
    ] {
        if given {
            let names: Vec<&str> = KNOWN.iter().map(|known| known.name).collect();
            let remedy = format!(
                "is for {} only; `{}` is taken for a file",
                names.join(", "),
                request.what.display()
            );

            return Err(Error::config(option, "given", remedy));
        }
    }

    let fraction = request.held_out.unwrap_or(HELD_OUT);
    if !(fraction > 0.0 && fraction < 0.5) {
        return Err(Error::config(
            "--held-out",
            fraction,
            "a share above 0 and below 0.5 for each of valid and test",
        ));
    }

    let path = &request.what;
    let names: Vec<&str> = KNOWN.iter().map(|known| known.name).collect();
    let wrong = |error: std::io::Error| {
        let problem = format!("cannot be read ({error})");
        Error::data(
            path.display(),
            problem,
            format!("give the path of a text, or one of {}", names.join(", ")),
        )
    };

    let bytes = files::read(path).map_err(wrong)?;

    let tokenizer = request.tokenizer.unwrap_or(Tokenizer::Bytes);
    let name = path.file_name().unwrap_or(path.as_os_str()).to_owned();
    let out = request
        .out
        .clone()
        .unwrap_or_else(|| request.dir.join(download::with_suffix(Path::new(&name), ".tokens")));
    let source = Source {
        name: name.to_string_lossy().into_owned(),
        sha256: download::digest_of(&bytes),
        how: how(request, tokenizer)?,
    };

    if is_done(&out, &source)? {
        return Ok(out);
    }

    make_folder_of(&out)?;
    let texts = cut(bytes, &path.display().to_string(), tokenizer, fraction)?;
    finish(request, &out, source, texts, tokenizer)
}

/// What else than the text decides a prepared file.
fn how(request: &Request, tokenizer: Tokenizer) -> Result<String> {
    let mut how = tokenizer.word().to_owned();
    if let Some(fraction) = request.held_out {
        how.push_str(&format!(", held_out {fraction}"));
    }

    match &request.vocabulary {
        Some(path) => how.push_str(&format!(", words of SHA-256 {}", download::digest(path)?)),
        None if tokenizer == Tokenizer::Words => {
            how.push_str(&format!(", min_count {}", request.min_count))
        }
        None => {}
    }

    Ok(how)
}

/// Whether the prepared file is there already. One of another source or made in another way is not
/// overwritten.
fn is_done(out: &Path, source: &Source) -> Result<bool> {
    if !out.exists() {
        return Ok(false);
    }

    let unusable = |error| match error {
        Error::Data { path, problem, .. } => {
            Error::Data { path, problem, remedy: "remove it and run again".into() }
        }
        other => other,
    };

    let found = Prepared::open(out).map_err(unusable)?.header.source;
    if found == *source {
        say!("{}: prepared already", out.display());
        return Ok(true);
    }

    let problem = format!(
        "made of {} ({}) before, not of {} ({})",
        found.name, found.how, source.name, source.how
    );

    Err(Error::data(out.display(), problem, "remove it, or give another --out"))
}

/// The archive, checked: the one that was given, the one that is there, or a download.
fn archive(request: &Request, known: &Known, sha256: &str) -> Result<PathBuf> {
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

/// The folder of the prepared file.
fn make_folder_of(out: &Path) -> Result<()> {
    let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty()) else {
        return Ok(());
    };
    let wrong = |error| {
        Error::config("--out", out.display(), format!("its folder cannot be made ({error})"))
    };
    fs::create_dir_all(folder).map_err(wrong)
}

/// The texts of an archive.
fn unpack(archive: &Path, known: &Known, tokenizer: Tokenizer) -> Result<Texts> {
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
        return cut(read(only)?, only, tokenizer, HELD_OUT);
    }

    SPLITS.into_iter().zip(known.files).map(|(split, name)| Ok((split, read(name)?))).collect()
}

/// Cuts one text into the three splits; the last two have the share `fraction` each.
fn cut(bytes: Vec<u8>, name: &str, tokenizer: Tokenizer, fraction: f64) -> Result<Texts> {
    let ranges = match tokenizer {
        Tokenizer::Bytes => {
            let part = (bytes.len() as f64 * fraction).round() as usize;
            let (valid, test) = (bytes.len() - 2 * part, bytes.len() - part);
            vec![0..valid, valid..test, test..bytes.len()]
        }
        _ => cut_text(utf8(&bytes, name)?, &[fraction, fraction], tokenizer),
    };

    if let Some((split, _)) = SPLITS.iter().zip(&ranges).find(|(_, range)| range.is_empty()) {
        let problem = format!("too short: nothing is left for {split}");
        return Err(Error::data(name, problem, "use a longer text, or another --held-out"));
    }

    Ok(SPLITS
        .into_iter()
        .zip(ranges)
        .map(|(split, range)| (split, bytes[range].to_vec()))
        .collect())
}

/// Tokenises the splits and writes the prepared file.
fn finish(
    request: &Request,
    out: &Path,
    source: Source,
    texts: Texts,
    tokenizer: Tokenizer,
) -> Result<PathBuf> {
    let name = |split: &str| format!("{} ({split})", request.what.display());
    let header = match tokenizer {
        Tokenizer::Bytes => prepared::write(out, source, &Vocabulary::bytes(), texts)?,
        _ => {
            let config = DataConfig {
                tokenizer,
                min_count: request.min_count,
                vocabulary: request.vocabulary.clone(),
                ..DataConfig::default()
            };

            let texts: Vec<(&str, &str)> = texts
                .iter()
                .map(|(split, bytes)| Ok((*split, utf8(bytes, &name(split))?)))
                .collect::<Result<_>>()?;
            let others: Vec<&str> = texts[1..].iter().map(|(_, text)| *text).collect();
            say!("{}: counting {}s", out.display(), tokenizer.unit());
            let vocabulary = made(&config, texts[0].1, &others)?;
            let mut splits = Vec::new();
            for (split, text) in texts {
                say!("{}: tokenising {split}", out.display());
                splits.push((
                    split,
                    vocabulary.encode_bytes(text, &name(split)).map_err(in_options)?,
                ));
            }

            prepared::write(out, source, &vocabulary, splits)?
        }
    };

    say!("{}: {}", out.display(), describe(&header));
    Ok(out.to_owned())
}

/// The remedies of unknown words name settings of a config; here they are options.
fn in_options(error: Error) -> Error {
    match error {
        Error::Data { path, problem, remedy } => {
            let remedy = remedy.replace("set data.min_count = 2", "give --min-count 2");
            Error::Data {
                path,
                problem,
                remedy: remedy.replace("a data.vocabulary", "a --vocabulary"),
            }
        }
        other => other,
    }
}

fn describe(header: &Header) -> String {
    let splits = header
        .splits
        .iter()
        .map(|split| format!("{} {}", split.name, thousands(split.tokens as u64)));
    let vocabulary = Vocabulary::of(header.vocabulary.clone()).len();
    let splits: Vec<String> = splits.collect();
    format!("{} tokens of a vocabulary of {}", splits.join(", "), thousands(vocabulary as u64))
}
