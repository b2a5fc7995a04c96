//! Files that are read and written: only whole files are read, and what is written stands under a
//! name of its own until it is complete.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

/// A network file system shows what another node has written after a while: so long it is waited
/// for.
pub const SEEN: Duration = Duration::from_secs(10);

/// Opens a file. A pipe, a device or a folder is refused at once, where opening or reading it might
/// wait for ever.
///
/// # Errors
/// What the system says, or what the path is instead of a file.
pub fn open(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path)?.file_type();
    let found = match () {
        () if kind.is_file() => return File::open(path),
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };

    Err(io::Error::new(ErrorKind::InvalidInput, format!("{found}, not a file")))
}

/// An empty file to write into, in a folder that may have come from elsewhere: a link there is not
/// followed, since it may lead anywhere, and a pipe is not waited for.
///
/// # Errors
/// What the system says, or that the path is a link.
pub fn create(path: &Path) -> io::Result<File> {
    create_with(path, OpenOptions::new().write(true).truncate(true))
}

/// The same with other options.
///
/// # Errors
/// As [`create`].
pub fn create_with(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = options.clone().create(true).custom_flags(flags.bits() as i32).open(path);
    file.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::LOOP) => {
            io::Error::new(ErrorKind::InvalidInput, format!("{} is a link", path.display()))
        }
        _ => error,
    })
}

/// Writes a whole file; as [`create`].
///
/// # Errors
/// What the system says, or that the path is a link.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    create(path)?.write_all(bytes)
}

/// Writes a whole file in the place of another, of which nobody sees a part; as [`create`].
///
/// # Errors
/// What the system says, or that the path is a link.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary(path);
    let written = write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary); // The first error is the one to tell.
    }
    written
}

/// Whether a path that is asked for stands for standard output.
pub fn is_stdout(path: &Path) -> bool {
    path == "-" || path == "/dev/stdout"
}

/// Writes what is asked for under a path: to standard output; a pipe or a device takes it as it is;
/// else as [`replace`], where a link leads. Gives whether it is a file.
///
/// # Errors
/// What the system says.
pub fn put(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    if is_stdout(path) {
        io::stdout().lock().write_all(bytes)?;
        return Ok(false);
    }

    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        OpenOptions::new().write(true).open(path)?.write_all(bytes)?;
        return Ok(false);
    }

    replace(&path, bytes)?;
    Ok(true)
}

/// What a folder is called, also where it is `.`.
pub fn name(folder: &Path) -> String {
    let whole = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    whole.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned()
}

/// The bytes of a file; as [`open`].
///
/// # Errors
/// What the system says, or what the path is instead of a file.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut open(path)?, &mut bytes)?;
    Ok(bytes)
}

/// The text of a file; as [`open`].
///
/// # Errors
/// What the system says, or what the path is instead of a file.
pub fn read_text(path: &Path) -> io::Result<String> {
    let invalid = |error: std::string::FromUtf8Error| {
        io::Error::new(ErrorKind::InvalidData, error.utf8_error())
    };
    String::from_utf8(read(path)?).map_err(invalid)
}

/// Whether a name is one of a file right in a folder: it leads nowhere else.
pub fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let one = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    one && !name.chars().any(char::is_control)
}

/// A name beside `path` that no other process takes, for what is not complete yet.
pub fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Gives a complete file its name, which nothing has yet.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] if something has.
pub fn place(temporary: &Path, path: &Path) -> io::Result<()> {
    match renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
        // A file system that cannot promise that nothing is replaced.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) if !path.exists() => {
            fs::rename(temporary, path)
        }
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Err(ErrorKind::AlreadyExists.into()),
        renamed => Ok(renamed?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(open(folder.path()).unwrap_err().to_string(), "a folder, not a file");
        assert_eq!(open(Path::new("/dev/null")).unwrap_err().to_string(), "a device, not a file");
        assert_eq!(open(&folder.path().join("a")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_asked_for_is_written_where_it_leads() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        assert!(put(&file, b"a page").unwrap());
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(put(&link, b"new").unwrap() && link.is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert!(!put(Path::new("/dev/null"), b"a page").unwrap());
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        put(folder.path(), b"a page").unwrap_err();
    }

    #[test]
    fn a_link_is_not_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let (other, link) = (folder.path().join("other"), folder.path().join("link"));
        fs::write(&other, "kept").unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert_eq!(
            write(&link, b"new").unwrap_err().to_string(),
            format!("{} is a link", link.display())
        );
        assert_eq!(fs::read_to_string(&other).unwrap(), "kept");
        write(&other, b"new").unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "new");
    }

    #[test]
    fn a_plain_name_leads_nowhere_else() {
        assert!(["a", "a b.txt", "..a"].into_iter().all(is_plain_name));
        assert!(
            !["", ".", "..", "a/b", "/a", "a/", "./a", "a\0", "a\nb"]
                .into_iter()
                .any(is_plain_name)
        );
    }

    #[test]
    fn nothing_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(temporary(&path), "new").unwrap();
        place(&temporary(&path), &path).unwrap();
        fs::write(temporary(&path), "newer").unwrap();
        assert_eq!(place(&temporary(&path), &path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }
}
