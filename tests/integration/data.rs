//! Texts and tokens that people have, made by the tools that make them (`tests/reference/data.py`): tokens one by one,
//! preparations that are killed, mixtures, documents of their own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ouroboros::config::Config;
use ouroboros::data::prepared::Prepared;
use ouroboros::data::{Batches, Corpus, DataConfig, HeldOut, SourceConfig, Tokenizer, Tokens};
use ouroboros::prepare::{Request, prepare};
use ouroboros::setup::Setup;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{
    Finished, Folder, TINY, as_threads, by_oracle, mpirun, ouroboros, run, setup_of, slices,
    trained,
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const END: &str = "<|endoftext|>";

/// What the Python program prints; none where the set-up has no torch.
fn python(args: &[&str]) -> Option<String> {
    let found = Path::new(ROOT).join(".venv-hf/bin/python");
    if !found.exists() {
        let torch = Path::new(ROOT).join(".venv/bin/python").exists();
        assert!(!torch, "no .venv-hf: run scripts/hugging-face.sh");
        ouroboros::complain!("skipped: no torch in .venv, and so no tokenizers to compare with");
        return None;
    }

    let mut command = Command::new(found);
    command.arg(Path::new(ROOT).join("tests/reference/data.py")).args(args);
    command.env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "true");
    Some(run(command, 120).expect_code(0).stdout)
}

struct Reference {
    folder: TempDir,
    expected: Value,
}

impl Reference {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The tokens of every document.
    fn documents(&self, tokenizer: &str) -> Vec<Vec<i64>> {
        let documents = self.expected[tokenizer]["documents"].as_array().unwrap();
        documents.iter().map(numbers).collect()
    }
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|number| number.as_i64().unwrap()).collect()
}

/// The files of the Python program, made once.
fn reference() -> Option<&'static Reference> {
    static MADE: OnceLock<Option<Reference>> = OnceLock::new();
    let make = || {
        let folder = TempDir::new().unwrap();
        let text = Path::new(ROOT).join("tests/data/declaration.txt");
        python(&["make", folder.path().to_str().unwrap(), text.to_str().unwrap()])?;
        let expected = std::fs::read(folder.path().join("expected.json")).unwrap();
        let expected = serde_json::from_slice(&expected).unwrap();
        Some(Reference { folder, expected })
    };
    MADE.get_or_init(make).as_ref()
}

fn read(tokens: &Tokens) -> Vec<i64> {
    let mut out = Vec::new();
    tokens.read(0, tokens.len(), &mut out);
    out
}

/// The tokens of a text, cut at its documents.
fn cut_at_documents(tokens: &Tokens) -> Vec<Vec<i64>> {
    let (all, mut starts) = (read(tokens), Vec::new());
    tokens.document_starts(0, tokens.len(), &mut starts);
    let borders = (1..all.len()).filter(|at| starts[*at] != starts[*at - 1]).chain([all.len()]);
    let mut begin = 0;
    borders.map(|end| all[std::mem::replace(&mut begin, end)..end].to_vec()).collect()
}

/// A request for `what` with a tokenizer of the Python program.
fn request(reference: &Reference, tokenizer: &str, what: &str, out: PathBuf) -> Request {
    let end = reference.expected[tokenizer]["end"].as_str().unwrap();
    Request {
        tokenizer: Some(Tokenizer::File(reference.path(&format!("{tokenizer}.json")))),
        end_token: (tokenizer == "bert").then(|| end.to_owned()),
        held_out: Some(0.0),
        out: Some(out),
        ..Request::new(reference.path(what), PathBuf::from("data"))
    }
}

fn train_split(path: &Path) -> Tokens {
    Prepared::open(path).unwrap().split("train").unwrap()
}

/// Every kind of tokenizer, document by document; a long text as one.
#[test]
fn tokens_are_those_of_the_library() {
    let Some(reference) = reference() else { return };
    let folder = TempDir::new().unwrap();
    for tokenizer in ["gpt2", "llama3", "t5", "bert", "llama2"] {
        let out = folder.path().join(tokenizer);
        prepare(&request(reference, tokenizer, "a.jsonl", out.clone())).unwrap();
        let expected = reference.documents(tokenizer);
        let train = train_split(&out);
        // The end token in the middle of a text is no end of a document where there is a list.
        assert_eq!(cut_at_documents(&train), expected, "{tokenizer}");
        let prepared = Prepared::open(&out).unwrap();
        assert_eq!(prepared.header.splits[0].documents, expected.len() as u64);
        assert_eq!(
            prepared.header.vocabulary.count() as u64,
            reference.expected[tokenizer]["size"]
        );

        // Cut into pieces, each of which two of them would begin with a space.
        let out = folder.path().join(format!("{tokenizer}-long"));
        prepare(&request(reference, tokenizer, "long.txt", out.clone())).unwrap();
        let long = numbers(&reference.expected[tokenizer]["long"]);
        assert!(read(&train_split(&out)) == long, "{tokenizer}");

        // The same at the beginning of a run.
        let data = DataConfig {
            path: Some(reference.path("long.txt")),
            tokenizer: Some(Tokenizer::File(reference.path(&format!("{tokenizer}.json")))),
            end_token: Some(reference.expected[tokenizer]["end"].as_str().unwrap().to_owned()),
            held_out: HeldOut::File(reference.path("long.txt")),
            ..DataConfig::default()
        };
        let corpus = Corpus::open(&data, 1, 8, None).unwrap();
        assert!(read(&corpus.held_out.tokens) == long && read(&corpus.sources[0].tokens) == long);
    }
}

