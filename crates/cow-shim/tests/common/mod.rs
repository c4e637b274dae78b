//! What the tests of the library share.
#![allow(dead_code, reason = "each test uses a part")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use guest::{CowLibrary, CowListener, RamBlock};
use page::{ByteLen, HostAddr, PAGE_SIZE};

/// The library, where cargo puts it for the tests.
pub(crate) fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let file = test.parent().unwrap().join(cow_abi::LIBRARY_FILE);
    assert!(file.is_file(), "{} was not built", file.display());
    file
}

/// Tries until there is a result; fails after `limit`.
pub(crate) fn within<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(start.elapsed() < limit, "nothing within {limit:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A directory in the file system of this test program.
pub(crate) fn near_dir() -> tempfile::TempDir {
    let test = std::env::current_exe().unwrap();
    tempfile::tempdir_in(test.parent().unwrap()).unwrap()
}

/// A page with every byte `byte`.
pub(crate) fn page_of(byte: u8) -> [u8; PAGE_SIZE] {
    [byte; PAGE_SIZE]
}

/// A process that does with its memory what the test says: this test program again, with the
/// name of a QEMU, and with the library.
pub(crate) struct Puppet {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(crate) memory: RamBlock,
    pub(crate) dir: tempfile::TempDir,
}

const PUPPET_PAGES: &str = "GANGWAY_TEST_PUPPET_PAGES";

impl Puppet {
    /// Starts one with `pages` of memory and the library, and a listener for it.
    pub(crate) fn start(pages: usize) -> (Self, CowListener) {
        let dir = near_dir();
        let listener = CowListener::bind(&dir.path().join("cow"), &library()).unwrap();
        let puppet = Self::launch(pages, dir, |command| {
            command.envs(listener.environment().iter().map(|(n, v)| (n, v)));
        });
        (puppet, listener)
    }

    /// Starts one that is served, with its memory offered as block 0.
    pub(crate) fn served(pages: usize) -> (Self, CowLibrary) {
        let (puppet, listener) = Self::start(pages);
        let mut library = listener.accept(puppet.pid()).unwrap();
        let addr = library.add_block(0, &puppet.memory).unwrap();
        assert_eq!(Some(addr), puppet.memory.hva);
        (puppet, library)
    }

    pub(crate) fn launch(
        pages: usize,
        dir: tempfile::TempDir,
        set_up: impl FnOnce(&mut Command),
    ) -> Self {
        let program = dir.path().join("qemu-puppet");
        // A copy could still be open for writing in a child that another test is just starting.
        std::fs::hard_link(std::env::current_exe().unwrap(), &program).unwrap();
        let mut command = Command::new(&program);
        command
            .args(["--exact", "puppet", "--nocapture", "--test-threads=1"])
            .env(PUPPET_PAGES, pages.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        set_up(&mut command);
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut puppet = Self {
            child,
            input,
            output,
            memory: RamBlock {
                name: "puppet".to_owned(),
                used_len: ByteLen((pages * PAGE_SIZE) as u64),
                hva: None,
                page_size: PAGE_SIZE as u64,
            },
            dir,
        };
        let addr = puppet.answer().parse().unwrap();
        puppet.memory.hva = Some(HostAddr(addr));
        puppet
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says one line and returns the answer.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        // The test harness of the child talks, too.
        loop {
            let mut line = String::new();
            assert!(
                self.output.read_line(&mut line).unwrap() > 0,
                "the puppet is gone"
            );
            if let Some((_, answer)) = line.split_once("puppet: ") {
                return answer.trim().to_owned();
            }
        }
    }

    pub(crate) fn byte(&mut self, page: usize) -> u8 {
        self.ask(&format!("read {page}")).parse().unwrap()
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body of the test that is the puppet, if this process is one.
pub(crate) fn be_a_puppet() {
    let Some(pages) = std::env::var(PUPPET_PAGES).ok() else {
        return;
    };
    let len = pages.parse::<usize>().unwrap() * PAGE_SIZE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: advice about the mapping just made.
        assert_eq!(unsafe { libc::madvise(base, len, advice) }, 0);
    }
    println!("\npuppet: {}", base.addr());
    let mut watch = Watch::default();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<usize>().unwrap();
        let place = |i: usize| base.cast::<u8>().wrapping_add(number(i) * PAGE_SIZE);
        let answer = match words[0] {
            // SAFETY: the test names pages of the mapping.
            "read" => i64::from(unsafe { place(1).read_volatile() }),
            "write" => {
                // SAFETY: as above.
                unsafe { place(1).write_volatile(u8::try_from(number(2)).unwrap()) };
                0
            }
            "discard" => {
                let (addr, len) = (place(1).cast(), number(2) * PAGE_SIZE);
                // SAFETY: as above; nothing refers to these pages.
                i64::from(unsafe { libc::madvise(addr, len, libc::MADV_DONTNEED) })
            }
            "bench" => bench(number(1)),
            "watch" => watch.begin(base, len),
            "wait" => watch.wait(place(1)),
            "woken" => watch.woken(),
            "place" => watch.place(place(1), u8::try_from(number(2)).unwrap()),
            other => panic!("no such command: {other}"),
        };
        println!("puppet: {answer}");
    }
}

/// The puppet's memory as a QEMU in post-copy has it: pages that are not there are waited for.
#[derive(Default)]
struct Watch {
    fd: libc::c_int,
    waiting: Option<Receiver<u8>>,
}

impl Watch {
    fn begin(&mut self, base: *mut libc::c_void, len: usize) -> i64 {
        const API: libc::c_ulong = 0xc018_aa3f;
        const REGISTER: libc::c_ulong = 0xc020_aa00;
        let mut api = [0xaa_u64, 0, 0];
        // Start, length, missing pages, what the kernel allows.
        let mut range = [base.addr() as u64, len as u64, 1, 0];
        // SAFETY: the arguments are of the sizes that the numbers tell; the memory is the puppet's.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            self.fd = libc::c_int::try_from(fd).unwrap();
            assert_eq!(libc::ioctl(self.fd, API, api.as_mut_ptr()), 0);
            i64::from(libc::ioctl(self.fd, REGISTER, range.as_mut_ptr()))
        }
    }

    /// Somebody reads the page, and has to wait for it.
    fn wait(&mut self, page: *mut u8) -> i64 {
        let (sender, receiver) = channel();
        let addr = page.expose_provenance();
        std::thread::spawn(move || {
            let page = std::ptr::with_exposed_provenance::<u8>(addr);
            // SAFETY: a page of the puppet's memory.
            let _ = sender.send(unsafe { page.read_volatile() });
        });
        let is_there = receiver.recv_timeout(Duration::from_millis(100)).is_ok();
        self.waiting = Some(receiver);
        i64::from(is_there)
    }

    /// What was read, once it is there; -1 if it does not come.
    fn woken(&mut self) -> i64 {
        let read = self.waiting.take().unwrap();
        read.recv_timeout(Duration::from_secs(10))
            .map_or(-1, i64::from)
    }

    /// As QEMU places a page of these bytes: how much was copied, or an error number, negative.
    fn place(&self, page: *mut u8, byte: u8) -> i64 {
        const COPY: libc::c_ulong = 0xc028_aa03;
        let bytes = page_of(byte);
        let (to, from) = (
            page.addr() as u64,
            bytes.as_ptr().expose_provenance() as u64,
        );
        let mut copy = [to, from, PAGE_SIZE as u64, 0, 0];
        // SAFETY: the argument is of the size that the number tells; both pages are the puppet's.
        let result = unsafe { libc::ioctl(self.fd, COPY, copy.as_mut_ptr()) };
        match result {
            0 => copy[4].cast_signed(),
            _ => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap()),
        }
    }
}

