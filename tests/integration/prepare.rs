//! `ouroboros data prepare` against a server on this machine: whole, broken off, altered; and what training makes of it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use crate::harness::{Finished, Folder, ouroboros, run, slices};

/// One file served over HTTP/1.1 with ranges. The first `broken` answers end after half of what they promise.
struct Server {
    address: String,
    /// The range of every request, as it came.
    ranges: Arc<Mutex<Vec<String>>>,
}

fn serve(name: &'static str, content: Vec<u8>, broken: usize, ranges_work: bool) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/pub", listener.local_addr().unwrap());
    let ranges = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ranges);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let count = seen.lock().unwrap().len();
            let range = answer(stream, name, &content, count < broken, ranges_work);
            seen.lock().unwrap().push(range);
        }
    });
    Server { address, ranges }
}

fn answer(
    mut stream: TcpStream,
    name: &str,
    content: &[u8],
    broken: bool,
    ranges_work: bool,
) -> String {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let request = lines.next().unwrap().unwrap();
    let headers: Vec<String> =
        lines.map_while(|line| line.ok().filter(|line| !line.is_empty())).collect();
    let range = headers
        .iter()
        .find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
    if request != format!("GET /pub/{name} HTTP/1.1") {
        let _ = stream
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return request;
    }
    let asked = range.as_deref().filter(|_| ranges_work);
    let start: usize = asked.map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
    if asked.is_some() && start >= content.len() {
        let _ = stream.write_all(
            b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
        return range.unwrap_or_default();
    }
    let rest = &content[start..];
    let status = if asked.is_some() { "206 Partial Content" } else { "200 OK" };
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", rest.len());
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(if broken { &rest[..rest.len() / 2] } else { rest });
    range.unwrap_or_default()
}

fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in files {
        writer.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Text that does not compress to nothing.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let letter = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        b" abcdefghijklmnopqrstuvwxyz"[(state >> 33) as usize % 27]
    };
    (0..len).map(letter).collect()
}

