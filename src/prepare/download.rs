//! Downloads that can be interrupted: into `NAME.part`, gone on with where they ended, checked by
//! SHA-256, then renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files;

/// A server that says nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);

const REMEDY: &str = "run the command again to go on, or give --mirror or --archive";

/// A bar for bytes, on a terminal.
pub fn bytes_bar(total: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let style = ProgressStyle::with_template("{msg:20} {bar:30} {bytes}/{total_bytes}  {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar
}

/// The SHA-256 of a file, in hexadecimal digits.
///
/// # Errors
/// [`Error::Data`] if it cannot be read.
pub fn digest(path: &Path) -> Result<String> {
    let wrong = |error: io::Error| {
        Error::data(path.display(), format!("cannot be read ({error})"), "check the file")
    };

    let mut file = files::open(path).map_err(wrong)?;
    let bar = bytes_bar(file.metadata().map_err(wrong)?.len(), "checking");
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let count = file.read(&mut buffer).map_err(wrong)?;
        if count == 0 {
            bar.finish_and_clear();
            return Ok(hex(&hash.finalize()));
        }

        hash.update(&buffer[..count]);
        bar.inc(count as u64);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks a file against the digest that it should have.
///
/// # Errors
/// [`Error::Data`] with both.
pub fn check(path: &Path, expected: &str) -> Result<()> {
    let found = digest(path)?;
    if found == expected {
        return Ok(());
    }

    let problem =
        format!("SHA-256 is {found}, not {expected}: the file is altered, or only a part of it");
    Err(Error::data(
        path.display(),
        problem,
        "fetch it again, or give --sha256 if it is meant to be another",
    ))
}

/// Brings `path` from the first of `addresses` that has it.
///
/// # Errors
/// [`Error::Data`] if none has it, the connection breaks (what has come is kept and gone on with),
/// or the file is not the expected one (it is removed).
pub fn download(addresses: &[String], path: &Path, sha256: &str) -> Result<()> {
    let part = with_suffix(path, ".part");
    let _lock = alone(path, &part)?;

    let mut problems = Vec::new();
    for address in addresses {
        match fetch(address, &part) {
            Ok(()) => {
                if let Err(error) = check(&part, sha256) {
                    let _ = fs::remove_file(&part);
                    problems.push(format!("{address}: {error}"));
                    continue;
                }

                let renamed = fs::rename(&part, path);
                return renamed.map_err(|error| {
                    Error::data(path.display(), error, "make the folder writable")
                });
            }
            Err(problem) => problems.push(format!("{address}: {problem}")),
        }
    }

    if fs::metadata(&part).is_ok_and(|data| data.len() == 0) {
        let _ = fs::remove_file(&part);
    }

    Err(Error::data(
        path.display(),
        format!("cannot be downloaded ({})", problems.join("; ")),
        REMEDY,
    ))
}

/// Takes the file that is downloaded into, which two processes would mix up.
fn alone(path: &Path, part: &Path) -> Result<File> {
    let wrong = |error: io::Error| Error::data(path.display(), error, "make the folder writable");
    let file = OpenOptions::new().create(true).append(true).open(part).map_err(wrong)?;
    hold(&file, path, "another process is downloading it")?;
    Ok(file)
}

/// Locks a file, or tells that another process works on what it stands for.
///
/// # Errors
/// [`Error::Data`] about `path`.
pub fn hold(file: &File, path: &Path, taken: &str) -> Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            Err(Error::data(path.display(), taken, "wait for its end, and run again"))
        }
        // A file system without locks.
        _ => Ok(()),
    }
}

/// `NAME` as `NAME.suffix`, whatever its characters.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Adds to `part` what it lacks of the file at `address`.
fn fetch(address: &str, part: &Path) -> std::result::Result<(), String> {
    let have = fs::metadata(part).map_or(0, |data| data.len());
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(SILENCE))
        .timeout_recv_response(Some(SILENCE))
        .timeout_per_read(Some(SILENCE))
        .http_status_as_error(false)
        .build()
        .into();
    let mut request = agent.get(address);
    if have > 0 {
        request = request.header("Range", format!("bytes={have}-"));
    }

    let mut response = request.call().map_err(|error| error.to_string())?;
    let goes_on = match response.status().as_u16() {
        200 => false,
        206 => true,
        // Nothing is left to bring; the digest will tell whether it is right.
        416 if have > 0 => return Ok(()),
        status => return Err(format!("the server answers {status}")),
    };

    let start = if goes_on { have } else { 0 };
    let left = response.body().content_length();
    let mut file =
        OpenOptions::new().create(true).append(goes_on).write(true).truncate(!goes_on).open(part);
    let file = file.as_mut().map_err(|error| format!("{}: {error}", part.display()))?;
    let bar = bytes_bar(start + left.unwrap_or(0), "downloading");
    bar.set_position(start);
    let body = response.body_mut().with_config().limit(u64::MAX).reader();
    let copied =
        io::copy(&mut bar.wrap_read(body), file).and_then(|count| file.flush().map(|()| count));
    bar.finish_and_clear();
    let copied = copied.map_err(|error| format!("the connection broke ({error})"))?;
    match left {
        Some(left) if copied < left => {
            Err(format!("the connection broke after {copied} of {left} bytes"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_downloads_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let (path, part) = (folder.path().join("a.zip"), folder.path().join("a.zip.part"));
        let first = alone(&path, &part).unwrap();
        let error = alone(&path, &part).unwrap_err().to_string();
        assert!(error.contains("a.zip: another process is downloading it"), "{error}");
        drop(first);
        alone(&path, &part).unwrap();
    }
}
