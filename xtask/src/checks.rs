//! `make lint`: what is checked without running the project's programs.

use anyhow::{Context, Result, bail};

use crate::command::{cargo, root, step, tool};

const CARGO_DENY_VERSION: &str = "0.20.2";

pub(crate) fn lint() -> Result<()> {
    step(
        "check the formatting",
        &mut cargo(&["fmt", "--all", "--check"]),
    )?;
    let fuzz = "fuzz/Cargo.toml";
    if root().join(fuzz).is_file() {
        let arguments = ["fmt", "--manifest-path", fuzz, "--check"];
        step(
            "check the formatting of the fuzz targets",
            &mut cargo(&arguments),
        )?;
    }
    let clippy = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ];
    step("run clippy", &mut cargo(&clippy))?;
    tool("deny", CARGO_DENY_VERSION)?;
    let deny = [
        "deny",
        "--log-level",
        "error",
        "check",
        "bans",
        "licenses",
        "sources",
    ];
    step("check the dependencies", &mut cargo(&deny))?;
    advisories()?;
    step(
        "build the documentation",
        cargo(&["doc", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings"),
    )
}

/// Known vulnerabilities. Their list comes from the network; without it nothing is known, which
/// is said and is not an error of the project.
fn advisories() -> Result<()> {
    eprintln!("==> check for known vulnerabilities");
    let checked = cargo(&["deny", "--log-level", "error", "check", "advisories"])
        .output()
        .context("starting cargo deny")?;
    let said = String::from_utf8_lossy(&checked.stderr);
    if checked.status.success() {
        eprintln!("==> check for known vulnerabilities: none");
        Ok(())
    } else if is_fetch_failure(&said) {
        eprintln!(
            "==> check for known vulnerabilities: NOT DONE, the advisory database cannot be fetched"
        );
        Ok(())
    } else {
        eprint!("{said}");
        bail!("a dependency has a known vulnerability");
    }
}

fn is_fetch_failure(said: &str) -> bool {
    said.contains("failed to fetch advisory database")
        || said.contains("failed to load advisory database")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_database_is_excused() {
        assert!(is_fetch_failure(
            "[ERROR] failed to fetch advisory database ..."
        ));
        assert!(!is_fetch_failure("error[vulnerability]: use after free"));
    }
}
