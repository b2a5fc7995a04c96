//! The weights of a stage: one flat buffer per version, one flat buffer of gradients.
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
//! A table that two ends use has a side for each: its own leaves over the same buffers, its own
//! gradient. A side may be `unpredicted`: it reads the newest weights as updates make them, and no
//! older ones.
//!
//! An update reads the newest buffer and writes the next one, so a saved graph keeps pointing at
//! the weights that it was made with. The schedule guarantees that nothing reads the buffer that is
//! overwritten.
//!
//! Where the versions are not what updates change, as bf16 ones, there is an f32 master that
//! updates change, of which [`publish()`] makes the next version; and the gradients of a backward,
//! which are bf16 then, are added to the f32 one as they come (`add`): autograd would add them up
//! in bf16 first, and pass over them three times more.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::{Layout, Published, add, publish, zeros};
use crate::error::Result;

/// The versions of a set of weights that are held, and their gradient.
pub struct Versions {
    layout: Layout,
    /// The newest weights in f32 as updates make them, where versions are others: rounded, or
    /// predicted.
    master: Option<Tensor>,
    /// D + 1 flat buffers; version n is in buffer n mod (D + 1).
    buffers: Vec<Tensor>,
    sides: Vec<Side>,
    /// Of an unpredicted side: the newest weights, where steps use them rounded.
    rounded: Option<Tensor>,
    /// The newest version: how many updates have been made.
    newest: usize,
}

/// What an update works on: flat buffers of one length.
pub struct UpdateBuffers<'a> {
    /// The newest weights, f32; none if `new` holds them.
    pub old: Option<&'a Tensor>,
    /// The next weights, f32.
    pub new: &'a mut Tensor,
    /// The next version as steps use it, where that is not `new` itself.
    pub published: Option<Published<'a>>,
    /// The sum over microbatches and replicas; cleared by the update.
    pub gradient: &'a mut Tensor,
}

/// Whether the weights that updates change stand apart from the versions that steps use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Master {
    /// Only where versions are rounded.
    WhereRounded,
    /// Where versions are predicted too.
    Always,
}

/// One use of the weights.
struct Side {
    /// The parameters of every buffer, leaves of autograd; of an unpredicted side those of the
    /// newest weights.
    leaves: Vec<Vec<Tensor>>,
    /// The sum over a step's microbatches, f32.
    gradient: Tensor,
}

impl Versions {
    /// Version 0 is `initial`; `held` = D + 1 buffers of a kind, with `sides` uses of their own
    /// gradients.
    pub fn new(
        layout: Layout,
        initial: Tensor,
        held: usize,
        sides: usize,
        kind: Kind,
    ) -> Result<Versions> {
        let gradients =
            (0..sides).map(|_| zeros(layout.len, initial.device())).collect::<Result<_>>()?;
        Versions::with(layout, initial, held, gradients, kind, Master::WhereRounded)
    }

    /// As `new`, with a flat f32 gradient, zeros, for every side.
    pub fn with(
        layout: Layout,
        initial: Tensor,
        held: usize,
        gradients: Vec<Tensor>,
        kind: Kind,
        master: Master,
    ) -> Result<Versions> {
        let narrow = kind != Kind::Float;
        let apart = narrow || master == Master::Always;
        let mut buffers = Vec::with_capacity(held);
        if !apart {
            buffers.push(initial.shallow_clone());
        }

        while buffers.len() < held {
            buffers.push(Tensor::f_zeros(initial.size(), (kind, initial.device()))?);
        }

        if apart {
            publish(&initial, &mut buffers[0])?;
        }

        let side = |gradient: Tensor| -> Result<Side> {
            let leaves = buffers
                .iter()
                .map(|flat| leaves(&layout, flat, &gradient))
                .collect::<Result<_>>()?;
            Ok(Side { leaves, gradient })
        };

        let sides = gradients.into_iter().map(side).collect::<Result<_>>()?;
        Ok(Versions {
            layout,
            master: apart.then_some(initial),
            buffers,
            sides,
            rounded: None,
            newest: 0,
        })
    }

