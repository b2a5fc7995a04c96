//! What a model is trained on: prepared files, texts and lists of words, archives.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use ouroboros::data::{Corpus, DataConfig, HeldOut, Tokenizer};
use ouroboros::prepare::{Request, prepare};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;
use zip::write::SimpleFileOptions;

use super::texts::named;
use super::{Parts, Target};

const TEXT: &str = "the cat saw the dog and the dog saw a cat\nna\u{ef}ve caf\u{e9} <unk> one\n\n";

/// Opens a corpus and reads all of both its parts.
fn read(config: &DataConfig, file: &Path) -> Result<(), String> {
    let corpus = match Corpus::open(config, 1, config.sequence, None) {
        Ok(corpus) => corpus,
        Err(error) => return named(&error, Some(file)),
    };
    let (vocabulary, mut tokens) = (corpus.vocabulary.len() as i64, Vec::new());
    for part in [&corpus.sources[0].tokens, &corpus.held_out.tokens] {
        tokens.clear();
        part.read(0, part.len(), &mut tokens);
        if let Some(token) = tokens.iter().find(|token| !(0..vocabulary).contains(*token)) {
            return Err(format!("the token {token} of a vocabulary of {vocabulary}"));
        }
        drop(corpus.vocabulary.decode(&tokens));
    }
    corpus.fingerprint();
    Ok(())
}

/// A request that prepares `what`, and nothing else is said.
fn request(what: PathBuf, dir: &Path, out: PathBuf) -> Request {
    Request { out: Some(out), ..Request::new(what, dir.to_owned()) }
}

struct PreparedFiles {
    path: PathBuf,
    seeds: Vec<Parts>,
}

/// The first byte of the second part says whether the digest is mended: most damage would be found by it alone.
pub fn prepared(folder: &Path) -> Box<dyn Target> {
    let text = folder.join("text.txt");
    fs::write(&text, TEXT.repeat(12)).expect("a file");
    let mut seeds = Vec::new();
    for tokenizer in [Tokenizer::Bytes, Tokenizer::Characters, Tokenizer::Words] {
        let out = folder.join(format!("{tokenizer:?}.tokens"));
        let asked = Request {
            tokenizer: Some(tokenizer),
            held_out: Some(0.2),
            ..request(text.clone(), folder, out.clone())
        };
        prepare(&asked).expect("a prepared file");
        seeds.push(vec![fs::read(&out).expect("a file"), vec![1]]);
    }
    Box::new(PreparedFiles { path: folder.join("a.tokens"), seeds })
}

impl Target for PreparedFiles {
    fn seeds(&self) -> Vec<Parts> {
        self.seeds.clone()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "\"tokens\":0",
            "\"width\":2",
            "\"width\":4",
            "\"name\":\"valid\"",
            "\"tokens\":[],",
            "null",
            "{",
            "[",
            "\"format\":2",
            "\"documents_at\":0",
            "18446744073709551615",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let mut bytes = parts[0].clone();
        if parts[1].first().is_some_and(|byte| byte % 2 == 1) && bytes.len() >= 32 {
            let trailer = bytes.len() - 24;
            let begun = bytes[..trailer].windows(9).rposition(|window| window == b"{\"format\"");
            if let Some(start) = begun {
                let (digest, length) = (xxh3_64(&bytes[start..trailer]), (trailer - start) as u64);
                bytes[trailer..trailer + 8].copy_from_slice(&length.to_le_bytes());
                bytes[trailer + 8..trailer + 16].copy_from_slice(&digest.to_le_bytes());
            }
        }
        fs::write(&self.path, bytes).map_err(|error| error.to_string())?;
        let config = DataConfig {
            path: Some(self.path.clone()),
            sequence: 4,
            held_out: HeldOut::File("valid".into()),
            ..DataConfig::default()
        };
        read(&config, &self.path)
    }
}

struct Words {
    folder: PathBuf,
}

/// A text, a list of words, and how they are read.
pub fn words(folder: &Path) -> Box<dyn Target> {
    Box::new(Words { folder: folder.to_owned() })
}

