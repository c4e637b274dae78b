//! QEMU programs and their versions.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::qmp_wire::VersionTriple;

/// Version of a QEMU. Ordered as versions are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct QemuVersion {
    /// As in 10.0.2: 10.
    pub major: u32,
    /// 0.
    pub minor: u32,
    /// 2.
    pub micro: u32,
}

impl QemuVersion {
    /// Reads the first `a.b.c` after the word "version".
    fn from_text(text: &str) -> Option<Self> {
        let (_, number) = text.split_once("version ")?;
        let mut parts = number.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        let mut next = || parts.next()?.ok();
        Some(Self {
            major: next()?,
            minor: next()?,
            micro: next()?,
        })
    }
}

impl From<VersionTriple> for QemuVersion {
    fn from(
        VersionTriple {
            major,
            minor,
            micro,
        }: VersionTriple,
    ) -> Self {
        Self {
            major,
            minor,
            micro,
        }
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A QEMU program that was found to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuBinary {
    /// The program.
    pub path: PathBuf,
    /// What `--version` says.
    pub version: QemuVersion,
}

impl QemuBinary {
    /// Asks the program at `path` for its version.
    ///
    /// # Errors
    /// If it cannot be started, or is no QEMU (`InvalidData`).
    pub fn probe(path: &Path) -> io::Result<Self> {
        let output = Command::new(path)
            .arg("--version")
            .stdin(Stdio::null())
            .output()?;
        let version = QemuVersion::from_text(&String::from_utf8_lossy(&output.stdout));
        let version = version.ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self {
            path: path.to_owned(),
            version,
        })
    }

    /// The QEMUs for x86-64 guests in the directories of `search_path` (as `PATH` has them).
    #[must_use]
    pub fn find(search_path: &std::ffi::OsStr) -> Vec<Self> {
        std::env::split_paths(search_path)
            .map(|directory| directory.join("qemu-system-x86_64"))
            .filter_map(|path| Self::probe(&path).ok())
            .collect()
    }

    /// The `-L` arguments with which a program that was unpacked, not installed, finds its
    /// firmware: `usr/share/{qemu,seabios}` beside its `usr/bin`. Empty for an installed one,
    /// which knows its places.
    #[must_use]
    pub fn data_args(path: &Path) -> Vec<String> {
        let Some(usr) = path.parent().and_then(Path::parent) else {
            return Vec::new();
        };
        if usr == Path::new("/usr") || usr == Path::new("/") {
            return Vec::new();
        }
        ["share/qemu", "share/seabios"]
            .map(|directory| usr.join(directory))
            .into_iter()
            .filter(|directory| directory.is_dir())
            .flat_map(|directory| ["-L".to_owned(), directory.display().to_string()])
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered_as_numbers() {
        let read = |text| QemuVersion::from_text(text).map(|v| v.to_string());
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(read(debian), Some("7.2.22".to_owned()));
        assert_eq!(
            read("QEMU emulator version 10.0.2"),
            Some("10.0.2".to_owned())
        );
        for odd in [
            "",
            "version ",
            "version 7",
            "version 7.x.1",
            "version 99999999999.1.1",
        ] {
            assert_eq!(read(odd), None);
        }
        let version = |major| QemuVersion {
            major,
            minor: 0,
            micro: 0,
        };
        assert!(version(7) < version(10));
    }

    #[test]
    fn an_unpacked_program_is_told_where_its_data_is() {
        let root = tempfile::tempdir().unwrap();
        let share = root.path().join("usr/share/seabios");
        std::fs::create_dir_all(&share).unwrap();
        let program = root.path().join("usr/bin/qemu-system-x86_64");
        assert_eq!(
            QemuBinary::data_args(&program),
            ["-L", &share.display().to_string()]
        );
        assert!(QemuBinary::data_args(Path::new("/usr/bin/qemu-system-x86_64")).is_empty());
        assert!(QemuBinary::data_args(Path::new("qemu-system-x86_64")).is_empty());
    }

    #[test]
    fn a_program_that_is_no_qemu_is_refused() {
        let error = QemuBinary::probe(Path::new("/bin/true")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
