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
mod train_tokenizer;
mod unfinished;
mod unpack;

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

pub use train_tokenizer::{TrainRequest, train_tokenizer};

use crate::data::prepared::{Header, InputFacts, Prepared, Source};
use crate::data::{Counts, DataConfig, Tokenizer, Unit, Vocabulary, Width, made};
use crate::error::{Error, Result};
use crate::metrics::thousands;
use documents::{Batch, Documents, Place, Reading};
use inputs::{Content, Format, Input, Packing, Splitting};
use known::Known;
use unfinished::{Encoded, Unfinished};

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
        inputs: vec![InputFacts { name: known.name.to_owned(), bytes: 0, digest: sha256.clone() }],
        skipped: 0,
    };

    if is_done(&out, &source)? {
        return Ok(out);
    }

    make_folder_of(&out)?;
    let archive = known::archive(request, known, &sha256)?;
    say!("{}: unpacking", archive.display());
    let inputs = known::unpack(&archive, known, &tokenizer)?;
    make(request, &out, &source, &inputs, &tokenizer)
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

    let facts = inputs.iter().map(Input::facts).collect::<Result<_>>()?;
    let source = Source { name, how: how(request, &tokenizer)?, inputs: facts, skipped: 0 };
    if is_done(&out, &source)? {
        return Ok(out);
    }

    make_folder_of(&out)?;
    make(request, &out, &source, &inputs, &tokenizer)
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
        let end = request.end_token.as_deref().unwrap_or("told by it");
        how.push_str(&format!(" of SHA-256 {}, end token {end}", download::digest(path)?));
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

    let counts = [&request.what, &request.valid, &request.test].map(Vec::len);
    if counts[1] + counts[2] > 0 {
        how.push_str(&format!(", {} files of valid, {} of test", counts[1], counts[2]));
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

/// Tokenises the inputs and writes the prepared file.
fn make(
    request: &Request,
    out: &Path,
    source: &Source,
    inputs: &[Input],
    tokenizer: &Tokenizer,
) -> Result<PathBuf> {
    let unfinished = Unfinished::open(out, source)?;
    let folder = unfinished.folder();
    let made = make_in(unfinished, request, out, source, inputs, tokenizer);
    // With other files or options it begins again; a full disk is gone on with.
    if let Err(Error::Data { path, .. }) = &made
        && *path != out.display().to_string()
    {
        let _ = fs::remove_dir_all(folder);
    }
    made
}

fn make_in(
    unfinished: Unfinished,
    request: &Request,
    out: &Path,
    source: &Source,
    inputs: &[Input],
    tokenizer: &Tokenizer,
) -> Result<PathBuf> {
    let reading = Reading {
        field: request.field.clone(),
        skip_bad: request.skip_bad,
        seed: request.seed,
        held_out: request.held_out.unwrap_or(HELD_OUT),
    };

    let vocabulary = vocabulary(request, out, inputs, tokenizer, &reading, &unfinished)?;
    need_end(inputs, &vocabulary, tokenizer)?;
    let (place, skipped) = unfinished.place();
    let mut writer = unfinished.write(Width::of(vocabulary.len()))?;
    let mut documents = Documents::new(inputs, &vocabulary, &reading, place, skipped);
    each_batch(&mut documents, inputs, "tokenising", |batch| {
        let encoded = encode(&batch, inputs, &vocabulary)?;
        writer.add(&encoded, batch.end, batch.skipped)
    })?;

    let empty = (0..SPLITS.len()).find(|split| writer.count(*split) == 0);
    if writer.count(0) == 0 {
        let remedy = "give documents that are not empty, or another --held-out";
        return Err(Error::data(&source.name, "nothing is left for train", remedy));
    }

    let header = writer.finish(&vocabulary)?;
    say!("{}: {}", out.display(), describe(&header));
    let wanted = request.valid.is_empty() && request.test.is_empty() && reading.held_out > 0.0;
    if let Some(split) = empty.filter(|_| wanted) {
        say!("note: there are too few documents: none is held out for {}", SPLITS[split]);
    }

    if header.source.skipped > 0 {
        say!(
            "note: {} records were no documents, and are left out",
            thousands(header.source.skipped)
        );
    }
    Ok(out.to_owned())
}

/// Hands every batch on, while the next one is read.
fn each_batch(
    documents: &mut Documents,
    inputs: &[Input],
    what: &str,
    mut take: impl FnMut(Batch) -> Result<()> + Send,
) -> Result<()> {
    let bar = download::bytes_bar(inputs.iter().map(|input| input.bytes).sum(), what);
    let mut next = documents.batch()?;
    while let Some(batch) = next {
        bar.set_position(batch.read);
        let (taken, read) = rayon::join(|| take(batch), || documents.batch());
        taken?;
        next = read?;
    }

    bar.finish_and_clear();
    Ok(())
}

/// The tokens of a batch, over all cores.
fn encode(batch: &Batch, inputs: &[Input], vocabulary: &Vocabulary) -> Result<Vec<Encoded>> {
    let width = Width::of(vocabulary.len());
    let (before, after) = vocabulary.around()?;
    let encode = |piece: &documents::Piece| {
        let name = &inputs[piece.input].name;
        let (split, begins, bytes) = (piece.split, piece.begins, piece.text.len() as u64);
        if vocabulary.unit() == Unit::Bytes {
            return Ok(Encoded { tokens: piece.text.clone(), bytes, split, begins });
        }

        // Whoever cut it has looked at it.
        let text = crate::data::utf8(&piece.text, name)?;
        let tokens = vocabulary.encode_piece(text, name).map_err(in_options)?;
        let mut encoded = if begins { width.encode(&before) } else { Vec::new() };
        encoded.extend(width.encode(&tokens));
        if piece.ends && tokens.last() != after.last() {
            encoded.extend(width.encode(&after));
        }
        Ok(Encoded { tokens: encoded, bytes, split, begins })
    };
    batch.pieces.par_iter().map(encode).collect()
}

/// The vocabulary that is asked for: read, or counted in the inputs.
fn vocabulary(
    request: &Request,
    out: &Path,
    inputs: &[Input],
    tokenizer: &Tokenizer,
    reading: &Reading,
    unfinished: &Unfinished,
) -> Result<Vocabulary> {
    let unit = tokenizer.unit();
    let counts = Counts::new(unit).filter(|_| request.vocabulary.is_none());
    let Some(mut counts) = counts else {
        let config = DataConfig {
            tokenizer: Some(tokenizer.clone()),
            end_token: request.end_token.clone(),
            vocabulary: request.vocabulary.clone(),
            ..DataConfig::default()
        };
        return made(&config, "", &[]);
    };

    if let Some(counted) = unfinished.counted() {
        return Ok(counted);
    }

    say!("{}: counting {}s", out.display(), unit.name());
    let shape = Counts::of(unit, &[], 1);
    let mut documents = Documents::new(inputs, &shape, reading, Place::default(), 0);
    each_batch(&mut documents, inputs, "counting", |batch| {
        // Words are those of the training split; characters must all have a number.
        let pieces =
            batch.pieces.iter().filter(|piece| piece.split == 0 || unit == Unit::Characters);
        let texts = pieces.map(|piece| crate::data::utf8(&piece.text, &inputs[piece.input].name));
        counts.add_all(texts.collect::<Result<Vec<&str>>>()?);
        Ok(())
    })?;

    let vocabulary = counts.vocabulary(request.min_count);
    unfinished.keep(&vocabulary)?;
    Ok(vocabulary)
}

/// Whether the end of a document can be told by the tokens, where there are several.
fn need_end(inputs: &[Input], vocabulary: &Vocabulary, tokenizer: &Tokenizer) -> Result<()> {
    let several = inputs.len() > 1 || inputs.iter().any(|input| input.format != Format::Text);
    if vocabulary.unit() != Unit::Subwords || vocabulary.end().is_some() || !several {
        return Ok(());
    }

    let remedy = "name one of its tokens by --end-token";
    Err(Error::data(tokenizer, "it has no usual token that ends a document", remedy))
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

fn describe(header: &Header) -> String {
    let splits =
        header.splits.iter().map(|split| format!("{} {}", split.name, thousands(split.tokens)));
    let splits: Vec<String> = splits.collect();
    let vocabulary = thousands(header.vocabulary.count() as u64);
    let documents: u64 = header.splits.iter().map(|split| split.documents).sum();
    let bytes: u64 = header.splits.iter().map(|split| split.bytes).sum();
    format!(
        "{} tokens of a vocabulary of {vocabulary}; {} documents, {} bytes of text",
        splits.join(", "),
        thousands(documents),
        thousands(bytes)
    )
}
