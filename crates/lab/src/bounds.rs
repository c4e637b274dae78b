//! The least that a migration of these guests could send: what is left of their memory when every
//! content is written once and compressed by the wire's codec with all the window that helps it.
//!
//! Bound 1 has a stream for each pair of hosts; a content is in the stream of the first pair that
//! has it. Bound 2 has a single stream for the rack. Both are zstd at level 1 with a window of
//! 128 MiB, and know neither headers nor references. A migration that is told nothing but the
//! contents can come close to bound 1; bound 2 shows what the separate windows cost.

use std::collections::HashSet;
use std::io::Write;

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::json;
use zstd::stream::write::Encoder;

use crate::bench::Bench;
use crate::guest::Vm;
use crate::memory::GuestMemory;

const LEVEL: i32 = 1;
/// Logarithm of the window, 128 MiB: a bound does not depend on what window agents can afford.
const WINDOW_LOG: u32 = 27;
/// Nothing waits for the result; whatever else the machine does goes first.
const NICE: i32 = 19;

/// What the memory of a run's guests comes to. Pages are of 4 KiB; contents are distinct pages
/// whose bytes are not all equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// All pages of all VMs.
    pub pages: u64,
    /// Of these, pages whose bytes are not all equal.
    pub nonfill_pages: u64,
    /// Bytes of those: what a migration sends that knows of fill pages alone.
    pub nonfill_bytes: u64,
    /// Contents, counted once for each VM.
    pub vm_contents: u64,
    /// Contents, counted once for each source host.
    pub host_contents: u64,
    /// Contents, counted once.
    pub rack_contents: u64,
    /// Bound 1: one compressed stream for each pair of hosts.
    pub host_pairs_zstd_bytes: u64,
    /// Bound 2: one compressed stream for all.
    pub rack_zstd_bytes: u64,
}

/// Computes the bounds from the guests' memory at their targets. The VMs are stopped and stay so.
/// Takes memory for two windows of the codec and 16 bytes for each content.
pub fn compute(bench: &Bench<'_>) -> anyhow::Result<Bounds> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // On Linux a priority belongs to a thread. Without it the result is the same.
            let _ = rustix::process::setpriority_process(None, NICE);
            measure(bench)
        });
        worker
            .join()
            .map_err(|_| anyhow!("the thread that computes the bounds panicked"))?
    })
}

fn measure(bench: &Bench<'_>) -> anyhow::Result<Bounds> {
    let mut meter = Meter::new()?;
    // The VMs of a source host go to one target: `vms` has them one after the other.
    for host in bench
        .vms
        .chunk_by(|a, b| a.source.name() == b.source.name())
    {
        meter.begin_host()?;
        for vm in host {
            meter.begin_vm();
            let memory = stopped(vm).with_context(|| format!("reading {}", vm.name))?;
            memory.for_each_page(|page| meter.page(page))?;
        }
    }
    meter.finish()
}

fn stopped(vm: &Vm) -> anyhow::Result<GuestMemory> {
    let mut qmp = vm.qmp(&vm.target)?;
    qmp.execute("stop", json!({}))?;
    GuestMemory::of(&mut qmp)
}

/// Counts contents and compresses the new ones, host by host and VM by VM.
struct Meter {
    found: Bounds,
    /// Of this VM, of this host, of the rack.
    known: [HashSet<[u8; 16]>; 3],
    pair: Stream,
    rack: Stream,
}

impl Meter {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            found: Bounds::default(),
            known: Default::default(),
            pair: Stream::new()?,
            rack: Stream::new()?,
        })
    }

    fn begin_host(&mut self) -> anyhow::Result<()> {
        self.known[1].clear();
        let pair = std::mem::replace(&mut self.pair, Stream::new()?);
        self.found.host_pairs_zstd_bytes += pair.finish()?;
        Ok(())
    }

    fn begin_vm(&mut self) {
        self.known[0].clear();
    }

    fn page(&mut self, page: &[u8]) -> anyhow::Result<()> {
        self.found.pages += 1;
        if page.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        self.found.nonfill_pages += 1;
        self.found.nonfill_bytes += page.len() as u64;
        // 128 bits tell contents apart that nobody chose with a collision in mind.
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
        let [vm, host, rack] = self.known.each_mut().map(|known| known.insert(id));
        self.found.vm_contents += u64::from(vm);
        self.found.host_contents += u64::from(host);
        self.found.rack_contents += u64::from(rack);
        if rack {
            self.pair.write(page)?;
            self.rack.write(page)?;
        }
        Ok(())
    }

    fn finish(mut self) -> anyhow::Result<Bounds> {
        self.found.host_pairs_zstd_bytes += self.pair.finish()?;
        self.found.rack_zstd_bytes = self.rack.finish()?;
        Ok(self.found)
    }
}

