//! What scripts/setup and scripts/build-guest-image have put into `.lab`, and our own programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::shell::output;

/// Directory, at the root of the project, with everything that was downloaded or built for the lab.
const LAB_DIR: &str = ".lab";
const PROGRAM: &str = "qemu-system-x86_64";

/// A QEMU on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// Absolute path.
    pub program: PathBuf,
    /// As QEMU says it, without the name.
    pub version: String,
}

/// The guests' kernel and file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Kernel.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: PathBuf,
    /// Release of the kernel.
    pub release: String,
}

/// Finds the QEMU of a version like `10.0`: in `.lab/qemu-VERSION`, else the machine's own.
pub fn qemu(wanted: &str) -> anyhow::Result<Qemu> {
    let unpacked = lab_dir()?.join(format!("qemu-{wanted}/usr/bin/{PROGRAM}"));
    let program = if unpacked.exists() {
        unpacked
    } else {
        on_path(PROGRAM)?
    };
    let text = output(Command::new(&program).arg("--version"))?;
    let version = text
        .lines()
        .next()
        .and_then(|line| line.split("version ").nth(1))
        .with_context(|| format!("{} does not say its version", program.display()))?
        .to_owned();
    ensure!(
        version.starts_with(&format!("{wanted}.")),
        "QEMU {wanted} is wanted, {} is {version}; run scripts/setup",
        program.display()
    );
    Ok(Qemu { program, version })
}

/// Which kernel a guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Debian 12's.
    Release,
    /// That of its backports, which is the next Debian's.
    Backports,
}

/// Finds the guest's image.
pub fn image(suite: Suite) -> anyhow::Result<Image> {
    let (name, argument) = match suite {
        Suite::Release => ("image", ""),
        Suite::Backports => ("image-backports", " backports"),
    };
    let dir = lab_dir()?.join(name);
    let release = std::fs::read_to_string(dir.join("release")).with_context(|| {
        format!(
            "no guest in {}; run scripts/build-guest-image{argument}",
            dir.display()
        )
    })?;
    Ok(Image {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        release: release.trim().to_owned(),
    })
}

/// What scenarios with applications run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workloads {
    /// A tree with the programs of the hosts and all that these need.
    pub root: PathBuf,
    /// What guests unpack over their own initramfs.
    pub initrd: PathBuf,
}

/// Finds the applications.
pub fn workloads() -> anyhow::Result<Workloads> {
    let dir = lab_dir()?.join("workloads");
    let initrd = dir.join("initrd");
    ensure!(
        initrd.is_file(),
        "no applications in {}; run scripts/build-workload-image",
        dir.display()
    );
    Ok(Workloads {
        root: dir.join("root"),
        initrd,
    })
}

impl Image {
    /// The image with the applications in it. A kernel unpacks archives that follow each other one
    /// over the other.
    pub fn with(&self, workloads: &Workloads) -> anyhow::Result<Self> {
        let path = workloads.initrd.with_extension("whole");
        let mut both = std::fs::read(&self.initrd).context("reading the initramfs")?;
        // Each archive begins at a word.
        both.resize(both.len().next_multiple_of(4), 0);
        both.extend(std::fs::read(&workloads.initrd).context("reading the applications")?);
        let part = path.with_extension(format!("part{}", std::process::id()));
        std::fs::write(&part, both).with_context(|| format!("writing {}", part.display()))?;
        std::fs::rename(&part, &path).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self {
            initrd: path,
            ..self.clone()
        })
    }
}

/// Finds `gangway`: as configured, else beside this program.
pub fn gangway(configured: Option<&Path>) -> anyhow::Result<PathBuf> {
    let path = match configured {
        Some(path) => std::path::absolute(path).context("resolving its path")?,
        None => {
            let own = std::env::current_exe().context("finding this program")?;
            // Tests stand one directory deeper, in `deps`.
            own.ancestors()
                .skip(1)
                .take(2)
                .map(|dir| dir.join("gangway"))
                .find(|path| path.is_file())
                .context("gangway was not built; run `cargo build --bin gangway`")?
        }
    };
    ensure!(path.is_file(), "{} is not a program", path.display());
    Ok(path)
}

fn lab_dir() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let here = std::env::current_dir().context("finding the current directory")?;
    own.ancestors()
        .chain(here.ancestors())
        .map(|dir| dir.join(LAB_DIR))
        .find(|dir| dir.is_dir())
        .context("no .lab directory above this program or the current directory; run scripts/setup")
}

fn on_path(program: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
    {
        Some(found) => Ok(found),
        None => bail!("{program} is not installed; run scripts/setup"),
    }
}