    /// Lets a side use the newest weights as updates make them, where the versions are predicted
    /// ones.
    pub fn unpredicted(mut self, side: usize) -> Result<Versions> {
        let (Some(master), kind) = (&self.master, self.buffers[0].kind()) else { return Ok(self) };
        self.rounded = (kind != Kind::Float).then(|| master.f_to_kind(kind)).transpose()?;

        let side = &mut self.sides[side];
        side.leaves =
            vec![leaves(&self.layout, self.rounded.as_ref().unwrap_or(master), &side.gradient)?];
        Ok(self)
    }

    /// The same weights as version `newest`, for a run that goes on.
    pub fn starting_at(mut self, newest: usize) -> Versions {
        let by = newest % self.buffers.len();
        self.buffers.rotate_right(by);
        self.sides.iter_mut().for_each(|side| {
            let by = newest % side.leaves.len();
            side.leaves.rotate_right(by);
        });
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
        let held = self.sides[side].leaves.len();
        assert!(
            version <= self.newest && self.newest - version < held,
            "version {version} is not held: the newest is {} of {held}",
            self.newest
        );
        &self.sides[side].leaves[version % held]
    }

    /// The flat buffers of the versions `numbers` as steps use them, each with its number.
    pub fn used(&self, numbers: Range<usize>) -> impl Iterator<Item = (usize, &Tensor)> {
        numbers.map(|number| (number, &self.buffers[number % self.buffers.len()]))
    }

    /// Puts an earlier version into its buffer, of a run that goes on.
    pub fn recall(&mut self, number: usize, values: &Tensor) -> Result<()> {
        let held = self.buffers.len();
        Ok(self.buffers[number % held].f_copy_(values)?)
    }

    /// The newest version, f32.
    pub fn flat(&self) -> &Tensor {
        self.master.as_ref().unwrap_or(&self.buffers[self.newest % self.buffers.len()])
    }

