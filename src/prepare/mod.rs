//! `ouroboros data prepare`: from texts, JSON lines and Parquet, or an archive on the net, to a
//! prepared file that every run maps.
//!
//! ```text
//! NAME.zip.part --SHA-256--> NAME.zip --unpack--+
//! files, directories, patterns -----------------+--documents--> pieces --all cores--> OUT.partial/ --> OUT
//! ```
//!
//! What is there under its own name is complete, and is not made again. What is begun is gone on
//! with.

mod documents;
mod download;
mod inputs;
mod known;
mod parquet_column;
mod tokenise;
mod train_tokenizer;
mod unfinished;
mod unpack;

use std::fs;
use std::path::{Path, PathBuf};

pub use train_tokenizer::{TrainRequest, train_tokenizer};

use crate::data::prepared::{Header, InputFacts, Prepared, Source};
use crate::data::{Subword, Tokenizer, Unit};
use crate::error::{Error, Result};
use crate::metrics::thousands;
use inputs::{Content, Format, Input, Packing, Splitting};
use known::Known;
use tokenise::{Task, describe};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The name of a known corpus; or paths of texts, directories and patterns.
    pub what: Vec<PathBuf>,
    /// Texts that are held out.
    pub valid: Vec<PathBuf>,
    pub test: Vec<PathBuf>,
    /// Where archives and prepared files go.
    pub dir: PathBuf,
    pub out: Option<PathBuf>,
    /// An address that has the archive under its own name.
    pub mirror: Option<String>,
    pub archive: Option<PathBuf>,
    /// Of the archive, where it is not the known one.
    pub sha256: Option<String>,
    pub tokenizer: Option<Tokenizer>,
    pub end_token: Option<String>,
    pub min_count: usize,
    pub vocabulary: Option<PathBuf>,
    /// The share that each of the splits `valid` and `test` gets; none: 5 %.
    pub held_out: Option<f64>,
    /// Of the draw of documents that are held out.
    pub seed: u64,
    /// The key or column of the text.
    pub field: String,
    /// Leave out lines and rows that are no documents.
    pub skip_bad: bool,
    /// Threads; none: one a core.
    pub threads: Option<usize>,
}

impl Request {
    /// Of which nothing else is said.
    pub fn new(what: PathBuf, dir: PathBuf) -> Request {
        Request {
            what: vec![what],
            valid: Vec::new(),
            test: Vec::new(),
            dir,
            out: None,
            mirror: None,
            archive: None,
            sha256: None,
            tokenizer: None,
            end_token: None,
            min_count: 1,
            vocabulary: None,
            held_out: None,
            seed: 1,
            field: "text".to_owned(),
            skip_bad: false,
            threads: None,
        }
    }
}

const SPLITS: [&str; 3] = ["train", "valid", "test"];
/// As usual for enwik8 and text8.
const HELD_OUT: f64 = 0.05;

/// Prepares what is asked for; the path of the prepared file.
///
/// # Errors
/// [`Error::Data`] about the archive, the texts or the file; [`Error::Config`] about an option that
/// does not fit.
pub fn prepare(request: &Request) -> Result<PathBuf> {
    let known = match &request.what[..] {
        [one] => known::find(one),
        _ => None,
    };

    let unit = request.tokenizer.as_ref().or(known.map(|known| &known.tokenizer));
    let unit = unit.map_or(Unit::Bytes, Tokenizer::unit);
    let list = request.vocabulary.as_ref().map(|path| path.display().to_string());
    let rare = (request.min_count > 1).then(|| request.min_count.to_string());
    let end = request.end_token.clone();
    for (option, found, of, which) in [
        ("--min-count", rare, Unit::Words, "words"),
        ("--vocabulary", list, Unit::Words, "words"),
        ("--end-token", end, Unit::Subwords, "FILE"),
    ] {
        if let Some(found) = found.filter(|_| unit != of) {
            let remedy = format!("is for --tokenizer {which} only; leave it out");
            return Err(Error::config(option, found, remedy));
        }
    }

    let pool = rayon::ThreadPoolBuilder::new().num_threads(request.threads.unwrap_or(0)).build();
    let pool = pool.map_err(|error| Error::config("--threads", "given", error.to_string()))?;
    pool.install(|| match known {
        Some(known) => prepare_known(request, known),
        None => prepare_files(request),
    })
}

