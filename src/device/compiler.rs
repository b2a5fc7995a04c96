//! NVRTC, the compiler of kernels: its functions out of the library beside libtorch, whatever others there are.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use libloading::os::unix::Symbol;

use super::libraries::nvrtc;

/// A program to be, or compiled.
type Program = *mut c_void;

type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

fn function<T>(name: &str) -> Result<Symbol<T>, String> {
    // SAFETY: the callers give the types that nvrtc.h declares.
    unsafe { nvrtc()?.get(name.as_bytes()) }.map_err(|error| format!("NVRTC has no {name} ({error})"))
}

/// A text that NVRTC has of a program.
fn text(program: Program, size: &str, get: &str) -> Result<CString, String> {
    let mut bytes: usize = 0;
    // SAFETY: room for one size, then for so many bytes, the zero at the end among them.
    let text = unsafe {
        function::<Size>(size)?(program, &raw mut bytes);
        let mut text = vec![0u8; bytes.max(1)];
        function::<Text>(get)?(program, text.as_mut_ptr().cast());
        text
    };
    CStr::from_bytes_until_nul(&text).map(CStr::to_owned).map_err(|error| format!("NVRTC: {error}"))
}

/// Compiles a source to PTX for a compute capability; products and sums are not contracted.
///
/// # Errors
/// What the compiler says, or why there is none.
pub fn ptx(name: &str, source: &str, (major, minor): (i32, i32)) -> Result<CString, String> {
    let c = |text: &str| CString::new(text).map_err(|error| format!("{name}: {error}"));
    let (source, file) = (c(source)?, c(name)?);
    let options = [c(&format!("--gpu-architecture=compute_{major}{minor}"))?, c("--fmad=false")?];
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program: Program = std::ptr::null_mut();
    // SAFETY: the strings live to the end of this function, and the program is destroyed before.
    unsafe {
        let created = function::<Create>("nvrtcCreateProgram")?(
            &raw mut program,
            source.as_ptr(),
            file.as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        );
        if created != 0 {
            return Err(format!("NVRTC answers nvrtcCreateProgram with {created}"));
        }
        let compile =
            function::<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int>("nvrtcCompileProgram")?;
        let result = match compile(program, options.len() as c_int, options.as_ptr()) {
            0 => text(program, "nvrtcGetPTXSize", "nvrtcGetPTX"),
            _ => {
                let log = text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
                Err(format!("{name} cannot be compiled: {}", log.to_string_lossy()))
            }
        };
        function::<unsafe extern "C" fn(*mut Program) -> c_int>("nvrtcDestroyProgram")?(&raw mut program);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_source_is_told() {
        if nvrtc().is_err() {
            return; // A libtorch of one's own without it.
        }
        let error = ptx("broken.cu", "extern \"C\" __global__ void f() { nothing; }", (9, 0)).unwrap_err();
        assert!(error.contains("broken.cu cannot be compiled") && error.contains("nothing"), "{error}");
    }
}
