//! The weights of a stage: one flat buffer per version, one flat buffer of gradients; parameters are views.
//!
//! ```text
//! version n lives in buffer n mod (D + 1)
//!
//! buffer 0   [ norm1 | qkv | ... ]   version 3     <- update 2 wrote it over version 0
//! buffer 1   [ norm1 | qkv | ... ]   version 1     <- step 4 runs on it, its graph points here
//! buffer 2   [ norm1 | qkv | ... ]   version 2
//! gradient   [ norm1 | qkv | ... ]                 every version's parameters add theirs into this one
//! ```
//!
//! A table that two ends use has a side for each: its own leaves over the same buffers, its own gradient.
//!
//! An update reads the newest buffer and writes the next one, so a saved graph keeps pointing at the weights that it
//! was made with. The schedule guarantees that nothing reads the buffer that is overwritten.
//!
//! Where the versions are bf16, updates change an f32 master and round it into the next buffer; and a backward adds into a
//! bf16 gradient, which is then added to the f32 one (`collect`).
//!
//! Every parameter starts at a multiple of 256 bytes of its buffer, as libtorch's own tensors do at least of 64 (on a GPU of
//! 512, of which products look at 256): matrix products may take another path (and so round in another way) for other
//! alignments, and the oracle must see the same numbers.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::model::{Parameter, initial};

/// 256 bytes of bf16.
const ALIGN: usize = 128;

/// Where one parameter stands in the flat buffers.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub parameter: Parameter,
    pub offset: usize,
}

/// The order of the parameters in the flat buffers of a stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    pub entries: Vec<Entry>,
    /// Length of a flat buffer, padding included (always 0).
    pub len: usize,
}

impl Layout {
    /// Parameters one after the other, each aligned.
    pub fn new(parameters: &[Parameter]) -> Layout {
        let mut len: usize = 0;
        let entries = parameters
            .iter()
            .map(|parameter| {
                let offset = len;
                len = (offset + parameter.count()).next_multiple_of(ALIGN);
                Entry { parameter: parameter.clone(), offset }
            })
            .collect();
        Layout { entries, len }
    }

    /// Where a parameter begins; behind the last one the end of the buffer.
    pub fn offset(&self, parameter: usize) -> usize {
        self.entries.get(parameter).map_or(self.len, |entry| entry.offset)
    }

    /// Values of all parameters, padding not counted.
    pub fn count(&self) -> usize {
        self.entries.iter().map(|entry| entry.parameter.count()).sum()
    }

    /// Views of a flat buffer, one a parameter.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn views(&self, flat: &Tensor) -> Result<Vec<Tensor>> {
        let view = |entry: &Entry| -> Result<Tensor> {
            let (offset, count) = (entry.offset as i64, entry.parameter.count() as i64);
            Ok(flat.f_narrow(0, offset, count)?.f_view(&entry.parameter.shape[..])?)
        };
        self.entries.iter().map(view).collect()
    }

    /// A flat buffer of the initial weights.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn initial(&self, seed: u64) -> Result<Tensor> {
        let mut flat = zeros(self.len, Device::Cpu)?;
        let values = slice_mut(&mut flat);
        for Entry { parameter, offset } in &self.entries {
            values[*offset..offset + parameter.count()].copy_from_slice(&initial(parameter, seed));
        }
        Ok(flat)
    }
}

/// A flat f32 buffer of zeros.
///
/// # Errors
/// What libtorch reports.
pub fn zeros(len: usize, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_zeros([len as i64], (Kind::Float, device))?)
}

/// A buffer's values where the processor can read them.
///
/// # Errors
/// What libtorch reports.
pub fn here(flat: &Tensor) -> Result<Tensor> {
    Ok(flat.f_to_device(Device::Cpu)?)
}