/// The same documents in every form.
#[test]
fn every_form_has_the_same_documents() {
    let Some(reference) = reference() else { return };
    let folder = TempDir::new().unwrap();
    let expected = reference.documents("gpt2");
    for name in [
        "a.jsonl.gz",
        "a.jsonl.zst",
        "snappy.parquet",
        "gzip.parquet",
        "lz4.parquet",
        "none.parquet",
        "shards",
        "shards/**/*.*",
    ] {
        let out = folder.path().join("out.tokens");
        prepare(&request(reference, "gpt2", name, out.clone())).unwrap();
        assert_eq!(cut_at_documents(&train_split(&out)), expected, "{name}");
        std::fs::remove_file(&out).unwrap();
    }

    // Two of three rows have a text.
    let out = folder.path().join("holes.tokens");
    let asked = request(reference, "gpt2", "holes.parquet", out.clone());
    let error = prepare(&asked).unwrap_err().to_string();
    assert!(error.contains("holes.parquet: row 1: its `text` has no text; mend it"), "{error}");
    prepare(&Request { skip_bad: true, ..asked }).unwrap();
    let there: Vec<Vec<i64>> = expected
        .iter()
        .enumerate()
        .filter(|(i, _)| i % 3 > 0)
        .map(|(_, ids)| ids.clone())
        .collect();
    assert_eq!(cut_at_documents(&train_split(&out)), there);
    let skipped = Prepared::open(&out).unwrap().header.source.skipped;
    assert_eq!(skipped as usize, expected.len() - there.len());
}

