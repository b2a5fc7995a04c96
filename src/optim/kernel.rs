//! An update on a GPU: `update.cu`, compiled for the device by NVRTC. It takes the norm from the device's memory and
//! decides there, so the host waits for nothing.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};
use tch::{Device, Kind, Tensor};

use super::Terms;
use crate::config::{OptimizerConfig, OptimizerKind};
use crate::device::{compiler, driver};
use crate::error::{Error, Result};
use crate::number::Number;
use crate::params::Flats;

const SOURCE: &str = include_str!("update.cu");
const THREADS: u32 = 256;
/// Blocks at most; a thread goes through the buffer with their stride.
const BLOCKS: u64 = 1 << 14;

/// The constants of one update, as the kernel has them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    mean: f32,
    clip: f32,
    keep: f32,
    beta1: f32,
    beta2: f32,
    step: f32,
    root: f32,
    eps: f32,
    kind: i32,
}

impl Rule {
    /// Those of the n-th update.
    pub fn new(config: &OptimizerConfig, n: i32, terms: &Terms) -> Rule {
        let (mean, keep) = (terms.mean as f32, (1.0 - terms.lr * config.weight_decay) as f32);
        let clip = config.clip.map_or(0.0, |clip| clip as f32);
        let [beta1, beta2] = config.betas;
        match config.kind {
            OptimizerKind::Adamw => {
                let step = (terms.lr / (1.0 - beta1.powi(n))) as f32;
                let root = (1.0 - beta2.powi(n)).sqrt() as f32;
                let (beta1, beta2, eps) = (beta1 as f32, beta2 as f32, config.eps as f32);
                Rule { mean, clip, keep, beta1, beta2, step, root, eps, kind: 0 }
            }
            OptimizerKind::Sgd => {
                let (beta1, step) = (config.momentum as f32, terms.lr as f32);
                Rule { mean, clip, keep, beta1, beta2: 0.0, step, root: 1.0, eps: 0.0, kind: 1 }
            }
        }
    }
}

/// The kernel, loaded on a device.
pub struct Kernel {
    context: Arc<CudaContext>,
    function: sys::CUfunction,
    /// A byte a value: whether it decays.
    decays: Tensor,
}

impl Kernel {
    /// Compiles and loads the pass for a device. `decay` says, sorted and without gaps, which parts of the buffer decay.
    ///
    /// # Errors
    /// [`Error::Config`] about `device` if that cannot be.
    pub fn new(index: usize, decay: &[(Range<usize>, bool)]) -> Result<Kernel> {
        let unusable = |why: String| {
            Error::config("device", format!("`cuda`, but {why}"), "see ouroboros doctor, or set device = \"cpu\"")
        };
        let failed = |call: &'static str| move |error| unusable(driver::failed(call, error));
        let context = CudaContext::new(index).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let capability = context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?;
        let image = compiler::ptx("update.cu", SOURCE, capability).map_err(unusable)?;
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: the image is PTX that ends with a zero; the module is never unloaded, so its function stays.
        let function = unsafe {
            let module =
                result::module::load_data(image.as_ptr().cast::<c_void>()).map_err(failed("cuModuleLoadData"))?;
            result::module::get_function(module, c"update".to_owned()).map_err(failed("cuModuleGetFunction"))?
        };
        let flags: Vec<u8> = decay.iter().flat_map(|(part, decays)| vec![u8::from(*decays); part.len()]).collect();
        let decays = Tensor::f_from_slice(&flags)?.f_to_device(Device::Cuda(index))?;
        Ok(Kernel { context, function, decays })
    }

