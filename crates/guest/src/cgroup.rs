//! The memory cgroups that limit this process, in both versions of the interface.

use std::fs;
use std::path::{Path, PathBuf};

use page::ByteLen;

/// Limits at or above this are what version 1 writes for none.
const UNLIMITED: u64 = 1 << 62;

/// A memory cgroup with a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryCgroup {
    /// Its directory.
    pub path: PathBuf,
    /// What its processes may use together.
    pub limit: ByteLen,
    /// What they use and could not be made to give back: usage without inactive page cache.
    pub used: ByteLen,
}

impl MemoryCgroup {
    /// What is left of the limit.
    #[must_use]
    pub fn available(&self) -> ByteLen {
        ByteLen(self.limit.0.saturating_sub(self.used.0))
    }

    /// Of the cgroups that hold this process, itself and its ancestors, the one with the least
    /// left; `None` if none has a limit. `root` is `/`, or a copy of its files.
    pub(crate) fn tightest(root: &Path) -> Option<Self> {
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let memberships = read("proc/self/cgroup");
        let mounts = read("proc/self/mountinfo");
        mounts
            .lines()
            .filter_map(Hierarchy::of_mount)
            .filter_map(|hierarchy| hierarchy.directory_of(&memberships).map(|d| (hierarchy, d)))
            .flat_map(|(hierarchy, directory)| hierarchy.limits(root, &directory))
            .min_by_key(Self::available)
    }
}

/// A mounted cgroup tree that can limit memory.
struct Hierarchy<'a> {
    interface: &'static Interface,
    /// The cgroup that is mounted.
    root: &'a Path,
    mount_point: &'a Path,
}

/// File names of one version.
struct Interface {
    limit: &'static str,
    usage: &'static str,
    inactive_cache: &'static str,
    /// Whether a line of `/proc/self/cgroup` (its number and its controllers) is about it.
    is_membership: fn(&str, &str) -> bool,
}

static V1: Interface = Interface {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive_cache: "total_inactive_file",
    is_membership: |_, controllers| controllers.split(',').any(|name| name == "memory"),
};

static V2: Interface = Interface {
    limit: "memory.max",
    usage: "memory.current",
    inactive_cache: "inactive_file",
    is_membership: |number, controllers| number == "0" && controllers.is_empty(),
};

impl<'a> Hierarchy<'a> {
    /// Reads a line of `mountinfo`: `id parent device ROOT MOUNT-POINT options [tags] - TYPE source
    /// SUPER-OPTIONS`.
    fn of_mount(line: &'a str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, mount_point) = (Path::new(mount.next()?), Path::new(mount.next()?));
        let mut filesystem = filesystem.split(' ');
        let (kind, options) = (filesystem.next()?, filesystem.nth(1)?);
        let interface = match kind {
            "cgroup2" => &V2,
            "cgroup" if options.split(',').any(|option| option == "memory") => &V1,
            _ => return None,
        };
        Some(Self {
            interface,
            root,
            mount_point,
        })
    }

    /// The directory of this process's cgroup. In a container its path can lie outside of what is
    /// mounted; what is mounted then is its own.
    fn directory_of(&self, memberships: &str) -> Option<PathBuf> {
        let path = memberships.lines().find_map(|line| {
            let (number, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            (self.interface.is_membership)(number, controllers).then_some(Path::new(path))
        })?;
        let below = path.strip_prefix(self.root).unwrap_or(Path::new(""));
        Some(self.mount_point.join(below))
    }

    /// The limits on the way from `directory` up to the mount point.
    fn limits(&self, root: &Path, directory: &Path) -> Vec<MemoryCgroup> {
        directory
            .ancestors()
            .take_while(|ancestor| ancestor.starts_with(self.mount_point))
            .filter_map(|ancestor| self.limit(root, ancestor))
            .collect()
    }

    fn limit(&self, root: &Path, directory: &Path) -> Option<MemoryCgroup> {
        let real = root.join(directory.strip_prefix("/").unwrap_or(directory));
        let number = |name: &str| {
            fs::read_to_string(real.join(name))
                .ok()?
                .trim()
                .parse()
                .ok()
        };
        // Version 2 says "max" for none.
        let limit: u64 = number(self.interface.limit).filter(|&limit| limit < UNLIMITED)?;
        let usage: u64 = number(self.interface.usage)?;
        let stat = fs::read_to_string(real.join("memory.stat")).unwrap_or_default();
        let cache = value_of(&stat, self.interface.inactive_cache).unwrap_or(0);
        let used = ByteLen(usage.saturating_sub(cache));
        Some(MemoryCgroup {
            path: directory.to_owned(),
            limit: ByteLen(limit),
            used,
        })
    }
}

/// The number behind `key` in a file of `key number` lines.
fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_tightest_ancestor_counts_and_cache_does_not_in_version_2() {
        let root = tree(&[
            ("proc/self/cgroup", "0::/vms.slice/agent.service\n"),
            (
                "proc/self/mountinfo",
                "9 8 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
            ),
            ("sys/fs/cgroup/vms.slice/memory.max", "1000\n"),
            ("sys/fs/cgroup/vms.slice/memory.current", "900\n"),
            (
                "sys/fs/cgroup/vms.slice/memory.stat",
                "anon 1\nfile 300\ninactive_file 200\n",
            ),
            ("sys/fs/cgroup/vms.slice/agent.service/memory.max", "max\n"),
            (
                "sys/fs/cgroup/vms.slice/agent.service/memory.current",
                "5\n",
            ),
        ]);
        let found = MemoryCgroup::tightest(root.path()).unwrap();
        assert_eq!(found.path, Path::new("/sys/fs/cgroup/vms.slice"));
        assert_eq!((found.limit, found.used), (ByteLen(1000), ByteLen(700)));
        assert_eq!(found.available(), ByteLen(300));
    }

    #[test]
    fn version_1_beside_an_empty_version_2_is_read() {
        let root = tree(&[
            ("proc/self/cgroup", "4:cpu:/\n3:rdma,memory:/box\n0::/\n"),
            (
                "proc/self/mountinfo",
                "7 6 0:1 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw\n\
                 8 6 0:2 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "7\n"),
            ("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "4096\n"),
            ("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "5000\n"),
        ]);
        let found = MemoryCgroup::tightest(root.path()).unwrap();
        assert_eq!(found.path, Path::new("/sys/fs/cgroup/memory/box"));
        assert_eq!(found.available(), ByteLen(0));
    }

    #[test]
    fn a_containers_own_mount_is_found_and_no_limit_is_none() {
        let mount = "8 6 0:2 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let limited = [
            ("proc/self/cgroup", "0::/elsewhere\n"),
            ("proc/self/mountinfo", mount),
            ("sys/fs/cgroup/memory.max", "50\n"),
            ("sys/fs/cgroup/memory.current", "20\n"),
        ];
        let found = MemoryCgroup::tightest(tree(&limited).path()).unwrap();
        assert_eq!(found.available(), ByteLen(30));
        assert_eq!(MemoryCgroup::tightest(tree(&limited[..2]).path()), None);
        assert_eq!(
            MemoryCgroup::tightest(tree(&[("proc/self/cgroup", "odd")]).path()),
            None
        );
    }
}
