//! What this process runs on: the libtorch that was loaded, and where its log goes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};
use crate::files;

/// The release of libtorch that this program was built for.
pub const BUILT_FOR: &str = env!("OUROBOROS_LIBTORCH_VERSION");

/// The file of libtorch that the loader chose for this process.
pub fn libtorch_path() -> Option<PathBuf> {
    mapped("/libtorch_cpu.so")
}

/// The file of this process's memory whose path holds `part`.
pub fn mapped(part: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.contains(part))?;
    line.find('/').map(|start| PathBuf::from(&line[start..]))
}

/// The release of the libtorch in a folder, by the files that come with it: a Python package's
/// `version.py`, or the `build-version` of an archive.
pub fn libtorch_version(library: &Path) -> Option<String> {
    let root = library.parent()?.parent()?;
    let text = match fs::read_to_string(root.join("build-version")) {
        Ok(text) => text,
        Err(_) => {
            let python = fs::read_to_string(root.join("version.py")).ok()?;
            python
                .lines()
                .find_map(|line| line.strip_prefix("__version__ = "))?
                .trim_matches(['\'', '"'])
                .to_owned()
        }
    };

    text.trim().split('+').next().map(str::to_owned)
}

/// Whether this processor is one of those for which MKL, libtorch's library for products, has the
/// slower kernels: of another maker than Intel.
pub fn mkl_is_slow() -> bool {
    static SLOW: OnceLock<bool> = OnceLock::new();
    *SLOW.get_or_init(|| {
        fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("AuthenticAMD"))
    })
}

/// Refuses a libtorch of another release than the one that this program was built for.
///
/// # Errors
/// [`Error::Config`] with both releases. A release that cannot be told is let pass.
pub fn check_libtorch() -> Result<()> {
    match libtorch_path() {
        Some(path) => fits(&path, libtorch_version(&path).as_deref()),
        None => Ok(()),
    }
}

fn fits(path: &Path, found: Option<&str>) -> Result<()> {
    match found {
        Some(found) if found != BUILT_FOR => Err(Error::config(
            "libtorch",
            format!("release {found} in {}", path.display()),
            format!(
                "this program was built for {BUILT_FOR}: take it out of LD_LIBRARY_PATH, or run scripts/setup.sh and build again"
            ),
        )),
        _ => Ok(()),
    }
}

/// Sends the log of this rank to `DIR/log/rank-N.log`; `OUROBOROS_LOG` sets the level (`info` if
/// unset, `trace` shows every action). A second call in one process changes nothing.
///
/// # Errors
/// [`Error::Config`] about `--out` if the file cannot be made, and about a level that is none.
pub fn log_to(out: &Path, rank: usize) -> Result<()> {
    let level = std::env::var("OUROBOROS_LOG").unwrap_or_else(|_| "info".into());
    let filter = EnvFilter::try_new(&level).map_err(|error| {
        let remedy = format!("{error}; write a level, as error, warn, info, debug or trace");
        Error::config("OUROBOROS_LOG", level, remedy)
    })?;

    let wrong = |error: std::io::Error| {
        Error::config(
            "--out",
            out.display(),
            format!("its log cannot be written ({error}); choose another folder"),
        )
    };

    let folder = out.join("log");
    fs::create_dir_all(&folder).map_err(wrong)?;
    if folder.is_symlink() {
        return Err(wrong(std::io::Error::other("the folder `log` is a link")));
    }

    let file = files::create(&folder.join(format!("rank-{rank}.log"))).map_err(wrong)?;
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(file).with_ansi(false);
    // A log that cannot be written is no reason to print.
    let subscriber = subscriber.log_internal_errors(false).finish();
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

/// From here on the kernel kills this process when the one that has started it is gone, where it is
/// Linux's.
pub fn die_with_parent() {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_libtorch_is_the_one_it_was_built_for() {
        let path = libtorch_path().unwrap();
        assert_eq!(libtorch_version(&path).as_deref(), Some(BUILT_FOR));
        check_libtorch().unwrap();
    }

    #[test]
    fn another_release_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("version.py"), "__version__ = '2.5.1+cu124'\n").unwrap();
        let library = folder.path().join("lib/libtorch_cpu.so");
        let found = libtorch_version(&library);
        assert_eq!(found.as_deref(), Some("2.5.1"));
        let error = fits(&library, found.as_deref()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("release 2.5.1"), "{error}");
        fs::write(folder.path().join("build-version"), "2.11.0+cpu\n").unwrap();
        assert_eq!(libtorch_version(&library).as_deref(), Some("2.11.0"));
    }
}
