//! Ouroboros trains Transformer language models on a grid of K decoupled pipeline stages times R data-parallel
//! replicas. Each stage applies gradients that are a known number of updates old, so no stage waits for the whole
//! pipeline.
//!
//! The way of a batch, in the order of the modules below; a file uses only what stands above it:
//!
//! ```text
//! config     what is asked            -> setup   what is true
//! grid       K x R places             -> partition   layers of each stage
//! topology   the nodes below them     -> selftest    whether their links do what is said of them
//! delay      versions, sync points    -> schedule    what each stage does, in which order
//! precision  of weights and activations  wire        of what travels
//! device     processor or GPU            number      what it computes for the host, known or read later
//!
//! worker:    for action in schedule.device_actions(device):
//!                Load                    data::Batches
//!                Forward, Backward       stage::Stage       at the step's version of the weights (params::Versions)
//!                Send*, Recv*            comm::Link         activations down, gradients up
//!                Reduce                  comm::ReplicaGroup sum over the replicas
//!                Update                  optim::Optimizer   the next version
//!                Part ... UpdateTable    table::Table       the tied embedding, at both ends of the pipeline
//!                Save                    checkpoint::Snapshot   the state, copied and written beside the training
//!
//! metrics    what the places report      checkpoint   what is saved, and how a run goes on from it
//! pulse      what a rank is doing, for the watchdog of metrics
//! panel      how far a place may go, and where it is told to stop (stop, signals: by whom)
//! failure    panics become errors, and of several the first that is a cause is shown; of a rank that cannot speak any
//!            more its neighbours tell (comm::mpi)
//! emulator   the same arithmetic in one process: the definition of correct
//! launch     makes the world: threads, MPI ranks, or the oracle; first error wins
//! ```
//!
//! Whoever reads [`delay`], [`schedule`] and [`worker`] has read the algorithm.
//!
//! Letters used everywhere: stage k of K, replica r of R, step t, microbatch j of m; rows B (b in a microbatch), tokens
//! T, hidden size D, vocabulary V.

mod allocator;
pub mod grid;
pub mod error;
pub mod runtime;
pub mod device;
pub mod topology;
pub mod failure;
pub mod partition;
pub mod delay;
pub mod schedule;
pub mod precision;
pub mod wire;
pub mod random;
pub mod data;
pub mod model;
pub mod number;
pub mod params;
pub mod optim;
pub mod table;
pub mod config;
pub mod emulation;
pub mod checkpoint;
pub mod setup;
pub mod stage;
pub mod inject;
pub mod pulse;
pub mod panel;
pub mod stop;
pub mod metrics;
pub mod comm;
pub mod signals;
pub mod selftest;
pub mod prepare;
pub mod worker;
pub mod emulator;
pub mod launch;
pub mod cli;
pub mod commands;
