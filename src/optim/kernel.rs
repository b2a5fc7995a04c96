//! An update on a GPU: `update.cu`, compiled for the device by NVRTC. It takes the norm from the
//! device's memory and decides there, so the host waits for nothing.

use std::ffi::c_void;
use std::ops::Range;

use cudarc::driver::sys;
use tch::{Device, Kind, Tensor};

use super::config::OptimizerConfig;
use super::{StateBuffer, UpdateScalars, ValueRange};
use crate::device::compiler::Source;
use crate::device::kernels::Kernel;
use crate::device::timing::Spans;
use crate::error::{Error, Result};
use crate::number::Number;
use crate::params::UpdateBuffers;

const SOURCE: Source = Source {
    name: "update.cu",
    text: concat!(include_str!("../device/bf16.cu"), include_str!("update.cu")),
};
/// Buffers of state that the kernel takes.
const STATE: usize = 2;

/// The constants of every rule, as the kernel has them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Common {
    mean: f32,
    clip: f32,
    keep: f32,
    horizon: f32,
}

impl Common {
    fn new(config: &OptimizerConfig, scalars: &UpdateScalars, horizon: f32) -> Common {
        Common {
            mean: scalars.mean as f32,
            clip: config.common.clip.map_or(0.0, |clip| clip as f32),
            keep: (1.0 - scalars.lr * config.common.weight_decay) as f32,
            horizon,
        }
    }
}

/// The constants of a rule, padded with zeros to the length that every pass takes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Constants([f32; 8]);

impl Constants {
    fn new(of_rule: &[f32]) -> Result<Constants> {
        let mut padded = [0.0; 8];
        let room = padded.get_mut(..of_rule.len());
        let room = room.ok_or_else(|| {
            Error::Internal(format!("{} constants of an optimizer", of_rule.len()))
        })?;
        room.copy_from_slice(of_rule);
        Ok(Constants(padded))
    }
}

/// A rule's pass on a device.
pub struct UpdateKernel {
    kernel: Kernel,
    /// A byte a value: whether it decays.
    decays: Tensor,
    times: Option<Spans>,
}

impl Drop for UpdateKernel {
    fn drop(&mut self) {
        // Only at the end of a good run all updates are done, and there is something to tell.
        let took = self.times.as_ref().and_then(|times| times.took().ok());
        if let Some((updates, took_ms)) = took.filter(|(updates, _)| *updates > 0) {
            tracing::debug!(updates, values = self.decays.numel(), took_ms, "updates of weights");
        }
    }
}

impl UpdateKernel {
    /// The pass of a rule, `entry`. `decay` says, sorted and without gaps, which parts of the
    /// buffer decay.
    ///
    /// # Errors
    /// As [`Kernel::new`].
    pub fn new(index: usize, entry: &str, decay: &[(Range<usize>, bool)]) -> Result<UpdateKernel> {
        let flags: Vec<u8> =
            decay.iter().flat_map(|(part, decays)| vec![u8::from(*decays); part.len()]).collect();
        let decays = Tensor::f_from_slice(&flags)?.f_to_device(Device::Cuda(index))?;
        Ok(UpdateKernel {
            kernel: Kernel::new(index, &SOURCE, entry)?,
            decays,
            times: Spans::new(index)?,
        })
    }

    /// Puts an update of some runs of the buffers on libtorch's stream of the device. `constants`
    /// are the rule's, in the order of its struct.
    pub fn update(
        &self,
        buffers: &UpdateBuffers,
        config: &OptimizerConfig,
        scalars: &UpdateScalars,
        constants: &[f32],
        state: &[StateBuffer],
        runs: &[ValueRange],
    ) -> Result<()> {
        let Number::Pending(norm) = scalars.norm else {
            return Err(Error::Internal("the norm of a gradient on a GPU is not on it".into()));
        };

        let norm = norm.f_to_kind(Kind::Float)?;

        let horizon = buffers.published.as_ref().map_or(0.0, |published| published.horizon);
        let (common, constants) =
            (Common::new(config, scalars, horizon), Constants::new(constants)?);
        let update = || {
            for run in runs.iter().filter(|run| !run.weights.is_empty()) {
                self.launch(Arguments {
                    common,
                    constants,
                    ..self.buffers(buffers, state, &norm, run)?
                })?;
            }

            Ok(())
        };

        match &self.times {
            Some(times) => times.around(update),
            None => update(),
        }
    }

