//! SOAP (Vyas et al. 2024, arXiv 2409.11321), which is basis rotation (arXiv 2602.03515): AdamW's
//! steps in the eigenbases of averages of G G' and G' G, for the matrices of attention and
//! feed-forward; tables, head, norms and biases take AdamW's steps as they are. G is the clipped
//! mean gradient of one matrix, of fused ones each by itself, n counts updates from 1:
//!
//! ```text
//! L = b2 L + (1-b2) G G';  R = b2 R + (1-b2) G' G
//! Ql: at first the eigenvectors of L, then every f updates qr(L Ql), columns in the order of diag(Ql' L Ql); likewise Qr
//! M, V turn with their bases: M = Ql' Ql_old M Qr_old' Qr;  V: rows and columns in the new order
//! G~ = Ql' G Qr;  M = b1 M + (1-b1) G~;  V = b2 V + (1-b2) G~^2
//! U = M / (1-b1^n), or with a lead (c M + (1-c) G~) / (1-c b1^n)                as AdamW's
//! W = W (1 - lr wd) - lr Ql (U / (sqrt(V / (1-b2^n)) + eps)) Qr'
//! ```
//!
//! M is kept in the bases, which gives what turning the average of G at every update would, for two
//! products less.
//!
//! f is `soap_every` divided by the delay, 1 at least: the older the gradients, the fresher the
//! bases. The matrices of a stage take turns, so that the work is spread over the f updates.
//!
//! Keys: `soap_sides`, `soap_every`, `soap_limit`, beside AdamW's. State: `first` (M), `second`
//! (V), `left` (L), `left_basis` (Ql), `right`, `right_basis`.

use std::fmt;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::StateBuffer;
use super::adamw::{self, Adamw};
use super::matrices::{Batch, Member, Target, batches, gather, read, scatter};
use super::products::{baddbmm, bmm};
use super::rule::{Rule, Step, Weights};
use crate::error::{Error, Result};
use crate::model::{Parameter, Role};
use crate::params::{Entry, Layout, UpdateBuffers};

/// Of a larger gradient G G' is not finite in f32.
const LARGEST: f64 = 1e19;

/// Its keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Keys {
    /// Which sides of a matrix are turned into their eigenbasis.
    pub soap_sides: Sides,
    /// Updates between two refreshes of a basis, of gradients that are at most one update old.
    pub soap_every: usize,
    /// A side of a matrix that is longer keeps no basis.
    pub soap_limit: usize,
}

/// Which sides of a matrix are turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sides {
    Both,
    /// Only the smaller one; of a square its rows.
    Smaller,
}

impl fmt::Display for Sides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Sides::Both => "both",
            Sides::Smaller => "smaller",
        })
    }
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { soap_sides: Sides::Both, soap_every: 10, soap_limit: 4096 }
    }
}

impl Keys {
    /// Whether they can be used.
    pub fn check(&self) -> Result<()> {
        Error::unless_at_least_one("optimizer.soap_every", self.soap_every)?;
        Error::unless_at_least_one("optimizer.soap_limit", self.soap_limit)
    }

    /// Whether the left and the right side of a matrix have a basis.
    fn sides(&self, rows: usize, columns: usize) -> [bool; 2] {
        let asked = match self.soap_sides {
            Sides::Both => [true, true],
            Sides::Smaller => [rows <= columns, rows > columns],
        };
        [asked[0] && rows <= self.soap_limit, asked[1] && columns <= self.soap_limit]
    }
}

/// A side of the matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

impl Side {
    const ALL: [Side; 2] = [Side::Left, Side::Right];

    /// Its buffers of state: the average, and the basis.
    fn buffers(self) -> [usize; 2] {
        match self {
            Side::Left => [2, 3],
            Side::Right => [4, 5],
        }
    }

    fn length(self, batch: &Batch) -> usize {
        match self {
            Side::Left => batch.rows,
            Side::Right => batch.columns,
        }
    }

    /// `keep A + (1 - keep) G G'`, or G' G, of [B, m, n].
    fn averaged(self, averages: &Tensor, gradient: &Tensor, keep: f64) -> Result<Tensor> {
        let transposed = gradient.f_transpose(1, 2)?;
        Ok(match self {
            Side::Left => baddbmm(averages, gradient, &transposed, keep, 1.0 - keep)?,
            Side::Right => baddbmm(averages, &transposed, gradient, keep, 1.0 - keep)?,
        })
    }

