//! One page over all scenarios of the papers' evaluation.

use std::path::{Path, PathBuf};

use super::{FILE_NAME, WriteError};
use crate::catalog;
use crate::results::{self, FileError, Results};

/// Reads the results of those scenarios of the papers that `dir` has.
pub fn load(dir: &Path) -> Result<Vec<Results>, FileError> {
    let dirs = catalog::PAPERS.iter().map(|name| dir.join(name));
    dirs.filter(|dir| dir.join(results::FILE_NAME).exists())
        .map(|dir| Results::load(&dir))
        .collect()
}

/// Writes the page into `dir` and returns its path.
pub fn write(all: &[Results], dir: &Path) -> Result<PathBuf, WriteError> {
    let path = dir.join(FILE_NAME);
    match std::fs::write(&path, format!("{}", all.len())) {
        Ok(()) => Ok(path),
        Err(source) => Err(WriteError { path, source }),
    }
}
