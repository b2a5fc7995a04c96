//! What is said of GPUs before anything is computed on one, with a driver made for the test: a library that answers the few
//! questions that are asked then.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Finished, Folder, mpirun, ouroboros, run, slices};

/// libtorch's CUDA half is half a gigabyte.
const LIMIT: u64 = 120;

/// A driver made for the test.
#[derive(Clone, Copy)]
struct Made {
    /// Of CUDA, as it serves it: 13000 is 13.0.
    version: u32,
    devices: u32,
    /// What it answers to begin with; 0: that it works.
    init: u32,
    /// Whether its devices are slices of one GPU.
    slices: bool,
}

/// A driver that serves CUDA `version` and has so many devices.
fn driver(folder: &Folder, version: u32, devices: u32) -> PathBuf {
    Made { version, devices, init: 0, slices: false }.built(folder)
}

impl Made {
    /// Compiles it, in a folder of its own.
    fn built(self, folder: &Folder) -> PathBuf {
        let Made { version, devices, init, slices } = self;
        let path = folder.path(&format!("driver-{version}-{devices}-{init}-{slices}"));
        std::fs::create_dir(&path).unwrap();
        let slices = u32::from(slices);
        let source = format!(
            r#"
        #include <stdio.h>
        #include <string.h>
        int cuInit(unsigned flags) {{ return {init} ? {init} : {devices} ? 0 : 100; }}
        int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
        int cuDeviceGetCount(int *count) {{ *count = {devices}; return 0; }}
        int cuDeviceGet(int *device, int ordinal) {{ *device = ordinal; return 0; }}
        int cuDeviceGetName(char *name, int length, int device) {{ strncpy(name, "Made for a test", length); return 0; }}
        int cuDeviceTotalMem_v2(size_t *bytes, int device) {{ *bytes = (size_t)80 << 30; return 0; }}
        int cuDeviceGetUuid_v2(char *uuid, int device) {{ memset(uuid, device + 1, 16); return 0; }}
        int cuDevicePrimaryCtxRetain(void **context, int device) {{ *context = (void *)64; return 0; }}
        int cuCtxGetCurrent(void **context) {{ *context = (void *)64; return 0; }}
        int cuMemGetInfo_v2(size_t *left, size_t *all) {{ *left = (size_t)2 << 30; *all = (size_t)80 << 30; return 0; }}
        int cuDeviceGetAttribute(int *value, int attribute, int device) {{ *value = attribute == 75 ? 9 : 0; return 0; }}
        int cuDeviceGetPCIBusId(char *bus, int length, int device) {{
            snprintf(bus, length, "0000:%02x:00.0", {slices} ? 1 : device + 1);
            return 0;
        }}
        "#
        );
        std::fs::write(path.join("driver.c"), source).unwrap();
        let mut command = Command::new("cc");
        command
            .args(["-shared", "-fPIC", "-o"])
            .arg(path.join("libcuda.so"))
            .arg(path.join("driver.c"));
        assert!(command.status().unwrap().success());
        path
    }
}

/// Whether libtorch has a CUDA half here: a libtorch of one's own may have none.
fn torch_has_cuda() -> bool {
    let path = ouroboros::runtime::libtorch_path().unwrap();
    path.with_file_name("libtorch_cuda.so").exists()
}

fn with(mut command: Command, driver: &Path) -> Finished {
    // Before what else the loader is told: a module's MPI, for one.
    let also = std::env::var("LD_LIBRARY_PATH").map_or(String::new(), |path| format!(":{path}"));
    command
        .env("LD_LIBRARY_PATH", format!("{}{also}", driver.display()))
        .env_remove("CUDA_VISIBLE_DEVICES");
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
        one_error(
            &found,
            "the driver is too old: it serves CUDA 12.4, and this libtorch needs 13.0",
        );
        // It can be done without.
        let auto = folder.train("out", &["device=auto", "steps=2"], &[]);
        with(ouroboros(&slices(&auto)), &old).expect_code(0);
    }
}

/// CUDA's toolkit has a library of that name to link with, which modules of clusters put on the loader's path.
#[test]
fn a_stub_of_the_driver_is_told() {
    let folder = Folder::new();
    let stub = Made { version: 13000, devices: 1, init: 34, slices: false }.built(&folder);
    let args = folder.train("out", &["device=cuda"], &[]);
    let found = with(ouroboros(&slices(&args)), &stub).expect_code(2);
    let expected = format!(
        "{}/libcuda.so is CUDA's stub of the driver",
        stub.canonicalize().unwrap().display()
    );
    one_error(&found, &expected);
}

/// What a GPU has left is asked before anything is computed on it.
#[test]
fn a_model_that_does_not_fit_is_told() {
    if !torch_has_cuda() {
        return;
    }
    let folder = Folder::new();
    let full = driver(&folder, 13000, 1);
    let args = folder.train("out", &["device=cuda"], &[]);
    let found = with(ouroboros(&slices(&args)), &full).expect_code(2);
    one_error(
        &found,
        "MiB predicted for stage 0, replica 0, 2048 MiB left of the GPU, of which 2458 stay free",
    );
    let huge = [
        "device=cuda",
        "model.layers=400",
        "model.d_model=8192",
        "model.heads=64",
        "model.d_ff=32768",
    ];
    let args = folder.train("out", &huge, &[]);
    let found = with(ouroboros(&slices(&args)), &full).expect_code(2);
    one_error(
        &found,
        "stage 0, replica 0, the GPU has 81408 MiB for it, of which 2458 stay free; take more stages (--grid)",
    );
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
        let args = folder.train(
            "out",
            &[&["device=cuda"], sets].concat(),
            &[&["--grid", grid], more].concat(),
        );
        with(mpirun(count, &slices(&args)), driver)
    };
    one_error(
        &ranks(3, "3x1", &two, &[], &[]).expect_code(2),
        "3 ranks on this host, which has 2 GPUs",
    );
    let shared = ranks(2, "2x1", &one, &[], &[]).expect_code(2);
    one_error(
        &shared,
        "setting `allow_shared_gpu`: found false, and ranks 0 and 1 have both Made for a test (0000:01:00.0) on ",
    );
    // Slices of one GPU are devices of their own: the next thing that is looked at is their memory.
    let sliced = Made { version: 13000, devices: 2, init: 0, slices: true }.built(&folder);
    let huge = ["model.layers=400", "model.d_model=8192", "model.heads=64", "model.d_ff=32768"];
    one_error(&ranks(2, "2x1", &sliced, &huge, &[]).expect_code(2), "the GPU has");
    let args = folder.train("out", &[], &["--transport", "nccl", "--grid", "2x1"]);
    let found = with(mpirun(2, &slices(&args)), &one).expect_code(2);
    one_error(&found, "--transport nccl is for GPUs");
}
