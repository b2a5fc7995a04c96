//! What `ouroboros bench` tells: where every device's time goes, the step's time beside the
//! schedule's, memory.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use super::thousands;
use crate::clock::{StageTimes, TimeKind, Times};
use crate::device::DeviceSetting;
use crate::emulated_compute::{EmulatedCompute, StageTime};
use crate::error::{Error, Result};
use crate::files;
use crate::memory::Prediction;
use crate::params::Layout;
use crate::schedule::step_time;
use crate::setup::Setup;
use crate::stage::Settings;

/// The measurements of one run; written as `bench.json`, whose `stages` are a profile for
/// `--emulated-compute`.
#[derive(Debug, Serialize)]
pub struct Bench {
    name: String,
    grid: String,
    /// On GPUs times are those of the hosts, which do not wait for them: no profile.
    device: DeviceSetting,
    schedule: crate::schedule::ScheduleKind,
    microbatches: usize,
    /// Of a microbatch.
    rows: usize,
    parameters: usize,
    emulated: bool,
    /// Steps that were measured; the time of one, and what the schedule makes of the stages' times.
    steps: usize,
    pub step_s: f64,
    predicted_step_s: f64,
    pub tokens_per_s: f64,
    /// Mean share of the devices' time that is compute.
    pub utilisation: f64,
    /// K times the utilisation: over one device that holds the whole model.
    speed_up: f64,
    stages: Vec<StageRow>,
    devices: Vec<Device>,
}

/// One stage.
#[derive(Debug, Serialize)]
struct StageRow {
    stage: usize,
    #[serde(flatten)]
    time: StageTime,
    /// Values of the pieces in which its gradient is reduced, as the backward makes them.
    bucket_values: Vec<usize>,
}

/// One rank.
#[derive(Debug, Serialize)]
struct Device {
    rank: usize,
    place: String,
    shares: Vec<(&'static str, f64)>,
    /// Processor time of a step, of the thread that computes and of the one that owns MPI.
    compute_cpu_ms: f64,
    mpi_cpu_ms: f64,
    predicted_bytes: u64,
    peak_bytes: Option<u64>,
}

impl Device {
    fn new(setup: &Setup, rank: usize, times: &Times, peak_bytes: Option<u64>) -> Device {
        let share = |(kind, name): &(TimeKind, &'static str)| (*name, times.fraction(*kind));
        Device {
            rank,
            place: setup.grid.name(rank),
            shares: TimeKind::of_steps().iter().map(share).collect(),
            compute_cpu_ms: 1e3 * times.processor[0] / times.steps as f64,
            mpi_cpu_ms: 1e3 * times.processor[1] / times.steps as f64,
            predicted_bytes: Prediction::new(setup, rank).of_device(setup),
            peak_bytes,
        }
    }
}

/// The share of a device's time that is compute. What it was asked to sleep is its work, however
/// late it was woken.
fn busy(setup: &Setup, emulated: Option<&EmulatedCompute>, rank: usize, times: &Times) -> f64 {
    let Some(emulated) = emulated else { return times.fraction(TimeKind::Compute) };
    let asked = setup.grid.held(rank).into_iter().map(|place| {
        let sleep = emulated.sleep(&setup.schedule, place.stage);
        (sleep.forward + sleep.backward).as_secs_f64()
    });

    let microbatches = setup.config.microbatches * times.steps;
    asked.sum::<f64>() * microbatches as f64 / times.seconds
}

impl Bench {
    /// Puts the times of all ranks together.
    ///
    /// # Errors
    /// [`Error::Internal`] if a device has measured nothing: a run's length is checked before it
    /// starts.
    pub fn new(
        setup: &Setup,
        emulated: Option<&EmulatedCompute>,
        times: &[(usize, Option<Times>)],
        peaks: &[(usize, Option<u64>)],
    ) -> Result<Bench> {
        let config = &setup.config;
        let short = || Error::Internal("a device has measured nothing".to_owned());
        let measured: Vec<(usize, &Times)> = times
            .iter()
            .map(|(rank, times)| Some((*rank, times.as_ref()?)))
            .collect::<Option<_>>()
            .ok_or_else(short)?;
        let steps = measured.first().map_or(0, |(_, times)| times.steps);
        let step_s = mean(measured.iter().map(|(_, times)| times.seconds / times.steps as f64));
        let stages: Vec<StageRow> =
            (0..setup.grid.stages).map(|stage| StageRow::new(setup, stage, &measured)).collect();
        let costs = stages.iter().map(|stage| stage.time.costs()).collect();
        let predicted_step_s = step_time(&setup.schedule, costs, 0.0)
            .map_err(|fault| Error::Internal(format!("schedule: {fault}")))?;
        let busy = |rank: usize, times: &Times| busy(setup, emulated, rank, times);
        let utilisation = mean(measured.iter().map(|(rank, times)| busy(*rank, times)));
        let peaks = peaks.iter().map(|(_, peak)| *peak);
        let devices = measured.iter().zip(peaks);
        let devices = devices.map(|((rank, times), peak)| Device::new(setup, *rank, times, peak));

        Ok(Bench {
            name: config.name.clone(),
            grid: setup.grid.to_string(),
            device: if setup.device.is_cuda() { DeviceSetting::Cuda } else { DeviceSetting::Cpu },
            schedule: config.schedule,
            microbatches: config.microbatches,
            rows: setup.rows,
            parameters: setup.parameters(),
            emulated: emulated.is_some(),
            steps,
            step_s,
            predicted_step_s,
            tokens_per_s: (config.batch * config.data.sequence) as f64 / step_s,
            utilisation,
            speed_up: utilisation * setup.grid.devices() as f64,
            devices: devices.collect(),
            stages,
        })
    }

