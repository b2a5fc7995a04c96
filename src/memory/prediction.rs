//! The predicted peak of a rank's memory, from the formulas of the layers.

use crate::checkpoint::SavedBuffer;
use crate::comm::mpi::{CHUNK, CHUNKS_UNDER_WAY};
use crate::comm::nccl;
use crate::config::Recompute;
use crate::data::Order;
use crate::grid::Place;
use crate::model::{self, Documents, Stack};
use crate::number::READBACK_STEPS;
use crate::optim::{state_layouts, workspace};
use crate::params::{Layout, Master};
use crate::precision::Precision;
use crate::schedule::{TableEnd, Tie};
use crate::setup::Setup;
use crate::wire::Wire;

/// f32.
const VALUE: u64 = 4;

/// The heap's holes are one part of so many of what comes and goes.
const HOLES: u64 = 6;

/// On a GPU, of this process: the workspaces of products (cuBLAS has 32 MiB by
/// `CUBLAS_WORKSPACE_CONFIG`, cuBLASLt as much), and the kernels of libtorch and its libraries that
/// are loaded when they are first used. Not measured yet.
const LIBRARIES: u64 = (64 + 320) << 20;

/// What CUDA takes for this process before anything is computed, and NCCL for a communicator:
/// buffers of both protocols, connected as ring and tree. Not measured yet.
const CONTEXT: u64 = 512 << 20;
const COMMUNICATOR: u64 = 100 << 20;

/// The parts of a rank's predicted peak, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prediction {
    /// `D_k + 1` versions.
    pub weights: u64,
    /// With a tied table also its parts that wait for each other; with it what measures staleness.
    pub gradient: u64,
    pub optimizer: u64,
    /// `a_k + 1` microbatches, and what the layers remember.
    pub activations: u64,
    /// What one backward and the links need for a moment.
    pub transient: u64,
    /// Between tensors of many sizes that come and go: measured, up to a sixth of them.
    pub holes: u64,
    /// The copy that is written to the disk beside the training; of the end of the run what exceeds
    /// activations and transient values, which are gone by then.
    pub saving: u64,
    /// On a GPU what its libraries take while they work.
    pub libraries: u64,
}

impl Prediction {
    /// The peak of a rank by the formulas of the layers.
    pub fn new(setup: &Setup, rank: usize) -> Prediction {
        let mut sum = Prediction::default();
        let held = setup.grid.held(rank);
        for place in &held {
            sum.add_place(setup, *place);
        }

        let value = setup.config.precision.bytes() as u64;
        let ends: Vec<TableEnd> =
            held.iter().flat_map(|place| setup.schedule.ends(place.stage)).collect();
        if let Some(end) = ends.first() {
            let layout = Layout::new(&model::table(&setup.dimensions));
            let table = layout.len as u64 * VALUE;
            // Parts wait for the joiner; the other copy only gets sums, under `head` as late as it
            // may.
            let waits = setup.grid.device_of(rank) == 0 || setup.schedule.tie == Tie::Head;
            let parts = if waits { setup.schedule.delays[0] as u64 + 4 } else { 3 };
            let delay = setup.schedule.table_delay(*end);
            let versions = setup.schedule.tables_held(setup.grid.device_of(rank)) as u64;
            sum.weights += versions * table / VALUE * value + master(setup, table, delay);
            let measures = held
                .iter()
                .any(|place| place.replica == 0 && place.stage == setup.schedule.joiner());
            if setup.config.staleness.every.is_some() && measures {
                sum.gradient += table;
            }

            let ends = ends.len() as u64;
            // Of both ends here the head reads the newest weights unpredicted, in bf16 a copy of
            // them.
            if setup.schedule.tie == Tie::Head && ends == 2 && setup.master(delay) == Master::Always
            {
                sum.weights += narrow(setup, table);
            }

            sum.gradient += (ends + parts) * table;
            sum.add_optimizer(setup, &layout, delay);
        }

        if setup.device.is_cuda() {
            sum.optimizer += decays(setup, &held);
            sum.libraries = LIBRARIES;
        } else {
            sum.transient += held.len() as u64 * reduced_at_once(setup);
        }

        let copies: u64 = held.iter().map(|place| copied(setup, *place)).sum();
        // Where a run ends, or is stopped, nothing else is under way.
        let older: u64 = held
            .iter()
            .map(|place| copied_older(setup, *place) + copied_parts(setup, *place))
            .sum();
        let at_stop = (copies + older).saturating_sub(sum.activations + sum.transient);
        sum.saving =
            if setup.config.checkpoint.every.is_some() { copies.max(at_stop) } else { at_stop };
        sum.holes = (sum.activations + sum.transient) / HOLES;
        sum
    }

