//! The libraries for GPUs, found at run time. Python's packages of CUDA lie beside that of libtorch, and libtorch's own search
//! path leads there; ours need not, so the same places are looked at, and the libraries loaded by their path.

use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::runtime::{libtorch_path, mapped};

/// The oldest NCCL that has what is used: communicators that are set up without blocking.
const OLDEST_NCCL: c_int = 21800;

/// Loads a library for ever, its symbols for all.
fn load(file: &Path) -> Result<Library, String> {
    // SAFETY: these are the libraries of CUDA and libtorch, whose constructors are made to run when they are loaded.
    let library = unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) };
    library.map_err(|error| error.to_string())
}

/// The folder of libtorch's libraries.
fn torch_lib() -> Option<PathBuf> {
    Some(libtorch_path()?.parent()?.to_owned())
}

/// A library of one of the packages that lie beside libtorch's.
fn beside_torch(package: &str, file: &str) -> Option<PathBuf> {
    let path = torch_lib()?.join("../../nvidia").join(package).join("lib").join(file);
    path.canonicalize().ok()
}

/// Loads libtorch's CUDA half; the major version of CUDA that it was built for.
///
/// # Errors
/// Why it cannot be.
pub fn load_torch_cuda() -> Result<i32, String> {
    static LOADED: OnceLock<Result<i32, String>> = OnceLock::new();
    let first = || {
        let file = torch_lib().ok_or("libtorch's folder is unknown")?.join("libtorch_cuda.so");
        if !file.exists() {
            return Err(format!("this libtorch has no CUDA ({} is missing)", file.display()));
        }
        std::mem::forget(load(&file).map_err(|error| format!("libtorch's CUDA half cannot be loaded ({error})"))?);
        match tch::utils::version_cudart() {
            version if version > 0 => Ok((version / 1000) as i32),
            _ => Err("libtorch does not see its CUDA half".to_owned()),
        }
    };
    LOADED.get_or_init(first).clone()
}

/// NCCL, where it came from and its version.
pub struct Nccl {
    pub library: Library,
    pub path: PathBuf,
    pub version: (i32, i32, i32),
}

/// Finds NCCL: the one that libtorch uses, else the loader's.
///
/// # Errors
/// Why there is none, or none that is new enough.
pub fn nccl() -> Result<&'static Nccl, String> {
    static FOUND: OnceLock<Result<Nccl, String>> = OnceLock::new();
    FOUND.get_or_init(find_nccl).as_ref().map_err(Clone::clone)
}

fn find_nccl() -> Result<Nccl, String> {
    const FILE: &str = "libnccl.so.2";
    let missing = |error| {
        format!(
            "NCCL is missing ({error}); install it (Python's package nvidia-nccl, or your system's), and let the loader find {FILE}"
        )
    };
    let library = load(&beside_torch("nccl", FILE).unwrap_or_else(|| FILE.into())).map_err(missing)?;
    let path = mapped("/libnccl.so").unwrap_or_else(|| FILE.into());
    let mut number: c_int = 0;
    // SAFETY: ncclResult_t ncclGetVersion(int*), as nccl.h declares it; it needs no device.
    let code = unsafe {
        let version = library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"ncclGetVersion\0");
        version.map_err(|error| format!("{} is no NCCL ({error})", path.display()))?(&raw mut number)
    };
    if code != 0 {
        return Err(format!("{} does not tell its version", path.display()));
    }
    new_enough(number, &path)?;
    Ok(Nccl { library, path, version: version(number) })
}

fn new_enough(number: c_int, path: &Path) -> Result<(), String> {
    match number < OLDEST_NCCL {
        true => Err(format!("NCCL is too old: {} is {}, and 2.18 is needed", path.display(), dotted(version(number)))),
        false => Ok(()),
    }
}

fn version(number: c_int) -> (i32, i32, i32) {
    (number / 10000, number % 10000 / 100, number % 100)
}

/// As people write it.
pub fn dotted((major, minor, patch): (i32, i32, i32)) -> String {
    format!("{major}.{minor}.{patch}")
}

/// The compiler of kernels: the one beside libtorch, else the loader's.
///
/// # Errors
/// Why there is none.
pub fn nvrtc() -> Result<&'static Library, String> {
    static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
    let first = || {
        const FILE: &str = "libnvrtc.so.13";
        let file = beside_torch("cu13", FILE).unwrap_or_else(|| FILE.into());
        // It looks for its second half by name alone, when it compiles.
        let builtins = |entry: std::fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            (name.starts_with("libnvrtc-builtins.so.") && !name.contains(".alt.")).then(|| entry.path())
        };
        let folder = file.parent().and_then(|folder| std::fs::read_dir(folder).ok());
        for half in folder.into_iter().flatten().flatten().filter_map(builtins) {
            std::mem::forget(load(&half).map_err(|error| format!("NVRTC cannot be loaded ({error})"))?);
        }
        load(&file).map_err(|error| format!("NVRTC is missing ({error})"))
    };
    LOADED.get_or_init(first).as_ref().map_err(Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The set-up brings libtorch's package with those of CUDA.
    #[test]
    fn nccl_is_found_beside_libtorch() {
        let Some(file) = beside_torch("nccl", "libnccl.so.2") else { return };
        let nccl = nccl().unwrap();
        assert_eq!(nccl.path.canonicalize().unwrap(), file);
        assert!(nccl.version >= (2, 18, 0), "{:?}", nccl.version);
    }

    #[test]
    fn an_old_nccl_is_told() {
        assert_eq!(dotted(version(22809)), "2.28.9");
        assert!(new_enough(22809, Path::new("x")).is_ok());
        let error = new_enough(21602, Path::new("/lib/libnccl.so.2")).unwrap_err();
        assert_eq!(error, "NCCL is too old: /lib/libnccl.so.2 is 2.16.2, and 2.18 is needed");
    }
}
