//! What is made, and tried for the first time, before the first action.

use std::path::PathBuf;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::Worker;
use super::compute::Compute;
use super::context::Context;
use super::deferred::Deferred;
use super::faults::Faults;
use super::place::{PlaceState, held};
use super::probes::Probes;
use super::tied::TiedTable;
use super::tracing::Tracing;
use super::writer::Writer;
use crate::clock::Clock;
use crate::comm::Ports;
use crate::control::Mode;
use crate::data::Batches;
use crate::device::{context, timing};
use crate::error::Result;
use crate::memory::Gauge;
use crate::model::{Dimensions, Memory, ModelConfig, Stack};
use crate::number::Readback;
use crate::params::{Layout, Versions};
use crate::schedule::Tie;
use crate::setup::Setup;
use crate::stage::Input;

/// The worker of a rank.
pub(super) fn worker(
    setup: Arc<Setup>,
    rank: usize,
    ports: Ports,
    out: PathBuf,
    mode: Mode,
) -> Result<Worker> {
    // Per thread: the thread pool of libtorch's kernels belongs to the thread that calls them.
    tch::set_num_threads(setup.config.threads as i32);
    warm_up(setup.config.precision.kind(), setup.device)?;
    let mut gauge = Gauge::for_device(setup.device)?;

    let held = setup.grid.held(rank);
    let mut places = Vec::new();
    for (place, ends) in held.iter().zip(ports.places) {
        places.push(PlaceState::new(&setup, *place, ends, mode.emulated.as_ref())?);
    }

    let shared = places.iter().map(|place| place.shared as u64).sum();
    gauge.iter_mut().for_each(|gauge| gauge.exclude_shared(shared));
    let mut table = TiedTable::of_rank(&setup, rank, mode.emulated.is_some())?;
    if setup.readback == Readback::Deferred {
        rehearse(&setup, &mut places, &mut table)?;
    }

    if setup.device.is_cuda() && timing::wanted() {
        context::warn_of_waits();
    }

    let stages: Vec<usize> = held.iter().map(|place| place.stage).collect();
    let replica = held[0].replica;
    let faults = Faults { injection: mode.inject, replica };
    mode.trace.into_iter().for_each(|window| ports.gate.tracer.plan(window));
    let clock = Clock::new(&setup.schedule, &stages);
    let tracing = Tracing::new(&setup, &ports.gate, &ports.reports, out.clone(), rank, stages);
    let probes = Probes::new(clock, &ports.gate, faults, tracing?);
    Ok(Worker {
        places,
        table,
        batches: Batches::new(Arc::clone(&setup.corpus), setup.config.reading()),
        deferred: Deferred::new(setup.device, ports.reports.clone(), ports.transfers.clone())?,
        probes,
        gauge,
        writer: Some(Writer::start(out, ports.reports.clone(), Arc::clone(&ports.gate))?),
        stop: None,
        context: Context {
            rank,
            replica,
            mode,
            faults,
            reports: ports.reports,
            gate: ports.gate,
            transfers: ports.transfers,
            setup,
        },
    })
}

/// One microbatch of nothing forward and backward through every stage, of which nothing stays but
/// what is loaded and taken on the way: a GPU loads a kernel when it is first used, and may wait
/// for all its work then. By the time that receives are under way, which wait for others, it must
/// have happened.
fn rehearse(setup: &Setup, places: &mut [PlaceState], table: &mut Option<TiedTable>) -> Result<()> {
    let (rows, sequence, device) =
        (setup.rows as i64, setup.config.data.sequence as i64, setup.device);
    for PlaceState { place, compute, versions, optimizer, meter, .. } in places {
        let Compute::Real(stage) = compute else { continue };
        // Of all clusters that the vocabulary has.
        let spread = Tensor::f_arange(rows * sequence, (Kind::Int64, Device::Cpu))?;
        let spread =
            spread.f_mul_scalar((setup.dimensions.vocabulary / (rows * sequence)).max(1))?;
        let tokens = spread.f_remainder(setup.dimensions.vocabulary)?.f_view([rows, sequence])?;
        let hidden = [rows, sequence, setup.dimensions.d_model];
        let x = match place.stage {
            0 => tokens.shallow_clone(),
            _ => Tensor::f_zeros(hidden, (setup.config.precision.kind(), device))?,
        };

        let last = place.stage == setup.grid.stages - 1;
        // One that the rows are whole: its mask is another kernel.
        let mask = setup.config.data.document_mask;
        let documents = mask.then(|| tokens.zeros_like());
        let input = Input { x, targets: last.then_some(tokens), restart: true, documents };
        stage.rehearse(
            held(versions, table.as_ref().map(TiedTable::table)),
            &input,
            setup.hidden_wire(),
        )?;

        optimizer.rehearse(versions.gradient(0))?;
        let newest = versions.newest();
        let used = versions.used(newest..newest + 1).next().map(|(_, flat)| flat);
        if let Some((meter, used)) = meter.as_ref().zip(used) {
            meter.rehearse(used)?;
        }
    }

    if let Some((meter, table)) =
        table.as_ref().and_then(|tied| Some((tied.meter()?, tied.table())))
    {
        meter.rehearse(table.flat())?;
    }

    table.as_mut().map_or(Ok(()), |table| table.table_mut().forget())
}

/// One forward and backward of a tiny model: loads the parts of libtorch that training needs, so
/// that the peak memory measured after it is the stage's, and the first step is as fast as the
/// others.
fn warm_up(kind: Kind, device: Device) -> Result<()> {
    let model = ModelConfig {
        layers: 1,
        d_model: 64,
        heads: 2,
        d_ff: 256,
        tie: Tie::Untied,
        ..ModelConfig::default()
    };

    let d = Dimensions::new(&model, 256, 64);
    let stack = Stack::new(&d, 0..1);
    let layout = Layout::new(stack.parameters());
    let versions =
        Versions::new(layout.clone(), layout.initial(0)?.f_to_device(device)?, 1, 1, kind)?;

    let tokens = Tensor::f_zeros([4, d.sequence], (Kind::Int64, Device::Cpu))?;
    let weights = versions.parameters(0, 0);
    let hidden = stack.forward(weights, &tokens, &mut Memory::new(0), None)?;
    Ok(stack.loss(weights, &hidden, &tokens, None)?.root.f_backward()?)
}
