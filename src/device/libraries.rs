//! The libraries for GPUs, found at run time: libtorch's own search path leads to them, ours need
//! not, so the same places are looked at, and the libraries loaded by their path.
//!
//! ```text
//! site-packages/torch/lib/libtorch_cuda.so            PyPI's package
//! site-packages/nvidia/cu13/lib/libnvrtc.so.13        of CUDA 13, in one folder
//! site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12  of CUDA 12, in one a library
//! site-packages/nvidia/nccl/lib/libnccl.so.2
//! libtorch/lib/libnvrtc-0ab1c2d3.so.12                pytorch.org's archive, with a hash in the name; NCCL is part of libtorch_cuda
//! ```

use std::error::Error;
use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::runtime::{libtorch_path, mapped};

/// The oldest NCCL that has what is used: communicators that are set up without blocking.
const OLDEST_NCCL: c_int = 21800;

/// Loads a library for ever, its symbols for all.
fn load(file: &Path) -> Result<Library, String> {
    // SAFETY: these are the libraries of CUDA and libtorch, whose constructors are made to run when
    // they are loaded.
    let library = unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) };
    // What the loader says, as the cause of "dlopen failed".
    library.map_err(|error| error.source().map_or_else(|| error.to_string(), ToString::to_string))
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

/// The major version of CUDA of libtorch's other half, once that is loaded.
static TORCH_CUDA: OnceLock<Result<i32, String>> = OnceLock::new();

/// Loads libtorch's CUDA half; the major version of CUDA that it was built for.
///
/// # Errors
/// Why it cannot be.
pub fn load_torch_cuda() -> Result<i32, String> {
    let first = || {
        let file = torch_lib().ok_or("libtorch's folder is unknown")?.join("libtorch_cuda.so");
        if !file.exists() {
            return Err(format!("this libtorch has no CUDA ({} is missing)", file.display()));
        }

        std::mem::forget(
            load(&file)
                .map_err(|error| format!("libtorch's CUDA half cannot be loaded ({error})"))?,
        );

        // tch panics where libtorch had looked for its CUDA half before it was there.
        match std::panic::catch_unwind(tch::utils::version_cudart) {
            Ok(version) if version > 0 => Ok((version / 1000) as i32),
            _ => Err("libtorch does not see its CUDA half".to_owned()),
        }
    };

    TORCH_CUDA.get_or_init(first).clone()
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
    const FILE: &str = "libnccl.so.2";
    let find = || find_nccl(&beside_torch("nccl", FILE).unwrap_or_else(|| FILE.into()));
    FOUND.get_or_init(find).as_ref().map_err(Clone::clone)
}

/// NCCL by its file, or by a name that the loader knows.
fn find_nccl(file: &Path) -> Result<Nccl, String> {
    let (library, path) = match load(file) {
        Ok(library) => (library, mapped("/libnccl.so").unwrap_or_else(|| file.to_owned())),
        // An archive's libtorch has it inside.
        Err(error) => match load_torch_cuda().ok().map(|_| Library::this()).filter(has_nccl) {
            Some(library) => {
                (library, mapped("/libtorch_cuda.so").unwrap_or_else(|| file.to_owned()))
            }
            None => {
                let remedy = "install it (Python's package nvidia-nccl, or your system's), and let the loader find libnccl.so.2";
                return Err(format!("NCCL is missing ({error}); {remedy}"));
            }
        },
    };

    let mut number: c_int = 0;
    // SAFETY: ncclResult_t ncclGetVersion(int*), as nccl.h declares it; it needs no device.
    let code = unsafe {
        let version = library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"ncclGetVersion\0");
        version.map_err(|error| format!("{} is no NCCL ({error})", path.display()))?(
            &raw mut number,
        )
    };

    if code != 0 {
        return Err(format!("{} does not tell its version", path.display()));
    }

    new_enough(number, &path)?;
    Ok(Nccl { library, path, version: version(number) })
}

fn has_nccl(library: &Library) -> bool {
    // SAFETY: only whether it is there.
    unsafe { library.get::<*const ()>(b"ncclGetVersion\0") }.is_ok()
}