    /// Changes the first weight of the newest version, a tensor of one value: a fault on purpose.
    pub fn alter(&mut self, change: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<()> {
        let held = self.buffers.len();
        let newest = &mut self.buffers[self.newest % held];
        let mut first = self.master.as_ref().unwrap_or(newest).f_narrow(0, 0, 1)?;
        change(&mut first)?;
        publish(&first, &mut newest.f_narrow(0, 0, 1)?)
    }

    /// Whether backwards add to the gradients by themselves; else whoever runs them does, by `add`.
    pub fn adds_itself(&self) -> bool {
        self.buffers[0].kind() == Kind::Float
    }

    /// Adds a backward's gradient of a parameter to the step's sum of a side.
    pub fn add(&self, side: usize, parameter: usize, part: &Tensor) -> Result<()> {
        let entry = &self.layout.entries[parameter];
        let (offset, count) = (entry.offset as i64, entry.parameter.count() as i64);
        let sum = self.sides[side].gradient.f_narrow(0, offset, count)?;
        add(&mut sum.f_view(&entry.parameter.shape[..])?, part)
    }

    /// The flat f32 gradient of a side. The handle shares its memory with the parameters'
    /// gradients.
    pub fn gradient(&self, side: usize) -> &Tensor {
        &self.sides[side].gradient
    }

    /// Makes the next version, `horizon` updates ahead of the master: `update` is given the newest
    /// weights if they are to be kept (D > 0), the buffer of the next version (else it holds the
    /// newest weights, to be changed in place), and the gradient of the first side.
    ///
    /// # Errors
    /// Those of `update`.
    pub fn advance(
        &mut self,
        horizon: f64,
        update: impl FnOnce(UpdateBuffers) -> Result<()>,
    ) -> Result<()> {
        let held = self.buffers.len();
        let (old, next) = (self.newest % held, (self.newest + 1) % held);
        self.newest += 1;
        let gradient = &mut self.sides[0].gradient;
        if let Some(master) = &mut self.master {
            let published = Published { version: &mut self.buffers[next], horizon: horizon as f32 };
            update(UpdateBuffers { old: None, new: master, published: Some(published), gradient })?;
            return self.rounded.as_mut().map_or(Ok(()), |rounded| publish(master, rounded));
        }

        if held == 1 {
            return update(UpdateBuffers {
                old: None,
                new: &mut self.buffers[0],
                published: None,
                gradient,
            });
        }

        let (low, high) = self.buffers.split_at_mut(old.max(next));
        let (old, new) =
            if old < next { (&low[old], &mut high[0]) } else { (&high[0], &mut low[next]) };
        update(UpdateBuffers { old: Some(old), new, published: None, gradient })
    }
}

/// Leaves of autograd over a flat buffer, one a parameter, which add their gradients into that of
/// the flat buffer `gradient` if both are of one kind.
fn leaves(layout: &Layout, flat: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
    let views = layout.views(flat)?;
    if flat.kind() != gradient.kind() {
        return views.iter().map(|view| Ok(view.f_detach()?.f_set_requires_grad(true)?)).collect();
    }
    let gradients = layout.views(gradient)?;
    views.iter().zip(&gradients).map(|(view, gradient)| leaf(view, gradient)).collect()
}

/// A leaf of autograd that reads its value from `view` and adds its gradient into `gradient`.
fn leaf(view: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let leaf = view.f_detach()?.f_set_requires_grad(true)?;
    // libtorch adds into `.grad` in place once it is there, but tch cannot set it. An empty
    // backward makes one, whose data is then exchanged for the view of the flat buffer.
    leaf.f_mul_scalar(0.0)?.f_sum(Kind::Float)?.f_backward()?;
    leaf.f_grad()?.f_set_data(gradient)?;
    Ok(leaf)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::params::slice;
    use crate::params::tests::layout;

    #[test]
    fn gradients_of_all_versions_add_up_in_the_flat_buffer() {
        let layout = layout();
        let mut versions =
            Versions::new(layout.clone(), layout.initial(1).unwrap(), 2, 1, Kind::Float).unwrap();
        let address = versions.gradient(0).data_ptr();
        let square = |w: &[Tensor]| (&w[0] * &w[0]).sum(Kind::Float);
        square(versions.parameters(0, 0)).backward();
        let ten = |UpdateBuffers { old, new, .. }: UpdateBuffers| {
            new.copy_(old.unwrap());
            let _ = new.narrow(0, 0, 1).fill_(10.0);
            Ok(())
        };
        versions.advance(0.0, ten).unwrap();
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
        let versions =
            Versions::new(layout.clone(), layout.initial(1).unwrap(), 2, 2, Kind::Float).unwrap();
        assert_eq!(
            versions.parameters(0, 0)[1].data_ptr(),
            versions.parameters(0, 1)[1].data_ptr()
        );
        versions.parameters(0, 1)[1].sum(Kind::Float).backward();
        assert_eq!(slice(versions.gradient(0)), [0.0; 384]);
        assert_eq!(slice(versions.gradient(1))[128..135], [1.0; 7]);
    }

    /// Changes the next version, which begins as it lies, and rounds it.
    fn advance(versions: &mut Versions, change: impl Fn(&mut Tensor) -> Tensor) {
        let update = |UpdateBuffers { new, published, .. }: UpdateBuffers| {
            let _ = change(new);
            published.into_iter().for_each(|published| published.version.copy_(new));
            Ok(())
        };
        versions.advance(0.0, update).unwrap();
    }

    #[test]
    fn a_graph_keeps_its_version_when_the_next_is_written() {
        let layout = layout();
        let mut versions =
            Versions::new(layout.clone(), layout.initial(1).unwrap(), 2, 1, Kind::Float).unwrap();
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
                Versions::new(layout.clone(), layout.initial(1).unwrap(), 3, 1, Kind::Float)
                    .unwrap()
                    .starting_at(start);
            let first = slice(&layout.initial(1).unwrap()).to_vec();
            assert_eq!(slice(versions.flat()), first);
            let leaf = versions.parameters(start, 0)[0].data_ptr();
            let two = |UpdateBuffers { old, new, .. }: UpdateBuffers| {
                assert_eq!(slice(old.unwrap()), first);
                let _ = new.fill_(2.0);
                Ok(())
            };
            versions.advance(0.0, two).unwrap();
            assert_eq!(
                (versions.newest(), versions.parameters(start, 0)[0].data_ptr()),
                (start + 1, leaf)
            );
            assert_eq!(f32::try_from(versions.parameters(start + 1, 0)[1].get(0)).unwrap(), 2.0);
        }
    }