    /// Writes `bench.json`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, out: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::Internal(error.to_string()))?;
        files::write(&out.join("bench.json"), text.as_bytes()).map_err(|error| {
            Error::config("--out", out.display(), format!("bench.json cannot be written ({error})"))
        })
    }

    /// The table. `shared` says that the ranks are threads of one process, so that only their sum
    /// can be measured.
    pub fn table(&self, shared: bool) -> String {
        let mut text = format!("\n% of the time       {:>8}", "");
        for (_, name) in TimeKind::of_steps() {
            let _ = write!(text, " {name:>10}");
        }

        text.push_str("   peak MiB  of prediction\n");
        for device in &self.devices {
            let _ = write!(text, "{:<28}", device.place);
            for (_, share) in &device.shares {
                let _ = write!(text, " {:>10.1}", share * 100.0);
            }

            match device.peak_bytes.filter(|_| !shared) {
                Some(peak) => {
                    let ratio = peak as f64 / device.predicted_bytes as f64;
                    let _ =
                        writeln!(text, " {:>10.1} {ratio:>14.2}", peak as f64 / f64::from(1 << 20));
                }
                None => text.push_str("          -              -\n"),
            }
        }

        text.push_str("\nms                   forward   backward     copies     update      table     reduce\n");
        for stage in &self.stages {
            let _ = write!(text, "stage {:<11}", stage.stage);
            let StageTime { forward_ms, backward_ms, copies_ms, update_ms, table_ms, reduce_ms } =
                stage.time;
            for ms in [forward_ms, backward_ms, copies_ms, update_ms, table_ms, reduce_ms] {
                let _ = write!(text, " {ms:>10.2}");
            }

            text.push('\n');
        }

        let of = |cpu: fn(&Device) -> f64| mean(self.devices.iter().map(cpu));
        let (compute, mpi) = (of(|device| device.compute_cpu_ms), of(|device| device.mpi_cpu_ms));
        let _ = writeln!(
            text,
            "\nprocessor time      {compute:.1} ms a step and rank in the thread that computes, {mpi:.1} ms in MPI's"
        );

        let off = self.predicted_step_s / self.step_s;
        let _ =
            writeln!(text, "step                {:.4} s over {} steps", self.step_s, self.steps);
        let _ = writeln!(
            text,
            "schedule predicts   {:.4} s from these times, {off:.3} of it",
            self.predicted_step_s
        );

        let _ = writeln!(
            text,
            "utilisation         {:.3}; speed-up {:.2}",
            self.utilisation, self.speed_up
        );

        let _ = writeln!(text, "tokens/s            {}", thousands(self.tokens_per_s as u64));
        text
    }
}

impl StageRow {
    fn new(setup: &Setup, stage: usize, measured: &[(usize, &Times)]) -> StageRow {
        let found: Vec<(&StageTimes, &Times)> = measured
            .iter()
            .flat_map(|(_, times)| times.stages.iter().map(move |of| (of, *times)))
            .filter(|(of, _)| of.stage == stage)
            .collect();
        let ms = |seconds: f64, count: usize| 1e3 * seconds / count.max(1) as f64;
        let waits =
            found.iter().map(|(of, times)| ms(times.shares[TimeKind::Reduce as usize], of.updates));
        let time = StageTime {
            forward_ms: mean(found.iter().map(|(of, _)| ms(of.forward, of.microbatches))),
            backward_ms: mean(found.iter().map(|(of, _)| ms(of.backward, of.microbatches))),
            copies_ms: mean(found.iter().map(|(of, _)| ms(of.copies, of.microbatches))),
            update_ms: mean(found.iter().map(|(of, _)| ms(of.update, of.updates))),
            table_ms: mean(found.iter().map(|(of, _)| ms(of.table, of.updates))),
            reduce_ms: waits.fold(f64::INFINITY, f64::min),
        };
        StageRow { stage, time, bucket_values: buckets(setup, stage) }
    }
}

/// The sizes of a stage's buckets, from its last layers to its first.
fn buckets(setup: &Setup, stage: usize) -> Vec<usize> {
    let stack = setup.stack(stage);
    let layout = Layout::new(&stack.own());
    let bucket = Settings::new(&setup.config, setup.readback).bucket.unwrap_or(usize::MAX);
    let starts: Vec<usize> =
        stack.runs(bucket).iter().rev().map(|run| layout.offset(run.first)).collect();
    let ends = std::iter::once(layout.len).chain(starts.iter().copied());
    ends.zip(&starts).map(|(end, start)| end - start).collect()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}
