//! Switches of libtorch that `tch` does not have: methods of `at::Context` in the very release that
//! this program is built for ([`crate::runtime::check_libtorch`]), called by the names that the
//! compiler has given them.

use std::ffi::{c_int, c_void};

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

/// Matrix products of f32 on tensor cores, with 10 bits of mantissa (`Context::setAllowTF32CuBLAS`,
/// `setAllowTF32CuDNN`).
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
    // SAFETY: `void (Context::*)(bool, bool)` and `void (Context::*)(bool)`, as above; the second
    // of two says whether to warn only.
    unsafe {
        method::<SetTwo>("_ZN2at7Context26setDeterministicAlgorithmsEbb")?(context()?, true, false);
        method::<Set>("_ZN2at7Context21setDeterministicCuDNNEb")?(context()?, true);
    }

    Ok(())
}

/// Leaves so many multiprocessors of the device to others: products then take as many fewer,
/// instead of waiting for the blocks of threads that find none free
/// (`Context::_setSMCarveout_EXPERIMENTAL`, which libtorch heeds where cuBLASLt makes the product,
/// `setBlasPreferredBackend`). On Hopper products fill the device with blocks that stay, so that
/// one multiprocessor less can double their time. Source: pytorch issue 143988 and its answer
/// 144974.
///
/// # Errors
/// If this libtorch does not have the switches.
pub fn leave_multiprocessors(count: i32) -> Result<()> {
    /// `at::BlasBackend::Cublaslt`, ATen/BlasBackend.h.
    const CUBLASLT: i8 = 2;
    type Prefer = unsafe extern "C" fn(*mut c_void, i8);
    if count <= 0 {
        return Ok(());
    }

    // SAFETY: `void (Context::*)(at::BlasBackend)`, an `enum class : int8_t`, of a libtorch whose
    // CUDA half has been loaded.
    unsafe {
        method::<Prefer>("_ZN2at7Context23setBlasPreferredBackendENS_11BlasBackendE")?(
            context()?,
            CUBLASLT,
        )
    };

    carve_out(Some(count))
}

fn carve_out(count: Option<i32>) -> Result<()> {
    type Set = unsafe extern "C" fn(*mut c_void, u64);
    let optional = count.map_or(0, |count| 1 << 32 | u64::from(count as u32));
    // libtorch warns that this may go away; the names of its methods are looked up anyway.
    let level = warnings();
    // SAFETY: as in `warnings`.
    let before = level.map(|level| unsafe { level.replace(ERRORS_ONLY) });
    // SAFETY: `void (Context::*)(std::optional<int32_t>)`; that is trivial to copy and 8 bytes
    // long, so it travels in one register: the value, then in the fifth byte whether there is one.
    unsafe {
        method::<Set>("_ZN2at7Context27_setSMCarveout_EXPERIMENTALESt8optionalIiE")?(
            context()?,
            optional,
        )
    };

    if let (Some(level), Some(before)) = (level, before) {
        // SAFETY: as in `warnings`.
        unsafe { level.write(before) };
    }

    Ok(())
}

/// Lets libtorch warn wherever a call of this process waits for a device
/// (`c10::cuda::warning_state()`), for `scripts/gpu-check.sh`: in the steady state there must be
/// none. Only of a libtorch whose CUDA half is loaded.
pub fn warn_of_waits() {
    /// `SyncDebugMode::L_WARN`, c10/cuda/CUDAFunctions.h.
    const WARN: c_int = 1;
    let this = Library::this();
    // SAFETY: the address of the static in `c10::cuda::warning_state()`, a class whose only member
    // is an `enum class` of int's size.
    let state =
        unsafe { this.get::<*mut c_int>(b"_ZZN3c104cuda13warning_stateEvE14warning_state_") };
    match state.map(|symbol| symbol.into_raw().cast::<c_int>()) {
        // SAFETY: as above; it is read without a lock by libtorch too.
        Ok(state) => unsafe { state.write(WARN) },
        Err(error) => tracing::debug!(%error, "libtorch cannot tell where it waits for the device"),
    }
}

/// What libtorch logs from on, and errors among that.
const ERRORS_ONLY: c_int = 2;

/// `FLAGS_caffe2_log_level`, an int of libc10's that lives as long as it.
fn warnings() -> Option<*mut c_int> {
    let this = Library::this();
    // SAFETY: the address of a variable, which is asked for before other threads of ours use
    // libtorch.
    unsafe {
        this.get::<*mut c_int>(b"FLAGS_caffe2_log_level")
            .ok()
            .map(|symbol| symbol.into_raw().cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_libtorch_has_the_switches() {
        allow_tf32(true).unwrap();
        allow_tf32(false).unwrap();
        assert!(
            method::<unsafe extern "C" fn()>(
                "_ZN2at7Context23setBlasPreferredBackendENS_11BlasBackendE"
            )
            .is_ok()
        );
        assert!(method::<unsafe extern "C" fn()>("_ZN2at7Context9noSuchOneEv").is_err());
    }

    /// An optional number travels as it is meant: libtorch tells the same back.
    #[test]
    fn multiprocessors_are_left() {
        type Get = unsafe extern "C" fn(*mut c_void) -> u64;
        for count in [Some(3), None] {
            carve_out(count).unwrap();
            // SAFETY: `std::optional<int32_t> (Context::*)() const`, which comes back in one
            // register.
            let found = unsafe {
                method::<Get>("_ZNK2at7Context24_SMCarveout_EXPERIMENTALEv").unwrap()(
                    context().unwrap(),
                )
            };
            assert_eq!((found >> 32 & 1 == 1).then_some(found as i32), count);
        }
    }
}