/// The values of a flat buffer.
///
/// # Panics
/// Unless `flat` is one-dimensional, contiguous, f32 and on the CPU.
pub fn slice(flat: &Tensor) -> &[f32] {
    check_flat(flat);
    if flat.numel() == 0 {
        return &[]; // libtorch has no address for it.
    }
    // SAFETY: checked above: `numel` f32 values lie at `data_ptr`. The borrow of `flat` keeps the storage alive. Other
    // handles of the storage exist: parameters are views, used inside calls of the thread that owns the stage, which
    // holds this borrow; and buckets of the gradient that are being reduced, by other processes too, which are complete when
    // they are handed over, overlap nothing that a backward still writes, and are waited for before anybody looks at the whole buffer.
    unsafe { std::slice::from_raw_parts(flat.data_ptr().cast::<f32>(), flat.numel()) }
}

/// The bytes of a flat buffer's values.
///
/// # Panics
/// As [`slice()`].
pub fn bytes(flat: &Tensor) -> &[u8] {
    as_bytes(slice(flat))
}

/// The bytes of values.
pub fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four bytes without padding, and the slice's memory is borrowed for as long.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// The values of a flat buffer, to be changed.
///
/// # Panics
/// As [`slice()`].
pub fn slice_mut(flat: &mut Tensor) -> &mut [f32] {
    check_flat(flat);
    if flat.numel() == 0 {
        return &mut [];
    }
    // SAFETY: as in `slice`; the exclusive borrow of the handle keeps a second slice from being made of it. The write
    // passes by libtorch's version counter, on purpose: no graph that is still to be run backward points at this
    // buffer (the schedule's `check` proves it for every action list).
    unsafe { std::slice::from_raw_parts_mut(flat.data_ptr().cast::<f32>(), flat.numel()) }
}

fn check_flat(flat: &Tensor) {
    assert!(
        flat.dim() == 1 && flat.is_contiguous() && flat.kind() == Kind::Float && flat.device() == Device::Cpu,
        "a flat buffer is one contiguous row of f32 on the CPU"
    );
}

/// The versions of a set of weights that are held, and their gradient.
pub struct Versions {
    layout: Layout,
    /// The newest version in f32, where the buffers are not.
    master: Option<Tensor>,
    /// D + 1 flat buffers; version n is in buffer n mod (D + 1).
    buffers: Vec<Tensor>,
    sides: Vec<Side>,
    /// The newest version: how many updates have been made.
    newest: usize,
}

/// What an update works on: flat buffers of one length.
pub struct Flats<'a> {
    /// The newest weights, f32; none if `new` holds them.
    pub old: Option<&'a Tensor>,
    /// The next version.
    pub new: &'a mut Tensor,
    /// The next version as steps use it, where that is not f32.
    pub rounded: Option<&'a mut Tensor>,
    /// The sum over microbatches and replicas; cleared by the update.
    pub gradient: &'a mut Tensor,
}

/// One use of the weights.
struct Side {
    /// The parameters of every buffer, leaves of autograd.
    leaves: Vec<Vec<Tensor>>,
    /// The sum over a step's microbatches, f32.
    gradient: Tensor,
    /// Where backwards add, where that is not f32.
    narrow: Option<Tensor>,
}

