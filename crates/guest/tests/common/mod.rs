//! Real QEMUs for the tests: bare firmware, no disk, no network.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest::{QemuBinary, Qmp, SourceGuest, TargetGuest};

/// A QEMU program with what it needs to run from where it lies.
#[derive(Clone)]
pub(crate) struct Qemu {
    binary: PathBuf,
    /// Machine type that every QEMU of the tests has, or this one's own.
    pub(crate) machine: &'static str,
}

impl Qemu {
    /// The distribution's: `GANGWAY_QEMU`, or the one on the `PATH`.
    pub(crate) fn current() -> Self {
        let named = std::env::var_os("GANGWAY_QEMU").map(PathBuf::from);
        let found = named.or_else(|| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            QemuBinary::find(&path)
                .into_iter()
                .next()
                .map(|qemu| qemu.path)
        });
        Self::checked(
            &found.expect("no QEMU on the PATH and GANGWAY_QEMU is not set"),
            8,
        )
    }

    /// QEMU 7.2: `GANGWAY_QEMU_72`, or where the set-up script unpacks it.
    pub(crate) fn old() -> Self {
        let unpacked = "../../.lab/qemu-7.2/usr/bin/qemu-system-x86_64";
        let unpacked = || Path::new(env!("CARGO_MANIFEST_DIR")).join(unpacked);
        let binary = std::env::var_os("GANGWAY_QEMU_72").map_or_else(unpacked, PathBuf::from);
        Self::checked(&binary, 7).with_common_machine()
    }

    /// With the machine type that every QEMU of the tests has.
    pub(crate) fn with_common_machine(self) -> Self {
        Self {
            machine: "pc-i440fx-7.2",
            ..self
        }
    }

    fn checked(binary: &Path, major_min: u32) -> Self {
        let probed = QemuBinary::probe(binary).unwrap_or_else(|error| {
            panic!(
                "{} is no usable QEMU ({error}); `scripts/setup` gets the QEMUs of the tests",
                binary.display()
            )
        });
        assert!(
            probed.version.major >= major_min,
            "{probed:?} is older than the tests expect"
        );
        Self {
            binary: binary.to_owned(),
            machine: "pc",
        }
    }

    /// The program and where its data is: how a command line begins.
    pub(crate) fn program(&self) -> Vec<String> {
        let mut argv = vec![self.binary.display().to_string()];
        argv.extend(QemuBinary::data_args(&self.binary));
        argv
    }

    /// The command line of a VM with its sockets in `dir`.
    pub(crate) fn argv(&self, dir: &Path, extra: &[&str]) -> Vec<String> {
        let mut argv = self.program();
        let qmp = format!("unix:{},server=on,wait=off", dir.join("qmp").display());
        let machine = format!("{},accel=tcg", self.machine);
        let fixed = [
            "-machine",
            &machine,
            "-m",
            "64M",
            "-nodefaults",
            "-display",
            "none",
            "-name",
            "guest=vm,debug-threads=on",
            "-qmp",
            &qmp,
        ];
        argv.extend(
            fixed
                .into_iter()
                .chain(extra.iter().copied())
                .map(str::to_owned),
        );
        argv
    }

    /// Starts a VM as its owner would, and waits for its monitor.
    pub(crate) fn start(&self, extra: &[&str]) -> Vm {
        let dir = tempfile::tempdir().unwrap();
        let argv = self.argv(dir.path(), extra);
        let child = Command::new(&argv[0])
            .args(&argv[1..])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let vm = Vm { child, dir };
        // Wait until QEMU serves: the first connection that is greeted.
        within(Duration::from_secs(20), || {
            Qmp::connect(&vm.qmp(), Duration::from_secs(5))
                .ok()
                .map(drop)
        });
        vm
    }
}

/// A VM that the test owns; killed when dropped.
pub(crate) struct Vm {
    pub(crate) child: Child,
    pub(crate) dir: tempfile::TempDir,
}

impl Vm {
    pub(crate) fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    pub(crate) fn attach(&self) -> SourceGuest {
        SourceGuest::attach(&self.qmp()).unwrap().0
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A target that is killed when dropped.
pub(crate) struct Target {
    pub(crate) guest: TargetGuest,
    pub(crate) dir: tempfile::TempDir,
}

impl Target {
    pub(crate) fn start(argv: &[String], dir: tempfile::TempDir) -> Self {
        let guest = TargetGuest::start(argv, &dir.path().join("log")).unwrap();
        Self { guest, dir }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let killed = self.guest.kill();
        if !thread::panicking() {
            killed.unwrap();
        }
    }
}

/// Accepts one connection at `from` and copies bytes both ways between it and `to`.
pub(crate) fn relay(from: &Path, to: &Path) {
    let listener = UnixListener::bind(from).unwrap();
    let to = to.to_owned();
    thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let target = UnixStream::connect(to).unwrap();
        let back = (target.try_clone().unwrap(), source.try_clone().unwrap());
        let return_path = thread::spawn(move || copy(back.0, back.1));
        copy(source, target);
        return_path.join().unwrap();
    });
}

/// Copies until the end, and passes the end on.
fn copy(mut from: UnixStream, mut to: UnixStream) {
    // An end that breaks off shows at the QEMUs.
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// Tries until there is a result; fails after `limit`.
pub(crate) fn within<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(start.elapsed() < limit, "nothing within {limit:?}");
        thread::sleep(Duration::from_millis(10));
    }
}
