//! Ouroboros trains Transformer language models on a grid of K decoupled pipeline stages times R
//! data-parallel replicas. Each stage applies gradients that are a known number of updates old, so
//! no stage waits for the whole pipeline.
//!
//! A step, as the worker of a device makes it:
//!
//! ```text
//! while let Some(action) = next_action()      the schedule's list, as far as the gate lets it
//!     Load                    data::Batches
//!     Forward, Backward       stage::Stage       at the step's version of the weights (params::Versions)
//!     Send*, Recv*            comm::Link         activations down, gradients up
//!     Reduce                  comm::ReplicaGroup sum over the replicas
//!     Update                  optim::Optimizer   the next version
//!     Part ... UpdateTable    table::Table       the tied embedding, at both ends of the pipeline
//!     Save                    checkpoint::Snapshot   the state, copied and written beside the training
//! ```
//!
//! The modules, in the order in which they are declared; a file uses only what stands above it:
//!
//! ```text
//! console    all that is printed, and what happens where nobody reads it
//! palette    colours of pictures               bar         progress of what takes long
//! awake       time in which this process ran
//! files      whole files, names of their own
//! allocator  the heap                        grid        K x R places
//! error      what goes wrong, in words       runtime     libtorch's version, the log
//! device     processor or GPU                topology    the nodes below the grid
//! lock       on a run's folder
//! failure    panics become errors            partition   layers of each stage
//! delay      versions, sync points           schedule    what each stage does, in which order
//! precision  of weights and activations      wire        of what travels
//! random     pure functions of the seed      data        [data], corpus, batches
//! model      [model], layers, families       number      scalars of a device, read now or later
//! params     flat buffers and versions       optim       [optimizer], one file a rule
//! table      the tied embedding              staleness   how far weights move while gradients travel
//! config     what is asked: the other sections, and their checks
//! emulated_compute  stages that sleep       checkpoint  saved states
//! setup      what is true                    stage       forward and backward of a microbatch
//! inject     faults on purpose               clock       where a device's time goes
//! trace      what every place did, and when  control     reports, controls, gate, heartbeat, stop
//! comm       links and groups: threads, MPI, NCCL
//! memory     predicted, measured, limited    metrics     sinks, summary, the table of a benchmark
//! coordinator  rank 0: steps, commits, stop, watchdog    selftest    whether links do what is said of them
//! prepare    corpora                         worker      one device at work
//! oracle     the same arithmetic in one process: the definition of correct
//! launch     makes the world: threads, MPI ranks, or the oracle; first error wins
//! study      what delay costs: variants over paired seeds, by the oracle
//! report     what runs have left, as a page  watch       a run as it goes, on a terminal
//! generation  texts that grow                hugging_face  models in and out
//! cli        what can be typed               commands    the short ones
//! ```
//!
//! Whoever reads `delay`, `schedule` and `worker` has read the algorithm.
//!
//! Letters used everywhere: stage k of K, replica r of R, step t, microbatch j of m; rows B (b in a
//! microbatch), tokens T, hidden size D, vocabulary V.

// No panic reaches a user; tests may fail by one (clippy.toml).
#![deny(clippy::unwrap_used)]

#[macro_use]
pub mod console;
mod bar;
mod palette;
mod allocator;
mod awake;
mod files;
pub mod grid;
pub mod error;
pub mod runtime;
mod lock;
pub mod device;
pub mod topology;
pub mod failure;
mod partition;
mod delay;
pub mod schedule;
mod precision;
mod wire;
mod random;
pub mod data;
pub mod model;
pub mod number;
pub mod params;
pub mod optim;
mod table;
mod staleness;
pub mod config;
pub mod emulated_compute;
pub mod checkpoint;
pub mod setup;
pub mod stage;
mod inject;
mod clock;
pub mod trace;
pub mod control;
pub mod comm;
mod memory;
pub mod metrics;
pub mod coordinator;
mod selftest;
pub mod prepare;
mod worker;
mod oracle;
pub mod launch;
pub mod study;
pub mod report;
pub mod watch;
pub mod generation;
pub mod hugging_face;
pub mod cli;
pub mod commands;