/// Token files of other programs, as they are.
#[test]
fn token_files_of_other_programs_are_read() {
    let Some(reference) = reference() else { return };
    let expected = reference.documents("gpt2");
    let flat: Vec<i64> = expected.concat();
    let open = |name: &str, size: Option<usize>, more: DataConfig| {
        let tokenizer = size.is_none().then(|| Tokenizer::File(reference.path("gpt2.json")));
        let path = Some(reference.path(name));
        let held_out = HeldOut::File(reference.path(name));
        Corpus::open(
            &DataConfig { path, tokenizer, vocabulary_size: size, held_out, ..more },
            1,
            8,
            None,
        )
    };
    let four = DataConfig { token_bytes: Some(4), ..DataConfig::default() };
    for (name, more) in [
        ("two.bin", DataConfig::default()),
        ("four.bin", four.clone()),
        ("headed.bin", DataConfig::default()),
        ("megatron-u16.bin", DataConfig::default()),
        ("megatron-u16.idx", DataConfig::default()),
        ("megatron-i32.bin", DataConfig::default()),
        ("megatron-i64.bin", DataConfig::default()),
    ] {
        let corpus = open(name, None, more.clone()).unwrap();
        let tokens = &corpus.sources[0].tokens;
        assert!(read(tokens) == flat && read(&corpus.held_out.tokens) == flat, "{name}");
        assert!(tokens.has_documents(), "{name}");
        if name.starts_with("megatron") {
            assert_eq!(cut_at_documents(tokens), expected, "{name}");
        }
        // As many bytes as the tokens stand for.
        let bytes = corpus.measure().bytes_per_token.unwrap();
        assert!((2.0..6.0).contains(&bytes), "{name}: {bytes}");
        let numbers = open(name, Some(600), more).unwrap();
        assert_eq!((read(&numbers.held_out.tokens), numbers.vocabulary.len()), (flat.clone(), 600));
        assert_eq!(numbers.vocabulary.decode(&[5, 17]), "5 17");
    }

    let message = |name: &str, size, more| open(name, size, more).unwrap_err().to_string();
    let plain = DataConfig::default;
    let found = message("two.bin", Some(300), plain());
    assert!(
        found.contains("two.bin: token ") && found.contains("and the vocabulary has 300"),
        "{found}"
    );
    let found = message("two.bin", Some(600), four);
    assert!(found.contains("two.bin: "), "{found}");
    let found = message("two.bin", Some(70_000), plain());
    assert!(found.contains("two.bin: "), "{found}");
    let head = std::fs::read(reference.path("headed.bin")).unwrap();
    let cut = TempDir::new().unwrap();
    let short = cut.path().join("short.bin");
    std::fs::write(&short, &head[..head.len() - 200]).unwrap();
    let config = DataConfig { path: Some(short.clone()), vocabulary_size: Some(60_000), ..plain() };
    let found = Corpus::open(&config, 1, 8, None).unwrap_err().to_string();
    assert!(found.contains("short.bin: ") && found.contains("its head says"), "{found}");
    let config = DataConfig { paths: Some(vec![short]), ..plain() };
    let found = Corpus::open(&config, 1, 8, None).unwrap_err().to_string();
    assert!(found.contains("short.bin: token ids where a text is read"), "{found}");
    let config =
        DataConfig { path: Some(reference.path("long.txt")), token_bytes: Some(4), ..plain() };
    let found = Corpus::open(&config, 1, 8, None).unwrap_err().to_string();
    assert!(
        found.contains("`data.token_bytes`: found 4; ") && found.contains("long.txt is no file"),
        "{found}"
    );
    let nothing = DataConfig { path: Some(reference.path("two.bin")), ..plain() };
    let found = Corpus::open(&nothing, 1, 8, None).unwrap_err();
    assert_eq!(found.exit_code(), 2);
    assert!(found.to_string().contains("`data.vocabulary_size`: found nothing"), "{found}");

    // What is said of ids is for them alone, also beside a prepared text of the same tokenizer.
    let mixed = TempDir::new().unwrap();
    let prepared = mixed.path().join("a.tokens");
    prepare(&request(reference, "gpt2", "a.jsonl", prepared.clone())).unwrap();
    let of = |path: &PathBuf| SourceConfig { path: path.clone(), weight: 1.0, epochs: None };
    let config = DataConfig {
        source: vec![of(&prepared), of(&reference.path("four.bin"))],
        tokenizer: Some(Tokenizer::File(reference.path("gpt2.json"))),
        token_bytes: Some(4),
        ..plain()
    };
    let corpus = Corpus::open(&config, 1, 8, None).unwrap();
    let lengths: Vec<usize> = corpus.sources.iter().map(|source| source.tokens.len()).collect();
    assert!(lengths.iter().all(|length| *length > flat.len() * 9 / 10), "{lengths:?}");
    let config = DataConfig { path: Some(prepared), source: Vec::new(), ..config };
    let found = Corpus::open(&config, 1, 8, None).unwrap_err().to_string();
    assert!(found.contains("`data.token_bytes`: found 4; "), "{found}");

    // An index of other ids, and one that is damaged.
    let folder = TempDir::new().unwrap();
    let good = std::fs::read(reference.path("megatron-u16.idx")).unwrap();
    let bin = std::fs::read(reference.path("megatron-u16.bin")).unwrap();
    let path = folder.path().join("a.bin");
    let refused = |index: &[u8], bin: &[u8]| {
        std::fs::write(folder.path().join("a.idx"), index).unwrap();
        std::fs::write(&path, bin).unwrap();
        let config = DataConfig {
            path: Some(path.clone()),
            vocabulary_size: Some(600),
            ..DataConfig::default()
        };
        let error = Corpus::open(&config, 1, 8, None).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        error.to_string()
    };
    let altered = |place: usize, byte: u8| {
        let mut index = good.clone();
        index[place] = byte;
        refused(&index, &bin)
    };
    assert!(refused(&good, &bin[2..]).contains("a.idx: it does not fit its .bin"));
    assert!(refused(&good[..200], &bin).contains("a.idx: cut short"));
    assert!(altered(0, b'X').contains("a.idx: no index of Megatron's"));
    assert!(altered(9, 2).contains("a.idx: version 2 is not known"));
    assert!(altered(17, 6).contains("a.idx: its type 6 is none of ids"));
    assert!(altered(24, 1).contains("a.idx: cut short"));
    let pointers = 34 + 4 * expected.len();
    assert!(altered(pointers + 8 * 7 + 5, 9).contains("a.idx: sequence "));
    assert!(altered(pointers + 8 * expected.len() + 8 * 7 + 6, 9).contains("a.idx: document "));
    assert!(
        altered(pointers - 8 + 8 * expected.len() + 7, 255)
            .contains("a.idx: it does not fit its .bin")
    );
    assert!(altered(17, 4).contains("a.idx: it does not fit its .bin"));
}

/// A tokenizer that is learned here is the library's when it learns from the same texts.
#[test]
fn a_tokenizer_is_learned() {
    let Some(reference) = reference() else { return };
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let out = path("tokenizer.json");
    let train = |size: &str, what: &str, out: &str| {
        let args = ["data", "tokenizer", "train", what, "--size", size, "--out", out];
        run(ouroboros(&args), 60)
    };
    let learned = train("600", &reference.text("a.jsonl.zst"), &out).expect_code(0);
    assert!(learned.stdout.contains("tokenizer.json: 600 tokens"), "{learned}");
    let again = train("600", &reference.text("a.jsonl"), &out).expect_code(2);
    assert!(again.stderr.contains("it is there already"), "{again}");
    let small = train("256", &reference.text("a.jsonl"), &path("b.json")).expect_code(2);
    assert!(
        small.stderr.contains("`--size`: found 256; 256 bytes and 1 special tokens"),
        "{small}"
    );

    // The library encodes with it what is encoded here; and what it has learned itself is the same.
    let expected = python(&["encode", &out, &reference.text("a.jsonl"), END]).unwrap();
    let expected: Vec<Vec<i64>> = serde_json::from_str::<Value>(&expected)
        .unwrap()
        .as_array()
        .unwrap()
        .iter()
        .map(numbers)
        .collect();
    let tokens = PathBuf::from(path("tokens"));
    let tokenizer = Some(Tokenizer::File(PathBuf::from(&out)));
    prepare(&Request { tokenizer, ..request(reference, "gpt2", "a.jsonl", tokens.clone()) })
        .unwrap();
    assert_eq!(cut_at_documents(&train_split(&tokens)), expected);
    assert_eq!(expected, reference.documents("gpt2"));
}