impl Versions {
    /// Version 0 is `initial`; `held` = D + 1 buffers of a kind, with `sides` uses of their own gradients.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn new(layout: Layout, initial: Tensor, held: usize, sides: usize, kind: Kind) -> Result<Versions> {
        let gradients = (0..sides).map(|_| zeros(layout.len, initial.device())).collect::<Result<_>>()?;
        Versions::with(layout, initial, held, gradients, kind)
    }

    /// As `new`, with a flat f32 gradient, zeros, for every side.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn with(layout: Layout, initial: Tensor, held: usize, gradients: Vec<Tensor>, kind: Kind) -> Result<Versions> {
        let narrow = kind != Kind::Float;
        let mut buffers = vec![initial.f_to_kind(kind)?];
        while buffers.len() < held {
            buffers.push(buffers[0].f_zeros_like()?);
        }
        let side = |gradient: Tensor| -> Result<Side> {
            let narrow = narrow.then(|| gradient.f_to_kind(kind)).transpose()?;
            let gradients = layout.views(narrow.as_ref().unwrap_or(&gradient))?;
            let of_buffer = |flat| -> Result<Vec<Tensor>> {
                layout.views(flat)?.iter().zip(&gradients).map(|(view, gradient)| leaf(view, gradient)).collect()
            };
            Ok(Side { leaves: buffers.iter().map(of_buffer).collect::<Result<_>>()?, gradient, narrow })
        };
        let sides = gradients.into_iter().map(side).collect::<Result<_>>()?;
        Ok(Versions { layout, master: narrow.then_some(initial), buffers, sides, newest: 0 })
    }

    /// The same weights as version `newest`, for a run that goes on.
    pub fn at(mut self, newest: usize) -> Versions {
        let by = newest % self.buffers.len();
        self.buffers.rotate_right(by);
        self.sides.iter_mut().for_each(|side| side.leaves.rotate_right(by));
        self.newest = newest;
        self
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn newest(&self) -> usize {
        self.newest
    }

    /// The parameters of a version, as one side uses them.
    ///
    /// # Panics
    /// If the version is not written yet or no longer held: a fault of the schedule.
    pub fn parameters(&self, version: usize, side: usize) -> &[Tensor] {
        let held = self.buffers.len();
        assert!(
            version <= self.newest && self.newest - version < held,
            "version {version} is not held: the newest is {} of {held}",
            self.newest
        );
        &self.sides[side].leaves[version % held]
    }

    /// The flat buffers of the versions from `oldest` on, before the newest, each with its number.
    pub fn older(&self, oldest: usize) -> impl Iterator<Item = (usize, &Tensor)> {
        (oldest..self.newest).map(|number| (number, &self.buffers[number % self.buffers.len()]))
    }

    /// Puts an earlier version into its buffer, of a run that goes on.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn recall(&mut self, number: usize, values: &Tensor) -> Result<()> {
        let held = self.buffers.len();
        Ok(self.buffers[number % held].f_copy_(values)?)
    }

    /// The newest version, f32.
    pub fn flat(&self) -> &Tensor {
        self.master.as_ref().unwrap_or(&self.buffers[self.newest % self.buffers.len()])
    }

    /// Changes the first weight of the newest version, a tensor of one value: a fault on purpose.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn alter(&mut self, change: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<()> {
        let held = self.buffers.len();
        let newest = &mut self.buffers[self.newest % held];
        change(&mut self.master.as_ref().unwrap_or(newest).f_narrow(0, 0, 1)?)?;
        Ok(self.master.as_ref().map_or(Ok(()), |master| newest.f_copy_(master))?)
    }

    /// Adds what a backward has left of a part of a side's gradient to the step's sum; where both are one buffer, that is
    /// done already.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn collect(&self, side: usize, part: Range<usize>) -> Result<()> {
        let Side { gradient, narrow: Some(narrow), .. } = &self.sides[side] else { return Ok(()) };
        let (start, length) = (part.start as i64, part.len() as i64);
        let mut fresh = narrow.f_narrow(0, start, length)?;
        let _ = gradient.f_narrow(0, start, length)?.f_add_(&fresh)?;
        let _ = fresh.f_zero_()?;
        Ok(())
    }

    /// The flat f32 gradient of a side. The handle shares its memory with the parameters' gradients.
    pub fn gradient(&mut self, side: usize) -> &mut Tensor {
        &mut self.sides[side].gradient
    }

    /// Makes the next version: `update` is given the newest weights if they are to be kept (D > 0), the buffer of the next
    /// version (else it holds the newest weights, to be changed in place), and the gradient of the first side.
    ///
    /// # Errors
    /// Those of `update`.
    pub fn advance(&mut self, update: impl FnOnce(Flats) -> Result<()>) -> Result<()> {
        let held = self.buffers.len();
        let (old, next) = (self.newest % held, (self.newest + 1) % held);
        self.newest += 1;
        let gradient = &mut self.sides[0].gradient;
        if let Some(master) = &mut self.master {
            return update(Flats { old: None, new: master, rounded: Some(&mut self.buffers[next]), gradient });
        }
        if held == 1 {
            return update(Flats { old: None, new: &mut self.buffers[0], rounded: None, gradient });
        }
        let (low, high) = self.buffers.split_at_mut(old.max(next));
        let (old, new) = if old < next { (&low[old], &mut high[0]) } else { (&high[0], &mut low[next]) };
        update(Flats { old: Some(old), new, rounded: None, gradient })
    }
}

