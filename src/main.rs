//! The `ouroboros` program: reads the command line, runs a command, chooses the exit code.

// No panic reaches a user; tests may fail by one (clippy.toml).
#![deny(clippy::unwrap_used)]

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use ouroboros::cli::{self, Cli, Command, DataCommand, TokenizerCommand};
use ouroboros::error::{Error, Result};
use ouroboros::{
    commands, complain, console, control, device, failure, hugging_face, launch, prepare, report,
    runtime, study, watch,
};

fn main() -> ExitCode {
    device::prepare_environment();
    failure::hush_panics();
    control::survive_file_limit();

    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.render().to_string();
            let hint = cli::hint(std::env::args_os())
                .map(|hint| format!("\n\n{hint}"))
                .unwrap_or_default();
            let text = format!("{}{hint}", text.trim_start_matches("error: ").trim_end());
            return ExitCode::from(launch::refuse(&Error::Usage(text)));
        }
    };

    if !matches!(cli.command, Command::Train(_)) {
        control::not_expected();
    }

    if !matches!(
        cli.command,
        Command::Schedule(_)
            | Command::Doctor
            | Command::Config
            | Command::Completions { .. }
            | Command::Man
            | Command::Eval(_)
            | Command::Generate(_)
            | Command::Watch(_)
    ) {
        console::go_on_without_reader();
    }

    ExitCode::from(run(cli.command))
}

/// The exit code of a command.
fn run(command: Command) -> u8 {
    match command {
        Command::Train(args) => {
            if args.dies_with_parent {
                runtime::die_with_parent();
            }

            launch::train(&args.job())
        }
        Command::Bench(args) => {
            args.job().map_or_else(|error| launch::refuse(&error), |job| launch::train(&job))
        }
        Command::Study(args) => answer_code(|| study::study(&args.request())),
        Command::Report(args) => answer(|| report::report(&args.request())),
        Command::Watch(args) => answer(|| watch::watch(&args.request())),
        Command::Init(args) => answer(|| commands::init(&args)),
        Command::Import(args) => answer(|| hugging_face::import(&args.request())),
        Command::Export(args) => answer(|| hugging_face::export(&args.request())),
        Command::Eval(args) => answer(|| commands::eval(&args)),
        Command::Generate(args) => answer(|| commands::generate(&args)),
        Command::Schedule(args) => answer(|| commands::schedule(&args)),
        Command::Data(DataCommand::Prepare(args)) => {
            answer(|| prepare::prepare(&args.request()).map(|_| ()))
        }
        Command::Data(DataCommand::Tokenizer(TokenizerCommand::Train(args))) => {
            answer(|| prepare::train_tokenizer(&args.request()))
        }
        Command::Data(DataCommand::Check { file }) => answer(|| prepare::check(&file)),
        Command::Doctor => answer(commands::doctor),
        Command::Config => answer(commands::config),
        Command::Completions { shell } => answer(|| commands::completions(shell)),
        Command::Man => answer(commands::man),
    }
}

fn answer(command: impl FnOnce() -> Result<()>) -> u8 {
    answer_code(|| command().map(|()| 0))
}

/// The exit code of a command that chooses it.
fn answer_code(command: impl FnOnce() -> Result<u8>) -> u8 {
    match failure::caught(command) {
        Ok(code) => code,
        Err(error) => {
            complain!("error: {error}");
            error.exit_code()
        }
    }
}