/// Killed ten times and gone on with, a preparation ends as one that nobody has disturbed.
#[test]
fn a_killed_preparation_goes_on() {
    let Some(reference) = reference() else { return };
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    // Lines that are all different, in three files, one of them packed.
    let lines = std::fs::read_to_string(reference.path("a.jsonl")).unwrap();
    let mut all = String::new();
    for i in 0..60 {
        all += &lines.replace("\"text\": \"", &format!("\"text\": \"{i} "));
    }
    let third = all.len() / 3;
    let cut = |at: usize| at + all[at..].find('\n').unwrap() + 1;
    let (one, two) = (cut(third), cut(2 * third));
    std::fs::write(path("a.jsonl"), &all[..one]).unwrap();
    let packed = zstd::encode_all(&all.as_bytes()[one..two], 1).unwrap();
    std::fs::write(path("b.jsonl.zst"), packed).unwrap();
    std::fs::write(path("c.jsonl"), &all[two..]).unwrap();

    let tokenizer = reference.text("llama3.json");
    let (what, out) = (path("*.jsonl*"), path("killed.tokens"));
    let args = ["data", "prepare", &what, "--tokenizer", &tokenizer, "--threads", "1", "--out"];
    let finished =
        run(ouroboros(&[&args[..], &[&path("whole.tokens")]].concat()), 120).expect_code(0);
    let time = finished.time;

    let mut gone_on = 0;
    for kill in 0..10 {
        let mut child = ouroboros(&[&args[..], &[&out]].concat())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // At least one journal, at most the last of them.
        std::thread::sleep(
            Duration::from_millis(900).min(time / 3) + Duration::from_millis(37 * kill),
        );
        let journal = folder.path().join("killed.tokens.partial/journal.json");
        let begun = std::time::Instant::now();
        while child.try_wait().unwrap().is_none()
            && !journal.exists()
            && begun.elapsed() < Duration::from_secs(30)
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill(); // It may have come to its end by itself.
        let ended = child.wait().unwrap().success();
        assert!(ended || !Path::new(&out).exists(), "half a file under its own name");
        gone_on += usize::from(journal.exists());
        if ended {
            std::fs::remove_file(&out).unwrap();
        }
    }
    assert!(gone_on >= 5, "{gone_on} of ten kills came in the middle");
    run(ouroboros(&[&args[..], &[&out]].concat()), 120).expect_code(0);
    let bytes = |name: &str| std::fs::read(path(name)).unwrap();
    assert!(bytes("killed.tokens") == bytes("whole.tokens"));
    assert!(!Path::new(&path("killed.tokens.partial")).exists());
    let check = run(ouroboros(&["data", "check", &out]), 60).expect_code(0);
    assert!(check.stdout.contains("tokenizer       llama3.json"), "{check}");
}