/// A leaf of autograd that reads its value from `view` and adds its gradient into `gradient`.
fn leaf(view: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let leaf = view.f_detach()?.f_set_requires_grad(true)?;
    // libtorch adds into `.grad` in place once it is there, but tch cannot set it. An empty backward makes one, whose
    // data is then exchanged for the view of the flat buffer.
    leaf.f_mul_scalar(0.0)?.f_sum(Kind::Float)?.f_backward()?;
    leaf.f_grad()?.f_set_data(gradient)?;
    Ok(leaf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Init;

    fn layout() -> Layout {
        let parameter = |name: &str, shape: &[i64]| Parameter {
            name: name.into(),
            shape: shape.into(),
            init: Init::Normal(1.0),
            tied: false,
        };
        Layout::new(&[parameter("a", &[3, 5]), parameter("b", &[7]), parameter("c", &[2, 2])])
    }

    #[test]
    fn parameters_are_aligned_views() {
        let layout = layout();
        assert_eq!(layout.entries.iter().map(|e| e.offset).collect::<Vec<_>>(), [0, 128, 256]);
        assert_eq!((layout.len, layout.count()), (384, 26));
        let flat = layout.initial(1).unwrap();
        for view in layout.views(&flat).unwrap() {
            assert_eq!(view.data_ptr().addr() % 64, 0);
        }
        assert_eq!(slice(&flat)[15], 0.0);
    }

    #[test]
    fn gradients_of_all_versions_add_up_in_the_flat_buffer() {
        let layout = layout();
        let mut versions = Versions::new(layout.clone(), layout.initial(1).unwrap(), 2, 1, Kind::Float).unwrap();
        let address = versions.gradient(0).data_ptr();
        let square = |w: &[Tensor]| (&w[0] * &w[0]).sum(Kind::Float);
        square(versions.parameters(0, 0)).backward();
        let ten = |Flats { old, new, .. }: Flats| {
            new.copy_(old.unwrap());
            let _ = new.narrow(0, 0, 1).fill_(10.0);
            Ok(())
        };
        versions.advance(ten).unwrap();
        square(versions.parameters(0, 0)).backward();
        square(versions.parameters(1, 0)).backward();
        let first = slice(&layout.initial(1).unwrap()).to_vec();
        assert_eq!(versions.gradient(0).data_ptr(), address);
        let gradient = slice(versions.gradient(0));
        assert_eq!(gradient[0], 4.0 * first[0] + 20.0);
        assert_eq!(gradient[1], 6.0 * first[1]);
        assert_eq!(gradient[128], 0.0);
    }

    #[test]
    fn two_sides_share_the_weights_and_not_the_gradient() {
        let layout = layout();
        let mut versions = Versions::new(layout.clone(), layout.initial(1).unwrap(), 2, 2, Kind::Float).unwrap();
        assert_eq!(versions.parameters(0, 0)[1].data_ptr(), versions.parameters(0, 1)[1].data_ptr());
        versions.parameters(0, 1)[1].sum(Kind::Float).backward();
        assert_eq!(slice(versions.gradient(0)), [0.0; 384]);
        assert_eq!(slice(versions.gradient(1))[128..135], [1.0; 7]);
    }

    /// Changes the next version, which begins as it lies, and rounds it.
    fn advance(versions: &mut Versions, change: impl Fn(&mut Tensor) -> Tensor) {
        let update = |Flats { new, rounded, .. }: Flats| {
            let _ = change(new);
            rounded.into_iter().for_each(|rounded| rounded.copy_(new));
            Ok(())
        };
        versions.advance(update).unwrap();
    }

    #[test]
    fn a_graph_keeps_its_version_when_the_next_is_written() {
        let layout = layout();
        let mut versions = Versions::new(layout.clone(), layout.initial(1).unwrap(), 2, 1, Kind::Float).unwrap();
        let loss = (&versions.parameters(0, 0)[0] * &versions.parameters(0, 0)[0]).sum(Kind::Float);
        advance(&mut versions, |new| new.fill_(100.0));
        loss.backward();
        let first = slice(&layout.initial(1).unwrap()).to_vec();
        assert_eq!(slice(versions.gradient(0))[3], 2.0 * first[3]);
    }

    #[test]
    fn weights_can_begin_with_any_version() {
        let layout = layout();
        for start in [0, 1, 5] {
            let mut versions =
                Versions::new(layout.clone(), layout.initial(1).unwrap(), 3, 1, Kind::Float).unwrap().at(start);
            let first = slice(&layout.initial(1).unwrap()).to_vec();
            assert_eq!(slice(versions.flat()), first);
            let leaf = versions.parameters(start, 0)[0].data_ptr();
            let two = |Flats { old, new, .. }: Flats| {
                assert_eq!(slice(old.unwrap()), first);
                let _ = new.fill_(2.0);
                Ok(())
            };
            versions.advance(two).unwrap();
            assert_eq!((versions.newest(), versions.parameters(start, 0)[0].data_ptr()), (start + 1, leaf));
            assert_eq!(f32::try_from(versions.parameters(start + 1, 0)[1].get(0)).unwrap(), 2.0);
        }
    }

    #[test]
    #[should_panic(expected = "version 0 is not held")]
    fn a_version_that_is_overwritten_cannot_be_used() {
        let layout = layout();
        let mut versions = Versions::new(layout.clone(), layout.initial(1).unwrap(), 1, 1, Kind::Float).unwrap();
        versions.advance(|_| Ok(())).unwrap();
        versions.parameters(0, 0);
    }

    /// An update too small for bf16 is kept by the master; gradients of bf16 backwards are added up in f32.
    #[test]
    fn bf16_versions_are_rounded_from_an_f32_master() {
        let layout = layout();
        let mut versions =
            Versions::new(layout.clone(), zeros(layout.len, Device::Cpu).unwrap(), 2, 1, Kind::BFloat16).unwrap();
        let value = |versions: &Versions, number: usize| {
            versions.parameters(number, 0)[1].to_kind(Kind::Float).double_value(&[0])
        };
        advance(&mut versions, |new| new.fill_(1.0));
        advance(&mut versions, |new| new.g_add_scalar_(0.001));
        assert_eq!((value(&versions, 1), value(&versions, 2)), (1.0, 1.0));
        advance(&mut versions, |new| new.g_add_scalar_(0.004));
        assert_eq!((value(&versions, 2), value(&versions, 3)), (1.0, 1.007_812_5));
        for _ in 0..3 {
            (&versions.parameters(3, 0)[1] * 1.001).sum(Kind::Float).backward();
            versions.collect(0, 0..layout.len).unwrap();
        }
        // 1.001 is 1 in bf16; 257 would be 256.
        assert_eq!(slice(versions.gradient(0))[128..135], [3.0; 7]);
        for _ in 0..254 {
            versions.parameters(3, 0)[1].sum(Kind::Float).backward();
            versions.collect(0, 128..256).unwrap();
        }
        assert_eq!(slice(versions.gradient(0))[128..135], [257.0; 7]);
    }
}
