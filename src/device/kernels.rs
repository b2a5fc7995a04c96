//! Kernels of our own on a device: compiled and loaded when they are first needed, put on
//! libtorch's stream or another.
//!
//! A kernel goes through its values with the stride of its grid, so any number of blocks does; of
//! one thread it is a loop, and so its source is C++ for the processor as well, where tests hold it
//! against the host's own pass bit for bit.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, result, sys};

use super::compiler::{Source, image};
use super::driver;
use super::queues::primary;
use crate::error::{Error, Result};

const THREADS: u32 = 256;
/// Blocks at most.
const BLOCKS: u64 = 1 << 14;

/// A kernel, loaded on a device.
pub struct Kernel {
    context: Arc<CudaContext>,
    function: sys::CUfunction,
}

// SAFETY: the driver lets any thread launch a function whose context is bound to it, which `launch`
// sees to.
unsafe impl Send for Kernel {}
// SAFETY: as above; nothing of a function changes.
unsafe impl Sync for Kernel {}

/// A module of the driver's, never unloaded, so that its functions stay.
#[derive(Clone, Copy)]
struct Module(sys::CUmodule);

// SAFETY: a handle, which any thread may use.
unsafe impl Send for Module {}

impl Kernel {
    /// Compiles a source for a device, and loads it, unless that has been done; then finds `entry`.
    ///
    /// # Errors
    /// [`Error::Config`] about `device` if that cannot be, [`Error::Internal`] if there is no such
    /// entry.
    pub fn new(index: usize, source: &Source, entry: &str) -> Result<Kernel> {
        type Modules = BTreeMap<(usize, &'static str), Module>;
        static LOADED: Mutex<Modules> = Mutex::new(BTreeMap::new());
        let unusable = |why: String| {
            Error::config(
                "device",
                format!("`cuda`, but {why}"),
                "see ouroboros doctor, or set device = \"cpu\"",
            )
        };

        let failed = |call: &'static str| move |error| unusable(driver::failed(call, error));
        let name = entry_name(source, entry)?;
        let context = primary(index)?;
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;

        let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let module = match loaded.get(&(index, source.name)) {
            Some(module) => *module,
            None => {
                let capability =
                    context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?;
                let image = image(source, capability).map_err(unusable)?;
                // SAFETY: a cubin, which knows its length, or PTX, which NVRTC has ended with a
                // zero.
                let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
                let module = Module(module.map_err(failed("cuModuleLoadData"))?);
                loaded.insert((index, source.name), module);
                module
            }
        };

        // SAFETY: the module is loaded, and never unloaded.
        let function = unsafe { result::module::get_function(module.0, name) };
        Ok(Kernel { context, function: function.map_err(failed("cuModuleGetFunction"))? })
    }

    /// Puts the kernel on a stream (null: libtorch's default one), for about so many values.
    ///
    /// # Safety
    /// `arguments` must point to values of the types of the kernel's declaration, in their order;
    /// what those point to must be memory of the device, long enough, that stays until the stream
    /// has come past this.
    pub unsafe fn launch(
        &self,
        count: u64,
        stream: sys::CUstream,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let failed = |error| Error::Device(driver::failed("cuLaunchKernel", error));
        let blocks = count.div_ceil(u64::from(THREADS)).clamp(1, BLOCKS) as u32;
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the caller's; the arguments are read before the call returns.
        unsafe {
            result::launch_kernel(
                self.function,
                (blocks, 1, 1),
                (THREADS, 1, 1),
                0,
                stream,
                arguments,
            )
            .map_err(failed)
        }
    }
}

/// The kernel of an entry, found once a process.
///
/// # Errors
/// As [`Kernel::new`].
pub fn kept(index: usize, source: &Source, entry: &'static str) -> Result<Arc<Kernel>> {
    type Found = Vec<(usize, &'static str, Arc<Kernel>)>;
    static FOUND: Mutex<Found> = Mutex::new(Vec::new());
    let mut found = FOUND.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some((_, _, kernel)) = found.iter().find(|(of, name, _)| (*of, *name) == (index, entry))
    {
        return Ok(Arc::clone(kernel));
    }

    let kernel = Arc::new(Kernel::new(index, source, entry)?);
    found.push((index, entry, Arc::clone(&kernel)));
    Ok(kernel)
}

/// The name of an entry, if the source has it.
pub fn entry_name(source: &Source, entry: &str) -> Result<CString> {
    let there = source.text.contains(&format!("void {entry}("));
    let name = CString::new(entry).ok().filter(|_| there);
    name.ok_or_else(|| {
        Error::Internal(format!("{} has no {entry}: it cannot be run on a GPU", source.name))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;
    use std::process::Command;

    use libloading::os::unix::{Library, RTLD_NOW};

    use super::super::compiler::{Form, compiled};
    use super::super::libraries;
    use super::*;

    /// A source for the processor: one block of one thread.
    pub(crate) fn for_processor(source: &Source, folder: &Path) -> Library {
        let head = "#include <cmath>\n#include <cstring>\n#define __device__\n#define __global__\n#define __restrict__\n\
                    static struct { unsigned x; } blockIdx{0}, threadIdx{0}, blockDim{1}, gridDim{1};\n\
                    static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }\n\
                    static float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }\n";
        let (file, library) = (folder.join("source.cpp"), folder.join("source.so"));
        std::fs::write(&file, format!("{head}{}", source.text)).unwrap();
        let mut command = Command::new("c++");
        command
            .args(["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(&file);
        assert!(command.status().unwrap().success());
        // SAFETY: the library was made above and has no constructors.
        unsafe { Library::open(Some(&library), RTLD_NOW) }.unwrap()
    }

    /// Compiles a source for the GPUs of today, without contraction, and looks for its entries.
    pub(crate) fn compiles_for_gpus_of_today(source: &Source, entries: &[&str]) {
        if libraries::nvrtc().is_err() {
            return; // The set-up brings it; a libtorch of one's own may not.
        }

        for capability in [(8, 0), (9, 0), (10, 0)] {
            let ptx = String::from_utf8(compiled(source, capability, Form::Ptx).unwrap()).unwrap();
            for entry in entries {
                assert!(ptx.contains(&format!(".entry {entry}")), "{entry}: {ptx}");
            }

            assert!(!ptx.contains("fma.rn"), "contracted: {ptx}");
            assert_eq!(compiled(source, capability, Form::Cubin).unwrap()[..4], *b"\x7fELF");
        }
    }
}