/// What is no text is told by file and place, and leaves nothing behind.
#[test]
fn bad_records_are_named() {
    let Some(reference) = reference() else { return };
    let folder = Folder::new();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path(name), bytes).unwrap();
    let good = "{\"text\": \"good\"}\n".repeat(5);
    write("line.jsonl", format!("{good}{{\"text\": \"cut {}\n", "x".repeat(200)).as_bytes());
    write("field.jsonl", format!("{good}{{\"txet\": \"a\"}}\n").as_bytes());
    write("number.jsonl", format!("{good}\n{{\"text\": 5}}\n").as_bytes());
    write("array.json", b"[\n{\"text\": \"a\"}]\n");
    write("none.parquet", b"PAR1 and nothing else");
    write("empty.jsonl", b"\n\n");
    let zst = std::fs::read(reference.path("a.jsonl.zst")).unwrap();
    let gz = std::fs::read(reference.path("a.jsonl.gz")).unwrap();
    write("cut.jsonl.zst", &zst[..zst.len() / 2]);
    write("cut.jsonl.gz", &gz[..gz.len() / 2]);
    write("bytes.txt", &b"good \xff bad\n".repeat(20));
    write("bare.json", br#"{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}"#);
    let (gpt2, bomb) = (reference.text("gpt2.json"), reference.text("bomb.jsonl.zst"));
    let lists = reference.text("lists.parquet");
    let snappy = reference.text("snappy.parquet");
    let table: [(&[&str], i32, &str); 17] = [
        (&["line.jsonl"], 3, "line.jsonl: line 6: no JSON (EOF while parsing a string"),
        (&["field.jsonl"], 3, "field.jsonl: line 6: no field `text`: {\"txet\": \"a\"}"),
        (&["number.jsonl"], 3, "number.jsonl: line 7: no object of JSON with a text `text`"),
        (&["array.json"], 3, "array.json: line 1: no object of JSON with a text `text`"),
        (&["none.parquet"], 3, "none.parquet: not Parquet as it can be read here"),
        (&[&lists], 3, "lists.parquet: no column `text`; it has `words.list.element`, `number`"),
        (
            &[&lists, "--field", "number"],
            3,
            "lists.parquet: its column `number` is no text, but INT64",
        ),
        (&[&snappy, "--field", "number"], 3, "snappy.parquet: its column `number` is no text"),
        (&["cut.jsonl.zst"], 3, "cut.jsonl.zst: it ends or breaks off after line "),
        (&["cut.jsonl.gz"], 3, "cut.jsonl.gz: it ends or breaks off after line "),
        (&[&bomb], 3, "bomb.jsonl.zst: it ends or breaks off after line "),
        (&["empty.jsonl"], 3, "empty.jsonl: nothing is left for train"),
        (&["bytes.txt", "--tokenizer", &gpt2], 3, "bytes.txt: no UTF-8 at byte 5"),
        (&["field.jsonl", "--tokenizer", "field.json"], 3, "field.json: cannot be read"),
        (&["field.jsonl", "--tokenizer", "array.json"], 3, "array.json: no tokenizer"),
        (
            &["line.jsonl", "--tokenizer", "bare.json"],
            3,
            "bare.json: it has no usual token that ends a document",
        ),
        (
            &["line.jsonl", "--tokenizer", &gpt2, "--end-token", "<end>"],
            3,
            "gpt2.json: it has no token `<end>`",
        ),
    ];
    let prepare = |args: &[&str]| -> Finished {
        let mut command =
            ouroboros(&[&["data", "prepare"], args, &["--out", "out.tokens"]].concat());
        command.current_dir(folder.path(""));
        run(command, 60)
    };
    for (args, code, expected) in table {
        let finished = prepare(args).expect_code(code);
        assert!(
            finished.errors().len() == 1 && finished.stderr.contains(expected),
            "{args:?}{finished}"
        );
        let left = std::fs::read_dir(folder.path("")).unwrap().flatten();
        let left = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("out."));
        assert_eq!(left.count(), 0, "{args:?}");
    }
    // Of a long line its beginning.
    let shown = prepare(&["line.jsonl"]).stderr;
    assert!(shown.contains(&"x".repeat(60)) && !shown.contains(&"x".repeat(80)), "{shown}");
    let skipped =
        prepare(&["line.jsonl", "field.jsonl", "--skip-bad", "--held-out", "0"]).expect_code(0);
    assert!(
        skipped.stdout.contains("10 documents") && skipped.stdout.contains("note: 2 records"),
        "{skipped}"
    );
}

/// Documents are held out by their text, whatever else is prepared with them.
#[test]
fn documents_are_held_out_by_what_they_are() {
    let Some(reference) = reference() else { return };
    let folder = TempDir::new().unwrap();
    let of = |what: &str, seed: u64| {
        let out = folder.path().join(format!("{}-{seed}", what.replace('/', "-")));
        let held_out = Some(0.2);
        prepare(&Request { held_out, seed, ..request(reference, "gpt2", what, out.clone()) })
            .unwrap();
        let prepared = Prepared::open(&out).unwrap();
        ["train", "valid", "test"].map(|split| cut_at_documents(&prepared.split(split).unwrap()))
    };
    let [train, valid, test] = of("a.jsonl", 1);
    assert!(valid.len() > 30 && test.len() > 30 && train.len() > 150);
    // Of a part of them the same ones.
    let [_, some, _] = of("shards/a.parquet", 1);
    assert!(some.len() > 10 && some.iter().all(|document| valid.contains(document)));
    assert_ne!(of("a.jsonl", 2)[1], valid);

    // Files of their own.
    let out = folder.path().join("files");
    let asked = Request {
        held_out: None,
        valid: vec![reference.path("shards/deeper")],
        ..request(reference, "gpt2", "shards/a.parquet", out.clone())
    };
    prepare(&asked).unwrap();
    let prepared = Prepared::open(&out).unwrap();
    let parts: Vec<Vec<i64>> = ["train", "valid"]
        .into_iter()
        .flat_map(|split| cut_at_documents(&prepared.split(split).unwrap()))
        .collect();
    assert_eq!(parts, reference.documents("gpt2"));
}

/// Two prepared texts for mixtures: paths.
fn two_sources(reference: &Reference, folder: &Path) -> [PathBuf; 2] {
    ["a.jsonl", "shards/a.parquet"].map(|what| {
        let out = folder.join(what.replace('/', "-") + ".tokens");
        let asked = request(reference, "gpt2", what, out.clone());
        prepare(&Request { held_out: Some(0.1), ..asked }).unwrap();
        out
    })
}