    fn add_place(&mut self, setup: &Setup, place: Place) {
        let stack = setup.stack(place.stage);
        let layout = Layout::new(&stack.own());
        let flat = layout.len as u64 * VALUE;
        if setup.config.staleness.every.is_some() && place.replica == 0 {
            self.gradient += flat;
        }

        let schedule = &setup.schedule;
        let tokens = (setup.rows * setup.config.data.sequence) as u64;
        let value = setup.config.precision.bytes() as u64;
        let hidden = tokens * setup.config.model.d_model as u64 * value;
        // What is f32 in any precision.
        let wide = tokens * stack.entries_per_token() as u64 * (VALUE - value);
        let kept = stack.saved(tokens as usize) as u64 * VALUE;
        let saved = tokens * stack.saved_per_token() as u64 * value + wide + kept;
        let held = schedule.activations_held(place.stage) as u64;
        // A message each way to every neighbour; on a GPU those sent until the host, which is
        // ahead, sees that they have left.
        let neighbours = [setup.grid.upstream(place), setup.grid.downstream(place)];
        let ahead = if setup.device.is_cuda() {
            READBACK_STEPS as u64 * setup.config.microbatches as u64
        } else {
            1
        };

        let messages = (1 + ahead) * neighbours.iter().flatten().count() as u64 * hidden;
        let per_token = match setup.config.recompute {
            Recompute::Layers => stack.block_per_token(),
            Recompute::Nothing | Recompute::Stage => stack.transient_per_token(),
        };

        let chunk = stack.chunk(setup.rows * setup.config.data.sequence) as u64 * VALUE;
        let transient = (tokens * per_token as u64 + stack.transient() as u64) * value + chunk;
        // The attention's backward adds up the queries' gradient in f32.
        let queries = if setup.device.is_cuda() { hidden / value * VALUE } else { 0 };
        let transient = transient + 2 * wide + messages + queries;
        // As a backward gives activations up its gradients grow, where they are added to the sum at
        // its end.
        let transient = transient + returned(setup, &stack).saturating_sub(saved);
        let transient = transient.max(evaluation(setup, &stack));
        // What the layers remember of every microbatch, and what those under way have seen.
        let remembered = (setup.rows * setup.config.model.mem_len * stack.remembering()) as u64;
        let remembered = remembered * setup.config.model.d_model as u64 * value;
        let memories = (setup.config.microbatches as u64 + held) * remembered;
        let delay = schedule.delays[place.stage];
        self.weights += schedule.versions_held(place.stage) as u64 * flat / VALUE * value
            + master(setup, flat, delay);
        self.gradient += flat;
        self.activations += match setup.config.recompute {
            Recompute::Nothing => held * saved,
            Recompute::Stage => held * hidden + saved,
            // The inputs of the layers; of those only one at a time is run again.
            Recompute::Layers => held * hidden * stack.layers() as u64,
        };

        self.activations += memories;
        if setup.config.data.document_mask {
            // Those under way, and the one that is computed.
            let bytes = Documents::bytes(setup.rows, setup.config.data.sequence) as u64;
            self.activations += held * bytes;
            self.transient = self.transient.max(transient + 2 * bytes);
        }

        // The two stages of a device take turns.
        self.transient = self.transient.max(transient);
        self.add_optimizer(setup, &layout, delay);
    }

    /// The optimizer's state of a set of weights, and what its updates need for a moment.
    fn add_optimizer(&mut self, setup: &Setup, layout: &Layout, delay: usize) {
        let config = &setup.config.optimizer;
        let state: usize = state_layouts(config, layout).iter().map(|layout| layout.len).sum();
        self.optimizer += state as u64 * VALUE;

        // Of rounded versions that are predicted the weights before, which the fused pass of a GPU
        // does without.
        let rounded =
            setup.config.precision == Precision::Bf16 && setup.master(delay) == Master::Always;
        let before = if rounded && !setup.device.is_cuda() { layout.len } else { 0 };
        self.transient = self.transient.max((workspace(config, layout) + before) as u64 * VALUE);
    }

    /// What a GPU needs to hold of it: copies that are being written lie in the memory of the host.
    pub fn on_gpu(&self) -> u64 {
        self.total() - self.saving
    }

    /// What is measured of it, on the device that the run has.
    pub fn of_device(&self, setup: &Setup) -> u64 {
        if setup.device.is_cuda() { self.on_gpu() } else { self.total() }
    }

    pub fn total(&self) -> u64 {
        let kept = self.weights + self.gradient + self.optimizer + self.libraries;
        kept + self.activations + self.transient + self.holes + self.saving
    }
}

/// What a GPU holds for a rank besides, from before its first tensor on: bytes, of CUDA and of
/// NCCL.
pub fn beside(setup: &Setup, rank: usize) -> u64 {
    let communicators = match setup.grid.size() {
        1 => 0,
        _ => nccl::channels_of(setup.grid, setup.dimensions.tied, rank) as u64,
    };
    CONTEXT + communicators * COMMUNICATOR
}

/// The f32 weights behind versions that are others: bytes, of those of the weights in f32.
fn master(setup: &Setup, flat: u64, delay: usize) -> u64 {
    let apart = setup.config.precision == Precision::Bf16 || setup.master(delay) == Master::Always;
    if apart { flat } else { 0 }
}

