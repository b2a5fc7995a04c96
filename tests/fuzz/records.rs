//! Documents and tokens that others have written: JSON lines, Parquet, packed or not, tokenizers, token files.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ouroboros::data::{Corpus, DataConfig, HeldOut, Tokenizer};
use ouroboros::prepare::{Request, prepare};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::texts::named;
use super::{Parts, Target};

const TEXT: &str = "the cat saw the dog\nand the dog saw a na\u{ef}ve cat";

const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null,
"added_tokens": [{"id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
"normalized": false, "special": true}], "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Whitespace"},
"post_processor": null, "decoder": null, "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
"continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
"vocab": {"<|endoftext|>": 0, "<unk>": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6, "d": 7, "o": 8, "g": 9},
"merges": [["t", "h"], ["th", "e"]]}}"#;

/// Names by the second part's first byte.
const NAMES: [&str; 6] = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "a.json"];

struct Records {
    folder: PathBuf,
}

/// A file of documents, what it is called and how it is tokenised, and a tokenizer.
pub fn records(folder: &Path) -> Box<dyn Target> {
    Box::new(Records { folder: folder.to_owned() })
}

fn lines() -> Vec<u8> {
    let line =
        |i| format!("{{\"id\": {i}, \"text\": {TEXT:?}, \"more\": [1, {{\"text\": null}}]}}\n");
    (0..12).map(line).collect::<String>().replace("\\u{ef}", "\\u00ef").into_bytes()
}

/// A column of texts, some of them missing.
fn column(compression: Compression) -> Vec<u8> {
    let schema =
        parse_message_type("message m { optional binary text (UTF8); }").expect("a schema");
    let how = WriterProperties::builder().set_compression(compression).build();
    let mut writer =
        SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::new(how)).expect("a writer");
    for _ in 0..2 {
        let mut group = writer.next_row_group().expect("a group");
        let mut column = group.next_column().expect("a column").expect("a column");
        let texts = [ByteArray::from(TEXT), ByteArray::from("another"), ByteArray::from("")];
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, Some(&[1, 0, 1, 1]), None)
            .expect("rows");
        column.close().expect("a column");
        group.close().expect("a group");
    }
    writer.into_inner().expect("a file")
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).expect("bytes");
    writer.finish().expect("a file")
}

impl Target for Records {
    fn seeds(&self) -> Vec<Parts> {
        let packed = zstd::encode_all(&lines()[..], 1).expect("a file");
        let files = [
            (lines(), 0),
            (gzipped(&lines()), 1),
            (packed, 2),
            (column(Compression::UNCOMPRESSED), 3),
            (column(Compression::SNAPPY), 3),
            (TEXT.repeat(9).into_bytes(), 4),
            (lines(), 5),
        ];
        let with = |tokens: u8| {
            let part =
                move |(file, name): (Vec<u8>, u8)| vec![file, vec![name, tokens], TOKENIZER.into()];
            files.clone().map(part)
        };
        [with(0), with(1)].concat()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "\"text\":",
            "null",
            "{",
            "[",
            "\\ud800",
            "\\u0000",
            "\n",
            "\u{feff}",
            "PAR1",
            "\"id\": 4294967295",
            "\"vocab\": {}",
            "\"merges\": []",
            "\"type\": \"Unigram\"",
            "\"type\": \"ByteLevel\"",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let how = |i: usize| usize::from(parts[1].get(i).copied().unwrap_or_default());
        let file = self.folder.join(NAMES[how(0) % NAMES.len()]);
        let (tokenizer, out) = (self.folder.join("t.json"), self.folder.join("out.tokens"));
        fs::write(&file, &parts[0]).map_err(|error| error.to_string())?;
        fs::write(&tokenizer, &parts[2]).map_err(|error| error.to_string())?;
        let _ = fs::remove_file(&out);
        let asked = Request {
            out: Some(out.clone()),
            tokenizer: (how(1) % 2 == 1).then(|| Tokenizer::File(tokenizer.clone())),
            skip_bad: how(1) % 4 > 1,
            held_out: Some(0.0),
            threads: Some(1),
            ..Request::new(file.clone(), self.folder.clone())
        };
        let made = prepare(&asked);
        let _ = fs::remove_file(&file);
        match made {
            Ok(_) => Ok(()),
            Err(error) if error.to_string().contains("t.json") => Ok(()),
            Err(error) => named(&error, Some(&file)),
        }
    }