/// Shares of a mixture, its epochs, and the same rows on every grid.
#[test]
fn mixtures_keep_their_shares() {
    let Some(reference) = reference() else { return };
    let folder = TempDir::new().unwrap();
    let [one, two] = two_sources(reference, folder.path());
    let source =
        |path: &PathBuf, weight, epochs| SourceConfig { path: path.clone(), weight, epochs };
    let config = Config {
        steps: 1000,
        batch: 12,
        data: DataConfig {
            source: vec![source(&one, 0.9, None), source(&two, 2.1, Some(3))],
            held_out: HeldOut::File("valid".into()),
            sequence: 16,
            ..DataConfig::default()
        },
        ..Config::default()
    };
    let corpus = Arc::new(Corpus::open(&config.data, 1, 16, None).unwrap());
    let batches = Batches::new(Arc::clone(&corpus), config.reading());
    let ends = 3 * ((corpus.sources[1].tokens.len() - 1) / 16 - 1);
    let rows = |steps: std::ops::Range<usize>| -> Vec<(usize, usize)> {
        steps.flat_map(|step| batches.starts(step, 0..12)).collect()
    };
    let all = rows(0..1000);
    let count = |rows: &[(usize, usize)]| rows.iter().filter(|(source, _)| *source == 1).count();
    // Within the bounds of draws, and by far: no more than a row away.
    for n in [10, 100, 1000] {
        let (mean, spread) = (0.7 * n as f64, (0.7 * 0.3 * n as f64).sqrt());
        let found = count(&all[..n]) as f64;
        assert!(
            (found - mean).abs() <= 1.0 && (found - mean).abs() < 3.0 * spread,
            "{found} of {n}"
        );
    }
    // Three epochs, then nothing more of it; every window as often.
    assert_eq!(count(&all), ends);
    let mut places: Vec<usize> = all.iter().filter(|row| row.0 == 1).map(|row| row.1).collect();
    for epoch in places.chunks_mut(ends / 3) {
        epoch.sort_unstable();
        assert!(epoch.windows(2).all(|pair| pair[1] - pair[0] >= 16), "a window twice");
    }
    // Any row alone is the same.
    assert_eq!(rows(700..701)[5], batches.starts(700, 5..6)[0]);
    assert_eq!(corpus.held_out.tokens.len(), corpus_held_out(&[&one, &two]));

    let message = |sources: Vec<SourceConfig>, more: &[&str]| {
        let sets: Vec<String> = more.iter().map(|set| (*set).to_owned()).collect();
        let mut config = Config::parse(&config.to_toml(), &sets).unwrap();
        config.data.source = sources;
        Setup::new(config).map(|_| ()).unwrap_err().to_string()
    };
    let found = message(vec![source(&one, 0.0, None)], &[]);
    assert!(
        found.contains("`data.source[0].weight`: found 0; a number above 0, at most 1e9"),
        "{found}"
    );
    let found = message(vec![source(&one, f64::NAN, None)], &[]);
    assert!(found.contains("`data.source[0].weight`: found NaN"), "{found}");
    let found = message(vec![source(&one, 1e-9, None), source(&two, 1.0, None)], &[]);
    assert!(
        found.contains("`data.source[0].weight`: found 0.000000001; a share of a millionth"),
        "{found}"
    );
    let found = message(vec![source(&one, 1.0, Some(1)), source(&two, 1.0, Some(1))], &[]);
    assert!(
        found.contains("`steps`: found 1000; in so many epochs the sources have rows for"),
        "{found}"
    );
    let found = message(vec![source(&one, 1.0, None)], &["data.sequence=20000"]);
    assert!(
        found.contains("a.jsonl.tokens: ") && found.contains("one window needs 20001"),
        "{found}"
    );
    let found = message(
        vec![source(&one, 1.0, None)],
        &["model.arch=transformer-xl", "model.mem_len=8", "model.tie=none"],
    );
    assert!(found.contains("`data.source`: found 1 sources with streams"), "{found}");
    // Texts of another tokenizer do not mix.
    let other = folder.path().join("other.tokens");
    prepare(&request(reference, "llama3", "a.jsonl", other.clone())).unwrap();
    let found = message(vec![source(&one, 1.0, None), source(&other, 1.0, None)], &[]);
    assert!(found.contains("other.tokens: its vocabulary is not that of"), "{found}");
}

fn corpus_held_out(paths: &[&PathBuf]) -> usize {
    let valid = |path: &&PathBuf| Prepared::open(path).unwrap().split("valid").unwrap().len();
    paths.iter().map(valid).sum()
}

