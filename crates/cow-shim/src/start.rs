//! The beginning of the process, its forks, and the thread that serves the agent.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use cow_abi::{Features, SOCKET_ENV};

use crate::registry;
use crate::server::{can_look_up, serve};
use crate::socket::PATH_BYTES_MAX;

/// The thread has a packet (24 KiB), an answer and outcomes (4 KiB each) on its stack.
const STACK_BYTES: usize = 256 << 10;

/// What the beginning of the process has found, for the thread and for children.
struct Settings {
    path: [u8; PATH_BYTES_MAX],
    path_len: usize,
    features: Features,
    /// Whether huge pages were on until we came.
    huge_pages_were_on: bool,
}

struct Shared(UnsafeCell<Settings>);

// SAFETY: written once, by the loader's thread, before any other thread exists; read only after.
unsafe impl Sync for Shared {}

static SETTINGS: Shared = Shared(UnsafeCell::new(Settings {
    path: [0; PATH_BYTES_MAX],
    path_len: 0,
    features: Features(0),
    huge_pages_were_on: false,
}));

/// Generations of children that may still start the thread again: QEMU forks twice when it
/// puts itself into the background, and its helpers later are none of ours.
static GENERATIONS_LEFT: AtomicU32 = AtomicU32::new(0);
const GENERATIONS_MAX: u32 = 2;

/// The loader calls it before QEMU's `main`, and before any guest memory exists.
#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

#[cfg_attr(test, expect(dead_code, reason = "a test is not started this way"))]
extern "C" fn begin() {
    // SAFETY: no other thread exists yet, see `Shared`.
    let settings = unsafe { &mut *SETTINGS.0.get() };
    if !read_path(settings) || !is_qemu() {
        return;
    }
    // A program that QEMU starts must not think that it is meant.
    // SAFETY: no other thread exists that could read the environment.
    unsafe { libc::unsetenv(SOCKET_ENV.as_ptr()) };
    settings.huge_pages_were_on = huge_pages_are_on();
    if set_huge_pages(false) {
        settings.features = settings.features.with(Features::NO_HUGE_PAGES);
    }
    if can_look_up() {
        settings.features = settings.features.with(Features::BLOCK_LOOKUP);
    }
    if goes_into_background() {
        GENERATIONS_LEFT.store(GENERATIONS_MAX, Ordering::Relaxed);
        // SAFETY: the handler is a function of this library, which is never unloaded.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    }
    start_thread();
}

extern "C" fn in_child() {
    let left = GENERATIONS_LEFT.load(Ordering::Relaxed);
    if left > 0 {
        GENERATIONS_LEFT.store(left.saturating_sub(1), Ordering::Relaxed);
        registry::unlock_after_fork();
        start_thread();
    }
}

/// Starts the thread, with every signal blocked: they are QEMU's. Without it nothing is served,
/// which the agent sees.
fn start_thread() {
    // SAFETY: all zeros is a valid value of each; libc fills them.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { (zeroed(), zeroed()) };
    // SAFETY: as above.
    let mut attributes: libc::pthread_attr_t = unsafe { zeroed() };
    // SAFETY: as above.
    let mut thread: libc::pthread_t = unsafe { zeroed() };
    let attributes = &raw mut attributes;
    // SAFETY: every pointer is that of a local variable; the thread uses nothing of this frame.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        if libc::pthread_attr_init(attributes) == 0 {
            libc::pthread_attr_setdetachstate(attributes, libc::PTHREAD_CREATE_DETACHED);
            libc::pthread_attr_setstacksize(attributes, STACK_BYTES);
            libc::pthread_create(&raw mut thread, attributes, run, null_mut());
            libc::pthread_attr_destroy(attributes);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, null_mut());
    }
}

extern "C" fn run(_: *mut c_void) -> *mut c_void {
    // SAFETY: a C string; names the calling thread.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"gangway-cow".as_ptr()) };
    // SAFETY: written before this thread was made, only read since.
    let settings = unsafe { &*SETTINGS.0.get() };
    let path = settings.path.get(..settings.path_len).unwrap_or_default();
    let served = serve(path, settings.features);
    // Without the agent QEMU is as if this library were not there.
    if !served && settings.huge_pages_were_on {
        set_huge_pages(true);
    }
    null_mut()
}

/// Takes the socket's path from the environment; whether there is one that fits.
fn read_path(settings: &mut Settings) -> bool {
    // SAFETY: a C string; no other thread exists that could change the environment.
    let value = unsafe { libc::getenv(SOCKET_ENV.as_ptr()) };
    if value.is_null() {
        return false;
    }
    // SAFETY: the environment's strings end with a zero.
    let len = unsafe { libc::strlen(value) };
    if len == 0 || len > PATH_BYTES_MAX {
        return false;
    }
    for (i, to) in settings.path.iter_mut().take(len).enumerate() {
        // SAFETY: below the string's length.
        let [byte] = unsafe { *value.wrapping_add(i) }.to_ne_bytes();
        *to = byte;
    }
    settings.path_len = len;
    true
}

/// Whether this is QEMU, and not the shell or the wrapper that starts it: by what its program
/// exports, or by its file's name.
fn is_qemu() -> bool {
    if can_look_up() {
        return true;
    }
    let mut path = [0_u8; 4096];
    let name = c"/proc/self/exe".as_ptr();
    // SAFETY: a C string; pointer and length are those of `path`.
    let len = unsafe { libc::readlink(name, path.as_mut_ptr().cast(), path.len()) };
    let path = usize::try_from(len).ok().and_then(|len| path.get(..len));
    let file = path.and_then(|path| path.rsplit(|byte| *byte == b'/').next());
    file.is_some_and(|file| file.starts_with(b"qemu"))
}

fn huge_pages_are_on() -> bool {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0 }
}

/// Huge pages of the process. Off, because memory under small mappings is freed only if it is not
/// part of a huge page.
fn set_huge_pages(on: bool) -> bool {
    let disable = libc::c_ulong::from(!on);
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, disable, 0, 0, 0) == 0 }
}

/// Whether the command line has `-daemonize`.
fn goes_into_background() -> bool {
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    // SAFETY: a C string.
    let file = unsafe { libc::open(c"/proc/self/cmdline".as_ptr(), flags) };
    if file < 0 {
        return false;
    }
    let mut found = false;
    let mut argument = [0_u8; 16];
    let mut used = 0_usize;
    let mut buffer = [0_u8; 1024];
    loop {
        // SAFETY: pointer and length are those of `buffer`.
        let read = unsafe { libc::read(file, buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(read @ 1..) = usize::try_from(read) else {
            break;
        };
        for byte in buffer.get(..read).unwrap_or_default() {
            if *byte == 0 {
                let name = argument.get(..used).unwrap_or_default();
                found |= name == b"-daemonize" || name == b"--daemonize";
                used = 0;
            } else {
                // A longer one is none of those; its length says so.
                if let Some(place) = argument.get_mut(used) {
                    *place = *byte;
                    used = used.saturating_add(1);
                }
            }
        }
    }
    // SAFETY: opened above, known to nobody else.
    unsafe { libc::close(file) };
    found
}