fn prepare_known(request: &Request, known: &Known) -> Result<PathBuf> {
    let fixed = "its splits are fixed; leave it out";
    if let Some(fraction) = request.held_out {
        let remedy = format!("the splits of {} are fixed; leave it out", known.name);
        return Err(Error::config("--held-out", fraction, remedy));
    }

    for (option, files) in [("--valid", &request.valid), ("--test", &request.test)] {
        if let Some(file) = files.first() {
            return Err(Error::config(option, file.display(), fixed));
        }
    }

    let tokenizer = request.tokenizer.clone().unwrap_or(known.tokenizer.clone());
    let out =
        request.out.clone().unwrap_or_else(|| request.dir.join(format!("{}.tokens", known.name)));
    let sha256 = request.sha256.clone().unwrap_or_else(|| known.sha256.to_owned()).to_lowercase();
    let source = Source {
        name: known.name.to_owned(),
        how: how(request, &tokenizer)?,
        inputs: vec![InputFacts {
            name: known.name.to_owned(),
            bytes: 0,
            digest: sha256.clone(),
            split: String::new(),
        }],
        skipped: 0,
    };

    if is_done(&out, &source)? {
        return Ok(out);
    }

    make_folder_of(&out)?;
    let archive = known::archive(request, known, &sha256)?;
    say!("{}: unpacking", archive.display());
    let inputs = known::unpack(&archive, known, &tokenizer)?;
    let (out, inputs, tokenizer) = (&out, &inputs, &tokenizer);
    Task { request, out, source, inputs, tokenizer }.make()
}

fn prepare_files(request: &Request) -> Result<PathBuf> {
    for (option, given) in [
        ("--mirror", request.mirror.is_some()),
        ("--archive", request.archive.is_some()),
        ("--sha256", request.sha256.is_some()),
    ] {
        if given {
            let what =
                request.what.first().map_or(String::new(), |what| what.display().to_string());
            let remedy = format!("is for {} only; `{what}` is taken for a file", known::names());
            return Err(Error::config(option, "given", remedy));
        }
    }

    let tokenizer = request.tokenizer.clone().unwrap_or(Tokenizer::Bytes);
    let inputs = inputs(request, &tokenizer)?;
    let name = match &request.what[..] {
        [one] => one.file_name().unwrap_or(one.as_os_str()).to_string_lossy().into_owned(),
        more => format!("{} files", more.len()),
    };

    let out = match (&request.out, &request.what[..]) {
        (Some(out), _) => out.clone(),
        (None, [one]) if one.exists() => request.dir.join(format!("{name}.tokens")),
        _ => return Err(Error::config("--out", "nothing", "say where the prepared file goes")),
    };

    let facts = inputs::facts(&inputs)?;
    let source = Source { name, how: how(request, &tokenizer)?, inputs: facts, skipped: 0 };
    if is_done(&out, &source)? {
        return Ok(out);
    }

    make_folder_of(&out)?;
    let (out, inputs, tokenizer) = (&out, &inputs, &tokenizer);
    Task { request, out, source, inputs, tokenizer }.make()
}

