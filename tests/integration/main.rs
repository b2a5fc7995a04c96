//! Whole runs: threads against the oracle, against plain training, real mpirun, faults, the command line.

mod bench;
mod command_line;
mod data;
mod cures;
mod documents;
mod faults;
mod field;
mod gpu;
mod harness;
mod hugging_face;
mod modules;
mod mpirun;
mod oracle;
mod plain;
mod prepare;
mod real_text;
mod reference;
mod resume;
mod staleness;
mod stop;
mod study;
mod trace;