    /// Q' X, or X Q.
    fn turned(self, basis: &Tensor, matrices: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Side::Left => bmm(&basis.f_transpose(1, 2)?, matrices)?,
            Side::Right => bmm(matrices, basis)?,
        })
    }

    /// Q X, or X Q'.
    fn turned_back(self, basis: &Tensor, matrices: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Side::Left => bmm(basis, matrices)?,
            Side::Right => bmm(matrices, &basis.f_transpose(1, 2)?)?,
        })
    }

    /// `keep W - by Q X`, or X Q'.
    fn stepped(
        self,
        basis: &Tensor,
        steps: &Tensor,
        weights: &Tensor,
        keep: f64,
        by: f64,
    ) -> Result<Tensor> {
        Ok(match self {
            Side::Left => baddbmm(weights, basis, steps, keep, -by)?,
            Side::Right => baddbmm(weights, steps, &basis.f_transpose(1, 2)?, keep, -by)?,
        })
    }

    /// [B, m, n] with its rows, or columns, in another order for each, [B, m] or [B, n].
    fn reordered(self, order: &Tensor, matrices: &Tensor) -> Result<Tensor> {
        let (dimension, order) = match self {
            Side::Left => (1, order.f_unsqueeze(2)?),
            Side::Right => (2, order.f_unsqueeze(1)?),
        };
        Ok(matrices.f_gather(dimension, &order.f_expand(matrices.size(), false)?, false)?)
    }
}

/// The rule.
pub struct Soap {
    keys: Keys,
    adamw: adamw::Keys,
    rest: Adamw,
    /// f.
    every: usize,
    /// Whether there are bases.
    begun: bool,
}

impl Soap {
    pub fn new(keys: &Keys, adamw: &adamw::Keys, delay: usize) -> Soap {
        let every = (keys.soap_every / delay.max(1)).max(1);
        Soap {
            keys: keys.clone(),
            adamw: adamw.clone(),
            rest: Adamw::new(adamw, delay),
            every,
            begun: false,
        }
    }

    /// The sides of a batch that have a basis.
    fn sides(&self, batch: &Batch) -> impl Iterator<Item = Side> + use<> {
        let turned = self.keys.sides(batch.rows, batch.columns);
        Side::ALL.into_iter().zip(turned).filter(|(_, turned)| *turned).map(|(side, _)| side)
    }

    /// The layout of what is kept of one side: a square for every matrix.
    fn squares(&self, layout: &Layout, side: Side) -> Layout {
        let square = |parameter: &Parameter| {
            let (fused, columns) = (parameter.fused, parameter.shape[1] as usize);
            let rows = parameter.shape[0] as usize / fused;
            let [left, right] = self.keys.sides(rows, columns);
            let length = match side {
                Side::Left => left.then_some(rows),
                Side::Right => right.then_some(columns),
            };

            let length = length? as i64;
            let shape =
                if fused == 1 { vec![length, length] } else { vec![fused as i64, length, length] };
            Some(Parameter { shape, ..parameter.clone() })
        };

        let matrices =
            layout.entries.iter().map(|entry| &entry.parameter).filter(|it| self.takes_whole(it));
        Layout::new(&matrices.filter_map(square).collect::<Vec<_>>())
    }

    /// Whether the basis of a side is refreshed in update `n`. Sides take turns, by layer and by
    /// place in it: not by stage, so that every grid has the same.
    fn due(&self, member: &Member, side: Side, n: i32) -> bool {
        let turn = member.layer + 2 * member.number + usize::from(side == Side::Right);
        (n as usize + turn).is_multiple_of(self.every)
    }

    /// Adds the gradient to the average of a side; then makes the basis new of those whose turn it
    /// is.
    fn follow(
        &self,
        batch: &Batch,
        side: Side,
        gradient: &Tensor,
        target: &Target,
        state: &[StateBuffer],
        n: i32,
    ) -> Result<()> {
        let [average, basis] = side.buffers();
        let (offsets, length) = (offsets(&state[average].layout, batch), side.length(batch));
        let before = read(&state[average].values, &offsets, [length, length])?;
        let now = target.chosen(side.averaged(&before, gradient, self.adamw.betas[1])?, &before)?;
        scatter(&state[average].values, &offsets, &now)?;

        if !self.begun {
            let (_, vectors) = now.f_linalg_eigh("L")?;
            return scatter(&state[basis].values, &offsets, &vectors.f_flip([2i64].as_slice())?);
        }

        drop((before, now));

        let due: Vec<usize> =
            (0..batch.members.len()).filter(|i| self.due(&batch.members[*i], side, n)).collect();
        if due.is_empty() {
            return Ok(());
        }

        let members = due.iter().map(|i| batch.members[*i].clone()).collect();
        self.refresh(&Batch { members, ..*batch }, side, target, state)
    }

