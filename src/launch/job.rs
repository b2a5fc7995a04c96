//! What `train` is asked to do, made into a setup.

use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::Device;

use crate::checkpoint::Checkpoint;
use crate::config::{CheckpointConfig, Config};
use crate::control::Mode;
use crate::device::ComputeDevice;
use crate::device::queues::CudaQueues;
use crate::error::{Error, Result};
use crate::grid::{Grid, Place};
use crate::inject::{Fault, Injection};
use crate::runtime;
use crate::setup::Setup;
use crate::topology::Topology;
use crate::{clock, memory};

/// Steps of a measurement, besides those that fill and drain the pipeline.
const MEASURED_STEPS: usize = 16;

/// What carries tensors between places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// Threads of one process.
    Local,
    /// The ranks of mpirun; tensors of GPUs through the memory of their hosts.
    Mpi,
    /// The ranks of mpirun, each with a GPU: the default where they have.
    Nccl,
}

/// Where a run begins.
pub(super) enum Origin {
    /// Weights of its own, by its seed.
    Nothing,
    /// Those of a saved state, at step 0.
    Weights(Checkpoint),
    /// A state that it goes on from.
    State(Checkpoint),
}

impl Origin {
    /// The setup of the run.
    ///
    /// # Errors
    /// [`Error::Config`] about a setting that would make another run, or model, of it.
    fn begin(self, setup: Setup) -> Result<Setup> {
        match self {
            Origin::Nothing => Ok(setup),
            Origin::Weights(saved) => setup.begin_with(saved),
            Origin::State(saved) => setup.resume(saved),
        }
    }
}

/// What `train` is asked to do.
#[derive(Debug, Clone)]
pub struct Job {
    pub config: PathBuf,
    pub sets: Vec<String>,
    pub grid: Option<Grid>,
    pub out: Option<PathBuf>,
    pub transport: Option<Transport>,
    /// The description of the machine; whether its links are tested first.
    pub topology: Option<PathBuf>,
    pub self_test: bool,
    pub oracle: bool,
    /// Go on from this saved state, or the newest in this folder; an empty path is the run's own
    /// folder.
    pub resume: Option<PathBuf>,
    /// Begin with the weights of this saved state, or the newest in this folder.
    pub init: Option<PathBuf>,
    pub mode: Mode,
    /// Steps of a run that only measures; none: as many as the schedule needs.
    pub steps: Option<usize>,
}

impl Job {
    /// What every command says; the rest is as it is where nothing is said.
    pub fn new(
        config: PathBuf,
        sets: Vec<String>,
        grid: Option<Grid>,
        out: Option<PathBuf>,
        transport: Option<Transport>,
        mode: Mode,
    ) -> Job {
        let (topology, self_test, oracle) = (None, false, false);
        let (resume, init, steps) = (None, None, None);
        Job {
            config,
            sets,
            grid,
            out,
            transport,
            topology,
            self_test,
            oracle,
            resume,
            init,
            mode,
            steps,
        }
    }

    /// The setup, and the machine that it is for if that is described.
    ///
    /// # Errors
    /// Whatever is wrong with what is asked.
    pub(super) fn setup(&self) -> Result<(Setup, Option<Topology>)> {
        runtime::check_libtorch()?;
        let mut config = Config::load(&self.config, &self.sets, self.grid)?;
        let topology = self.topology.as_deref().map(Topology::load).transpose()?;
        if let Some(topology) = &topology {
            config.grid.order = topology.order;
            topology.check_grid(config.grid())?;
        }

        if self.mode.bench {
            config = self.measured(config);
        }

        if !self.oracle && config.eval.as_ref().is_some_and(|eval| !eval.drain) {
            let remedy = "only the oracle reads the weights while steps are under way; leave it out, or add --oracle";
            return Err(Error::config("eval.drain", false, remedy));
        }

        let setup = Setup::new(config)?;
        if self.mode.bench {
            clock::check(&setup.schedule)?;
        }

        if self.oracle
            && let Some(window) = self.mode.trace
        {
            let remedy = "the oracle has no places whose time could be shown; leave --oracle out";
            return Err(Error::config("--trace", window, remedy));
        }

        if let Some(emulated) = &self.mode.emulated {
            emulated.check(setup.grid.stages)?;
        }

        if let Some(injection) = self.mode.inject {
            self.check_injection(injection, &setup)?;
        }

        Ok((setup, topology))
    }

    /// Whether a fault on purpose can happen.
    fn check_injection(&self, injection: Injection, setup: &Setup) -> Result<()> {
        let beyond = |value: Option<usize>, end: usize| value.is_some_and(|value| value >= end);
        let (grid, steps) = (setup.grid, setup.config.steps);
        if beyond(injection.stage, grid.stages)
            || beyond(injection.replica, grid.replicas)
            || beyond(injection.step, steps)
        {
            let remedy = format!("the grid is {grid} and the run has {steps} steps");
            return Err(Error::config("--inject", injection, remedy));
        }

        let place =
            Place { stage: injection.stage.unwrap_or(0), replica: injection.replica.unwrap_or(0) };
        if injection.fault == Fault::AlterTable
            && (!setup.dimensions.tied || grid.twin(place).is_none())
        {
            let remedy =
                "take an end of a line of two stages or more, with a model.tie other than \"none\"";
            return Err(Error::config(
                "--inject",
                format!("{injection}, which holds no copy"),
                remedy,
            ));
        }

        Ok(())
    }