    #[test]
    #[should_panic(expected = "version 0 is not held")]
    fn a_version_that_is_overwritten_cannot_be_used() {
        let layout = layout();
        let mut versions =
            Versions::new(layout.clone(), layout.initial(1).unwrap(), 1, 1, Kind::Float).unwrap();
        versions.advance(0.0, |_| Ok(())).unwrap();
        versions.parameters(0, 0);
    }

    /// An update too small for bf16 is kept by the master; gradients of bf16 backwards are added up
    /// in f32.
    #[test]
    fn bf16_versions_are_published_from_an_f32_master() {
        let layout = layout();
        let mut versions = Versions::new(
            layout.clone(),
            zeros(layout.len, Device::Cpu).unwrap(),
            2,
            1,
            Kind::BFloat16,
        )
        .unwrap();
        let value = |versions: &Versions, number: usize| {
            versions.parameters(number, 0)[1].to_kind(Kind::Float).double_value(&[0])
        };
        advance(&mut versions, |new| new.fill_(1.0));
        advance(&mut versions, |new| new.g_add_scalar_(0.001));
        assert_eq!((value(&versions, 1), value(&versions, 2)), (1.0, 1.0));
        advance(&mut versions, |new| new.g_add_scalar_(0.004));
        assert_eq!((value(&versions, 2), value(&versions, 3)), (1.0, 1.007_812_5));
        let add = |versions: &Versions, factor: f64| {
            let leaf = &versions.parameters(3, 0)[1];
            let gradients =
                Tensor::run_backward(&[(leaf * factor).sum(Kind::Float)], &[leaf], false, false);
            versions.add(0, 1, &gradients[0]).unwrap();
        };
        assert!(!versions.adds_itself());
        (0..3).for_each(|_| add(&versions, 1.001));
        // 1.001 is 1 in bf16; 257 would be 256.
        assert_eq!(slice(versions.gradient(0))[128..135], [3.0; 7]);
        (0..254).for_each(|_| add(&versions, 1.0));
        assert_eq!(slice(versions.gradient(0))[128..135], [257.0; 7]);
    }

    /// With a delay of one and a constant rate every version moves by twice the last step less the
    /// one before it (error feedback, arXiv 2606.30634), while the master takes the steps as they
    /// are.
    #[test]
    fn predicted_versions_follow_error_feedback() {
        let layout = layout();
        let (initial, gradient) =
            (layout.initial(1).unwrap(), zeros(layout.len, Device::Cpu).unwrap());
        let first = initial.f_detach_copy().unwrap();
        let mut versions =
            Versions::with(layout, initial, 2, vec![gradient], Kind::Float, Master::Always)
                .unwrap();
        let used = |versions: &Versions, n: usize| versions.parameters(n, 0)[1].detach().copy();
        assert_eq!(used(&versions, 0), first.narrow(0, 128, 7));

        let steps = [0.5, -0.125, 0.25, 1.0];
        let (mut before, mut taken) = (0.0, 0.0);
        for (n, step) in steps.into_iter().enumerate() {
            let old = used(&versions, n);
            versions
                .advance(1.0, |UpdateBuffers { new, published, .. }| {
                    let mut published = published.unwrap();
                    let kept = published.before(new)?;
                    let _ = new.f_add_scalar_(step)?;
                    published.publish(new, kept)
                })
                .unwrap();
            taken += step;
            let moved = used(&versions, n + 1) - old;
            assert!(
                (moved - (2.0 * step - before)).abs().max().double_value(&[]) < 1e-6,
                "update {n}"
            );
            let master = versions.flat().narrow(0, 128, 7) - first.narrow(0, 128, 7);
            assert!((master - taken).abs().max().double_value(&[]) < 1e-6);
            before = step;
        }
    }
}