    /// The next basis of a side: one step of the power iteration, from the order that the average
    /// now has; M and V turn with it.
    fn refresh(
        &self,
        batch: &Batch,
        side: Side,
        target: &Target,
        state: &[StateBuffer],
    ) -> Result<()> {
        let [average, basis] = side.buffers();
        let (offsets, length) = (offsets(&state[average].layout, batch), side.length(batch));
        let old = gather(&state[basis].values, &offsets, [length, length])?;
        let product = bmm(&gather(&state[average].values, &offsets, [length, length])?, &old)?;
        let along =
            old.f_mul(&product)?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?;
        let order = along.f_argsort_stable(true, 1, true)?;
        let sorted = Side::Right.reordered(&order, &product)?;
        drop(product);

        let new = Tensor::f_linalg_qr(&sorted, "reduced")?.0.f_contiguous()?;
        drop(sorted);

        let (places, shape) = (batch.offsets(), [batch.rows, batch.columns]);
        let first = gather(&state[0].values, &places, shape)?;
        // Two products as thin as M, instead of that of the bases.
        let turned = side.turned(&new, &side.turned_back(&old, &first)?)?;
        scatter(&state[0].values, &places, &target.chosen(turned, &first)?)?;
        scatter(&state[basis].values, &offsets, &target.chosen(new, &old)?)?;

        let second = gather(&state[1].values, &places, shape)?;
        scatter(
            &state[1].values,
            &places,
            &target.chosen(side.reordered(&order, &second)?, &second)?,
        )
    }

    fn batch(
        &self,
        batch: &Batch,
        target: &Target,
        state: &[StateBuffer],
        step: &Step,
    ) -> Result<()> {
        let mut gradient = target.gradient(batch)?;
        for side in self.sides(batch) {
            self.follow(batch, side, &gradient, target, state, step.n)?;
        }

        let mut bases = Vec::new();
        for side in self.sides(batch) {
            let [_, basis] = side.buffers();
            let (offsets, length) = (offsets(&state[basis].layout, batch), side.length(batch));
            let basis = gather(&state[basis].values, &offsets, [length, length])?;
            gradient = side.turned(&basis, &gradient)?;
            bases.push((side, basis));
        }

        let (mut steps, scale) = self.in_the_bases(batch, &gradient, target, state, step.n)?;
        let by = step.lr * scale;
        let last = bases.pop();
        for (side, basis) in &bases {
            steps = side.turned_back(basis, &steps)?;
        }

        target.advance(batch, |before| match &last {
            Some((side, basis)) => side.stepped(basis, &steps, before, step.keep, by),
            None => Ok(before.f_mul_scalar(step.keep)?.f_sub_(&steps.f_mul_scalar(by)?)?),
        })
    }

    /// AdamW's step in the bases, but for the rate and for a factor, which comes with it: with the
    /// root of the correction of V taken out of the quotient, `M / (sqrt(V) + eps sqrt(1-b2^n))`
    /// and `sqrt(1-b2^n) / (1-b1^n)`.
    fn in_the_bases(
        &self,
        batch: &Batch,
        gradient: &Tensor,
        target: &Target,
        state: &[StateBuffer],
        n: i32,
    ) -> Result<(Tensor, f64)> {
        let (offsets, shape) = (batch.offsets(), [batch.rows, batch.columns]);
        let [beta1, beta2] = self.adamw.betas;
        let first = read(&state[0].values, &offsets, shape)?;
        let second = read(&state[1].values, &offsets, shape)?;
        let first_now = first.f_lerp(gradient, 1.0 - beta1)?;
        let second_now = second.f_lerp(&gradient.f_mul(gradient)?, 1.0 - beta2)?;

        let correction = (1.0 - beta2.powi(n)).sqrt();
        let root = second_now.f_sqrt()?.f_add_scalar_(self.adamw.eps * correction)?;
        let (steps, lead) = match self.rest.lead() {
            None => (first_now.f_div(&root)?, 1.0),
            Some(lead) => (gradient.f_lerp(&first_now, lead)?.f_div_(&root)?, lead),
        };

        scatter(&state[0].values, &offsets, &target.chosen(first_now, &first)?)?;
        scatter(&state[1].values, &offsets, &target.chosen(second_now, &second)?)?;
        Ok((steps, correction / (1.0 - lead * beta1.powi(n))))
    }
}

/// Where the squares of a batch's matrices begin in the buffers of a side.
fn offsets(layout: &Layout, batch: &Batch) -> Vec<usize> {
    let offset = |member: &Member| {
        let entry = layout.entries.iter().find(|entry| entry.parameter.name == member.name);
        entry.map_or(0, |entry| {
            let square = entry.parameter.count() / entry.parameter.fused;
            entry.offset + member.part * square
        })
    };
    batch.members.iter().map(offset).collect()
}

