//! NVRTC, the compiler of kernels: its functions out of the library beside libtorch, whatever
//! others there are.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex};

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
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Bytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Count = unsafe extern "C" fn(*mut c_int) -> c_int;

/// `NVRTC_ERROR_INVALID_OPTION`: what it says to a chip that it does not know.
const INVALID_OPTION: c_int = 5;

/// The source of a file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// As compilers name it in what they say.
    pub name: &'static str,
    pub text: &'static str,
}

/// What a compiler makes of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// For one chip: any driver of the major version of CUDA loads it.
    Cubin,
    /// For that chip and later ones: compiled once more by the driver, which must be as new as the
    /// compiler.
    Ptx,
}

fn function<T>(name: &str) -> Result<Symbol<T>, String> {
    // SAFETY: the callers give the types that nvrtc.h declares.
    unsafe { nvrtc()?.get(name.as_bytes()) }
        .map_err(|error| format!("NVRTC has no {name} ({error})"))
}

/// A program of NVRTC's, destroyed when it is dropped.
struct Compilation(Program);

impl Compilation {
    fn new(source: &Source) -> Result<Compilation, String> {
        let c =
            |text: &str| CString::new(text).map_err(|error| format!("{}: {error}", source.name));
        let (text, file) = (c(source.text)?, c(source.name)?);
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: room for one program; NVRTC copies the strings.
        let created = unsafe {
            function::<Create>("nvrtcCreateProgram")?(
                &raw mut program,
                text.as_ptr(),
                file.as_ptr(),
                0,
                none,
                none,
            )
        };

        match created {
            0 => Ok(Compilation(program)),
            _ => Err(format!("NVRTC answers nvrtcCreateProgram with {created}")),
        }
    }

    /// Compiles for an architecture; products and sums are not contracted. The code of what went
    /// wrong.
    fn compile(&self, architecture: &str) -> Result<c_int, String> {
        let option = |text: String| CString::new(text).map_err(|error| error.to_string());
        let options =
            [option(format!("--gpu-architecture={architecture}"))?, option("--fmad=false".into())?];
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the strings live to the end of the call.
        Ok(unsafe {
            function::<Compile>("nvrtcCompileProgram")?(
                self.0,
                options.len() as c_int,
                options.as_ptr(),
            )
        })
    }

    /// Bytes that NVRTC has of the program.
    fn bytes(&self, size: &str, get: &str) -> Result<Vec<u8>, String> {
        let mut count: usize = 0;
        // SAFETY: room for one size, then for so many bytes.
        unsafe {
            function::<Size>(size)?(self.0, &raw mut count);
            let mut bytes = vec![0u8; count.max(1)];
            function::<Bytes>(get)?(self.0, bytes.as_mut_ptr().cast());
            Ok(bytes)
        }
    }

    fn log(&self) -> String {
        let bytes = self.bytes("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").unwrap_or_default();
        CStr::from_bytes_until_nul(&bytes)
            .map(|text| text.to_string_lossy().into_owned())
            .unwrap_or_default()
    }
}

impl Drop for Compilation {
    fn drop(&mut self) {
        if let Ok(destroy) = function::<Destroy>("nvrtcDestroyProgram") {
            // SAFETY: it was created, and nobody uses it any more.
            unsafe { destroy(&raw mut self.0) };
        }
    }
}

/// The newest architecture that NVRTC knows and that is not newer than a compute capability.
fn known(major: i32, minor: i32) -> Result<i32, String> {
    let mut count: c_int = 0;
    // SAFETY: room for one number, then for so many.
    let all = unsafe {
        function::<Count>("nvrtcGetNumSupportedArchs")?(&raw mut count);
        let mut all = vec![0; count.max(0) as usize];
        function::<Count>("nvrtcGetSupportedArchs")?(all.as_mut_ptr());
        all
    };

    let older = all.into_iter().filter(|found| *found <= 10 * major + minor);
    older
        .max()
        .ok_or_else(|| format!("NVRTC compiles for no GPU of compute capability {major}.{minor}"))
}

/// Compiles a source for a compute capability.
///
/// # Errors
/// What the compiler says, or why there is none.
pub fn compiled(
    source: &Source,
    (major, minor): (i32, i32),
    form: Form,
) -> Result<Vec<u8>, String> {
    let compilation = Compilation::new(source)?;
    let (prefix, size, get) = match form {
        Form::Cubin => ("sm", "nvrtcGetCUBINSize", "nvrtcGetCUBIN"),
        Form::Ptx => ("compute", "nvrtcGetPTXSize", "nvrtcGetPTX"),
    };

    match compilation.compile(&format!("{prefix}_{major}{minor}"))? {
        0 => compilation.bytes(size, get),
        // A chip that is newer than the compiler: its driver knows how to go on from an older
        // one's.
        INVALID_OPTION if form == Form::Cubin => {
            let older = known(major, minor)?;
            compiled(source, (older / 10, older % 10), Form::Ptx)
        }
        _ => Err(format!("{} cannot be compiled: {}", source.name, compilation.log())),
    }
}

/// What the driver loads for a source on a device of a compute capability: compiled once a process.
///
/// # Errors
/// As [`compiled`].
pub fn image(source: &Source, capability: (i32, i32)) -> Result<Arc<Vec<u8>>, String> {
    type Images = BTreeMap<(Source, (i32, i32)), Arc<Vec<u8>>>;
    static IMAGES: Mutex<Images> = Mutex::new(BTreeMap::new());
    let mut images = IMAGES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(image) = images.get(&(*source, capability)) {
        return Ok(Arc::clone(image));
    }

    let image = Arc::new(compiled(source, capability, Form::Cubin)?);
    images.insert((*source, capability), Arc::clone(&image));
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source = Source {
        name: "right.cu",
        text: "extern \"C\" __global__ void f(float *x) { x[0] = 1.0f; }",
    };

    #[test]
    fn what_is_wrong_with_a_source_is_told() {
        if nvrtc().is_err() {
            return; // A libtorch of one's own without it.
        }
        let source =
            Source { name: "broken.cu", text: "extern \"C\" __global__ void f() { nothing; }" };
        let error = image(&source, (9, 0)).unwrap_err();
        assert!(
            error.contains("broken.cu cannot be compiled") && error.contains("nothing"),
            "{error}"
        );
    }

    /// Machine code where the chip is known; else what an older one's driver is given.
    #[test]
    fn a_chip_of_tomorrow_is_given_what_one_of_today_is() {
        if nvrtc().is_err() {
            return;
        }
        let image = image(&SOURCE, (9, 0)).unwrap();
        assert_eq!(image[..4], *b"\x7fELF");
        let older = compiled(&SOURCE, (99, 0), Form::Cubin).unwrap();
        assert!(String::from_utf8_lossy(&older).contains(".entry f"));
        let error = compiled(&SOURCE, (2, 0), Form::Cubin).unwrap_err();
        assert!(error.contains("no GPU of compute capability 2.0"), "{error}");
    }
}
