//! Whether page faults of a guest can be served, as post-copy needs.

use rustix::mm::{UserfaultfdFlags, userfaultfd};

/// Whether this process may create a userfaultfd that also sees faults taken in the kernel,
/// which QEMU needs at the target of a post-copy: by privilege, by
/// `vm.unprivileged_userfaultfd`, or through `/dev/userfaultfd`.
#[must_use]
pub fn userfaultfd_usable() -> bool {
    // SAFETY: the descriptor is closed at once; no memory is ever registered with it, so no
    // thread can come to wait on it.
    let by_call = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) };
    let device = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    by_call.is_ok() || rustix::fs::access("/dev/userfaultfd", device).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_leaves_no_descriptor_open() {
        let open = || std::fs::read_dir("/proc/self/fd").map(Iterator::count);
        let usable = userfaultfd_usable();
        let before = open().unwrap();
        // Other tests open and close files meanwhile; a leak of this many would stand out.
        let answers = (0..500).filter(|_| userfaultfd_usable()).count();
        assert!(open().unwrap() < before + 200);
        assert_eq!(answers, if usable { 500 } else { 0 });
    }
}
