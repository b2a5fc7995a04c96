//! `ouroboros completions SHELL` and `ouroboros man`: the command line for shells and readers, made
//! by clap's crates.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::error::{Error, Result};

const NAME: &str = "ouroboros";

/// Prints the completions of a shell.
///
/// # Errors
/// [`Error::Internal`] if they cannot be made.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    print(script)
}

/// Prints the man page: that of the program, then those of its commands.
///
/// # Errors
/// [`Error::Internal`] if it cannot be made.
pub fn man() -> Result<()> {
    let mut command = Cli::command().name(NAME);
    command.build();
    let mut page = Vec::new();
    let unmade = |error: std::io::Error| Error::Internal(format!("the man page: {error}"));
    clap_mangen::Man::new(command.clone()).render(&mut page).map_err(unmade)?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        clap_mangen::Man::new(sub.clone()).render(&mut page).map_err(unmade)?;
    }

    print(page)
}

fn print(bytes: Vec<u8>) -> Result<()> {
    let text = String::from_utf8(bytes).map_err(|error| Error::Internal(error.to_string()))?;
    put!("{text}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_completed() {
        let mut script = Vec::new();
        clap_complete::generate(Shell::Bash, &mut Cli::command(), NAME, &mut script);
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("--oracle") && script.contains("completions"), "{script}");
    }
}