/// The squares of a buffer of one side, as views.
fn squares_of(buffer: &StateBuffer) -> impl Iterator<Item = Result<Tensor>> + '_ {
    let squares = |entry: &Entry| {
        let length = entry.parameter.shape[entry.parameter.shape.len() - 1];
        let (offset, fused) = (entry.offset as i64, entry.parameter.fused as i64);
        (0..fused).map(move |part| (offset + part * length * length, length))
    };

    buffer.layout.entries.iter().flat_map(squares).map(|(offset, length)| {
        let values = buffer.values.f_narrow(0, offset, length * length)?;
        Ok(values.f_view([length, length])?)
    })
}

impl Rule for Soap {
    fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)> {
        let [left, right] = Side::ALL.map(|side| self.squares(layout, side));
        vec![
            ("first", layout.clone()),
            ("second", layout.clone()),
            ("left", left.clone()),
            ("left_basis", left),
            ("right", right.clone()),
            ("right_basis", right),
        ]
    }

    fn takes_whole(&self, parameter: &Parameter) -> bool {
        parameter.role == Role::Matrix
    }

    fn step(
        &self,
        buffers: UpdateBuffers,
        state: &mut [StateBuffer],
        step: &Step,
        weights: &Weights,
    ) -> Result<()> {
        self.rest.step(buffers, state, step, weights)
    }

    fn matrices(
        &mut self,
        target: &Target,
        state: &mut [StateBuffer],
        step: &Step,
        batches: &[Batch],
    ) -> Result<()> {
        // Bases begin with an update that is made: on a GPU the host waits for each that may be the
        // first.
        let made = match (&target.made, self.begun) {
            (Some(made), false) => made.f_int64_value(&[])? != 0,
            _ => true,
        };

        if !made {
            // The weights stay, and have to be published.
            let stay = |batch| target.advance(batch, |before| Ok(before.shallow_clone()));
            return batches.iter().try_for_each(stay);
        }

        batches.iter().try_for_each(|batch| self.batch(batch, target, state, step))?;
        self.begun = true;
        Ok(())
    }

    fn restored(&mut self, state: &[StateBuffer]) -> Result<()> {
        let is_set = |values: &Tensor| {
            Ok::<_, Error>(values.numel() > 0 && values.f_any()?.f_int64_value(&[])? != 0)
        };

        let bases = || Side::ALL.into_iter().map(|side| &state[side.buffers()[1]]);
        for basis in bases() {
            self.begun |= is_set(&basis.values)?;
        }

        if !self.begun {
            return Ok(());
        }

        // Of stages whose first updates were left out, beside others.
        for square in bases().flat_map(squares_of) {
            let mut square = square?;
            if !is_set(&square)? {
                square
                    .f_copy_(&Tensor::f_eye(square.size()[0], (Kind::Float, square.device()))?)?;
            }
        }

        Ok(())
    }

    fn rehearse(
        &mut self,
        target: &Target,
        state: &mut [StateBuffer],
        step: &Step,
        batches: &[Batch],
    ) -> Result<()> {
        let begun = std::mem::replace(&mut self.begun, true);
        if !begun {
            self.begun = false;
            batches.iter().try_for_each(|batch| self.batch(batch, target, state, step))?;
            self.begun = true;
        }

        // Every turn has other sizes.
        for n in 1..=self.every as i32 {
            let step = Step { n, ..*step };
            batches.iter().try_for_each(|batch| self.batch(batch, target, state, &step))?;
        }

        self.begun = begun;

        for side in Side::ALL.into_iter().filter(|_| !begun) {
            let [_, basis] = side.buffers();
            let _ = state[basis].values.f_zero_()?;
        }

        Ok(())
    }

    fn largest(&self) -> f64 {
        LARGEST
    }

    fn kernel(&self) -> &'static str {
        self.rest.kernel()
    }

    fn constants(&self, step: &Step) -> Vec<f32> {
        self.rest.constants(step)
    }

    /// Of one batch: gradient, both moments before and after, the root and the step, as it is and
    /// turned; and either both bases, or what the refresh of one needs.
    fn workspace(&self, layout: &Layout) -> usize {
        let of = |batch: &Batch| {
            let squares = self.sides(batch).map(|side| side.length(batch).pow(2));
            let (sum, longest) =
                squares.fold((0, 0), |(sum, longest), square| (sum + square, square.max(longest)));
            8 * batch.len() + batch.members.len() * sum.max(5 * longest)
        };
        batches(layout).iter().map(of).max().unwrap_or(0)
    }
}