fn new_enough(number: c_int, path: &Path) -> Result<(), String> {
    match number < OLDEST_NCCL {
        true => Err(format!(
            "NCCL is too old: {} is {}, and 2.18 is needed",
            path.display(),
            dotted(version(number))
        )),
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

/// The compiler of kernels: the one that libtorch has, else the loader's.
///
/// # Errors
/// Why there is none.
pub fn nvrtc() -> Result<&'static Library, String> {
    static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
    // Unknown until libtorch's CUDA half is loaded, without which nobody but tests compiles.
    let majors = match TORCH_CUDA.get() {
        Some(Ok(major)) => vec![*major],
        _ => vec![13, 12],
    };
    LOADED
        .get_or_init(|| find_nvrtc(torch_lib().as_deref(), &majors))
        .as_ref()
        .map_err(Clone::clone)
}

fn find_nvrtc(torch_lib: Option<&Path>, majors: &[i32]) -> Result<Library, String> {
    let beside = torch_lib.and_then(|folder| nvrtc_beside(folder, majors).into_iter().next());
    if let Some(file) = beside {
        // It looks for its second half by name alone, when it compiles.
        for half in files_like(file.parent(), "libnvrtc-builtins") {
            std::mem::forget(
                load(&half).map_err(|error| format!("NVRTC cannot be loaded ({error})"))?,
            );
        }

        return load(&file).map_err(|error| format!("NVRTC cannot be loaded ({error})"));
    }

    let mut missing = String::new();
    for major in majors {
        match load(Path::new(&format!("libnvrtc.so.{major}"))) {
            Ok(library) => return Ok(library),
            Err(error) => missing = error,
        }
    }

    // libtorch's way to the one that it was built with; only where there is a driver, which it is
    // linked with.
    let through =
        torch_lib.map(|folder| folder.join("libcaffe2_nvrtc.so")).filter(|file| file.exists());
    if let Some(file) = through
        && let Ok(library) = load(&file)
    {
        std::mem::forget(library);
        let this = Library::this();
        // SAFETY: only whether it is there.
        if unsafe { this.get::<*const ()>(b"nvrtcVersion\0") }.is_ok() {
            return Ok(this);
        }
    }

    Err(format!(
        "NVRTC is missing ({missing}); install it (Python's package nvidia-cuda-nvrtc, or CUDA's toolkit)"
    ))
}

/// Where NVRTC of a major version may lie, by the folder of libtorch's libraries: those files that
/// are there, the best first.
fn nvrtc_beside(torch_lib: &Path, majors: &[i32]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for major in majors {
        let file = format!("libnvrtc.so.{major}");
        let packages = [format!("cu{major}"), "cuda_nvrtc".to_owned()];
        let packaged = packages
            .map(|package| torch_lib.join("../../nvidia").join(package).join("lib").join(&file));
        found.extend(
            packaged
                .into_iter()
                .chain([torch_lib.join(&file)])
                .filter_map(|path| path.canonicalize().ok()),
        );

        let hashed = |path: &PathBuf| path.to_string_lossy().ends_with(&format!(".so.{major}"));
        found.extend(files_like(Some(torch_lib), "libnvrtc-").into_iter().filter(hashed));
    }

    found.retain(|path| !path.to_string_lossy().contains("builtins"));
    found
}

/// The shared libraries of a folder whose names begin with `prefix`, but for NVRTC's alternatives.
fn files_like(folder: Option<&Path>, prefix: &str) -> Vec<PathBuf> {
    let entries =
        folder.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let wanted = |path: &PathBuf| {
        let name =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(prefix) && name.contains(".so") && !name.contains(".alt.")
    };

    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(wanted).collect();
    found.sort();
    found
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

    /// The layouts of PyPI's packages for CUDA 13 and 12, and of the archive.
    #[test]
    fn nvrtc_is_found_wherever_libtorch_has_it() {
        let layouts: [(&[&str], i32, Option<&str>); 5] = [
            (
                &["nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cu13/lib/libnvrtc-builtins.so.13.0"],
                13,
                Some("nvidia/cu13/lib/libnvrtc.so.13"),
            ),
            (
                &["nvidia/cuda_nvrtc/lib/libnvrtc.so.12"],
                12,
                Some("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
            ),
            (
                &[
                    "torch/lib/libnvrtc-0ab1.so.12",
                    "torch/lib/libnvrtc-builtins.so.12.8",
                    "torch/lib/libnvrtc-builtins-1.so.12",
                ],
                12,
                Some("torch/lib/libnvrtc-0ab1.so.12"),
            ),
            (&["torch/lib/libnvrtc.so.12"], 12, Some("torch/lib/libnvrtc.so.12")),
            (&["nvidia/cuda_nvrtc/lib/libnvrtc.so.12"], 13, None),
        ];
        for (files, major, expected) in layouts {
            let folder = tempfile::tempdir().unwrap();
            let torch_lib = folder.path().join("torch/lib");
            std::fs::create_dir_all(&torch_lib).unwrap();
            for file in files {
                std::fs::create_dir_all(folder.path().join(file).parent().unwrap()).unwrap();
                std::fs::write(folder.path().join(file), "").unwrap();
            }
            let found = nvrtc_beside(&torch_lib, &[major]);
            let root = folder.path().canonicalize().unwrap();
            let found: Vec<PathBuf> =
                found.iter().map(|path| path.canonicalize().unwrap()).collect();
            assert_eq!(
                found,
                expected.map(|path| root.join(path)).into_iter().collect::<Vec<_>>(),
                "{files:?}"
            );
        }
    }

    #[test]
    fn what_is_missing_is_told_with_its_package() {
        let folder = tempfile::tempdir().unwrap();
        let error = find_nvrtc(Some(folder.path()), &[99]).err().unwrap();
        assert!(
            error.contains("NVRTC is missing (libnvrtc.so.99")
                && error.contains("nvidia-cuda-nvrtc"),
            "{error}"
        );
        std::fs::create_dir_all(folder.path().join("torch/lib")).unwrap();
        std::fs::write(folder.path().join("torch/lib/libnvrtc.so.99"), "no library").unwrap();
        let error = find_nvrtc(Some(&folder.path().join("torch/lib")), &[99]).err().unwrap();
        assert!(error.contains("NVRTC cannot be loaded"), "{error}");

        match find_nccl(Path::new("libnccl-of-nobody.so.2")) {
            // What libtorch's CUDA half has brought, or has inside.
            Ok(found) => assert!(load_torch_cuda().is_ok() && found.version >= (2, 18, 0)),
            Err(error) => {
                let expected = "NCCL is missing (libnccl-of-nobody.so.2";
                assert!(error.contains(expected) && error.contains("nvidia-nccl"), "{error}");
            }
        }
    }

    #[test]
    fn an_old_nccl_is_told() {
        assert_eq!(dotted(version(22809)), "2.28.9");
        assert!(new_enough(22809, Path::new("x")).is_ok());
        let error = new_enough(21602, Path::new("/lib/libnccl.so.2")).unwrap_err();
        assert_eq!(error, "NCCL is too old: /lib/libnccl.so.2 is 2.16.2, and 2.18 is needed");
    }
}
