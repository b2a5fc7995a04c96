//! What the CUDA driver of this machine says. The driver is loaded when it is first asked; a
//! machine without one only says so.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;

use cudarc::driver::{DriverError, result, sys};
use serde::{Deserialize, Serialize};

use crate::runtime::mapped;

/// A device as the driver shows it to this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Among the visible ones.
    pub index: usize,
    pub name: String,
    /// Its address on the PCI bus, the same whatever is visible; slices of one GPU (MIG) have the
    /// same.
    pub bus: String,
    /// Its own, or its slice's.
    pub uuid: String,
    /// Memory, bytes.
    pub bytes: u64,
    /// Major and minor.
    pub capability: (i32, i32),
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.bus)
    }
}

/// The driver and what it shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Driver {
    /// The newest CUDA that it serves, major and minor.
    pub version: (i32, i32),
    pub gpus: Vec<Gpu>,
}

/// Asks the driver.
///
/// # Errors
/// Why there is none, or none that works.
pub fn find() -> Result<Driver, String> {
    // SAFETY: looks whether the library can be loaded; the driver has no constructors that ask for
    // anything.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver is here (libcuda.so.1 cannot be loaded)".into());
    }

    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_STUB_LIBRARY)) => {
            let path = mapped("/libcuda.so")
                .map_or("libcuda.so".into(), |path| path.display().to_string());
            return Err(format!(
                "{path} is CUDA's stub of the driver, for linking only; take its folder out of LD_LIBRARY_PATH"
            ));
        }
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Ok(Driver { version: version()?, gpus: Vec::new() });
        }
        Err(error) => return Err(failed("cuInit", error)),
    }

    let count = result::device::get_count().map_err(|error| failed("cuDeviceGetCount", error))?;
    let gpus = (0..count).map(gpu).collect::<Result<_, _>>()?;
    Ok(Driver { version: version()?, gpus })
}

/// What a call to the driver ended with.
pub fn failed(call: &str, error: DriverError) -> String {
    format!("the driver answers {call} with {:?}", error.0)
}

fn version() -> Result<(i32, i32), String> {
    let mut version: c_int = 0;
    // SAFETY: the library is there, and the call writes one number.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|error| failed("cuDriverGetVersion", error))?;
    Ok((version / 1000, version % 1000 / 10))
}

fn gpu(index: c_int) -> Result<Gpu, String> {
    let read = || -> Result<Gpu, DriverError> {
        let device = result::device::get(index)?;
        let mut bus: [c_char; 32] = [0; 32];
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };

        // SAFETY: `device` comes from the driver, and `bus` is as long as is said.
        let (bytes, capability) = unsafe {
            sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as c_int, device).result()?;
            sys::cuDeviceGetUuid_v2(&raw mut uuid, device).result()?;
            let capability = (
                result::device::get_attribute(device, MAJOR)?,
                result::device::get_attribute(device, MINOR)?,
            );

            (result::device::total_mem(device)? as u64, capability)
        };

        // SAFETY: the driver ends it with a zero, as the array was before.
        let bus = unsafe { CStr::from_ptr(bus.as_ptr()) }.to_string_lossy().into_owned();
        let uuid = uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
        Ok(Gpu {
            index: index as usize,
            name: result::device::get_name(device)?,
            bus,
            uuid,
            bytes,
            capability,
        })
    };

    read().map_err(|error| failed("a question about a device", error))
}