/// Mixtures and documents of their own: grids and architectures against the oracle, bit for bit, and gone on with by
/// another grid.
#[test]
fn mixtures_and_documents_equal_the_oracle_bit_for_bit() {
    let Some(reference) = reference() else { return };
    let folder = TempDir::new().unwrap();
    let [one, two] = two_sources(reference, folder.path());
    let text = format!(
        "{}\n[[data.source]]\npath = {one:?}\nweight = 2\n[[data.source]]\npath = {two:?}\nweight = 1\nepochs = 1\n[eval]\nevery = 3\ntokens = 200\n",
        TINY.replace("synthetic = 4000", "held_out = \"valid\"\ndocument_mask = true")
    );
    let gpt2 = ["model.arch=gpt2", "model.dropout=0.1"];
    let llama = ["model.arch=llama", "model.kv_heads=1"];
    let long = ["data.sequence=128", "batch=4", "grid.replicas=2", "model.arch=llama"];
    for more in [
        &["grid.stages=3"][..],
        &["grid.replicas=3", "microbatches=2", "recompute=true"],
        &[&gpt2[..], &["grid.stages=2", "grid.replicas=2", "recompute=blocks"]].concat(),
        &[&llama[..], &["grid.stages=4", "microbatches=3", "optimizer.kind=soap"]].concat(),
        &[&long[..], &["grid.stages=2"]].concat(),
        &[&long[..], &["recompute=blocks", "model.tie=none"]].concat(),
    ] {
        let setup = setup_of(&text, more);
        let (grid, oracle) = (as_threads(&setup), by_oracle(&setup));
        assert_eq!(grid.lines, oracle.lines, "{more:?}");
        assert!(grid.weights == oracle.weights, "{more:?}");
        // Without the mask the numbers are others.
        let without = setup_of(&text, &[more, &["data.document_mask=false"]].concat());
        assert_ne!(by_oracle(&without).losses(), oracle.losses(), "{more:?}");
    }

    // Saved after three steps, and gone on with by another grid: the same rows.
    let out = TempDir::new().unwrap();
    let whole = ["grid.stages=2", "sync_at=[3]", "checkpoint.every=3"];
    trained(Arc::into_inner(setup_of(&text, &whole)).unwrap(), out.path(), false);
    let saved = out.path().join("checkpoints/step-3");
    let saved = ouroboros::checkpoint::Checkpoint::open(&saved).unwrap();
    let other = [&whole[..], &["grid.stages=1", "grid.replicas=3"]].concat();
    let resumed = Arc::into_inner(setup_of(&text, &other)).unwrap().resume(saved).unwrap();
    let rest = as_threads(&Arc::new(resumed)).losses();
    let expected = by_oracle(&setup_of(&text, &other)).losses();
    let first = by_oracle(&setup_of(&text, &whole)).losses();
    assert_eq!(rest.len(), 3);
    assert!((rest[0] - first[3]).abs() < 1e-5, "{rest:?} {first:?}");
    assert_ne!(rest, expected[..3]);
}

/// Lines of bytes or characters as documents: a grid equals the oracle, a text goes on as if nothing stood before its last
/// line, and an end that is none is refused.
#[test]
fn lines_are_documents_where_their_end_is_named() {
    let lines =
        ["data.document_mask=true", "data.end_token=\"\\n\"", "data.sequence=64", "batch=8"];
    for more in [&["grid.stages=2", "grid.replicas=2"][..], &["data.tokenizer=characters"]] {
        let sets = [&lines[..], more].concat();
        let setup = setup_of(TINY, &sets);
        let oracle = by_oracle(&setup);
        assert_eq!(as_threads(&setup).lines, oracle.lines, "{more:?}");
        let whole = setup_of(TINY, &[&sets[..], &["data.document_mask=false"]].concat());
        assert_ne!(by_oracle(&whole).losses(), oracle.losses(), "{more:?}");
    }

    let folder = Folder::new();
    let program = |args: &[&str]| run(ouroboros(args), 120);
    for (out, more) in [("learned", &[][..]), ("rotary", &["model.arch=llama"])] {
        let sets =
            [&lines[..], &["steps=150", "model.layers=2", "optimizer.lr=2e-2"], more].concat();
        program(&slices(&folder.train(out, &sets, &[]))).expect_code(0);
        // Longer than the 64 positions that are learned.
        let on = |prompt: &str| {
            let args = ["--prompt", prompt, "--tokens", "90", "--temperature", "0.5"];
            let text = program(&[&["generate", &folder.text(out)][..], &args].concat());
            text.expect_code(0).stdout[prompt.len()..].to_owned()
        };
        let alone = on("ban: ker");
        assert_eq!(on("ban: pan, ban.\nban: ker"), alone);
        assert_ne!(on("ban: ker, ban: ker"), alone);
        let long = format!("ban: {}", "ker ".repeat(20));
        assert_eq!(on(&format!("ban: pan.\n{long}")), on(&long));
        // What an end token is followed by depends on the document that it ends.
        assert_eq!(on("x\nban: ker.\n"), on("ban: ker.\n"));
        // Several at once.
        let args = ["--prompt", "ban: ker", "--prompt", "x\nban: ker", "--tokens", "9"];
        let both =
            program(&[&["generate", &folder.text(out), "--temperature", "0"][..], &args].concat());
        let both = both.expect_code(0).stdout;
        let parts: Vec<&str> = both.split("ban: ker").collect();
        assert_eq!(parts[1].lines().next(), parts[2].lines().next(), "{both}");
    }

    std::fs::write(folder.path("text.txt"), "one line\nanother\n".repeat(400)).unwrap();
    let path = format!("data.path={}", folder.text("text.txt"));
    let path = ["data.synthetic=none", &path];
    for (tokenizer, end, more, remedy) in [
        ("bytes", "ab", &[][..], "one ASCII character"),
        ("bytes", "é", &[], "one ASCII character"),
        ("", "ab", &path, "one ASCII character"),
        ("characters", "ab", &[], "name one character"),
        ("characters", "|", &path, "no such character"),
        ("words", "a", &[], "leave it out"),
    ] {
        let named = if tokenizer.is_empty() { "data.min_count=1" } else { "data.tokenizer=" };
        let sets = [format!("{named}{tokenizer}"), format!("data.end_token={end}")];
        let sets = [&[&sets[0][..], &sets[1]][..], more].concat();
        let refused = program(&slices(&folder.train("refused", &sets, &[]))).expect_code(2);
        let named = format!("setting `data.end_token`: found \"{end}\"");
        assert!(refused.stderr.contains(&named) && refused.stderr.contains(remedy), "{refused}");
    }

    // A text whose documents nobody knows is not scored as if somebody did; another end is told.
    let learned = folder.text("learned");
    let refused = program(&["eval", &learned, "--set", "data.end_token="]).expect_code(2);
    assert!(refused.stderr.contains("data.document_mask"), "{refused}");
    let sets =
        [&lines[..1], &["data.end_token=.", "data.sequence=64", "batch=8", "steps=160"]].concat();
    let sets = [&sets[..], &["model.layers=2", "optimizer.lr=2e-2"]].concat();
    let resumed = program(&slices(&folder.train("learned", &sets, &["--resume"]))).expect_code(0);
    assert!(resumed.stdout.contains("data.end_token is another than before"), "{resumed}");
}