/// A compressed stream of which only the length is kept. Without contents it has none.
struct Stream {
    encoder: Encoder<'static, Count>,
    used: bool,
}

impl Stream {
    fn new() -> anyhow::Result<Self> {
        let make = || {
            let mut encoder = Encoder::new(Count(0), LEVEL)?;
            encoder.window_log(WINDOW_LOG)?;
            encoder.long_distance_matching(true)?;
            Ok::<_, std::io::Error>(encoder)
        };
        Ok(Self {
            encoder: make().context("setting up zstd")?,
            used: false,
        })
    }

    fn write(&mut self, page: &[u8]) -> anyhow::Result<()> {
        self.used = true;
        self.encoder.write_all(page).context("compressing")
    }

    fn finish(self) -> anyhow::Result<u64> {
        let Count(bytes) = self.encoder.finish().context("compressing")?;
        Ok(if self.used { bytes } else { 0 })
    }
}

/// Keeps the number of bytes written, and none of them.
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that zstd cannot shorten.
    fn noise(seed: u8) -> Vec<u8> {
        let mut page = vec![0; 4096];
        blake3::Hasher::new()
            .update(&[seed])
            .finalize_xof()
            .fill(&mut page);
        page
    }

    /// Hosts, their VMs, their pages.
    fn bounds(hosts: &[&[&[Vec<u8>]]]) -> Bounds {
        let mut meter = Meter::new().unwrap();
        for vms in hosts {
            meter.begin_host().unwrap();
            for pages in *vms {
                meter.begin_vm();
                pages.iter().for_each(|page| meter.page(page).unwrap());
            }
        }
        meter.finish().unwrap()
    }

    #[test]
    fn a_content_counts_once_for_each_vm_host_and_rack_that_has_it() {
        let (a, b, c) = (noise(1), noise(2), noise(3));
        let zero = vec![0; 4096];
        let first: &[&[Vec<u8>]] = &[&[a.clone(), a.clone(), zero.clone()], &[a.clone(), b]];
        let second: &[&[Vec<u8>]] = &[&[a, c, vec![7; 4096]]];
        let found = bounds(&[first, second]);
        assert_eq!((found.pages, found.nonfill_pages), (8, 6));
        assert_eq!(found.nonfill_bytes, 6 * 4096);
        assert_eq!(
            (found.vm_contents, found.host_contents, found.rack_contents),
            (5, 4, 3)
        );
        // Three contents without pattern, and what the format adds.
        for bytes in [found.host_pairs_zstd_bytes, found.rack_zstd_bytes] {
            assert!((3 * 4096..3 * 4096 + 200).contains(&bytes), "{bytes}");
        }
    }

    #[test]
    fn a_content_is_given_to_the_first_host_pair_alone() {
        let page = noise(1);
        let host: &[&[Vec<u8>]] = &[std::slice::from_ref(&page)];
        let one = bounds(&[host]);
        let two = bounds(&[host, host]);
        assert_eq!(one.host_pairs_zstd_bytes, two.host_pairs_zstd_bytes);
        assert_eq!(two.host_contents, 2);
        assert_eq!(bounds(&[]).host_pairs_zstd_bytes, 0);
    }

    #[test]
    fn only_one_stream_finds_what_pages_of_two_hosts_have_in_common() {
        let page = noise(1);
        let mut nearly = page.clone();
        nearly[0] ^= 1;
        let found = bounds(&[&[&[page]], &[&[nearly]]]);
        assert!(found.host_pairs_zstd_bytes > 8192);
        assert!(found.rack_zstd_bytes < 4096 + 200);
    }
}