impl Target for Words {
    fn seeds(&self) -> Vec<Parts> {
        let list = "<unk>\nthe\t100\ncat 7\ndog\nsaw\na\nand\none\n";
        (0..8u8).map(|how| vec![TEXT.repeat(6).into_bytes(), list.into(), vec![how]]).collect()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "<unk>",
            "<eos>",
            "\u{feff}",
            "\r\n",
            "\n\n",
            "\u{2028}",
            "\u{0}",
            "\t",
            "1e9",
            "ouroboros tokens",
            "\u{10ffff}",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let (text, list) = (self.folder.join("text.txt"), self.folder.join("list.txt"));
        fs::write(&text, &parts[0])
            .and_then(|()| fs::write(&list, &parts[1]))
            .map_err(|error| error.to_string())?;
        let how = parts[2].first().copied().unwrap_or_default();
        let tokenizer =
            [Tokenizer::Bytes, Tokenizer::Characters, Tokenizer::Words, Tokenizer::Words]
                [usize::from(how % 4)]
            .clone();
        let listed = tokenizer == Tokenizer::Words && how & 4 == 4;
        let config = DataConfig {
            path: Some(text.clone()),
            tokenizer: Some(tokenizer),
            vocabulary: listed.then(|| list.clone()),
            sequence: 3,
            held_out: HeldOut::Fraction(0.2),
            ..DataConfig::default()
        };
        read(&config, &text)
            .or_else(|problem| if problem.contains("list.txt") { Ok(()) } else { Err(problem) })
    }
}

struct Archives {
    folder: PathBuf,
}

pub fn archive(folder: &Path) -> Box<dyn Target> {
    Box::new(Archives { folder: folder.to_owned() })
}

/// An archive with these members.
fn zipped(members: &[(&str, &[u8])], how: zip::CompressionMethod) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        writer
            .start_file(*name, SimpleFileOptions::default().compression_method(how))
            .expect("a member");
        writer.write_all(bytes).expect("a member");
    }
    writer.finish().expect("an archive").into_inner()
}

impl Target for Archives {
    fn seeds(&self) -> Vec<Parts> {
        let text = TEXT.repeat(8).into_bytes();
        let (one, deflated, stored) =
            (&text[..], zip::CompressionMethod::Deflated, zip::CompressionMethod::Stored);
        let wiki = |name| format!("wikitext-103/wiki.{name}.tokens");
        let (train, valid, test) = (wiki("train"), wiki("valid"), wiki("test"));
        vec![
            vec![zipped(&[("enwik8", one)], deflated), b"enwik8".to_vec()],
            vec![zipped(&[("enwik8", one)], stored), b"enwik8".to_vec()],
            vec![zipped(&[("enwik8", &vec![0; 1 << 20])], deflated), b"enwik8".to_vec()],
            vec![zipped(&[("../../../enwik8", one), ("text8", one)], deflated), b"text8".to_vec()],
            vec![
                zipped(&[(&train, one), (&valid, one), (&test, one), ("/tmp/a", one)], deflated),
                b"wikitext-103".to_vec(),
            ],
        ]
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "PK\u{1}\u{2}",
            "PK\u{3}\u{4}",
            "PK\u{5}\u{6}",
            "PK\u{6}\u{6}",
            "../",
            "/",
            "enwik8",
            "text8",
            "\u{1}\u{0}",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let (archive, out) = (self.folder.join("a.zip"), self.folder.join("a.tokens"));
        fs::write(&archive, &parts[0]).map_err(|error| error.to_string())?;
        let _ = fs::remove_file(&out);
        let known = ["enwik8", "text8", "wikitext-103"];
        let name = known.into_iter().find(|name| name.as_bytes() == parts[1]).unwrap_or("enwik8");
        let digest: String =
            Sha256::digest(&parts[0]).iter().map(|byte| format!("{byte:02x}")).collect();
        let asked = Request {
            archive: Some(archive.clone()),
            sha256: Some(digest),
            ..request(name.into(), &self.folder, out.clone())
        };
        match prepare(&asked) {
            Ok(made) if made == out => {}
            Ok(made) => return Err(format!("{} was made", made.display())),
            // A text of the archive is called by its name there.
            Err(error) if name == "wikitext-103" || error.to_string().contains(name) => {}
            Err(error) => named(&error, Some(&archive))?,
        }
        let found =
            fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        match found.into_iter().find(|path| *path != archive && *path != out) {
            None => Ok(()),
            Some(path) => Err(format!("{} was left", path.display())),
        }
    }

    /// Deflate makes a thousand bytes of one; the text is read, cut, tokenised.
    fn room(&self, bytes: usize) -> usize {
        (32 << 20) + 16 * 1032 * bytes
    }
}
