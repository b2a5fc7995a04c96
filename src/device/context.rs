//! Switches of libtorch that `tch` does not have: methods of `at::Context` in the very release that this program is built
//! for ([`crate::runtime::check_libtorch`]), called by the names that the compiler has given them.

use std::ffi::c_void;

use libloading::os::unix::Library;

use crate::error::{Error, Result};

/// The address of a method, which is there in libtorch.
fn method<T: Copy>(name: &str) -> Result<T> {
    let missing = |error| Error::Internal(format!("libtorch has no {name} ({error})"));
    let this = Library::this();
    // SAFETY: the callers give the type that the method's declaration in ATen/Context.h has.
    unsafe { this.get::<T>(name.as_bytes()).map(|symbol| *symbol).map_err(missing) }
}

/// `at::globalContext()`.
fn context() -> Result<*mut c_void> {
    // SAFETY: `at::Context& at::globalContext()`; a reference is returned as a pointer.
    Ok(unsafe { method::<unsafe extern "C" fn() -> *mut c_void>("_ZN2at13globalContextEv")?() })
}

/// Matrix products of f32 on tensor cores, with 10 bits of mantissa (`Context::setAllowTF32CuBLAS`, `setAllowTF32CuDNN`).
///
/// # Errors
/// If this libtorch does not have the switches.
pub fn allow_tf32(allowed: bool) -> Result<()> {
    type Set = unsafe extern "C" fn(*mut c_void, bool);
    for name in ["_ZN2at7Context18setAllowTF32CuBLASEb", "_ZN2at7Context17setAllowTF32CuDNNEb"] {
        // SAFETY: `void (Context::*)(bool)`, whose hidden argument is the object.
        unsafe { method::<Set>(name)?(context()?, allowed) };
    }
    Ok(())
}

/// Operations that have a deterministic form take it, and those that have none are an error
/// (`Context::setDeterministicAlgorithms`, `setDeterministicCuDNN`).
///
/// # Errors
/// If this libtorch does not have the switches.
pub fn deterministic() -> Result<()> {
    type Set = unsafe extern "C" fn(*mut c_void, bool);
    type SetTwo = unsafe extern "C" fn(*mut c_void, bool, bool);
    // SAFETY: `void (Context::*)(bool, bool)` and `void (Context::*)(bool)`, as above; the second of two says whether to warn only.
    unsafe {
        method::<SetTwo>("_ZN2at7Context26setDeterministicAlgorithmsEbb")?(context()?, true, false);
        method::<Set>("_ZN2at7Context21setDeterministicCuDNNEb")?(context()?, true);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_libtorch_has_the_switches() {
        allow_tf32(true).unwrap();
        allow_tf32(false).unwrap();
        assert!(method::<unsafe extern "C" fn()>("_ZN2at7Context9noSuchOneEv").is_err());
    }
}
