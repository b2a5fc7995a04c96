//! What is said of GPUs before anything is computed on one, with a driver made for the test: a library that answers the few
//! questions that are asked then.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Finished, Folder, mpirun, ouroboros, run, slices};

/// libtorch's CUDA half is half a gigabyte.
const LIMIT: u64 = 120;

/// A driver that serves CUDA `version` (13000 is 13.0) and has so many devices, in a folder of its own.
fn driver(folder: &Folder, version: u32, devices: u32) -> PathBuf {
    let path = folder.path(&format!("driver-{version}-{devices}"));
    std::fs::create_dir(&path).unwrap();
    let source = format!(
        r#"
        #include <stdio.h>
        #include <string.h>
        int cuInit(unsigned flags) {{ return {devices} ? 0 : 100; }}
        int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
        int cuDeviceGetCount(int *count) {{ *count = {devices}; return 0; }}
        int cuDeviceGet(int *device, int ordinal) {{ *device = ordinal; return 0; }}
        int cuDeviceGetName(char *name, int length, int device) {{ strncpy(name, "Made for a test", length); return 0; }}
        int cuDeviceTotalMem_v2(size_t *bytes, int device) {{ *bytes = (size_t)80 << 30; return 0; }}
        int cuDeviceGetAttribute(int *value, int attribute, int device) {{ *value = attribute == 75 ? 9 : 0; return 0; }}
        int cuDeviceGetPCIBusId(char *bus, int length, int device) {{
            snprintf(bus, length, "0000:%02x:00.0", device + 1);
            return 0;
        }}
        "#
    );
    std::fs::write(path.join("driver.c"), source).unwrap();
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-o"]).arg(path.join("libcuda.so")).arg(path.join("driver.c"));
    assert!(command.status().unwrap().success());
    path
}

/// Whether libtorch has a CUDA half here: a libtorch of one's own may have none.
fn torch_has_cuda() -> bool {
    let path = ouroboros::runtime::libtorch_path().unwrap();
    path.with_file_name("libtorch_cuda.so").exists()
}

fn with(mut command: Command, driver: &Path) -> Finished {
    // Before what else the loader is told: a module's MPI, for one.
    let also = std::env::var("LD_LIBRARY_PATH").map_or(String::new(), |path| format!(":{path}"));
    command.env("LD_LIBRARY_PATH", format!("{}{also}", driver.display())).env_remove("CUDA_VISIBLE_DEVICES");
    run(command, LIMIT)
}

fn one_error(finished: &Finished, expected: &str) {
    let errors = finished.errors();
    assert!(errors.len() == 1 && errors[0].contains(expected), "{expected}: {finished}");
}

#[test]
fn a_driver_without_devices_or_too_old_is_told() {
    let folder = Folder::new();
    let args = folder.train("out", &["device=cuda"], &[]);
    let found = with(ouroboros(&slices(&args)), &driver(&folder, 13000, 0)).expect_code(2);
    one_error(
        &found,
        "setting `device`: found `cuda`, but the driver shows no device (CUDA_VISIBLE_DEVICES is not set)",
    );
    let old = driver(&folder, 12040, 1);
    if torch_has_cuda() {
        let found = with(ouroboros(&slices(&args)), &old).expect_code(2);
        one_error(&found, "the driver is too old: it serves CUDA 12.4, and this libtorch needs 13.0");
        // It can be done without.
        let auto = folder.train("out", &["device=auto", "steps=2"], &[]);
        with(ouroboros(&slices(&auto)), &old).expect_code(0);
    }
}

#[test]
fn doctor_tells_of_devices() {
    let folder = Folder::new();
    let found = with(ouroboros(&["doctor"]), &driver(&folder, 13010, 2)).expect_code(0);
    for line in [
        "GPU driver  serves CUDA 13.1; 2 devices to be seen",
        "  GPU 1     Made for a test (0000:02:00.0), 80.0 GiB, compute capability 9.0",
    ] {
        assert!(found.stdout.contains(line), "{line}: {found}");
    }
}

#[test]
fn ranks_and_devices_must_fit() {
    if !torch_has_cuda() {
        return;
    }
    let folder = Folder::new();
    let (one, two) = (driver(&folder, 13000, 1), driver(&folder, 13000, 2));
    let ranks = |count: usize, grid: &str, driver: &Path, sets: &[&str], more: &[&str]| {
        let args = folder.train("out", &[&["device=cuda"], sets].concat(), &[&["--grid", grid], more].concat());
        with(mpirun(count, &slices(&args)), driver)
    };
    one_error(&ranks(3, "3x1", &two, &[], &[]).expect_code(2), "3 ranks on this host, which has 2 GPUs");
    let shared = ranks(2, "2x1", &one, &[], &[]).expect_code(2);
    one_error(
        &shared,
        "setting `allow_shared_gpu`: found false, and ranks 0 and 1 have both Made for a test (0000:01:00.0) on ",
    );
    let args = folder.train("out", &[], &["--transport", "nccl", "--grid", "2x1"]);
    let found = with(mpirun(2, &slices(&args)), &one).expect_code(2);
    one_error(&found, "--transport nccl is for GPUs");
}
