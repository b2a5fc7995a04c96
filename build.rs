//! Gives every binary of the package the way to the libtorch that it was built with, so that it runs with no
//! environment variable set, under mpirun too; and refuses a libtorch that does not fit before anything is compiled
//! against it.

use std::path::{Path, PathBuf};

/// The release of libtorch that the `tch` in Cargo.toml binds to.
const WANTED: &str = "2.11.0";

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=build.rs");
    let root = PathBuf::from(std::env::var_os("LIBTORCH").unwrap_or_else(|| ".libtorch".into()));
    let header = root.join("include/torch/headeronly/version.h");
    println!("cargo::rerun-if-changed={}", header.display());
    let found = match std::fs::read_to_string(&header) {
        Ok(text) => version_in(&text).unwrap_or_else(|| "unknown".to_owned()),
        Err(error) => fail(&format!(
            "no libtorch at {} ({}: {error}); run scripts/setup.sh",
            root.display(),
            header.display()
        )),
    };
    if found != WANTED {
        fail(&format!(
            "libtorch at {} is version {found}, but tch needs {WANTED}; run scripts/setup.sh without LIBTORCH, or with \
             LIBTORCH naming a libtorch {WANTED}",
            root.display()
        ));
    }
    let lib = canonical(&root).join("lib");
    // An absolute RPATH, not a RUNPATH: mpirun and a moved working folder must not matter, nor an old LD_LIBRARY_PATH.
    println!("cargo::rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{}", lib.display());
    println!("cargo::rustc-env=OUROBOROS_LIBTORCH_VERSION={WANTED}");
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())))
}

/// `2.11.0` out of the lines `#define TORCH_VERSION_MAJOR 2`, ...
fn version_in(header: &str) -> Option<String> {
    let part = |name: &str| {
        let start = format!("#define TORCH_VERSION_{name} ");
        header.lines().find_map(|line| line.strip_prefix(&start)).map(str::trim)
    };
    Some(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1);
}