    /// How the ranks run: with the fault that is injected drawn, and the steps that are still to be traced.
    pub(super) fn mode(&self, setup: &Setup) -> Mode {
        let (grid, config) = (setup.grid, &setup.config);
        let inject =
            self.mode.inject.map(|injection| injection.drawn(grid, config.steps, config.seed));
        let trace = self.mode.trace.and_then(|window| window.after(setup.start()));
        Mode { inject, trace, ..self.mode.clone() }
    }

    /// Says what of the steps that are to be traced are made already.
    pub(super) fn tell_of_trace(&self, setup: &Setup) {
        let Some(window) = self.mode.trace else { return };
        match window.after(setup.start()) {
            None => complain!("note: the steps {window} are made already, and are not traced"),
            Some(rest) if rest != window => {
                complain!("note: of the steps {window} some are made already: {rest} are traced");
            }
            Some(_) => {}
        }
    }

    /// Where the run begins.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is no state, or are no weights, to use.
    pub(super) fn origin(&self, setup: &Setup) -> Result<Origin> {
        let resumed = match &self.resume {
            None => None,
            Some(own) if own.as_os_str().is_empty() => {
                let out = self.out(setup);
                let found = Checkpoint::newest(&out)?;
                if found.is_none() {
                    say!("no checkpoint in {} yet: starting at step 0", out.display());
                }

                found
            }
            Some(path) => Some(Checkpoint::open(path)?),
        };

        // Weights that were put into the run's folder are no state of its training.
        let resumed = resumed.filter(|state| self.init.is_none() || state.step() > 0);
        match (resumed, &self.init) {
            (Some(state), _) => Ok(Origin::State(state)),
            (None, Some(path)) => Checkpoint::open(path).map(Origin::Weights),
            (None, None) => Ok(Origin::Nothing),
        }
    }

    /// The setup of the run that begins there.
    ///
    /// # Errors
    /// [`Error::Config`] about a setting that would make another run, or model, of it, or about steps
    /// to be traced that it does not make.
    pub(super) fn begin(&self, origin: Origin, setup: Setup) -> Result<Setup> {
        let setup = origin.begin(setup)?;
        let (start, steps) = (setup.start(), setup.config.steps);
        let resumed = setup.resumed.is_some();
        self.mode.trace.map_or(Ok(()), |window| window.check(start, steps, resumed))?;
        Ok(setup)
    }

    /// The same training without the sync points that would disturb a measurement.
    fn measured(&self, config: Config) -> Config {
        let mut config = Config {
            sync_steps: 0,
            sync_at: Vec::new(),
            eval: None,
            checkpoint: CheckpointConfig::default(),
            ..config
        };

        let asked = self.sets.iter().any(|set| set.trim_start().starts_with("steps="));
        if let Some(steps) = self.steps {
            config.steps = steps;
        } else if !asked {
            let lag = (config.slack * config.grid.stages.saturating_sub(1))
                .div_ceil(config.microbatches.max(1));
            let longest = config.grid.delays.iter().flatten().copied().max().unwrap_or(0);
            config.steps = MEASURED_STEPS + 4 * (lag.max(longest) + config.grid.reduce_delay);
        }
        config
    }

    /// Whether the ranks of this process and their neighbours fit into memory, as far as that can
    /// be told before anything is computed. Stages that only sleep hardly touch theirs.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub(super) fn check_memory(
        &self,
        setup: &Setup,
        chosen: &ComputeDevice,
        ranks: Range<usize>,
        neighbours: &[(usize, String)],
    ) -> Result<()> {
        match chosen {
            _ if self.mode.emulated.is_some() => Ok(()),
            ComputeDevice::Cuda(gpu) => memory::check_gpu_size(setup, ranks, gpu.bytes),
            ComputeDevice::Cpu => memory::check(setup, ranks, neighbours),
        }
    }

    /// Whether they fit into what their GPU has left, now that everything is connected. Places that
    /// are threads share one.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub(super) fn check_gpu_memory(&self, setup: &Setup, ranks: Range<usize>) -> Result<()> {
        match setup.device {
            Device::Cuda(index) if self.mode.emulated.is_none() => {
                let queues = CudaQueues::new(index)?;
                let (left, bytes) = queues.memory()?;
                memory::check_gpu(setup, ranks, left, bytes)
            }
            _ => Ok(()),
        }
    }

    /// The run's folder.
    pub(super) fn out(&self, setup: &Setup) -> PathBuf {
        let name = &setup.config.name;
        let folder = if self.mode.bench { format!("{name}-bench") } else { name.clone() };
        self.out.clone().unwrap_or_else(|| Path::new("runs").join(folder))
    }
}