    /// Puts the n-th update on libtorch's stream of the device.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn update(
        &self,
        flats: Flats,
        config: &OptimizerConfig,
        n: i32,
        terms: &Terms,
        [first, second]: [&Tensor; 2],
    ) -> Result<()> {
        let Flats { old, new, rounded, gradient } = flats;
        let Number::Pending(norm) = terms.norm else {
            return Err(Error::Internal("the norm of a gradient on a GPU is not on it".into()));
        };
        let norm = norm.f_to_kind(Kind::Float)?;
        let count = new.numel() as u64;
        if count == 0 {
            return Ok(());
        }
        let device = new.device();
        let here = |tensor: &Tensor, kind| -> Result<sys::CUdeviceptr> {
            match tensor.device() == device && tensor.is_contiguous() && tensor.kind() == kind {
                true => Ok(tensor.data_ptr() as sys::CUdeviceptr),
                false => Err(Error::Internal(format!(
                    "a buffer of the update is {:?} on {:?}",
                    tensor.kind(),
                    tensor.device()
                ))),
            }
        };
        let long = [Some(&*new), old, Some(&*gradient), Some(first), Some(&self.decays)];
        if long.into_iter().flatten().any(|buffer| buffer.numel() as u64 != count) {
            return Err(Error::Internal("the buffers of an update differ in length".into()));
        }
        let mut updated = here(new, Kind::Float)?;
        let mut old = old.map_or(Ok(updated), |old| here(old, Kind::Float))?;
        let mut rounded = rounded.map_or(Ok(0), |rounded| here(rounded, Kind::BFloat16))?;
        let (mut gradient, mut first) = (here(gradient, Kind::Float)?, here(first, Kind::Float)?);
        let mut second = if second.numel() > 0 { here(second, Kind::Float)? } else { 0 };
        let (mut decays, mut norm) = (here(&self.decays, Kind::Uint8)?, here(&norm, Kind::Float)?);
        let (mut count, mut rule) = (count, Rule::new(config, n, terms));
        let mut arguments: [*mut c_void; 10] = [
            (&raw mut updated).cast(),
            (&raw mut old).cast(),
            (&raw mut rounded).cast(),
            (&raw mut gradient).cast(),
            (&raw mut first).cast(),
            (&raw mut second).cast(),
            (&raw mut decays).cast(),
            (&raw mut norm).cast(),
            (&raw mut count).cast(),
            (&raw mut rule).cast(),
        ];
        let blocks = count.div_ceil(u64::from(THREADS)).min(BLOCKS) as u32;
        let failed = |error| Error::Device(driver::failed("cuLaunchKernel", error));
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the arguments are those of the kernel's declaration, in their order, and are read before the call returns.
        // The buffers are f32 (`rounded` bf16, `decays` bytes) of `count` values on this device, as checked. The stream is
        // libtorch's own (its default, the null stream), so the pass comes after all work on the buffers that has been
        // asked for, and what libtorch does with their memory later comes after the pass.
        unsafe {
            let stream = std::ptr::null_mut();
            result::launch_kernel(self.function, (blocks, 1, 1), (THREADS, 1, 1), 0, stream, &mut arguments)
                .map_err(failed)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use libloading::os::unix::Library;

    use super::*;
    use crate::device::libraries;
    use crate::optim::host::{self, Slices, Step};

    #[test]
    fn the_pass_compiles_for_gpus_of_today() {
        if libraries::nvrtc().is_err() {
            return; // The set-up brings it; a libtorch of one's own may not.
        }
        for capability in [(8, 0), (9, 0), (10, 0)] {
            let ptx = compiler::ptx("update.cu", SOURCE, capability).unwrap().into_string().unwrap();
            assert!(ptx.contains(".entry update"), "{ptx}");
            assert!(!ptx.contains("fma.rn"), "contracted: {ptx}");
        }
    }

    type Pass = unsafe extern "C" fn(
        *mut f32,
        *const f32,
        *mut u16,
        *mut f32,
        *mut f32,
        *mut f32,
        *const u8,
        *const f32,
        u64,
        Rule,
    );

    /// The same source for the processor: one block of one thread.
    fn compiled(folder: &std::path::Path) -> Library {
        let head = "#include <cmath>\n#include <cstring>\n#define __device__\n#define __global__\n\
                    static struct { unsigned x; } blockIdx{0}, threadIdx{0}, blockDim{1}, gridDim{1};\n\
                    static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }\n";
        let (source, library) = (folder.join("update.cpp"), folder.join("update.so"));
        std::fs::write(&source, format!("{head}{SOURCE}")).unwrap();
        let mut command = Command::new("c++");
        command.args(["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
        assert!(command.status().unwrap().success());
        // SAFETY: the library was made above and has no constructors.
        unsafe { Library::open(Some(&library), libloading::os::unix::RTLD_NOW) }.unwrap()
    }

    fn wave(len: usize, pace: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * pace).sin()).collect()
    }

    /// Both passes over the same buffers, three times: the same bits in all of them.
    #[test]
    fn the_pass_is_that_of_the_processor() {
        const N: usize = 1000;
        let folder = tempfile::tempdir().unwrap();
        let library = compiled(folder.path());
        // SAFETY: the type is that of the source's declaration.
        let pass = unsafe { library.get::<Pass>(b"update\0") }.unwrap();
        let decay = [(0..600, true), (600..N, false)];
        let decays: Vec<u8> = (0..N).map(|i| u8::from(i < 600)).collect();
        for kind in [OptimizerKind::Adamw, OptimizerKind::Sgd] {
            let config = OptimizerConfig { kind, weight_decay: 0.1, clip: None, ..OptimizerConfig::default() };
            let (mut w, mut m, mut v) = (wave(N, 0.7), vec![0.0f32; N], vec![0.0f32; N]);
            let (mut w2, mut m2, mut v2) = (w.clone(), m.clone(), v.clone());
            for n in 1..4 {
                let mut g = wave(N, 0.1 * n as f32);
                let mut g2 = g.clone();
                let norm = if n == 2 { f32::NAN } else { 3.0 };
                let terms = Terms { lr: 0.01, mean: 0.5, norm: &Number::Known(f64::from(norm)) };
                if norm.is_finite() {
                    let second = if kind == OptimizerKind::Adamw { &mut v[..] } else { &mut [] };
                    let slices = Slices { old: None, new: &mut w, gradient: &mut g, first: &mut m, second };
                    host::update(slices, &Step::new(&config, n, terms.lr, terms.mean), &decay, None);
                }
                let (old, mut rounded) = (w2.clone(), vec![0u16; N]);
                w2.fill(f32::NAN);
                let rule = Rule::new(&config, n, &terms);
                // SAFETY: every buffer has N values.
                unsafe {
                    pass(
                        w2.as_mut_ptr(),
                        old.as_ptr(),
                        rounded.as_mut_ptr(),
                        g2.as_mut_ptr(),
                        m2.as_mut_ptr(),
                        v2.as_mut_ptr(),
                        decays.as_ptr(),
                        &raw const norm,
                        N as u64,
                        rule,
                    );
                }
                assert_eq!((&w2, &m2, &v2), (&w, &m, &v), "{kind:?} {n}");
                assert_eq!(g2, [0.0; N]);
                let narrow = Tensor::from_slice(&w).to_kind(Kind::BFloat16).view_dtype(Kind::Int16);
                let expected: Vec<i16> = Vec::try_from(narrow).unwrap();
                assert_eq!(rounded.iter().map(|bits| *bits as i16).collect::<Vec<_>>(), expected);
            }
        }
    }

    /// Clipping: the scale that the processor takes, in f32.
    #[test]
    fn the_pass_clips() {
        let folder = tempfile::tempdir().unwrap();
        let library = compiled(folder.path());
        // SAFETY: the type is that of the source's declaration.
        let pass = unsafe { library.get::<Pass>(b"update\0") }.unwrap();
        let config = OptimizerConfig {
            kind: OptimizerKind::Sgd,
            weight_decay: 0.0,
            clip: Some(1.0),
            ..OptimizerConfig::default()
        };
        for (norm, factor) in [(8.0f32, 0.25f32), (1.0, 1.0)] {
            let terms = Terms { lr: 1.0, mean: 0.5, norm: &Number::Known(0.0) };
            let (old, mut w, mut g, mut m, mut v) = ([1.0f32], [0.0f32], [2.0f32], [0.0f32], [0.0f32]);
            let (w_, g_, m_, v_) = (w.as_mut_ptr(), g.as_mut_ptr(), m.as_mut_ptr(), v.as_mut_ptr());
            let (none, decays) = (std::ptr::null_mut(), [0u8]);
            // SAFETY: one value in every buffer; none where versions are f32.
            unsafe {
                let rule = Rule::new(&config, 1, &terms);
                pass(w_, old.as_ptr(), none, g_, m_, v_, decays.as_ptr(), &raw const norm, 1, rule);
            }
            assert!((w[0] - (1.0 - 2.0 * 0.5 * factor)).abs() < 1e-5, "{norm}: {}", w[0]);
        }
    }
}
