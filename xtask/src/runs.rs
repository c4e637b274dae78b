//! Commands that run the project's programs: demo, tests, benchmarks, fuzzing.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, program, root, step, tool};

const CARGO_NEXTEST_VERSION: &str = "0.9.143";
const CARGO_FUZZ_VERSION: &str = "0.13.2";

/// Real VMs between two racks, each technique once, and the report about it.
pub(crate) fn demo() -> Result<()> {
    prepare_lab()?;
    let start = Instant::now();
    step(
        "run the scenario racks-small",
        &mut program(
            "target/release/gangway-lab",
            &["run", "racks-small", "--out", "out/demo"],
        ),
    )?;
    let report = root().join("out/demo/report.html");
    println!(
        "\nThe report is {} (measured in {:.0} s).",
        report.display(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Everything that is tested, with the programs that users get.
pub(crate) fn test() -> Result<()> {
    tool("nextest", CARGO_NEXTEST_VERSION)?;
    prepare_lab()?;
    step(
        "test the documentation",
        &mut cargo(&["test", "--doc", "--workspace", "--release"]),
    )?;
    step(
        "run the tests",
        &mut cargo(&["nextest", "run", "--workspace", "--release"]),
    )
}

/// Packages, programs and the guests' image.
fn prepare_lab() -> Result<()> {
    step("set up the machine", &mut program("scripts/setup", &[]))?;
    step(
        "build the programs",
        &mut cargo(&["build", "--release", "--workspace", "--locked"]),
    )?;
    step(
        "build the guests' image",
        &mut program("scripts/build-guest-image", &[]),
    )
}

/// The program, and the library where the program looks for it, below `prefix`.
pub(crate) fn install(prefix: &str) -> Result<()> {
    step(
        "build the program and the library",
        &mut cargo(&[
            "build",
            "--release",
            "--locked",
            "-p",
            "gangway",
            "-p",
            "cow-shim",
        ]),
    )?;
    for (mode, built, to) in [
        ("755", "target/release/gangway", "bin/gangway"),
        (
            "644",
            "target/release/libgangway_cow.so",
            "lib/gangway/libgangway_cow.so",
        ),
    ] {
        let to = format!("{prefix}/{to}");
        let arguments = ["-D", "-m", mode, built, &to];
        step(
            &format!("install {to}"),
            &mut program("install", &arguments),
        )?;
    }
    Ok(())
}

pub(crate) fn bench() -> Result<()> {
    step("run the benchmarks", &mut cargo(&["bench", "--workspace"]))
}

/// Every fuzz target for the same time; a finding does not keep the others from running.
pub(crate) fn fuzz(seconds: &str) -> Result<()> {
    let seconds: u32 = seconds.parse().context("--seconds takes a whole number")?;
    tool("fuzz", CARGO_FUZZ_VERSION)?;
    let listed = cargo(&["fuzz", "list"])
        .output()
        .context("listing the fuzz targets")?;
    if !listed.status.success() {
        bail!(
            "listing the fuzz targets: {}",
            String::from_utf8_lossy(&listed.stderr).trim()
        );
    }
    let listed = String::from_utf8_lossy(&listed.stdout);
    let failed: Vec<&str> = listed
        .lines()
        .filter(|target| fuzz_target(target, seconds).is_err())
        .collect();
    if !failed.is_empty() {
        bail!(
            "there are findings in {}; inputs are in fuzz/artifacts",
            failed.join(", ")
        );
    }
    println!(
        "No finding in {} targets, {seconds} s each.",
        listed.lines().count()
    );
    Ok(())
}

/// New inputs go below `fuzz/target`, so that fuzzing leaves the committed corpus as it is.
fn fuzz_target(target: &str, seconds: u32) -> Result<()> {
    let found = format!("fuzz/target/corpus/{target}");
    let seeds = format!("fuzz/corpus/{target}");
    std::fs::create_dir_all(root().join(&found)).with_context(|| format!("making {found}"))?;
    let limit = format!("-max_total_time={seconds}");
    let mut arguments = vec!["fuzz", "run", target, found.as_str()];
    if root().join(&seeds).is_dir() {
        arguments.push(&seeds);
    }
    arguments.extend(["--", &limit]);
    // The sanitizers are unstable options of the compiler; the toolchain stays the pinned one.
    let result = step(
        &format!("fuzz {target} for {seconds} s"),
        cargo(&arguments).env("RUSTC_BOOTSTRAP", "1"),
    );
    result.inspect_err(|error| eprintln!("xtask: {error:#}"))
}

/// Removes everything that the other commands made inside the project.
pub(crate) fn clean() -> Result<()> {
    for made in [".lab", "out", "fuzz/target", "fuzz/artifacts", "target"] {
        let path = root().join(made);
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}