fn prepare(folder: &Folder, args: &[&str]) -> Finished {
    let dir = folder.text("data");
    run(ouroboros(&[&["data", "prepare"], args, &["--dir", &dir]].concat()), 60)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_broken_download_goes_on_where_it_ended() {
    let text = noise(100_000);
    let archive = zip(&[("enwik8", &text)]);
    let digest = sha256(&archive);
    let folder = Folder::new();
    let server = serve("enwik8.zip", archive.clone(), 1, true);
    let args = ["enwik8", "--mirror", &server.address, "--sha256", &digest];
    let finished = prepare(&folder, &args).expect_code(3);
    assert!(finished.stderr.contains("the connection broke"), "{finished}");
    assert_eq!(names(&folder.path("data")), ["enwik8.zip.part"]);
    let finished = prepare(&folder, &args).expect_code(0);
    assert!(
        finished
            .stdout
            .contains("train 90,000, valid 5,000, test 5,000 tokens of a vocabulary of 256"),
        "{finished}"
    );
    assert_eq!(*server.ranges.lock().unwrap(), ["".to_owned(), format!("{}-", archive.len() / 2)]);
    assert_eq!(names(&folder.path("data")), ["enwik8.tokens", "enwik8.zip"]);
    // The standard split: the first 90 %, then 5 % and 5 %.
    let bytes = std::fs::read(folder.path("data/enwik8.tokens")).unwrap();
    // Every split begins at a multiple of 64 bytes.
    for (start, range) in [(64, 0..90_000), (90_112, 90_000..95_000), (95_168, 95_000..100_000)] {
        assert!(bytes[start..start + range.len()] == text[range.clone()], "{range:?}");
    }
    // Nothing is done twice.
    let finished = prepare(&folder, &args).expect_code(0);
    assert!(finished.stdout.contains("prepared already"), "{finished}");
    assert_eq!(server.ranges.lock().unwrap().len(), 2);
    let finished = prepare(&folder, &["enwik8", "--held-out", "0.1"]).expect_code(2);
    assert!(finished.stderr.contains("the splits of enwik8 are fixed"), "{finished}");
    // Another corpus is not written over it.
    let other = prepare(&folder, &["enwik8", "--sha256", &"0".repeat(64)]).expect_code(3);
    assert!(other.stderr.contains("remove it, or give another --out"), "{other}");

    let prepared = folder.text("data/enwik8.tokens");
    let sets = [format!("data.path={prepared}"), "data.held_out=valid".to_owned()];
    let mut sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    sets.push("eval.tokens=2000");
    std::fs::write(
        folder.path("tiny.toml"),
        crate::harness::TINY.replace("synthetic = 4000\n", ""),
    )
    .unwrap();
    let finished =
        run(ouroboros(&slices(&folder.train("out", &sets, &["--grid", "2x1"]))), 60).expect_code(0);
    assert!(finished.stdout.contains("bits per byte"), "{finished}");
    let test = run(ouroboros(&["eval", &folder.text("out"), "--set", "data.held_out=test"]), 60)
        .expect_code(0);
    assert!(test.stdout.contains("scored          4,999 of 5,000 tokens"), "{test}");
    sets.push("data.tokenizer=characters");
    let finished = run(ouroboros(&slices(&folder.train("other", &sets, &[]))), 60).expect_code(3);
    assert!(
        finished.stderr.contains("prepared with tokenizer `bytes`, the config has `characters`"),
        "{finished}"
    );
}

/// A server without ranges sends everything again; a part that is whole already is only checked.
#[test]
fn every_server_ends_in_the_same_file() {
    let archive = zip(&[("text8", &noise(10_000))]);
    let digest = sha256(&archive);
    for (have, ranges_work) in
        [(archive.len() / 3, false), (archive.len(), true), (archive.len(), false)]
    {
        let folder = Folder::new();
        std::fs::create_dir(folder.path("data")).unwrap();
        std::fs::write(folder.path("data/text8.zip.part"), &archive[..have]).unwrap();
        let server = serve("text8.zip", archive.clone(), 0, ranges_work);
        prepare(&folder, &["text8", "--mirror", &server.address, "--sha256", &digest])
            .expect_code(0);
        assert_eq!(*server.ranges.lock().unwrap(), [format!("{have}-")]);
        assert_eq!(std::fs::read(folder.path("data/text8.zip")).unwrap(), archive);
        assert_eq!(names(&folder.path("data")), ["text8.tokens", "text8.zip"]);
    }
}

#[test]
fn an_altered_archive_is_refused_and_removed() {
    let mut archive = zip(&[("text8", &noise(10_000))]);
    let digest = sha256(&archive);
    let place = archive.len() / 2;
    archive[place] ^= 1;
    let folder = Folder::new();
    let server = serve("text8.zip", archive.clone(), 0, true);
    let finished = prepare(&folder, &["text8", "--mirror", &server.address, "--sha256", &digest])
        .expect_code(3);
    assert!(finished.stderr.contains("the file is altered, or only a part of it"), "{finished}");
    assert!(names(&folder.path("data")).is_empty());
    std::fs::write(folder.path("half.zip"), &archive[..place]).unwrap();
    // Without --sha256 the digest is that of the well-known archive.
    let finished =
        prepare(&folder, &["text8", "--archive", &folder.text("half.zip")]).expect_code(3);
    assert!(finished.stderr.contains("not a6640522afe85d19"), "{finished}");
    let missing = prepare(&folder, &["wikitext-103", "--mirror", &server.address]).expect_code(3);
    assert!(missing.stderr.contains("wikitext-103-v1.zip: the server answers 404"), "{missing}");
    assert!(names(&folder.path("data")).is_empty());
}

#[test]
fn the_other_corpora_are_cut_and_tokenised_as_usual() {
    let folder = Folder::new();
    let text8 = zip(&[("text8", &noise(20_000))]);
    std::fs::write(folder.path("text8.zip"), &text8).unwrap();
    let args = ["text8", "--archive", &folder.text("text8.zip"), "--sha256", &sha256(&text8)];
    let finished = prepare(&folder, &args).expect_code(0);
    assert!(
        finished
            .stdout
            .contains("train 18,000, valid 1,000, test 1,000 tokens of a vocabulary of 27"),
        "{finished}"
    );

    let part = |split: &str| format!("wikitext-103/wiki.{split}.tokens");
    let words = zip(&[
        (&part("train"), b" \n = Title = \n the cat sat on the mat .\n"),
        (&part("valid"), b" the <unk> cat\n"),
        (&part("test"), b" the end\n"),
    ]);
    std::fs::write(folder.path("w.zip"), &words).unwrap();
    let args = ["wikitext-103", "--archive", &folder.text("w.zip"), "--sha256", &sha256(&words)];
    let finished = prepare(&folder, &args).expect_code(3);
    assert!(finished.stderr.contains("data wikitext-103/wiki.valid.tokens (valid): the word `<unk>` is not in the vocabulary, which has no `<unk>`; give --min-count 2"), "{finished}");
    assert_eq!(names(&folder.path("data")), ["text8.tokens"]);
    let finished = prepare(&folder, &[&args[..], &["--min-count", "2"]].concat()).expect_code(0);
    assert!(
        finished.stdout.contains("train 13, valid 4, test 3 tokens of a vocabulary of 4"),
        "{finished}"
    );
    assert_eq!(names(&folder.path("data")), ["text8.tokens", "wikitext-103.tokens"]);
}

#[test]
fn a_text_of_ones_own_is_prepared_too() {
    let folder = Folder::new();
    std::fs::write(folder.path("own.txt"), "some words and more words\n".repeat(200)).unwrap();
    let text = folder.text("own.txt");
    let finished =
        prepare(&folder, &[&text, "--tokenizer", "words", "--held-out", "0.1"]).expect_code(0);
    assert!(
        finished.stdout.contains("train 960, valid 120, test 120 tokens of a vocabulary of 5"),
        "{finished}"
    );
    let table: [(&[&str], i32, &str); 5] = [
        (
            &[&text, "--mirror", "http://x"],
            2,
            "`--mirror`: found given; is for enwik8, text8, wikitext-103 only",
        ),
        (&[&text, "--held-out", "0.7"], 2, "`--held-out`: found 0.7"),
        (&[&text, "--min-count", "3"], 2, "`--min-count`: found 3; is for --tokenizer words only"),
        (&["enwik9"], 3, "enwik9: cannot be read"),
        (
            &[&text, "--tokenizer", "words", "--out", "/proc/x/y.tokens"],
            2,
            "`--out`: found /proc/x/y.tokens; its folder cannot be made",
        ),
    ];
    for (args, code, expected) in table {
        let finished = prepare(&folder, args).expect_code(code);
        assert!(finished.stderr.contains(expected), "{expected}{finished}");
        assert_eq!(names(&folder.path("data")), ["own.txt.tokens"]);
    }
    std::fs::write(folder.path("bad.txt"), b"good \xff\xfe bad\n".repeat(50)).unwrap();
    let finished =
        prepare(&folder, &[&folder.text("bad.txt"), "--tokenizer", "words"]).expect_code(3);
    assert!(finished.stderr.contains("bad.txt: no UTF-8 at byte 5"), "{finished}");
    assert_eq!(names(&folder.path("data")), ["own.txt.tokens"]);
}

/// The number of four bytes that stands so far behind the last mark of a member in the archive's directory.
fn in_directory(archive: &mut [u8], offset: usize, value: u32) {
    let mark = archive.windows(4).rposition(|bytes| bytes == b"PK\x01\x02").unwrap();
    archive[mark + offset..mark + offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// Sizes are told by the archive: what cannot be is refused before memory is taken for it.
#[test]
fn an_archive_is_unpacked_within_bounds() {
    let good = zip(&[("text8", &noise(20_000))]);
    let altered = |offset: usize, value: u32| {
        let mut archive = good.clone();
        in_directory(&mut archive, offset, value);
        archive
    };
    // Offsets of the sizes and of the mode, as in section 4.3.12 of the format's description.
    let (packed, size, mode) = (20, 24, 38);
    let folder = Folder::new();
    for (archive, problem) in [
        (altered(size, 4_000_000_000), "`text8` is no text: 4000000000 bytes packed into"),
        (altered(size, 100), "`text8`: File is larger than its declared uncompressed size"),
        (altered(size, 30_000), "`text8` is not the 30000 bytes that the archive says"),
        (altered(packed, 1), "`text8`"),
        (altered(mode, 0o120_777 << 16), "`text8` is no text"),
        (zip(&[("../text8", b"outside"), ("/tmp/text8", b"outside")]), "no `text8` in it"),
    ] {
        std::fs::write(folder.path("a.zip"), &archive).unwrap();
        let args = ["text8", "--archive", &folder.text("a.zip"), "--sha256", &sha256(&archive)];
        let finished = prepare(&folder, &args).expect_code(3);
        assert!(
            finished.stderr.contains(problem) && finished.stderr.contains("a.zip"),
            "{problem}: {finished}"
        );
        assert_eq!(names(&folder.path("data")), [""; 0], "{problem}");
    }
}