    fn launch(&self, mut arguments: Arguments) -> Result<()> {
        let count = arguments.count;
        // SAFETY: the arguments are those of the kernel's declaration, in their order. The buffers
        // are f32 (`rounded` bf16, `decays` bytes) of `count` values on this device, as checked.
        // The stream is libtorch's own (its default, the null stream), so the pass comes after all
        // work on the buffers that has been asked for, and what libtorch does with their memory
        // later comes after the pass.
        unsafe { self.kernel.launch(count, std::ptr::null_mut(), &mut arguments.pointers()) }
    }

    /// Where a run of the buffers of an update lies: all on one device, long enough, of the types
    /// that the pass takes.
    fn buffers(
        &self,
        buffers: &UpdateBuffers,
        state: &[StateBuffer],
        norm: &Tensor,
        run: &ValueRange,
    ) -> Result<Arguments> {
        let UpdateBuffers { old, new, published, gradient } = buffers;
        let (device, start, count) = (new.device(), run.weights.start, run.weights.len());
        let at =
            |tensor: &Tensor, kind: Kind, start: usize, count: usize| -> Result<sys::CUdeviceptr> {
                if tensor.device() != device || !tensor.is_contiguous() || tensor.kind() != kind {
                    let found = format!(
                        "a buffer of the update is {:?} on {:?}",
                        tensor.kind(),
                        tensor.device()
                    );

                    return Err(Error::Internal(found));
                }

                if start + count > tensor.numel() {
                    return Err(Error::Internal("a buffer of an update is too short".into()));
                }

                Ok((tensor.data_ptr() as usize + start * kind.elt_size_in_bytes())
                    as sys::CUdeviceptr)
            };

        if run.state.len() > STATE {
            return Err(Error::Internal(format!(
                "{} buffers of state, the kernel takes {STATE}",
                run.state.len()
            )));
        }

        let here = |tensor: &Tensor, kind| at(tensor, kind, start, count);
        let updated = here(new, Kind::Float)?;
        let version = published.as_ref().map(|published| &*published.version);
        let version_of = |kind| {
            version.filter(|version| version.kind() == kind).map_or(Ok(0), |it| here(it, kind))
        };

        let state_at = |number: usize| {
            let start = run.state.get(number);
            start.map_or(Ok(0), |start| at(&state[number].values, Kind::Float, *start, count))
        };

        Ok(Arguments {
            updated,
            old: old.map_or(Ok(updated), |old| here(old, Kind::Float))?,
            published: version_of(Kind::Float)?,
            rounded: version_of(Kind::BFloat16)?,
            gradient: here(gradient, Kind::Float)?,
            first: state_at(0)?,
            second: state_at(1)?,
            decays: here(&self.decays, Kind::Uint8)?,
            norm: at(norm, Kind::Float, 0, 1)?,
            count: count as u64,
            common: Common::default(),
            constants: Constants::default(),
        })
    }
}

/// What a pass is given, in the order of its declaration.
struct Arguments {
    updated: sys::CUdeviceptr,
    old: sys::CUdeviceptr,
    published: sys::CUdeviceptr,
    rounded: sys::CUdeviceptr,
    gradient: sys::CUdeviceptr,
    first: sys::CUdeviceptr,
    second: sys::CUdeviceptr,
    decays: sys::CUdeviceptr,
    norm: sys::CUdeviceptr,
    count: u64,
    common: Common,
    constants: Constants,
}