    /// Pages of Parquet say how large they become; packed lines become long.
    fn room(&self, bytes: usize) -> usize {
        (256 << 20) + 2000 * bytes
    }
}

struct Ids {
    folder: PathBuf,
}

/// Token ids, an index beside them, and how many there may be.
pub fn ids(folder: &Path) -> Box<dyn Target> {
    Box::new(Ids { folder: folder.to_owned() })
}

/// An index of Megatron's with documents of these lengths, ids of two bytes.
fn index(lengths: &[u32]) -> Vec<u8> {
    let mut index = b"MMIDIDX\0\0".to_vec();
    index.extend(1u64.to_le_bytes());
    index.push(8);
    index.extend((lengths.len() as u64).to_le_bytes());
    index.extend((lengths.len() as u64 + 1).to_le_bytes());
    index.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
    let mut at = 0u64;
    for length in lengths {
        index.extend(at.to_le_bytes());
        at += 2 * u64::from(*length);
    }
    index.extend((0..=lengths.len() as u64).flat_map(u64::to_le_bytes));
    index
}

impl Target for Ids {
    fn seeds(&self) -> Vec<Parts> {
        let ids: Vec<u8> = (0..60u16).flat_map(|i| (i % 40).to_le_bytes()).collect();
        let mut headed = [20_240_520u32, 1, 60].map(u32::to_le_bytes).concat();
        headed.resize(1024, 0);
        headed.extend(&ids);
        vec![
            vec![ids.clone(), Vec::new(), vec![0]],
            vec![headed, Vec::new(), vec![0]],
            vec![ids.clone(), index(&[20, 1, 0, 39]), vec![1]],
            vec![ids, index(&[60]), vec![1]],
        ]
    }

    fn words(&self) -> Vec<&'static str> {
        vec!["MMIDIDX\0\0", "\u{1}\0\0\0\0\0\0\0", "\u{4}", "\u{5}", "\u{8}", "\0\0\0\0\0\0\0\0"]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let (bin, idx) = (self.folder.join("a.bin"), self.folder.join("a.idx"));
        let _ = fs::remove_file(&idx);
        fs::write(&bin, &parts[0]).map_err(|error| error.to_string())?;
        if parts[2].first().is_some_and(|byte| byte % 2 == 1) {
            fs::write(&idx, &parts[1]).map_err(|error| error.to_string())?;
        }

        let config = DataConfig {
            path: Some(bin.clone()),
            vocabulary_size: Some(40),
            sequence: 4,
            held_out: HeldOut::Fraction(0.2),
            ..DataConfig::default()
        };
        let corpus = match Corpus::open(&config, 1, 4, None) {
            Ok(corpus) => corpus,
            Err(error) if error.to_string().contains("a.idx") => return Ok(()),
            Err(error) => return named(&error, Some(&bin)),
        };
        for tokens in [&corpus.sources[0].tokens, &corpus.held_out.tokens] {
            let (mut starts, mut read) = (Vec::new(), Vec::new());
            tokens.document_starts(0, tokens.len(), &mut starts);
            tokens.read(0, tokens.len(), &mut read);
            if starts.len() != tokens.len()
                || starts.iter().enumerate().any(|(i, s)| *s < 0 || *s > i as i64)
            {
                return Err(format!("documents begin at {starts:?}"));
            }
            drop(tokens.check(0, &read, 40));
            tokens.text_bytes();
        }
        corpus.fingerprint();
        Ok(())
    }
}