/// The gradients that a backward returns, of versions that are not f32: of all layers, or of the
/// largest if they are run one by one.
fn returned(setup: &Setup, stack: &Stack) -> u64 {
    let parameters = stack.parameters();
    let all = Layout::new(parameters).len as u64 * VALUE;
    let layout = Layout::new(&stack.own());
    let starts: Vec<usize> = stack.runs(0).iter().map(|run| layout.offset(run.first)).collect();
    let ends = starts.iter().skip(1).copied().chain([layout.len]);
    let largest =
        starts.iter().zip(ends).map(|(start, end)| end - start).max().unwrap_or(0) as u64 * VALUE;
    narrow(setup, if setup.config.recompute == Recompute::Layers { largest } else { all })
}

/// As many values as versions have them; none where those are f32.
fn narrow(setup: &Setup, flat: u64) -> u64 {
    if setup.config.precision != Precision::Bf16 {
        0
    } else {
        flat / VALUE * setup.config.precision.bytes() as u64
    }
}

/// Which values decay, a byte each: of a GPU's optimizer.
fn decays(setup: &Setup, held: &[Place]) -> u64 {
    let own = held.iter().map(|place| setup.layout(place.stage).len as u64).sum::<u64>();
    let table = held.iter().any(|place| setup.schedule.uses_table(place.stage));
    own + if table { Layout::new(&model::table(&setup.dimensions)).len as u64 } else { 0 }
}

/// What a place copies to save it: replicas share weights and moments out.
fn copied(setup: &Setup, place: Place) -> u64 {
    let writes = |buffer: SavedBuffer| buffer.writer(setup.grid.replicas) == place.replica;
    let of = |layout: &Layout| {
        let weights = if writes(SavedBuffer::Weights) { layout.len } else { 0 };
        let state = state_layouts(&setup.config.optimizer, layout).into_iter().enumerate();
        let here = state.filter(|(number, _)| writes(SavedBuffer::State(*number)));
        weights + here.map(|(_, layout)| layout.len).sum::<usize>()
    };

    let table =
        if place.stage == 0 { of(&Layout::new(&model::table(&setup.dimensions))) } else { 0 };
    (of(&setup.layout(place.stage)) + table) as u64 * VALUE
}

/// What a place copies besides if it is stopped between two sync points.
fn copied_older(setup: &Setup, place: Place) -> u64 {
    let writes = SavedBuffer::Older.writer(setup.grid.replicas) == place.replica;
    if !writes || setup.schedule.tie == Tie::Fresh {
        return 0;
    }

    let (schedule, own) = (&setup.schedule, setup.layout(place.stage).len);
    let table =
        if place.stage == 0 { Layout::new(&model::table(&setup.dimensions)).len } else { 0 };
    // With prediction that of the newest weights too.
    let versions = |delay: usize| delay + usize::from(setup.master(delay) == Master::Always);
    let own = versions(schedule.delays[place.stage]) * own;
    (own + versions(schedule.table_delay(TableEnd::Input)) * table) as u64 * VALUE
}

/// The parts of the tied table's gradient that a place copies if it is stopped between two sync
/// points.
fn copied_parts(setup: &Setup, place: Place) -> u64 {
    let schedule = &setup.schedule;
    match schedule.tie {
        Tie::Head if place.stage == schedule.joiner() => {
            (schedule.delays[0] * Layout::new(&model::table(&setup.dimensions)).len) as u64 * VALUE
        }
        _ => 0,
    }
}

/// What one place's reducer holds of the parts that it reduces at once, where gradients travel (it
/// is not known yet whether they do): room for the slices of the other replicas; bf16 also its own
/// as they travel, and the sum; and in f32 what it adds up.
fn reduced_at_once(setup: &Setup) -> u64 {
    let replicas = setup.grid.replicas;
    if replicas == 1 {
        return 0;
    }

    let wire = setup.config.wire;
    let slices = match wire {
        Wire::F32 => replicas - 1,
        Wire::Bf16 => 2 * (replicas - 1) + 1,
    };

    let slice = CHUNK.div_ceil(replicas);
    (CHUNKS_UNDER_WAY * slices * slice * wire.bytes()) as u64 + slice as u64 * VALUE
}

/// What an evaluation holds at most: nothing is kept but memories, and one layer's work.
fn evaluation(setup: &Setup, stack: &Stack) -> u64 {
    if setup.schedule.evals.is_none() {
        return 0;
    }

    let rows = match setup.config.order() {
        Order::Shuffled => setup.rows,
        Order::Streams => setup.eval_rows_per_replica,
    };

    let value = setup.config.precision.bytes();
    let remembered = setup.config.eval_mem_len() * stack.remembering() * setup.config.model.d_model;
    let work = setup.config.eval_sequence() * stack.evaluation_per_token();
    let wide =
        setup.config.eval_sequence() * 2 * stack.entries_per_token() * (VALUE as usize - value);
    let chunk = stack.chunk(rows * setup.config.eval_sequence()) * VALUE as usize;
    (rows * ((remembered + work) * value + wide) + chunk) as u64
}