impl Arguments {
    /// As the driver takes them.
    fn pointers(&mut self) -> [*mut c_void; 12] {
        [
            (&raw mut self.updated).cast(),
            (&raw mut self.old).cast(),
            (&raw mut self.published).cast(),
            (&raw mut self.rounded).cast(),
            (&raw mut self.gradient).cast(),
            (&raw mut self.first).cast(),
            (&raw mut self.second).cast(),
            (&raw mut self.decays).cast(),
            (&raw mut self.norm).cast(),
            (&raw mut self.count).cast(),
            (&raw mut self.common).cast(),
            (&raw mut self.constants).cast(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use libloading::os::unix::{Library, Symbol};

    use super::*;
    use crate::device::kernels::entry_name;
    use crate::device::kernels::tests::{compiles_for_gpus_of_today, for_processor};
    use crate::optim::adamw::Lead;
    use crate::optim::tests::{layout, wave};
    use crate::optim::{Optimizer, OptimizerKind, config, rule};
    use crate::params::{Layout, Published, slice, zeros};
    use crate::precision::Precision;

    fn of_kind(kind: OptimizerKind) -> OptimizerConfig {
        OptimizerConfig::of(config::Common { kind, ..config::Common::default() })
    }

    #[test]
    fn the_passes_compile_for_gpus_of_today() {
        let entries: Vec<&str> = OptimizerKind::ALL
            .map(|kind| rule(&of_kind(kind), 1, Precision::F32).kernel())
            .to_vec();
        compiles_for_gpus_of_today(&SOURCE, &entries);
    }

    #[test]
    fn a_rule_that_the_kernel_does_not_know_is_an_error() {
        for kind in OptimizerKind::ALL {
            assert!(entry_name(&SOURCE, rule(&of_kind(kind), 1, Precision::F32).kernel()).is_ok());
        }
        let error = entry_name(&SOURCE, "update_muon").unwrap_err().to_string();
        assert!(error.contains("no update_muon"), "{error}");
    }

    type Pass = unsafe extern "C" fn(
        *mut f32,
        *const f32,
        *mut f32,
        *mut u16,
        *mut f32,
        *mut f32,
        *mut f32,
        *const u8,
        *const f32,
        u64,
        Common,
        Constants,
    );

    /// A set of weights with its state, as the kernel takes it.
    struct Buffers {
        weights: Vec<f32>,
        published: Vec<f32>,
        rounded: Vec<u16>,
        gradient: Vec<f32>,
        state: [Vec<f32>; STATE],
        decays: Vec<u8>,
    }

    impl Buffers {
        fn new(layout: &Layout) -> Buffers {
            let n = layout.len;
            let decays = crate::optim::decaying(layout);
            Buffers {
                weights: slice(&wave(n, 0.7, 0.0)).to_vec(),
                published: vec![0.0; n],
                rounded: vec![0; n],
                gradient: vec![0.0; n],
                state: [vec![0.0; n], vec![0.0; n]],
                decays: decays
                    .iter()
                    .flat_map(|(part, decays)| vec![u8::from(*decays); part.len()])
                    .collect(),
            }
        }

        /// One update by the source's pass of a rule.
        fn pass(
            &mut self,
            library: &Library,
            entry: &str,
            norm: f32,
            common: Common,
            rule: &[f32],
        ) {
            // SAFETY: the type is that of the source's declaration.
            let pass: Symbol<Pass> =
                unsafe { library.get(format!("{entry}\0").as_bytes()) }.unwrap();
            let old = self.weights.clone();
            self.weights.fill(f32::NAN);
            let [first, second] = &mut self.state;
            // SAFETY: every buffer has as many values.
            unsafe {
                pass(
                    self.weights.as_mut_ptr(),
                    old.as_ptr(),
                    self.published.as_mut_ptr(),
                    self.rounded.as_mut_ptr(),
                    self.gradient.as_mut_ptr(),
                    first.as_mut_ptr(),
                    second.as_mut_ptr(),
                    self.decays.as_ptr(),
                    &raw const norm,
                    old.len() as u64,
                    common,
                    Constants::new(rule).unwrap(),
                );
            }
        }
    }

    /// Our host pass and the kernel's source over the same buffers, three times: the same bits in
    /// all of them, in the versions that are published ahead of the weights too.
    fn is_that_of_the_processor(config: &OptimizerConfig) {
        let folder = tempfile::tempdir().unwrap();
        let (library, layout) = (for_processor(&SOURCE, folder.path()), layout());
        let mut optimizer =
            Optimizer::new(config, &layout, 2, Precision::F32, 1, Device::Cpu).unwrap();
        let mut weights = wave(layout.len, 0.7, 0.0);
        let mut version = zeros(layout.len, Device::Cpu).unwrap();
        let mut buffers = Buffers::new(&layout);
        for n in 1..4 {
            let norm = if n == 2 { f32::NAN } else { 3.0 };
            let number = Number::Known(f64::from(norm));
            let scalars = UpdateScalars { lr: 0.01, mean: 0.5, norm: &number };
            let horizon = if n == 1 { 0.0 } else { 1.75 };
            let mut gradient = wave(layout.len, 0.1 * n as f32, 0.0);
            buffers.gradient = slice(&gradient).to_vec();
            let published = Some(Published { version: &mut version, horizon });
            let into =
                UpdateBuffers { old: None, new: &mut weights, published, gradient: &mut gradient };
            optimizer.update(into, &scalars).unwrap();

            let step = optimizer.step(&scalars, 1.0);
            let common = Common::new(config, &scalars, horizon);
            let rule = rule(config, 2, Precision::F32);
            buffers.pass(&library, rule.kernel(), norm, common, &rule.constants(&step));
            assert_eq!(buffers.weights, slice(&weights), "{config:?} {n}");
            for (ours, theirs) in optimizer.state().iter().zip(&buffers.state) {
                assert_eq!(slice(&ours.values), theirs, "{} of {config:?} {n}", ours.name);
            }
            assert_eq!(buffers.gradient, slice(&zeros(layout.len, Device::Cpu).unwrap()));
            assert_eq!(buffers.published, slice(&version), "{config:?} {n}");
            let narrow = version.to_kind(Kind::BFloat16).view_dtype(Kind::Int16);
            let expected: Vec<i16> = Vec::try_from(narrow).unwrap();
            assert_eq!(
                buffers.rounded.iter().map(|bits| *bits as i16).collect::<Vec<_>>(),
                expected
            );
        }
    }

    #[test]
    fn the_passes_are_those_of_the_processor() {
        let of = |kind| {
            let common =
                config::Common { kind, weight_decay: 0.1, clip: None, ..config::Common::default() };
            OptimizerConfig::of(common)
        };
        is_that_of_the_processor(&of(OptimizerKind::Adamw));
        let mut leading = of(OptimizerKind::Adamw);
        leading.adamw.lead = Some(Lead::Delay);
        is_that_of_the_processor(&leading);
        is_that_of_the_processor(&of(OptimizerKind::Sgd));
    }

    /// Clipping: the scale that the processor takes, in f32.
    #[test]
    fn the_pass_clips() {
        let folder = tempfile::tempdir().unwrap();
        let (library, layout) = (for_processor(&SOURCE, folder.path()), layout());
        for (norm, factor) in [(8.0f32, 0.25f32), (1.0, 1.0)] {
            let mut buffers = Buffers::new(&layout);
            let before = buffers.weights.clone();
            buffers.gradient.fill(2.0);
            let common = Common { mean: 0.5, clip: 1.0, keep: 1.0, horizon: 0.0 };
            buffers.pass(&library, "update_sgd", norm, common, &[0.0, 1.0]);
            let moved = before[7] - buffers.weights[7];
            assert!((moved - 2.0 * 0.5 * factor).abs() < 1e-5, "{norm}: {moved}");
        }
    }
}