/// What is read, and which split it belongs to.
fn inputs(request: &Request, tokenizer: &Tokenizer) -> Result<Vec<Input>> {
    let given = request.held_out;
    let held_out = given.unwrap_or(HELD_OUT);
    if !(0.0..0.5).contains(&held_out) {
        let remedy = "a share from 0 on and below 0.5 for each of valid and test";
        return Err(Error::config("--held-out", held_out, remedy));
    }

    if !(request.valid.is_empty() && request.test.is_empty()) {
        if let Some(fraction) = given {
            let remedy = "files are held out already; leave one of them out";
            return Err(Error::config("--held-out", fraction, remedy));
        }

        let splits = [&request.what, &request.valid, &request.test];
        let of =
            |(split, what): (usize, &Vec<PathBuf>)| inputs::find(what, &Splitting::Whole(split));
        return Ok(splits.into_iter().enumerate().map(of).collect::<Result<Vec<_>>>()?.concat());
    }

    let mut found = inputs::find(&request.what, &Splitting::Drawn)?;
    if let [only] = &mut found[..]
        && only.format == Format::Text
        && let Content::File(path) = &only.content
    {
        if held_out == 0.0 {
            only.splitting = Splitting::Whole(0);
        } else if only.packing == Packing::Plain {
            let ends = documents::cuts(path, held_out, tokenizer.unit())?;
            only.splitting = Splitting::Cut(ends);
        } else {
            let remedy =
                "a packed text is not cut: give --valid FILE, or --held-out 0, or unpack it";
            return Err(Error::config("--held-out", held_out, remedy));
        }
    }

    found.iter().try_for_each(long_enough)?;
    Ok(found)
}

/// Whether every split of a text gets something.
fn long_enough(input: &Input) -> Result<()> {
    let Splitting::Cut(ends) = &input.splitting else { return Ok(()) };
    let starts = std::iter::once(&0).chain(ends);
    match starts.zip(ends).position(|(start, end)| start == end) {
        Some(split) => {
            let problem = format!("too short: nothing is left for {}", SPLITS[split]);
            Err(Error::data(&input.name, problem, "use a longer text, or another --held-out"))
        }
        None => Ok(()),
    }
}

/// What else than the texts decides a prepared file.
fn how(request: &Request, tokenizer: &Tokenizer) -> Result<String> {
    let mut how = tokenizer.unit().word().to_owned();
    if let Tokenizer::File(path) = tokenizer {
        let subword = Subword::open(path, request.end_token.as_deref())?;
        let end = subword.facts.end.map_or("none".to_owned(), |end| end.to_string());
        how.push_str(&format!(" of {}, end token {end}", subword.facts.digest));
    }

    if let Some(fraction) = request.held_out {
        how.push_str(&format!(", held_out {fraction}"));
    }

    match &request.vocabulary {
        Some(path) => how.push_str(&format!(", words of SHA-256 {}", download::digest(path)?)),
        None if *tokenizer == Tokenizer::Words => {
            how.push_str(&format!(", min_count {}", request.min_count))
        }
        None => {}
    }

    if request.seed != 1 {
        how.push_str(&format!(", seed {}", request.seed));
    }

    if request.field != "text" {
        how.push_str(&format!(", field {}", request.field));
    }

    if request.skip_bad {
        how.push_str(", without bad records");
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
    let found = Source { skipped: 0, ..found };
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

/// Reads a prepared file whole, and tells what it holds.
///
/// # Errors
/// [`Error::Data`] about what is damaged.
pub fn check(path: &Path) -> Result<()> {
    let prepared = Prepared::open(path)?;
    prepared.verify()?;
    let Header { source, vocabulary, .. } = &prepared.header;
    say!("{}: {}", path.display(), describe(&prepared.header));
    say!("made of         {} ({})", source.name, source.how);
    if let Some(facts) = &vocabulary.subword {
        say!("tokenizer       {} (digest {})", facts.name, facts.digest);
    }

    for split in &prepared.header.splits {
        let (tokens, documents) = (thousands(split.tokens), thousands(split.documents));
        let bytes = thousands(split.bytes);
        say!("{:<15} {tokens} tokens, {documents} documents, {bytes} bytes of text", split.name);
    }
    Ok(())
}
