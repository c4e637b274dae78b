//! What `make` does: builds, tests and checks of the whole project.
//!
//! Each command is a list of programs that run one after the other, with what they print left as
//! it is. Nothing here knows how the parts work.

mod checks;
mod command;
mod runs;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
make demo    move VMs between two racks of a lab on this machine, compare with stock QEMU
make test    every test: units, protocols, real VMs
make lint    formatting, clippy, dependencies, documentation
make bench   the benchmarks
make fuzz    every fuzz target, SECONDS=60 each
make install put gangway and the library for shared memory below PREFIX=/usr/local (DESTDIR=)
make clean   remove what was built, unpacked and measured

demo and test need Debian 12 and root: they install packages and make network namespaces.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["demo"] => runs::demo(),
        ["test"] => runs::test(),
        ["bench"] => runs::bench(),
        ["fuzz"] => runs::fuzz("60"),
        ["fuzz", "--seconds", seconds] => runs::fuzz(seconds),
        ["install", "--to", prefix] => runs::install(prefix),
        ["lint"] => checks::lint(),
        ["clean"] => runs::clean(),
        ["help" | "--help"] | [] => {
            println!("{HELP}");
            Ok(())
        }
        other => bail!("there is no command `{}`; see `make help`", other.join(" ")),
    }
}