/// A model with its tokenizer: in, generated with, trained under mpirun on documents, evaluated, out again; what the
/// libraries make of it is the same.
#[test]
fn a_model_goes_through_with_its_tokenizer() {
    let Some(reference) = reference() else { return };
    let folder = Folder::new();
    let (run_in, model) = (folder.text("in"), reference.text("model"));
    let ok = |args: &[&str]| run(ouroboros(args), 120).expect_code(0);
    let theirs = |model: &str, prompt: &str| -> Value {
        let text = python(&["model", model, &reference.text("a.jsonl"), prompt, "24"]).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let number = |finished: &Finished, what: &str| -> f64 {
        let line = finished.stdout.lines().find(|line| line.starts_with(what));
        let line = line.unwrap_or_else(|| panic!("no {what}{finished}"));
        line[what.len()..].split_whitespace().next().unwrap().parse().unwrap()
    };

    ok(&["import", &model, "--out", &run_in]);
    let prompt = "We hold these truths";
    let expected = theirs(&model, prompt);
    let generate = |run: &str| {
        ok(&["generate", run, "--prompt", prompt, "--tokens", "24", "--temperature", "0"]).stdout
    };
    assert_eq!(generate(&run_in).trim_end(), expected["text"].as_str().unwrap().trim_end());

    // All documents of the file are held out and evaluated.
    let tokens = folder.path("a.tokens");
    let tokenizer = folder.path("in/hugging-face/tokenizer.json");
    let asked = Request {
        tokenizer: Some(Tokenizer::File(tokenizer)),
        ..request(reference, "gpt2", "a.jsonl", tokens.clone())
    };
    prepare(&asked).unwrap();
    let held_out = format!("data.held_out={}", tokens.display());
    let evaluated = |run: &str| {
        let sets =
            ["--set", &held_out, "--set", "data.sequence=32", "--set", "data.document_mask=false"];
        ok(&[&["eval", run][..], &sets].concat())
    };
    let close = |finished: &Finished, expected: &Value| {
        let (loss, bytes) =
            (expected["loss"].as_f64().unwrap(), expected["bytes_per_token"].as_f64().unwrap());
        let bits = loss / std::f64::consts::LN_2 / bytes;
        let found = (number(finished, "loss"), number(finished, "bits per byte"));
        assert!(
            (found.0 - loss).abs() < 1e-5 && (found.1 - bits).abs() < 1e-5,
            "{found:?} {loss} {bits}"
        );
    };
    close(&evaluated(&run_in), &expected);

    let path = format!("data.path={}", tokens.display());
    let config = folder.text("in/config.toml");
    let (init, out) = (folder.text("in/checkpoints/step-0"), folder.text("out"));
    let mut args = vec!["train", &config, "--init", &init, "--out", &out, "--grid", "2x2"];
    let sets = [
        &path[..],
        "data.held_out=0.1",
        "data.sequence=32",
        "data.document_mask=true",
        "steps=6",
        "batch=8",
        "microbatches=2",
        "optimizer.warmup=1",
        "eval.every=6",
    ];
    sets.iter().for_each(|set| args.extend(["--set", set]));
    let trained = run(mpirun(4, &args), 120).expect_code(0);
    assert!(trained.stdout.contains("bits per byte"), "{trained}");
    let exported = folder.text("exported");
    ok(&["export", &out, "--to", &exported]);
    let expected = theirs(&exported, prompt);
    assert_eq!(generate(&out).trim_end(), expected["text"].as_str().unwrap().trim_end());
    close(&evaluated(&out), &expected);

    // Another tokenizer is another model.
    let other = format!("data.tokenizer={}", reference.text("llama3.json"));
    let refused = [&args[..], &["--set", &other, "--resume"]].concat();
    let refused = run(ouroboros(&refused), 60).expect_code(3);
    assert!(refused.stderr.contains("a.tokens: prepared with another tokenizer: "), "{refused}");
    let text = format!("data.path={}", reference.text("long.txt"));
    let smaller = format!("data.tokenizer={}", reference.text("t5.json"));
    let refused = [&args[..], &["--set", &smaller, "--set", &text, "--resume"]].concat();
    let refused = run(ouroboros(&refused), 60).expect_code(3);
    assert!(refused.stderr.contains("the tokenizer t5.json (digest "), "{refused}");
}