/// Picoseconds for a call of `ioctl` and one of `madvise` together, of the kind that the kernel
/// refuses at once: the quickest of short series, which nothing has disturbed.
fn bench(series: usize) -> i64 {
    const CALLS: u32 = 500;
    let mut best = Duration::MAX;
    for _ in 0..series {
        let start = Instant::now();
        for _ in 0..CALLS {
            // SAFETY: there is no such descriptor, and no memory of this length.
            unsafe {
                std::hint::black_box(libc::ioctl(-1, 0, 0));
                std::hint::black_box(libc::madvise(std::ptr::null_mut(), 0, libc::MADV_DONTNEED));
            }
        }
        best = best.min(start.elapsed());
    }
    i64::try_from((best * 1000 / CALLS).as_nanos()).unwrap()
}

/// A value in kB of `/proc/PID/smaps_rollup`.
pub(crate) fn rollup_kib(pid: u32, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.unwrap().trim_matches([':', ' ']).split(' ').next();
    number.unwrap().parse().unwrap()
}

/// Flags of every mapping of the process that lies in the range.
pub(crate) fn flags_in(pid: u32, start: HostAddr, len: ByteLen) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut inside = None;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some((range, rest)) = line.split_once(' ')
            && let Some((from, to)) = range.split_once('-')
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        {
            let is_in = from < start.0 + len.0 && to > start.0;
            inside = is_in.then(|| rest.to_owned());
        } else if let (Some(flags), Some(area)) = (line.strip_prefix("VmFlags:"), &inside) {
            found.push((area.clone(), flags.trim().to_owned()));
        }
    }
    found
}

/// The library's thread in the process: its directory in `/proc`.
fn thread_of(pid: u32) -> Option<PathBuf> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut tasks = tasks
        .into_iter()
        .flatten()
        .flatten()
        .map(|task| task.path());
    tasks.find(|task| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "gangway-cow")
    })
}

/// Whether the library's thread is in the process.
pub(crate) fn has_thread(pid: u32) -> bool {
    thread_of(pid).is_some()
}

/// Time that the library's thread has spent on a processor, whatever else the machine does.
pub(crate) fn thread_time(pid: u32) -> Duration {
    let path = thread_of(pid).unwrap().join("schedstat");
    let text = std::fs::read_to_string(path).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// A pool that holds `pages`.
pub(crate) fn pool(pages: &[[u8; PAGE_SIZE]]) -> sys::Memfd {
    let pool = sys::Memfd::create_growing("gangway-test-pool").unwrap();
    pool.set_len(ByteLen((pages.len() * PAGE_SIZE) as u64))
        .unwrap();
    for (page, i) in pages.iter().zip(0_u64..) {
        pool.write_at(i * PAGE_SIZE as u64, page).unwrap();
    }
    pool
}

/// The workspace's directory.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .parent()
        .unwrap()
}
